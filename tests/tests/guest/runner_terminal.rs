//! `daxvm run -- CMD` on a terminal.

use std::process::Command;
use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use tests::vm::{CommandEnded, CommandRun, Kernel, RunningCommand};

use crate::harness::{Outcome, ensure, ensure_eq};
use crate::runner::{RunnerCheck, ensure_end};
use crate::terminal::{Result, Terminal};

/// The checks.
pub fn checks() -> Vec<(&'static str, RunnerCheck)> {
    vec![
        ("a-terminal-is-one-for-the-command", terminal),
        ("a-terminal-keeps-other-streams-apart", apart),
        ("a-terminal-is-given-back", given_back),
    ]
}

/// A program on a pseudo-terminal.
struct OnTerminal {
    running: RunningCommand,
    terminal: Terminal,
}

impl OnTerminal {
    fn start(run: &CommandRun, adjust: impl FnOnce(&mut Command)) -> Result<OnTerminal> {
        let terminal = Terminal::open(40, 100)?;
        let mut attached = Ok(());
        let running = run.start_with(|command| {
            attached = terminal.attach(command);
            adjust(command);
        })?;
        attached?;
        Ok(OnTerminal { running, terminal })
    }

    fn wait_for(&mut self, text: &str) -> Result<String> {
        self.terminal.wait_for(text)
    }

    fn type_in(&mut self, text: &str) -> std::io::Result<()> {
        self.terminal.type_in(text)
    }

    fn modes(&self) -> Result<String> {
        self.terminal.modes()
    }

    fn wait(&mut self) -> Result<CommandEnded> {
        Ok(self.running.wait()?)
    }
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
    terminal.terminal.resize(50, 132)?;
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
    type End = fn(&mut OnTerminal) -> Result<()>;
    let ends: [(&str, i32, &str, End); 4] = [
        ("by itself", 0, "exited", |terminal| Ok(terminal.type_in("end\r")?)),
        ("Ctrl-A x", 130, "stopped", |terminal| Ok(terminal.type_in("\x01x")?)),
        ("SIGTERM", 143, "stopped", |terminal| Ok(terminal.running.signal(Signal::TERM)?)),
        ("SIGHUP", 129, "stopped", |terminal| Ok(terminal.running.signal(Signal::HUP)?)),
    ];
    for (what, status, reason, end) in ends {
        let mut terminal = OnTerminal::start(&CommandRun::shell(kernel, "echo ready; read line"), |_| {})?;
        let before = terminal.modes()?;
        terminal.wait_for("ready\r\n")?;
        let raw = terminal.modes()?;
        ensure!(raw != before, "the terminal is not in raw mode while the command runs");
        end(&mut terminal)?;
        let ended = terminal.wait()?;
        ensure_end(&ended, status, reason).map_err(|error| format!("{what}: {error}"))?;
        ensure_eq!(terminal.modes()?, before, "the terminal after {what}");
    }
    Ok(())
}
