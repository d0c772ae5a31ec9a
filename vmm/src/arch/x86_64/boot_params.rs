//! What the kernel is told at its entry: memory map, command line, initramfs, ACPI; as the zero page of the Linux boot
//! protocol (Documentation/arch/x86/zero-page.rst) or as PVH's start info.

use std::ops::Range;

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::layout::{self, boot};

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// What the kernel is told.
pub struct BootInfo<'a> {
    /// Bytes of RAM.
    pub ram: u64,
    /// Where the initramfs is; empty for none.
    pub initramfs: Range<u64>,
    /// Bytes of the command line at [`boot::COMMAND_LINE`], without the terminating zero.
    pub command_line_length: u32,
    /// Where the RSDP is.
    pub rsdp: u64,
    /// The header that the kernel image brought along, for the Linux boot protocol.
    pub setup_header: Option<&'a setup_header>,
}

/// The memory map: start, size, type.
fn memory_map(ram: u64) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, boot::LOW_MEMORY_END, E820_RAM),
        (boot::LOW_MEMORY_END, boot::HIGH_MEMORY - boot::LOW_MEMORY_END, E820_RESERVED),
    ];
    for range in layout::ram_ranges(ram) {
        let start = range.start.max(boot::HIGH_MEMORY);
        map.push((start, range.end - start, E820_RAM));
    }
    map.insert(3, (layout::ECAM, devices::pci::Ecam::SIZE, E820_RESERVED));
    map
}

/// Writes `struct boot_params` to [`boot::ZERO_PAGE`].
///
/// # Errors
/// Guest memory is too small.
pub fn write_zero_page(
    memory: &GuestMemoryMmap,
    info: &BootInfo,
) -> Result<(), linux_loader::configurator::Error> {
    const LOADER_UNDEFINED: u8 = 0xff;
    const CAN_USE_HEAP: u8 = 0x80;
    let mut params = boot_params { acpi_rsdp_addr: info.rsdp, ..Default::default() };
    if let Some(header) = info.setup_header {
        params.hdr = *header;
    }
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.loadflags &= !CAN_USE_HEAP;
    params.hdr.cmd_line_ptr = boot::COMMAND_LINE.start as u32;
    params.hdr.cmdline_size = info.command_line_length;
    params.hdr.ramdisk_image = info.initramfs.start as u32;
    params.hdr.ramdisk_size = (info.initramfs.end - info.initramfs.start) as u32;
    let map = memory_map(info.ram);
    for (entry, (addr, size, type_)) in params.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry { addr: *addr, size: *size, type_: *type_ };
    }
    params.e820_entries = map.len() as u8;
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&params, GuestAddress(boot::ZERO_PAGE)), memory)
}

/// Writes `struct hvm_start_info` and what it points to.
///
/// # Errors
/// Guest memory is too small.
pub fn write_start_info(
    memory: &GuestMemoryMmap,
    info: &BootInfo,
) -> Result<(), linux_loader::configurator::Error> {
    const MAGIC: u32 = 0x336e_c578;
    let map: Vec<_> = memory_map(info.ram)
        .into_iter()
        .map(|(addr, size, type_)| hvm_memmap_table_entry { addr, size, type_, reserved: 0 })
        .collect();
    let modules: Vec<_> = (!info.initramfs.is_empty())
        .then(|| hvm_modlist_entry {
            paddr: info.initramfs.start,
            size: info.initramfs.end - info.initramfs.start,
            ..Default::default()
        })
        .into_iter()
        .collect();
    let start_info = hvm_start_info {
        magic: MAGIC,
        version: 1,
        nr_modules: modules.len() as u32,
        modlist_paddr: boot::PVH_MODULES,
        cmdline_paddr: boot::COMMAND_LINE.start,
        rsdp_paddr: info.rsdp,
        memmap_paddr: boot::PVH_MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let mut params = BootParams::new(&start_info, GuestAddress(boot::PVH_START_INFO));
    params.set_sections(&map, GuestAddress(boot::PVH_MEMORY_MAP));
    if !modules.is_empty() {
        params.set_modules(&modules, GuestAddress(boot::PVH_MODULES));
    }
    PvhBootConfigurator::write_bootparams(&params, memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_map_is_ordered_disjoint_and_holds_all_ram() {
        for ram in [64 << 20, 3 << 30, 6 << 30] {
            let map = memory_map(ram);
            assert!(map.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "{map:x?}");
            let usable: u64 = map.iter().filter(|entry| entry.2 == E820_RAM).map(|entry| entry.1).sum();
            assert_eq!(usable, ram - (boot::HIGH_MEMORY - boot::LOW_MEMORY_END));
        }
    }
}
