//! What a virtio device is to its transport: [`VirtioDevice`]; and what the transport hands over when the driver has
//! set DRIVER_OK: [`Activation`], everything that the device needs to run, in one structure.

use std::io;
use std::sync::Arc;

use virtio_queue::Queue;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::interrupt::Interrupt;

/// The guest's memory as devices reach it by descriptor: RAM, and the DAX windows of all shares. It changes when the
/// guest moves a BAR with a window, so take a snapshot (`memory()`) for each batch of work and keep it no longer.
pub type DeviceMemory = GuestMemoryAtomic<GuestMemoryMmap>;

/// A virtio device behind a transport.
///
/// The transport calls it from vCPU threads under its own lock, one call at a time. The device's work is done on
/// threads of its own, started by `activate` and ended by `reset`.
pub trait VirtioDevice: Send {
    /// The device type (virtio 1.2, section 5), for example 26 for a file system.
    fn device_type(&self) -> u32;

    /// The largest size of each queue, in descriptors, powers of two; as many as the device has queues.
    fn queue_max_sizes(&self) -> &[u16];

    /// The feature bits that the device offers beside those of the transport (VERSION_1, ring features).
    fn features(&self) -> u64 {
        0
    }

    /// Reads `data.len()` bytes of the device's configuration space at `offset`; what lies beyond it reads as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes to the device's configuration space; ignored where it is read-only.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The shared memory regions of the device (virtio 1.2, section 2.10).
    fn shared_memory(&self) -> Option<SharedMemory> {
        None
    }

    /// Starts the device with what the driver has set up.
    ///
    /// # Errors
    /// Whatever keeps the device from running (a thread that cannot start); the transport sets DEVICE_NEEDS_RESET.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops the device. When this returns no thread of it touches guest memory or raises an interrupt any more, and
    /// it can be activated again.
    fn reset(&mut self);
}

/// What a device cannot run without.
pub struct Activation {
    /// The guest's memory.
    pub memory: DeviceMemory,
    /// The feature bits that driver and device agreed on.
    pub features: u64,
    /// The queues that the driver enabled. Their order is that of their indices, which need not be contiguous.
    pub queues: Vec<ActiveQueue>,
    /// Sets DEVICE_NEEDS_RESET and tells the driver, for when a queue can no longer be served.
    pub needs_reset: Arc<dyn Fn() + Send + Sync>,
}

/// A queue that the driver enabled, with its two bells.
pub struct ActiveQueue {
    /// The queue's index on the device.
    pub index: u16,
    /// The queue; its addresses and size have been checked against guest memory.
    pub queue: Queue,
    /// Signalled when the driver has made buffers available.
    pub doorbell: EventFd,
    /// Tells the driver that buffers have been used.
    pub interrupt: Arc<dyn Interrupt>,
}

/// Why a device could not start.
#[derive(Debug, thiserror::Error)]
#[error("Cannot start the device: {reason}")]
pub struct ActivateError {
    /// What was being done.
    pub reason: String,
    /// What the system said.
    #[source]
    pub source: Option<io::Error>,
}

/// What [`VirtioDevice::read_config`] does for a device whose configuration space is `space`.
pub(super) fn read_config_space(space: &[u8], offset: u64, data: &mut [u8]) {
    let rest = usize::try_from(offset).ok().and_then(|offset| space.get(offset..)).unwrap_or_default();
    let len = rest.len().min(data.len());
    data[..len].copy_from_slice(&rest[..len]);
    data[len..].fill(0);
}

/// A region of host memory that the transport shows to the driver as shared memory region `id`.
#[derive(Clone)]
pub struct SharedMemory {
    /// The region's identifier (`shmid`); 0 is the DAX window of a virtio-fs device.
    pub id: u8,
    /// The memory.
    pub memory: Arc<dyn HostMemory>,
}

/// A range of the process's address space that stays where it is as long as the object lives.
pub trait HostMemory: Send + Sync {
    /// Host-virtual address of the first byte, aligned to 2 MiB.
    fn host_address(&self) -> *mut u8;
    /// Length in bytes, a multiple of 2 MiB.
    fn size(&self) -> u64;

    /// Whether there is anything in it that the host could take away.
    fn is_used(&self) -> bool {
        false
    }

    /// Tells it that the guest sees it from now on, and by what pages can be put in the guest's reach; or, with `None`, that
    /// the guest will not see it any more. Nothing is asked of the old object once this returns.
    fn set_nested_paging(&self, _nested: Option<Arc<dyn NestedPaging>>) {}

    /// Makes the page at `offset` accessible again, to be read or to be written, if the host cannot provide it any more.
    /// A vCPU that could not access it, or seems to wait for it in vain, tries again after that.
    fn repair(&self, _offset: u64, _write: bool) -> Repair {
        Repair::Unneeded
    }
}

/// The page tables by which the CPU finds a [`HostMemory`] for the guest (EPT, NPT). The hypervisor fills them as the guest
/// touches one page after the other, which takes it out of the guest each time.
pub trait NestedPaging: Send + Sync {
    /// Fills them for `len` bytes at `offset` of the memory, both whole pages. What the host has no page for at hand it
    /// fetches, as for an access that reads. Returns how many bytes the guest finds now, from `offset` on.
    ///
    /// # Errors
    /// EOPNOTSUPP if the hypervisor cannot do that; EFAULT or ENOENT if there is no page at `offset`.
    fn prefault(&self, offset: u64, len: u64) -> io::Result<u64>;
}

/// What [`HostMemory::repair`] came to.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Repair {
    /// Nothing is wrong with the page, or not any more.
    Unneeded,
    /// The page is another one now.
    Done,
    /// The page cannot be accessed; why not.
    Impossible(String),
}
