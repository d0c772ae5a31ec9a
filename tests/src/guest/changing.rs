//! What the driver can ask about files that change on the host while they are read and written.

use serde::{Deserialize, Serialize};

use super::GuestPath;
use super::data::Content;

/// Accesses to a file whose size the host changes meanwhile.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Changing {
    /// The file.
    pub path: GuestPath,
    /// What it contains as long as it is whole.
    pub content: Content,
    /// So many bytes of it are never cut off.
    pub stable: u64,
    /// How many threads read it.
    pub readers: usize,
    /// How many threads write what is there to what is never cut off, and to what is.
    pub writers: usize,
    /// By a shared mapping; else by pread(2) and pwrite(2).
    pub mmap: bool,
    /// For how long.
    pub millis: u64,
}

/// What they met.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Met {
    /// Blocks that were read and were the file's.
    pub right: u64,
    /// Blocks that were read and were cut off, or partly: zeros.
    pub zeros: u64,
    /// Blocks that were written.
    pub written: u64,
    /// Where something else was found.
    pub wrong: Option<u64>,
}
