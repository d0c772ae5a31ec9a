//! Bus 0: its functions, the host bridge, and the two ways to configuration space, ECAM and ports 0xcf8/0xcfc.

use std::sync::{Arc, Mutex, MutexGuard};

use super::bar::{Bar, BarMapper};
use super::config_space::{ConfigSpace, Identity, command};
use crate::bus::BusDevice;

/// Devices on a bus.
pub const DEVICES: usize = 32;
/// Bytes of ECAM space a function has.
const ECAM_FUNCTION_SIZE: u64 = 4096;

/// A PCI function. Calls come one at a time, under the lock of its slot.
pub trait PciDevice: Send {
    /// The function's configuration space.
    fn config(&self) -> &ConfigSpace;

    /// The guest reads configuration space.
    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        self.config().read(offset, data);
    }

    /// The guest writes configuration space.
    fn write_config(&mut self, offset: usize, data: &[u8]);

    /// The function's BARs.
    fn bars(&self) -> &[Bar];

    /// The guest reads registers behind a BAR.
    fn read_bar(&mut self, bar: u8, offset: u64, data: &mut [u8]);

    /// The guest writes registers behind a BAR.
    fn write_bar(&mut self, bar: u8, offset: u64, data: &[u8]);
}

/// A device slot, and where its BARs answer now.
struct Slot {
    device: Arc<Mutex<dyn PciDevice>>,
    /// For each BAR, the address at which it answers; none while decoding is off or the address is impossible.
    mapped: Vec<Option<u64>>,
}

/// Bus 0 of segment 0.
pub struct PciBus {
    slots: [Mutex<Option<Slot>>; DEVICES],
    mapper: Arc<dyn BarMapper>,
}

impl PciBus {
    /// A bus with nothing but the host bridge at device 0.
    pub fn new(mapper: Arc<dyn BarMapper>) -> PciBus {
        let bus = PciBus { slots: std::array::from_fn(|_| Mutex::new(None)), mapper };
        let bridge = HostBridge(ConfigSpace::new(HOST_BRIDGE));
        *bus.lock(0) = Some(Slot { device: Arc::new(Mutex::new(bridge)), mapped: Vec::new() });
        bus
    }

    /// Puts a function at device number `device`, 1 to 31. It answers once the guest enables it.
    ///
    /// # Panics
    /// When the slot does not exist or is taken: a mistake of the caller.
    pub fn insert(&self, device: u8, function: Arc<Mutex<dyn PciDevice>>) {
        let bars = lock(&function).bars().len();
        let mut slot = self.lock(usize::from(device));
        assert!(slot.is_none(), "PCI device {device} is taken");
        *slot = Some(Slot { device: function, mapped: vec![None; bars] });
    }

    /// Reads the configuration space of a device; all ones where there is none.
    pub fn read_config(&self, device: usize, offset: usize, data: &mut [u8]) {
        match &*self.lock(device) {
            Some(slot) => lock(&slot.device).read_config(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes the configuration space of a device, and moves its BARs when that asks for it.
    pub fn write_config(&self, device: usize, offset: usize, data: &[u8]) {
        if let Some(slot) = &mut *self.lock(device) {
            lock(&slot.device).write_config(offset, data);
            self.remap(device, slot);
        }
    }

    /// Brings the places where BARs answer in line with configuration space.
    fn remap(&self, device: usize, slot: &mut Slot) {
        let (wanted, bars): (Vec<Option<u64>>, Vec<Bar>) = {
            let function = lock(&slot.device);
            let config = function.config();
            let decoding = config.command() & command::MEMORY_SPACE != 0;
            let bars = function.bars();
            (bars.iter().map(|bar| decoding.then(|| config.bar_address(bar.index))).collect(), bars.to_vec())
        };
        if wanted == slot.mapped {
            return;
        }
        for (bar, (wanted, mapped)) in bars.iter().zip(wanted.into_iter().zip(&mut slot.mapped)) {
            if wanted == *mapped {
                continue;
            }
            if let Some(address) = mapped.take() {
                self.mapper.unmap(bar, address);
            }
            let Some(address) = wanted else { continue };
            let registers = Arc::new(Registers { device: Arc::clone(&slot.device), bar: bar.index });
            match self.mapper.map(bar, address, registers) {
                Ok(()) => *mapped = Some(address),
                Err(error) => {
                    tracing::warn!(device, bar = bar.index, address = format_args!("{address:#x}"), %error,
                        "The guest put a BAR where it cannot answer");
                }
            }
        }
    }

    fn lock(&self, device: usize) -> MutexGuard<'_, Option<Slot>> {
        lock(&self.slots[device])
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// The registers behind one BAR, as a device on the memory bus.
struct Registers {
    device: Arc<Mutex<dyn PciDevice>>,
    bar: u8,
}

impl BusDevice for Registers {
    fn read(&self, offset: u64, data: &mut [u8]) {
        lock(&self.device).read_bar(self.bar, offset, data);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        lock(&self.device).write_bar(self.bar, offset, data);
    }
}

/// The enhanced configuration access mechanism: one MiB of memory for the one bus there is.
pub struct Ecam(pub Arc<PciBus>);

impl Ecam {
    /// Bytes of address space: one bus.
    pub const SIZE: u64 = 1 << 20;

    /// Device and offset of an address; only function 0 of a device exists.
    fn decode(offset: u64) -> Option<(usize, usize)> {
        let (function, register) = (offset / ECAM_FUNCTION_SIZE, offset % ECAM_FUNCTION_SIZE);
        (function % 8 == 0).then_some((function as usize / 8, register as usize))
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match Ecam::decode(offset) {
            Some((device, register)) => self.0.read_config(device, register, data),
            None => data.fill(0xff),
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((device, register)) = Ecam::decode(offset) {
            self.0.write_config(device, register, data);
        }
    }
}

/// Configuration mechanism 1: the address register at port 0xcf8, data at 0xcfc to 0xcff.
pub struct ConfigPorts {
    bus: Arc<PciBus>,
    address: Mutex<u32>,
}

impl ConfigPorts {
    /// Ports taken from 0xcf8 on.
    pub const SIZE: u64 = 8;

    /// The mechanism for `bus`.
    pub fn new(bus: Arc<PciBus>) -> ConfigPorts {
        ConfigPorts { bus, address: Mutex::new(0) }
    }

    /// Device and register that the address register selects, when it selects function 0 of a device on bus 0.
    fn selected(&self, port: u64) -> Option<(usize, usize)> {
        let address = *lock(&self.address);
        let enabled = address >> 31 == 1;
        let (bus, device, function) = (address >> 16 & 0xff, address >> 11 & 0x1f, address >> 8 & 7);
        let register = (address & 0xfc) as usize + (port - 4) as usize;
        (enabled && bus == 0 && function == 0).then_some((device as usize, register))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset < 4 {
            let address = lock(&self.address).to_le_bytes();
            for (i, byte) in data.iter_mut().enumerate() {
                *byte = address.get(offset as usize + i).copied().unwrap_or(0xff);
            }
            return;
        }
        match self.selected(offset) {
            Some((device, register)) => self.bus.read_config(device, register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            // Only a 32-bit write reaches the address register; others are for whoever else has those ports.
            (0, [a, b, c, d]) => *lock(&self.address) = u32::from_le_bytes([*a, *b, *c, *d]),
            (4.., _) => {
                if let Some((device, register)) = self.selected(offset) {
                    self.bus.write_config(device, register, data);
                }
            }
            _ => {}
        }
    }
}

/// The host bridge: a function that identifies itself and does nothing else. Linux only asks that there be one.
struct HostBridge(ConfigSpace);

/// The identity that rust-vmm's other monitors use too: Intel's virtual PCI host bridge.
const HOST_BRIDGE: Identity = Identity {
    vendor: 0x8086,
    device: 0x0d57,
    revision: 0,
    class: 0x06_00_00,
    subsystem_vendor: 0,
    subsystem: 0,
};

impl PciDevice for HostBridge {
    fn config(&self) -> &ConfigSpace {
        &self.0
    }
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.0.write(offset, data);
    }
    fn bars(&self) -> &[Bar] {
        &[]
    }
    fn read_bar(&mut self, _bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn write_bar(&mut self, _bar: u8, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::bar::BarKind;
    use std::io;

    #[derive(Default)]
    struct Mapper {
        log: Mutex<Vec<String>>,
    }

    impl BarMapper for Mapper {
        fn map(&self, bar: &Bar, address: u64, _: Arc<dyn BusDevice>) -> io::Result<()> {
            self.log.lock().unwrap().push(format!("map {} {address:#x}", bar.index));
            if address == 0 { Err(io::ErrorKind::AddrInUse.into()) } else { Ok(()) }
        }
        fn unmap(&self, bar: &Bar, address: u64) {
            self.log.lock().unwrap().push(format!("unmap {} {address:#x}", bar.index));
        }
    }

    struct Function {
        config: ConfigSpace,
        bars: [Bar; 1],
    }

    impl PciDevice for Function {
        fn config(&self) -> &ConfigSpace {
            &self.config
        }
        fn write_config(&mut self, offset: usize, data: &[u8]) {
            self.config.write(offset, data);
        }
        fn bars(&self) -> &[Bar] {
            &self.bars
        }
        fn read_bar(&mut self, _: u8, _: u64, _: &mut [u8]) {}
        fn write_bar(&mut self, _: u8, _: u64, _: &[u8]) {}
    }

    fn bus() -> (Arc<PciBus>, Arc<Mapper>) {
        let mapper = Arc::new(Mapper::default());
        let bus = Arc::new(PciBus::new(mapper.clone()));
        let bar = Bar { index: 0, size: 0x8000, kind: BarKind::Registers { doorbells: Vec::new() } };
        let mut config = ConfigSpace::new(Identity { vendor: 0x1af4, device: 0x1040, ..Default::default() });
        config.add_bar(&bar, 0xc000_0000);
        bus.insert(3, Arc::new(Mutex::new(Function { config, bars: [bar] })));
        (bus, mapper)
    }

    fn log(mapper: &Mapper) -> Vec<String> {
        std::mem::take(&mut mapper.log.lock().unwrap())
    }

    #[test]
    fn a_bar_answers_only_while_decoding_is_on() {
        let (bus, mapper) = bus();
        let ecam = Ecam(bus);
        let at = |register: u64| (3 << 15) + register;
        assert!(log(&mapper).is_empty());
        ecam.write(at(4), &command::MEMORY_SPACE.to_le_bytes());
        assert_eq!(log(&mapper), ["map 0 0xc0000000"]);
        // As Linux sizes a BAR: decoding off, ones, address again, decoding on.
        ecam.write(at(4), &[0, 0]);
        ecam.write(at(0x10), &[0xff; 4]);
        ecam.write(at(0x14), &[0xff; 4]);
        ecam.write(at(0x10), &0xd000_0000_u32.to_le_bytes());
        ecam.write(at(0x14), &[0; 4]);
        ecam.write(at(4), &command::MEMORY_SPACE.to_le_bytes());
        assert_eq!(log(&mapper), ["unmap 0 0xc0000000", "map 0 0xd0000000"]);
        ecam.write(at(0x10), &[0; 4]);
        assert_eq!(log(&mapper), ["unmap 0 0xd0000000", "map 0 0x0"], "an impossible place is tried");
        ecam.write(at(4), &[0, 0]);
        assert!(log(&mapper).is_empty(), "what answered nowhere needs no unmapping");
    }

    #[test]
    fn both_mechanisms_reach_the_same_registers() {
        let (bus, _) = bus();
        let (ecam, ports) = (Ecam(bus.clone()), ConfigPorts::new(bus));
        ports.write(0, &(1_u32 << 31 | 3 << 11).to_le_bytes());
        let (mut by_port, mut by_memory) = ([0; 4], [0; 4]);
        ports.read(4, &mut by_port);
        ecam.read(3 << 15, &mut by_memory);
        assert_eq!(by_port, by_memory);
        assert_eq!(u32::from_le_bytes(by_port), 0x1040_1af4);
        ports.read(6, &mut by_port[..2]);
        assert_eq!(by_port[..2], [0x40, 0x10], "two bytes from the middle of the register");
    }

    #[test]
    fn what_is_not_there_reads_as_ones() {
        let (bus, _) = bus();
        let (ecam, ports) = (Ecam(bus.clone()), ConfigPorts::new(bus));
        let mut data = [0; 4];
        ecam.read(5 << 15, &mut data);
        assert_eq!(data, [0xff; 4]);
        data = [0; 4];
        ecam.read((3 << 15) + (1 << 12), &mut data);
        assert_eq!(data, [0xff; 4], "function 1");
        for address in [3_u32 << 11, 1 << 31 | 1 << 16, 1 << 31 | 9 << 11, 1 << 31 | 1 << 8] {
            ports.write(0, &address.to_le_bytes());
            data = [0; 4];
            ports.read(4, &mut data);
            assert_eq!(data, [0xff; 4], "{address:#x}");
        }
        ports.write(1, &[1]);
        ports.write(0, &[1, 2]);
        ports.read(3, &mut data);
    }
}
