//! What the driver can ask about groups of readers that want more of a window than there is.

use serde::{Deserialize, Serialize};

use super::GuestPath;
use super::data::Content;

/// Readers that all do the same, each in a thread of its own, over and over.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Crowd {
    /// The files and what they contain.
    pub files: Vec<(GuestPath, Content)>,
    /// How many threads.
    pub readers: usize,
    /// In which order.
    pub order: ReadOrder,
    /// By shared mappings; else by pread(2).
    pub mmap: bool,
}

/// The order in which a reader takes its blocks of 4 KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReadOrder {
    /// Any block of any file, of a stream of random numbers that is each reader's own.
    Random,
    /// One block in each 64 KiB, from the first file's start to the last one's end, and again.
    Stream,
}

/// Crowds that read at the same time.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Contest {
    /// Who reads.
    pub crowds: Vec<Crowd>,
    /// For how long.
    pub millis: u64,
}

/// How a crowd fared.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fared {
    /// Blocks that its readers read.
    pub blocks: u64,
    /// Blocks that the reader read who read the fewest.
    pub fewest: u64,
    /// The longest time that a reader waited for one block, in microseconds.
    pub longest_micros: u64,
    /// A block that was not what it must be: the file's number and the offset.
    pub wrong: Option<(usize, u64)>,
}
