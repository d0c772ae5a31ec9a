//! A virtual machine that runs.

use std::fmt;
use std::fs;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use tempfile::TempDir;

use super::console::{Event, Text, follow};
use super::kernel::scratch;
use super::{HostProcess, Kernel, Report, VmBuilder, VmError};
use crate::guest::{End, Op, write_line};

const SHOWN_LINES: usize = 40;

/// A virtual machine that runs. Dropping it ends it.
pub struct Vm {
    child: Child,
    stdin: ChildStdin,
    text: Text,
    events: Receiver<Event>,
    deadline: Duration,
    lost: bool,
    files: TempDir,
}

/// How a virtual machine ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// The program's exit status; none if a signal ended it.
    pub status: Option<i32>,
    /// Its report.
    pub report: Report,
    /// The guest's console, and the program's standard error.
    pub console: String,
}

impl Vm {
    /// A virtual machine with this kernel.
    pub fn builder(kernel: &Kernel) -> VmBuilder {
        VmBuilder::new(kernel)
    }

    pub(super) fn spawn(
        mut command: Command,
        user: Option<u32>,
        report: Option<&Path>,
        deadline: Duration,
    ) -> Result<Vm, VmError> {
        let files = TempDir::new_in(scratch()).map_err(VmError::system("a temporary directory"))?;
        if let Some(user) = user {
            chown(files.path(), Some(user), Some(user)).map_err(VmError::system("a directory's owner"))?;
            command.uid(user).gid(user);
        }
        command.arg("--report").arg(report.map_or_else(|| files.path().join("report.json"), Path::to_owned));
        Vm::start(command, deadline, files)
    }

    /// A virtual machine of another monitor, with [`Kernel::initrd`], whose console is standard input and output. There
    /// will be no report.
    pub fn of_peer(command: Command, deadline: Duration) -> Result<Vm, VmError> {
        let files = TempDir::new_in(scratch()).map_err(VmError::system("a temporary directory"))?;
        let mut vm = Vm::start(command, deadline, files)?;
        vm.wait_ready()?;
        Ok(vm)
    }

    fn start(mut command: Command, deadline: Duration, files: TempDir) -> Result<Vm, VmError> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let path = command.get_program().to_owned();
        let mut child = command.spawn().map_err(|source| VmError::Missing {
            what: "the program under test",
            path: path.into(),
            source,
        })?;
        let pipes = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(stdin), Some(stdout), Some(stderr)) = pipes else {
            unreachable!("all three were asked for as pipes")
        };
        let (text, events) = follow(stdout, stderr);
        Ok(Vm { child, stdin, text, events, deadline, lost: false, files })
    }

    /// Waits until the agent listens.
    pub fn wait_ready(&mut self) -> Result<(), VmError> {
        match self.next_event(&"boot")? {
            Event::Ready => Ok(()),
            _ => Err(self.gone(&"boot", "a reply before there was a question".into())),
        }
    }

    /// Has the guest do something, and waits for what it answers.
    pub fn call<T: DeserializeOwned>(&mut self, op: &Op) -> Result<T, VmError> {
        self.begin(op)?;
        self.finish(op)
    }

    /// Has the guest do something, and does not wait for it: what it answers is to be awaited by [`Vm::finish`], or never.
    pub fn begin(&mut self, op: &Op) -> Result<(), VmError> {
        if self.lost {
            return Err(VmError::Lost);
        }
        write_line(&mut self.stdin, op).map_err(|error| self.gone(op, format!("the console: {error}")))
    }

    /// Waits for what the guest answers to what was begun.
    pub fn finish<T: DeserializeOwned>(&mut self, op: &Op) -> Result<T, VmError> {
        match self.next_event(op)? {
            Event::Reply(reply) => Ok(serde_json::from_value(reply.map_err(VmError::Guest)?)?),
            _ => Err(self.gone(op, "the agent has started anew".into())),
        }
    }

    /// Ends the program with SIGKILL, as it stands.
    pub fn kill(mut self) -> Result<Ended, VmError> {
        self.end_process();
        self.wait_ended(&"SIGKILL")
    }

    /// Ends the guest from inside and waits until the program has ended.
    pub fn end(mut self, end: End) -> Result<Ended, VmError> {
        self.begin(&Op::End(end))?;
        self.wait_ended(&end)
    }

    /// Powers the guest off.
    pub fn power_off(self) -> Result<Ended, VmError> {
        self.end(End::PowerOff)
    }

    /// Waits for an end that comes by itself.
    pub fn wait(mut self) -> Result<Ended, VmError> {
        self.wait_ended(&"an end by itself")
    }

    /// The process on the host.
    pub fn host(&self) -> HostProcess {
        HostProcess::new(self.child.id())
    }

    /// Whether the virtual machine has been lost: every further call will fail.
    pub fn is_lost(&self) -> bool {
        self.lost
    }

    /// The console so far.
    pub fn console(&self) -> String {
        self.text.all()
    }

    /// Gives each further step so much time, before `DEADLINE_SCALE` had its say.
    pub fn set_deadline(&mut self, deadline: Duration) -> Duration {
        std::mem::replace(&mut self.deadline, deadline)
    }

    fn next_event(&mut self, what: &dyn fmt::Debug) -> Result<Event, VmError> {
        if self.lost {
            return Err(VmError::Lost);
        }
        match self.events.recv_timeout(self.deadline) {
            Ok(Event::Broken(why)) => Err(self.gone(what, why)),
            Ok(event) => Ok(event),
            Err(RecvTimeoutError::Disconnected) => Err(self.gone(what, "the console has ended".into())),
            Err(RecvTimeoutError::Timeout) => Err(self.overdue(what)),
        }
    }

    /// The process ended or talks nonsense: it is made to end, and its last words are the error.
    fn gone(&mut self, what: &dyn fmt::Debug, why: String) -> VmError {
        self.lost = true;
        // A program that has just closed its console is about to leave its exit status, unless it hangs.
        let left = wait_until(&mut self.child, Instant::now() + Duration::from_secs(5));
        let status = match left {
            Ok(Some(status)) => format!("daxvm ended, {status}"),
            _ => "daxvm still runs".to_owned(),
        };
        self.end_process();
        VmError::Gone { what: shorten(what), why: format!("{why}; {status}"), console: self.tail() }
    }

    fn overdue(&mut self, what: &dyn fmt::Debug) -> VmError {
        self.lost = true;
        let console = format!("{}\nIts threads:\n{}", self.tail(), self.host().threads());
        self.end_process();
        VmError::Deadline { what: shorten(what), seconds: self.deadline.as_secs(), console }
    }

    fn tail(&self) -> String {
        self.text.tail(SHOWN_LINES)
    }

    fn wait_ended(&mut self, what: &dyn fmt::Debug) -> Result<Ended, VmError> {
        if self.lost {
            return Err(VmError::Lost);
        }
        let waited = wait_until(&mut self.child, Instant::now() + self.deadline);
        let Some(status) = waited.map_err(VmError::system("waiting for daxvm"))? else {
            return Err(self.overdue(what));
        };
        self.lost = true;
        // The process is gone, so the pipe has an end, and everything that was in it comes before that.
        while let Ok(event) = self.events.recv_timeout(Duration::from_secs(5)) {
            if let Event::Broken(_) = event {
                break;
            }
        }
        let report = fs::read(self.files.path().join("report.json")).ok();
        Ok(Ended {
            status: status.code(),
            report: Report::parse(report.as_deref()).map_err(VmError::system("the report"))?,
            console: self.text.all(),
        })
    }

    fn end_process(&mut self) {
        // It may have ended by itself in between: then there is nothing to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.end_process();
    }
}

fn wait_until(child: &mut Child, end: Instant) -> std::io::Result<Option<ExitStatus>> {
    loop {
        match child.try_wait()? {
            Some(status) => return Ok(Some(status)),
            None if Instant::now() >= end => return Ok(None),
            None => thread::sleep(Duration::from_millis(10)),
        }
    }
}

fn shorten(what: &dyn fmt::Debug) -> String {
    format!("{what:?}").chars().take(200).collect()
}
