//! What a file costs the guest's memory, through the window and without it, and how far a file must leave a threshold
//! behind before a decision is taken back.

use super::WindowFacts;
use crate::virtio::fs::window::CHUNK_SIZE;

/// The guest's page, in bytes.
const PAGE_SIZE: u64 = 4 << 10;
/// The guest's page descriptor, in bytes (`struct page`; Linux keeps it at 64 on 64-bit machines).
const DESCRIPTOR_SIZE: u64 = 64;
/// What one chunk of the window costs the guest in page descriptors: 32 KiB.
pub const CHUNK_COST: u64 = CHUNK_SIZE / PAGE_SIZE * DESCRIPTOR_SIZE;
/// The size in bytes above which one chunk's descriptors cost less than the page cache of a whole file: 32 KiB. It is
/// the threshold of `size` when none is given.
pub const BREAK_EVEN: u64 = CHUNK_COST;

/// What a file of some size costs the guest.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Cost {
    /// Chunks of the window, of 2 MiB, that the whole file needs.
    pub chunks: u64,
    /// Bytes of page descriptors for these chunks.
    pub descriptors: u64,
    /// Bytes of page cache for the whole file where it is not DAX.
    pub page_cache: u64,
}

impl Cost {
    /// The cost of a file of `size` bytes.
    pub fn of(size: u64) -> Cost {
        let chunks = size.div_ceil(CHUNK_SIZE);
        Cost {
            chunks,
            descriptors: chunks * CHUNK_COST,
            page_cache: size.div_ceil(PAGE_SIZE).saturating_mul(PAGE_SIZE),
        }
    }

    /// Whether the guest has more memory left when the file is DAX.
    pub fn pays(self) -> bool {
        self.descriptors < self.page_cache
    }
}

/// The level of thrashing at which no file is worth its chunks.
pub const MAX_THRASH_LEVEL: u8 = 5;

impl WindowFacts {
    /// Whether a file of `size` bytes is worth its chunks while the window thrashes. The first to go are those that profit
    /// least from each chunk: small files, by how much of it they fill. Then those go that alone take all chunks. One that
    /// is DAX is a level behind, so that not everything changes at once.
    pub(super) fn is_worth(&self, size: u64, was_dax: bool) -> bool {
        let chunks = Cost::of(size).chunks;
        let fills = |part: u64| size >= chunks * (CHUNK_SIZE / part);
        match self.thrash.saturating_sub(u8::from(was_dax && self.thrash < MAX_THRASH_LEVEL)) {
            0 => true,
            1 => fills(8),
            2 => fills(2),
            3 => size >= CHUNK_SIZE,
            4 => size >= CHUNK_SIZE && chunks <= self.usable(),
            _ => false,
        }
    }

    /// An idle window of `bytes` bytes; what is less than a chunk is left out.
    pub fn idle(bytes: u64) -> WindowFacts {
        WindowFacts { chunks: bytes / CHUNK_SIZE, ..WindowFacts::default() }
    }

    /// The chunks that files can fill before the guest begins to take chunks from one to give them to another: it
    /// keeps a fifth free, and one at least (fs/fuse/dax.c, FUSE_DAX_RECLAIM_THRESHOLD).
    pub fn usable(&self) -> u64 {
        self.chunks.saturating_sub((self.chunks / 5).max(1))
    }

    /// The chunks that are not mapped, in percent of all, rounded down; 0 where there is no window.
    pub fn free_percent(&self) -> u64 {
        let free = u128::from(self.chunks.saturating_sub(self.mapped));
        (free * 100).checked_div(self.chunks.into()).map_or(0, |percent| percent as u64)
    }

    /// What a window of `bytes` bytes costs the guest from the moment that it finds the device, used or not: 16 MiB
    /// for each GiB.
    pub fn fixed_cost(bytes: u64) -> u64 {
        bytes / PAGE_SIZE * DESCRIPTOR_SIZE
    }
}

/// The largest size that a file of `size` bytes may have shrunk from without having left a threshold in between: a
/// third more. So a threshold is crossed upwards where it stands, and downwards a quarter below.
pub(super) fn size_before_shrinking(size: u64) -> u64 {
    size.saturating_add(size / 3)
}

/// How far the free part of the window must be past a threshold, in points of percent.
pub(super) const FREE_BAND: u64 = 5;
