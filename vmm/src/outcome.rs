//! How a VM ended, and the exit status that says so.

use serde::Serialize;

/// Why a VM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "reason", content = "message", rename_all = "kebab-case")]
pub enum ExitReason {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest's CPU could not go on (a triple fault), or KVM could not.
    Crash(String),
    /// The guest's kernel panicked; its message.
    Panic(String),
    /// The time that the configuration allows was over.
    Timeout,
    /// The caller ended it; which signal, or how.
    Stopped(Stop),
    /// The command ended by itself.
    Exited {
        /// Its exit status.
        status: u8,
    },
    /// A signal ended the command.
    Signaled {
        /// The signal's number.
        signal: i32,
    },
    /// The command could not be run.
    NotRun {
        /// 127 when it was not found, 126 otherwise.
        status: u8,
        /// What the system said.
        error: String,
    },
    /// The guest did not come to the point of running the command.
    BootFailed {
        /// What it could not do, as in `mount the root`.
        what: String,
        /// Why not.
        error: String,
    },
}

/// How the caller ended a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stop {
    /// A signal to the VMM.
    Signal(i32),
    /// The escape sequence on the terminal, or a call of the library.
    Request,
}

/// The exit status of an error of the VMM, of its configuration, or of a guest that could not do its task.
pub const STATUS_ERROR: u8 = 125;

impl ExitReason {
    /// The exit status of `daxvm run`. A guest that had a command and ended without a word of it has failed, however it
    /// ended.
    pub fn status(&self, has_command: bool) -> u8 {
        match self {
            ExitReason::PowerOff if has_command => STATUS_ERROR,
            ExitReason::Stopped(Stop::Request) if has_command => of_signal(libc::SIGINT),
            ExitReason::PowerOff | ExitReason::Stopped(Stop::Request) => 0,
            ExitReason::Reset => 32,
            ExitReason::Crash(_) => 33,
            ExitReason::Panic(_) => 34,
            ExitReason::Timeout => 124,
            ExitReason::Stopped(Stop::Signal(signal)) | ExitReason::Signaled { signal } => of_signal(*signal),
            ExitReason::Exited { status } | ExitReason::NotRun { status, .. } => *status,
            ExitReason::BootFailed { .. } => STATUS_ERROR,
        }
    }
}

/// As shells show the end by a signal.
fn of_signal(signal: i32) -> u8 {
    u8::try_from(128_i32.saturating_add(signal)).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_that_never_ended_is_no_success() {
        for reason in [ExitReason::PowerOff, ExitReason::Stopped(Stop::Request)] {
            assert_eq!(reason.status(false), 0);
            assert!(reason.status(true) > 124, "{reason:?}");
        }
    }

    #[test]
    fn signals_are_shown_as_by_shells() {
        assert_eq!(ExitReason::Signaled { signal: 9 }.status(true), 137);
        assert_eq!(ExitReason::Stopped(Stop::Signal(15)).status(true), 143);
        assert_eq!(ExitReason::Signaled { signal: i32::MAX }.status(true), 255, "whatever a guest says");
        assert_eq!(ExitReason::Signaled { signal: -200 }.status(true), 255);
    }
}
