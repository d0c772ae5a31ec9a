//! A guest that runs a command: its ports, and what it tells on the way to the end.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use super::observers::Observers;
use super::signals::Signals;
use super::{
    Plan, RunError, confine, console, end_on_panic, explain, last_resort, machine, terminal, watchdog,
};
use crate::console::{make_terminal_raw, restore_terminal};
use crate::guest::image;
use crate::guest::protocol::{
    Command, FromGuest, PORT_CONTROL, PORT_STDERR, PORT_STDOUT, Stdio, Task, ToGuest,
};
use crate::outcome::ExitReason;
use crate::report::{Report, milliseconds};
use crate::vm::{ConsoleInput, Ending, Port, PortsHandle, Vm, Wiring};

/// The longest message that a guest may send, in bytes.
const MAX_MESSAGE: u64 = 64 << 10;
/// Bytes typed at the terminal that wait for a guest which does not read them (fs.pipe-max-size has no less as a rule).
const TYPED: usize = 1 << 20;

/// How long a message may take to reach the guest's buffers. A guest that does not listen does not hold up the runner.
const TELL_TIMEOUT: Duration = Duration::from_millis(100);
/// How often is looked, while output is slow, whether the VM is to end meanwhile.
const DRAIN_STEP: Duration = Duration::from_millis(100);

/// How far a guest has come.
pub(super) struct Progress {
    entered: Instant,
    ready: OnceLock<Instant>,
    started: OnceLock<Instant>,
}

impl Progress {
    pub fn new() -> Progress {
        Progress { entered: Instant::now(), ready: OnceLock::new(), started: OnceLock::new() }
    }

    /// Whether the guest's init runs.
    pub fn is_ready(&self) -> bool {
        self.ready.get().is_some()
    }

    /// Whether the command has been started.
    pub fn is_started(&self) -> bool {
        self.started.get().is_some()
    }

    /// Takes note that the command has been started. Said more than once, the first time counts.
    pub fn set_started(&self) {
        let _ = self.started.set(Instant::now());
    }
}

/// Talks to a guest's init.
#[derive(Clone)]
pub(super) struct Guest(Arc<Mutex<UnixStream>>);

impl Guest {
    /// Sends a message. One that does not get through is lost: a guest that does not listen is no reason to fail.
    pub fn tell(&self, message: &ToGuest) {
        let stream = self.0.lock().unwrap_or_else(|e| e.into_inner());
        let sent = serde_json::to_vec(message).map_err(io::Error::from).and_then(|mut line| {
            line.push(b'\n');
            (&*stream).write_all(&line)
        });
        if let Err(error) = sent {
            tracing::debug!(%error, ?message, "The guest does not listen");
        }
    }
}

/// Runs the guest to its end; returns the exit status.
pub(super) fn run(plan: Plan, task: Task, signals: Signals, begin: Instant) -> Result<u8, RunError> {
    let system = |what| move |error| RunError::System(what, error);
    let observers = Observers::prepare(&plan)?;
    let initramfs = image::initramfs(&task, &plan.modules)?;
    let is_terminal = task.command.stdio[0] == Stdio::Terminal;
    let typed = if is_terminal { Some(io::pipe().map_err(system("create a pipe"))?) } else { None };
    if let Some((_, writer)) = &typed {
        // Large enough for what people paste; where the user has too many pipes, it stays as it is.
        let _ = rustix::pipe::fcntl_setpipe_size(writer, TYPED);
    }
    let (typed, typing) = typed.map(|(reader, writer)| (OwnedFd::from(reader), writer)).unzip();
    let (ours, theirs) = UnixStream::pair().map_err(system("create a socket"))?;
    ours.set_write_timeout(Some(TELL_TIMEOUT)).map_err(system("set up a socket"))?;
    let ports = ports(&task.command, typed, theirs).map_err(system("use the standard streams"))?;

    let console = console(&plan.console)?;
    let wiring = Wiring { console, console_is_the_kernels: true, initramfs: Some(initramfs), ports };
    let mut vm = Vm::build(machine(&plan, begin)?, wiring)?;
    let report_file = confine(&mut vm, &plan, begin)?;
    let observers = observers.start(&plan, &vm)?;
    let ending = vm.ending();
    end_on_panic(ending.clone());
    let progress = Arc::new(Progress::new());
    let seen = Arc::clone(&progress);
    let status = move |reason| with_progress(reason, &seen).status(true);
    last_resort::after_end(ending.clone(), status).map_err(system("start a thread"))?;
    let guest = Guest(Arc::new(Mutex::new(ours.try_clone().map_err(system("use a socket"))?)));
    tell_of_closed_outputs(&vm.ports(), guest.clone());
    let listener = Listener { progress: Arc::clone(&progress), ending: ending.clone(), ports: vm.ports() };
    listener.start(ours).map_err(system("start a thread"))?;
    signals.handle(ending.clone(), Some((guest, Arc::clone(&progress)))).map_err(system("start a thread"))?;
    watchdog::start(vm.activity(), Arc::clone(&progress), plan.boot_timeout, ending.clone())
        .map_err(system("start a thread"))?;
    if let Some(typing) = typing {
        let terminal = io::stdin().as_fd().try_clone_to_owned().map_err(system("use the terminal"))?;
        make_terminal_raw().map_err(system("set up the terminal"))?;
        let started = terminal::start(terminal, typing, Arc::clone(&progress), ending);
        started.inspect_err(|_| restore_terminal()).map_err(system("start a thread"))?;
    }

    let result = vm.run(ConsoleInput::None);
    restore_terminal();
    drop(observers);
    let mut report = result.map_err(system("run the guest"))?;
    complete(&mut report, &progress, begin);
    let context = explain::Context { plan: &plan, command: &task.command, is_ready: progress.is_ready() };
    explain::command(&report.reason, &context, || vm.console_tail(explain::TAIL_LINES));
    report_file.write(&report)?;
    Ok(report.status)
}

/// The ports of a command. The control port is the last, as the guest's init expects.
fn ports(command: &Command, typed: Option<OwnedFd>, control: UnixStream) -> io::Result<Vec<Port>> {
    let [input, output, error] = command.ports();
    let mut ports = Vec::new();
    if let Some(name) = input {
        let input = typed.map_or_else(|| io::stdin().as_fd().try_clone_to_owned(), Ok)?;
        ports.push(Port { name: name.to_owned(), input: Some(input), output: None });
    }
    if let Some(name) = output {
        let output = io::stdout().as_fd().try_clone_to_owned()?;
        ports.push(Port { name: name.to_owned(), input: None, output: Some(output) });
    }
    if let Some(name) = error {
        let output = io::stderr().as_fd().try_clone_to_owned()?;
        ports.push(Port { name: name.to_owned(), input: None, output: Some(output) });
    }
    let (input, output) = (control.try_clone()?.into(), control.into());
    ports.push(Port { name: PORT_CONTROL.to_owned(), input: Some(input), output: Some(output) });
    Ok(ports)
}

fn tell_of_closed_outputs(ports: &PortsHandle, guest: Guest) {
    ports.on_output_closed(move |name, error| {
        let stream = match name {
            PORT_STDOUT => 1,
            PORT_STDERR => 2,
            _ => return,
        };
        if error.kind() != io::ErrorKind::BrokenPipe {
            tracing::warn!(%error, stream, "Cannot write what the command writes");
        }
        guest.tell(&ToGuest::OutputClosed { stream });
    });
}

/// What the guest's progress makes of the end.
fn with_progress(reason: ExitReason, progress: &Progress) -> ExitReason {
    let what = match reason {
        _ if progress.is_ready() => return reason,
        ExitReason::PowerOff => "switched itself off",
        ExitReason::Reset => "reset itself",
        _ => return reason,
    };
    let error = format!("it {what} before its init could say what is wrong");
    ExitReason::BootFailed { what: "boot".into(), error }
}

/// What only the runner knows of the end: how far the guest had come, and what that makes of it.
fn complete(report: &mut Report, progress: &Progress, begin: Instant) {
    report.reason = with_progress(report.reason.clone(), progress);
    report.status = report.reason.status(true);
    let span =
        |from: Instant, to: Option<&Instant>| to.map(|to| milliseconds(to.saturating_duration_since(from)));
    let timing = &mut report.timing;
    timing.vmm_ms = milliseconds(progress.entered.duration_since(begin));
    timing.ready_ms = span(progress.entered, progress.ready.get());
    timing.started_ms = progress.ready.get().and_then(|ready| span(*ready, progress.started.get()));
    timing.total_ms = milliseconds(begin.elapsed());
}

/// Hears what the guest's init tells.
struct Listener {
    progress: Arc<Progress>,
    ending: Ending,
    ports: PortsHandle,
}

impl Listener {
    /// Starts thread `control`, which ends with the VM.
    fn start(self, stream: UnixStream) -> io::Result<()> {
        let listen = move || {
            let mut stream = BufReader::new(stream);
            let end = loop {
                match next_message(&mut stream) {
                    // The VM has gone.
                    Ok(None) => return,
                    Ok(Some(message)) => {
                        if let Some(end) = self.hear(message) {
                            break end;
                        }
                    }
                    Err(error) => {
                        let what = "talk to daxvm".to_owned();
                        break ExitReason::BootFailed { what, error: error.to_string() };
                    }
                }
            };
            if matches!(end, ExitReason::Exited { .. } | ExitReason::Signaled { .. }) {
                self.drain();
            }
            self.ending.end(end);
        };
        thread::Builder::new().name("control".into()).spawn(listen).map(drop)
    }

    /// Takes note of a message; the last one says how the VM ends. There is no need to wait until it switches itself off.
    fn hear(&self, message: FromGuest) -> Option<ExitReason> {
        match message {
            // Said more than once, the first time counts.
            FromGuest::Ready => drop(self.progress.ready.set(Instant::now())),
            FromGuest::Started => self.progress.set_started(),
            FromGuest::Failed { what, error } => return Some(ExitReason::BootFailed { what, error }),
            FromGuest::NotRun { status, error } => return Some(ExitReason::NotRun { status, error }),
            FromGuest::Exited { status } => return Some(ExitReason::Exited { status }),
            FromGuest::Signaled { signal } => return Some(ExitReason::Signaled { signal }),
        }
        None
    }

    /// Waits until the caller has all output, as long as the VM is not to end for another reason.
    fn drain(&self) {
        while !self.ports.drain(DRAIN_STEP) && self.ending.reason().is_none() {}
    }
}

/// The next message; none at the end.
fn next_message(stream: &mut impl BufRead) -> io::Result<Option<FromGuest>> {
    let mut line = Vec::new();
    if stream.take(MAX_MESSAGE).read_until(b'\n', &mut line)? == 0 {
        return Ok(None);
    }
    Ok(Some(serde_json::from_slice(&line)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_lines_and_bounded() {
        let mut stream = &b"{\"message\":\"ready\"}\n{\"message\":\"exited\",\"status\":3}\n"[..];
        assert_eq!(next_message(&mut stream).unwrap(), Some(FromGuest::Ready));
        assert_eq!(next_message(&mut stream).unwrap(), Some(FromGuest::Exited { status: 3 }));
        assert_eq!(next_message(&mut stream).unwrap(), None);
        for nonsense in [&b"\n"[..], b"{}\n", b"\xff\n", b"{\"message\":\"exited\",\"status\":300}\n"] {
            assert!(next_message(&mut { nonsense }).is_err(), "{nonsense:?}");
        }
        let endless = vec![b' '; 2 * MAX_MESSAGE as usize];
        let mut stream = &endless[..];
        assert!(next_message(&mut stream).is_err());
        assert_eq!(stream.len(), MAX_MESSAGE as usize, "no more than one message is kept");
    }

    #[test]
    fn a_guest_that_does_not_listen_holds_up_nobody() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        ours.set_write_timeout(Some(Duration::from_millis(1))).unwrap();
        let guest = Guest(Arc::new(Mutex::new(ours)));
        let start = Instant::now();
        for _ in 0..400 {
            guest.tell(&ToGuest::Signal { signal: 2 });
        }
        assert!(start.elapsed() < Duration::from_secs(60));
    }
}
