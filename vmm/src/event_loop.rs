//! The main thread while the guest runs: waits for console input, the time limit, the end.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use devices::legacy::SerialPort;
use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use crate::console::EscapeFilter;
use crate::outcome::ExitReason;
use crate::vm::{ConsoleInput, Ending};

/// How long a kernel that has panicked may take to say everything and reset, before the VM ends without it.
const PANIC_GRACE: Duration = Duration::from_secs(3);
/// Bytes typed at a terminal that are kept for a guest that does not take them. More than that are lost: a terminal is read
/// whatever the guest does, or the keys that end the VM would be dead with it.
const MOST_TYPED: usize = 64 << 10;
/// How long until input is offered again to a port that takes none and does not tell when it does.
const OFFER_AGAIN: Duration = Duration::from_millis(10);

/// What the main thread waits for.
pub(crate) struct Wakeups<'a> {
    pub ending: &'a Ending,
    pub serial: Arc<SerialPort>,
    pub room_in_serial: EventFd,
    pub panicked: EventFd,
    pub input: ConsoleInput,
    pub timeout: Option<Duration>,
}

/// Waits until the VM is to end.
pub(crate) fn run(wakeups: Wakeups) -> io::Result<()> {
    let mut manager = EventManager::<Arc<Mutex<Loop>>>::new().map_err(event_error)?;
    let state = Arc::new(Mutex::new(Loop::new(wakeups)?));
    manager.add_subscriber(Arc::clone(&state));
    loop {
        match manager.run() {
            Ok(_) => {}
            Err(event_manager::Error::Epoll(error)) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(event_error(error)),
        }
        let mut state = state.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(error) = state.failed.take() {
            return Err(error);
        }
        if state.done {
            return Ok(());
        }
    }
}

fn event_error(error: event_manager::Error) -> io::Error {
    io::Error::other(format!("Event loop: {error:?}"))
}

struct Loop {
    ending: Ending,
    end: EventFd,
    serial: Arc<SerialPort>,
    room_in_serial: EventFd,
    panicked: EventFd,
    timeout: TimerFd,
    grace: TimerFd,
    again: TimerFd,
    input: Option<Input>,
    done: bool,
    failed: Option<io::Error>,
}

struct Input {
    file: File,
    /// For a terminal.
    escape: Option<EscapeFilter>,
    /// Read but not taken by the guest yet.
    pending: Vec<u8>,
    watched: bool,
}

const END: u32 = 0;
const ROOM: u32 = 1;
const PANICKED: u32 = 2;
const TIMEOUT: u32 = 3;
const GRACE: u32 = 4;
const AGAIN: u32 = 5;
const INPUT: u32 = 6;

impl Loop {
    fn new(wakeups: Wakeups) -> io::Result<Loop> {
        let (fd, escape) = match wakeups.input {
            ConsoleInput::None => (None, None),
            ConsoleInput::From(fd) => (Some(pollable(fd)?), None),
            ConsoleInput::Terminal(fd) => (Some(fd), Some(EscapeFilter::default())),
        };
        let input = fd.map(|fd| Input { file: File::from(fd), escape, pending: Vec::new(), watched: true });
        let mut timeout = TimerFd::new()?;
        if let Some(limit) = wakeups.timeout {
            // A timer of zero would never fire.
            timeout.reset(limit.max(Duration::from_millis(1)), None)?;
        }
        Ok(Loop {
            ending: wakeups.ending.clone(),
            end: wakeups.ending.wake().try_clone()?,
            serial: wakeups.serial,
            room_in_serial: wakeups.room_in_serial,
            panicked: wakeups.panicked,
            timeout,
            grace: TimerFd::new()?,
            again: TimerFd::new()?,
            input,
            done: false,
            failed: None,
        })
    }

    fn handle(&mut self, source: u32, ops: &mut EventOps) -> io::Result<()> {
        match source {
            END => self.done = true,
            TIMEOUT => self.ending.end(ExitReason::Timeout),
            // The message is in the console's log, where the end of the VM is explained.
            GRACE => self.ending.end(ExitReason::Panic(String::new())),
            PANICKED => {
                self.panicked.read()?;
                self.grace.reset(PANIC_GRACE, None)?;
            }
            ROOM => {
                self.room_in_serial.read()?;
                self.feed(ops)?;
            }
            AGAIN => {
                self.again.clear()?;
                self.feed(ops)?;
            }
            INPUT => self.read_input(ops)?,
            _ => {}
        }
        Ok(())
    }

    fn read_input(&mut self, ops: &mut EventOps) -> io::Result<()> {
        let Some(input) = &mut self.input else { return Ok(()) };
        let mut buffer = [0; 256];
        let read = input.file.read(&mut buffer).or_else(|error| match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Err(()),
            _ => {
                tracing::warn!(%error, "Console input ends");
                Ok(0)
            }
        });
        let read = match read {
            Err(()) => return Ok(()),
            Ok(0) => {
                let _ = ops.remove(Events::empty(&input.file));
                input.watched = false;
                return Ok(());
            }
            Ok(read) => &buffer[..read],
        };
        match &mut input.escape {
            None => input.pending.extend(read),
            Some(escape) => match escape.filter(read) {
                Some(typed) => {
                    let room = MOST_TYPED - input.pending.len();
                    input.pending.extend(typed.iter().take(room));
                }
                None => self.ending.stop(),
            },
        }
        self.feed(ops)
    }

    /// Gives the guest what it takes. Of what is no terminal no more is read before it has taken all.
    fn feed(&mut self, ops: &mut EventOps) -> io::Result<()> {
        let Some(input) = &mut self.input else { return Ok(()) };
        if !input.pending.is_empty() {
            match self.serial.feed(&input.pending) {
                Some(taken) => drop(input.pending.drain(..taken)),
                None => self.again.reset(OFFER_AGAIN, None)?,
            }
        }
        let wanted = if input.pending.is_empty() { EventSet::IN } else { EventSet::empty() };
        if input.watched && input.escape.is_none() {
            ops.modify(Events::with_data(&input.file, INPUT, wanted)).map_err(event_error)?;
        }
        Ok(())
    }
}

impl MutEventSubscriber for Loop {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if let Err(error) = self.handle(events.data(), ops) {
            self.failed = Some(error);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let mut sources = vec![
            (self.end.as_raw_fd(), END),
            (self.room_in_serial.as_raw_fd(), ROOM),
            (self.panicked.as_raw_fd(), PANICKED),
            (self.timeout.as_raw_fd(), TIMEOUT),
            (self.grace.as_raw_fd(), GRACE),
            (self.again.as_raw_fd(), AGAIN),
        ];
        sources.extend(self.input.iter().map(|input| (input.file.as_raw_fd(), INPUT)));
        for (fd, data) in sources {
            if let Err(error) = ops.add(Events::with_data_raw(fd, data, EventSet::IN)) {
                self.failed = Some(event_error(error));
            }
        }
    }
}

/// epoll takes pipes, sockets and terminals; what it refuses (regular files, /dev/null) is read by a thread instead.
fn pollable(fd: OwnedFd) -> io::Result<OwnedFd> {
    use std::os::unix::fs::FileTypeExt;
    let mut file = File::from(fd);
    let kind = file.metadata()?.file_type();
    if kind.is_fifo() || kind.is_socket() {
        return Ok(file.into());
    }
    let (reader, mut writer) = io::pipe()?;
    std::thread::Builder::new().name("console-input".into()).spawn(move || {
        // Ends with the input, or when the VM has gone and with it the other end of the pipe.
        let _ = io::copy(&mut file, &mut writer).and_then(|_| writer.flush());
    })?;
    Ok(reader.into())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::thread::JoinHandle;
    use std::time::Instant;

    use devices::bus::BusDevice;
    use devices::interrupt::Interrupt;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;
    use crate::outcome::Stop;

    const LINE_STATUS: u64 = 5;
    const DATA_READY: u8 = 1;
    const MODEM_CONTROL: u64 = 4;
    const LOOP_BACK: u8 = 0x10;

    struct NoLine;

    impl Interrupt for NoLine {
        fn trigger(&self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A console whose reader has stopped reading: tells that it is written to, and waits.
    struct Stuck(Sender<()>, Receiver<()>);

    impl Write for Stuck {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            self.0.send(()).unwrap();
            let _ = self.1.recv();
            Ok(data.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// An event loop in a thread, and what it waits for.
    struct Running {
        ending: Ending,
        serial: Arc<SerialPort>,
        input: io::PipeWriter,
        thread: JoinHandle<io::Result<()>>,
    }

    impl Running {
        fn start(out: impl Write + Send + 'static, input: fn(OwnedFd) -> ConsoleInput) -> Running {
            let event = || EventFd::new(EFD_NONBLOCK).unwrap();
            let (ending, room) = (Ending::new().unwrap(), event());
            let tell = room.try_clone().unwrap();
            let serial =
                Arc::new(SerialPort::new(Arc::new(NoLine), Box::new(out), move || tell.write(1).unwrap()));
            let (reader, writer) = io::pipe().unwrap();
            let (given, port, input) = (ending.clone(), Arc::clone(&serial), input(reader.into()));
            let wait = move || {
                let (ending, serial, panicked) = (&given, port, event());
                run(Wakeups { ending, serial, room_in_serial: room, panicked, input, timeout: None })
            };
            Running { ending, serial, input: writer, thread: std::thread::spawn(wait) }
        }

        /// The next byte, as a guest reads it.
        fn read(&self) -> u8 {
            let register = |offset| {
                let mut byte = [0];
                self.serial.read(offset, &mut byte);
                byte[0]
            };
            wait_for("input", || register(LINE_STATUS) & DATA_READY != 0);
            register(0)
        }

        fn ends(self, reason: ExitReason) {
            wait_for("the end", || self.thread.is_finished());
            self.thread.join().unwrap().unwrap();
            assert_eq!(self.ending.reason(), Some(reason));
        }
    }

    fn wait_for(what: &str, condition: impl Fn() -> bool) {
        let start = Instant::now();
        while !condition() {
            assert!(start.elapsed() < Duration::from_secs(20), "timed out waiting for {what}");
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    #[test]
    fn the_keys_that_end_the_vm_work_whatever_the_guest_does() {
        // It reads nothing: many times what is kept.
        let mut running = Running::start(io::sink(), ConsoleInput::Terminal);
        (0..100).for_each(|_| running.input.write_all(&[b'x'; 4096]).unwrap());
        running.input.write_all(b"\x01x").unwrap();
        running.ends(ExitReason::Stopped(Stop::Request));

        // It tests the port for ever.
        let mut running = Running::start(io::sink(), ConsoleInput::Terminal);
        running.serial.write(MODEM_CONTROL, &[LOOP_BACK]);
        running.input.write_all(b"x").unwrap();
        std::thread::sleep(3 * OFFER_AGAIN);
        running.input.write_all(b"\x01x").unwrap();
        running.ends(ExitReason::Stopped(Stop::Request));

        // Its output is not read.
        let ((told, is_written_to), (read, is_read)) = (channel(), channel());
        let mut running = Running::start(Stuck(told, is_read), ConsoleInput::Terminal);
        let serial = Arc::clone(&running.serial);
        let vcpu = std::thread::spawn(move || serial.write(0, b"x"));
        is_written_to.recv().unwrap();
        running.input.write_all(b"x").unwrap();
        std::thread::sleep(3 * OFFER_AGAIN);
        running.input.write_all(b"\x01x").unwrap();
        running.ends(ExitReason::Stopped(Stop::Request));
        drop(read);
        vcpu.join().unwrap();
    }

    #[test]
    fn what_is_typed_while_the_port_is_tested_comes_afterwards() {
        for input in [ConsoleInput::Terminal, ConsoleInput::From] {
            let mut running = Running::start(io::sink(), input);
            running.serial.write(MODEM_CONTROL, &[LOOP_BACK]);
            running.input.write_all(b"x").unwrap();
            std::thread::sleep(3 * OFFER_AGAIN);
            running.serial.write(MODEM_CONTROL, &[0]);
            assert_eq!(running.read(), b'x');
            running.ending.stop();
            running.ends(ExitReason::Stopped(Stop::Request));
        }
    }

    #[test]
    fn of_a_pipe_nothing_is_lost() {
        let running = Running::start(io::sink(), ConsoleInput::From);
        let mut input = running.input.try_clone().unwrap();
        // Ctrl-A x is nothing special in it.
        let data: Vec<u8> = b"\x01x".repeat(2 * MOST_TYPED);
        let sent = data.clone();
        let writer = std::thread::spawn(move || input.write_all(&sent).unwrap());
        assert!(data.iter().all(|byte| running.read() == *byte));
        writer.join().unwrap();
        running.ending.stop();
        running.ends(ExitReason::Stopped(Stop::Request));
    }
}
