//! Notices a guest that hangs while it boots, where others would wait for ever.
//!
//! A kernel that boots makes exits all the time: it looks for devices, sets them up, prints. One that hangs makes none,
//! or prints that it hangs, but only after half a minute. What it does without exits, such as unpacking itself, takes
//! much less time than the limit.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::session::Progress;
use crate::outcome::ExitReason;
use crate::vm::Ending;

/// How often is looked, at most.
const INTERVAL: Duration = Duration::from_millis(100);
/// A look that comes so late tells that the whole process was stopped meanwhile, and the guest with it.
const STOPPED: Duration = Duration::from_secs(2);

/// Starts thread `watchdog`: ends the VM when its guest shows no sign of life for `limit` before its init runs.
/// `activity` counts its signs of life.
///
/// # Errors
/// The system refuses a thread.
pub(super) fn start(
    activity: Arc<AtomicU64>,
    progress: Arc<Progress>,
    limit: Duration,
    ending: Ending,
) -> io::Result<()> {
    let watch = move || {
        let mut watchdog = Watchdog::new(limit, Instant::now());
        while !progress.is_ready() && ending.reason().is_none() {
            if watchdog.is_overdue(Instant::now(), activity.load(Ordering::Relaxed)) {
                let error = format!("it has shown no sign of life for {limit:?} (--boot-timeout)");
                ending.end(ExitReason::BootFailed { what: "boot".into(), error });
                return;
            }
            thread::sleep(INTERVAL.min(limit));
        }
    };
    thread::Builder::new().name("watchdog".into()).spawn(watch).map(drop)
}

struct Watchdog {
    limit: Duration,
    count: u64,
    last_sign: Instant,
    last_look: Instant,
}

impl Watchdog {
    fn new(limit: Duration, now: Instant) -> Watchdog {
        Watchdog { limit, count: 0, last_sign: now, last_look: now }
    }

    /// Takes note of the signs of life so far; says whether the last one is too long ago.
    fn is_overdue(&mut self, now: Instant, count: u64) -> bool {
        let stopped = now.duration_since(self.last_look) > STOPPED;
        if count != self.count || stopped {
            (self.count, self.last_sign) = (count, now);
        }
        self.last_look = now;
        now.duration_since(self.last_sign) >= self.limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn silence_is_overdue_and_signs_of_life_are_not() {
        let start = Instant::now();
        let mut watchdog = Watchdog::new(10 * SECOND, start);
        let counts = (0..30).map(|second| (start + second * SECOND, u64::from(second.min(12))));
        let overdue = counts.map(|(now, count)| watchdog.is_overdue(now, count));
        assert_eq!(overdue.into_iter().position(|overdue| overdue), Some(22));
    }

    #[test]
    fn a_stopped_process_is_not_the_guests_fault() {
        let start = Instant::now();
        let mut watchdog = Watchdog::new(10 * SECOND, start);
        assert!(!watchdog.is_overdue(start + SECOND, 0));
        assert!(!watchdog.is_overdue(start + 3600 * SECOND, 0));
        let silent = (1..=10).map(|second| watchdog.is_overdue(start + (3600 + second) * SECOND, 0));
        assert_eq!(silent.collect::<Vec<_>>().iter().position(|overdue| *overdue), Some(9));
    }
}
