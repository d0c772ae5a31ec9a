//! How far a walk through a large tree is, for whoever watches.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Between two lines.
const INTERVAL: Duration = Duration::from_millis(200);

/// Counts files, and says so on standard error where that is a terminal.
pub(super) struct Progress {
    files: u64,
    next: Option<Instant>,
}

impl Progress {
    pub(super) fn new() -> Progress {
        let seen = std::io::stderr().is_terminal();
        Progress { files: 0, next: seen.then(|| Instant::now() + INTERVAL) }
    }

    /// Makes room for a message.
    pub(super) fn clear(&self) {
        if self.next.is_some() {
            // What cannot be shown is not missed.
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }

    pub(super) fn count(&mut self) {
        self.files += 1;
        // The clock is asked for every hundredth file only.
        if self.files.is_multiple_of(100) && self.next.is_some_and(|next| Instant::now() >= next) {
            // What cannot be shown is not missed.
            let _ = write!(std::io::stderr(), "\r{} files", self.files);
            self.next = Some(Instant::now() + INTERVAL);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}
