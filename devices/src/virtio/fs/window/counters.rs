//! The window's counters, which anyone may read at any time without a lock.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::{Deserialize, Serialize};

use super::CHUNK_SIZE;
use super::table::MapChange;

/// What a DAX window holds and has done; all counts start at 0 when the window is made, and no total is ever reset.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct WindowCounters {
    /// The window's size in bytes.
    pub size: u64,
    /// Chunks of 2 MiB that are mapped now.
    pub mapped_chunks: u64,
    /// The most chunks that were ever mapped at once.
    pub peak_mapped_chunks: u64,
    /// Bytes that are mapped now.
    pub mapped_bytes: u64,
    /// SETUPMAPPING requests that were carried out.
    pub setup_mappings: u64,
    /// SETUPMAPPING requests that the window refused or could not carry out.
    pub failed_setup_mappings: u64,
    /// Chunks whose read-only mapping was replaced in place by a writable one of the same part of the file.
    pub upgraded_chunks: u64,
    /// Chunks that were mapped over any other mapping, without having been unmapped first.
    pub overlaid_chunks: u64,
    /// Entries of REMOVEMAPPING requests that were carried out.
    pub remove_mappings: u64,
    /// Chunks that were unmapped because a session ended (DESTROY, reset, a new INIT) and not on request.
    pub cleared_chunks: u64,
    /// Bytes that the guest touched where nothing was mapped, since the window was cleared last. A driver that works as it
    /// should never does that.
    pub stray_bytes: u64,
    /// Pages of 4 KiB that were replaced by zeros because the device had to copy to or from them, and they lay behind the
    /// end of their file or could not be written. They are the file's again when their chunk is mapped anew.
    pub replaced_pages: u64,
}

/// The living counters. They are written under the window's lock, so that they agree with its table, and are atomic for
/// those who read them without it.
#[derive(Default)]
pub(super) struct Counts {
    mapped: AtomicU64,
    peak: AtomicU64,
    setups: AtomicU64,
    failed_setups: AtomicU64,
    upgraded: AtomicU64,
    overlaid: AtomicU64,
    removes: AtomicU64,
    cleared: AtomicU64,
}

impl Counts {
    pub(super) fn mapped(&self, change: MapChange) {
        let mapped = self.mapped.fetch_add(change.filled, Relaxed) + change.filled;
        self.peak.fetch_max(mapped, Relaxed);
        self.setups.fetch_add(1, Relaxed);
        self.upgraded.fetch_add(change.upgraded, Relaxed);
        self.overlaid.fetch_add(change.overlaid, Relaxed);
    }

    pub(super) fn map_failed(&self) {
        self.failed_setups.fetch_add(1, Relaxed);
    }

    pub(super) fn unmapped(&self, chunks: u64) {
        self.lost(chunks);
        self.removes.fetch_add(1, Relaxed);
    }

    pub(super) fn cleared(&self, chunks: u64) {
        self.lost(chunks);
        self.cleared.fetch_add(chunks, Relaxed);
    }

    pub(super) fn lost(&self, chunks: u64) {
        self.mapped.fetch_sub(chunks, Relaxed);
    }

    pub(super) fn mapped_chunks(&self) -> u64 {
        self.mapped.load(Relaxed)
    }

    pub(super) fn snapshot(&self, size: u64) -> WindowCounters {
        let mapped_chunks = self.mapped_chunks();
        WindowCounters {
            size,
            mapped_chunks,
            peak_mapped_chunks: self.peak.load(Relaxed),
            mapped_bytes: mapped_chunks * CHUNK_SIZE,
            setup_mappings: self.setups.load(Relaxed),
            failed_setup_mappings: self.failed_setups.load(Relaxed),
            upgraded_chunks: self.upgraded.load(Relaxed),
            overlaid_chunks: self.overlaid.load(Relaxed),
            remove_mappings: self.removes.load(Relaxed),
            cleared_chunks: self.cleared.load(Relaxed),
            stray_bytes: 0,
            replaced_pages: 0,
        }
    }
}
