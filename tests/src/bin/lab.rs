//! The `lab` program: a real KVM host on any machine. `scripts/lab` builds and runs it.

use std::process::ExitCode;

fn main() -> ExitCode {
    tests::lab::cli::main()
}
