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
    input: Option<Input>,
    done: bool,
    failed: Option<io::Error>,
}

struct Input {
    file: File,
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
const INPUT: u32 = 5;

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
                Some(typed) => input.pending.extend(typed),
                None => self.ending.stop(),
            },
        }
        self.feed(ops)
    }

    /// Gives the guest what it takes; reads no more before it has taken all.
    fn feed(&mut self, ops: &mut EventOps) -> io::Result<()> {
        let Some(input) = &mut self.input else { return Ok(()) };
        if !input.pending.is_empty() {
            let taken = self.serial.feed(&input.pending);
            input.pending.drain(..taken);
        }
        let wanted = if input.pending.is_empty() { EventSet::IN } else { EventSet::empty() };
        if input.watched {
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
