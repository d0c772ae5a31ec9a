//! The benchmarks; `scripts/bench` runs this program on the lab's host.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tests::bench::{BenchError, Table, boot, dax, policy, runner};

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    benchmark: Benchmark,
}

#[derive(Subcommand)]
enum Benchmark {
    /// Boot to init, against QEMU's microvm
    Boot {
        /// Boots with each monitor
        #[arg(short, default_value_t = 5)]
        n: usize,
        /// The kernel, as scripts/fetch-kernel names it
        #[arg(long, default_value = "6.12-cloud")]
        kernel: String,
    },
    /// A large file by mmap and read(2), under each policy and with two windows, against QEMU with virtiofsd
    Dax {
        /// Size of the file, a multiple of 8
        #[arg(long, default_value_t = 256)]
        mib: u64,
        /// Boots of each guest
        #[arg(long, default_value_t = 3)]
        runs: usize,
        /// The kernel, as scripts/fetch-kernel names it
        #[arg(long, default_value = "6.12-cloud")]
        kernel: String,
    },
    /// Many small files beside some large ones and a small window, under each policy
    Policy {
        /// Small files, of 4 to 16 KiB
        #[arg(long, default_value_t = 20_000)]
        files: u32,
        /// The kernel, as scripts/fetch-kernel names it
        #[arg(long, default_value = "6.12-cloud")]
        kernel: String,
    },
    /// Boot to exit of `true`, and rates through standard output and input, against QEMU and virtme-ng
    Runner {
        /// Measurements of each
        #[arg(short, default_value_t = 5)]
        n: usize,
        /// The kernel, as scripts/fetch-kernel names it
        #[arg(long, default_value = "6.12-cloud")]
        kernel: String,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse().benchmark) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(benchmark: Benchmark) -> Result<(), BenchError> {
    if std::env::var_os("LAB_TMPFS").is_none() {
        return Err(BenchError::NoLab);
    }
    let (name, table): (_, Table) = match benchmark {
        Benchmark::Boot { n, kernel } => ("boot", boot::run(&kernel, n)?),
        Benchmark::Dax { mib, runs, kernel } => ("dax", dax::run(&kernel, mib, runs)?),
        Benchmark::Policy { files, kernel } => ("policy", policy::run(&kernel, files)?),
        Benchmark::Runner { n, kernel } => ("runner", runner::run(&kernel, n)?),
    };
    table.print();
    table.write(name).map_err(|source| BenchError::System("write target/bench", source))
}
