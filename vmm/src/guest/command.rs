//! Starts the command with its standard streams.

use std::ffi::{CString, OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process;

use rustix::fs::OFlags;
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use rustix::process::Pid;
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{InputModes, OptionalActions, Winsize, tcgetattr, tcsetattr, tcsetwinsize};

use super::Failure;
use super::protocol::{Command, FromGuest, Stdio, WindowSize};
use super::pump::PIPE_SIZE;

/// Exit statuses of what was not run (POSIX, Shell & Utilities 2.8.2).
const NOT_FOUND: u8 = 127;
const NOT_EXECUTABLE: u8 = 126;

/// A command that was started.
pub struct Running {
    /// Its process, which leads a session and a process group of its own.
    pub pid: Pid,
    /// The write end of its standard input.
    pub input: Option<OwnedFd>,
    /// The read ends of its standard output and error.
    pub outputs: [Option<OwnedFd>; 2],
    /// Its terminal.
    pub terminal: Option<Terminal>,
}

/// A pseudo-terminal.
pub struct Terminal {
    /// Our side; it does not block.
    pub master: OwnedFd,
    /// The command's side. It is kept open so that the terminal is not hung up while nobody else has it open.
    slave: OwnedFd,
}

impl Terminal {
    fn open(size: Option<WindowSize>) -> io::Result<Terminal> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags)?;
        unlockpt(&master)?;
        let slave = ioctl_tiocgptpeer(&master, flags)?;
        let mut modes = tcgetattr(&slave)?;
        // Erasing a character erases all its bytes.
        modes.input_modes |= InputModes::IUTF8;
        tcsetattr(&slave, OptionalActions::Now, &modes)?;
        let terminal = Terminal { master, slave };
        if let Some(size) = size {
            terminal.resize(size)?;
        }
        never_blocks(&terminal.master)?;
        Ok(terminal)
    }

    /// Gives the terminal a size; its foreground process group gets SIGWINCH when it is a new one.
    pub fn resize(&self, size: WindowSize) -> io::Result<()> {
        let size = Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
        Ok(tcsetwinsize(&self.master, size)?)
    }
}

/// What became of an attempt to start a command.
pub enum Start {
    /// It runs.
    Running(Running),
    /// It could not be run; the message says why.
    NotRun(FromGuest),
}

/// Starts `command`.
///
/// # Errors
/// When its streams cannot be made.
pub fn start(command: &Command) -> Result<Start, Failure> {
    let failure = |error: io::Error| Failure::new("make the command's standard streams", error);
    let [name, arguments @ ..] = &command.argv[..] else {
        return Err(Failure::new("run the command", "no program is named"));
    };
    let mut program = process::Command::new(name);
    program.args(arguments).env_clear().envs(command.env.iter().map(|(name, value)| (name, value)));
    let terminal = command.stdio.contains(&Stdio::Terminal).then(|| Terminal::open(command.window));
    let terminal = terminal.transpose().map_err(failure)?;
    let mut ends = [const { None }; 3];
    for (stream, (stdio, end)) in command.stdio.into_iter().zip(&mut ends).enumerate() {
        let theirs = match (stdio, &terminal) {
            (Stdio::Null, _) => process::Stdio::null(),
            (Stdio::Terminal, Some(terminal)) => terminal.slave.try_clone().map_err(failure)?.into(),
            _ => {
                let (ours, theirs) = pipe(stream == 0).map_err(failure)?;
                *end = Some(ours);
                theirs.into()
            }
        };
        match stream {
            0 => program.stdin(theirs),
            1 => program.stdout(theirs),
            _ => program.stderr(theirs),
        };
    }
    in_its_own_session(&mut program, &command.directory, terminal.as_ref());
    let started = program.spawn();
    // It has the command's ends of the pipes, which would never end.
    drop(program);
    let [input, output, error] = ends;
    Ok(match started {
        Ok(child) => {
            let pid = Pid::from_child(&child);
            Start::Running(Running { pid, input, outputs: [output, error], terminal })
        }
        Err(error) => Start::NotRun(not_run(command, name, &error)),
    })
}

fn in_its_own_session(program: &mut process::Command, directory: &Path, terminal: Option<&Terminal>) {
    let directory = CString::new(directory.as_os_str().as_bytes()).unwrap_or_default();
    let terminal = terminal.map(|terminal| terminal.slave.as_raw_fd());
    let prepare = move || {
        default_signals();
        rustix::process::setsid()?;
        if let Some(terminal) = terminal {
            // SAFETY: the caller of `spawn` keeps the terminal, so the descriptor is open in the forked process too.
            rustix::process::ioctl_tiocsctty(unsafe { BorrowedFd::borrow_raw(terminal) })?;
        }
        if rustix::process::chdir(&*directory).is_err() {
            rustix::process::chdir(c"/")?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec it only makes system calls, with memory that was allocated before.
    unsafe { program.pre_exec(prepare) };
}

/// Signals do what they do by default, whoever started this process: a shell that finds SIGINT ignored cannot trap it.
fn default_signals() {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: no handler is installed. Of SIGKILL, SIGSTOP and the C library's own it is refused, as it should be.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// A pipe as (ours, theirs); `theirs_reads` tells which end is whose. Ours does not block.
fn pipe(theirs_reads: bool) -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
    // Smaller ones are slower, no more.
    let _ = fcntl_setpipe_size(&write, PIPE_SIZE);
    let (ours, theirs) = if theirs_reads { (write, read) } else { (read, write) };
    never_blocks(&ours)?;
    Ok((ours, theirs))
}

fn never_blocks(fd: impl AsFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    Ok(rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?)
}

fn not_run(command: &Command, name: &OsStr, error: &io::Error) -> FromGuest {
    let name_text = name.to_string_lossy();
    let (status, error) = match error.kind() {
        io::ErrorKind::NotFound => match find(command, name) {
            Some(path) => {
                (NOT_EXECUTABLE, format!("{}: the interpreter that it names is not there", path.display()))
            }
            None if name.as_bytes().contains(&b'/') => {
                (NOT_FOUND, format!("{name_text}: not found in the guest"))
            }
            None => (
                NOT_FOUND,
                format!("{name_text}: not found in the guest along PATH={}", path(command).display()),
            ),
        },
        io::ErrorKind::PermissionDenied => (NOT_EXECUTABLE, format!("{name_text}: not executable: {error}")),
        _ => (NOT_EXECUTABLE, format!("{name_text}: {error}")),
    };
    FromGuest::NotRun { status, error }
}

/// The file that `name` stands for.
fn find(command: &Command, name: &OsStr) -> Option<PathBuf> {
    let is_file = |path: &PathBuf| fs::metadata(path).is_ok_and(|metadata| metadata.is_file());
    if name.as_bytes().contains(&b'/') {
        return Some(command.directory.join(name)).filter(is_file);
    }
    std::env::split_paths(path(command)).map(|dir| command.directory.join(dir).join(name)).find(is_file)
}

/// The command's PATH; execvp has a default for the case that there is none.
fn path(command: &Command) -> &OsStr {
    let path = command.env.iter().rev().find(|(name, _)| name == "PATH");
    path.map_or(OsStr::new("/bin:/usr/bin"), |(_, value): &(OsString, OsString)| value)
}
