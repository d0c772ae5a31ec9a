//! A named thread a queue: waits for the doorbell, takes chains off the available ring, puts them on the used ring,
//! interrupts the driver when it asks for it.

use std::fmt::Display;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};

use super::device::{ActivateError, Activation, ActiveQueue, DeviceMemory};
use super::thread::{DeviceThread, Stop, ThreadKind};

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

/// The threads that serve a device's queues, until they are stopped or dropped.
#[derive(Default)]
pub struct QueueWorkers(Vec<DeviceThread>);

impl QueueWorkers {
    /// Starts a thread of this kind for each queue; `each` has a queue's index and gives the name of its thread (of which the
    /// system shows at most 15 bytes) and what handles its chains. `owner` is the device, for the message.
    ///
    /// # Errors
    /// The system refuses a descriptor or a thread; then none is left.
    pub fn start<H: ChainHandler>(
        &mut self,
        kind: ThreadKind,
        owner: impl Display,
        activation: Activation,
        mut each: impl FnMut(u16) -> (String, H),
    ) -> Result<(), ActivateError> {
        let Activation { memory, queues, needs_reset, .. } = activation;
        for queue in queues {
            let (name, handler) = each(queue.index);
            match serve_in_thread(kind, &name, queue, memory.clone(), Arc::clone(&needs_reset), handler) {
                Ok(thread) => self.0.push(thread),
                Err(source) => {
                    self.stop();
                    let reason = format!("{owner} has no thread for a queue");
                    return Err(ActivateError { reason, source: Some(source) });
                }
            }
        }
        Ok(())
    }

    /// Ends the threads and waits for them: afterwards they touch no guest memory and raise no interrupt.
    pub fn stop(&mut self) {
        self.0.clear();
    }
}

fn serve_in_thread(
    kind: ThreadKind,
    name: &str,
    queue: ActiveQueue,
    memory: DeviceMemory,
    needs_reset: Arc<dyn Fn() + Send + Sync>,
    mut handler: impl ChainHandler,
) -> io::Result<DeviceThread> {
    DeviceThread::spawn(kind, name, needs_reset, move |stop| {
        serve(queue, &memory, stop, |queue, memory| {
            let Some(chain) = queue.next_chain(memory)? else { return Ok(false) };
            let head = chain.head_index();
            let written = handler.handle(memory, chain)?;
            queue.add_used(memory, head, written)?;
            // After each chain: a request may take long, and the one before it is not to wait for it.
            queue.notify_driver(memory)?;
            Ok(true)
        })
    })
}

/// Serves `queue` until `stop` is set: `some` serves some of what is available, and returns false if there was nothing.
///
/// # Errors
/// A ring that breaks the rules; those of `some`.
pub(super) fn serve(
    mut queue: ActiveQueue,
    memory: &DeviceMemory,
    stop: &Stop,
    mut some: impl FnMut(&mut ActiveQueue, &GuestMemoryMmap) -> Result<bool, ChainError>,
) -> Result<(), ChainError> {
    // The driver may have rung before this thread existed, so the first look at the ring comes before the first wait.
    loop {
        queue.ignore_driver(&memory.memory())?;
        while !stop.is_set() && some(&mut queue, &memory.memory())? {}
        if queue.listen_to_driver(&memory.memory())? && !stop.is_set() {
            continue;
        }
        let bell = (queue.doorbell.as_raw_fd(), libc::POLLIN);
        if stop.wait([bell]).map_err(cannot_wait)?.is_none() {
            return Ok(());
        }
        queue.silence_doorbell();
    }
}

/// A [`Stop::wait`] that failed.
pub(super) fn cannot_wait(error: io::Error) -> ChainError {
    ChainError(format!("Cannot wait for the doorbell: {error}"))
}

fn bad_ring(error: virtio_queue::Error) -> ChainError {
    ChainError(format!("Bad ring: {error}"))
}

/// The device's side of a ring. Errors are those of a ring that breaks the rules.
impl ActiveQueue {
    /// Takes the next available chain.
    pub(super) fn next_chain<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
    ) -> Result<Option<DescriptorChain<&'m GuestMemoryMmap>>, ChainError> {
        let chain = self.queue.iter(memory).map_err(bad_ring)?.next();
        if chain.is_some() || self.available(memory)? == 0 {
            return Ok(chain);
        }
        // It may have come meanwhile; else the ring is where nothing can be read any more.
        let gone = || ChainError("Bad ring: available entries are in no memory".into());
        self.queue.iter(memory).map_err(bad_ring)?.next().map(Some).ok_or_else(gone)
    }

    /// Puts back the last `count` chains that were taken.
    pub(super) fn put_back(&mut self, count: u16) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(count));
    }

    /// Number of chains that are available now.
    pub(super) fn available(&self, memory: &GuestMemoryMmap) -> Result<u16, ChainError> {
        let end = self.queue.avail_idx(memory, Ordering::Acquire).map_err(bad_ring)?;
        Ok(end.0.wrapping_sub(self.queue.next_avail()))
    }

    /// Gives the chain with this head back, `written` bytes of whose device-writable part have been written.
    pub(super) fn add_used(
        &mut self,
        memory: &GuestMemoryMmap,
        head: u16,
        written: u32,
    ) -> Result<(), ChainError> {
        self.queue.add_used(memory, head, written).map_err(bad_ring)
    }

    /// Interrupts the driver if it wants to know of what was given back since the last call.
    pub(super) fn notify_driver(&mut self, memory: &GuestMemoryMmap) -> Result<(), ChainError> {
        if self.queue.needs_notification(memory).map_err(bad_ring)? {
            self.interrupt.trigger().map_err(|e| ChainError(format!("Cannot interrupt the guest: {e}")))?;
        }
        Ok(())
    }

    /// Asks the driver not to ring.
    pub(super) fn ignore_driver(&mut self, memory: &GuestMemoryMmap) -> Result<(), ChainError> {
        self.queue.disable_notification(memory).map_err(bad_ring)
    }

    /// Asks the driver to ring; true if there are chains already, for which it may not have rung.
    pub(super) fn listen_to_driver(&mut self, memory: &GuestMemoryMmap) -> Result<bool, ChainError> {
        self.queue.enable_notification(memory).map_err(bad_ring)
    }

    /// Takes note of the doorbell.
    pub(super) fn silence_doorbell(&self) {
        // Non-blocking: a spurious wake-up finds nothing to read and does no harm.
        let _ = self.doorbell.read();
    }
}
