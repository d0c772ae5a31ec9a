//! Address routing: which device answers at an I/O port or a guest-physical address.

use std::collections::BTreeMap;
use std::sync::{Arc, RwLock};

/// A device that the guest reaches by plain reads and writes.
///
/// Methods take `&self`, since every vCPU calls them; a device with state guards it with a lock of its own.
pub trait BusDevice: Send + Sync {
    /// Reads `data.len()` (1, 2, 4 or 8) bytes at `offset` from the start of the device's range.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes `data.len()` (1, 2, 4 or 8) bytes at `offset` from the start of the device's range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a range could not be given to a device.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// The range is empty or passes the end of the address space.
    #[error("Range {base:#x}+{size:#x} is empty or wraps around")]
    BadRange {
        /// First address.
        base: u64,
        /// Length in bytes.
        size: u64,
    },
    /// Another device answers there.
    #[error("Range {base:#x}+{size:#x} overlaps that of another device")]
    Overlap {
        /// First address.
        base: u64,
        /// Length in bytes.
        size: u64,
    },
}

struct Slot {
    size: u64,
    device: Arc<dyn BusDevice>,
}

/// Disjoint address ranges, each with the device that answers there.
///
/// Accesses take the lock for the look-up only and call the device without it, so that a device may change the bus
/// (a PCI BAR that moves) from within an access.
#[derive(Default)]
pub struct Bus {
    slots: RwLock<BTreeMap<u64, Slot>>,
}

impl Bus {
    /// Gives `base..base + size` to `device`.
    ///
    /// # Errors
    /// [`BusError`] when the range is no range or is taken; the bus is unchanged then.
    pub fn insert(&self, base: u64, size: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let end = base.checked_add(size).filter(|_| size > 0).ok_or(BusError::BadRange { base, size })?;
        let mut slots = self.slots.write().unwrap_or_else(|e| e.into_inner());
        if overlaps(&slots, base, end) {
            return Err(BusError::Overlap { base, size });
        }
        slots.insert(base, Slot { size, device });
        Ok(())
    }

    /// Whether a device answers anywhere in `base..base + size`.
    pub fn is_taken(&self, base: u64, size: u64) -> bool {
        let slots = self.slots.read().unwrap_or_else(|e| e.into_inner());
        overlaps(&slots, base, base.saturating_add(size))
    }

    /// Takes the range that starts at `base` away from its device; nothing happens when there is none.
    pub fn remove(&self, base: u64) {
        self.slots.write().unwrap_or_else(|e| e.into_inner()).remove(&base);
    }

    /// Reads from the device at `address`. False, with all bits of `data` set, when no device answers there.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                device.read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Writes to the device at `address`. False when no device answers there.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                device.write(offset, data);
                true
            }
            None => false,
        }
    }

    fn find(&self, address: u64, len: usize) -> Option<(u64, Arc<dyn BusDevice>)> {
        let slots = self.slots.read().unwrap_or_else(|e| e.into_inner());
        let (start, slot) = slots.range(..=address).next_back()?;
        let offset = address - start;
        let inside = offset.checked_add(len as u64).is_some_and(|end| end <= slot.size);
        inside.then(|| (offset, Arc::clone(&slot.device)))
    }
}

/// Whether a device answers anywhere in `base..end`.
fn overlaps(slots: &BTreeMap<u64, Slot>, base: u64, end: u64) -> bool {
    slots.range(..end).next_back().is_some_and(|(start, slot)| start + slot.size > base)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn routes_by_range_and_passes_offsets() {
        let (bus, device) = (Bus::default(), Arc::new(Recorder::default()));
        bus.insert(0x100, 0x10, device.clone()).unwrap();
        let mut data = [0; 2];
        assert!(bus.read(0x104, &mut data));
        assert_eq!(data, [4, 4]);
        assert!(bus.write(0x10f, &[7]));
        assert_eq!(*device.0.lock().unwrap(), [(0xf, vec![7])]);
    }

    #[test]
    fn nobody_at_the_address_reads_as_ones() {
        let bus = Bus::default();
        bus.insert(0x100, 0x10, Arc::new(Recorder::default())).unwrap();
        for address in [0, 0xff, 0x110, u64::MAX] {
            let mut data = [0; 4];
            assert!(!bus.read(address, &mut data));
            assert_eq!(data, [0xff; 4]);
            assert!(!bus.write(address, &data));
        }
        let mut straddling = [0; 4];
        assert!(!bus.read(0x10e, &mut straddling), "an access past the end of a device is nobody's");
    }

    #[test]
    fn overlaps_are_refused_and_removal_frees_the_range() {
        let bus = Bus::default();
        let device = Arc::new(Recorder::default());
        bus.insert(0x100, 0x10, device.clone()).unwrap();
        for (base, size) in [(0x100, 0x10), (0xf8, 0x10), (0x108, 1), (0x0, 0x1000)] {
            assert_eq!(bus.insert(base, size, device.clone()), Err(BusError::Overlap { base, size }));
            assert!(bus.is_taken(base, size));
        }
        assert!(!bus.is_taken(0xf0, 0x10) && !bus.is_taken(0x110, u64::MAX));
        assert!(bus.insert(0x10, 0, device.clone()).is_err());
        assert!(bus.insert(u64::MAX, 2, device.clone()).is_err());
        bus.insert(0x110, 0x10, device.clone()).unwrap();
        bus.insert(0xf0, 0x10, device.clone()).unwrap();
        bus.remove(0x100);
        bus.insert(0x100, 0x10, device).unwrap();
    }
}
