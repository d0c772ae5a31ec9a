//! Ports as the caller gives them, and what the device's threads and the caller know of each.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde::Serialize;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// A stream to and a stream from the guest.
///
/// The descriptors may be of any kind: pipes, terminals, sockets, regular files, `/dev/null`. They are used as they are,
/// blocking or not, at their own offset, and stay open until the device is dropped.
#[derive(Debug)]
pub struct Port {
    /// The name that the guest finds in `/sys/class/virtio-ports/*/name`; 1 to 255 bytes without NUL.
    pub name: String,
    /// What the guest reads, from when it has the port open. At its end the guest sees the port closed, and a read there
    /// returns 0; a Linux guest cannot write to the port after that. Nothing to read, ever, if it is missing.
    pub input: Option<OwnedFd>,
    /// Where what the guest writes goes; nowhere if it is missing.
    pub output: Option<OwnedFd>,
}

/// The counters of one port at one moment.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct PortCounters {
    /// The port's name.
    pub name: String,
    /// Bytes that went from the port's input to the guest.
    pub bytes_in: u64,
    /// Bytes that went from the guest to the port's output; what was discarded does not count.
    pub bytes_out: u64,
}

/// What is known of one port.
pub(super) struct PortState {
    pub name: String,
    /// Whether the guest has the port open.
    guest_open: AtomicBool,
    /// Rung when `guest_open` changes.
    pub opened: EventFd,
    /// Whether the input has ended.
    input_ended: AtomicBool,
    /// Whether the output cannot be written to any more.
    output_closed: AtomicBool,
    pub bytes_in: AtomicU64,
    pub bytes_out: AtomicU64,
    drain: Mutex<Drain>,
    drained: Condvar,
}

/// How far the output has been asked to be consumed, and has been.
#[derive(Default)]
struct Drain {
    /// The doorbell of the output queue's thread, while there is one.
    doorbell: Option<EventFd>,
    asked: u64,
    done: u64,
}

impl PortState {
    pub fn new(name: String) -> io::Result<PortState> {
        Ok(PortState {
            name,
            guest_open: AtomicBool::new(false),
            opened: EventFd::new(EFD_NONBLOCK)?,
            input_ended: AtomicBool::new(false),
            output_closed: AtomicBool::new(false),
            bytes_in: AtomicU64::new(0),
            bytes_out: AtomicU64::new(0),
            drain: Mutex::default(),
            drained: Condvar::new(),
        })
    }

    pub fn is_open(&self) -> bool {
        self.guest_open.load(Acquire)
    }

    pub fn set_open(&self, open: bool) {
        self.guest_open.store(open, Release);
        // Non-blocking, and it need only be readable.
        let _ = self.opened.write(1);
    }

    pub fn has_input_ended(&self) -> bool {
        self.input_ended.load(Acquire)
    }

    /// To be set when all data is in the guest's buffers, and those on the used ring.
    pub fn set_input_ended(&self) {
        self.input_ended.store(true, Release);
    }

    pub fn is_output_closed(&self) -> bool {
        self.output_closed.load(Acquire)
    }

    /// The output cannot be written to any more, whoever drives the device.
    pub fn set_output_closed(&self) {
        self.output_closed.store(true, Release);
    }

    /// A thread serves the output queue from now on, until [`PortState::end_output`].
    pub fn begin_output(&self, doorbell: EventFd) {
        self.lock().doorbell = Some(doorbell);
    }

    /// No thread serves the output queue any more, so nobody need wait for it.
    pub fn end_output(&self) {
        self.lock().doorbell = None;
        self.drained.notify_all();
    }

    /// The latest request to consume what is in the output queue, if it has not been fulfilled.
    pub fn drain_request(&self) -> Option<u64> {
        let drain = self.lock();
        (drain.asked > drain.done).then_some(drain.asked)
    }

    /// What was in the queue at the time of [`PortState::drain_request`] has been consumed.
    pub fn fulfil_drain(&self, request: u64) {
        self.lock().done = request;
        self.drained.notify_all();
    }

    fn ask_drain(&self) -> u64 {
        let mut drain = self.lock();
        drain.asked += 1;
        if let Some(doorbell) = &drain.doorbell {
            // Non-blocking, and it need only be readable.
            let _ = doorbell.write(1);
        }
        drain.asked
    }

    fn wait_drained(&self, request: u64, deadline: Instant) -> bool {
        let open = |drain: &mut Drain| drain.doorbell.is_some() && drain.done < request;
        let left = deadline.saturating_duration_since(Instant::now());
        let waited = self.drained.wait_timeout_while(self.lock(), left, open);
        let (mut drain, _) = waited.unwrap_or_else(|e| e.into_inner());
        !open(&mut drain)
    }

    fn lock(&self) -> MutexGuard<'_, Drain> {
        self.drain.lock().unwrap_or_else(|e| e.into_inner())
    }
}

type OnClosed = Box<dyn FnMut(&str, &io::Error) + Send>;

/// Outputs that cannot be written to any more, and who wants to know.
#[derive(Default)]
pub(super) struct ClosedOutputs(Mutex<Reports>);

#[derive(Default)]
struct Reports {
    on_closed: Option<OnClosed>,
    unreported: Vec<(String, io::Error)>,
}

impl ClosedOutputs {
    /// The output of the port `name` fails with `error`; to be called once for each.
    pub fn report(&self, name: &str, error: io::Error) {
        let mut reports = self.0.lock().unwrap_or_else(|e| e.into_inner());
        match &mut reports.on_closed {
            Some(on_closed) => on_closed(name, &error),
            None => reports.unreported.push((name.to_owned(), error)),
        }
    }

    fn tell(&self, mut on_closed: OnClosed) {
        let mut reports = self.0.lock().unwrap_or_else(|e| e.into_inner());
        reports.unreported.drain(..).for_each(|(name, error)| on_closed(&name, &error));
        reports.on_closed = Some(on_closed);
    }
}

/// A VM's ports as its owner sees them. It may outlive the device, and holds none of its descriptors.
#[derive(Clone, Default)]
pub struct PortsHandle {
    pub(super) ports: Arc<[PortState]>,
    pub(super) closed: Arc<ClosedOutputs>,
}

impl PortsHandle {
    /// Waits until all that the guest has put into output queues so far has been written (or discarded, where nobody reads
    /// it any more), for `timeout` at most; says whether it has been. Ports that no driver uses have nothing.
    pub fn drain(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let requests: Vec<_> = self.ports.iter().map(|port| (port, port.ask_drain())).collect();
        requests.into_iter().all(|(port, request)| port.wait_drained(request, deadline))
    }

    /// Has `on_closed` called once for each port whose output cannot be written to any more, with the port's name and the
    /// reason: EPIPE when its reader has gone, or what else the system says. What the guest writes from then on is discarded.
    /// It is called from the device's threads (or from here, for what has happened before), must not block and must not
    /// call this again.
    pub fn on_output_closed(&self, on_closed: impl FnMut(&str, &io::Error) + Send + 'static) {
        self.closed.tell(Box::new(on_closed));
    }

    /// The counters as they are now, of each port.
    pub fn counters(&self) -> Vec<PortCounters> {
        let snapshot = |port: &PortState| PortCounters {
            name: port.name.clone(),
            bytes_in: port.bytes_in.load(Relaxed),
            bytes_out: port.bytes_out.load(Relaxed),
        };
        self.ports.iter().map(snapshot).collect()
    }
}
