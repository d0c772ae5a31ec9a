//! What the fuzz target calls (fuzz/), and the unit tests with inputs of their own: a driver that accesses configuration
//! space and registers in any way, with a model of where BARs answer and a device that checks what it is started with.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use arbitrary::Unstructured;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryMmap};

use super::VirtioPciDevice;
use super::capabilities::{COMMON, DEVICE, ISR, MSIX_PENDING, MSIX_TABLE, NOTIFY};
use crate::bus::{Bus, BusDevice};
use crate::pci::{Bar, BarMapper, ConfigPorts, Ecam, MsiMessage, MsiRouter, PciBus};
use crate::virtio::device::{
    ActivateError, Activation, DeviceMemory, HostMemory, SharedMemory, VirtioDevice, read_config_space,
};

/// Guest RAM.
const MEMORY: u64 = 0x10_0000;
/// Where BARs are at first, and where the model lets them be.
const HOLE: Range<u64> = 0xc000_0000..0x1_0000_0000;
const SIZES: [u16; 3] = [16, 64, 256];
const OFFERED: u64 = 1 << 5 | 1 << 33;

/// What the device has seen.
#[derive(Default)]
struct Seen {
    is_active: AtomicBool,
    vectors: AtomicU64,
    start_again: Mutex<Option<Arc<dyn Fn() + Send + Sync>>>,
}

/// A device that checks that the transport keeps to the rules.
struct Checker(Arc<Seen>);

impl VirtioDevice for Checker {
    fn device_type(&self) -> u32 {
        26
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &SIZES
    }

    fn features(&self) -> u64 {
        OFFERED
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&[7; 40], offset, data);
    }

    fn shared_memory(&self) -> Option<SharedMemory> {
        Some(SharedMemory { id: 0, memory: Arc::new(Window) })
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        assert!(!self.0.is_active.swap(true, Ordering::SeqCst), "started twice");
        let offered = OFFERED | 1 << VIRTIO_F_VERSION_1 | 1 << 28 | 1 << 29;
        assert_eq!(activation.features & !offered, 0);
        assert_ne!(activation.features & 1 << VIRTIO_F_VERSION_1, 0);
        let memory = activation.memory.memory();
        for queue in &activation.queues {
            let (index, queue) = (usize::from(queue.index), &queue.queue);
            assert!(queue.ready() && queue.is_valid(&*memory));
            assert!(queue.size().is_power_of_two() && queue.size() <= SIZES[index]);
        }
        // Interrupts of every queue, whatever the driver made of the vectors.
        activation.queues.iter().for_each(|queue| queue.interrupt.trigger().unwrap());
        *self.0.start_again.lock().unwrap() = Some(activation.needs_reset);
        Ok(())
    }

    fn reset(&mut self) {
        self.0.is_active.store(false, Ordering::SeqCst);
        *self.0.start_again.lock().unwrap() = None;
    }
}

/// A window that nobody looks into.
struct Window;

impl HostMemory for Window {
    fn host_address(&self) -> *mut u8 {
        std::ptr::without_provenance_mut(2 << 20)
    }

    fn size(&self) -> u64 {
        2 << 20
    }
}

impl MsiRouter for Seen {
    fn route(&self, vector: u16, _: MsiMessage) -> io::Result<()> {
        assert!(usize::from(vector) <= SIZES.len());
        self.vectors.fetch_or(1 << vector, Ordering::SeqCst);
        Ok(())
    }

    fn deliver(&self, vector: u16) -> io::Result<()> {
        assert_ne!(self.vectors.load(Ordering::SeqCst) & 1 << vector, 0, "vector {vector} leads nowhere");
        Ok(())
    }
}

/// Lets BARs be in the hole, not over one another.
#[derive(Default)]
struct Mapper {
    mapped: Mutex<BTreeMap<u64, (u8, u64)>>,
    bus: Bus,
}

impl BarMapper for Mapper {
    fn map(&self, bar: &Bar, address: u64, registers: Arc<dyn BusDevice>) -> io::Result<()> {
        assert!(address.is_multiple_of(bar.size), "BAR {} at {address:#x}", bar.index);
        let mut mapped = self.mapped.lock().unwrap();
        let end = address.checked_add(bar.size).filter(|end| address >= HOLE.start && *end <= HOLE.end);
        let end = end.ok_or(io::ErrorKind::AddrNotAvailable)?;
        if mapped.iter().any(|(start, (_, size))| *start < end && address < start + size) {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        assert!(mapped.values().all(|(index, _)| *index != bar.index), "BAR {} answers twice", bar.index);
        mapped.insert(address, (bar.index, bar.size));
        self.bus.insert(address, bar.size, registers).map_err(io::Error::other)
    }

    fn unmap(&self, bar: &Bar, address: u64) {
        let gone = self.mapped.lock().unwrap().remove(&address);
        assert_eq!(gone, Some((bar.index, bar.size)));
        self.bus.remove(address);
    }
}

/// Any accesses leave the transport in a state that the specification knows.
pub fn registers(data: &[u8]) {
    let mut source = Unstructured::new(data);
    let (seen, mapper) = (Arc::new(Seen::default()), Arc::new(Mapper::default()));
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
    let mut next = HOLE.start;
    let device = VirtioPciDevice::new(
        Box::new(Checker(Arc::clone(&seen))),
        DeviceMemory::new(memory),
        |_| Ok(Arc::clone(&seen) as Arc<dyn MsiRouter>),
        |size, _| {
            let place = next.next_multiple_of(size);
            next = place + size;
            Some(place)
        },
    );
    let bus = Arc::new(PciBus::new(Arc::clone(&mapper) as Arc<dyn BarMapper>));
    bus.insert(1, Arc::new(Mutex::new(device.unwrap())));
    let mut driver =
        Driver { seen, ecam: Ecam(Arc::clone(&bus)), ports: ConfigPorts::new(bus), mapper, status: 0 };
    for _ in 0..256 {
        if source.is_empty() {
            break;
        }
        driver.act(&mut source);
    }
    driver.write_config(4, &[2, 0]);
    driver.write_register(COMMON.0 + 20, &[0]);
}

struct Driver {
    seen: Arc<Seen>,
    ecam: Ecam,
    ports: ConfigPorts,
    mapper: Arc<Mapper>,
    status: u8,
}

impl Driver {
    fn act(&mut self, source: &mut Unstructured<'_>) {
        let value: u64 = if take(source) { take(source) } else { take::<u16>(source).into() };
        let len = [1, 2, 4, 8, 4, 2][usize::from(take::<u8>(source) % 6)];
        let bytes = &value.to_le_bytes()[..len];
        match take::<u8>(source) % 16 {
            0 => self.write_config(take::<u8>(source).into(), bytes),
            1 => self.ecam.write((1 << 15) + u64::from(take::<u16>(source) & 0x7fff), bytes),
            2 => self.ecam.read(take::<u32>(source) as u64 % Ecam::SIZE, &mut [0; 8][..len]),
            3 => self.ports.write(u64::from(take::<u8>(source) % 8), bytes),
            4 => self.ports.read(u64::from(take::<u8>(source) % 8), &mut [0; 8][..len]),
            5 => {
                // A BAR is put somewhere.
                let bar = 0x10 + 4 * u64::from(take::<u8>(source) % 6);
                let places = [HOLE.start, 0, 1 << 20, HOLE.start + 0x8000, 0xffff_8000, 0xfee0_0000, value];
                let place = places[usize::from(take::<u8>(source)) % places.len()];
                self.write_config(bar, &place.to_le_bytes());
            }
            6 => self.write_config(4, &[take::<u8>(source), 0]),
            7 => self.set_up(source),
            8 => {
                let start = self.seen.start_again.lock().unwrap().clone();
                start.iter().for_each(|needs_reset| needs_reset());
            }
            9 => self.enable_msix(source),
            10 => {
                let mut data = [0; 8];
                self.mapper.bus.read(self.register(source), &mut data[..len]);
            }
            11..14 => self.write_register(COMMON.0 + u64::from(take::<u8>(source) % 64), bytes),
            14 => {
                // Two steps of the driver in any order, and back.
                self.write_register(COMMON.0 + 20, &[take::<u8>(source) & 0x8f]);
            }
            _ => drop(self.mapper.bus.write(self.register(source), bytes)),
        }
        self.check();
    }

    /// The status has only bits that follow from one another.
    fn check(&mut self) {
        let mut status = [0];
        if !self.read_common(20, &mut status) {
            return;
        }
        let status = status[0];
        let is_active = self.seen.is_active.load(Ordering::SeqCst);
        assert!(status & 2 == 0 || status & 1 != 0, "{status:#x}");
        assert!(status & 8 == 0 || status & 2 != 0, "{status:#x}");
        assert!(status & 4 == 0 || status & 8 != 0, "{status:#x}");
        assert!(!is_active || status & 4 != 0, "it runs without DRIVER_OK: {status:#x}");
        self.status = status;
    }

    /// As a driver does it, but for what is taken from the input.
    fn set_up(&mut self, source: &mut Unstructured<'_>) {
        let steps = take::<u8>(source) % 6;
        self.write_config(4, &[6, 0]);
        for status in [0, 1, 3] {
            self.write_register(COMMON.0 + 20, &[status]);
        }
        for select in 0..2u32 {
            self.write_register(COMMON.0 + 8, &select.to_le_bytes());
            let features = [0x3000_0020 & take::<u32>(source), 1][select as usize];
            self.write_register(COMMON.0 + 12, &features.to_le_bytes());
        }
        self.write_register(COMMON.0 + 20, &[11]);
        for queue in 0..u16::from(steps) {
            self.write_register(COMMON.0 + 22, &queue.to_le_bytes());
            let size = [16u16, 8, 4, 0, 3, 0x8000][usize::from(take::<u8>(source)) % 6];
            self.write_register(COMMON.0 + 24, &size.to_le_bytes());
            self.write_register(COMMON.0 + 26, &u16::to_le_bytes(take::<u8>(source).into()));
            for (offset, place) in [(32, 0x1000u64), (40, 0x2000), (48, 0x3000)] {
                let place = match take::<u8>(source) % 8 {
                    0 => take(source),
                    1 => MEMORY - u64::from(take::<u8>(source)),
                    _ => place + 0x4000 * u64::from(queue),
                };
                self.write_register(COMMON.0 + offset, &place.to_le_bytes());
            }
            self.write_register(COMMON.0 + 28, &[1, 0]);
        }
        self.write_register(COMMON.0 + 20, &[15]);
    }

    fn enable_msix(&mut self, source: &mut Unstructured<'_>) {
        let vector = u64::from(take::<u8>(source) % 6);
        let masked = take::<u8>(source) % 3;
        self.write_register(MSIX_TABLE.0 + 16 * vector, &0xfee0_0000u64.to_le_bytes());
        self.write_register(MSIX_TABLE.0 + 16 * vector + 8, &u64::from(masked).to_le_bytes());
        for capability in 0x40..0x100 {
            let mut id = [0; 2];
            self.ecam.read((1 << 15) + capability, &mut id);
            if id[0] == 0x11 {
                return self.write_config(capability + 2, &[0, [0x80, 0xc0, 0][usize::from(masked)]]);
            }
        }
    }

    /// An address in or beside a group of registers.
    fn register(&self, source: &mut Unstructured<'_>) -> u64 {
        let groups = [COMMON, DEVICE, ISR, NOTIFY, MSIX_TABLE, MSIX_PENDING];
        let (start, length) = groups[usize::from(take::<u8>(source)) % groups.len()];
        self.registers().unwrap_or(HOLE.start) + start + u64::from(take::<u16>(source)) % (length + 16)
    }

    /// Where the registers are now.
    fn registers(&self) -> Option<u64> {
        let mapped = self.mapper.mapped.lock().unwrap();
        mapped.iter().find(|(_, (index, _))| *index == 0).map(|(address, _)| *address)
    }

    fn read_common(&self, offset: u64, data: &mut [u8]) -> bool {
        self.registers().is_some_and(|at| self.mapper.bus.read(at + COMMON.0 + offset, data))
    }

    fn write_register(&self, offset: u64, data: &[u8]) {
        if let Some(at) = self.registers() {
            self.mapper.bus.write(at + offset, data);
        }
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        self.ecam.write((1 << 15) + offset, data);
    }
}

/// A number from `source`, or zero when it is used up.
fn take<'a, T: arbitrary::Arbitrary<'a> + Default>(source: &mut Unstructured<'a>) -> T {
    source.arbitrary().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    #[test]
    fn any_accesses_leave_a_state_that_the_specification_knows() {
        crate::fuzzing::exercise("registers", 1000, super::registers);
    }
}
