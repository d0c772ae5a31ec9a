//! File system suites on shares and on the host; `scripts/conformance` runs this program on the lab's host.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use tests::conformance::two_guests::{Party, Peer};
use tests::conformance::{ConformanceError, FileSystem, Matrix, Mode, Policy, Settings, Suite, run};

#[derive(Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    part: Option<Part>,
    #[command(flatten)]
    matrix: MatrixArgs,
}

/// What `scripts/conformance` takes.
#[derive(Args)]
struct MatrixArgs {
    /// The suites; without any, all
    suites: Vec<Suite>,
    /// A file system of the host; without any, all
    #[arg(long)]
    fs: Vec<FileSystem>,
    /// A policy of the share, and option of the mount; without any, all
    #[arg(long)]
    dax: Vec<Policy>,
    /// The guest's kernel, as scripts/fetch-kernel names it
    #[arg(long, default_value = "6.12-cloud")]
    kernel: String,
    /// Operations of each run of fsx
    #[arg(long, default_value_t = 100_000)]
    operations: u64,
    /// A seed of fsx
    #[arg(long, default_values_t = [1, 2, 3, 4])]
    seed: Vec<u64>,
    /// How fsx accesses its file; without any, each way
    #[arg(long)]
    mode: Vec<Mode>,
    /// Seconds for each stressor of stress-ng; dbench takes six times as many
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// How often two guests do the same to one file
    #[arg(long, default_value_t = 200)]
    rounds: u64,
}

#[derive(Subcommand)]
enum Part {
    /// One of the two that change a directory
    #[command(hide = true)]
    Peer {
        party: Party,
        dir: PathBuf,
        #[arg(long)]
        rounds: u64,
        /// With the case that maps a file in both
        #[arg(long)]
        mapping: bool,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli.part {
        Some(Part::Peer { party, dir, rounds, mapping }) => {
            match Peer::new(party, dir, rounds).run(mapping) {
                Ok(failed) if failed.is_empty() => ExitCode::SUCCESS,
                Ok(_) => ExitCode::FAILURE,
                Err(error) => fail(&error),
            }
        }
        None => match suites(cli.matrix) {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::FAILURE,
            Err(error) => fail(&error),
        },
    }
}

fn fail(error: &dyn std::error::Error) -> ExitCode {
    eprint!("conformance: {error}");
    let mut source = error.source();
    while let Some(error) = source {
        eprint!(": {error}");
        source = error.source();
    }
    eprintln!();
    ExitCode::from(2)
}

/// Whether nothing failed that counts.
fn suites(args: MatrixArgs) -> Result<bool, ConformanceError> {
    let MatrixArgs { suites, fs, dax, kernel, operations, mut seed, mode, seconds, rounds } = args;
    seed.sort_unstable();
    seed.dedup();
    let results = run(&Matrix {
        suites: or_all(suites),
        file_systems: or_all(fs),
        policies: or_all(dax),
        settings: Settings { kernel, operations, seeds: seed, modes: or_all(mode), seconds, rounds },
    })?;
    results.print();
    Ok(results.passed())
}

fn or_all<T: ValueEnum + PartialEq>(chosen: Vec<T>) -> Vec<T> {
    let is_chosen = |one: &&T| chosen.is_empty() || chosen.contains(one);
    T::value_variants().iter().filter(is_chosen).cloned().collect()
}
