//! The lab: a real KVM host on any machine.
//!
//! Where the CPU has hardware KVM the lab is this machine; elsewhere it is a Linux under QEMU whose emulated CPU has SVM
//! and nested paging. Either way a job, a command with its input, runs there with this machine's files, with `/dev/kvm`,
//! and with a scratch directory on each of ext4, xfs and tmpfs, named by `LAB_EXT4`, `LAB_XFS` and `LAB_TMPFS`.
//!
//! ```no_run
//! use std::time::Duration;
//! use tests::lab::{Command, Lab};
//!
//! let lab = Lab::up()?;
//! let output = lab.exec(&Command::new("stat").args(["-f", "-c", "%T", "/run/lab/xfs"]).timeout(Duration::from_secs(5)))?;
//! assert_eq!(output.stdout, b"xfs\n");
//! # Ok::<(), tests::lab::LabError>(())
//! ```
//!
//! One daemon a source tree keeps the lab running between jobs, behind a socket in `target/lab`.

pub mod agent;
pub mod cli;
mod daemon;
mod direct;
pub mod init;
#[cfg(test)]
mod lab_tests;
mod paths;
mod process;
mod protocol;
mod qemu;
mod session;
mod tools;

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use paths::Paths;
use protocol::{Frame, Host, Job, Kind};
use session::Session;

pub(crate) use direct::private_mounts;

/// Why the lab could not do something.
#[derive(Debug, Error)]
pub enum LabError {
    /// The program is run from outside its source tree.
    #[error("{0} lies in no source tree with scripts/lab: run it from where cargo built it")]
    NoTree(PathBuf),
    /// One of the lab's programs is missing.
    #[error("{0} is not built: run scripts/lab up")]
    NotBuilt(PathBuf),
    /// LAB_MODE is something else.
    #[error("LAB_MODE={0} is unknown: use direct or qemu, or leave it away")]
    UnknownMode(String),
    /// The system refused something.
    #[error("Could not {what}")]
    System {
        /// What was being done.
        what: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A program that is used failed.
    #[error("{name} failed: {said}")]
    Tool {
        /// The program.
        name: String,
        /// What it printed.
        said: String,
    },
    /// A kernel's modules are not what they should be.
    #[error(
        "The host's kernel modules cannot be used; remove target/kernels/6.12-generic to fetch them again"
    )]
    Modules(#[from] vmm::initramfs::ModuleError),
    /// The initramfs could not be made.
    #[error("The host's initramfs cannot be made")]
    Initramfs(#[from] vmm::initramfs::ArchiveError),
    /// The host did not come up.
    #[error("The lab did not come up.\n{0}")]
    NotUp(String),
    /// The host's agents did not answer in time.
    #[error("The host did not answer within {} s: is the machine overloaded?", .0.as_secs())]
    BootTimedOut(Duration),
    /// The host is not there any more.
    #[error("The lab's host ended; the next use starts another")]
    HostEnded,
    /// The lab that runs belongs to an older or newer build.
    #[error("The lab that is up was started by another build: run scripts/lab down")]
    OtherBuild,
    /// The connection to the lab broke.
    #[error("The connection to the lab broke")]
    Connection(#[source] io::Error),
    /// A job ran longer than it may.
    #[error("The job did not end in time and was killed")]
    TimedOut,
    /// What a job printed could not be passed on.
    #[error("Could not write the job's output")]
    Output(#[source] io::Error),
}

impl LabError {
    fn system(what: &'static str, source: io::Error) -> Self {
        Self::System { what, source }
    }
}

/// What the lab's host is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mode {
    /// This machine, with its hardware KVM.
    Direct,
    /// A Linux under QEMU's emulation.
    Qemu,
}

impl Mode {
    /// What `LAB_MODE` says, else what this machine can do.
    pub fn choose() -> Result<Self, LabError> {
        match std::env::var("LAB_MODE").ok().as_deref() {
            Some("direct") => Ok(Self::Direct),
            Some("qemu") => Ok(Self::Qemu),
            None | Some("") => Ok(if direct::hardware_kvm() { Self::Direct } else { Self::Qemu }),
            Some(other) => Err(LabError::UnknownMode(other.to_owned())),
        }
    }
}

/// A lab that is up.
#[derive(Debug)]
pub struct Lab {
    paths: Paths,
    mode: Mode,
    host: Host,
}

impl Lab {
    /// The lab of this source tree, brought up if it is down. It stays up; `scripts/lab down` ends it.
    pub fn up() -> Result<Self, LabError> {
        let paths = Paths::find()?;
        paths.create_state().map_err(|error| LabError::system("make target/lab", error))?;
        // Held until the lab is up, so that of two callers one starts it and the other finds it.
        let lock =
            File::create(paths.state("lock")).map_err(|error| LabError::system("make a lock", error))?;
        flock(&lock, FlockOperation::LockExclusive)
            .map_err(|error| LabError::system("wait for another start of the lab", error.into()))?;
        if let Some(lab) = Self::running()? {
            return Ok(lab);
        }
        start_daemon(&paths)?;
        Self::running()?.ok_or(LabError::HostEnded)
    }

    /// The lab of this source tree, if it is up.
    pub fn running() -> Result<Option<Self>, LabError> {
        let paths = Paths::find()?;
        let Ok(connection) = paths.connect() else { return Ok(None) };
        let ask = || -> io::Result<(Mode, Host)> {
            Frame::new(Kind::Status, []).write(&connection)?;
            Frame::read(&connection)?.parse()
        };
        match ask() {
            Ok((_, host)) if host.version != protocol::VERSION => Err(LabError::OtherBuild),
            Ok((mode, host)) => Ok(Some(Self { paths, mode, host })),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(LabError::OtherBuild),
            // It ended while it was asked.
            Err(_) => Ok(None),
        }
    }

    /// Ends the lab of this source tree; false if it was not up.
    pub fn down() -> Result<bool, LabError> {
        let paths = Paths::find()?;
        let Ok(mut connection) = paths.connect() else { return Ok(false) };
        Frame::new(Kind::Stop, []).write(&connection).map_err(LabError::Connection)?;
        // The daemon keeps the connection until all is gone.
        let _ = connection.read(&mut [0]);
        Ok(true)
    }

    /// What the host is.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The host's kernel, as `uname -r` says there.
    pub fn kernel(&self) -> &str {
        &self.host.kernel
    }

    /// The scratch directory of a name, `LAB_EXT4`, `LAB_XFS` or `LAB_TMPFS`, if the host has it.
    pub fn scratch(&self, name: &str) -> Option<&Path> {
        self.host.env.iter().find(|(known, _)| known == name).map(|(_, dir)| Path::new(dir))
    }

    /// Where the console of the host is kept.
    pub fn console(&self) -> PathBuf {
        self.paths.console()
    }

    /// Runs a command to its end, or to the end of its time.
    pub fn exec(&self, command: &Command) -> Result<Output, LabError> {
        let deadline = Instant::now() + command.timeout;
        let session = self.start(&command.job()?)?;
        session.feed(io::Cursor::new(command.stdin.clone()));
        let mut output = Output { status: 0, stdout: Vec::new(), stderr: Vec::new() };
        output.status = session.wait(&mut output.stdout, &mut output.stderr, Some(deadline))?;
        Ok(output)
    }

    fn start(&self, job: &Job) -> Result<Session, LabError> {
        Session::start(self.paths.connect().map_err(LabError::Connection)?, job)
    }
}

/// Starts the daemon and waits until it is ready.
fn start_daemon(paths: &Paths) -> Result<(), LabError> {
    let mode = Mode::choose()?;
    if mode == Mode::Qemu {
        // Here and not in the daemon, so that the caller sees what is being fetched.
        tools::Tools::find(paths, &qemu::TOOLS)?;
        tools::script(paths, "scripts/fetch-kernel", &[qemu::KERNEL])?;
    }
    let failed = |error| LabError::system("start the lab's daemon", error);
    let log = paths.state("daemon.log");
    let _ = fs::remove_file(paths.console());
    let mut command = std::process::Command::new(paths.program("lab")?);
    command
        .arg("daemon")
        .arg(format!("{mode:?}").to_lowercase())
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(File::create(&log).map_err(failed)?);
    // SAFETY: the closure runs between fork and exec and makes nothing but system calls.
    unsafe { command.pre_exec(detach) };
    let mut daemon = command.spawn().map_err(failed)?;
    let mut said = String::new();
    if let Some(mut stdout) = daemon.stdout.take() {
        stdout.read_to_string(&mut said).map_err(failed)?;
    }
    let complaints = fs::read_to_string(log).unwrap_or_default();
    if said.trim() == daemon::READY {
        eprint!("{complaints}");
        return Ok(());
    }
    let _ = daemon.wait();
    let console = fs::read(paths.console()).unwrap_or_default();
    let qemu = fs::read_to_string(paths.state("qemu.log")).unwrap_or_default();
    Err(LabError::NotUp(format!(
        "{complaints}{qemu}The last of its console, {}:\n{}",
        paths.console().display(),
        tail(&String::from_utf8_lossy(&console), 20)
    )))
}

/// Keeps what the caller's terminal sends away from the daemon, and the caller's open pipes, whose other ends may wait for
/// them to be closed.
fn detach() -> io::Result<()> {
    rustix::process::setsid()?;
    // SAFETY: the descriptors are only marked to be closed by exec.
    let marked = unsafe { libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC.cast_signed()) };
    if marked < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// A command for the lab, with the caller's environment, working directory and identity unless said otherwise.
#[derive(Debug, Clone)]
pub struct Command {
    argv: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    cwd: Option<PathBuf>,
    stdin: Vec<u8>,
    timeout: Duration,
}

impl Command {
    /// How long a command may run if nothing else is said.
    pub const TIMEOUT: Duration = Duration::from_secs(120);

    /// A command without arguments, without input.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self {
            argv: vec![program.as_ref().to_owned()],
            env: Vec::new(),
            cwd: None,
            stdin: Vec::new(),
            timeout: Self::TIMEOUT,
        }
    }

    /// A script for `sh -c`, with strict error handling.
    pub fn shell(script: &str) -> Self {
        Self::new("sh").args(["-euc", script])
    }

    /// Adds an argument.
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.argv.push(argument.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    pub fn args(mut self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.argv.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        self
    }

    /// Sets a variable beside the caller's.
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env.push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Sets the working directory.
    pub fn current_dir(mut self, dir: impl AsRef<Path>) -> Self {
        self.cwd = Some(dir.as_ref().to_owned());
        self
    }

    /// Sets what the command reads.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// Sets how long the command may run.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    fn job(&self) -> Result<Job, LabError> {
        let cwd = match &self.cwd {
            Some(cwd) => cwd.clone(),
            None => std::env::current_dir()
                .map_err(|error| LabError::system("find the working directory", error))?,
        };
        let groups = rustix::process::getgroups().unwrap_or_default();
        Ok(Job {
            argv: self.argv.clone(),
            env: std::env::vars_os().chain(self.env.iter().cloned()).collect(),
            cwd,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            groups: groups.into_iter().map(rustix::process::Gid::as_raw).collect(),
            umask: umask(),
            terminal: None,
        })
    }
}

/// The process's file creation mask, which can only be read by setting it; the kernel also shows it.
fn umask() -> u32 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("Umask:"));
    mask.and_then(|mask| u32::from_str_radix(mask.trim(), 8).ok()).unwrap_or(0o022)
}

/// What a command left behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Its exit status, 128 and the signal that ended it, or 125 to 127 if it could not be run.
    pub status: i32,
    /// What it wrote to standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Whether the command said that all went well.
    pub fn success(&self) -> bool {
        self.status == 0
    }

    /// Standard output as text without its last line end.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end_matches('\n').to_owned()
    }
}
