//! Who was told ESTALE to make it look a file up again, and whether that works with this client.
//!
//! Linux answers ESTALE from an OPEN by walking the path once more with LOOKUP_REVAL, and the program notices nothing. Some
//! opens have no path to walk (by /proc/self/fd, by handle), and a second ESTALE would reach the program. So
//! a thread that was refused is not refused again when it comes back to the same file, whatever it asks for then.
//!
//! Some clients cannot follow at all. An overlay file system on top of the share gives ESTALE to its own caller instead of
//! opening again; it is known by its opens (O_NOATIME), but others may be like it. A thread that does not come back is
//! the sign of that, and after a few of them nobody is refused in the session any more; files then change when the guest
//! forgets them.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How soon a thread comes back, at the latest. It takes a look-up or two: microseconds, much more in an emulated guest.
const RETURN: Duration = Duration::from_secs(2);

/// Threads that did not come back, one after the other, before it is concluded that the client does not follow. One alone may have been killed.
const LOST_MAX: usize = 3;

/// The most threads that are waited for, so that a guest cannot fill the host's memory.
const WAITING_MAX: usize = 256;

struct Refusal {
    node: u64,
    thread: u32,
    at: Instant,
}

/// The refusals of a session.
#[derive(Default)]
pub(super) struct Refusals {
    waiting: Mutex<Vec<Refusal>>,
    /// How many are waiting, to be looked at without the lock.
    len: AtomicUsize,
    lost: AtomicUsize,
}

impl Refusals {
    /// Whether this thread is back that was refused to open this file; it is not waited for any longer.
    pub(super) fn is_back(&self, node: u64, thread: u32) -> bool {
        if self.len.load(Relaxed) == 0 {
            return false;
        }
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let found = waiting.iter().position(|refusal| refusal.node == node && refusal.thread == thread);
        if let Some(index) = found {
            waiting.swap_remove(index);
            self.len.store(waiting.len(), Relaxed);
            if self.lost.load(Relaxed) < LOST_MAX {
                self.lost.store(0, Relaxed);
            }
        }
        found.is_some()
    }

    /// Whether a thread may be refused to open a file; if so, it is waited for from `now` on.
    pub(super) fn may_refuse(&self, node: u64, thread: u32, now: Instant) -> bool {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let before = waiting.len();
        waiting.retain(|refusal| now.duration_since(refusal.at) < RETURN);
        let lost = before - waiting.len();
        let lost_before = self.lost.fetch_add(lost, Relaxed);
        let may = lost_before + lost < LOST_MAX && waiting.len() < WAITING_MAX;
        if may {
            waiting.push(Refusal { node, thread, at: now });
        } else if lost_before < LOST_MAX && lost_before + lost >= LOST_MAX {
            tracing::warn!(
                "files of this mount keep their DAX state until the guest forgets them: what opens them does not look \
                 them up again after ESTALE, as if a file system lay on top of the mount"
            );
        }
        self.len.store(waiting.len(), Relaxed);
        may
    }

    /// Starts anew, for another session.
    pub(super) fn clear(&self) {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.len.store(0, Relaxed);
        self.lost.store(0, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_not_refused_twice() {
        let (refusals, now) = (Refusals::default(), Instant::now());
        assert!(!refusals.is_back(1, 10));
        assert!(refusals.may_refuse(1, 10, now) && refusals.may_refuse(1, 11, now));
        assert!(!refusals.is_back(2, 10) && !refusals.is_back(1, 12));
        assert!(refusals.is_back(1, 10) && refusals.is_back(1, 11));
        assert!(!refusals.is_back(1, 10));
        assert!(refusals.may_refuse(1, 10, now));
    }

    #[test]
    fn a_client_that_does_not_follow_is_left_alone() {
        let (refusals, start) = (Refusals::default(), Instant::now());
        let later = |seconds| start + Duration::from_secs(seconds);
        for round in 0..3 {
            assert!(refusals.may_refuse(100 + round, 10, later(0)) && refusals.may_refuse(200, 11, later(5)));
            assert!(refusals.is_back(200, 11), "one in two was killed");
        }
        refusals.clear();
        for round in 0..3 {
            assert!(refusals.may_refuse(round, 10, later(10 * round)), "{round}");
        }
        assert!(!refusals.may_refuse(9, 10, later(30)));
        assert!(!refusals.may_refuse(9, 10, later(100)));
        refusals.clear();
        assert!(refusals.may_refuse(9, 10, later(100)));
    }

    #[test]
    fn a_guest_cannot_fill_the_memory() {
        let (refusals, now) = (Refusals::default(), Instant::now());
        for thread in 0..1000 {
            assert_eq!(refusals.may_refuse(1, thread, now), (thread as usize) < WAITING_MAX);
        }
        assert!(refusals.is_back(1, 0) && refusals.may_refuse(1, 0, now));
    }
}
