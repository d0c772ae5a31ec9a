//! A vCPU: a thread that runs the guest and carries out its exits.

use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use devices::virtio::device::{DeviceMemory, Repair};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryMmap};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::arch::x86_64::fault;
use crate::device_manager::Windows;
use crate::exit::{Buses, Fatal};
use crate::sandbox::seccomp::{self, Kind};

/// The signal that interrupts KVM_RUN; its handler does nothing.
fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

/// How long a kick may take before it is repeated: it gets lost when it arrives between the look at the flag and
/// KVM_RUN.
const KICK_AGAIN: Duration = Duration::from_millis(1);

/// How often a vCPU tries again to access memory of a window with which nothing is wrong: another one may have repaired it
/// a moment before. The first few times are at once.
const MOST_RETRIES: u32 = 1000;
const RETRIES_AT_ONCE: u32 = 10;

/// What the guest's memory consists of.
#[derive(Clone)]
pub struct Memory {
    /// RAM and windows, to read the guest's code.
    pub all: DeviceMemory,
    /// The windows, parts of which the host may take away.
    pub windows: Arc<Windows>,
}

/// A running vCPU. Dropping it stops it.
pub struct Vcpu {
    orders: Arc<Orders>,
    thread: Option<JoinHandle<()>>,
}

/// What others want of a vCPU's thread.
#[derive(Default)]
struct Orders {
    stop: AtomicBool,
    /// To see whether it waits for a page that never comes.
    look: AtomicBool,
    /// To tell the guest that it stood still.
    stood_still: AtomicBool,
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
        memory: Memory,
        on_fatal: impl FnOnce(Fatal) + Send + 'static,
    ) -> io::Result<Vcpu> {
        extern "C" fn kicked(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        register_signal_handler(kick_signal(), kicked)?;
        let orders = Arc::<Orders>::default();
        let given = Arc::clone(&orders);
        let thread = std::thread::Builder::new().name(format!("vcpu-{id}")).spawn(move || {
            seccomp::enter(Kind::Vcpu);
            if let Err(fatal) = run(&mut fd, &buses, &memory, &given) {
                on_fatal(fatal);
            }
        })?;
        Ok(Vcpu { orders, thread: Some(thread) })
    }
}

impl Vcpu {
    /// The CPU time that the vCPU has used, its guest's and the host's on its behalf.
    pub fn cpu_time(&self) -> Option<Duration> {
        let mut clock = 0;
        let thread = self.thread.as_ref()?.as_pthread_t();
        // SAFETY: the thread has not been joined, so its handle is valid; the result lives through the call.
        let is_known = unsafe { libc::pthread_getcpuclockid(thread, &mut clock) == 0 };
        if is_known { time_of(clock) } else { None }
    }

    /// Has the vCPU look whether it waits for a page of a window that the host cannot provide, and repair that page.
    pub fn look(&self) {
        self.give(&self.orders.look);
    }

    /// Has the vCPU's guest told that it stood still.
    pub fn stood_still(&self) {
        self.give(&self.orders.stood_still);
    }

    fn give(&self, order: &AtomicBool) {
        order.store(true, Ordering::Release);
        if let Some(thread) = &self.thread {
            // It may have ended by itself.
            let _ = thread.kill(kick_signal());
        }
    }
}

/// What a clock of clock_gettime(2) says. rustix would ask for its vDSO by a system call that no filter here allows.
pub(crate) fn time_of(clock: libc::clockid_t) -> Option<Duration> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the result lives through the call.
    let is_known = unsafe { libc::clock_gettime(clock, &mut time) == 0 };
    is_known.then(|| Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
}

fn run(vcpu: &mut VcpuFd, buses: &Buses, memory: &Memory, orders: &Orders) -> Result<(), Fatal> {
    let mut retries = 0;
    while !orders.stop.load(Ordering::Acquire) {
        match vcpu.run() {
            Ok(VcpuExit::MemoryFault { gpa, .. }) => {
                retry(inspect(vcpu, memory, Some(gpa), true), &mut retries)?
            }
            Ok(exit) => {
                retries = 0;
                buses.handle(exit)?;
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                let look = orders.look.swap(false, Ordering::AcqRel);
                // When nobody here has interrupted it, the process was stopped, or frozen with its control group or its host.
                if orders.stood_still.swap(false, Ordering::AcqRel) || !look {
                    // The guest is to know, or it would take CPUs that stood still for ones that hang. Without a clock of KVM's
                    // it cannot be told, which is what the call's error says.
                    let _ = vcpu.kvmclock_ctrl();
                }
                if look {
                    // What it finds besides is the guest's normal work.
                    let _ = inspect(vcpu, memory, None, false);
                }
            }
            Err(error) if error.errno() == libc::EFAULT => {
                retry(inspect(vcpu, memory, None, true), &mut retries)?
            }
            Err(error) => return Err(Fatal::Kvm(format!("KVM_RUN: {error}"))),
        }
    }
    Ok(())
}

/// What became of the memory that a vCPU could not access.
enum Inspected {
    /// It was repaired.
    Repaired,
    /// It is in a window, and nothing is wrong with it any more.
    Fine(String),
    /// It cannot be accessed; why not.
    Lost(String),
}

fn retry(inspected: Inspected, retries: &mut u32) -> Result<(), Fatal> {
    match inspected {
        Inspected::Repaired => *retries = 0,
        Inspected::Fine(_) if *retries < MOST_RETRIES => {
            *retries += 1;
            if *retries > RETRIES_AT_ONCE {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        Inspected::Fine(why) | Inspected::Lost(why) => return Err(Fatal::Kvm(why)),
    }
    Ok(())
}

/// Looks at what a vCPU is about to access, and has the windows repair what the host cannot provide. `address` is what KVM
/// says of it, if it does; `by_exit` whether KVM has given up, and not that the vCPU was stopped to look.
fn inspect(vcpu: &VcpuFd, memory: &Memory, address: Option<u64>, by_exit: bool) -> Inspected {
    let mut repairs: Vec<_> =
        address.into_iter().filter_map(|address| memory.windows.repair(address, true)).collect();
    let all = memory.all.memory();
    let stopped = fault::stopped_at(vcpu, &all, |access| {
        repairs.extend(memory.windows.repair(access.address, access.write));
    });
    if repairs.contains(&Repair::Done) {
        tracing::debug!(by_exit, "repaired memory that a vCPU could not access");
        return Inspected::Repaired;
    }
    let message = || match stopped {
        Ok(stopped) => describe(&stopped, &all),
        Err(error) => format!("the host has no memory for what the guest accesses ({error})"),
    };
    let impossible = repairs.iter().find_map(|repair| match repair {
        Repair::Impossible(why) => Some(why),
        _ => None,
    });
    match impossible {
        Some(why) => Inspected::Lost(format!("{}: {why}", message())),
        None if repairs.is_empty() => Inspected::Lost(message()),
        None => Inspected::Fine(message()),
    }
}

/// What is known of an access that KVM could not carry out.
fn describe(stopped: &fault::StoppedAt, memory: &GuestMemoryMmap) -> String {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let places = stopped.accesses.iter().map(|access| {
        let host = memory.get_host_address(GuestAddress(access.address)).ok();
        let mapping = host.and_then(|host| mapping_of(&maps, host as u64));
        format!("{:#x} ({})", access.address, mapping.unwrap_or("no memory"))
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
        self.orders.stop.store(true, Ordering::Release);
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
            skipped!("no /dev/kvm here");
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
        let memory = Memory { all: DeviceMemory::new(memory), windows: Arc::default() };
        let (sender, fatal) = mpsc::channel();
        let vcpu =
            Vcpu::start(0, fd, Buses::default(), memory, move |why| sender.send(why).unwrap()).unwrap();
        Some((vcpu, fatal, ram))
    }

    #[test]
    fn a_halted_and_a_spinning_vcpu_are_stopped_at_once() {
        // hlt; and jmp to itself.
        for code in [&[0xf4][..], &[0xeb, 0xfe]] {
            let Some((vcpu, fatal, ram)) = vcpu(code) else { return };
            std::thread::sleep(Duration::from_millis(50));
            assert!(vcpu.cpu_time().is_some());
            vcpu.look();
            std::thread::sleep(Duration::from_millis(5));
            let start = Instant::now();
            drop(vcpu);
            assert!(start.elapsed() < Duration::from_secs(5), "{code:x?}");
            assert!(fatal.try_recv().is_err(), "nothing was wrong");
            drop(ram);
        }
    }
}
