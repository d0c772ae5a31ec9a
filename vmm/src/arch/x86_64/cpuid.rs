//! CPUID: what KVM supports on this host, with the topology of this guest: one socket, one thread a core.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

/// Bits of leaf 1, ECX.
const VMX: u32 = 1 << 5;
const TSC_DEADLINE_TIMER: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Bit of leaf 0x8000_0001, ECX.
const SVM: u32 = 1 << 2;
/// The leaf that describes SVM.
const SVM_FEATURES: u32 = 0x8000_000a;
/// Levels of leaf 0xb.
const LEVEL_THREAD: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

/// What every vCPU of the VM reports; whether it has VMX or SVM is `nested`'s to say, if the host's KVM can nest.
///
/// # Errors
/// KVM cannot tell what it supports.
pub fn supported(kvm: &Kvm, nested: bool) -> Result<CpuId, kvm_ioctls::Error> {
    let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    if !nested {
        hide_virtualization(cpuid.as_mut_slice());
    }
    for leaf in cpuid.as_mut_slice().iter_mut().filter(|leaf| leaf.function == 1) {
        leaf.ecx |= HYPERVISOR;
        // KVM emulates it whatever the host has, but leaves it to us to say so (api.rst, KVM_CAP_TSC_DEADLINE_TIMER).
        if kvm.check_extension(Cap::TscDeadlineTimer) {
            leaf.ecx |= TSC_DEADLINE_TIMER;
        }
    }
    Ok(cpuid)
}

/// Takes VMX and SVM away. KVM goes by these bits where a guest uses their instructions, registers and MSRs.
fn hide_virtualization(leaves: &mut [kvm_cpuid_entry2]) {
    for leaf in leaves {
        match leaf.function {
            1 => leaf.ecx &= !VMX,
            0x8000_0001 => leaf.ecx &= !SVM,
            SVM_FEATURES => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
            _ => {}
        }
    }
}

/// Physical address bits of the guest.
pub fn address_bits(cpuid: &CpuId) -> u8 {
    cpuid.as_slice().iter().find(|leaf| leaf.function == 0x8000_0008).map_or(36, |leaf| leaf.eax as u8)
}

/// What vCPU `id` of `count` reports.
///
/// # Errors
/// More leaves than KVM takes.
pub fn for_vcpu(supported: &CpuId, id: u8, count: u8) -> Result<CpuId, vmm_sys_util::fam::Error> {
    let (id, count) = (u32::from(id), u32::from(count));
    let id_bits = count.next_power_of_two().trailing_zeros();
    let mut leaves: Vec<_> = supported.as_slice().to_vec();
    leaves.retain(|leaf| !matches!(leaf.function, 0xb | 0x1f | 0x8000_0026));
    for leaf in &mut leaves {
        match leaf.function {
            1 => {
                leaf.ebx = leaf.ebx & 0xffff | count << 16 | id << 24;
                // HTT: more than one logical processor.
                leaf.edx = leaf.edx & !(1 << 28) | u32::from(count > 1) << 28;
            }
            4 => {
                let level = leaf.eax >> 5 & 7;
                let sharing = if level >= 3 { count - 1 } else { 0 };
                leaf.eax = leaf.eax & 0x3fff | sharing << 14 | (count - 1) << 26;
            }
            0x8000_0008 => leaf.ecx = leaf.ecx & !0xf0ff | id_bits << 12 | (count - 1),
            0x8000_001e => (leaf.eax, leaf.ebx, leaf.ecx) = (id, id, 0),
            0x8000_001d => {
                let level = leaf.eax >> 5 & 7;
                let sharing = if level >= 3 { count - 1 } else { 0 };
                leaf.eax = leaf.eax & 0x3fff | sharing << 14;
            }
            _ => {}
        }
    }
    let levels = [(0, 1, LEVEL_THREAD), (id_bits, count, LEVEL_CORE), (0, 0, 0)];
    for (index, (eax, ebx, level)) in (0..).zip(levels) {
        let flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
        let ecx = level | index;
        leaves.push(kvm_cpuid_entry2 {
            function: 0xb,
            index,
            flags,
            eax,
            ebx,
            ecx,
            edx: id,
            ..Default::default()
        });
    }
    CpuId::from_entries(&leaves)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        let (eax, ebx, ecx, edx) = (u32::MAX, u32::MAX, u32::MAX, u32::MAX);
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    #[test]
    fn every_leaf_tells_the_same_topology() {
        let host =
            [entry(1, 0), entry(4, 3), entry(0xb, 0), entry(0xb, 1), entry(0x8000_0008, 0), entry(0x1f, 0)];
        let host = CpuId::from_entries(&host).unwrap();
        let guest = for_vcpu(&host, 5, 6).unwrap();
        let leaf = |function, index| {
            let found = guest.as_slice().iter().filter(|l| (l.function, l.index) == (function, index));
            let found: Vec<_> = found.collect();
            assert_eq!(found.len(), 1, "{function:#x}.{index}");
            *found[0]
        };
        assert_eq!(leaf(1, 0).ebx >> 16, 5 << 8 | 6);
        assert_eq!(leaf(4, 3).eax >> 26, 5);
        assert_eq!((leaf(0xb, 1).eax, leaf(0xb, 1).ebx, leaf(0xb, 1).edx), (3, 6, 5));
        assert_eq!(leaf(0x8000_0008, 0).ecx & 0xf0ff, 3 << 12 | 5);
        assert!(guest.as_slice().iter().all(|l| l.function != 0x1f));
    }

    #[test]
    fn virtualization_is_hidden_and_nothing_else() {
        let mut leaves = [entry(1, 0), entry(0x8000_0001, 0), entry(SVM_FEATURES, 0), entry(7, 0)];
        hide_virtualization(&mut leaves);
        assert_eq!([leaves[0].ecx, leaves[1].ecx].map(|ecx| !ecx), [1 << 5, 1 << 2]);
        assert_eq!(
            (leaves[0].edx, leaves[1].edx, leaves[2].edx, leaves[3].ecx),
            (u32::MAX, u32::MAX, 0, u32::MAX)
        );
    }

    #[test]
    fn one_cpu_has_no_siblings() {
        let host = CpuId::from_entries(&[entry(1, 0)]).unwrap();
        let guest = for_vcpu(&host, 0, 1).unwrap();
        assert_eq!(guest.as_slice()[0].edx >> 28 & 1, 0);
    }
}
