//! Benchmarks: each compares daxvm with a peer in the same run on the same host, since times mean nothing in an emulated
//! lab but ratios do.

pub mod boot;
pub mod dax;
pub mod peers;
mod plot;
pub mod policy;
mod process;
pub mod runner;
mod table;
mod virtme_ng;

pub use table::{Row, Table};

use std::path::PathBuf;

/// Why a benchmark could not run.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// It runs on the lab's host only.
    #[error("LAB_TMPFS is not set: run benchmarks by scripts/bench")]
    NoLab,
    /// A virtual machine did not do what it should.
    #[error("{subject} did not get to `{expected}`; its last output:\n{output}")]
    Subject {
        /// Which.
        subject: String,
        /// What was waited for.
        expected: &'static str,
        /// The end of what it printed.
        output: String,
    },
    /// A file is missing.
    #[error("Cannot use {0}: run scripts/bench, which makes it")]
    File(PathBuf, #[source] std::io::Error),
    /// A result that a benchmark takes for granted is not there.
    #[error("{0}")]
    Unexpected(String),
    /// The guest driver.
    #[error(transparent)]
    Vm(#[from] crate::vm::VmError),
    /// The system refused something.
    #[error("Cannot {0}")]
    System(&'static str, #[source] std::io::Error),
}
