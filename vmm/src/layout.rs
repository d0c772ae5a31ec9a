//! The guest-physical map. No other file knows an address.
//!
//! ```text
//! 0x0000_0000            RAM (boot structures in the first MiB, the kernel above it)
//! 0xc000_0000            hole: BARs with registers
//! 0xe000_0000            hole: ECAM, one bus
//! 0xfec0_0000            hole: I/O APIC, local APICs, what KVM keeps for itself
//! 0x1_0000_0000          RAM beyond the first 3 GiB
//! end of RAM, aligned    prefetchable BARs: the DAX windows, as low as can be, since the guest's direct map must reach them
//! ```

use std::ops::Range;

/// Bytes of the pages that guest memory and windows are aligned to.
pub const HUGE_PAGE: u64 = 2 << 20;

/// Where RAM is interrupted.
pub const HOLE: Range<u64> = 0xc000_0000..0x1_0000_0000;
/// BARs with registers.
pub const MMIO_32: Range<u64> = HOLE.start..0xe000_0000;
/// The enhanced configuration access mechanism's one bus.
pub const ECAM: u64 = 0xe000_0000;

/// First address of the I/O APIC's page.
pub const IO_APIC: u32 = 0xfec0_0000;
/// First address of the local APICs' page.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// The page of KVM's identity map and, next to it, the three pages of its task state segment (Intel, no unrestricted
/// guest). KVM wants both below 4 GiB and outside RAM.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// See [`KVM_IDENTITY_MAP`].
pub const KVM_TSS: u64 = 0xfffb_d000;

/// Boot structures, all below the traditional end of conventional memory.
pub mod boot {
    use std::ops::Range;

    /// Segment descriptors of the first vCPU.
    pub const GDT: u64 = 0x500;
    /// `struct hvm_start_info` of the PVH boot protocol.
    pub const PVH_START_INFO: u64 = 0x6000;
    /// Its memory map.
    pub const PVH_MEMORY_MAP: u64 = 0x6100;
    /// Its module list: the initramfs.
    pub const PVH_MODULES: u64 = 0x6800;
    /// `struct boot_params` of the Linux boot protocol.
    pub const ZERO_PAGE: u64 = 0x7000;
    /// First of six pages with page tables that map the first 4 GiB to themselves.
    pub const PAGE_TABLES: u64 = 0x9000;
    /// The kernel command line.
    pub const COMMAND_LINE: Range<u64> = 0x2_0000..0x2_0800;
    /// End of conventional memory.
    pub const LOW_MEMORY_END: u64 = 0x9_fc00;
    /// ACPI tables; the first of them, the RSDP, is where a BIOS would put it.
    pub const ACPI: Range<u64> = 0xe_0000..0x10_0000;
    /// Where the kernel may begin.
    pub const HIGH_MEMORY: u64 = 0x10_0000;
}

/// I/O ports.
pub mod ports {
    /// First serial port.
    pub const SERIAL: u16 = 0x3f8;
    /// Keyboard controller.
    pub const KEYBOARD: u16 = 0x60;
    /// ACPI sleep control, sleep status, reset.
    pub const ACPI_SLEEP: u16 = 0x600;
    /// PCI configuration mechanism 1.
    pub const PCI_CONFIG: u16 = 0xcf8;
}

/// Interrupt lines (global system interrupts).
pub mod irq {
    /// The serial port's.
    pub const SERIAL: u32 = 4;
    /// Lines of the I/O APIC; MSI routes come after them.
    pub const IO_APIC_LINES: u32 = 24;
}

/// Guest-physical ranges of `size` bytes of RAM: one below the hole, one above it if needed.
pub fn ram_ranges(size: u64) -> Vec<Range<u64>> {
    let low = 0..size.min(HOLE.start);
    match size.checked_sub(HOLE.start) {
        Some(rest) if rest > 0 => vec![low, HOLE.end..HOLE.end + rest],
        _ => vec![low],
    }
}

/// Guest-physical range for prefetchable BARs in a guest with `ram` bytes of RAM and `address_bits` physical address
/// bits.
pub fn mmio_64(ram: u64, address_bits: u8) -> Range<u64> {
    let ram_end = ram_ranges(ram).last().map_or(0, |range| range.end);
    let start = ram_end.max(HOLE.end).next_multiple_of(1 << 30);
    // The topmost page is left out: Linux refuses resources that end at the last address.
    start..((1_u64 << address_bits.clamp(36, 52)) - HUGE_PAGE).max(start)
}

/// Hands out addresses of a range from its beginning, each aligned to its size.
#[derive(Debug)]
pub struct Apertures {
    mmio_32: Range<u64>,
    mmio_64: Range<u64>,
}

impl Apertures {
    /// All of `mmio_64` and of [`MMIO_32`] is free.
    pub fn new(mmio_64: Range<u64>) -> Apertures {
        Apertures { mmio_32: MMIO_32, mmio_64 }
    }

    /// An address for a BAR of `size` bytes, a power of two; none when the range for its kind is full.
    pub fn place(&mut self, size: u64, prefetchable: bool) -> Option<u64> {
        let range = if prefetchable { &mut self.mmio_64 } else { &mut self.mmio_32 };
        let address = range.start.checked_next_multiple_of(size)?;
        let end = address.checked_add(size).filter(|end| *end <= range.end)?;
        range.start = end;
        Some(address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_stays_out_of_the_hole() {
        let total = |ranges: &[Range<u64>]| ranges.iter().map(|r| r.end - r.start).sum::<u64>();
        for size in [64 << 20, HOLE.start - HUGE_PAGE, HOLE.start, HOLE.start + HUGE_PAGE, 6 << 30, 64 << 30]
        {
            let ranges = ram_ranges(size);
            assert_eq!(total(&ranges), size);
            assert!(ranges.iter().all(|r| r.end <= HOLE.start || r.start >= HOLE.end), "{ranges:x?}");
        }
        assert_eq!(ram_ranges(HOLE.start).len(), 1);
    }

    #[test]
    fn bars_are_aligned_disjoint_and_clear_of_ram() {
        let mmio = mmio_64(6 << 30, 40);
        assert!(mmio.start >= ram_ranges(6 << 30)[1].end);
        let mut apertures = Apertures::new(mmio.clone());
        let mut last_end = mmio.start;
        for size in [32 << 20, 1 << 30, 64 << 20, 256 << 30, 2 << 20] {
            let address = apertures.place(size, true).unwrap();
            assert!(address.is_multiple_of(size) && address >= last_end && address + size <= mmio.end);
            last_end = address + size;
        }
        assert_eq!(apertures.place(1 << 40, true), None, "beyond what the CPU can address");
        assert_eq!(apertures.place(0x8000, false), Some(MMIO_32.start));
        assert_eq!(apertures.place(0x8000, false), Some(MMIO_32.start + 0x8000));
    }

    proptest::proptest! {
        /// Whatever is placed, in any order, until nothing fits any more and beyond.
        #[test]
        fn bars_of_any_size_are_aligned_disjoint_and_within_reach(
            chunks in 32u64..(1 << 20),
            address_bits in 36u8..=52,
            bars in proptest::collection::vec((0u32..42, proptest::bool::ANY), 0..60),
        ) {
            let ram = chunks * HUGE_PAGE;
            let mmio = mmio_64(ram, address_bits);
            let mut apertures = Apertures::new(mmio.clone());
            let mut taken = ram_ranges(ram);
            for (bits, prefetchable) in bars {
                let size = 1u64 << bits;
                let Some(address) = apertures.place(size, prefetchable) else { continue };
                let bar = address..address + size;
                let within = if prefetchable { &mmio } else { &MMIO_32 };
                proptest::prop_assert!(address.is_multiple_of(size));
                proptest::prop_assert!(within.start <= bar.start && bar.end <= within.end, "{bar:x?}");
                proptest::prop_assert!(bar.end <= 1 << address_bits || !prefetchable);
                for other in &taken {
                    proptest::prop_assert!(bar.end <= other.start || other.end <= bar.start, "{bar:x?} {other:x?}");
                }
                taken.push(bar);
            }
        }
    }
}
