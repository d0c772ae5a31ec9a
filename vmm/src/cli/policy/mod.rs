//! `daxvm policy`: what a policy says of files, and why, before anything is booted.

mod check;
mod explain;
mod files;
mod progress;
mod simulate;

use std::error::Error;
use std::io;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use devices::text::Bytes;
use devices::virtio::fs::policy::WindowFacts;
use devices::virtio::fs::window::default_window_size;

use self::files::{Setting, Share};
use crate::config::{DEFAULT_MEMORY, parse_window};

/// See which files a policy makes DAX, and why, and what that costs; nothing is booted.
#[derive(Debug, Args)]
pub(super) struct PolicyArgs {
    #[command(subcommand)]
    command: PolicyCommand,
}

#[derive(Debug, Subcommand)]
enum PolicyCommand {
    Check(check::CheckArgs),
    Explain(explain::ExplainArgs),
    Simulate(simulate::SimulateArgs),
}

impl PolicyArgs {
    /// Does what was asked; returns the exit status.
    pub(super) fn execute(self) -> Result<u8, Box<dyn Error>> {
        let result = match self.command {
            PolicyCommand::Check(args) => args.execute(),
            PolicyCommand::Explain(args) => args.execute(),
            PolicyCommand::Simulate(args) => args.execute(),
        };
        match result {
            // Whoever reads has seen enough.
            Err(error) if is_broken_pipe(&*error) => Ok(0),
            other => other,
        }
    }
}

fn is_broken_pipe(error: &(dyn Error + 'static)) -> bool {
    let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
    let json = error.downcast_ref::<serde_json::Error>().and_then(serde_json::Error::io_error_kind);
    kind.or(json) == Some(io::ErrorKind::BrokenPipe)
}

/// What the share is, in all commands that look at files.
#[derive(Debug, Args)]
struct ShareArgs {
    /// The directory that is to be shared
    #[arg(long = "share", value_name = "DIR")]
    directory: PathBuf,
    /// The share is to be read-only
    #[arg(long = "ro")]
    read_only: bool,
}

impl ShareArgs {
    fn open(&self) -> Result<Share, Box<dyn Error>> {
        let wrong = |error| format!("Cannot look at the share {}: {error}", self.directory.display());
        Ok(Share::open(&self.directory).map_err(wrong)?)
    }

    /// The share with a window of `bytes` bytes in which nothing is mapped.
    fn setting(&self, bytes: u64) -> Setting {
        Setting { window: WindowFacts::idle(bytes), read_only: self.read_only }
    }
}

/// Adds to a sum. A few sparse files are enough to exceed what 64 bits hold.
fn add(sum: &mut u64, what: u64) {
    *sum = sum.saturating_add(what);
}

/// The window of a share for which the user gives none.
fn default_window() -> u64 {
    default_window_size(DEFAULT_MEMORY)
}

/// A window of `bytes` bytes, in words.
fn describe_window(bytes: u64) -> String {
    let window = WindowFacts::idle(bytes);
    format!(
        "window of {}: {} chunks of 2 MiB, of which the guest uses {} at a time; it costs the guest {}, used or not",
        Bytes(bytes),
        window.chunks,
        window.usable(),
        Bytes(WindowFacts::fixed_cost(bytes))
    )
}
