//! The virtio-rng device (virtio 1.2, section 5.4): gives the guest entropy of the host.

use std::io;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_queue::DescriptorChain;
use vm_memory::GuestMemoryMmap;

use super::buffers::IoVectors;
use super::device::{ActivateError, Activation, VirtioDevice};
use super::thread::ThreadKind;
use super::worker::{ChainError, ChainHandler, QueueWorkers};

/// Linux asks for 64 bytes at a time.
const QUEUE_SIZES: [u16; 1] = [16];
/// The most bytes that a request gets; the driver asks again if it wants more.
pub const MAX_REQUEST: usize = 64 << 10;

/// A virtio-rng device.
#[derive(Default)]
pub struct RngDevice {
    workers: QueueWorkers,
}

impl VirtioDevice for RngDevice {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.workers.start(ThreadKind::Data, "the entropy source", activation, |_| ("rng".into(), Entropy))
    }

    fn reset(&mut self) {
        self.workers.stop();
    }
}

/// Fills buffers.
pub(super) struct Entropy;

impl ChainHandler for Entropy {
    fn handle(
        &mut self,
        memory: &GuestMemoryMmap,
        chain: DescriptorChain<&GuestMemoryMmap>,
    ) -> Result<u32, ChainError> {
        let mut buffers = IoVectors::new();
        buffers.push_writable(memory, chain)?;
        buffers.truncate(MAX_REQUEST);
        let wanted = buffers.bytes();
        while buffers.bytes() > 0 {
            match buffers.fill_randomly() {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    // Most likely memory that is not there. The driver sees how far it went.
                    tracing::warn!(%error, "The guest gets less entropy than it asked for");
                    break;
                }
            }
        }
        Ok((wanted - buffers.bytes()) as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{BUFFERS, FakeDriver, MEMORY_SIZE, readable, wait_for, writable};

    fn driver() -> (RngDevice, FakeDriver) {
        let mut device = RngDevice::default();
        let driver = FakeDriver::new(&mut device, 0);
        (device, driver)
    }

    #[test]
    fn all_buffers_of_a_request_are_filled_and_nothing_else() {
        let (_device, mut driver) = driver();
        let lens = [64u32, 0, 1, 1000, 4096];
        let mut at = BUFFERS;
        let mut chain = Vec::new();
        for len in lens {
            chain.push(writable(at, len));
            at += u64::from(len) + 64;
        }
        driver.send(0, &chain);
        assert_eq!(driver.wait_used(0).1, lens.iter().sum::<u32>());
        let mut at = BUFFERS;
        for len in lens {
            let data = driver.read(at, len as usize + 64);
            let (filled, between) = data.split_at(len as usize);
            // One byte of zero in a row of 64 is likely, 48 are not.
            assert!(
                len < 64 || filled.chunks_exact(64).all(|row| row.iter().filter(|b| **b == 0).count() < 16)
            );
            assert!(between.iter().all(|byte| *byte == 0));
            at += u64::from(len) + 64;
        }
    }

    #[test]
    fn a_request_is_bounded_and_what_is_not_writable_is_left_alone() {
        let (_device, mut driver) = driver();
        driver.send(0, &[writable(BUFFERS, 1 << 20), writable(BUFFERS + (1 << 20), 1 << 20)]);
        assert_eq!(driver.wait_used(0).1 as usize, MAX_REQUEST);
        assert!(driver.read(BUFFERS + MAX_REQUEST as u64, 4096).iter().all(|byte| *byte == 0));
        for chain in [[readable(BUFFERS + (2 << 20), 64)], [writable(BUFFERS + (2 << 20), 0)]] {
            driver.send(0, &chain);
            assert_eq!(driver.wait_used(0).1, 0);
        }
        assert_eq!(driver.read(BUFFERS + (2 << 20), 64), [0; 64]);
    }

    #[test]
    fn a_buffer_outside_of_memory_needs_a_reset_and_the_device_works_after_it() {
        let (mut device, mut driver) = driver();
        driver.send(0, &[writable(MEMORY_SIZE - 1, 2)]);
        wait_for("the call for a reset", || driver.resets() == 1);
        device.reset();
        driver = FakeDriver::new(&mut device, 0);
        driver.send(0, &[writable(BUFFERS, 64)]);
        assert_eq!(driver.wait_used(0).1, 64);
        wait_for("the interrupt", || driver.interrupts(0) == 1);
        assert_eq!(driver.resets(), 0);
    }

    #[test]
    fn memory_that_cannot_be_written_ends_a_request_early() {
        let (_device, mut driver) = driver();
        let address = driver.host_address(BUFFERS + 4096);
        // SAFETY: the page is part of the driver's memory, into which nobody holds a reference.
        assert_eq!(unsafe { libc::mprotect(address.cast(), 4096, libc::PROT_READ) }, 0);
        driver.send(0, &[writable(BUFFERS + 4000, 96), writable(BUFFERS + 4096, 64)]);
        assert_eq!(driver.wait_used(0).1, 96);
        driver.send(0, &[writable(BUFFERS, 64)]);
        assert_eq!(driver.wait_used(0).1, 64);
    }
}
