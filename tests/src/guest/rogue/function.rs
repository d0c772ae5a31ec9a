//! A PCI function that no driver of the kernel has: its configuration space, its BARs and what its capabilities say.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::io::Io;
use crate::guest::Failure;

/// Registers of configuration space (PCI Local Bus 3.0, section 6.1).
pub const COMMAND: u64 = 0x04;
pub const FIRST_BAR: u64 = 0x10;
const CAPABILITIES: u64 = 0x34;

/// Bits of the command register.
pub const MEMORY_SPACE: u64 = 1 << 1;
pub const BUS_MASTER: u64 = 1 << 2;

/// Capability IDs.
const VENDOR_SPECIFIC: u64 = 0x09;
const MSI_X: u64 = 0x11;

/// Configuration spaces of one bus, device after device.
const ECAM_DEVICE: u64 = 8 * 4096;

/// What a capability of virtio describes: `cfg_type` (virtio 1.2, section 4.1.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Part {
    Common = 1,
    Notify = 2,
    Isr = 3,
    Device = 4,
    PciCfg = 5,
    SharedMemory = 8,
}

/// A capability of virtio.
#[derive(Clone, Copy, Debug)]
pub struct Capability {
    /// Where it stands in configuration space.
    pub at: u64,
    pub part: u64,
    pub bar: u64,
    /// Offset in the BAR, and length.
    pub offset: u64,
    pub len: u64,
}

/// The function.
pub struct Function {
    dir: PathBuf,
    /// Its number on the bus.
    device: u64,
    config: File,
    /// What the registers were that can be written.
    saved: Vec<u8>,
    pub capabilities: Vec<Capability>,
    /// Where the capability of MSI-X stands.
    pub msix: u64,
}

impl Function {
    /// Takes the function at an address such as `0000:00:03.0`, and enables it.
    pub fn take(address: &str) -> Result<Function, Failure> {
        let dir = PathBuf::from("/sys/bus/pci/devices").join(address);
        if dir.join("driver").exists() {
            return Err(Failure::new(format!("{address} has a driver")));
        }
        fs::write(dir.join("enable"), "1")?;
        let device = address.get(8..10).and_then(|digits| u64::from_str_radix(digits, 16).ok());
        let device = device.ok_or_else(|| Failure::new(format!("{address} is no address")))?;
        let config = File::options().read(true).write(true).open(dir.join("config"))?;
        let mut function =
            Function { dir, device, config, saved: Vec::new(), capabilities: Vec::new(), msix: 0 };
        let command = function.read(COMMAND, 2)? | MEMORY_SPACE | BUS_MASTER;
        function.write(COMMAND, 2, command)?;
        let mut saved = vec![0; 256];
        function.config.read_exact_at(&mut saved, 0)?;
        function.saved = saved;
        let mut at = function.read(CAPABILITIES, 1)?;
        while at != 0 {
            match function.read(at, 1)? {
                VENDOR_SPECIFIC => function.capabilities.push(Capability {
                    at,
                    part: function.read(at + 3, 1)?,
                    bar: function.read(at + 4, 1)?,
                    offset: function.read(at + 8, 4)?,
                    len: function.read(at + 12, 4)?,
                }),
                MSI_X => function.msix = at,
                _ => {}
            }
            at = function.read(at + 1, 1)?;
        }
        Ok(function)
    }

    /// Has it no longer master the bus, as it was without a driver.
    pub fn leave(&self) -> Result<(), Failure> {
        Ok(fs::write(self.dir.join("enable"), "0")?)
    }

    /// Reads a register of 1, 2 or 4 bytes.
    pub fn read(&self, offset: u64, width: usize) -> Result<u64, Failure> {
        let mut bytes = [0; 8];
        self.config.read_exact_at(&mut bytes[..width], offset)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Writes a register of 1, 2 or 4 bytes.
    pub fn write(&self, offset: u64, width: usize, value: u64) -> Result<(), Failure> {
        Ok(self.config.write_all_at(&value.to_le_bytes()[..width], offset)?)
    }

    /// Gives all registers the values that they had in the beginning. Those that have them are left alone: each change of a
    /// BAR costs the guest what the processor knows of its memory.
    pub fn restore(&self) -> Result<(), Failure> {
        let pci_cfg = self.capability(Part::PciCfg)?.at;
        let others = [0x0c, 0x3c, self.msix, pci_cfg + 4, pci_cfg + 8, pci_cfg + 12];
        for register in others {
            self.restore_register(register)?;
        }
        let bars: Vec<_> = (0..6).map(|bar| FIRST_BAR + 4 * bar).collect();
        let is_moved = bars.iter().map(|bar| Ok(self.read(*bar, 4)? != self.saved(*bar)));
        if is_moved.collect::<Result<Vec<_>, Failure>>()?.contains(&true) {
            // While the function answers nowhere, so that none passes over another's place.
            self.write(COMMAND, 2, 0)?;
            bars.iter().try_for_each(|bar| self.restore_register(*bar))?;
        }
        self.restore_register(COMMAND)
    }

    /// What a register of 32 bits was in the beginning.
    fn saved(&self, register: u64) -> u64 {
        let bytes = self.saved[register as usize..][..4].iter().rev();
        bytes.fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    fn restore_register(&self, register: u64) -> Result<(), Failure> {
        let value = self.saved(register);
        if self.read(register, 4)? == value { Ok(()) } else { self.write(register, 4, value) }
    }

    /// The capability of a part.
    pub fn capability(&self, part: Part) -> Result<Capability, Failure> {
        let found = self.capabilities.iter().find(|capability| capability.part == part as u64);
        found.copied().ok_or_else(|| Failure::new(format!("no capability for {part:?}")))
    }

    /// Maps a BAR.
    pub fn map_bar(&self, index: u64) -> Result<Io, Failure> {
        let path = self.dir.join(format!("resource{index}"));
        let file = File::options().read(true).write(true).open(&path)?;
        let len = file.metadata()?.len() as usize;
        Io::map(&file, 0, len).map_err(|failure| failure.within(path.display()))
    }

    /// Where a BAR of 64 bits was in the beginning.
    pub fn bar(&self, index: u64) -> u64 {
        let at = FIRST_BAR + 4 * index;
        (self.saved(at + 4) << 32 | self.saved(at)) & !0xf
    }

    /// Puts a BAR of 64 bits somewhere else.
    pub fn move_bar(&self, index: u64, address: u64) -> Result<(), Failure> {
        let at = FIRST_BAR + 4 * index;
        self.write(at, 4, address & 0xffff_ffff)?;
        self.write(at + 4, 4, address >> 32)
    }

    /// Its 4 KiB of configuration space in memory.
    pub fn ecam(&self) -> Result<Io, Failure> {
        // The table's one entry begins with the address (PCI Firmware 3.2, section 4.1.2).
        let table = fs::read("/sys/firmware/acpi/tables/MCFG")?;
        let base = table.get(44..52).and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes);
        let base = base.ok_or_else(|| Failure::new("the table MCFG has no entry"))?;
        Io::physical(base + self.device * ECAM_DEVICE, 4096)
    }

    /// What port 0xcf8 selects it by.
    pub fn port_address(&self, register: u64) -> u32 {
        (1 << 31 | self.device << 11 | register & 0xfc) as u32
    }
}
