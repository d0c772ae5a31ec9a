//! A function's 256 bytes of conventional configuration space: what reads find there and which bits writes change.

use super::bar::{Bar, BarKind};

/// Bytes of conventional configuration space.
const SIZE: usize = 256;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const FIRST_BAR: usize = 0x10;
const CAPABILITIES_POINTER: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;
const STATUS_CAPABILITIES_LIST: u8 = 1 << 4;

/// Bits of the command register.
pub mod command {
    /// The function answers at its memory BARs.
    pub const MEMORY_SPACE: u16 = 1 << 1;
    /// The function may master the bus; MSI-X messages are writes, so it takes this bit to send them.
    pub const BUS_MASTER: u16 = 1 << 2;
    /// No INTx; without effect here, since no function has an interrupt pin.
    pub const INTERRUPT_DISABLE: u16 = 1 << 10;
}

/// What a function says it is: the read-only part of the header.
#[derive(Debug, Clone, Copy, Default)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Class code: base class, subclass, programming interface, from the highest byte to the lowest of 24 bits.
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// Configuration space with a write mask a bit, so that sizing a BAR and toggling a bit need no code of their own.
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    last_capability: usize,
    next_free: usize,
}

impl ConfigSpace {
    /// A type 0 header with no BARs and no capabilities.
    pub fn new(identity: Identity) -> ConfigSpace {
        let mut space = ConfigSpace {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            last_capability: 0,
            next_free: FIRST_CAPABILITY,
        };
        space.set(0x00, &identity.vendor.to_le_bytes());
        space.set(0x02, &identity.device.to_le_bytes());
        space.set(0x08, &[identity.revision]);
        space.set(0x09, &identity.class.to_le_bytes()[..3]);
        space.set(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.set(0x2e, &identity.subsystem.to_le_bytes());
        let writable = command::MEMORY_SPACE | command::BUS_MASTER | command::INTERRUPT_DISABLE;
        space.allow_writes(COMMAND, &writable.to_le_bytes());
        // Cache line size and interrupt line mean nothing here, but drivers keep notes there.
        space.allow_writes(0x0c, &[0xff]);
        space.allow_writes(0x3c, &[0xff]);
        space
    }

    /// Gives the function a base address register, at `address`, as firmware would.
    ///
    /// # Panics
    /// When the bar's size is no power of two of at least 16 bytes: a mistake in the device.
    pub fn add_bar(&mut self, bar: &Bar, address: u64) {
        assert!(bar.size.is_power_of_two() && bar.size >= 16 && bar.index < 5, "impossible BAR {bar:?}");
        // All memory BARs are 64 bits wide (type 10b).
        let prefetchable = if matches!(bar.kind, BarKind::Memory(_)) { 1 << 3 } else { 0 };
        let flags = 0b100 | prefetchable;
        let register = FIRST_BAR + 4 * usize::from(bar.index);
        self.set(register, &(address | flags).to_le_bytes());
        self.allow_writes(register, &(!(bar.size - 1)).to_le_bytes());
    }

    /// Appends a capability: `body` follows the two bytes of ID and next pointer. Returns its offset.
    ///
    /// # Panics
    /// When configuration space is full: a mistake in the device.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> usize {
        let offset = self.next_free;
        self.next_free = (offset + 2 + body.len()).next_multiple_of(4);
        assert!(self.next_free <= SIZE, "no room for capability {id:#x}");
        self.set(offset, &[id, 0]);
        self.set(offset + 2, body);
        match self.last_capability {
            0 => {
                self.set(CAPABILITIES_POINTER, &[offset as u8]);
                self.bytes[STATUS] |= STATUS_CAPABILITIES_LIST;
            }
            last => self.set(last + 1, &[offset as u8]),
        }
        self.last_capability = offset;
        offset
    }

    /// Lets the guest change the bits of `mask` at `offset`.
    pub fn allow_writes(&mut self, offset: usize, mask: &[u8]) {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
    }

    /// Reads; what lies beyond conventional space reads as zero (no extended capabilities).
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(offset + i).copied().unwrap_or(0);
        }
    }

    /// Writes the bits that the guest may change.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (at, byte) in (offset..SIZE).zip(data) {
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | byte & mask;
        }
    }

    /// Sets bytes whatever the write mask: the device's own hand.
    pub fn set(&mut self, offset: usize, data: &[u8]) {
        self.bytes[offset..offset + data.len()].copy_from_slice(data);
    }

    /// A little-endian 16-bit register.
    pub fn read_u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.bytes[offset], self.bytes[offset + 1]])
    }

    /// A little-endian 32-bit register.
    pub fn read_u32(&self, offset: usize) -> u32 {
        u32::from(self.read_u16(offset)) | u32::from(self.read_u16(offset + 2)) << 16
    }

    /// The command register.
    pub fn command(&self) -> u16 {
        self.read_u16(COMMAND)
    }

    /// Where the guest has put the 64-bit memory BAR `index`; meaningful while MEMORY_SPACE is set.
    pub fn bar_address(&self, index: u8) -> u64 {
        let register = FIRST_BAR + 4 * usize::from(index);
        (u64::from(self.read_u32(register + 4)) << 32 | u64::from(self.read_u32(register))) & !0xf
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_bar(size: u64, address: u64) -> ConfigSpace {
        let mut space = ConfigSpace::new(Identity { vendor: 0x1af4, device: 0x105a, ..Default::default() });
        space.add_bar(&Bar { index: 2, size, kind: BarKind::Registers { doorbells: Vec::new() } }, address);
        space
    }

    #[test]
    fn sizing_a_bar_reads_back_its_mask_and_restores() {
        let mut space = with_bar(64 << 30, 0x40_0000_0000);
        space.write(0x18, &[0xff; 4]);
        space.write(0x1c, &[0xff; 4]);
        assert_eq!(space.read_u32(0x18), 0x4, "64 GiB: no address bit below 36");
        assert_eq!(space.read_u32(0x1c), 0xffff_fff0);
        space.write(0x18, &[0, 0, 0, 0]);
        space.write(0x1c, &0x80_u32.to_le_bytes());
        assert_eq!(space.bar_address(2), 0x80_0000_0000);
    }

    #[test]
    fn identity_is_read_only_and_beyond_the_end_is_zero() {
        let mut space = with_bar(0x8000, 0xc000_0000);
        space.write(0, &[0; 4]);
        assert_eq!(space.read_u32(0), 0x105a_1af4);
        let mut data = [0xaa; 4];
        space.read(0x100, &mut data);
        assert_eq!(data, [0; 4]);
        space.write(0xfe, &[1, 2, 3, 4]);
        space.write(0x1000, &[1]);
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut space = with_bar(0x8000, 0xc000_0000);
        let first = space.add_capability(0x09, &[16, 1, 2]);
        let second = space.add_capability(0x11, &[0; 10]);
        assert_eq!((first, second), (0x40, 0x48));
        assert_eq!(space.read_u16(0x34) as usize & 0xff, first);
        assert_eq!(space.read_u16(first), (second as u16) << 8 | 0x09);
        assert_eq!(space.read_u16(second), 0x11);
        assert_eq!(space.read_u16(STATUS) & 0x10, 0x10);
    }

    #[test]
    fn only_known_command_bits_stick() {
        let mut space = with_bar(0x8000, 0);
        space.write(COMMAND, &[0xff, 0xff]);
        assert_eq!(space.command(), command::MEMORY_SPACE | command::BUS_MASTER | command::INTERRUPT_DISABLE);
    }
}
