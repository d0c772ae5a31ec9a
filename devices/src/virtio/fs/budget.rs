//! How much of the host a share's guest may take: descriptors.
//!
//! Each file that a guest knows and each that it has open costs this process one. A guest could take all that there are,
//! and leave none to the VMM and to the other shares (CVE-2020-10717), so a share has a budget of them, and a guest that
//! wants more gets ENFILE.
//!
//! Memory needs no budget of its own: what the server remembers of a guest is in proportion to these descriptors, to the
//! chunks of the window, or is bounded by itself.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::read_to_string;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::window::CHUNK_SIZE;

/// Descriptors that all shares together leave to the rest of the process: KVM's, those of queues, of the console and of
/// disks, and those that a request needs while it is served.
const RESERVED: u64 = 512;

/// The least that a share gets; no VM starts without as many.
const LEAST: u64 = 128;

/// The limit of open files that a privileged process asks for, if it has less.
const ENOUGH: u64 = 1_000_000;

/// Locks, so that queues seldom wait for each other.
const SHARDS: usize = 16;

/// Raises the process's limit of open files as far as it may, and says how many descriptors each of its shares can have
/// for the files that its guest knows or has open ([`super::FileSystemConfig::descriptors`]). `windows` are the sizes of
/// the shares' DAX windows in bytes, 0 for none: a chunk can show a file that nothing else holds open.
///
/// # Errors
/// The limit is too low for so many shares. Without any, each number of descriptors is one to try with.
pub fn descriptors_per_share(windows: &[u64]) -> Result<u64, TooFewDescriptors> {
    enough(raise_open_file_limit(), windows)
}

/// The process may have too few files open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "The limit of open files is {limit}, and {needed} are needed for {shares} shares: raise the hard limit (ulimit -Hn {needed})"
)]
pub struct TooFewDescriptors {
    limit: u64,
    needed: u64,
    shares: usize,
}

fn enough(limit: u64, windows: &[u64]) -> Result<u64, TooFewDescriptors> {
    let (shares, needed) = (windows.len(), RESERVED + LEAST * windows.len() as u64);
    match shares > 0 && limit < needed {
        true => Err(TooFewDescriptors { limit, needed, shares }),
        false => Ok(divide(limit, windows)),
    }
}

/// The same for a process that may have `limit` descriptors.
pub(super) fn divide(limit: u64, windows: &[u64]) -> u64 {
    let left = limit.saturating_sub(RESERVED);
    let chunks = windows.iter().map(|size| size / CHUNK_SIZE).sum::<u64>();
    // Few windows show as many files as they have chunks, and a guest that has one do so gets errors for the last ones.
    let shared = left - chunks.min(left / 4);
    (shared / (windows.len() as u64).max(1)).max(LEAST)
}

/// Raises the soft limit of open files to the hard one, and both to what is enough if the process may; returns the limit.
fn raise_open_file_limit() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the structure lives through the call.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } != 0 {
        return RESERVED;
    }
    let most = read_to_string("/proc/sys/fs/nr_open").ok().and_then(|text| text.trim().parse().ok());
    let enough = ENOUGH.min(most.unwrap_or(limit.rlim_max)).max(limit.rlim_max);
    for wanted in [enough, limit.rlim_max] {
        let raised = libc::rlimit { rlim_cur: wanted, rlim_max: wanted };
        // SAFETY: as above.
        if wanted <= limit.rlim_cur || unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raised) } == 0 {
            return wanted.max(limit.rlim_cur);
        }
    }
    tracing::warn!(error = %io::Error::last_os_error(), "cannot raise the limit of open files");
    limit.rlim_cur
}

/// The descriptors of one share: those of the nodes that its guest knows, and those of what it has open.
///
/// With several queues a count may for a moment be less than what there is, by one a queue. It stays less only if a guest
/// closes what it has not opened yet while it starts a new session, at most by one a queue and session.
pub(super) struct Budget {
    tag: Arc<str>,
    limit: u64,
    used: AtomicU64,
    /// How often each node was given out and not yet forgotten. The library counts that too, and does not tell.
    nodes: [Mutex<HashMap<u64, u64>>; SHARDS],
    /// Whether it was said that it is used up.
    has_warned: AtomicBool,
}

impl Budget {
    /// The budget of a share that may have `limit` descriptors.
    pub(super) fn new(tag: Arc<str>, limit: u64) -> Budget {
        Budget {
            tag,
            limit,
            used: AtomicU64::new(0),
            nodes: Default::default(),
            has_warned: AtomicBool::new(false),
        }
    }

    /// Descriptors that are in use.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn used(&self) -> u64 {
        self.used.load(Relaxed)
    }

    /// Whether there are `count` descriptors left, for what should not be begun without.
    ///
    /// # Errors
    /// ENFILE.
    pub(super) fn has_left(&self, count: u64) -> io::Result<()> {
        if self.used.load(Relaxed).saturating_add(count) <= self.limit {
            Ok(())
        } else {
            Err(self.exceeded())
        }
    }

    /// Counts one descriptor more.
    ///
    /// # Errors
    /// ENFILE if there are none left.
    pub(super) fn take(&self) -> io::Result<()> {
        let more = |used| (used < self.limit).then_some(used + 1);
        self.used.fetch_update(Relaxed, Relaxed, more).map(drop).map_err(|_| self.exceeded())
    }

    /// Counts one less.
    pub(super) fn give_back(&self) {
        // Below zero only what was taken before the budget was cleared would bring it.
        let _ = self.used.fetch_update(Relaxed, Relaxed, |used| used.checked_sub(1));
    }

    /// Counts that a node is given out once more, after the library has counted it.
    ///
    /// # Errors
    /// ENFILE if the guest did not know it, and may know no more. The library is to forget it again.
    pub(super) fn know(&self, node: u64) -> io::Result<()> {
        match self.shard(node).entry(node) {
            Entry::Occupied(mut known) => {
                let count = known.get_mut();
                *count = count.saturating_add(1);
            }
            Entry::Vacant(unknown) => {
                self.take()?;
                unknown.insert(1);
            }
        }
        Ok(())
    }

    /// Whether the guest knows a node.
    pub(super) fn knows(&self, node: u64) -> bool {
        self.shard(node).contains_key(&node)
    }

    /// Counts that a node was forgotten `count` times, before the library does so: then no other request can bring it
    /// about that the library knows what is not counted here.
    pub(super) fn forget(&self, node: u64, count: u64) {
        if let Entry::Occupied(mut known) = self.shard(node).entry(node) {
            let left = known.get().saturating_sub(count);
            if left == 0 {
                known.remove();
                self.give_back();
            } else {
                *known.get_mut() = left;
            }
        }
    }

    /// Forgets everything, before the library does.
    pub(super) fn clear(&self) {
        for shard in &self.nodes {
            let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            shard.clear();
            shard.shrink_to_fit();
        }
        self.used.store(0, Relaxed);
    }

    fn shard(&self, node: u64) -> MutexGuard<'_, HashMap<u64, u64>> {
        // Inode numbers are often consecutive, so their low bits spread well.
        self.nodes[node as usize % SHARDS].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn exceeded(&self) -> io::Error {
        if !self.has_warned.swap(true, Relaxed) {
            let (share, limit) = (&*self.tag, self.limit);
            tracing::warn!(
                share,
                limit,
                "the guest knows or has open as many files as it may, and gets ENFILE: raise the hard limit of open \
                 files (ulimit -Hn), or have the guest drop its caches"
            );
        }
        io::Error::from_raw_os_error(libc::ENFILE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(limit: u64) -> Budget {
        Budget::new("test".into(), limit)
    }

    fn code<T>(result: io::Result<T>) -> Option<i32> {
        result.err().and_then(|error| error.raw_os_error())
    }

    #[test]
    fn a_limit_that_is_too_low_is_told_with_what_is_needed() {
        assert_eq!(enough(640, &[0]), Ok(128));
        let error = enough(640, &[0, 0]).unwrap_err().to_string();
        assert!(
            error.contains("is 640, and 768 are needed for 2 shares") && error.contains("ulimit -Hn 768"),
            "{error}"
        );
        assert!(enough(20, &[]).is_ok(), "without shares nobody takes them");
    }

    #[test]
    fn nodes_and_what_is_open_count_alike() {
        let budget = budget(3);
        budget.know(7).unwrap();
        budget.know(7).unwrap();
        budget.take().unwrap();
        assert_eq!(code(budget.has_left(2)), Some(libc::ENFILE));
        budget.has_left(1).unwrap();
        budget.know(8).unwrap();
        assert_eq!(code(budget.know(9)), Some(libc::ENFILE));
        assert_eq!(code(budget.take()), Some(libc::ENFILE));
        // What the guest knows already it may look up again.
        budget.know(7).unwrap();
        budget.forget(7, 2);
        assert_eq!(budget.used(), 3);
        budget.forget(7, 1);
        budget.know(9).unwrap();
        assert_eq!(budget.used(), 3);
    }

    #[test]
    fn what_was_not_taken_cannot_be_given_back() {
        let budget = budget(2);
        budget.give_back();
        budget.forget(1, u64::MAX);
        assert_eq!(budget.used(), 0);
        budget.know(1).unwrap();
        budget.forget(1, u64::MAX);
        budget.forget(1, 1);
        assert_eq!(budget.used(), 0);
        budget.take().unwrap();
        budget.know(1).unwrap();
        budget.clear();
        assert_eq!(budget.used(), 0);
        budget.know(1).unwrap();
        budget.forget(1, 1);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn all_shares_get_the_same_and_leave_some() {
        assert_eq!(divide(20_512, &[0]), 20_000);
        assert_eq!(divide(20_512, &[0, 0]), 10_000);
        assert_eq!(divide(20_512, &[100 * CHUNK_SIZE, 300 * CHUNK_SIZE]), 9_800);
        // A window of 8 GiB could take them all.
        assert_eq!(divide(4_512, &[4096 * CHUNK_SIZE]), 3_000);
        assert_eq!(divide(640, &[0]), LEAST);
        assert_eq!(divide(u64::MAX, &[]), u64::MAX - RESERVED);
    }

    #[test]
    fn threads_leave_nothing_behind() {
        let budget = budget(40);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let budget = &budget;
                scope.spawn(move || {
                    for round in 0..2_000 {
                        let node = (thread * 7 + round) % 64;
                        if budget.know(node).is_ok() {
                            assert!(budget.used() <= 40);
                            budget.forget(node, 1);
                        }
                        if budget.take().is_ok() {
                            budget.give_back();
                        }
                    }
                });
            }
        });
        assert_eq!(budget.used(), 0);
    }
}
