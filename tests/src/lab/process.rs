//! A job's processes: started with the caller's identity, and ended with all that descends from them.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::process::{Gid, Pid, Signal, Uid, WaitOptions, WaitStatus, kill_process, wait};
use rustix::pty::{OpenptFlags, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use rustix::thread::{set_thread_gid, set_thread_groups, set_thread_uid};

use super::protocol::Job;

/// The ends of a job's standard streams that the agent holds.
pub struct Streams {
    /// Where standard input is written; for a terminal, its other side.
    pub stdin: Option<OwnedFd>,
    /// Where standard output comes from.
    pub stdout: Option<OwnedFd>,
    /// Where standard error comes from; a terminal has none of its own.
    pub stderr: Option<OwnedFd>,
    /// The terminal, to resize it.
    pub terminal: Option<OwnedFd>,
}

/// A job could not be started: the status a shell would give, and why.
pub struct NotStarted {
    /// 127 not found, 126 not executable, 125 anything else.
    pub status: i32,
    /// The reason, for people.
    pub reason: String,
}

/// Starts the job as the leader of a session of its own, so that it can be signalled as a whole.
pub fn start(job: &Job, lab_env: &[(String, String)]) -> Result<(Pid, Streams), NotStarted> {
    let refused = |status, reason| NotStarted { status, reason };
    let broken = |error: io::Error| refused(125, format!("could not set up the job: {error}"));
    let Some((program, arguments)) = job.argv.split_first() else {
        return Err(refused(125, "there is no command to run".to_owned()));
    };
    // Looked at first, because the system says the same of a missing directory and of a missing program.
    if !job.cwd.is_dir() {
        return Err(refused(125, format!("the lab has no directory {}", job.cwd.display())));
    }
    let mut command = Command::new(program);
    command
        .args(arguments)
        .current_dir(&job.cwd)
        .env_clear()
        .envs(job.env.iter().map(|(name, value)| (name, value)));
    command.envs(lab_env.iter().map(|(name, value)| (name, value)));

    let terminal = match job.terminal {
        Some((rows, columns)) => Some(attach_terminal(&mut command, rows, columns).map_err(broken)?),
        None => {
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            None
        }
    };
    become_caller(&mut command, job);
    let mut child = command.spawn().map_err(|error| {
        let status = if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 };
        refused(status, format!("{}: {error}", program.display()))
    })?;
    drop(command);
    let pid = Pid::from_child(&child);
    let streams = match terminal {
        Some(terminal) => Streams {
            stdin: Some(terminal.try_clone().map_err(broken)?),
            stdout: Some(terminal.try_clone().map_err(broken)?),
            stderr: None,
            terminal: Some(terminal),
        },
        None => Streams {
            stdin: child.stdin.take().map(OwnedFd::from),
            stdout: child.stdout.take().map(OwnedFd::from),
            stderr: child.stderr.take().map(OwnedFd::from),
            terminal: None,
        },
    };
    Ok((pid, streams))
}

/// Makes a new terminal the command's standard streams and gives its other side.
fn attach_terminal(command: &mut Command, rows: u16, columns: u16) -> io::Result<OwnedFd> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    unlockpt(&master)?;
    resize(&master, rows, columns)?;
    let slave = File::from(rustix::fs::open(
        ptsname(&master, Vec::new())?,
        OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC,
        Mode::empty(),
    )?);
    command.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave);
    Ok(master)
}

/// Tells a terminal its size.
pub fn resize(terminal: impl AsFd, rows: u16, columns: u16) -> io::Result<()> {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(tcsetwinsize(terminal, size)?)
}

/// Gives the command a session, the caller's user and groups, and the caller's file creation mask.
fn become_caller(command: &mut Command, job: &Job) {
    let (uid, gid) = (Uid::from_raw(job.uid), Gid::from_raw(job.gid));
    let groups: Vec<Gid> = job.groups.iter().copied().map(Gid::from_raw).collect();
    let umask = Mode::from_raw_mode(job.umask);
    let with_terminal = job.terminal.is_some();
    let change_user = rustix::process::geteuid().is_root();
    let enter = move || {
        rustix::process::setsid()?;
        if with_terminal {
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        }
        rustix::process::umask(umask);
        if change_user {
            set_thread_groups(&groups)?;
            set_thread_gid(gid)?;
            set_thread_uid(uid)?;
        }
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec. It only makes system calls, and the agent, which forks, has one
    // thread, so no lock can be held by another.
    unsafe { command.pre_exec(enter) };
}

/// Collects the children of this process that ended; gives the status of `main` if it was among them.
pub fn reap(main: Pid) -> Option<i32> {
    let mut status = None;
    while let Ok(Some((pid, ended))) = wait(WaitOptions::NOHANG) {
        if pid == main {
            status = Some(exit_status(ended));
        }
    }
    status
}

/// The status a shell gives: the program's own, or 128 and the signal that ended it.
fn exit_status(ended: WaitStatus) -> i32 {
    ended.exit_status().or_else(|| ended.terminating_signal().map(|signal| 128 + signal)).unwrap_or(125)
}

/// Ends every descendant of this process. It must be their subreaper: whoever loses its parent becomes a child of this
/// process and is ended in the next round. False if some are still there at the deadline.
pub fn end_descendants(main: Pid, status: &mut Option<i32>, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        let children = children();
        for child in &children {
            // An error means that it ended in between, which is what was wanted.
            let _ = kill_process(*child, Signal::KILL);
        }
        if let Some(ended) = reap(main) {
            *status = Some(ended);
        }
        if children.is_empty() {
            return true;
        }
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The children of this process, which has one thread.
fn children() -> Vec<Pid> {
    let own = std::process::id();
    std::fs::read_to_string(format!("/proc/{own}/task/{own}/children"))
        .unwrap_or_default()
        .split_whitespace()
        .filter_map(|pid| Pid::from_raw(pid.parse().ok()?))
        .collect()
}
