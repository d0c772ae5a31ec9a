//! The command line: one file a subcommand. Parsing has no side effects.

mod completions;
mod config;
mod ctl;
mod dry_run;
mod man;
mod policy;
mod root;
mod run;
mod sections;
mod share;
mod test;
mod top;

use std::error::Error;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
pub(crate) use devices::text::chain;

use crate::logging;

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
    Run(Box<run::RunArgs>),
    Test(test::TestArgs),
    Top(top::TopArgs),
    Ctl(ctl::CtlArgs),
    Policy(policy::PolicyArgs),
    Config(config::ConfigArgs),
    Completions(completions::CompletionsArgs),
    Man(man::ManArgs),
}

/// The whole command line, with the sections that follow the options.
fn command() -> clap::Command {
    sections::add_to_help(Cli::command())
}

/// Runs the program; returns its exit status.
pub fn main() -> ExitCode {
    let cli = match command().try_get_matches().and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => cli,
        Err(error) => {
            let error = with_tip(error);
            // Help and version are no errors.
            let status = if error.use_stderr() { STATUS_ERROR } else { 0 };
            let _ = error.print();
            return ExitCode::from(status);
        }
    };
    logging::init();
    let result = match cli.command {
        Command::Run(args) => args.execute(),
        Command::Test(args) => args.execute(),
        Command::Top(args) => args.execute(),
        Command::Ctl(args) => args.execute(),
        Command::Policy(args) => args.execute(),
        Command::Config(args) => args.execute(),
        Command::Completions(args) => args.execute(),
        Command::Man(args) => args.execute(),
    };
    logging::end();
    match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("daxvm: {}{}", chain(&*error), advice(&*error));
            ExitCode::from(STATUS_ERROR)
        }
    }
}

/// What to do about an error that any call can have, to be put behind its message.
fn advice(error: &(dyn Error + 'static)) -> &'static str {
    let codes = std::iter::successors(Some(error), |&error| error.source()).filter_map(|error| {
        let of_kvm = || error.downcast_ref::<kvm_ioctls::Error>().map(|error| error.errno());
        error.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error).or_else(of_kvm)
    });
    match codes.last() {
        Some(libc::EMFILE) => "; raise the limit of open files (ulimit -Hn)",
        Some(libc::ENFILE) => "; raise the host's limit of open files (fs.file-max)",
        _ => "",
    }
}

/// Says where a command goes that was given without `--`.
fn with_tip(mut error: clap::Error) -> clap::Error {
    let run = std::env::args_os().nth(1).is_some_and(|subcommand| subcommand == "run");
    let argument = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(argument)) if run && !argument.starts_with('-') => argument.clone(),
        _ => return error,
    };
    if error.kind() == ErrorKind::UnknownArgument {
        let tip = format!("a command comes after `--`: daxvm run [OPTIONS] -- {argument}");
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip.into()]));
    }
    error
}
