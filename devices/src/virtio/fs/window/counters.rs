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
    /// Times that pages were put in the guest's reach as they were mapped.
    pub prefaults: u64,
    /// Bytes of these pages.
    pub prefault_bytes: u64,
    /// Bytes that the guest touched where nothing was mapped, since the window was cleared last. A driver that works as it
    /// should never does that.
    pub stray_bytes: u64,
    /// Pages of 4 KiB that were replaced by zeros because the device had to copy to or from them, and they lay behind the
    /// end of their file or could not be written. They are the file's again when their chunk is mapped anew.
    pub replaced_pages: u64,
    /// Files that became shorter on the host while they were mapped.
    pub lost_files: u64,
    /// Pages of 4 KiB that the guest could access and that the host took away so. Holes are in their place.
    pub lost_pages: u64,
    /// Those of them that their file has again.
    pub restored_pages: u64,
    /// Pages of 4 KiB that the host could not read or write when the guest accessed them: its disk was full, or failed.
    /// Holes are in their place, until the file changes its size or the chunk is mapped anew.
    pub failed_pages: u64,
    /// Pages of 4 KiB behind a file's end, or of files that it may only read, that the guest wrote to: it has copies of its
    /// own, until they are the file's again.
    pub copied_pages: u64,
    /// Times that a file was mapped without a watch, as the host has none left.
    pub unwatched_files: u64,
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
    prefaults: AtomicU64,
    prefault_bytes: AtomicU64,
    lost_pages: AtomicU64,
    restored_pages: AtomicU64,
    failed_pages: AtomicU64,
    copied_pages: AtomicU64,
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

    pub(super) fn unmapped(&self, entries: u64) {
        self.removes.fetch_add(entries, Relaxed);
    }

    pub(super) fn cleared(&self, chunks: u64) {
        self.gone(chunks);
        self.cleared.fetch_add(chunks, Relaxed);
    }

    pub(super) fn prefaulted(&self, bytes: u64) {
        if bytes > 0 {
            self.prefaults.fetch_add(1, Relaxed);
            self.prefault_bytes.fetch_add(bytes, Relaxed);
        }
    }

    pub(super) fn gone(&self, chunks: u64) {
        self.mapped.fetch_sub(chunks, Relaxed);
    }

    pub(super) fn upgraded(&self, change: MapChange) {
        self.upgraded.fetch_add(change.upgraded, Relaxed);
    }

    pub(super) fn lost(&self, pages: u64) {
        self.lost_pages.fetch_add(pages, Relaxed);
    }

    pub(super) fn restored(&self, pages: u64) {
        self.restored_pages.fetch_add(pages, Relaxed);
    }

    pub(super) fn failed(&self, pages: u64) {
        self.failed_pages.fetch_add(pages, Relaxed);
    }

    pub(super) fn copied(&self) {
        self.copied_pages.fetch_add(1, Relaxed);
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
            prefaults: self.prefaults.load(Relaxed),
            prefault_bytes: self.prefault_bytes.load(Relaxed),
            lost_pages: self.lost_pages.load(Relaxed),
            restored_pages: self.restored_pages.load(Relaxed),
            failed_pages: self.failed_pages.load(Relaxed),
            copied_pages: self.copied_pages.load(Relaxed),
            ..WindowCounters::default()
        }
    }
}
