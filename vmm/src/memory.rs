//! Guest RAM, and memory slots: what of the process's address space the guest sees, for as long as an object lives.

use std::io;
use std::ops::Range;
use std::ptr;
use std::sync::{Arc, Mutex};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::mmap::MmapRegion;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::layout::{self, HUGE_PAGE};

/// What can go wrong with guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host refuses the memory.
    #[error("Cannot reserve {0} MiB for the guest's RAM; give it less with --memory")]
    Reserve(u64, #[source] io::Error),
    /// vm-memory refuses the ranges.
    #[error("Cannot describe the guest's memory")]
    Describe(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// KVM refuses a memory slot.
    #[error("Cannot show the guest the memory at {0:#x}")]
    Slot(u64, #[source] kvm_ioctls::Error),
}

/// The guest's RAM: private anonymous memory, aligned to 2 MiB, for which huge pages are asked. The host commits it as
/// the guest touches it.
pub struct GuestRam {
    mapping: Reservation,
    ranges: Vec<Range<u64>>,
}

impl GuestRam {
    /// Reserves `size` bytes.
    ///
    /// # Errors
    /// [`MemoryError::Reserve`] when the host refuses.
    pub fn new(size: u64) -> Result<GuestRam, MemoryError> {
        let refused = |error| MemoryError::Reserve(size >> 20, error);
        let mapping = Reservation::new(size).map_err(refused)?;
        // Huge pages are a matter of speed: a host without them runs the guest as well.
        // SAFETY: the range is the reservation's own.
        let _ = unsafe { libc::madvise(mapping.aligned.cast(), mapping.size, libc::MADV_HUGEPAGE) };
        // SAFETY: as above; keeps a core dump of the VMM from containing the guest.
        let _ = unsafe { libc::madvise(mapping.aligned.cast(), mapping.size, libc::MADV_DONTDUMP) };
        Ok(GuestRam { mapping, ranges: layout::ram_ranges(size) })
    }

    /// Guest-physical ranges, in order, with the host-virtual address of each.
    pub fn ranges(&self) -> impl Iterator<Item = (Range<u64>, *mut u8)> {
        let mut offset = 0;
        self.ranges.iter().map(move |range| {
            // SAFETY: the ranges' lengths add up to the size of the mapping.
            let host = unsafe { self.mapping.aligned.add(offset) };
            offset += (range.end - range.start) as usize;
            (range.clone(), host)
        })
    }

    /// Host-virtual range.
    pub fn host_range(&self) -> Range<usize> {
        let start = self.mapping.aligned as usize;
        start..start + self.mapping.size
    }

    /// The RAM as vm-memory describes it. The descriptions must not outlive `self`: [`crate::Vm`] sees to it.
    ///
    /// # Errors
    /// [`MemoryError::Describe`], which would be a mistake in the layout.
    pub fn describe(&self) -> Result<GuestMemoryMmap, MemoryError> {
        let regions = self
            .ranges()
            .map(|(range, host)| describe_region(host, range.end - range.start, range.start))
            .collect::<Result<Vec<_>, _>>()?;
        GuestMemoryMmap::from_regions(regions).map_err(|e| MemoryError::Describe(Box::new(e)))
    }
}

/// Describes `size` bytes at `host` that the guest sees at `guest`; the memory is not owned by the description.
///
/// # Errors
/// [`MemoryError::Describe`] when the range is impossible.
pub fn describe_region(host: *mut u8, size: u64, guest: u64) -> Result<GuestRegionMmap, MemoryError> {
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: the callers pass mappings of this size (guest RAM, a DAX window), which live as long as the VM.
    let region = unsafe { MmapRegion::build_raw(host, size as usize, prot, flags) };
    let region = region.map_err(|e| MemoryError::Describe(Box::new(e)))?;
    GuestRegionMmap::new(region, GuestAddress(guest))
        .ok_or_else(|| MemoryError::Describe("a region passes the end of the address space".into()))
}

struct Reservation {
    mapped: *mut u8,
    mapped_size: usize,
    aligned: *mut u8,
    size: usize,
}

// SAFETY: the pointers name a mapping that belongs to the process, not to a thread, and is only unmapped by Drop.
unsafe impl Send for Reservation {}
// SAFETY: as above; shared references give addresses away, and who dereferences them answers for it.
unsafe impl Sync for Reservation {}

impl Reservation {
    fn new(size: u64) -> io::Result<Reservation> {
        let size = usize::try_from(size).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mapped_size = size.checked_add(HUGE_PAGE as usize).ok_or(io::ErrorKind::InvalidInput)?;
        let (prot, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        );
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let mapped = unsafe { libc::mmap(ptr::null_mut(), mapped_size, prot, flags, -1, 0) };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let mapped: *mut u8 = mapped.cast();
        let padding = (mapped as usize).next_multiple_of(HUGE_PAGE as usize) - mapped as usize;
        // SAFETY: the padding is less than a huge page, by which the mapping is longer than `size`.
        let aligned = unsafe { mapped.add(padding) };
        Ok(Reservation { mapped, mapped_size, aligned, size })
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` and nothing refers to it once its owner is dropped.
        unsafe { libc::munmap(self.mapped.cast(), self.mapped_size) };
    }
}

/// The VM's memory slots by number.
pub struct Slots {
    vm: Arc<VmFd>,
    used: Mutex<Vec<bool>>,
}

impl Slots {
    /// No slot of `vm` is used yet.
    pub fn new(vm: Arc<VmFd>) -> Arc<Slots> {
        Arc::new(Slots { vm, used: Mutex::new(Vec::new()) })
    }

    /// Shows the guest `size` bytes at `host` as guest-physical address `guest`, until the slot is dropped.
    ///
    /// # Errors
    /// KVM refuses: the range overlaps another slot or is out of reach.
    ///
    /// # Safety
    /// `host..host + size` is a mapping that outlives the slot.
    pub unsafe fn map(self: &Arc<Self>, host: *mut u8, size: u64, guest: u64) -> Result<Slot, MemoryError> {
        let mut used = self.used.lock().unwrap_or_else(|e| e.into_inner());
        let number = used.iter().position(|used| !used).unwrap_or(used.len());
        let region = kvm_userspace_memory_region {
            slot: number as u32,
            flags: 0,
            guest_phys_addr: guest,
            memory_size: size,
            userspace_addr: host as u64,
        };
        // SAFETY: the caller vouches for the range; the slot goes before it does.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(|e| MemoryError::Slot(guest, e))?;
        match used.get_mut(number) {
            Some(slot) => *slot = true,
            None => used.push(true),
        }
        Ok(Slot { slots: Arc::clone(self), region })
    }
}

/// One memory slot; dropping it takes the memory away from the guest.
pub struct Slot {
    slots: Arc<Slots>,
    region: kvm_userspace_memory_region,
}

impl Drop for Slot {
    fn drop(&mut self) {
        let gone = kvm_userspace_memory_region { memory_size: 0, ..self.region };
        // SAFETY: size 0 removes the slot; no memory is given to the guest.
        if let Err(error) = unsafe { self.slots.vm.set_user_memory_region(gone) } {
            tracing::error!(%error, "Cannot remove a memory slot");
            return;
        }
        self.slots.used.lock().unwrap_or_else(|e| e.into_inner())[self.region.slot as usize] = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemory};

    #[test]
    fn ram_is_aligned_zero_and_split_around_the_hole() {
        let ram = GuestRam::new(layout::HOLE.start + (64 << 20)).unwrap();
        let ranges: Vec<_> = ram.ranges().collect();
        assert_eq!(ranges.len(), 2);
        assert!(ranges.iter().all(|(_, host)| (*host as u64).is_multiple_of(HUGE_PAGE)));
        let memory = ram.describe().unwrap();
        assert_eq!(memory.last_addr().0, layout::HOLE.end + (64 << 20) - 1);
        let address = GuestAddress(layout::HOLE.end + 8);
        assert_eq!(memory.read_obj::<u64>(address).unwrap(), 0);
        memory.write_obj(7_u64, address).unwrap();
        assert_eq!(memory.read_obj::<u64>(address).unwrap(), 7);
        assert!(memory.read_obj::<u64>(GuestAddress(layout::HOLE.start)).is_err());
    }

    #[test]
    fn more_than_the_address_space_is_refused_with_the_remedy() {
        let Err(error) = GuestRam::new(1 << 60) else { panic!("the host gave an exbibyte") };
        assert!(error.to_string().contains("--memory"), "{error}");
    }
}
