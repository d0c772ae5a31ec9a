//! What a share has done, for reports.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::Serialize;

use super::abi::opcode;
use super::window::{DaxWindow, WindowCounters};

/// The counters of one share at one moment; all count from the device's creation on.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct FileSystemCounters {
    /// The share's tag.
    pub tag: String,
    /// The DAX window; absent if the share has none.
    pub window: Option<WindowCounters>,
    /// Requests of each operation that was asked for, by its name in the FUSE protocol; `OTHER` for unknown ones.
    pub requests: BTreeMap<&'static str, u64>,
    /// Times that a client with per-file DAX got to know a regular file as DAX: one that it did not know (any more), or
    /// one that had not been so.
    pub dax_granted: u64,
    /// Times that it got to know one as not DAX, likewise.
    pub dax_denied: u64,
    /// Those of both that changed a file which the client knew. Each costs it a second look-up.
    pub reincarnations: u64,
    /// Times that the host was asked for a file's persistent hint, for the policy or for what a new file inherits. None
    /// without a client with per-file DAX.
    pub hint_queries: u64,
    /// Paths on the host of files that the guest had mapped and whose pages the host took away or could not provide: the
    /// first few of them.
    pub lost_paths: Vec<String>,
}

/// The living counters, written by all queues.
pub(super) struct Counts {
    requests: [AtomicU64; opcode::NAMES.len()],
    other: AtomicU64,
    granted: AtomicU64,
    denied: AtomicU64,
    changed: AtomicU64,
    hint_queries: AtomicU64,
}

impl Counts {
    pub(super) fn new() -> Counts {
        Counts {
            requests: [const { AtomicU64::new(0) }; opcode::NAMES.len()],
            other: AtomicU64::new(0),
            granted: AtomicU64::new(0),
            denied: AtomicU64::new(0),
            changed: AtomicU64::new(0),
            hint_queries: AtomicU64::new(0),
        }
    }

    pub(super) fn request(&self, code: u32) {
        self.requests.get(code as usize).unwrap_or(&self.other).fetch_add(1, Relaxed);
    }

    pub(super) fn decided(&self, dax: bool) {
        if dax { &self.granted } else { &self.denied }.fetch_add(1, Relaxed);
    }

    pub(super) fn changed(&self) {
        self.changed.fetch_add(1, Relaxed);
    }

    pub(super) fn hint_query(&self) {
        self.hint_queries.fetch_add(1, Relaxed);
    }
}

/// A handle through which a share's counters can be read from anywhere, at any time, also after the device is gone.
#[derive(Clone)]
pub struct CountersHandle {
    pub(super) tag: Arc<str>,
    pub(super) counts: Arc<Counts>,
    pub(super) window: Option<Arc<DaxWindow>>,
}

impl CountersHandle {
    /// The counters as they are now.
    pub fn snapshot(&self) -> FileSystemCounters {
        let mut requests = BTreeMap::new();
        let named = self.counts.requests.iter().zip(opcode::NAMES);
        for (count, name) in named.chain([(&self.counts.other, "OTHER")]) {
            let count = count.load(Relaxed);
            if count > 0 {
                *requests.entry(if name.is_empty() { "OTHER" } else { name }).or_default() += count;
            }
        }
        FileSystemCounters {
            tag: self.tag.to_string(),
            window: self.window.as_ref().map(|window| window.counters()),
            requests,
            dax_granted: self.counts.granted.load(Relaxed),
            dax_denied: self.counts.denied.load(Relaxed),
            reincarnations: self.counts.changed.load(Relaxed),
            hint_queries: self.counts.hint_queries.load(Relaxed),
            lost_paths: self.window.as_ref().map(|window| window.lost_paths()).unwrap_or_default(),
        }
    }
}
