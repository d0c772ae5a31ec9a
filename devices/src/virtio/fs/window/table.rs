//! What is mapped where: the state of each chunk of the window.

use super::CHUNK_SIZE;

/// A chunk that shows no file. Every other state has [`MAPPED`] set.
const HOLE: u64 = 0;
/// The chunk shows a part of some file, whose number in the file (its offset in chunks) stands above these bits.
const MAPPED: u64 = 1;
/// The guest can write to the chunk.
const WRITABLE: u64 = 2;
const FILE_CHUNK_SHIFT: u32 = 2;

/// The state of every chunk of a window, indexed by its number.
///
/// An array and not a tree: chunks have one size, the guest chooses their place, and whatever it does (overlap, holes,
/// any order) is one word for each chunk. That is 1 MiB for the largest window, of zeroed memory that takes no page
/// before a chunk in it is mapped.
pub(super) struct ChunkTable {
    chunks: Vec<u64>,
}

/// What a request to map changed, in chunks; each chunk of the request counts once.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct MapChange {
    /// Were holes.
    pub(super) filled: u64,
    /// Were read-only mappings of the same part of the file, and are writable now.
    pub(super) upgraded: u64,
    /// Were mapped otherwise.
    pub(super) overlaid: u64,
}

impl ChunkTable {
    /// A table for a window of `size` bytes, all holes.
    pub(super) fn new(size: u64) -> ChunkTable {
        ChunkTable { chunks: vec![HOLE; (size / CHUNK_SIZE) as usize] }
    }

    /// Notes that `count` chunks from number `first` show the part of a file that starts at its chunk `file_chunk`.
    pub(super) fn map(&mut self, first: usize, count: usize, file_chunk: u64, writable: bool) -> MapChange {
        let mut change = MapChange::default();
        for (chunk, file_chunk) in self.chunks[first..first + count].iter_mut().zip(file_chunk..) {
            let read_only = file_chunk << FILE_CHUNK_SHIFT | MAPPED;
            let new = if writable { read_only | WRITABLE } else { read_only };
            match std::mem::replace(chunk, new) {
                HOLE => change.filled += 1,
                old if writable && old == read_only => change.upgraded += 1,
                _ => change.overlaid += 1,
            }
        }
        change
    }

    /// Notes that `count` chunks from number `first` show no file; returns how many of them were mapped.
    pub(super) fn unmap(&mut self, first: usize, count: usize) -> u64 {
        let mut unmapped = 0;
        for chunk in self.chunks[first..first + count].iter_mut().filter(|chunk| **chunk != HOLE) {
            *chunk = HOLE;
            unmapped += 1;
        }
        unmapped
    }
}
