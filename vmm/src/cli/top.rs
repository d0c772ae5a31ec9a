//! `daxvm top`: shows a running VM's DAX windows.

use std::error::Error;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::config::print;
use crate::config::parse_interval;
use crate::top::live::{self, End};
use crate::top::{Snapshot, text};

/// Show the DAX windows of a running VM, live
///
/// The map shows which chunk of the window shows which file; the table has the files with the most chunks, and the last
/// lines what the policy decides. The VM must have been started with --api-socket.
#[derive(Debug, Args)]
pub(super) struct TopArgs {
    /// The socket that --api-socket named
    socket: PathBuf,
    /// How often to look
    #[arg(long, value_name = "TIME", value_parser = parse_interval, default_value = "1s")]
    interval: Duration,
    /// Print what there is now as plain text, and end
    #[arg(long)]
    once: bool,
    /// With --once: print JSON
    #[arg(long, requires = "once")]
    json: bool,
}

impl TopArgs {
    /// Shows it; returns the exit status.
    pub(super) fn execute(self) -> Result<u8, Box<dyn Error>> {
        if self.once {
            let snapshot = Snapshot::fetch(&self.socket)?;
            let text = match self.json {
                true => format!("{}\n", serde_json::to_string(&snapshot)?),
                false => text::snapshot(&snapshot),
            };
            return print(&text);
        }
        match live::run(&self.socket, self.interval)? {
            End::Quit => Ok(0),
            End::Gone => print("The VM has ended.\n"),
        }
    }
}
