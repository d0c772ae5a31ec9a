//! Runs `daxvm run -- CMD`, as a caller does.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::builder::daxvm;
use super::kernel::scratch;
use super::{Kernel, Report, VmError};

/// How long one run may take, before `DEADLINE_SCALE`: emulated hosts are slow.
const DEADLINE: Duration = Duration::from_secs(180);

/// How long a guest may show no sign of life: an emulated host takes its time to unpack a kernel.
const BOOT_TIMEOUT: Duration = Duration::from_secs(90);

/// A guest with a command to be.
#[derive(Clone, Debug)]
pub struct CommandRun {
    options: Vec<OsString>,
    memory: &'static str,
    boot_timeout: Duration,
    deadline: Duration,
    argv: Vec<OsString>,
}

/// How a run ended.
#[derive(Debug)]
pub struct CommandEnded {
    /// The exit status; none if a signal ended the program.
    pub status: Option<i32>,
    /// What was written to standard output.
    pub stdout: Vec<u8>,
    /// What was written to standard error.
    pub stderr: String,
    /// The report.
    pub report: Report,
    /// How long it took.
    pub time: Duration,
}

impl CommandRun {
    /// `argv` in a guest with this kernel, one processor, 512 MiB and the host's root.
    pub fn new(kernel: &Kernel, argv: &[&str]) -> CommandRun {
        CommandRun::with_kernel_at(kernel.dir(), argv)
    }

    /// The same with what is given for `--kernel`.
    pub fn with_kernel_at(kernel: &Path, argv: &[&str]) -> CommandRun {
        let argv = argv.iter().map(OsString::from).collect();
        let (options, boot_timeout, deadline) = (Vec::new(), BOOT_TIMEOUT, DEADLINE);
        let run = CommandRun { options, memory: "512M", boot_timeout, deadline, argv };
        run.option("--kernel").option(kernel).options(["--cpus", "1"])
    }

    /// A shell script.
    pub fn shell(kernel: &Kernel, script: &str) -> CommandRun {
        CommandRun::new(kernel, &["sh", "-c", script])
    }

    /// One more argument of `daxvm run`.
    pub fn option(mut self, option: impl AsRef<OsStr>) -> CommandRun {
        self.options.push(option.as_ref().to_owned());
        self
    }

    /// How long the guest may show no sign of life, instead of a time for emulated hosts.
    pub fn boot_timeout(self, boot_timeout: Duration) -> CommandRun {
        CommandRun { boot_timeout, ..self }
    }

    /// More arguments of `daxvm run`.
    pub fn options<const N: usize>(mut self, options: [&str; N]) -> CommandRun {
        self.options.extend(options.map(OsString::from));
        self
    }

    /// This much memory, as `--memory` takes it.
    pub fn memory(self, memory: &'static str) -> CommandRun {
        CommandRun { memory, ..self }
    }

    /// Gives it this time, before `DEADLINE_SCALE`, in place of three minutes.
    pub fn deadline(self, deadline: Duration) -> CommandRun {
        CommandRun { deadline, ..self }
    }

    /// The program with all its arguments, whose streams are still to be chosen.
    fn command(&self, files: &Path) -> Command {
        let mut command = Command::new(daxvm());
        command
            .env("TMPDIR", scratch())
            .arg("run")
            .args(&self.options)
            .args(["--memory", self.memory])
            .arg("--report")
            .arg(files.join("report.json"));
        command.arg("--boot-timeout").arg(format!("{}ms", self.boot_timeout.as_millis()));
        command.arg("--").args(&self.argv);
        command
    }

    /// Starts it with pipes; `adjust` may choose other streams, an environment, a directory.
    pub fn start_with(&self, adjust: impl FnOnce(&mut Command)) -> Result<RunningCommand, VmError> {
        let files = TempDir::new_in(scratch()).map_err(VmError::system("a temporary directory"))?;
        let mut command = self.command(files.path());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        adjust(&mut command);
        let start = Instant::now();
        let mut child = command.spawn().map_err(VmError::system("starting daxvm"))?;
        let stderr = child.stderr.take().map(|stderr| thread::spawn(move || read_all(stderr)));
        Ok(RunningCommand { child, files, start, deadline: self.deadline, stderr })
    }

    /// Starts it with pipes.
    pub fn start(&self) -> Result<RunningCommand, VmError> {
        self.start_with(|_| {})
    }

    /// Runs it to its end, with `input` as its standard input.
    pub fn run_with(&self, input: &[u8]) -> Result<CommandEnded, VmError> {
        let mut running = self.start()?;
        let stdin = running.child.stdin.take();
        thread::scope(|scope| {
            if let Some(mut stdin) = stdin {
                // Who reads no more than it wants closes the pipe.
                scope.spawn(move || stdin.write_all(input));
            }
            running.wait()
        })
    }

    /// Runs it to its end without input.
    pub fn run(&self) -> Result<CommandEnded, VmError> {
        self.run_with(b"")
    }
}

/// A run that has not ended.
pub struct RunningCommand {
    /// The program.
    pub child: Child,
    files: TempDir,
    start: Instant,
    deadline: Duration,
    stderr: Option<JoinHandle<Vec<u8>>>,
}

impl RunningCommand {
    /// Sends a signal to the program.
    pub fn signal(&self, signal: rustix::process::Signal) -> Result<(), VmError> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).map_err(|error| VmError::system("a signal")(error.into()))
    }

    /// Waits until standard output has a line, which is what scripts say when they are where a test wants them.
    pub fn wait_for_line(&mut self) -> Result<String, VmError> {
        let mut line = Vec::new();
        let mut byte = [0];
        if let Some(stdout) = &mut self.child.stdout {
            while !line.ends_with(b"\n")
                && stdout.read(&mut byte).map_err(VmError::system("reading standard output"))? == 1
            {
                line.push(byte[0]);
            }
        }
        Ok(String::from_utf8_lossy(&line).trim_end().to_owned())
    }

    /// Waits for the end, and has what is left in standard output.
    pub fn wait(&mut self) -> Result<CommandEnded, VmError> {
        let stdout = self.child.stdout.take().map(|stdout| thread::spawn(move || read_all(stdout)));
        let status = self.wait_ended()?;
        let text = |handle: Option<JoinHandle<Vec<u8>>>| {
            handle.and_then(|handle| handle.join().ok()).unwrap_or_default()
        };
        let report = fs::read(self.files.path().join("report.json")).ok();
        Ok(CommandEnded {
            status: status.code(),
            stdout: text(stdout),
            stderr: String::from_utf8_lossy(&text(self.stderr.take())).into_owned(),
            report: Report::parse(report.as_deref()).map_err(VmError::system("the report"))?,
            time: self.start.elapsed(),
        })
    }

    fn wait_ended(&mut self) -> Result<ExitStatus, VmError> {
        let scale = std::env::var("DEADLINE_SCALE").ok().and_then(|text| text.parse().ok()).unwrap_or(1.0);
        let end = self.start + self.deadline.mul_f64(scale);
        loop {
            match self.child.try_wait().map_err(VmError::system("waiting for daxvm"))? {
                Some(status) => return Ok(status),
                None if Instant::now() < end => thread::sleep(Duration::from_millis(10)),
                None => {
                    let seconds = self.start.elapsed().as_secs();
                    let threads = super::HostProcess::new(self.child.id()).threads();
                    let _ = self.child.kill();
                    return Err(VmError::Deadline { what: "the end".into(), seconds, console: threads });
                }
            }
        }
    }
}

impl Drop for RunningCommand {
    fn drop(&mut self) {
        // It may have ended by itself: then there is nothing to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_all(mut stream: impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    // What was read before an error is worth more than the error.
    let _: io::Result<usize> = stream.read_to_end(&mut bytes);
    bytes
}
