//! `daxvm test`: a matrix of kernels and commands, each case a `daxvm run` process of its own.
//!
//! A [`Matrix`] is what a file says; [`Run`] runs its cases within a budget of memory and vCPUs and returns a
//! [`Summary`], from which the reports are made. Who wants to see what goes on is an [`Observer`]: [`Lines`] for logs,
//! [`Live`] for terminals. docs/ci.md is for those who write the files.

mod case;
mod child;
mod file;
mod filter;
mod host;
mod junit;
mod progress;
mod report;
mod run;
mod schedule;
mod summary;
#[cfg(test)]
mod testing;
mod verdict;

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use devices::text::Bytes;

pub use case::{Case, DEFAULT_TIMEOUT, Expected, Flaky};
pub use child::Attempt;
pub use file::{Matrix, MatrixFileError};
pub use filter::Filter;
pub use progress::{Lines, Live, Observer};
pub use run::{Handle, Options, Run};
pub use schedule::Resources;
pub use summary::{CaseResult, Outcome, Summary};
pub use verdict::Verdict;

/// Why a matrix could not be run, or its reports not be written. What the cases do is no error.
#[derive(Debug, thiserror::Error)]
pub enum MatrixError {
    /// A filter that is no glob.
    #[error("--filter {pattern} is no glob: {why}")]
    Glob {
        /// The filter.
        pattern: String,
        /// What is wrong with it.
        why: String,
    },
    /// A case with options that `daxvm run` does not take.
    #[error("The case {case}: {why}")]
    Case {
        /// The case's name.
        case: String,
        /// What is wrong with them.
        why: String,
    },
    /// A filter that leaves nothing to run.
    #[error("--filter {pattern} matches no case; {}", suggestion(near.as_deref()))]
    NoCase {
        /// The filter.
        pattern: String,
        /// The case that has the nearest name.
        near: Option<String>,
    },
    /// A kernel that is not there.
    #[error("The kernel `{kernel}` of the matrix is not at {}: put it there, or select others with --filter (docs/ci.md says where to get kernels)", path.display())]
    NoKernel {
        /// The kernel's name.
        kernel: String,
        /// Its path.
        path: PathBuf,
    },
    /// A case that cannot run even when no other runs.
    #[error(
        "The case {case} needs {} of memory, which the budget of {} can never hold: give it less `memory`, or raise --memory-budget",
        Bytes(*needed),
        Bytes(*budget)
    )]
    DoesNotFit {
        /// The case's name.
        case: String,
        /// Bytes that it needs.
        needed: u64,
        /// Bytes of the budget.
        budget: u64,
    },
    /// A file that cannot be written.
    #[error("Cannot write the {what} {}: name a place that you may write to", path.display())]
    Write {
        /// What it is.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// Means to watch children, which the host did not give.
    #[error("Cannot run the matrix")]
    Host(#[source] io::Error),
}

fn suggestion(near: Option<&str>) -> String {
    let list = "see them with --list";
    near.map_or_else(|| list.to_owned(), |near| format!("did you mean `{near}`? {list}"))
}

/// Arguments as a shell reads them.
fn shell_line(arguments: &[OsString]) -> String {
    // `=` needs no quotes behind the first word, and options with quotes are hard to read.
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_=./:,+@%".contains(byte);
    let words = arguments.iter().map(|argument| match argument.as_bytes() {
        bytes if !bytes.is_empty() && bytes.iter().all(plain) => argument.to_string_lossy(),
        bytes => match shlex::bytes::try_quote(bytes) {
            Ok(quoted) => String::from_utf8_lossy(&quoted).into_owned().into(),
            Err(_) => argument.to_string_lossy(),
        },
    });
    words.collect::<Vec<_>>().join(" ")
}
