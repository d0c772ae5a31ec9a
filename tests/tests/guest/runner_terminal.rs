//! `daxvm run -- CMD` on a terminal.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcgetattr, tcsetwinsize};
use tests::vm::{CommandEnded, CommandRun, Kernel, RunningCommand};

use crate::harness::{Outcome, ensure, ensure_eq};
use crate::runner::{RunnerCheck, ensure_end};

/// The checks.
pub fn checks() -> Vec<(&'static str, RunnerCheck)> {
    vec![
        ("a-terminal-is-one-for-the-command", terminal),
        ("a-terminal-keeps-other-streams-apart", apart),
        ("a-terminal-is-given-back", given_back),
    ]
}

/// How long the guest may take to say something.
const PATIENCE: Duration = Duration::from_secs(180);

/// A program on a pseudo-terminal, whose other end we hold.
struct OnTerminal {
    running: RunningCommand,
    master: File,
    slave: OwnedFd,
    output: Receiver<Vec<u8>>,
    seen: String,
}

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

impl OnTerminal {
    fn start(run: &CommandRun, adjust: impl FnOnce(&mut Command)) -> Result<OnTerminal> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let name = ptsname(&master, Vec::new())?;
        let slave = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?;
        tcsetwinsize(&slave, size(40, 100))?;
        let running = run.start_with(|command| {
            let stream = || slave.try_clone().map(std::process::Stdio::from);
            if let (Ok(input), Ok(output), Ok(error)) = (stream(), stream(), stream()) {
                command.stdin(input).stdout(output).stderr(error);
            }
            adjust(command);
            // SAFETY: both calls are safe between fork and exec.
            unsafe {
                command.pre_exec(|| {
                    rustix::process::setsid()?;
                    rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
                    Ok(())
                })
            };
        })?;
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
        Ok(OnTerminal { running, master, slave, output, seen: String::new() })
    }

    /// Waits until the terminal has shown `text`, and forgets what was before.
    fn wait_for(&mut self, text: &str) -> Result<String> {
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

    fn type_in(&mut self, text: &str) -> std::io::Result<()> {
        self.master.write_all(text.as_bytes())
    }

    fn wait(&mut self) -> Result<CommandEnded> {
        Ok(self.running.wait()?)
    }
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

/// A terminal with a size that follows, line discipline, signals by keys, and job control.
fn terminal(kernel: &Kernel) -> Outcome {
    let script = "stty size; test -t 0 && test -t 1 && test -t 2 && echo all three; tty; \
                  trap 'stty size' WINCH; trap 'echo caught; exit 6' INT; echo ready; while :; do sleep 0.1; done";
    let mut terminal = OnTerminal::start(&CommandRun::shell(kernel, script), |_| {})?;
    terminal.wait_for("40 100\r\n")?;
    terminal.wait_for("all three\r\n")?;
    terminal.wait_for("/dev/pts/0\r\n")?;
    terminal.wait_for("ready\r\n")?;
    tcsetwinsize(&terminal.master, size(50, 132))?;
    terminal.wait_for("50 132\r\n")?;
    terminal.type_in("\x03")?;
    terminal.wait_for("caught\r\n")?;
    let ended = terminal.wait()?;
    ensure_end(&ended, 6, "exited")?;

    let script = "read line; echo \"[$line]\"; exec sh -i";
    let mut terminal = OnTerminal::start(&CommandRun::shell(kernel, script), |command| {
        command.env("TERM", "vt100");
    })?;
    // Typed before anybody reads, corrected by the guest's line discipline, and echoed once.
    terminal.type_in("helpo\x7f\x7flo\r")?;
    terminal.wait_for("[hello]\r\n")?;
    terminal.wait_for("# ")?;
    terminal.type_in("sleep 1000\r")?;
    terminal.wait_for("sleep 1000\r\n")?;
    thread::sleep(Duration::from_secs(2));
    // Ctrl-Z stops the job in the guest, not daxvm.
    terminal.type_in("\x1a")?;
    terminal.wait_for("Stopped")?;
    terminal.type_in("echo $TERM\r")?;
    terminal.wait_for("vt100\r\n")?;
    terminal.type_in("fg\r")?;
    terminal.wait_for("sleep 1000\r\n")?;
    thread::sleep(Duration::from_secs(2));
    terminal.type_in("\x03")?;
    terminal.wait_for("# ")?;
    terminal.type_in("exit 5\r")?;
    let ended = terminal.wait()?;
    ensure_end(&ended, 5, "exited")
}

/// Standard output that is no terminal stays what it is.
fn apart(kernel: &Kernel) -> Outcome {
    let script =
        "printf 'a\\n'; test -t 1 || echo no terminal; test -t 2 && echo terminal >&2; stty size >&2";
    let run = CommandRun::shell(kernel, script);
    let mut terminal = OnTerminal::start(&run, |command| {
        command.stdout(std::process::Stdio::piped());
    })?;
    terminal.wait_for("terminal\r\n")?;
    terminal.wait_for("40 100\r\n")?;
    let ended = terminal.wait()?;
    ensure_end(&ended, 0, "exited")?;
    ensure_eq!(ended.stdout, b"a\nno terminal\n");
    Ok(())
}

/// The terminal is as it was after every end.
fn given_back(kernel: &Kernel) -> Outcome {
    type End = fn(&mut OnTerminal) -> std::result::Result<(), Box<dyn std::error::Error>>;
    let ends: [(&str, i32, &str, End); 4] = [
        ("by itself", 0, "exited", |terminal| Ok(terminal.type_in("end\r")?)),
        ("Ctrl-A x", 130, "stopped", |terminal| Ok(terminal.type_in("\x01x")?)),
        ("SIGTERM", 143, "stopped", |terminal| Ok(terminal.running.signal(Signal::TERM)?)),
        ("SIGHUP", 129, "stopped", |terminal| Ok(terminal.running.signal(Signal::HUP)?)),
    ];
    for (what, status, reason, end) in ends {
        let mut terminal = OnTerminal::start(&CommandRun::shell(kernel, "echo ready; read line"), |_| {})?;
        let before = format!("{:?}", tcgetattr(terminal.slave.as_fd())?);
        terminal.wait_for("ready\r\n")?;
        let raw = format!("{:?}", tcgetattr(terminal.slave.as_fd())?);
        ensure!(raw != before, "the terminal is not in raw mode while the command runs");
        end(&mut terminal)?;
        let ended = terminal.wait()?;
        ensure_end(&ended, status, reason).map_err(|error| format!("{what}: {error}"))?;
        ensure_eq!(format!("{:?}", tcgetattr(terminal.slave.as_fd())?), before, "the terminal after {what}");
    }
    Ok(())
}
