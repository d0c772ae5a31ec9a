//! Puts pages in the guest's reach before it touches them; docs/window.md, "First touch".
//!
//! It comes after the mapping and takes no lock of the window. So what lies at these addresses may have been replaced
//! meanwhile, by another file, zeros or scratch memory, and may be again at any time. That does no harm: nothing here says
//! what is to be mapped, only that what is mapped should be at hand.

use std::iter;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::PoisonError;

use rustix::fs::Advice;

use super::cached::{Cached, cached, is_told};
use super::files::PAGE;
use super::mmap::{is_there, resident};
use super::state::Shared;
use super::{CHUNK_SIZE, DaxWindow};
use crate::virtio::fs::policy::Prefault;

/// Pages of a chunk.
const PAGES: usize = (CHUNK_SIZE / PAGE) as usize;

/// Fewer pages in a row are left to the guest's own faults: they cost no more than the system call would.
const SHORTEST_RUN: usize = 4;

/// The largest file in bytes of which any chunk is taken for one that the guest will need all of: programs, libraries.
const SMALL_FILE: u64 = 16 << 20;

/// What [`DaxWindow::map`] has found.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Shown {
    /// How many bytes, from the start of the part on, are pages of the file; the rest is behind its end.
    pub bytes: u64,
    /// Whether the file begins with it, or it follows on a part that was mapped before.
    pub is_stream: bool,
    /// The file's size in bytes.
    pub file_size: u64,
}

/// A part of a file that was mapped a moment ago.
#[derive(Clone, Copy)]
pub struct MappedPart<'a> {
    /// The file.
    pub fd: BorrowedFd<'a>,
    /// Where the part begins in the file, in bytes.
    pub foffset: u64,
    /// Where it begins in the window, in bytes.
    pub moffset: u64,
    /// What was found as it was mapped.
    pub shown: Shown,
    /// Whether the descriptor can write.
    pub writable: bool,
    /// Whether the file belongs to the user that daxvm acts as.
    pub is_own: bool,
}

impl DaxWindow {
    /// Has the guest find pages of a part of a file without a fault: of no more than a chunk, as Linux maps one at a time and
    /// nothing ends the reading of more. What cannot be done is left to the guest's faults.
    /// Returns the number of bytes of the pages that it finds.
    pub fn prefault(&self, part: MappedPart<'_>, prefault: Prefault) -> u64 {
        let MappedPart { fd, foffset, moffset, shown, .. } = part;
        let len = shown.bytes.min(CHUNK_SIZE);
        let is_outside = moffset.checked_add(len).is_none_or(|end| end > self.0.size);
        if len == 0 || is_outside || !moffset.is_multiple_of(PAGE) {
            return 0;
        }
        let bytes = match prefault {
            Prefault::Never => 0,
            Prefault::Cached if len < SHORTEST_RUN as u64 * PAGE || !self.is_worth_it(shown) => 0,
            Prefault::Cached => match cached(fd, foffset, len) {
                Cached::Nothing => 0,
                Cached::All => self.0.prefault_run(moffset, len),
                Cached::Unknown if part.writable || part.is_own || is_told(fd) => {
                    self.0.prefault_cached(moffset, len)
                }
                Cached::Unknown => 0,
            },
            Prefault::All => {
                // The next chunk too: it is read while the guest is busy with this one.
                let ahead = NonZeroU64::new(len + CHUNK_SIZE);
                let _ = rustix::fs::fadvise(fd, foffset, ahead, Advice::WillNeed);
                self.0.prefault_run(moffset, len)
            }
        };
        self.0.counts.prefaulted(bytes);
        bytes
    }

    /// Whether the guest is likely to touch most of what it has mapped: it goes through the file, or the file is small. When
    /// the window is nearly full, which makes the guest take chunks from files to give them to others (it keeps a fifth free),
    /// even that of a small file may be gone before.
    fn is_worth_it(&self, shown: Shown) -> bool {
        let has_room = self.mapped_chunks() * 4 < self.0.size / CHUNK_SIZE * 3;
        shown.is_stream || shown.file_size <= SMALL_FILE && has_room
    }
}

impl Shared {
    /// Prefaults those of `len` bytes at `start`, a chunk at most, that are cached; returns how many the guest finds now.
    fn prefault_cached(&self, start: u64, len: u64) -> u64 {
        let mut buffer = [0; PAGES];
        let pages = &mut buffer[..len.div_ceil(PAGE) as usize];
        if resident(self.address(start), pages).is_err() {
            return 0;
        }
        runs(pages)
            .map(|run| self.prefault_run(start + run.start as u64 * PAGE, run.len() as u64 * PAGE))
            .sum()
    }

    /// Returns how many of `len` bytes at `at` the guest finds now.
    fn prefault_run(&self, at: u64, len: u64) -> u64 {
        let len = len.next_multiple_of(PAGE);
        // Held throughout: who takes the window from the guest waits.
        let nested = self.nested_paging.read().unwrap_or_else(PoisonError::into_inner);
        // The hypervisor has the host find the pages first, and so does both.
        match nested.as_ref().map(|nested| nested.prefault(at, len)) {
            Some(Ok(bytes)) => bytes,
            Some(Err(error)) if error.raw_os_error() != Some(libc::EOPNOTSUPP) => 0,
            // To be read and not to be written: a write would make the file system give each page its block, and dirty it.
            _ if is_there(self.address(at), len as usize, false) == Some(true) => len,
            _ => 0,
        }
    }
}

/// The runs among pages of which mincore(2) has told whether each is there, but for those that are too short.
fn runs(pages: &[u8]) -> impl Iterator<Item = Range<usize>> {
    let mut rest = 0..pages.len();
    iter::from_fn(move || {
        loop {
            let is_there = |page: &u8| page & 1 != 0;
            let start = rest.start + pages[rest.clone()].iter().position(is_there)?;
            let len = pages[start..].iter().take_while(|page| is_there(page)).count();
            rest.start = start + len;
            if len >= SHORTEST_RUN {
                return Some(start..start + len);
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_found_and_short_ones_left_out() {
        let found = |text: &str| -> Vec<Range<usize>> {
            // Only the lowest bit has a meaning.
            runs(&text.bytes().map(|byte| u8::from(byte == b'#') | 0x80).collect::<Vec<_>>()).collect()
        };
        assert!(found("").is_empty());
        assert!(found("........").is_empty());
        assert_eq!(found("####"), vec![0..4]);
        assert!(found("###.###.#").is_empty());
        assert_eq!(found("#####.####"), [0..5, 6..10]);
        assert_eq!(found("..######..###.####."), [2..8, 14..18]);
    }

    proptest::proptest! {
        #[test]
        fn runs_are_whole_and_in_order(pages in proptest::collection::vec(0_u8..2, 0..600)) {
            let mut is_in_run = vec![false; pages.len()];
            let mut end = 0;
            for run in runs(&pages) {
                assert!(run.start >= end && run.len() >= SHORTEST_RUN);
                end = run.end;
                is_in_run[run].fill(true);
            }
            // What is left out has a neighbour that is not there within the shortest run.
            for (at, page) in pages.iter().enumerate() {
                let before = pages[..at].iter().rev().take_while(|page| **page == 1).count();
                let len = before + pages[at..].iter().take_while(|page| **page == 1).count();
                assert_eq!(is_in_run[at], *page == 1 && len >= SHORTEST_RUN, "page {at}");
            }
        }
    }
}
