//! Signals to daxvm: which are for the guest, and which end it.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::session::{Guest, Progress};
use super::stdio::window_size;
use crate::guest::protocol::ToGuest;
use crate::outcome::{ExitReason, Stop};
use crate::vm::Ending;

/// The signals by which a caller ends the program.
const ENDING: [libc::c_int; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];
/// Signals that come closer together than this are one: `timeout` sends its signal to the program, and then to all of
/// its process group.
const ONE_SIGNAL: Duration = Duration::from_millis(50);

/// The signals that end the program or concern its terminal, blocked.
pub(super) struct Signals(libc::sigset_t);

impl Signals {
    /// Blocks them in this thread and those that it starts; one thread waits for them instead. Signals that the caller
    /// has ignored, as nohup does, stay so.
    ///
    /// # Errors
    /// The system refuses.
    pub fn block() -> io::Result<Signals> {
        // SAFETY: sigset_t and sigaction are plain data for which zeros are valid; all pointers are to locals.
        unsafe {
            let mut set = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            libc::sigaddset(&mut set, libc::SIGWINCH);
            for signal in ENDING {
                let mut action: libc::sigaction = std::mem::zeroed();
                libc::sigaction(signal, std::ptr::null(), &mut action);
                if action.sa_sigaction != libc::SIG_IGN {
                    libc::sigaddset(&mut set, signal);
                }
            }
            match libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) {
                0 => Ok(Signals(set)),
                error => Err(io::Error::from_raw_os_error(error)),
            }
        }
    }

    /// Waits for the next one.
    fn wait(&self) -> libc::c_int {
        loop {
            let mut signal = 0;
            // SAFETY: both pointers are to memory that outlives the call.
            if unsafe { libc::sigwait(&self.0, &mut signal) } == 0 {
                return signal;
            }
        }
    }

    /// Starts thread `signals`. With a `guest` that runs a command, the first SIGINT is for the command; any other
    /// signal, and a second SIGINT, end the VM.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn handle(self, ending: Ending, guest: Option<(Guest, Arc<Progress>)>) -> io::Result<()> {
        let handle = move || {
            let mut interrupts = Interrupts::default();
            loop {
                let signal = self.wait();
                match &guest {
                    Some((guest, _)) if signal == libc::SIGWINCH => {
                        if let Some(size) = window_size() {
                            guest.tell(&ToGuest::Window(size));
                        }
                        continue;
                    }
                    None if signal == libc::SIGWINCH => continue,
                    Some((guest, progress)) if signal == libc::SIGINT => {
                        match interrupts.next(Instant::now(), progress.is_started()) {
                            Interrupt::Same => continue,
                            Interrupt::Ask => {
                                guest.tell(&ToGuest::Signal { signal });
                                continue;
                            }
                            Interrupt::End => {}
                        }
                    }
                    _ => {}
                }
                ending.end(ExitReason::Stopped(Stop::Signal(signal)));
                return;
            }
        };
        thread::Builder::new().name("signals".into()).spawn(handle).map(drop)
    }
}

/// What a SIGINT means.
#[derive(Debug, PartialEq, Eq)]
enum Interrupt {
    /// The guest's command gets it.
    Ask,
    /// It belongs to the one before.
    Same,
    /// The VM ends.
    End,
}

#[derive(Default)]
struct Interrupts {
    asked: Option<Instant>,
}

impl Interrupts {
    fn next(&mut self, now: Instant, is_started: bool) -> Interrupt {
        match self.asked {
            Some(asked) if now.duration_since(asked) < ONE_SIGNAL => Interrupt::Same,
            None if is_started => {
                self.asked = Some(now);
                Interrupt::Ask
            }
            // Nobody is there yet to be asked, or has been asked before.
            _ => Interrupt::End,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_is_asked_once() {
        let start = Instant::now();
        let mut interrupts = Interrupts::default();
        assert_eq!(interrupts.next(start, true), Interrupt::Ask);
        assert_eq!(interrupts.next(start + Duration::from_millis(1), true), Interrupt::Same);
        assert_eq!(interrupts.next(start + Duration::from_secs(1), true), Interrupt::End);
        assert_eq!(Interrupts::default().next(start, false), Interrupt::End);
    }
}
