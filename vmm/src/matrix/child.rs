//! One attempt of a case: a `daxvm run` process, its output, its report, and its end, which always comes.

use std::fs::{self, File, OpenOptions};
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, getppid, kill_process_group, pidfd_open, set_parent_process_death_signal,
};
use serde_json::Value;

use super::verdict::{Ending, Verdict, judge};
use super::{Case, shell_line};

/// Bytes of output that are kept in memory, for reports and for the end of the run.
const TAIL: usize = 64 << 10;
/// Bytes of output that an attempt may add to its log.
const LOG_LIMIT: u64 = 64 << 20;
/// How long a child may take to end after SIGTERM.
const GRACE: Duration = Duration::from_secs(10);

/// Tells all children to end. Each stage is a pipe whose closing all of them see.
pub(super) struct Interruption {
    terminate: Option<PipeWriter>,
    kill: Option<PipeWriter>,
}

/// Where a child's thread sees it.
pub(super) struct Interrupted {
    terminate: PipeReader,
    kill: PipeReader,
}

impl Interruption {
    pub(super) fn new() -> io::Result<(Interruption, Arc<Interrupted>)> {
        let ((terminated, terminate), (killed, kill)) = (io::pipe()?, io::pipe()?);
        let interruption = Interruption { terminate: Some(terminate), kill: Some(kill) };
        Ok((interruption, Arc::new(Interrupted { terminate: terminated, kill: killed })))
    }

    pub(super) fn has_begun(&self) -> bool {
        self.terminate.is_none()
    }

    /// The first time children get SIGTERM and time to end, the second time they are killed.
    pub(super) fn next(&mut self) {
        match self.terminate.take() {
            Some(terminate) => drop(terminate),
            None => self.kill = None,
        }
    }
}

/// What is to be run.
pub(super) struct Task {
    pub(super) case: Case,
    /// From 1.
    pub(super) attempt: u32,
    /// What stands for `daxvm`.
    pub(super) program: PathBuf,
    /// The working directory.
    pub(super) directory: PathBuf,
    /// An empty directory for this attempt.
    pub(super) scratch: PathBuf,
    pub(super) log: PathBuf,
    /// How long after its time limit it may still be there.
    pub(super) overdue: Duration,
}

/// One attempt that has ended.
#[derive(Debug, Clone)]
pub struct Attempt {
    /// What came of it.
    pub verdict: Verdict,
    /// When it began.
    pub started: SystemTime,
    /// How long it took.
    pub duration: Duration,
    /// What `daxvm run` reported.
    pub report: Option<Value>,
    /// The end of standard output and standard error, as they came.
    pub output: Vec<u8>,
}

/// Runs it to its end.
pub(super) fn run(task: &Task, interrupted: &Interrupted) -> Attempt {
    let (started, clock) = (SystemTime::now(), Instant::now());
    let report = task.scratch.join("report.json");
    let console = task.scratch.join("console");
    let arguments = task.case.arguments_with(&[("--console", &console), ("--report", &report)]);
    let mut output = Output::default();
    let ending = Log::begin(task)
        .map_err(|error| format!("Cannot write the log {}: {error}", task.log.display()))
        .and_then(|log| {
            output.log = Some(log);
            let mut command = Command::new(&task.program);
            command.arg0("daxvm").args(&arguments).current_dir(&task.directory);
            let cannot = |error| format!("Cannot run {}: {error}", task.program.display());
            let (child, pipe) = spawn(command).map_err(cannot)?;
            let watched = watch(child, pipe, task, interrupted, &mut output);
            watched.map_err(|error| format!("Cannot watch daxvm run: {error}"))
        })
        .unwrap_or_else(Ending::NotRun);
    output.tail.drain(..output.tail.len().saturating_sub(TAIL));
    let report = fs::read(report).ok().and_then(|text| serde_json::from_slice(&text).ok());
    let verdict = judge(&task.case, &ending, report.as_ref(), &output.tail);
    let duration = clock.elapsed();
    if let Some(log) = &mut output.log {
        log.end(&verdict, duration, &console);
    }
    Attempt { verdict, started, duration, report, output: output.tail }
}

/// Starts a child in a process group of its own, so that a Ctrl-C on the terminal is the caller's to deal with.
fn spawn(mut command: Command) -> io::Result<(Child, PipeReader)> {
    let (reader, writer) = io::pipe()?;
    let parent = rustix::process::getpid();
    command.process_group(0).stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    let die_with_parent = move || {
        // Not even a SIGKILL of this process leaves guests behind: the kernel then ends them.
        set_parent_process_death_signal(Some(Signal::TERM))?;
        match getppid() == Some(parent) {
            true => Ok(()),
            // It has died since the fork.
            false => Err(io::Error::from_raw_os_error(libc::ESRCH)),
        }
    };
    // SAFETY: the closure makes two system calls and allocates nothing, so it may run between fork and exec.
    unsafe { command.pre_exec(die_with_parent) };
    let child = command.spawn()?;
    // It has the pipe's writing ends, without which the pipe's end can be seen.
    drop(command);
    Ok((child, reader))
}

/// A child's process group, which is killed when this goes, before the leader is reaped and its number can be reused.
struct Group {
    child: Child,
    group: Pid,
}

impl Group {
    fn signal(&self, signal: Signal) {
        // It may be gone already.
        let _ = kill_process_group(self.group, signal);
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
        let _ = self.child.wait();
    }
}

/// Takes the child's output until it has ended, and makes it end when it has to.
fn watch(
    child: Child,
    pipe: PipeReader,
    task: &Task,
    interrupted: &Interrupted,
    output: &mut Output,
) -> io::Result<Ending> {
    let group = Pid::from_child(&child);
    let mut group = Group { child, group };
    let process = pidfd_open(group.group, PidfdFlags::empty())?;
    rustix::io::ioctl_fionbio(&pipe, true)?;
    let mut pipe = Some(pipe);
    let begin = Instant::now();
    let late = begin + task.case.timeout + task.overdue;
    // Why it has to end, once it has been told, and when it is killed for not doing so.
    let mut ending: Option<(Ending, Instant)> = None;
    let mut killed = false;
    loop {
        // The stage of the interruption that is still to come; one that has come would be seen again and again.
        let stage = match &ending {
            None => Some(&interrupted.terminate),
            Some(_) if killed => None,
            Some(_) => Some(&interrupted.kill),
        };
        let deadline = ending.as_ref().map_or(late, |(_, kill)| *kill);
        let ready = wait(&process, pipe.as_ref(), stage, deadline)?;
        if ready.output && !output.take(&mut pipe)? {
            pipe = None;
        }
        if ready.ended {
            // What is left in the pipe; whoever else still has its writing end is killed with the group.
            group.signal(Signal::KILL);
            while pipe.is_some() && output.take(&mut pipe)? && output.took_some {}
            let status = group.child.wait()?;
            return Ok(ending.map_or(Ending::Exited(status), |(ending, _)| ending));
        }
        let now = Instant::now();
        if ready.interrupted || now >= deadline {
            ending = Some(match ending {
                None => {
                    group.signal(Signal::TERM);
                    let why =
                        if ready.interrupted { Ending::Interrupted } else { Ending::Overdue(task.overdue) };
                    (why, now + GRACE)
                }
                Some((why, _)) => {
                    group.signal(Signal::KILL);
                    killed = true;
                    (why, now + GRACE)
                }
            });
        }
    }
}

/// What there is to do.
struct Ready {
    ended: bool,
    output: bool,
    interrupted: bool,
}

fn wait<'a>(
    process: &'a OwnedFd,
    pipe: Option<&'a PipeReader>,
    stage: Option<&'a PipeReader>,
    deadline: Instant,
) -> io::Result<Ready> {
    let mut fds = vec![PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN)];
    let mut add = |pipe: Option<&'a PipeReader>| {
        let pipe = pipe?;
        fds.push(PollFd::from_borrowed_fd(pipe.as_fd(), PollFlags::IN));
        Some(fds.len() - 1)
    };
    let (output, interrupted) = (add(pipe), add(stage));
    // Rounded up, so as not to wake just before.
    let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
    let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
    match poll(&mut fds, Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let ready = |at: Option<usize>| at.is_some_and(|at| !fds[at].revents().is_empty());
    Ok(Ready { ended: ready(Some(0)), output: ready(output), interrupted: ready(interrupted) })
}

/// What a child writes.
#[derive(Default)]
struct Output {
    log: Option<Log>,
    tail: Vec<u8>,
    /// Whether the last call took anything.
    took_some: bool,
}

impl Output {
    /// Takes what is in the pipe now, or a part of it; returns whether more may come.
    fn take(&mut self, pipe: &mut Option<PipeReader>) -> io::Result<bool> {
        let mut buffer = [0; 64 << 10];
        self.took_some = false;
        let Some(pipe) = pipe else { return Ok(false) };
        let count = match pipe.read(&mut buffer) {
            Ok(0) => return Ok(false),
            Ok(count) => count,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return Ok(true);
            }
            Err(error) => return Err(error),
        };
        self.took_some = true;
        let data = &buffer[..count];
        self.tail.extend_from_slice(data);
        // In steps of its size, so that not every read moves all of it.
        if self.tail.len() >= 2 * TAIL {
            self.tail.drain(..self.tail.len() - TAIL);
        }
        match &mut self.log {
            Some(log) => log.output(data).map(|()| true),
            None => Ok(true),
        }
    }
}

/// The log of a case, to which each attempt adds.
struct Log {
    file: File,
    written: u64,
    /// Whether it says that there is more.
    cut: bool,
    ends_line: bool,
}

impl Log {
    fn begin(task: &Task) -> io::Result<Log> {
        if let Some(directory) = task.log.parent() {
            fs::create_dir_all(directory)?;
        }
        let first = task.attempt == 1;
        let mut file =
            OpenOptions::new().create(true).write(true).truncate(first).append(!first).open(&task.log)?;
        let (attempt, name) = (task.attempt, &task.case.name);
        writeln!(file, "# {name}, attempt {attempt}\n# daxvm {}", shell_line(&task.case.arguments()))?;
        Ok(Log { file, written: 0, cut: false, ends_line: true })
    }

    fn output(&mut self, data: &[u8]) -> io::Result<()> {
        let room = LOG_LIMIT.saturating_sub(self.written);
        let fits = usize::try_from(room).map_or(data.len(), |room| room.min(data.len()));
        if fits > 0 {
            self.file.write_all(&data[..fits])?;
            self.written += fits as u64;
            self.ends_line = data[..fits].ends_with(b"\n");
        }
        if fits < data.len() && !self.cut {
            self.cut = true;
            writeln!(self.file, "\n# Output beyond {} MiB is left out.", LOG_LIMIT >> 20)?;
            self.ends_line = true;
        }
        Ok(())
    }

    /// Adds what came of it, and the kernel's console.
    fn end(&mut self, verdict: &Verdict, duration: Duration, console: &Path) {
        let what = match verdict {
            Verdict::Passed => "passed".to_owned(),
            Verdict::Failed(why) => format!("failed: {why}"),
            Verdict::Error(why) => format!("error: {why}"),
            Verdict::Interrupted => "interrupted".to_owned(),
        };
        let newline = if self.ends_line { "" } else { "\n" };
        // The verdict stands without its log too, so a disk that is full now is no reason to change it.
        let _ = writeln!(self.file, "{newline}# After {:.1} s: {what}", duration.as_secs_f64());
        if let Ok(mut console) = File::open(console) {
            let _ = writeln!(self.file, "# The kernel's console:");
            let _ = io::copy(&mut (&mut console).take(LOG_LIMIT), &mut self.file);
            let _ = writeln!(self.file);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_that_is_full_says_so_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        // Full to the byte, which no chunk goes beyond.
        let mut log =
            Log { file: File::create(&path).unwrap(), written: LOG_LIMIT - 2, cut: false, ends_line: true };
        for data in [b"ab", b"cd", b"ef"] {
            log.output(data).unwrap();
        }
        assert_eq!(fs::read_to_string(path).unwrap(), "ab\n# Output beyond 64 MiB is left out.\n");
    }

    #[test]
    fn a_child_does_not_outlive_the_thread_that_watches_it() {
        let mut command = Command::new("sleep");
        command.arg("1000");
        // The thread ends at once, as it does when the whole process is killed.
        let (mut child, _pipe) = std::thread::spawn(|| spawn(command).unwrap()).join().unwrap();
        let status = child.wait().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGTERM));
    }
}
