//! What a share has done, for reports.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::Serialize;

use super::abi::opcode;
use super::accounts::{Accounts, FileTable};
use super::decisions::{DecisionCount, DecisionCounts};
use super::latency::{Histogram, Latency};
use super::policy::Policy;
use super::thrash::{Thrash, ThrashCounters};
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
    /// What the policy decided, by rule and reason.
    pub decisions: Vec<DecisionCount>,
    /// SETUPMAPPING requests that were refused because the file is not DAX for the client.
    pub denied_mappings: u64,
    /// How long SETUPMAPPING requests took, from the request to the reply.
    pub setup_latency: Latency,
    /// How long REMOVEMAPPING requests took, each with all its entries.
    pub remove_latency: Latency,
    /// The files that had most of the window; absent if the share has none.
    pub files: Option<FileTable>,
    /// Whether the window does for the guest; absent if the share has none.
    pub thrash: Option<ThrashCounters>,
}

/// Files that are named in reports, for each share.
const REPORTED_FILES: usize = 20;

/// The living counters, written by all queues.
pub(super) struct Counts {
    requests: [AtomicU64; opcode::NAMES.len()],
    other: AtomicU64,
    granted: AtomicU64,
    denied: AtomicU64,
    changed: AtomicU64,
    hint_queries: AtomicU64,
    denied_mappings: AtomicU64,
    pub(super) decisions: DecisionCounts,
    pub(super) setup_latency: Histogram,
    pub(super) remove_latency: Histogram,
    /// None without a window.
    pub(super) accounts: Option<Accounts>,
    /// None without a window.
    pub(super) thrash: Option<Thrash>,
}

impl Counts {
    /// For a share with this policy and a window of so many bytes, or none.
    pub(super) fn new(policy: Policy, window_size: u64) -> Counts {
        Counts {
            requests: [const { AtomicU64::new(0) }; opcode::NAMES.len()],
            other: AtomicU64::new(0),
            granted: AtomicU64::new(0),
            denied: AtomicU64::new(0),
            changed: AtomicU64::new(0),
            hint_queries: AtomicU64::new(0),
            denied_mappings: AtomicU64::new(0),
            decisions: DecisionCounts::new(policy),
            setup_latency: Histogram::new(),
            remove_latency: Histogram::new(),
            accounts: (window_size > 0).then(|| Accounts::new(window_size)),
            thrash: (window_size > 0).then(|| Thrash::new(window_size)),
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

    pub(super) fn denied_mapping(&self) {
        self.denied_mappings.fetch_add(1, Relaxed);
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
    /// The share's tag.
    pub fn tag(&self) -> &str {
        &self.tag
    }

    /// Whether the share has a DAX window.
    pub fn has_window(&self) -> bool {
        self.window.is_some()
    }

    /// The number of the file that each chunk of the window shows, 0 for none; empty without a window.
    pub fn chunk_owners(&self) -> Vec<u32> {
        self.counts.accounts.as_ref().map(Accounts::owners).unwrap_or_default()
    }

    /// The files that had parts of the window, those with the most chunks first, no more than `limit`; none without a
    /// window.
    pub fn files(&self, limit: usize) -> FileTable {
        self.counts.accounts.as_ref().map(|accounts| accounts.files(limit)).unwrap_or_default()
    }

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
            decisions: self.counts.decisions.snapshot(),
            denied_mappings: self.counts.denied_mappings.load(Relaxed),
            setup_latency: self.counts.setup_latency.snapshot(),
            remove_latency: self.counts.remove_latency.snapshot(),
            files: self.counts.accounts.as_ref().map(|accounts| accounts.files(REPORTED_FILES)),
            thrash: self.counts.thrash.as_ref().map(Thrash::counters),
        }
    }
}
