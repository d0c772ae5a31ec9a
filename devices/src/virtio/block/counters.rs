//! What a disk has done, for reports.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::Serialize;

/// The counters of one disk at one moment; all count from the device's creation on.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct DiskCounters {
    /// The image.
    pub path: PathBuf,
    /// Requests to read.
    pub reads: u64,
    /// Requests to write.
    pub writes: u64,
    /// Requests to flush.
    pub flushes: u64,
    /// Requests to discard or to write zeroes.
    pub discards: u64,
    /// Requests that failed, or that the device does not support.
    pub failed: u64,
    /// Bytes that went to the guest.
    pub bytes_read: u64,
    /// Bytes that came from the guest.
    pub bytes_written: u64,
}

/// The living counters, written by all queues.
#[derive(Default)]
pub(super) struct Counts {
    pub reads: AtomicU64,
    pub writes: AtomicU64,
    pub flushes: AtomicU64,
    pub discards: AtomicU64,
    pub failed: AtomicU64,
    pub bytes_read: AtomicU64,
    pub bytes_written: AtomicU64,
}

/// A handle through which a disk's counters can be read from anywhere, at any time, also after the device is gone.
#[derive(Clone)]
pub struct DiskCountersHandle {
    pub(super) path: PathBuf,
    pub(super) counts: Arc<Counts>,
}

impl DiskCountersHandle {
    /// The counters as they are now; takes no lock.
    pub fn snapshot(&self) -> DiskCounters {
        let counts = &self.counts;
        DiskCounters {
            path: self.path.clone(),
            reads: counts.reads.load(Relaxed),
            writes: counts.writes.load(Relaxed),
            flushes: counts.flushes.load(Relaxed),
            discards: counts.discards.load(Relaxed),
            failed: counts.failed.load(Relaxed),
            bytes_read: counts.bytes_read.load(Relaxed),
            bytes_written: counts.bytes_written.load(Relaxed),
        }
    }
}
