//! Owns the devices, and connects them to KVM: doorbells (ioeventfd), windows (memory slots), interrupts.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};

use devices::bus::{Bus, BusDevice};
use devices::pci::{Bar, BarKind, BarMapper, PciBus};
use devices::virtio::device::{DeviceMemory, HostMemory, Repair, VirtioDevice};
use devices::virtio::pci::{VirtioPciDevice, VirtioPciError};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

use crate::interrupts::Routes;
use crate::layout::{self, Apertures};
use crate::memory::{Slot, Slots, describe_region};
use crate::prefault::PrefaultVcpu;

/// The PCI devices of a VM.
pub struct DeviceManager {
    bus: Arc<PciBus>,
    memory: DeviceMemory,
    routes: Arc<Routes>,
    apertures: Apertures,
    windows: Arc<Windows>,
    next_device: u8,
}

impl DeviceManager {
    /// No devices yet. `memory` is the guest's RAM; windows are added to it as the guest enables them.
    pub fn new(
        vm: Arc<VmFd>,
        slots: Arc<Slots>,
        mmio: &Arc<Bus>,
        memory: DeviceMemory,
        mmio_64: Range<u64>,
    ) -> DeviceManager {
        let windows = Arc::<Windows>::default();
        let mapper = KvmBarMapper {
            vm: Arc::clone(&vm),
            slots,
            mmio: Arc::downgrade(mmio),
            memory: memory.clone(),
            mmio_64: mmio_64.clone(),
            windows: Arc::clone(&windows),
        };
        DeviceManager {
            windows,
            bus: Arc::new(PciBus::new(Arc::new(mapper))),
            memory,
            routes: Routes::new(vm),
            apertures: Apertures::new(mmio_64),
            next_device: 1,
        }
    }

    /// The PCI bus.
    pub fn bus(&self) -> Arc<PciBus> {
        Arc::clone(&self.bus)
    }

    /// The windows that the guest sees.
    pub fn windows(&self) -> Arc<Windows> {
        Arc::clone(&self.windows)
    }

    /// Puts a virtio device on the bus.
    ///
    /// # Errors
    /// See [`VirtioPciError`].
    ///
    /// # Panics
    /// After 31 devices, which the configuration rules out.
    pub fn add(&mut self, device: Box<dyn VirtioDevice>) -> Result<(), VirtioPciError> {
        let routes = &self.routes;
        let apertures = &mut self.apertures;
        let function = VirtioPciDevice::new(
            device,
            self.memory.clone(),
            |vectors| Ok(Arc::new(routes.vectors(vectors)?)),
            |size, prefetchable| apertures.place(size, prefetchable),
        )?;
        self.bus.insert(self.next_device, Arc::new(Mutex::new(function)));
        self.next_device += 1;
        Ok(())
    }
}

/// The windows that the guest sees now, by guest-physical address.
#[derive(Default)]
pub struct Windows {
    shown: Mutex<BTreeMap<u64, MappedWindow>>,
    prefault: OnceLock<Arc<PrefaultVcpu>>,
}

impl Windows {
    /// Has pages of windows that the guest will see put in its reach by this vCPU. The first one counts.
    pub fn prefault_by(&self, vcpu: Arc<PrefaultVcpu>) {
        let _ = self.prefault.set(vcpu);
    }

    /// Whether the host could take anything away from the guest.
    pub fn are_used(&self) -> bool {
        self.lock().values().any(|window| window.memory.is_used())
    }

    /// Makes the page at a guest-physical address accessible, if the host cannot provide it any more. `None` if it is in
    /// no window.
    pub fn repair(&self, address: u64, write: bool) -> Option<Repair> {
        let (start, memory) = {
            let windows = self.lock();
            let (start, window) = windows.range(..=address).next_back()?;
            (*start, Arc::clone(&window.memory))
        };
        // Without the lock: it may have to wait for a disk.
        (address - start < memory.size()).then(|| memory.repair(address - start, write))
    }

    /// Carries out a change of the memory slots, while no memory is prefaulted.
    fn change_slots<T>(&self, change: impl FnOnce() -> T) -> T {
        match self.prefault.get() {
            Some(vcpu) => vcpu.while_idle(change),
            None => change(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, MappedWindow>> {
        self.shown.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// A window that the guest sees now. The slot goes before the memory it shows.
struct MappedWindow {
    _slot: Slot,
    memory: Arc<dyn HostMemory>,
}

/// Puts what is behind BARs where the guest wants it.
struct KvmBarMapper {
    vm: Arc<VmFd>,
    slots: Arc<Slots>,
    /// Weak, since the bus leads to the ECAM, that to the PCI bus, and that here.
    mmio: Weak<Bus>,
    memory: DeviceMemory,
    mmio_64: Range<u64>,
    windows: Arc<Windows>,
}

impl KvmBarMapper {
    /// BARs may only go where the bridge forwards: never over RAM, the local APIC, or the configuration space.
    fn check(&self, bar: &Bar, address: u64) -> io::Result<()> {
        let within = |range: &Range<u64>| {
            address >= range.start && address.checked_add(bar.size).is_some_and(|end| end <= range.end)
        };
        if within(&layout::MMIO_32) || within(&self.mmio_64) {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::AddrNotAvailable, "the bridge does not forward this address"))
    }

    fn mmio(&self) -> io::Result<Arc<Bus>> {
        let gone = || io::Error::new(io::ErrorKind::NotConnected, "the VM is ending");
        self.mmio.upgrade().ok_or_else(gone)
    }

    fn map_window(&self, window: &Arc<dyn HostMemory>, address: u64) -> io::Result<()> {
        let (host, size) = (window.host_address(), window.size());
        let region = describe_region(host, size, address).map_err(io::Error::other)?;
        // The lock spans the whole change, so that two BARs that move at once do not lose one another.
        let mut windows = self.windows.lock();
        if self.mmio()?.is_taken(address, size) {
            return Err(taken("registers answer there"));
        }
        // Inserting the region first refuses an overlap with another window or RAM.
        let memory = self.memory.memory().insert_region(Arc::new(region)).map_err(io::Error::other)?;
        // SAFETY: `HostMemory` stays where it is as long as the object lives, and `windows` keeps it beside the slot.
        let map = || unsafe { self.slots.map(host, size, address) };
        let slot = self.windows.change_slots(map).map_err(io::Error::other)?;
        self.replace_memory(memory);
        windows.insert(address, MappedWindow { _slot: slot, memory: Arc::clone(window) });
        window.set_nested_paging(self.windows.prefault.get().map(|vcpu| vcpu.at(address)));
        Ok(())
    }

    fn unmap_window(&self, window: &Arc<dyn HostMemory>, address: u64) {
        let mut windows = self.windows.lock();
        window.set_nested_paging(None);
        match self.memory.memory().remove_region(GuestAddress(address), window.size()) {
            Ok((memory, _)) => self.replace_memory(memory),
            Err(error) => tracing::error!(%error, "A window was not part of the devices' memory"),
        }
        let gone = windows.remove(&address);
        self.windows.change_slots(|| drop(gone));
    }

    fn replace_memory(&self, memory: GuestMemoryMmap) {
        self.memory.lock().unwrap_or_else(|e| e.into_inner()).replace(memory);
    }

    fn register_doorbells(
        &self,
        doorbells: &[(u64, Arc<vmm_sys_util::eventfd::EventFd>)],
        address: u64,
    ) -> io::Result<()> {
        for (done, (offset, bell)) in doorbells.iter().enumerate() {
            let at = IoEventAddress::Mmio(address + offset);
            if let Err(error) = self.vm.register_ioevent(bell, &at, NoDatamatch) {
                self.unregister_doorbells(&doorbells[..done], address);
                return Err(error.into());
            }
        }
        Ok(())
    }

    fn unregister_doorbells(&self, doorbells: &[(u64, Arc<vmm_sys_util::eventfd::EventFd>)], address: u64) {
        for (offset, bell) in doorbells {
            let at = IoEventAddress::Mmio(address + offset);
            if let Err(error) = self.vm.unregister_ioevent(bell, &at, NoDatamatch) {
                tracing::error!(%error, "Cannot remove a doorbell");
            }
        }
    }
}

fn taken(by: &str) -> io::Error {
    io::Error::new(io::ErrorKind::AddrInUse, by)
}

/// Whether any of `address..address + size` is RAM or a window. KVM finds memory first, and registers behind it never.
fn has_memory(memory: &GuestMemoryMmap, address: u64, size: u64) -> bool {
    let end = address.saturating_add(size);
    memory.iter().any(|region| region.start_addr().0 < end && region.last_addr().0 >= address)
}

impl BarMapper for KvmBarMapper {
    fn map(&self, bar: &Bar, address: u64, registers: Arc<dyn BusDevice>) -> io::Result<()> {
        self.check(bar, address)?;
        match &bar.kind {
            BarKind::Memory(window) => self.map_window(window, address),
            BarKind::Registers { doorbells } => {
                let mmio = self.mmio()?;
                {
                    // So that no window comes in between.
                    let _windows = self.windows.lock();
                    if has_memory(&self.memory.memory(), address, bar.size) {
                        return Err(taken("memory is there"));
                    }
                    mmio.insert(address, bar.size, registers).map_err(io::Error::other)?;
                }
                self.register_doorbells(doorbells, address).inspect_err(|_| mmio.remove(address))
            }
        }
    }

    fn unmap(&self, bar: &Bar, address: u64) {
        match &bar.kind {
            BarKind::Memory(window) => self.unmap_window(window, address),
            BarKind::Registers { doorbells } => {
                self.unregister_doorbells(doorbells, address);
                if let Some(mmio) = self.mmio.upgrade() {
                    mmio.remove(address);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_find_no_room_where_memory_is() {
        let ranges = [(GuestAddress(0), 0x10_0000), (GuestAddress(1 << 32), 0x20_0000)];
        let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        for (address, size) in
            [(0, 1), (0xf_ffff, 0x8000), (1 << 32, 0x8000), ((1 << 32) - 1, 2), (0, u64::MAX)]
        {
            assert!(has_memory(&memory, address, size), "{address:#x} {size:#x}");
        }
        for (address, size) in [(0x10_0000, 0x8000), ((1 << 32) - 0x8000, 0x8000), (0x1_0020_0000, u64::MAX)]
        {
            assert!(!has_memory(&memory, address, size), "{address:#x} {size:#x}");
        }
    }
}
