//! The `daxvm` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    if vmm::guest::is_init() { vmm::guest::main() } else { vmm::cli::main() }
}
