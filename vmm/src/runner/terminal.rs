//! What is typed at the caller's terminal, on its way to the guest's.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};

use super::session::Progress;
use crate::console::EscapeFilter;
use crate::outcome::{ExitReason, Stop};
use crate::vm::Ending;

/// Ctrl-C, as a terminal in raw mode gives it.
const INTERRUPT: u8 = 3;

/// Starts thread `terminal`, which passes on from `typed` to `guest` until the VM has closed the other end of it. Ctrl-A x
/// ends the VM; so does Ctrl-C as long as there is no command that could take it.
///
/// # Errors
/// The system refuses a thread.
pub(super) fn start(
    typed: OwnedFd,
    guest: io::PipeWriter,
    progress: Arc<Progress>,
    ending: Ending,
) -> io::Result<()> {
    let pass_on = move || {
        // At the end of the VM, or when the terminal has gone away: then the guest sees the end of its input.
        if let Err(error) = pass_on(File::from(typed), guest, &progress, &ending) {
            tracing::debug!(%error, "The terminal's input ends");
        }
    };
    thread::Builder::new().name("terminal".into()).spawn(pass_on).map(drop)
}

fn pass_on(
    mut typed: File,
    mut guest: io::PipeWriter,
    progress: &Progress,
    ending: &Ending,
) -> io::Result<()> {
    let mut escape = EscapeFilter::default();
    let mut buffer = [0; 4096];
    loop {
        let mut watched = [
            PollFd::new(&typed, PollFlags::IN),
            // Tells when nobody reads from the pipe any more.
            PollFd::from_borrowed_fd(guest.as_fd(), PollFlags::empty()),
        ];
        match poll(&mut watched, None) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other?,
        };
        if !watched[1].revents().is_empty() {
            return Ok(());
        }
        let read = match typed.read(&mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            other => other?,
        };
        if read == 0 {
            return Ok(());
        }
        if !progress.is_started() && buffer[..read].contains(&INTERRUPT) {
            ending.end(ExitReason::Stopped(Stop::Signal(libc::SIGINT)));
            return Ok(());
        }
        match escape.filter(&buffer[..read]) {
            Some(bytes) => guest.write_all(&bytes)?,
            None => {
                ending.stop();
                return Ok(());
            }
        }
    }
}
