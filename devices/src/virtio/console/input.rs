//! To the guest: what comes from a port's input goes into the buffers of its input queue.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::port::{PortState, PortsHandle};
use crate::virtio::buffers::{IoVectors, MAX_VECTORS};
use crate::virtio::device::{ActiveQueue, DeviceMemory};
use crate::virtio::thread::Stop;
use crate::virtio::worker::{ChainError, cannot_wait};

/// The input of one port.
pub(super) struct Input {
    ports: PortsHandle,
    index: usize,
    file: Arc<OwnedFd>,
    /// Rung at the end of the input.
    ended: Arc<EventFd>,
}

impl Input {
    /// The input of the port `index`; `ended` is rung at its end.
    pub fn new(ports: PortsHandle, index: usize, file: Arc<OwnedFd>, ended: Arc<EventFd>) -> Input {
        Input { ports, index, file, ended }
    }

    fn port(&self) -> &PortState {
        &self.ports.ports[self.index]
    }

    /// Serves the queue until the input ends or `stop` is set.
    ///
    /// # Errors
    /// The guest breaks the rules of rings.
    pub fn run(self, mut queue: ActiveQueue, memory: &DeviceMemory, stop: &Stop) -> Result<(), ChainError> {
        let watched =
            |condition: bool, fd: &dyn AsRawFd| (if condition { fd.as_raw_fd() } else { -1 }, libc::POLLIN);
        while !self.port().has_input_ended() {
            let is_open = self.port().is_open();
            let has_room = is_open && has_buffers(&mut queue, &memory.memory())?;
            // Only when the guest can take something is the input looked at: others may read from it meanwhile.
            let events = [
                watched(true, &self.port().opened),
                watched(is_open && !has_room, &queue.doorbell),
                watched(has_room, &self.file),
            ];
            let Some([opened, rung, readable]) = stop.wait(events).map_err(cannot_wait)? else { break };
            if opened {
                // Non-blocking: what it tells is looked at anyway.
                let _ = self.port().opened.read();
            }
            if rung {
                queue.silence_doorbell();
            }
            if readable && self.port().is_open() && !self.batch(&mut queue, &memory.memory())? {
                self.port().set_input_ended();
                // Non-blocking, and it need only be readable.
                let _ = self.ended.write(1);
            }
        }
        Ok(())
    }

    /// Reads once into what buffers there are; false at the end of the input.
    pub(super) fn batch(
        &self,
        queue: &mut ActiveQueue,
        memory: &GuestMemoryMmap,
    ) -> Result<bool, ChainError> {
        let mut room = IoVectors::new();
        let mut chains = Vec::new();
        // Not those that come meanwhile: a driver could make chains without room as fast as they are given back.
        let mut available = queue.available(memory)?;
        while available > 0
            && room.count() < MAX_VECTORS
            && let Some(chain) = queue.next_chain(memory)?
        {
            available -= 1;
            let head = chain.head_index();
            match room.push_writable(memory, chain)? {
                0 if chains.is_empty() => queue.add_used(memory, head, 0)?,
                // In its turn: those before it may have to be put back.
                0 => {
                    queue.put_back(1);
                    break;
                }
                len => chains.push((head, len)),
            }
        }
        let mut is_end = false;
        let mut left = 0;
        let mut used = 0;
        if room.bytes() > 0 {
            match room.read_from(self.file.as_fd()) {
                Ok(0) => is_end = true,
                Ok(read) => left = read,
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR | libc::EAGAIN) => {}
                    Some(libc::EFAULT) => {
                        tracing::warn!(
                            port = self.port().name,
                            "The guest reads into memory that is not there"
                        );
                        queue.add_used(memory, chains[0].0, 0)?;
                        used = 1;
                    }
                    _ => {
                        tracing::warn!(port = self.port().name, %error, "Input ends, as it cannot be read");
                        is_end = true;
                    }
                },
            }
        }
        self.port().bytes_in.fetch_add(left as u64, Relaxed);
        while left > 0 {
            let (head, len) = chains[used];
            queue.add_used(memory, head, len.min(left) as u32)?;
            left -= len.min(left);
            used += 1;
        }
        queue.put_back((chains.len() - used) as u16);
        queue.notify_driver(memory)?;
        Ok(!is_end)
    }
}

/// Whether there are buffers; if not, the driver rings when it adds some.
pub(super) fn has_buffers(queue: &mut ActiveQueue, memory: &GuestMemoryMmap) -> Result<bool, ChainError> {
    if queue.available(memory)? > 0 {
        queue.ignore_driver(memory)?;
        return Ok(true);
    }
    queue.listen_to_driver(memory)
}
