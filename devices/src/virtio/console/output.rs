//! From the guest: what is in a port's output queue goes to the port's output.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use vm_memory::GuestMemoryMmap;

use super::port::{PortState, PortsHandle};
use crate::virtio::buffers::{IoVectors, MAX_VECTORS};
use crate::virtio::device::{ActiveQueue, DeviceMemory};
use crate::virtio::thread::Stop;
use crate::virtio::worker::{ChainError, serve};

/// Chains are gathered into one system call up to so many bytes: several times what a pipe holds, and little enough that
/// a driver which waits for room does not wait for long.
const BATCH_BYTES: usize = 256 << 10;

/// The output of one port.
pub(super) struct Output {
    ports: PortsHandle,
    index: usize,
    /// Where data goes; none when it is discarded.
    file: Option<Arc<OwnedFd>>,
    /// The request to drain that is being fulfilled, and how many of the chains that were there are left.
    drain: Option<(u64, u16)>,
    heads: Vec<u16>,
}

impl Output {
    /// The output of the port `index`.
    pub fn new(ports: PortsHandle, index: usize, file: Option<Arc<OwnedFd>>) -> Output {
        let file = file.filter(|_| !ports.ports[index].is_output_closed());
        Output { ports, index, file, drain: None, heads: Vec::new() }
    }

    fn port(&self) -> &PortState {
        &self.ports.ports[self.index]
    }

    /// Serves the queue until `stop` is set.
    ///
    /// # Errors
    /// The guest breaks the rules of rings.
    pub fn run(mut self, queue: ActiveQueue, memory: &DeviceMemory, stop: &Stop) -> Result<(), ChainError> {
        let ports = self.ports.clone();
        let result = serve(queue, memory, stop, |queue, memory| self.batch(queue, memory, stop));
        ports.ports[self.index].end_output();
        result
    }

    /// Consumes what is available, up to a batch; false if there was nothing.
    pub(super) fn batch(
        &mut self,
        queue: &mut ActiveQueue,
        memory: &GuestMemoryMmap,
        stop: &Stop,
    ) -> Result<bool, ChainError> {
        if self.drain.is_none()
            && let Some(request) = self.port().drain_request()
        {
            self.drain = Some((request, queue.available(memory)?));
        }
        let mut data = IoVectors::new();
        self.heads.clear();
        // Not those that come meanwhile: a driver could make empty ones as fast as they are taken.
        let available = queue.available(memory)?.into();
        while self.heads.len() < available
            && data.bytes() < BATCH_BYTES
            && data.count() < MAX_VECTORS
            && let Some(chain) = queue.next_chain(memory)?
        {
            self.heads.push(chain.head_index());
            data.push_readable(memory, chain)?;
        }
        self.write(&mut data, stop)?;
        if data.bytes() > 0 {
            // Stopped meanwhile: nobody waits for the chains any more.
            return Ok(false);
        }
        for head in &self.heads {
            queue.add_used(memory, *head, 0)?;
        }
        if !self.heads.is_empty() {
            queue.notify_driver(memory)?;
        }
        if let Some((request, left)) = self.drain {
            let left = left.saturating_sub(self.heads.len() as u16);
            self.drain = (left > 0).then_some((request, left));
            if left == 0 {
                self.port().fulfil_drain(request);
            }
        }
        Ok(!self.heads.is_empty())
    }

    /// Writes or discards `data`; leaves some of it only when `stop` is set.
    fn write(&mut self, data: &mut IoVectors, stop: &Stop) -> Result<(), ChainError> {
        while data.bytes() > 0 && !stop.is_set() {
            let Some(file) = self.file.clone() else {
                data.advance(data.bytes());
                return Ok(());
            };
            match data.write_to(file.as_fd()) {
                Ok(0) => self.close(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    self.port().bytes_out.fetch_add(written as u64, Relaxed);
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::EAGAIN) => wait_for_room(file.as_fd(), stop)?,
                    Some(libc::EFAULT) => {
                        let lost = data.skip_vector();
                        tracing::warn!(
                            port = self.port().name,
                            lost,
                            "The guest sends memory that is not there"
                        );
                    }
                    _ => self.close(error),
                },
            }
        }
        Ok(())
    }

    /// Discards everything from now on.
    fn close(&mut self, error: io::Error) {
        self.file = None;
        self.port().set_output_closed();
        tracing::debug!(port = self.port().name, %error, "Output is discarded from now on");
        self.ports.closed.report(&self.port().name, error);
    }
}

/// Waits where somebody else has made the file description non-blocking.
fn wait_for_room(file: BorrowedFd, stop: &Stop) -> Result<(), ChainError> {
    let waited = stop.wait([(file.as_raw_fd(), libc::POLLOUT)]);
    waited.map(drop).map_err(|error| ChainError(format!("Cannot wait for an output: {error}")))
}
