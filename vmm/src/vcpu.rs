//! A vCPU: a thread that runs the guest and carries out its exits.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use devices::virtio::device::DeviceMemory;
use kvm_ioctls::VcpuFd;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemory};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::arch::x86_64::fault;
use crate::exit::{Buses, Fatal};

/// The signal that interrupts KVM_RUN; its handler does nothing.
fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

/// How long a kick may take before it is repeated: it gets lost when it arrives between the look at the flag and
/// KVM_RUN.
const KICK_AGAIN: Duration = Duration::from_millis(1);

/// A running vCPU. Dropping it stops it.
pub struct Vcpu {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Vcpu {
    /// Starts thread `vcpu-ID`; `on_fatal` is called from it when the vCPU cannot go on.
    ///
    /// # Errors
    /// The system refuses a thread or the signal handler.
    pub fn start(
        id: u8,
        mut fd: VcpuFd,
        buses: Buses,
        memory: DeviceMemory,
        on_fatal: impl FnOnce(Fatal) + Send + 'static,
    ) -> io::Result<Vcpu> {
        extern "C" fn kicked(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        register_signal_handler(kick_signal(), kicked)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name(format!("vcpu-{id}")).spawn(move || {
            if let Err(fatal) = run(&mut fd, &buses, &memory, &stopping) {
                on_fatal(fatal);
            }
        })?;
        Ok(Vcpu { stop, thread: Some(thread) })
    }
}

fn run(vcpu: &mut VcpuFd, buses: &Buses, memory: &DeviceMemory, stop: &AtomicBool) -> Result<(), Fatal> {
    while !stop.load(Ordering::Acquire) {
        match vcpu.run() {
            Ok(exit) => buses.handle(exit)?,
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) if error.errno() == libc::EFAULT => return Err(Fatal::Kvm(lost_memory(vcpu, memory))),
            Err(error) => return Err(Fatal::Kvm(format!("KVM_RUN: {error}"))),
        }
    }
    Ok(())
}

/// What is known of an access that KVM could not carry out.
fn lost_memory(vcpu: &VcpuFd, memory: &DeviceMemory) -> String {
    let memory = memory.memory();
    let stopped = match fault::stopped_at(vcpu, &memory) {
        Ok(stopped) => stopped,
        Err(error) => return format!("the host has no memory for what the guest accesses ({error})"),
    };
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let places = stopped.accesses.iter().map(|&address| {
        let host = memory.get_host_address(GuestAddress(address)).ok();
        let mapping = host.and_then(|host| mapping_of(&maps, host as u64));
        format!("{address:#x} ({})", mapping.unwrap_or("no memory"))
    });
    let places: Vec<_> = places.collect();
    format!(
        "the host has no memory for what the instruction at {:#x} accesses, one of {}",
        stopped.instruction,
        places.join(", ")
    )
}

/// The line of /proc/self/maps that an address belongs to, without the addresses themselves.
fn mapping_of(maps: &str, address: u64) -> Option<&str> {
    maps.lines().find_map(|line| {
        let (range, what) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let bound = |text| u64::from_str_radix(text, 16).ok();
        (bound(start)?..bound(end)?).contains(&address).then_some(what)
    })
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let Some(thread) = self.thread.take() else { return };
        while !thread.is_finished() {
            if let Err(error) = thread.kill(kick_signal()) {
                tracing::error!(%error, "Cannot interrupt a vCPU");
            }
            std::thread::sleep(KICK_AGAIN);
        }
        // A panic of the thread has been reported by the panic hook.
        let _ = thread.join();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{GuestRam, Slots};
    use kvm_ioctls::Kvm;
    use std::sync::mpsc;
    use std::time::Instant;

    /// A vCPU in real mode that runs `code` at address 0x1000.
    fn vcpu(code: &[u8]) -> Option<(Vcpu, mpsc::Receiver<Fatal>, GuestRam)> {
        let Ok(kvm) = Kvm::new() else {
            eprintln!("SKIPPED: no /dev/kvm here");
            return None;
        };
        let vm = Arc::new(kvm.create_vm().unwrap());
        vm.create_irq_chip().unwrap();
        let ram = GuestRam::new(64 << 20).unwrap();
        let memory = ram.describe().unwrap();
        vm_memory::Bytes::write_slice(&memory, code, vm_memory::GuestAddress(0x1000)).unwrap();
        let slots = Slots::new(Arc::clone(&vm));
        let (range, host) = ram.ranges().next().unwrap();
        // SAFETY: `ram` is returned beside the vCPU, and tests drop it last.
        std::mem::forget(unsafe { slots.map(host, range.end, 0) }.unwrap());
        let fd = vm.create_vcpu(0).unwrap();
        let mut sregs = fd.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        fd.set_sregs(&sregs).unwrap();
        let regs = kvm_bindings::kvm_regs { rip: 0x1000, rflags: 2, ..Default::default() };
        fd.set_regs(&regs).unwrap();
        let (sender, fatal) = mpsc::channel();
        let vcpu = Vcpu::start(0, fd, Buses::default(), DeviceMemory::new(memory), move |why| {
            sender.send(why).unwrap()
        })
        .unwrap();
        Some((vcpu, fatal, ram))
    }

    #[test]
    fn a_halted_and_a_spinning_vcpu_are_stopped_at_once() {
        // hlt; and jmp to itself.
        for code in [&[0xf4][..], &[0xeb, 0xfe]] {
            let Some((vcpu, fatal, ram)) = vcpu(code) else { return };
            std::thread::sleep(Duration::from_millis(50));
            let start = Instant::now();
            drop(vcpu);
            assert!(start.elapsed() < Duration::from_secs(5), "{code:x?}");
            assert!(fatal.try_recv().is_err(), "nothing was wrong");
            drop(ram);
        }
    }
}
