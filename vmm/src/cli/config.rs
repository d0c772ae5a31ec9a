//! `daxvm config`: configuration files for `daxvm run --config`.

use std::error::Error;
use std::io::{self, Write};
use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::config::{RunConfig, schema};

/// Check configuration files, and say what can be in them
#[derive(Debug, Args)]
pub(super) struct ConfigArgs {
    #[command(subcommand)]
    command: ConfigCommand,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Print the JSON schema of configuration files, which editors complete and check them by
    Schema,
    /// Check a configuration file: print nothing, or each mistake as FILE:LINE:COLUMN: MISTAKE
    ///
    /// What the file names has to be there: directories, images, rule files.
    Check {
        /// The configuration file
        file: PathBuf,
    },
}

impl ConfigArgs {
    /// Does what was asked; returns the exit status.
    pub(super) fn execute(self) -> Result<u8, Box<dyn Error>> {
        match self.command {
            ConfigCommand::Schema => print(&format!("{:#}\n", schema())),
            ConfigCommand::Check { file } => {
                RunConfig::check_file(&file)?;
                Ok(0)
            }
        }
    }
}

/// Prints to standard output. Whoever has seen enough may close it.
pub(super) fn print(text: &str) -> Result<u8, Box<dyn Error>> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(0),
    }
}
