//! Which guest addresses an instruction accesses. KVM_RUN that ends in EFAULT does not say at which of them it could
//! not go on (api.rst, KVM_CAP_MEMORY_FAULT_INFO, promises it; x86 does not do it for memory that the host lost).

use iced_x86::{
    Decoder, DecoderOptions, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register,
    UsedMemory,
};
use kvm_bindings::{KVM_RUN_X86_GUEST_MODE, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::paging;
use super::vectors::Vectors;

/// Protection enable in CR0.
const CR0_PE: u64 = 1;

/// The vector of general protection faults (Intel SDM volume 3, 6.15).
const GENERAL_PROTECTION: u8 = 13;

/// The longest instruction, in bytes.
const MAX_INSTRUCTION: usize = 15;

/// The instruction at which a vCPU stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoppedAt {
    /// Its linear address.
    pub instruction: u64,
    /// Its code, and what it accesses in memory, the stack included: the first and the last byte of each. Those that the
    /// page tables do not lead to are left out.
    pub accesses: Vec<Access>,
}

/// What an instruction accesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// The guest-physical address.
    pub address: u64,
    /// Whether it is written to, as the page tables allow.
    pub write: bool,
}

/// Whether a vCPU has stopped in a guest of its guest, whose registers and page tables say nothing of the guest's own memory
/// (api.rst, KVM_CAP_X86_GUEST_MODE; Linux before 6.12 does not tell).
pub fn is_nested(vcpu: &mut VcpuFd) -> bool {
    u32::from(vcpu.get_kvm_run().flags) & KVM_RUN_X86_GUEST_MODE != 0
}

/// Looks at the instruction that a vCPU is about to execute. `on_access` is called with each access as it is found: with
/// that to the code before the code is read.
///
/// # Errors
/// KVM does not give its registers.
pub fn stopped_at(
    vcpu: &VcpuFd,
    memory: &GuestMemoryMmap,
    mut on_access: impl FnMut(Access),
) -> Result<StoppedAt, kvm_ioctls::Error> {
    let registers = Registers {
        general: vcpu.get_regs()?,
        special: vcpu.get_sregs()?,
        // A guest may have more state than the call returns; then only gathers and scatters are not found.
        vectors: Vectors::new(vcpu.get_xsave().unwrap_or_default()),
    };
    let place = |linear: u64| paging::place(linear, &registers.special, memory);
    let mut accesses = vec![];
    let mut note = |linear: u64, write: bool| {
        let access =
            place(linear).map(|place| Access { address: place.address, write: write && place.writable });
        if let Some(access) = access.filter(|access| !accesses.contains(access)) {
            accesses.push(access);
            on_access(access);
        }
    };
    let instruction =
        registers.linear(registers.base(&registers.special.cs).wrapping_add(registers.general.rip));
    note(instruction, false);
    let code = read_code(instruction, memory, |linear| Some(place(linear)?.address));
    for Operand { start, last, write } in operands(&code, &registers) {
        note(start, write);
        note(last, write);
    }
    Ok(StoppedAt { instruction, accesses })
}

/// Has a vCPU take a general protection fault for the instruction at which it stopped, as for an address that is none.
/// Returns whether it does: it cannot where an event is on its way to it already, or before its protected mode.
///
/// # Errors
/// KVM does not give its registers, or takes none.
pub fn refuse(vcpu: &VcpuFd) -> Result<bool, kvm_ioctls::Error> {
    let special = vcpu.get_sregs()?;
    let mut events = vcpu.get_vcpu_events()?;
    let is_busy = events.exception.injected
        | events.exception.pending
        | events.interrupt.injected
        | events.nmi.injected;
    if special.cr0 & CR0_PE == 0 || is_busy != 0 {
        return Ok(false);
    }
    events.exception.injected = 1;
    events.exception.nr = GENERAL_PROTECTION;
    events.exception.has_error_code = 1;
    events.exception.error_code = 0;
    vcpu.set_vcpu_events(&events).map(|()| true)
}

/// The bytes of an instruction, which may lie in two pages; fewer where the second cannot be read.
fn read_code(linear: u64, memory: &GuestMemoryMmap, physical: impl Fn(u64) -> Option<u64>) -> Vec<u8> {
    let byte = |offset: u64| {
        let address = physical(linear.wrapping_add(offset))?;
        memory.read_obj::<u8>(GuestAddress(address)).ok()
    };
    (0..MAX_INSTRUCTION as u64).map_while(byte).collect()
}

/// An operand in memory, by linear addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Operand {
    start: u64,
    last: u64,
    write: bool,
}

/// As much as an instruction accesses that does not say how much (XSAVE): the standard form of what there is today.
const UNKNOWN_SIZE: u64 = 4096;

/// The registers that operands are found by.
struct Registers {
    general: kvm_regs,
    special: kvm_sregs,
    vectors: Vectors,
}

impl Registers {
    fn is_64_bit(&self) -> bool {
        self.special.cs.l != 0
    }

    /// The base of a segment other than FS and GS, which the CPU takes for 0 in 64-bit mode whatever was loaded before (Intel
    /// SDM volume 1, 3.4.4.1).
    fn base(&self, segment: &kvm_segment) -> u64 {
        if self.is_64_bit() { 0 } else { segment.base }
    }

    /// The linear address that comes of a sum, which has 32 bits outside of 64-bit mode.
    fn linear(&self, address: u64) -> u64 {
        if self.is_64_bit() { address } else { address as u32 as u64 }
    }

    /// The value of one, or the base of a segment; of a vector an element, by its index and its size in bytes.
    fn value(&self, register: Register, element: usize, size: usize) -> Option<u64> {
        let Registers { general, special, vectors } = self;
        let value = match register {
            Register::ES => return Some(self.base(&special.es)),
            Register::CS => return Some(self.base(&special.cs)),
            Register::SS => return Some(self.base(&special.ss)),
            Register::DS => return Some(self.base(&special.ds)),
            Register::FS => return Some(special.fs.base),
            Register::GS => return Some(special.gs.base),
            vector if vector.is_vector_register() => {
                return vectors.element(vector.number(), element, size);
            }
            _ => match register.full_register() {
                Register::RAX => general.rax,
                Register::RBX => general.rbx,
                Register::RCX => general.rcx,
                Register::RDX => general.rdx,
                Register::RSI => general.rsi,
                Register::RDI => general.rdi,
                Register::RBP => general.rbp,
                Register::RSP => general.rsp,
                Register::R8 => general.r8,
                Register::R9 => general.r9,
                Register::R10 => general.r10,
                Register::R11 => general.r11,
                Register::R12 => general.r12,
                Register::R13 => general.r13,
                Register::R14 => general.r14,
                Register::R15 => general.r15,
                _ => return None,
            },
        };
        Some(match register.size() {
            8 => value,
            size => value & ((1 << (8 * size)) - 1),
        })
    }
}

/// What an instruction accesses in memory, implied operands included.
fn operands(code: &[u8], registers: &Registers) -> Vec<Operand> {
    let bitness = match (registers.special.cs.l, registers.special.cs.db) {
        (1, _) => 64,
        (_, 1) => 32,
        _ => 16,
    };
    let instruction: Instruction =
        Decoder::with_ip(bitness, code, registers.general.rip, DecoderOptions::NONE).decode();
    let mut factory = InstructionInfoFactory::new();
    let used = factory.info(&instruction).used_memory().iter().flat_map(|memory| {
        use OpAccess::{CondRead, CondWrite, Read, ReadCondWrite, ReadWrite, Write};
        let write = match memory.access() {
            Write | CondWrite | ReadWrite | ReadCondWrite => Some(true),
            Read | CondRead => Some(false),
            _ => None,
        };
        // One that repeats itself has no size but that of each time.
        let sizes = [memory.memory_size(), instruction.memory_size()].map(|size| size.size() as u64);
        let size = sizes.into_iter().find(|size| *size > 0).unwrap_or(UNKNOWN_SIZE);
        let elements = elements(&instruction, memory, registers);
        let offset = bit_offset(&instruction, registers);
        let operand = move |element, write| {
            let value = |register, element, size| registers.value(register, element, size);
            let start = memory.virtual_address(element, value)?.wrapping_add(offset);
            let [start, last] =
                [start, start.wrapping_add(size - 1)].map(|address| registers.linear(address));
            Some(Operand { start, last, write })
        };
        let elements = (0..64).filter(move |element| elements & 1 << element != 0);
        elements.filter_map(move |element| operand(element, write?))
    });
    used.collect()
}

/// A bit for each element that is accessed: of a gather or scatter those that its mask has, from which the CPU takes each as
/// soon as it is done.
fn elements(instruction: &Instruction, memory: &UsedMemory, registers: &Registers) -> u64 {
    let index_size = match memory.vsib_size() as usize {
        0 => return 1,
        size => size,
    };
    let size = memory.memory_size().size();
    let is_register = |number: &u32| instruction.op_kind(*number) == OpKind::Register;
    let operands =
        (0..instruction.op_count()).filter(is_register).map(|number| instruction.op_register(number));
    let mut vectors = operands.filter(|register| register.is_vector_register());
    let (data, mask) = (vectors.next(), vectors.next());
    let count = memory.index().size() / index_size;
    let count = data.map_or(count, |data| count.min(data.size() / size));
    // AVX2 has the mask in the signs of a vector's elements, AVX-512 in a register for masks.
    let is_set = |element: usize| match (instruction.op_mask(), mask) {
        (Register::None, Some(mask)) => {
            Some(registers.vectors.element(mask.number(), element, size)? >> (8 * size - 1) != 0)
        }
        (Register::None, None) => None,
        (mask, _) => Some(registers.vectors.mask(mask.number())? & 1 << element != 0),
    };
    let set = (0..count).filter(|element| is_set(*element).unwrap_or(true));
    set.fold(0, |all, element| all | 1 << element)
}

/// How far from its operand in memory BT and its like access, in bytes: a register has a bit's number, from anywhere on.
fn bit_offset(instruction: &Instruction, registers: &Registers) -> u64 {
    use Mnemonic::{Bt, Btc, Btr, Bts};
    if !matches!(instruction.mnemonic(), Bt | Btc | Btr | Bts) || instruction.op1_kind() != OpKind::Register {
        return 0;
    }
    let register = instruction.op1_register();
    let bits = 8 * register.size() as u32;
    let number = registers.value(register, 0, 0).unwrap_or_default();
    // The number has a sign.
    let number = (number << (64 - bits)) as i64 >> (64 - bits);
    (number.div_euclid(bits.into()) * i64::from(bits / 8)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::kvm_xsave;

    /// Registers in 64-bit mode.
    fn registers(general: kvm_regs) -> Registers {
        let mut special = kvm_sregs::default();
        special.cs.l = 1;
        special.gs.base = 0x5_0000;
        Registers { general, special, vectors: Vectors::of_intel(kvm_xsave::default()) }
    }

    fn operands_of(code: &[u8]) -> Vec<(u64, u64, bool)> {
        let registers = registers(kvm_regs {
            rax: 0x1000,
            rcx: 4,
            rsi: 0x2000,
            rdi: 0x3000,
            rsp: 0x8000,
            rip: 0x10,
            ..Default::default()
        });
        operands(code, &registers)
            .iter()
            .map(|operand| (operand.start, operand.last, operand.write))
            .collect()
    }

    #[test]
    fn operands_in_memory_are_found() {
        // mov [rax+rcx*8+0x20], rdi; rep movsq; mov eax, gs:[rcx]; mov rax, [rip+0x100]; add [rax], cl; mov rax, rcx; none.
        assert_eq!(operands_of(&[0x48, 0x89, 0x7c, 0xc8, 0x20]), [(0x1040, 0x1047, true)]);
        let mut copied = operands_of(&[0xf3, 0x48, 0xa5]);
        copied.sort_unstable();
        assert_eq!(copied, [(0x2000, 0x2007, false), (0x3000, 0x3007, true)]);
        assert_eq!(operands_of(&[0x65, 0x8b, 0x01]), [(0x5_0004, 0x5_0007, false)]);
        assert_eq!(operands_of(&[0x48, 0x8b, 0x05, 0, 1, 0, 0]), [(0x117, 0x11e, false)]);
        assert_eq!(operands_of(&[0x00, 0x08]), [(0x1000, 0x1000, true)]);
        assert_eq!(operands_of(&[0x48, 0x89, 0xc8]), []);
        assert_eq!(operands_of(&[]), []);
        // push rax; call [rip]; lea rax, [rcx]; movdir64b rdi, [rsi]; xsave [rax].
        assert_eq!(operands_of(&[0x50]), [(0x7ff8, 0x7fff, true)]);
        assert!(operands_of(&[0xe8, 0, 0, 0, 0]).contains(&(0x7ff8, 0x7fff, true)));
        assert_eq!(operands_of(&[0x48, 0x8d, 0x01]), []);
        let moved = operands_of(&[0x66, 0x0f, 0x38, 0xf8, 0x3e]);
        assert!(
            moved.contains(&(0x2000, 0x203f, false)) && moved.contains(&(0x3000, 0x303f, true)),
            "{moved:x?}"
        );
        assert!(operands_of(&[0x0f, 0xae, 0x20]).contains(&(0x1000, 0x1fff, true)));
    }

    #[test]
    fn segments_count_where_the_cpu_heeds_them() {
        let mut registers = registers(kvm_regs { rax: 0x1000, rsp: 0x8000, ..Default::default() });
        for segment in [&mut registers.special.ds, &mut registers.special.ss] {
            segment.base = 0xffff_9000;
        }
        // mov [rax], edi (or [eax]); push rax (or eax); mov gs:[rax], edi.
        let starts = |registers: &Registers| {
            [&[0x89, 0x38][..], &[0x50], &[0x65, 0x89, 0x38]].map(|code| operands(code, registers)[0].start)
        };
        // A program may load them with what it has put into its local descriptor table.
        assert_eq!(starts(&registers), [0x1000, 0x7ff8, 0x5_1000]);
        (registers.special.cs.l, registers.special.cs.db) = (0, 1);
        assert_eq!(starts(&registers), [0xffff_a000, 0x0ffc, 0x5_1000]);
    }

    #[test]
    fn bits_are_far_from_their_operand() {
        // bts [rdi], rax; bt dword [rdi], esi; bts qword [rdi], 3; with rax = 0x1000 bits.
        assert_eq!(operands_of(&[0x48, 0x0f, 0xab, 0x07]), [(0x3200, 0x3207, true)]);
        assert_eq!(operands_of(&[0x0f, 0xa3, 0x37]), [(0x3400, 0x3403, false)]);
        assert_eq!(operands_of(&[0x48, 0x0f, 0xba, 0x2f, 3]), [(0x3000, 0x3007, true)]);
        let registers = registers(kvm_regs { rax: -1_i64 as u64, rdi: 0x3000, ..Default::default() });
        let operand = operands(&[0x48, 0x0f, 0xab, 0x07], &registers)[0];
        assert_eq!((operand.start, operand.last), (0x2ff8, 0x2fff));
    }

    #[test]
    fn a_gather_has_an_operand_for_each_element_of_its_mask() {
        let mut registers = registers(kvm_regs { rax: 0x10_0000, ..Default::default() });
        let mut area = kvm_xsave::default();
        // xmm1; xmm2, which leaves out the third; k1.
        area.region[(160 + 16) / 4..][..4].copy_from_slice(&[0x1000, -0x2000_i32 as u32, 0, 8]);
        area.region[(160 + 32) / 4..][..4].copy_from_slice(&[1 << 31, u32::MAX, i32::MAX as u32, 1 << 31]);
        area.region[(1088 + 8) / 4] = 0b101;
        registers.vectors = Vectors::of_intel(area);
        let starts = |code: &[u8]| -> Vec<_> {
            operands(code, &registers).iter().map(|operand| (operand.start, operand.write)).collect()
        };
        // vpgatherdd xmm0, [rax+xmm1*2], xmm2.
        let [minus, plus] = [0x10_0000 - 0x4000, 0x10_0000 + 0x2000];
        let found = [(plus, false), (minus, false), (0x10_0010, false)];
        assert_eq!(starts(&[0xc4, 0xe2, 0x69, 0x90, 0x04, 0x48]), found);
        // vpscatterqq [rax+xmm1]{k1}, xmm0.
        let far = 0xffff_e000_0000_1000_u64.wrapping_add(0x10_0000);
        assert_eq!(starts(&[0x62, 0xf2, 0xfd, 0x09, 0xa1, 0x04, 0x08]), [(far, true)]);
        // vpscatterdq [rax+xmm1]{k1}, xmm0, which has two elements.
        assert_eq!(starts(&[0x62, 0xf2, 0xfd, 0x09, 0xa0, 0x04, 0x08]), [(0x10_1000, true)]);
    }
}
