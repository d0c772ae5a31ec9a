//! A fake guest driver: rings in a guest memory of its own, which it fills with chains of any kind. For the unit tests, and,
//! with the feature `testing`, for benchmarks and for tests that are programs of their own.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::device::{Activation, ActiveQueue, DeviceMemory, VirtioDevice};
use crate::interrupt::Interrupt;

/// Bytes of the guest's memory.
pub const MEMORY_SIZE: u64 = 16 << 20;
/// Where the tests may put their buffers: below it are the rings.
pub const BUFFERS: u64 = 1 << 20;
/// Where the rings are, one after the other.
const RINGS: u64 = 0x4000;

/// Counts interrupts.
#[derive(Default)]
pub struct Bell(AtomicUsize);

impl Bell {
    /// Interrupts so far.
    pub fn count(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

impl Interrupt for Bell {
    fn trigger(&self) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// Waits until `condition` holds, for 20 s at most.
pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(20), "timed out waiting for {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// A buffer that the device may only read.
pub fn readable(address: u64, len: u32) -> Descriptor {
    Descriptor::new(address, len, 0, 0)
}

/// A buffer that the device may only write.
pub fn writable(address: u64, len: u32) -> Descriptor {
    Descriptor::new(address, len, VRING_DESC_F_WRITE as u16, 0)
}

/// The driver's side of a ring: the descriptor table at `base`, then the available ring, then the used ring.
struct Ring {
    base: u64,
    size: u16,
    next_descriptor: u16,
    available: u16,
    used: u16,
    doorbell: EventFd,
    bell: Arc<Bell>,
}

/// A driver with the rings of one device.
pub struct FakeDriver {
    /// The guest's memory.
    pub memory: GuestMemoryMmap,
    rings: Vec<Ring>,
    resets: Arc<AtomicUsize>,
}

impl FakeDriver {
    /// A driver that has rings for `device` and has set it up with `features`, and has put nothing into them.
    pub fn new(device: &mut dyn VirtioDevice, features: u64) -> FakeDriver {
        let driver = FakeDriver::idle(device.queue_max_sizes());
        driver.activate(device, features);
        driver
    }

    /// A driver that has rings of these sizes, and has not told the device of them.
    pub fn idle(sizes: &[u16]) -> FakeDriver {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_SIZE as usize)]).unwrap();
        let mut base = RINGS;
        let ring = |size: &u16| {
            let ring = Ring {
                base,
                size: *size,
                next_descriptor: 0,
                available: 0,
                used: 0,
                doorbell: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
                bell: Arc::default(),
            };
            base = ring.end().next_multiple_of(4096);
            ring
        };
        let rings = sizes.iter().map(ring).collect();
        assert!(base <= BUFFERS, "the rings do not fit below the buffers");
        FakeDriver { memory, rings, resets: Arc::default() }
    }

    /// Sets the device up.
    pub fn activate(&self, device: &mut dyn VirtioDevice, features: u64) {
        let resets = Arc::clone(&self.resets);
        let active = |(index, ring): (u16, &Ring)| ActiveQueue {
            index,
            queue: ring.queue(),
            doorbell: ring.doorbell.try_clone().unwrap(),
            interrupt: ring.bell.clone(),
        };
        let activation = Activation {
            memory: DeviceMemory::new(self.memory.clone()),
            features,
            queues: (0..).zip(&self.rings).map(active).collect(),
            needs_reset: Arc::new(move || {
                resets.fetch_add(1, Ordering::SeqCst);
            }),
        };
        device.activate(activation).unwrap();
    }

    /// Makes a chain available and rings; returns its head.
    pub fn send(&mut self, queue: usize, descriptors: &[Descriptor]) -> u16 {
        let head = self.add(queue, descriptors);
        self.ring(queue);
        head
    }

    /// Makes a chain available; returns its head. Its descriptors must not be in use any more.
    pub fn add(&mut self, queue: usize, descriptors: &[Descriptor]) -> u16 {
        let ring = &mut self.rings[queue];
        let head = ring.next_descriptor;
        for (i, descriptor) in descriptors.iter().enumerate() {
            let at = (ring.next_descriptor + i as u16) % ring.size;
            let last = i + 1 == descriptors.len();
            let next = if last { 0 } else { VRING_DESC_F_NEXT as u16 };
            let descriptor = Descriptor::new(
                descriptor.addr().raw_value(),
                descriptor.len(),
                descriptor.flags() | next,
                (at + 1) % ring.size,
            );
            let raw = virtio_queue::desc::RawDescriptor::from(descriptor);
            self.memory.write_obj(raw, GuestAddress(ring.base + 16 * u64::from(at))).unwrap();
        }
        ring.next_descriptor = (ring.next_descriptor + descriptors.len() as u16) % ring.size;
        self.memory.write_obj(head, GuestAddress(ring.avail_entry(ring.available))).unwrap();
        ring.available = ring.available.wrapping_add(1);
        self.memory.store(ring.available, GuestAddress(ring.avail() + 2), Ordering::Release).unwrap();
        head
    }

    /// Where a queue's descriptor table is.
    #[cfg(test)]
    pub fn table(&self, queue: usize) -> u64 {
        self.rings[queue].base
    }

    /// Where its available ring is.
    #[cfg(test)]
    pub fn available_ring(&self, queue: usize) -> u64 {
        self.rings[queue].avail()
    }

    /// Rings for what was made available.
    pub fn ring(&self, queue: usize) {
        self.rings[queue].doorbell.write(1).unwrap();
    }

    /// The next chain that the device has given back: its head and the bytes written.
    pub fn used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let ring = &mut self.rings[queue];
        let end: u16 = self.memory.load(GuestAddress(ring.used_ring() + 2), Ordering::Acquire).unwrap();
        if end == ring.used {
            return None;
        }
        let entry = ring.used_ring() + 4 + 8 * u64::from(ring.used % ring.size);
        ring.used = ring.used.wrapping_add(1);
        let [head, len]: [u32; 2] = self.memory.read_obj(GuestAddress(entry)).unwrap();
        Some((head as u16, len))
    }

    /// Waits for [`FakeDriver::used`].
    pub fn wait_used(&mut self, queue: usize) -> (u16, u32) {
        let mut used = None;
        wait_for("a used buffer", || {
            used = self.used(queue);
            used.is_some()
        });
        used.unwrap()
    }

    /// Interrupts of a queue so far.
    pub fn interrupts(&self, queue: usize) -> usize {
        self.rings[queue].bell.count()
    }

    /// Times that the device has asked for a reset.
    pub fn resets(&self) -> usize {
        self.resets.load(Ordering::SeqCst)
    }

    /// Where a guest address is in this process.
    pub fn host_address(&self, address: u64) -> *mut u8 {
        self.memory.get_host_address(GuestAddress(address)).unwrap()
    }

    /// Writes to guest memory.
    pub fn write(&self, address: u64, data: &[u8]) {
        self.memory.write_slice(data, GuestAddress(address)).unwrap();
    }

    /// Reads from guest memory.
    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }
}

impl Ring {
    fn avail(&self) -> u64 {
        self.base + 16 * u64::from(self.size)
    }

    fn avail_entry(&self, index: u16) -> u64 {
        self.avail() + 4 + 2 * u64::from(index % self.size)
    }

    fn used_ring(&self) -> u64 {
        (self.avail() + 6 + 2 * u64::from(self.size)).next_multiple_of(8)
    }

    /// The first byte behind it.
    fn end(&self) -> u64 {
        self.used_ring() + 6 + 8 * u64::from(self.size)
    }

    fn queue(&self) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.set_size(self.size);
        queue.try_set_desc_table_address(GuestAddress(self.base)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(self.avail())).unwrap();
        queue.try_set_used_ring_address(GuestAddress(self.used_ring())).unwrap();
        queue.set_ready(true);
        queue
    }
}
