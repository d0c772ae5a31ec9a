//! Fills the guest's nested page tables ahead of its first touch, by a vCPU that is there for nothing else.
//!
//! KVM_PRE_FAULT_MEMORY (Linux 6.11) is done by a vCPU, and waits for as long as that vCPU is in KVM_RUN, which others are
//! nearly always. So a VM has one more, which is never run: no table tells the guest of it, and its local APIC is never
//! enabled, so that no interrupt goes to it. All vCPUs of a VM fill the same tables, if they have the same width of
//! physical addresses (Linux 6.12, arch/x86/kvm/mmu/mmu.c, kvm_calc_tdp_mmu_root_page_role): hence the CPUID.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use devices::virtio::device::NestedPaging;
use kvm_bindings::{CpuId, KVM_CAP_PRE_FAULT_MEMORY, KVMIO, kvm_pre_fault_memory};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_iowr_nr;

ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, KVMIO, 0xd5, kvm_pre_fault_memory);

/// Write protection in CR0, which has no effect on a vCPU that does not run.
const CR0_WP: u64 = 1 << 16;

/// How long a window waits for the vCPU, several times what a chunk takes that is in memory: another window may have it read
/// from a slow disk, and the guest's faults do without.
const PATIENCE: Duration = Duration::from_millis(2);

/// The vCPU.
pub struct PrefaultVcpu(Mutex<VcpuFd>);

impl PrefaultVcpu {
    /// Makes the vCPU, with a number that the guest's do not have and their CPUID. `None` if the host cannot prefault; then
    /// the guest's pages come one by one.
    pub fn new(kvm: &Kvm, vm: &VmFd, id: u8, cpuid: &CpuId) -> Option<Arc<PrefaultVcpu>> {
        if kvm.check_extension_raw(KVM_CAP_PRE_FAULT_MEMORY.into()) <= 0 {
            tracing::debug!(
                "KVM cannot prefault memory (Linux 6.11 can, with EPT or NPT): only the host's page tables are filled"
            );
            return None;
        }
        let vcpu = vm.create_vcpu(id.into()).and_then(|vcpu| vcpu.set_cpuid2(cpuid).map(|()| vcpu));
        vcpu.map(|vcpu| Arc::new(PrefaultVcpu(Mutex::new(vcpu))))
            .inspect_err(|error| tracing::warn!(%error, "There is no vCPU to prefault memory: first touches are slower"))
            .ok()
    }

    /// The means to prefault memory that the guest sees at `address`.
    pub fn at(self: &Arc<Self>, address: u64) -> Arc<dyn NestedPaging> {
        Arc::new(ShownAt { vcpu: Arc::downgrade(self), address })
    }

    /// Has `change` give the guest a memory slot, or take it away.
    ///
    /// With a slot go the page tables of all vCPUs, and each lets go of the old ones when it runs next, which this one
    /// never does: before Linux 6.15, KVM_PRE_FAULT_MEMORY would then try for ever. New control registers have it let go.
    pub fn while_idle<T>(&self, change: impl FnOnce() -> T) -> T {
        let vcpu = self.lock();
        let result = change();
        let renewed = vcpu.get_sregs().and_then(|mut registers| {
            registers.cr0 ^= CR0_WP;
            vcpu.set_sregs(&registers)
        });
        if let Err(error) = renewed {
            tracing::error!(%error, "Cannot renew the page tables of the vCPU that prefaults memory");
        }
        result
    }

    fn prefault(&self, gpa: u64, size: u64) -> io::Result<u64> {
        let mut range = kvm_pre_fault_memory { gpa, size, ..Default::default() };
        let vcpu = self.soon()?;
        // SAFETY: the structure is the one that the ioctl takes and writes to, and lives through the call. The guest gets
        // nothing to access that it could not access before.
        match unsafe { ioctl_with_mut_ref(&*vcpu, KVM_PRE_FAULT_MEMORY(), &mut range) } {
            0 => Ok(size - range.size.min(size)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The vCPU, unless somebody needs it for long.
    fn soon(&self) -> io::Result<MutexGuard<'_, VcpuFd>> {
        let begin = Instant::now();
        loop {
            match self.0.try_lock() {
                Ok(vcpu) => return Ok(vcpu),
                Err(TryLockError::Poisoned(vcpu)) => return Ok(vcpu.into_inner()),
                Err(TryLockError::WouldBlock) if begin.elapsed() < PATIENCE => thread::yield_now(),
                Err(TryLockError::WouldBlock) => return Err(io::ErrorKind::WouldBlock.into()),
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, VcpuFd> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Memory that the guest sees at an address. It does not keep the VM alive, as counters keep windows alive.
struct ShownAt {
    vcpu: Weak<PrefaultVcpu>,
    address: u64,
}

impl NestedPaging for ShownAt {
    fn prefault(&self, offset: u64, len: u64) -> io::Result<u64> {
        let gone = || io::Error::from_raw_os_error(libc::ENOENT);
        self.vcpu.upgrade().ok_or_else(gone)?.prefault(self.address + offset, len)
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::KVM_MAX_CPUID_ENTRIES;

    use super::*;
    use crate::memory::{GuestRam, Slots};

    #[test]
    fn memory_is_prefaulted_while_the_guest_has_it() {
        let Ok(kvm) = Kvm::new() else { return skipped!("no /dev/kvm here") };
        let vm = Arc::new(kvm.create_vm().unwrap());
        vm.create_irq_chip().unwrap();
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
        let _first = vm.create_vcpu(0).unwrap();
        let Some(vcpu) = PrefaultVcpu::new(&kvm, &vm, 1, &cpuid) else {
            return skipped!("KVM cannot prefault memory here");
        };
        let ram = GuestRam::new(64 << 20).unwrap();
        let slots = Slots::new(Arc::clone(&vm));
        let (range, host) = ram.ranges().next().unwrap();
        let paging = vcpu.at(1 << 32);
        let errno = |offset| paging.prefault(offset, 4096).unwrap_err().raw_os_error();
        // The page tables that the first slot takes with it must not be used for the second.
        for _ in 0..3 {
            // SAFETY: `ram` is dropped after the slot.
            let map = || unsafe { slots.map(host, range.end, 1 << 32) };
            let slot = vcpu.while_idle(map).unwrap();
            assert_eq!(paging.prefault(4096, 2 << 20).unwrap(), 2 << 20);
            assert_eq!(paging.prefault(range.end - 4096, 4096).unwrap(), 4096);
            assert_eq!(errno(range.end), Some(libc::ENOENT));
            vcpu.while_idle(|| drop(slot));
            assert_eq!(errno(0), Some(libc::ENOENT));
        }
        let busy = vcpu.lock();
        assert_eq!(paging.prefault(0, 4096).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(busy);
        drop(vcpu);
        assert_eq!(errno(0), Some(libc::ENOENT), "the VM has ended");
    }
}
