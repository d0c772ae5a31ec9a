//! The caller's side of the guest's console: where its output goes and what is looked for in it, and the terminal that
//! is given back as it was found.

use std::collections::VecDeque;
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

/// What Linux prints when it panics (kernel/panic.c).
const PANIC: &[u8] = b"Kernel panic - not syncing";
/// Console output kept for the message that tells why a boot failed.
const TAIL_BYTES: usize = 8 << 10;

/// What has been seen on the console.
#[derive(Default)]
pub struct ConsoleLog {
    tail: VecDeque<u8>,
    line: Vec<u8>,
    panic: Option<String>,
}

impl ConsoleLog {
    /// The line with which the kernel panicked, if it did.
    pub fn panic(&self) -> Option<&str> {
        self.panic.as_deref()
    }

    /// The last lines of output, at most `lines`.
    pub fn tail(&self, lines: usize) -> String {
        let (first, second) = self.tail.as_slices();
        let bytes = [first, second].concat();
        let text = String::from_utf8_lossy(&bytes).replace('\r', "");
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// Takes note of output. True when it completes the line with which the kernel panics.
    fn record(&mut self, output: &[u8]) -> bool {
        let excess = (self.tail.len() + output.len()).saturating_sub(TAIL_BYTES).min(self.tail.len());
        self.tail.drain(..excess);
        self.tail.extend(&output[output.len().saturating_sub(TAIL_BYTES)..]);
        let mut panicked = false;
        for byte in output {
            if *byte == b'\n' {
                panicked |= self.end_line();
            } else if self.line.len() < 512 {
                self.line.push(*byte);
            }
        }
        panicked
    }

    fn end_line(&mut self) -> bool {
        let line = std::mem::take(&mut self.line);
        if self.panic.is_some() {
            return false;
        }
        // Only at the start of a line, behind the time stamp, so that nobody is fooled by a file that quotes it.
        let message = match line.iter().position(|byte| *byte == b']') {
            Some(end) if line.starts_with(b"[") => line[end + 1..].trim_ascii_start(),
            _ => &line[..],
        };
        let panicked = message.starts_with(PANIC);
        if panicked {
            self.panic = Some(String::from_utf8_lossy(message).trim_end().to_owned());
        }
        panicked
    }
}

/// Passes the guest's output on and keeps a log of it.
pub struct ConsoleOutput {
    out: Box<dyn Write + Send>,
    log: Arc<Mutex<ConsoleLog>>,
    on_panic: Box<dyn Fn() + Send>,
}

impl ConsoleOutput {
    /// Output goes to `out`; `on_panic` is called once, when the kernel has panicked.
    pub fn new(
        out: Box<dyn Write + Send>,
        log: Arc<Mutex<ConsoleLog>>,
        on_panic: impl Fn() + Send + 'static,
    ) -> Self {
        ConsoleOutput { out, log, on_panic: Box::new(on_panic) }
    }
}

impl Write for ConsoleOutput {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.log.lock().unwrap_or_else(|e| e.into_inner()).record(data) {
            (self.on_panic)();
        }
        self.out.write_all(data)?;
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// A terminal in raw mode; as it was before when dropped.
pub struct RawTerminal {
    fd: std::os::fd::OwnedFd,
    before: Termios,
}

/// What [`restore_terminal`] restores: the terminal of the process, if it is in raw mode now.
static RAW: Mutex<Option<RawTerminal>> = Mutex::new(None);

/// Puts standard input into raw mode if it is a terminal; says whether it is.
///
/// # Errors
/// The terminal refuses.
pub fn make_terminal_raw() -> io::Result<bool> {
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        return Ok(false);
    }
    let fd: BorrowedFd = stdin.as_fd();
    let before = tcgetattr(fd)?;
    let mut raw = before.clone();
    raw.make_raw();
    tcsetattr(fd, OptionalActions::Now, &raw)?;
    *RAW.lock().unwrap_or_else(|e| e.into_inner()) =
        Some(RawTerminal { fd: fd.try_clone_to_owned()?, before });
    Ok(true)
}

/// Gives the terminal back as it was found; nothing happens when it was left alone.
pub fn restore_terminal() {
    RAW.lock().unwrap_or_else(|e| e.into_inner()).take();
}

/// The same for signal handlers, which must not wait for a lock.
pub fn restore_terminal_from_handler() {
    if let Ok(mut raw) = RAW.try_lock() {
        raw.take();
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // A terminal that has gone away needs no restoring.
        let _ = tcsetattr(&self.fd, OptionalActions::Now, &self.before);
    }
}

/// Finds the escape sequence in what is typed: Ctrl-A x ends the VM, Ctrl-A twice sends one.
#[derive(Default)]
pub struct EscapeFilter {
    escaped: bool,
}

impl EscapeFilter {
    const ESCAPE: u8 = 1;

    /// What of `typed` goes to the guest; none when the VM is to end.
    pub fn filter(&mut self, typed: &[u8]) -> Option<Vec<u8>> {
        let mut out = Vec::with_capacity(typed.len());
        for byte in typed {
            match (std::mem::take(&mut self.escaped), *byte) {
                (false, Self::ESCAPE) => self.escaped = true,
                (true, b'x') => return None,
                (true, Self::ESCAPE) | (false, _) => out.push(*byte),
                (true, _) => out.extend([Self::ESCAPE, *byte]),
            }
        }
        Some(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log_of(text: &str) -> (ConsoleLog, usize) {
        let mut log = ConsoleLog::default();
        let panics = text.as_bytes().chunks(7).filter(|chunk| log.record(chunk)).count();
        (log, panics)
    }

    #[test]
    fn a_panic_is_recognised_once_with_and_without_time_stamp() {
        for line in [
            "[    1.234567] Kernel panic - not syncing: VFS: Unable to mount root fs\r\n",
            "Kernel panic - not syncing: VFS: Unable to mount root fs\n",
            "[    1.2][    T1] noise\n[    1.3] Kernel panic - not syncing: VFS: Unable to mount root fs\n",
        ] {
            let text = format!("boot\n{line}[    2.0] ---[ end Kernel panic - not syncing: x ]---\n");
            let (log, panics) = log_of(&text);
            assert_eq!(panics, 1, "{line}");
            assert_eq!(log.panic(), Some("Kernel panic - not syncing: VFS: Unable to mount root fs"));
        }
    }

    #[test]
    fn a_quoted_panic_is_none() {
        for text in
            ["echo Kernel panic - not syncing: no\n", "# \"Kernel panic - not syncing\"\n", "Kernel panic"]
        {
            assert_eq!(log_of(text).1, 0, "{text}");
        }
    }

    #[test]
    fn the_tail_keeps_the_last_lines() {
        let text: String = (0..5000).map(|i| format!("line {i}\r\n")).collect();
        let (log, _) = log_of(&text);
        assert_eq!(log.tail(2), "line 4998\nline 4999");
        assert!(log.tail(100_000).len() <= TAIL_BYTES);
    }

    #[test]
    fn the_escape_sequence_ends_and_everything_else_passes() {
        let mut filter = EscapeFilter::default();
        assert_eq!(filter.filter(b"ls\x01").as_deref(), Some(&b"ls"[..]));
        assert_eq!(filter.filter(b"\x01 \x01a").as_deref(), Some(&b"\x01 \x01a"[..]));
        assert_eq!(filter.filter(b"x\x01x"), None);
    }
}
