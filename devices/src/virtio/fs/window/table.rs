//! What is mapped where: the state of each chunk of the window.

use std::ops::Range;

use super::CHUNK_SIZE;

/// A chunk that shows no file. Every other state has [`MAPPED`] set.
const HOLE: u64 = 0;
/// The chunk shows a part of some file: its number in the file (its offset in chunks) stands above these bits, and above
/// that the number of the file.
const MAPPED: u64 = 1;
/// The guest can write to the chunk.
const WRITABLE: u64 = 2;
const FILE_CHUNK_SHIFT: u32 = 2;
/// No file has more than 2^63 bytes, which are 2^42 chunks.
const FILE_SHIFT: u32 = FILE_CHUNK_SHIFT + 63 - super::CHUNK_SHIFT;

/// The state of every chunk of a window, indexed by its number.
///
/// An array and not a tree: chunks have one size, the guest chooses their place, and whatever it does (overlap, holes,
/// any order) is one word for each chunk. That is 1 MiB for the largest window, of zeroed memory that takes no page
/// before a chunk in it is mapped.
pub(super) struct ChunkTable {
    chunks: Vec<u64>,
}

/// A chunk that shows a file.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Mapped {
    /// The file's number.
    pub(super) file: usize,
    /// Where in the file the chunk begins, in bytes.
    pub(super) offset: u64,
    /// Whether the guest can write to it.
    pub(super) writable: bool,
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

    /// What a chunk shows.
    pub(super) fn get(&self, chunk: usize) -> Option<Mapped> {
        decode(*self.chunks.get(chunk)?)
    }

    /// The chunks that show a file, with their numbers: `count` of them, all among those of `within`.
    pub(super) fn of_file(
        &self,
        file: usize,
        within: Range<usize>,
        count: u64,
    ) -> impl Iterator<Item = (usize, Mapped)> {
        let all = within.clone().zip(self.chunks.get(within).unwrap_or_default());
        let mapped = all.filter_map(|(chunk, word)| Some((chunk, decode(*word)?)));
        mapped.filter(move |(_, at)| at.file == file).take(count as usize)
    }

    /// Notes that `count` chunks from number `first` show what `what` says of the first of them and the rest of the file
    /// behind it. `replaced` is told the file of each chunk that showed one.
    pub(super) fn map(
        &mut self,
        first: usize,
        count: usize,
        what: Mapped,
        mut replaced: impl FnMut(usize),
    ) -> MapChange {
        let mut change = MapChange::default();
        for (index, chunk) in self.chunks[first..first + count].iter_mut().enumerate() {
            let offset = what.offset + index as u64 * CHUNK_SIZE;
            let read_only = encode(Mapped { offset, writable: false, ..what });
            let new = if what.writable { read_only | WRITABLE } else { read_only };
            let old = std::mem::replace(chunk, new);
            match old {
                HOLE => change.filled += 1,
                old if what.writable && old == read_only => change.upgraded += 1,
                _ => change.overlaid += 1,
            }
            decode(old).into_iter().for_each(|old| replaced(old.file));
        }
        change
    }

    /// Notes that `count` chunks from number `first` show no file; returns how many of them were mapped. `replaced` is
    /// told the file of each.
    pub(super) fn unmap(&mut self, first: usize, count: usize, mut replaced: impl FnMut(usize)) -> u64 {
        let mut unmapped = 0;
        for chunk in &mut self.chunks[first..first + count] {
            if let Some(old) = decode(std::mem::replace(chunk, HOLE)) {
                unmapped += 1;
                replaced(old.file);
            }
        }
        unmapped
    }
}

fn encode(what: Mapped) -> u64 {
    let writable = if what.writable { WRITABLE } else { 0 };
    let chunk = what.offset / CHUNK_SIZE;
    (what.file as u64) << FILE_SHIFT | chunk << FILE_CHUNK_SHIFT | MAPPED | writable
}

fn decode(word: u64) -> Option<Mapped> {
    let chunk = word >> FILE_CHUNK_SHIFT & ((1 << (FILE_SHIFT - FILE_CHUNK_SHIFT)) - 1);
    (word != HOLE).then(|| Mapped {
        file: (word >> FILE_SHIFT) as usize,
        offset: chunk * CHUNK_SIZE,
        writable: word & WRITABLE != 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::fs::window::MAX_WINDOW_SIZE;

    #[test]
    fn every_file_and_offset_fits_in_a_word() {
        // A window has at most one file for each of its chunks.
        for file in [0, 1, (MAX_WINDOW_SIZE / CHUNK_SIZE) as usize] {
            for offset in [0, CHUNK_SIZE, i64::MAX as u64 / CHUNK_SIZE * CHUNK_SIZE] {
                for writable in [false, true] {
                    let what = Mapped { file, offset, writable };
                    assert_eq!(decode(encode(what)), Some(what));
                }
            }
        }
        assert_eq!(decode(HOLE), None);
    }
}
