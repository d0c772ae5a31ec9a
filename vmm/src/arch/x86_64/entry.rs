//! The state in which the first vCPU starts: 64-bit mode with identity page tables for the Linux boot protocol
//! (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol"), 32-bit protected mode for PVH (boot.rst of Xen's PVH ABI).
//! The other vCPUs wait for INIT and SIPI, as KVM leaves them.

use kvm_bindings::{Msrs, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::layout::boot;

/// How the kernel wants to be entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryPoint {
    /// Linux boot protocol, 64 bits: address, with the zero page in RSI.
    Linux64(u64),
    /// PVH: 32-bit address, with the start info in EBX.
    Pvh(u64),
}

/// Why a vCPU could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum EntryError {
    /// KVM refuses registers.
    #[error("Cannot set the {0} of a vCPU")]
    Kvm(&'static str, #[source] kvm_ioctls::Error),
    /// KVM takes no further model-specific registers.
    #[error("KVM refuses model-specific register {0:#x}")]
    Msr(u32),
    /// The boot structures do not fit guest memory.
    #[error("Cannot write the boot structures to guest memory")]
    Memory(#[source] vm_memory::GuestMemoryError),
}

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// Sets up what every vCPU needs: floating point, memory types, the local APIC's LINT pins.
///
/// # Errors
/// KVM refuses.
pub fn set_up_any(vcpu: &VcpuFd) -> Result<(), EntryError> {
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(|e| EntryError::Kvm("floating point state", e))?;
    let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let wanted = [
        msr(MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        msr(MSR_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK),
    ];
    let msrs = Msrs::from_entries(&wanted).map_err(|_| EntryError::Msr(wanted[0].index))?;
    let taken = vcpu.set_msrs(&msrs).map_err(|e| EntryError::Kvm("model-specific registers", e))?;
    if let Some(refused) = wanted.get(taken) {
        return Err(EntryError::Msr(refused.index));
    }
    set_up_lint(vcpu).map_err(|e| EntryError::Kvm("local APIC", e))
}

/// LINT0 carries the legacy interrupt controller, LINT1 non-maskable interrupts (Intel MultiProcessor Specification).
fn set_up_lint(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const EXT_INT: u8 = 7;
    const NMI: u8 = 4;
    let mut lapic: kvm_lapic_state = vcpu.get_lapic()?;
    for (register, mode) in [(LVT_LINT0, EXT_INT), (LVT_LINT1, NMI)] {
        // Delivery mode: bits 8 to 10.
        let byte = &mut lapic.regs[register + 1];
        *byte = (*byte as u8 & !7 | mode) as _;
    }
    vcpu.set_lapic(&lapic)
}

/// Sets up the first vCPU to enter the kernel.
///
/// # Errors
/// KVM refuses, or guest memory is too small for page tables.
pub fn set_up_first(vcpu: &VcpuFd, memory: &GuestMemoryMmap, entry: EntryPoint) -> Result<(), EntryError> {
    let mut sregs = vcpu.get_sregs().map_err(|e| EntryError::Kvm("system registers", e))?;
    // Flat segments; those of 64-bit code differ in one bit.
    let long_mode = matches!(entry, EntryPoint::Linux64(_));
    let code = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: 0x10,
        type_: 0xb,
        present: 1,
        s: 1,
        g: 1,
        l: long_mode.into(),
        db: (!long_mode).into(),
        ..Default::default()
    };
    let data = kvm_segment { selector: 0x18, type_: 0x3, l: 0, db: 1, ..code };
    let task = kvm_segment { selector: 0x20, type_: 0xb, limit: 0x67, s: 0, g: 0, l: 0, db: 0, ..code };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = task;
    let table = [0, 0, descriptor(&code), descriptor(&data), descriptor(&task)];
    for (slot, entry) in (boot::GDT..).step_by(8).zip(table) {
        memory.write_obj(entry, GuestAddress(slot)).map_err(EntryError::Memory)?;
    }
    sregs.gdt.base = boot::GDT;
    sregs.gdt.limit = (table.len() * 8 - 1) as u16;
    (sregs.idt.base, sregs.idt.limit) = (0, 0);
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    sregs.efer = 0;

    let mut regs = kvm_regs { rflags: 2, ..Default::default() };
    match entry {
        EntryPoint::Linux64(address) => {
            write_page_tables(memory)?;
            sregs.cr3 = boot::PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.cr0 |= CR0_PG;
            sregs.efer = EFER_LME | EFER_LMA;
            (regs.rip, regs.rsi) = (address, boot::ZERO_PAGE);
        }
        EntryPoint::Pvh(address) => (regs.rip, regs.rbx) = (address, boot::PVH_START_INFO),
    }
    vcpu.set_sregs(&sregs).map_err(|e| EntryError::Kvm("system registers", e))?;
    vcpu.set_regs(&regs).map_err(|e| EntryError::Kvm("registers", e))
}

/// Maps the first 4 GiB to themselves with 2 MiB pages: the kernel, its parameters and whatever it looks at first.
fn write_page_tables(memory: &GuestMemoryMmap) -> Result<(), EntryError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    const PAGE: u64 = 4096;
    let write =
        |address: u64, value: u64| memory.write_obj(value, GuestAddress(address)).map_err(EntryError::Memory);
    let (pml4, pdpt, pd) = (boot::PAGE_TABLES, boot::PAGE_TABLES + PAGE, boot::PAGE_TABLES + 2 * PAGE);
    write(pml4, pdpt | PRESENT_WRITABLE)?;
    for gib in 0..4 {
        write(pdpt + gib * 8, (pd + gib * PAGE) | PRESENT_WRITABLE)?;
    }
    for page in 0..4 * 512 {
        write(pd + page * 8, page << 21 | PRESENT_WRITABLE | LARGE)?;
    }
    Ok(())
}

/// A segment as the descriptor table has it (Intel SDM volume 3, section 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let base = segment.base;
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let access = u64::from(segment.type_ | segment.s << 4 | segment.dpl << 5 | segment.present << 7);
    let flags = u64::from(segment.avl | segment.l << 1 | segment.db << 2 | segment.g << 3);
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (base >> 24 & 0xff) << 56
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_encoded_as_the_processor_reads_them() {
        let code64 = kvm_segment {
            limit: 0xffff_ffff,
            type_: 0xb,
            present: 1,
            s: 1,
            g: 1,
            l: 1,
            ..Default::default()
        };
        assert_eq!(descriptor(&code64), 0x00af_9b00_0000_ffff);
        let data = kvm_segment { type_: 0x3, l: 0, db: 1, ..code64 };
        assert_eq!(descriptor(&data), 0x00cf_9300_0000_ffff);
        let task =
            kvm_segment { base: 0x1234_5678, limit: 0x67, type_: 0xb, present: 1, ..Default::default() };
        assert_eq!(descriptor(&task), 0x1200_8b34_5678_0067);
    }

    #[test]
    fn page_tables_map_four_gib_to_themselves() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write_page_tables(&memory).unwrap();
        let read = |address| memory.read_obj::<u64>(GuestAddress(address)).unwrap();
        for target in [0_u64, 0x20_0000, 0x7fff_ffff & !0x1f_ffff, 0xffe0_0000] {
            let pdpt = read(boot::PAGE_TABLES) & !0xfff;
            let pd = read(pdpt + (target >> 30) * 8) & !0xfff;
            let page = read(pd + (target >> 21 & 0x1ff) * 8);
            assert_eq!(page, target | 0x83);
        }
    }
}
