//! `daxvm ctl`: asks a running VM.

use std::error::Error;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::config::print;
use crate::api::get;
use crate::top::{ask, text};

/// Ask a running VM what it does
///
/// The VM must have been started with --api-socket.
#[derive(Debug, Args)]
pub(super) struct CtlArgs {
    /// The socket that --api-socket named
    socket: PathBuf,
    /// What to print
    #[arg(value_enum)]
    what: What,
    /// Print JSON, as the VM sends it; `metrics` are text for Prometheus always
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum What {
    /// What the VM is, and how it is
    Status,
    /// All counters, in the format of Prometheus
    Metrics,
    /// The files that have or had most of the DAX windows
    Files,
    /// The DAX windows: counters, decisions of the policy, and which chunk shows which file
    Window,
}

impl CtlArgs {
    /// Asks and prints; returns the exit status.
    pub(super) fn execute(self) -> Result<u8, Box<dyn Error>> {
        let socket = &self.socket;
        let path = match self.what {
            What::Status => "/v1/status",
            What::Metrics => "/metrics",
            What::Files => "/v1/files",
            What::Window => "/v1/window",
        };
        let text = match self.what {
            What::Metrics => get(socket, path)?,
            _ if self.json => get(socket, path)?,
            What::Status => text::status(&ask(socket, path)?),
            What::Files => text::files(&ask(socket, path)?),
            What::Window => text::windows(&ask(socket, path)?),
        };
        print(&text)
    }
}
