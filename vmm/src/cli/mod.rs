//! The command line: one file a subcommand. Parsing has no side effects.

mod policy;
mod run;
mod share;
mod test;

use std::error::Error;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Exit status of an error of the VMM or of its configuration.
pub const STATUS_ERROR: u8 = 125;

/// daxvm boots Linux guests that share host directories through virtio-fs, with DAX decided for each file.
#[derive(Debug, Parser)]
#[command(name = "daxvm", version, about, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(run::RunArgs),
    Test(test::TestArgs),
    Policy(policy::PolicyArgs),
}

/// Runs the program; returns its exit status.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors.
            let status = if error.use_stderr() { STATUS_ERROR } else { 0 };
            let _ = error.print();
            return ExitCode::from(status);
        }
    };
    init_logging();
    let result = match cli.command {
        Command::Run(args) => args.execute(),
        Command::Test(args) => args.execute(),
        Command::Policy(args) => args.execute(),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("daxvm: {}", chain(&*error));
            ExitCode::from(STATUS_ERROR)
        }
    }
}

/// An error and its causes, in one line.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // A transparent error says what its source says.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

fn init_logging() {
    use tracing_subscriber::EnvFilter;
    // fuse-backend-rs logs errors that a guest can cause at will; the device reports what matters of them.
    let default = || EnvFilter::new("warn,fuse_backend_rs=off");
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| default());
    // The first subscriber of the process; a second one is only possible where the library is embedded.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
}
