//! Which guest addresses an instruction accesses. KVM_RUN that ends in EFAULT does not say at which of them it could
//! not go on (api.rst, KVM_CAP_MEMORY_FAULT_INFO, promises it; x86 does not do it for memory that the host lost).

use iced_x86::{Decoder, DecoderOptions, Instruction, OpKind, Register};
use kvm_bindings::{kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// The longest instruction, in bytes.
const MAX_INSTRUCTION: usize = 15;

/// The instruction at which a vCPU stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoppedAt {
    /// Its linear address.
    pub instruction: u64,
    /// The guest-physical addresses of its code, of its operands in memory, and of the top of its stack, in this order;
    /// those that the page tables do not lead to are left out.
    pub accesses: Vec<u64>,
}

/// Looks at the instruction that a vCPU is about to execute.
///
/// # Errors
/// KVM does not give its registers.
pub fn stopped_at(vcpu: &VcpuFd, memory: &GuestMemoryMmap) -> Result<StoppedAt, kvm_ioctls::Error> {
    let (regs, sregs) = (vcpu.get_regs()?, vcpu.get_sregs()?);
    let physical = |linear: u64| {
        let translated = vcpu.translate_gva(linear).ok()?;
        (translated.valid != 0).then_some(translated.physical_address)
    };
    let instruction = sregs.cs.base.wrapping_add(regs.rip);
    let code = read_code(instruction, memory, physical);
    let mut accesses = vec![];
    for linear in std::iter::once(instruction)
        .chain(operands(&code, &regs, &sregs))
        .chain([sregs.ss.base.wrapping_add(regs.rsp)])
    {
        accesses.extend(physical(linear).filter(|address| !accesses.contains(address)));
    }
    Ok(StoppedAt { instruction, accesses })
}

/// The bytes of an instruction, which may lie in two pages; fewer where the second cannot be read.
fn read_code(linear: u64, memory: &GuestMemoryMmap, physical: impl Fn(u64) -> Option<u64>) -> Vec<u8> {
    let byte = |offset: u64| {
        let address = physical(linear.wrapping_add(offset))?;
        memory.read_obj::<u8>(GuestAddress(address)).ok()
    };
    (0..MAX_INSTRUCTION as u64).map_while(byte).collect()
}

/// The linear addresses of an instruction's operands in memory.
fn operands(code: &[u8], regs: &kvm_regs, sregs: &kvm_sregs) -> Vec<u64> {
    let bitness = match (sregs.cs.l, sregs.cs.db) {
        (1, _) => 64,
        (_, 1) => 32,
        _ => 16,
    };
    let instruction: Instruction = Decoder::with_ip(bitness, code, regs.rip, DecoderOptions::NONE).decode();
    let in_memory = |kind: OpKind| {
        use OpKind::*;
        matches!(
            kind,
            Memory
                | MemorySegSI
                | MemorySegESI
                | MemorySegRSI
                | MemorySegDI
                | MemorySegEDI
                | MemorySegRDI
                | MemoryESDI
                | MemoryESEDI
                | MemoryESRDI
        )
    };
    (0..instruction.op_count())
        .filter(|operand| in_memory(instruction.op_kind(*operand)))
        .filter_map(|operand| {
            instruction.virtual_address(operand, 0, |register, _, _| register_value(register, regs, sregs))
        })
        .collect()
}

/// A register as an address is computed from it; `None` for those of vectors, which no address that matters here uses.
fn register_value(register: Register, regs: &kvm_regs, sregs: &kvm_sregs) -> Option<u64> {
    let value = match register {
        Register::ES => return Some(sregs.es.base),
        Register::CS => return Some(sregs.cs.base),
        Register::SS => return Some(sregs.ss.base),
        Register::DS => return Some(sregs.ds.base),
        Register::FS => return Some(sregs.fs.base),
        Register::GS => return Some(sregs.gs.base),
        _ => match register.full_register() {
            Register::RAX => regs.rax,
            Register::RBX => regs.rbx,
            Register::RCX => regs.rcx,
            Register::RDX => regs.rdx,
            Register::RSI => regs.rsi,
            Register::RDI => regs.rdi,
            Register::RBP => regs.rbp,
            Register::RSP => regs.rsp,
            Register::R8 => regs.r8,
            Register::R9 => regs.r9,
            Register::R10 => regs.r10,
            Register::R11 => regs.r11,
            Register::R12 => regs.r12,
            Register::R13 => regs.r13,
            Register::R14 => regs.r14,
            Register::R15 => regs.r15,
            _ => return None,
        },
    };
    Some(match register.size() {
        8 => value,
        size => value & ((1 << (8 * size)) - 1),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operands_of(code: &[u8]) -> Vec<u64> {
        let regs =
            kvm_regs { rax: 0x1000, rcx: 4, rsi: 0x2000, rdi: 0x3000, rip: 0x10, ..Default::default() };
        let mut sregs = kvm_sregs::default();
        sregs.cs.l = 1;
        sregs.gs.base = 0x5_0000;
        operands(code, &regs, &sregs)
    }

    #[test]
    fn operands_in_memory_are_found() {
        // mov [rax+rcx*8+0x20], rdi; rep movsq; mov eax, gs:[rcx]; mov rax, [rip+0x100]; mov rax, rcx; nothing.
        assert_eq!(operands_of(&[0x48, 0x89, 0x7c, 0xc8, 0x20]), [0x1040]);
        assert_eq!(operands_of(&[0xf3, 0x48, 0xa5]), [0x3000, 0x2000]);
        assert_eq!(operands_of(&[0x65, 0x8b, 0x01]), [0x5_0004]);
        assert_eq!(operands_of(&[0x48, 0x8b, 0x05, 0, 1, 0, 0]), [0x117]);
        assert_eq!(operands_of(&[0x48, 0x89, 0xc8]), [0; 0]);
        assert_eq!(operands_of(&[]), [0; 0]);
    }
}
