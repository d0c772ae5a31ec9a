//! Processes that are measured: they are ended whatever happens.

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};

use super::BenchError;

/// A process that is killed when it takes too long, and ended when nobody wants it any more; with those that it has
/// started, which could keep its output open.
pub struct Watched {
    /// The process.
    pub child: Child,
    watchdog: Option<mpsc::Sender<()>>,
}

impl Watched {
    /// Starts it.
    ///
    /// # Errors
    /// The system refuses to.
    pub fn start(command: &mut Command, limit: Duration) -> Result<Watched, BenchError> {
        let child = command
            .process_group(0)
            .spawn()
            .map_err(|source| BenchError::System("start a monitor", source))?;
        let pid = Pid::from_child(&child);
        let (watchdog, ended) = mpsc::channel::<()>();
        thread::spawn(move || {
            if ended.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                // It may have ended by itself.
                let _ = kill_process_group(pid, Signal::KILL);
            }
        });
        Ok(Watched { child, watchdog: Some(watchdog) })
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// The system refuses to.
    pub fn wait(&mut self) -> Result<ExitStatus, BenchError> {
        let status = self.child.wait().map_err(|source| BenchError::System("wait for a monitor", source));
        self.watchdog = None;
        status
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = kill_process_group(Pid::from_child(&self.child), Signal::TERM);
            let _ = self.child.wait();
        }
    }
}
