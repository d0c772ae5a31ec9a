//! A device's thread: who starts it, how it waits, and how it is ended at once, whatever it is doing.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use smallvec::SmallVec;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::worker::ChainError;

/// How long a signal may take to end a system call before it is repeated: it gets lost when it arrives between the look
/// at the flag and the call.
const SIGNAL_AGAIN: Duration = Duration::from_millis(1);

/// The signal that ends system calls of interruptible threads; its handler does nothing.
fn interrupting_signal() -> libc::c_int {
    SIGRTMIN() + 1
}

/// What a thread of a device does, for whoever confines it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ThreadKind {
    /// Serves the requests of a share.
    FileSystem,
    /// Moves data between guest memory and descriptors that are open: disks, ports, entropy.
    Data,
    /// Looks at mapped files that change on the host.
    Watcher,
}

/// Starts a thread of this kind and name, which runs the body.
pub type ThreadStarter =
    dyn Fn(ThreadKind, &str, Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>> + Send + Sync;

static STARTER: OnceLock<Box<ThreadStarter>> = OnceLock::new();

/// Has `starter` start all threads of devices in this process from now on. It is for those who confine threads: devices
/// are activated by vCPUs, and a thread inherits the confinement of the one that starts it. Only the first call counts;
/// says whether it was this one.
pub fn start_threads_with(starter: Box<ThreadStarter>) -> bool {
    STARTER.set(starter).is_ok()
}

/// Starts the thread `name` (at most 15 bytes are shown by the system).
///
/// # Errors
/// The system refuses a thread.
pub(super) fn start(
    kind: ThreadKind,
    name: &str,
    body: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    match STARTER.get() {
        Some(starter) => starter(kind, name, Box::new(body)),
        None => std::thread::Builder::new().name(name.to_owned()).spawn(body),
    }
}

/// Tells a thread to end.
pub struct Stop {
    /// Looked at between requests: a driver that never lets the ring run empty cannot delay the end.
    flag: AtomicBool,
    event: EventFd,
}

impl Stop {
    pub(super) fn new() -> io::Result<Stop> {
        Ok(Stop { flag: AtomicBool::new(false), event: EventFd::new(EFD_NONBLOCK)? })
    }

    /// Whether the thread is to end.
    pub fn is_set(&self) -> bool {
        self.flag.load(Ordering::Acquire)
    }

    fn set(&self) {
        self.flag.store(true, Ordering::Release);
        // The counter of an event descriptor that nobody else writes cannot overflow, so the write cannot fail.
        let _ = self.event.write(1);
    }

    /// Sleeps until one of `watched` is ready, each a descriptor and the poll(2) events that are waited for; a negative
    /// one is left out. Returns which are ready (or broken), or none when the thread is to end.
    ///
    /// # Errors
    /// What poll(2) says: ENOMEM.
    pub fn wait<const N: usize>(&self, watched: [(RawFd, i16); N]) -> io::Result<Option<[bool; N]>> {
        let entry = |(fd, events)| libc::pollfd { fd, events, revents: 0 };
        // Few as a rule, so that a thread that goes to sleep takes no memory for it.
        let mut fds: SmallVec<[_; 4]> = SmallVec::new();
        fds.push(entry((self.event.as_raw_fd(), libc::POLLIN)));
        fds.extend(watched.map(entry));
        while !self.is_set() {
            // SAFETY: `fds` has as many initialised structures as the call is told, and outlives it.
            if unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) } >= 0 {
                let ready = std::array::from_fn(|i| fds[i + 1].revents != 0);
                return Ok((!self.is_set()).then_some(ready));
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        Ok(None)
    }
}

/// A device's thread, which ends when this is dropped: afterwards it touches no guest memory and raises no interrupt.
pub struct DeviceThread {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
    is_interruptible: bool,
}

impl DeviceThread {
    /// Starts a thread of this kind and name. When `body` fails or panics, `needs_reset` is called. To end the thread is to set the
    /// [`Stop`] and to wait.
    ///
    /// # Errors
    /// The system refuses a descriptor or a thread.
    pub fn spawn(
        kind: ThreadKind,
        name: &str,
        needs_reset: Arc<dyn Fn() + Send + Sync>,
        body: impl FnOnce(&Stop) -> Result<(), ChainError> + Send + 'static,
    ) -> io::Result<DeviceThread> {
        let stop = Arc::new(Stop::new()?);
        let (stopping, thread_name) = (Arc::clone(&stop), name.to_owned());
        let thread = start(kind, name, move || {
            let body = AssertUnwindSafe(|| body(&stopping));
            let panicked = |_| Err(ChainError("the thread panicked".into()));
            if let Err(error) = panic::catch_unwind(body).unwrap_or_else(panicked) {
                tracing::error!(thread = %thread_name, %error, "Queue stopped, the device needs a reset");
                needs_reset();
            }
        })?;
        Ok(DeviceThread { stop, thread: Some(thread), is_interruptible: false })
    }

    /// The same for a thread that may block in system calls for as long as somebody else likes. When it is to end, its
    /// calls fail with EINTR, or come back with what they have done so far.
    ///
    /// # Errors
    /// As [`DeviceThread::spawn`]; what sigaction(2) says.
    pub fn spawn_interruptible(
        kind: ThreadKind,
        name: &str,
        needs_reset: Arc<dyn Fn() + Send + Sync>,
        body: impl FnOnce(&Stop) -> Result<(), ChainError> + Send + 'static,
    ) -> io::Result<DeviceThread> {
        extern "C" fn interrupted(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        register_signal_handler(interrupting_signal(), interrupted)?;
        let mut thread = DeviceThread::spawn(kind, name, needs_reset, body)?;
        thread.is_interruptible = true;
        Ok(thread)
    }
}

impl Drop for DeviceThread {
    fn drop(&mut self) {
        self.stop.set();
        let Some(thread) = self.thread.take() else { return };
        while self.is_interruptible && !thread.is_finished() {
            if let Err(error) = thread.kill(interrupting_signal()) {
                tracing::error!(%error, "Cannot interrupt a device's thread");
            }
            std::thread::sleep(SIGNAL_AGAIN);
        }
        // A panic of the thread has been reported by the panic hook.
        let _ = thread.join();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::time::Instant;

    #[test]
    fn a_thread_that_blocks_in_a_read_ends_at_once() {
        let (mut reader, _writer) = io::pipe().unwrap();
        let kind = ThreadKind::Data;
        let thread = DeviceThread::spawn_interruptible(kind, "blocked", Arc::new(|| ()), move |stop| {
            while !stop.is_set() {
                let error = reader.read(&mut [0]).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::Interrupted);
            }
            Ok(())
        });
        let thread = thread.unwrap();
        std::thread::sleep(Duration::from_millis(20));
        let start = Instant::now();
        drop(thread);
        assert!(start.elapsed() < Duration::from_secs(2));
    }

    #[test]
    fn waiting_tells_what_is_ready_and_ends_with_the_thread() {
        let (sender, receiver) = std::sync::mpsc::channel();
        let (bell, quiet) = (EventFd::new(EFD_NONBLOCK).unwrap(), EventFd::new(EFD_NONBLOCK).unwrap());
        bell.write(1).unwrap();
        let thread = DeviceThread::spawn(ThreadKind::Data, "waiting", Arc::new(|| ()), move |stop| {
            let watched = [(-1, libc::POLLIN), (bell.as_raw_fd(), libc::POLLIN)];
            sender.send(stop.wait(watched).unwrap().map(Vec::from)).unwrap();
            sender.send(stop.wait([(quiet.as_raw_fd(), libc::POLLIN)]).unwrap().map(Vec::from)).unwrap();
            Ok(())
        });
        assert_eq!(receiver.recv().unwrap(), Some(vec![false, true]));
        drop(thread.unwrap());
        assert_eq!(receiver.recv().unwrap(), None);
    }
}
