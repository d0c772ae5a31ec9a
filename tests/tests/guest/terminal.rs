//! A pseudo-terminal of the host, with a program on it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcgetattr, tcsetwinsize};

/// How long what is shown may take.
const PATIENCE: Duration = Duration::from_secs(180);

pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// A pseudo-terminal whose master we hold.
pub struct Terminal {
    master: File,
    slave: OwnedFd,
    output: Receiver<Vec<u8>>,
    seen: String,
}

impl Terminal {
    /// One with so many rows and columns.
    pub fn open(rows: u16, columns: u16) -> Result<Terminal> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let name = ptsname(&master, Vec::new())?;
        let slave = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?;
        let master = File::from(master);
        let mut reader = master.try_clone()?;
        let (sender, output) = mpsc::channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            // Fails when nobody has the other end any more.
            while let Ok(read @ 1..) = reader.read(&mut buffer) {
                if sender.send(buffer[..read].to_vec()).is_err() {
                    break;
                }
            }
        });
        let terminal = Terminal { master, slave, output, seen: String::new() };
        terminal.resize(rows, columns)?;
        Ok(terminal)
    }

    /// Makes it a program's standard streams and controlling terminal.
    pub fn attach(&self, command: &mut Command) -> std::io::Result<()> {
        let stream = || self.slave.try_clone().map(Stdio::from);
        command.stdin(stream()?).stdout(stream()?).stderr(stream()?);
        // SAFETY: both calls are safe between fork and exec.
        unsafe {
            command.pre_exec(|| {
                rustix::process::setsid()?;
                rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
                Ok(())
            })
        };
        Ok(())
    }

    /// Waits until it has shown `text`, and forgets that and what was before, which it returns.
    pub fn wait_for(&mut self, text: &str) -> Result<String> {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.seen.find(text) {
                let before = self.seen[..at].to_owned();
                self.seen.drain(..at + text.len());
                return Ok(before);
            }
            match self.output.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.seen.push_str(&String::from_utf8_lossy(&bytes)),
                Err(error) => return Err(format!("no {text:?} ({error}) in {:?}", self.seen).into()),
            }
        }
    }

    /// Types.
    pub fn type_in(&mut self, text: &str) -> std::io::Result<()> {
        self.master.write_all(text.as_bytes())
    }

    /// Gives it another size.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        Ok(tcsetwinsize(&self.master, size)?)
    }

    /// How it is set, to be compared.
    pub fn modes(&self) -> Result<String> {
        Ok(format!("{:?}", tcgetattr(self.slave.as_fd())?))
    }
}
