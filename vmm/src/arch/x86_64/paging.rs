//! Where the guest's page tables lead. KVM_TRANSLATE does not do: it looks as the guest's kernel would, and so finds none of
//! a program's addresses where the kernel may not touch them by mistake (SMAP).

use kvm_bindings::kvm_sregs;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Control register bits (AMD64 Architecture Programmer's Manual, volume 2, sections 3.1 and 5.3).
const CR0_PG: u64 = 1 << 31;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;
/// Bits of a page table entry.
const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Where a linear address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The guest-physical address.
    pub address: u64,
    /// Whether all levels allow the code that runs to write there; the guest has a fault of its own where they do not.
    pub writable: bool,
}

/// The place of a linear address; `None` if there is no page, or the vCPU is neither in long mode nor without paging.
pub fn place(linear: u64, sregs: &kvm_sregs, memory: &GuestMemoryMmap) -> Option<Place> {
    if sregs.cr0 & CR0_PG == 0 {
        return Some(Place { address: linear, writable: true });
    }
    if sregs.efer & EFER_LMA == 0 {
        return None;
    }
    let levels = if sregs.cr4 & CR4_LA57 != 0 { 5 } else { 4 };
    // Without CR0.WP the kernel might write everywhere; none of those that run here goes without.
    let needed = if sregs.ss.dpl == 3 { WRITABLE | USER } else { WRITABLE };
    let mut allowed = needed;
    let mut table = sregs.cr3 & ADDRESS;
    for level in (0..levels).rev() {
        let shift = 12 + 9 * level;
        let index = linear >> shift & 0x1ff;
        let entry: u64 = memory.read_obj(GuestAddress(table + 8 * index)).ok()?;
        if entry & PRESENT == 0 {
            return None;
        }
        allowed &= entry;
        if level == 0 || level <= 2 && entry & LARGE != 0 {
            let within = (1 << shift) - 1;
            let address = entry & ADDRESS & !within | linear & within;
            return Some(Place { address, writable: allowed == needed });
        }
        table = entry & ADDRESS;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_all_sizes_are_found() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let entry = |table: u64, index: u64, value: u64| {
            memory.write_obj(value, GuestAddress(table + 8 * index)).unwrap();
        };
        let mut sregs = kvm_sregs { cr0: CR0_PG, cr3: 0x1018, efer: EFER_LMA, ..Default::default() };
        entry(0x1000, 0x1ff, 0x2000 | PRESENT | 1 << 63);
        entry(0x2000, 1, 0x3000 | PRESENT);
        entry(0x2000, 2, 0x40_4000_0000 | PRESENT | LARGE);
        entry(0x3000, 3, 0x4000 | PRESENT);
        entry(0x3000, 4, 0x7_0020_0000 | PRESENT | LARGE | 1 << 12);
        entry(0x4000, 5, 0x9_8765_4000 | PRESENT | LARGE);
        let top = 0xffff_ff80_0000_0000_u64;
        let walk = |linear| place(linear, &sregs, &memory).map(|place| place.address);
        assert_eq!(walk(top | 1 << 30 | 3 << 21 | 5 << 12 | 0x123), Some(0x9_8765_4123));
        assert_eq!(walk(top | 1 << 30 | 4 << 21 | 0x12_3456), Some(0x7_0032_3456));
        assert_eq!(walk(top | 2 << 30 | 0x1234_5678), Some(0x40_5234_5678));
        assert_eq!(walk(top | 1 << 30 | 3 << 21 | 6 << 12), None, "not present");
        assert_eq!(walk(0x1000), None);
        entry(0x5000, 0x1ff, 0x1000 | PRESENT);
        (sregs.cr3, sregs.cr4) = (0x5000, CR4_LA57);
        let large = place(!0 << 48 | top | 2 << 30, &sregs, &memory).unwrap();
        assert_eq!(large, Place { address: 0x40_4000_0000, writable: false });
        sregs.efer = 0;
        assert_eq!(place(0, &sregs, &memory), None);
        sregs.cr0 = 0;
        assert_eq!(place(0x1234, &sregs, &memory), Some(Place { address: 0x1234, writable: true }));
    }

    #[test]
    fn every_level_has_to_allow_a_write() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let mut sregs = kvm_sregs { cr0: CR0_PG, cr3: 0x1000, efer: EFER_LMA, ..Default::default() };
        let may_write = |flags: [u64; 4], sregs: &kvm_sregs| {
            for (level, flag) in (1..).zip(flags) {
                memory.write_obj(((level + 1) << 12) | PRESENT | flag, GuestAddress(level << 12)).unwrap();
            }
            place(0, sregs, &memory).unwrap().writable
        };
        let all = WRITABLE | USER;
        for level in 0..4 {
            let with = |flag| std::array::from_fn(|other| if other == level { flag } else { all });
            sregs.ss.dpl = 0;
            assert!(may_write(with(all), &sregs) && may_write(with(WRITABLE), &sregs));
            assert!(!may_write(with(USER), &sregs));
            sregs.ss.dpl = 3;
            assert!(may_write(with(all), &sregs));
            assert!(!may_write(with(USER), &sregs) && !may_write(with(WRITABLE), &sregs));
        }
    }
}
