//! File system suites that others wrote, run in a guest on a share and, as the reference, on the host's file system below it.
//!
//! Each suite runs on each of the lab's file systems under each DAX policy, in a guest of its own. What counts is a case's
//! name: one that the host's file system passes must pass in the guest, or be among the exclusions (`exclusions.rs`) with a reason.
//! A suite that judges itself must pass whatever the host does, and in each suite a least number of cases must pass.

mod exclusions;
mod outcome;
mod pjdfstest;
mod place;
mod results;
mod suite;
pub mod two_guests;

pub use outcome::{Outcome, Outcomes};
pub use place::{FileSystem, Policy};
pub use results::{Results, Row};
pub use suite::{Mode, Settings, Suite};

use std::path::PathBuf;
use std::time::Instant;

use place::{Guest, Programs};

/// Why the suites could not run.
#[derive(Debug, thiserror::Error)]
pub enum ConformanceError {
    /// They run on the lab's host only.
    #[error("{0} is not set: run suites by scripts/conformance")]
    NoLab(&'static str),
    /// A file is missing, or cannot be made.
    #[error("Cannot use {0}: run scripts/conformance, which fetches the suites")]
    File(PathBuf, #[source] std::io::Error),
    /// The system refused something.
    #[error("Cannot {0}")]
    System(&'static str, #[source] std::io::Error),
    /// The guest driver.
    #[error(transparent)]
    Vm(#[from] crate::vm::VmError),
}

/// What to run: every suite on every file system under every policy.
#[derive(Clone, Debug)]
pub struct Matrix {
    /// The suites.
    pub suites: Vec<Suite>,
    /// The file systems of the host.
    pub file_systems: Vec<FileSystem>,
    /// The policies of the share, and options of the mount.
    pub policies: Vec<Policy>,
    /// How much of it.
    pub settings: Settings,
}

/// Runs the matrix, and writes what there is after each row.
///
/// # Errors
/// See [`ConformanceError`]. Cases that fail are results.
pub fn run(matrix: &Matrix) -> Result<Results, ConformanceError> {
    let guest = Guest::find(&matrix.settings.kernel)?;
    let programs = Programs::install()?;
    let mut results = Results::default();
    for &suite in &matrix.suites {
        for &file_system in &matrix.file_systems {
            let mut host = None;
            for &policy in &matrix.policies {
                let start = Instant::now();
                eprintln!("{suite} on {file_system}: a guest with dax={policy}");
                let run = guest.run(suite, file_system, policy, &programs, &matrix.settings)?;
                let seconds = start.elapsed().as_secs();
                // Where a suite judges itself, what the host does is only a hint at why the guest fails.
                let is_enough =
                    suite.judges_itself() && run.passed_all(suite.least(policy, &matrix.settings));
                if host.is_none() && !is_enough {
                    let start = Instant::now();
                    eprintln!("{suite} on {file_system}: the host");
                    let outcomes = place::on_host(suite, file_system, &programs, &matrix.settings)?;
                    host = Some((outcomes, start.elapsed().as_secs()));
                }
                let nothing = Outcomes::new();
                let reference = host.as_ref().map_or(&nothing, |(outcomes, _)| outcomes);
                let mut row =
                    Row::new(suite, file_system, policy, &matrix.settings, reference, &run.outcomes);
                row.kernel.clone_from(&matrix.settings.kernel);
                (row.seconds, row.host_seconds) = (seconds, host.as_ref().map(|(_, seconds)| *seconds));
                row.setup_mappings = run.setup_mappings;
                row.print_failures();
                results.add(row)?;
            }
        }
    }
    Ok(results)
}
