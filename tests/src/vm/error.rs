//! Why a guest did not do what it was asked for.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::guest::Failure;

/// Why a guest did not do what it was asked for.
#[derive(Debug, Error)]
pub enum VmError {
    /// The guest did it and it failed there. The guest is as well as before.
    #[error("in the guest: {0}")]
    Guest(Failure),
    /// The guest gave an answer of another type than the question has.
    #[error("an answer that does not fit: {0}")]
    Answer(#[from] serde_json::Error),
    /// Something that a boot needs is not there.
    #[error("{what} {path} cannot be used: {source}", path = path.display())]
    Missing {
        /// What it is.
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The initramfs could not be made.
    #[error("the guest's initramfs: {0}")]
    Initramfs(Box<dyn std::error::Error + Send + Sync>),
    /// Nothing came within the deadline. The virtual machine was ended.
    #[error("{what}: nothing for {seconds} s\n{console}")]
    Deadline {
        /// What was waited for.
        what: String,
        /// For how long.
        seconds: u64,
        /// The last of the console.
        console: String,
    },
    /// The virtual machine ended, or its console broke, when nobody had asked it to.
    #[error("{what}: {why}\n{console}")]
    Gone {
        /// What was being done.
        what: String,
        /// What happened.
        why: String,
        /// The last of the console.
        console: String,
    },
    /// The virtual machine has been lost before, which was reported then.
    #[error("the virtual machine was lost before")]
    Lost,
    /// The system refused something to the driver itself.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// What the system said.
        source: io::Error,
    },
}

impl VmError {
    /// The error number that an operation in the guest got, if that is what this is.
    pub fn errno(&self) -> Option<i32> {
        match self {
            VmError::Guest(failure) => failure.errno,
            _ => None,
        }
    }

    /// Names what was tried when the system refused.
    pub(super) fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> VmError {
        move |source| VmError::System { what: what.into(), source }
    }
}
