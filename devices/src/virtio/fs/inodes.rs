//! What the guest knows of a share's regular files, and as what: DAX or not.
//!
//! The client decides whether an inode is DAX when it makes the inode, and never again. So a file has two node ids, one
//! for each state: the host's, and the same with [`DAX_BIT`]. The flag that goes with an id never changes, the guest can
//! know a file by both ids at once (by two names, say), and a file changes its state by being given out under its other
//! id. Nothing counts incarnations, and nothing can wrap around.
//!
//! A file is counted as known by the share's budget first, when it is given out as when it is forgotten. Whoever comes here
//! afterwards asks whether it still is, so that nothing stays here that nobody knows, in whatever order queues come.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::policy::Prefault;
use super::window::CHUNK_SIZE;

/// The bit in which a file's node ids differ: set in that of the DAX inode. The library's ids end below it.
const DAX_BIT: u64 = 1 << 56;

/// Locks, so that queues seldom wait for each other.
const SHARDS: usize = 16;

/// The node id under which a file is given out as DAX or not.
pub(super) fn node_id(host: u64, dax: bool) -> u64 {
    if dax { host | DAX_BIT } else { host }
}

/// The library's node id, and whether the guest's stands for a DAX inode.
pub(super) fn host_node(nodeid: u64) -> (u64, bool) {
    (nodeid & !DAX_BIT, nodeid & DAX_BIT != 0)
}

/// A hint as it was read, good until the file's ctime is another.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct KnownHint {
    pub(super) hint: bool,
    /// Seconds and nanoseconds.
    pub(super) ctime: (i64, i64),
}

/// What was decided about a file.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Decided {
    pub(super) dax: bool,
    /// `None` if the policy was not asked, and it stays as it was.
    pub(super) prefault: Option<Prefault>,
    /// The hint, if it was read and can be kept.
    pub(super) hint: Option<KnownHint>,
}

/// A regular file that the guest knows.
#[derive(Default)]
struct Inode {
    /// The state in which it is given out.
    dax: bool,
    /// How often it was given out and not yet forgotten: as an inode that is not DAX, and as one that is.
    lookups: [u64; 2],
    /// How often it is open, likewise.
    opens: [u64; 2],
    /// Chunks that it needs while it is open as DAX.
    promised: u64,
    /// Whether the guest may have pages of the file that are older than what it then wrote through the window.
    has_old_pages: bool,
    hint: Option<KnownHint>,
    prefault: Prefault,
}

/// What an OPEN has to go by.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct FileState {
    /// The state in which it is given out.
    pub(super) dax: bool,
    /// Whether it is open in the guest, in any state.
    pub(super) is_open: bool,
    /// Whether it is open in the state that was asked about.
    pub(super) is_open_so: bool,
    pub(super) hint: Option<KnownHint>,
}

/// The regular files that a per-file client knows. No other client has any.
#[derive(Default)]
pub(super) struct Inodes {
    shards: [Mutex<HashMap<u64, Inode>>; SHARDS],
    /// Chunks that the files need that are open as DAX.
    promised: AtomicU64,
}

impl Inodes {
    fn shard(&self, host: u64) -> MutexGuard<'_, HashMap<u64, Inode>> {
        // Inode numbers are often consecutive, so their low bits spread well.
        self.shards[host as usize % SHARDS].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts that a known file is given out once more; returns its state.
    pub(super) fn give_out(&self, host: u64) -> Option<bool> {
        let mut shard = self.shard(host);
        let inode = shard.get_mut(&host)?;
        inode.lookups[usize::from(inode.dax)] += 1;
        Some(inode.dax)
    }

    /// Counts that a file is given out that was not known, in the state that was decided, or that another request has
    /// decided meanwhile. Returns the state, and whether it is the one that was passed.
    ///
    /// `is_known` says whether the budget knows it; if not, it is forgotten already.
    pub(super) fn insert(
        &self,
        host: u64,
        decided: Decided,
        is_known: impl FnOnce() -> bool,
    ) -> (bool, bool) {
        let Decided { dax, prefault, hint } = decided;
        let prefault = prefault.unwrap_or_default();
        let mut shard = self.shard(host);
        if !is_known() {
            return (dax, false);
        }
        let (inode, is_new) = match shard.entry(host) {
            Entry::Occupied(known) => (known.into_mut(), false),
            Entry::Vacant(free) => (free.insert(Inode { dax, hint, prefault, ..Inode::default() }), true),
        };
        inode.lookups[usize::from(inode.dax)] += 1;
        (inode.dax, is_new)
    }

    /// Counts that the guest has forgotten a file `count` times in one state; all of it, unless `is_known` by the budget.
    pub(super) fn forget(&self, host: u64, dax: bool, count: u64, is_known: impl FnOnce() -> bool) {
        let mut shard = self.shard(host);
        let Entry::Occupied(mut entry) = shard.entry(host) else { return };
        let inode = entry.get_mut();
        let lookups = &mut inode.lookups[usize::from(dax)];
        *lookups = lookups.saturating_sub(count);
        if inode.lookups == [0; 2] || !is_known() {
            self.promised.fetch_sub(inode.promised, Relaxed);
            entry.remove();
        }
    }

    /// What is known of a file that is to be opened in one state.
    pub(super) fn state(&self, host: u64, dax: bool) -> Option<FileState> {
        let shard = self.shard(host);
        let inode = shard.get(&host)?;
        Some(FileState {
            dax: inode.dax,
            is_open: inode.opens != [0; 2],
            is_open_so: inode.opens[usize::from(dax)] != 0,
            hint: inode.hint,
        })
    }

    /// Which pages of a file are put in the guest's reach; `None` if the guest does not know it as a DAX inode.
    pub(super) fn granted(&self, host: u64) -> Option<Prefault> {
        self.shard(host).get(&host).filter(|inode| inode.lookups[1] != 0).map(|inode| inode.prefault)
    }

    /// Takes note of what was decided about a file that is not open; it is given out so from now on. Returns the state
    /// that it has then, which is the old one if it was opened meanwhile, and whether that is another than before.
    pub(super) fn decide(&self, host: u64, decided: Decided) -> (bool, bool) {
        let Decided { dax, prefault, hint } = decided;
        let mut shard = self.shard(host);
        let Some(inode) = shard.get_mut(&host) else { return (dax, false) };
        inode.hint = hint.or(inode.hint);
        inode.prefault = prefault.unwrap_or(inode.prefault);
        let changes = inode.dax != dax && inode.opens == [0; 2];
        if changes {
            inode.dax = dax;
            inode.has_old_pages |= !dax;
        }
        (inode.dax, changes)
    }

    /// Counts that a file of `size` bytes is opened in one state. Returns whether the pages that the guest may have of it
    /// can be trusted as far as the guest's own writes go.
    pub(super) fn open(&self, host: u64, dax: bool, size: u64) -> bool {
        let mut shard = self.shard(host);
        let Some(inode) = shard.get_mut(&host) else { return false };
        inode.opens[usize::from(dax)] += 1;
        if dax && inode.opens[1] == 1 {
            inode.promised = size.div_ceil(CHUNK_SIZE);
            self.promised.fetch_add(inode.promised, Relaxed);
        }
        if dax {
            return true;
        }
        // Where it is open as DAX too, because a client could not follow, its pages age as we speak.
        let current = !std::mem::replace(&mut inode.has_old_pages, inode.opens[1] != 0);
        current && inode.opens[1] == 0
    }

    /// Counts that a file is closed once in one state.
    pub(super) fn close(&self, host: u64, dax: bool) {
        let mut shard = self.shard(host);
        let Some(inode) = shard.get_mut(&host) else { return };
        let opens = &mut inode.opens[usize::from(dax)];
        *opens = opens.saturating_sub(1);
        if inode.opens[1] == 0 {
            self.promised.fetch_sub(std::mem::take(&mut inode.promised), Relaxed);
        }
    }

    /// Chunks that the files need that are open as DAX.
    pub(super) fn promised(&self) -> u64 {
        self.promised.load(Relaxed)
    }

    /// Forgets everything.
    pub(super) fn clear(&self) {
        for shard in &self.shards {
            let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            for (_, inode) in shard.drain() {
                self.promised.fetch_sub(inode.promised, Relaxed);
            }
            shard.shrink_to_fit();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: u64 = 1 << 55 | 7;

    fn decided(dax: bool) -> Decided {
        Decided { dax, prefault: Some(Prefault::Never), hint: None }
    }

    fn known() -> bool {
        true
    }

    #[test]
    fn a_node_id_says_whether_it_is_dax() {
        for dax in [false, true] {
            assert_eq!(host_node(node_id(NODE, dax)), (NODE, dax));
        }
        assert_eq!(host_node(u64::MAX), (!DAX_BIT, true));
    }

    #[test]
    fn the_first_decision_holds_until_all_is_forgotten() {
        let inodes = Inodes::default();
        assert_eq!(inodes.give_out(NODE), None);
        assert_eq!(inodes.insert(NODE, decided(true), known), (true, true));
        assert_eq!(inodes.insert(NODE, decided(false), known), (true, false));
        assert_eq!(inodes.give_out(NODE), Some(true));
        inodes.forget(NODE, true, 2, known);
        inodes.forget(NODE, false, 100, known);
        assert_eq!((inodes.give_out(NODE), inodes.granted(NODE)), (Some(true), Some(Prefault::Never)));
        inodes.forget(NODE, true, u64::MAX, known);
        assert_eq!((inodes.give_out(NODE), inodes.granted(NODE)), (None, None));
        inodes.forget(NODE, true, 1, known);
    }

    #[test]
    fn nothing_stays_of_what_another_queue_has_forgotten() {
        let forgotten = || false;
        let inodes = Inodes::default();
        // FORGET comes before the file is put down here, then between two of three requests that give it out.
        assert_eq!(inodes.insert(NODE, decided(true), forgotten), (true, false));
        assert_eq!(inodes.give_out(NODE), None);
        inodes.insert(NODE, decided(true), known);
        inodes.give_out(NODE);
        inodes.open(NODE, true, 1);
        inodes.forget(NODE, true, 1, forgotten);
        assert_eq!((inodes.give_out(NODE), inodes.promised()), (None, 0));
    }

    #[test]
    fn an_open_file_does_not_change() {
        let inodes = Inodes::default();
        inodes.insert(NODE, decided(false), known);
        inodes.open(NODE, false, 0);
        assert_eq!(inodes.decide(NODE, decided(true)), (false, false));
        inodes.close(NODE, false);
        assert_eq!(inodes.decide(NODE, decided(true)), (true, true));
        // What it is given out as now keeps it known when what it was is forgotten.
        assert_eq!(inodes.give_out(NODE), Some(true));
        inodes.forget(NODE, false, 1, known);
        assert_eq!(inodes.give_out(NODE), Some(true));
    }

    #[test]
    fn promises_are_those_of_files_open_as_dax() {
        let inodes = Inodes::default();
        for node in 0..4 {
            inodes.insert(node, decided(node != 0), known);
            inodes.open(node, node != 0, node * CHUNK_SIZE + 1);
        }
        inodes.open(2, true, 100 * CHUNK_SIZE);
        assert_eq!(inodes.promised(), 2 + 3 + 4);
        inodes.close(2, true);
        assert_eq!(inodes.promised(), 2 + 3 + 4);
        inodes.close(2, true);
        inodes.close(2, true);
        inodes.close(0, false);
        assert_eq!(inodes.promised(), 2 + 4);
        inodes.forget(1, true, 1, known);
        inodes.close(1, true);
        assert_eq!(inodes.promised(), 4);
        inodes.clear();
        assert_eq!((inodes.promised(), inodes.give_out(3)), (0, None));
    }

    #[test]
    fn pages_from_before_the_file_was_dax_are_not_trusted() {
        let inodes = Inodes::default();
        inodes.insert(NODE, decided(false), known);
        assert!(inodes.open(NODE, false, 0));
        inodes.close(NODE, false);
        inodes.decide(NODE, decided(true));
        assert!(inodes.open(NODE, true, 0));
        // A client that could not follow: it writes through the window while it has pages too.
        assert!(!inodes.open(NODE, false, 0));
        inodes.close(NODE, true);
        assert!(!inodes.open(NODE, false, 0));
        assert!(inodes.open(NODE, false, 0));
        inodes.close(NODE, false);
        inodes.close(NODE, false);
        inodes.close(NODE, false);
        inodes.decide(NODE, decided(true));
        inodes.decide(NODE, decided(false));
        assert!(!inodes.open(NODE, false, 0));
        assert!(inodes.open(NODE, false, 0));
    }
}
