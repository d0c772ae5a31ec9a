//! A named thread a queue: waits for the doorbell, takes chains off the available ring, puts them on the used ring,
//! interrupts the driver when it asks for it.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{ActiveQueue, DeviceMemory};

/// What a device does with one chain of descriptors.
pub trait ChainHandler: Send + 'static {
    /// Handles one request and returns the number of bytes written to the device-writable part of its chain.
    ///
    /// # Errors
    /// The chain is malformed and the queue cannot go on: the worker stops and the device needs a reset.
    fn handle(
        &mut self,
        memory: &GuestMemoryMmap,
        chain: DescriptorChain<&GuestMemoryMmap>,
    ) -> Result<u32, ChainError>;
}

/// Why a queue cannot be served any further: the guest broke the rules.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ChainError(pub String);

/// The thread that serves one queue, until it is stopped or dropped.
pub struct QueueWorker {
    /// Looked at between requests: a driver that never lets the ring run empty cannot delay the end.
    stop: Arc<AtomicBool>,
    kill: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl QueueWorker {
    /// Starts the thread `name` (at most 15 bytes are shown by the system).
    ///
    /// # Errors
    /// The system refuses a descriptor or a thread.
    pub fn spawn(
        name: &str,
        queue: ActiveQueue,
        memory: DeviceMemory,
        needs_reset: Arc<dyn Fn() + Send + Sync>,
        handler: impl ChainHandler,
    ) -> io::Result<QueueWorker> {
        let kill = EventFd::new(EFD_NONBLOCK)?;
        let stop = Arc::new(AtomicBool::new(false));
        let worker = Worker { stop: Arc::clone(&stop), kill: kill.try_clone()?, memory, handler, queue };
        let thread_name = name.to_owned();
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            if let Err(error) = worker.run() {
                tracing::error!(queue = %thread_name, %error, "Queue stopped, the device needs a reset");
                needs_reset();
            }
        })?;
        Ok(QueueWorker { stop, kill, thread: Some(thread) })
    }

    /// Ends the thread and waits for it: afterwards it touches no guest memory and raises no interrupt.
    pub fn stop(self) {}
}

impl Drop for QueueWorker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // The counter of an event descriptor that nobody else writes cannot overflow, so the write cannot fail.
        let _ = self.kill.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Worker<H> {
    stop: Arc<AtomicBool>,
    kill: EventFd,
    memory: DeviceMemory,
    queue: ActiveQueue,
    handler: H,
}

impl<H: ChainHandler> Worker<H> {
    fn run(mut self) -> Result<(), ChainError> {
        let ring_error = |error: virtio_queue::Error| ChainError(format!("Bad ring: {error}"));
        // The driver may have rung before this thread existed.
        loop {
            loop {
                let snapshot = self.memory.memory();
                let memory: &GuestMemoryMmap = &snapshot;
                self.queue.queue.disable_notification(memory).map_err(ring_error)?;
                serve(&mut self.queue, memory, &mut self.handler, &self.stop)?;
                let more = self.queue.queue.enable_notification(memory).map_err(ring_error)?;
                if !more || self.stop.load(Ordering::Acquire) {
                    break;
                }
            }
            if !self.wait()? {
                return Ok(());
            }
        }
    }

    /// Sleeps until the doorbell rings (true) or the worker is told to end (false).
    fn wait(&self) -> Result<bool, ChainError> {
        let mut fds = [self.kill.as_raw_fd(), self.queue.doorbell.as_raw_fd()].map(|fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        });
        loop {
            // SAFETY: `fds` is an array of two initialised pollfd structures that outlives the call.
            if unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) } >= 0 {
                break;
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(ChainError(format!("Cannot wait for the doorbell: {error}")));
            }
        }
        if fds[0].revents != 0 {
            return Ok(false);
        }
        // Non-blocking: a spurious wake-up finds nothing to read and does no harm.
        let _ = self.queue.doorbell.read();
        Ok(true)
    }
}

/// Serves all chains that are available now.
fn serve(
    active: &mut ActiveQueue,
    memory: &GuestMemoryMmap,
    handler: &mut impl ChainHandler,
    stop: &AtomicBool,
) -> Result<(), ChainError> {
    while !stop.load(Ordering::Acquire)
        && let Some(chain) = next_chain(&mut active.queue, memory)?
    {
        let head = chain.head_index();
        let written = handler.handle(memory, chain)?;
        let ring_error = |error: virtio_queue::Error| ChainError(format!("Bad used ring: {error}"));
        active.queue.add_used(memory, head, written).map_err(ring_error)?;
        // Asked after each chain: a file system request may take long, and the one before it is not to wait for it.
        if active.queue.needs_notification(memory).map_err(ring_error)? {
            active.interrupt.trigger().map_err(|e| ChainError(format!("Cannot interrupt the guest: {e}")))?;
        }
    }
    Ok(())
}

fn next_chain<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemoryMmap,
) -> Result<Option<DescriptorChain<&'m GuestMemoryMmap>>, ChainError> {
    Ok(queue.iter(memory).map_err(|error| ChainError(format!("Bad available ring: {error}")))?.next())
}
