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

impl ExitReason {
    /// The exit status of `daxvm run` without a command.
    pub fn status(&self) -> u8 {
        match self {
            ExitReason::PowerOff | ExitReason::Stopped(Stop::Request) => 0,
            ExitReason::Reset => 32,
            ExitReason::Crash(_) => 33,
            ExitReason::Panic(_) => 34,
            ExitReason::Timeout => 124,
            ExitReason::Stopped(Stop::Signal(signal)) => 128 + *signal as u8,
        }
    }
}
