//! The last resort: a VM that is to end does so by itself and in time, unless something that it waits for does not come back.
//! As a rule that is a vCPU which writes to a console that nobody reads; then the program is left without it.

use std::io;
use std::thread;
use std::time::Duration;

use crate::api::remove_sockets;
use crate::console::restore_terminal;
use crate::outcome::ExitReason;
use crate::vm::Ending;

/// How long a VM may take to end.
const GRACE: Duration = Duration::from_secs(10);

/// Starts thread `time-limit`: leaves the program when the VM has not ended in time after `limit`.
///
/// # Errors
/// The system refuses a thread.
pub(super) fn after_limit(limit: Duration) -> io::Result<()> {
    let wait = move || {
        thread::sleep(limit.saturating_add(GRACE));
        leave(ExitReason::Timeout.status(true));
    };
    thread::Builder::new().name("time-limit".into()).spawn(wait).map(drop)
}

/// Starts thread `last-resort`: leaves the program when the VM has not ended in time after it was told to, with the status that
/// goes with the reason. When only its command has ended it may take as long as it needs, since output is waited for.
///
/// # Errors
/// The system refuses a thread.
pub(super) fn after_end(
    ending: Ending,
    status: impl Fn(ExitReason) -> u8 + Send + 'static,
) -> io::Result<()> {
    let wait = move || {
        if let Some(reason) = ending.wait() {
            thread::sleep(GRACE);
            leave(status(reason));
        }
    };
    thread::Builder::new().name("last-resort".into()).spawn(wait).map(drop)
}

/// Leaves the program with the terminal as it was found and without a socket, whatever its threads are stuck in.
fn leave(status: u8) -> ! {
    restore_terminal();
    remove_sockets();
    // SAFETY: _exit takes any status, and runs nothing of ours.
    unsafe { libc::_exit(status.into()) }
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_vm_that_does_not_end_is_left() {
        // In processes of their own, which are left with a status that nothing else has.
        let test = "runner::last_resort::tests::is_told_to_end";
        let this = std::env::current_exe().unwrap();
        let start = Instant::now();
        let left = Command::new(this).args(["--exact", test, "--ignored"]).output().unwrap();
        assert_eq!(left.status.code(), Some(77), "{left:?}");
        assert!(start.elapsed() >= Duration::from_secs(1) + GRACE, "{:?}", start.elapsed());
    }

    #[test]
    #[ignore = "run by the test above"]
    fn is_told_to_end() {
        let ending = Ending::new().unwrap();
        let status = |reason| if reason == (ExitReason::Exited { status: 3 }) { 77 } else { 78 };
        after_end(ending.clone(), status).unwrap();
        // The command's own end hurries nobody; but the user can, and the first reason stays.
        ending.end(ExitReason::Exited { status: 3 });
        thread::sleep(Duration::from_secs(1));
        ending.stop();
        thread::sleep(GRACE + Duration::from_secs(20));
    }
}
