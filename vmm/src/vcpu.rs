//! A vCPU: a thread that runs the guest and carries out its exits.

use std::fmt;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::panic::{self, AssertUnwindSafe};
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

/// Bytes of a page.
const PAGE: u64 = 4096;

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
            let run = AssertUnwindSafe(|| run(&mut fd, &buses, &memory, &given));
            let panicked = |_| Err(Fatal::Kvm("The thread of a vCPU panicked".into()));
            if let Err(fatal) = panic::catch_unwind(run).unwrap_or_else(panicked) {
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

    /// Interrupts the thread, unless it has ended; whether it has not.
    fn kick(&self) -> bool {
        let Some(thread) = self.thread.as_ref().filter(|thread| !thread.is_finished()) else { return false };
        if let Err(error) = thread.kill(kick_signal()) {
            tracing::error!(%error, "Cannot interrupt a vCPU");
        }
        true
    }

    fn give(&self, order: &AtomicBool) {
        order.store(true, Ordering::Release);
        if let Some(thread) = &self.thread {
            // It may have ended by itself.
            let _ = thread.kill(kick_signal());
        }
    }
}

/// Stops them all, and waits for them. All are interrupted until the last one has ended, as any may wait for what another one's
/// guest keeps a device busy with.
pub fn stop(vcpus: Vec<Vcpu>) {
    vcpus.iter().for_each(|vcpu| vcpu.orders.stop.store(true, Ordering::Release));
    while vcpus.iter().filter(|vcpu| vcpu.kick()).count() > 0 {
        std::thread::sleep(KICK_AGAIN);
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
    let mut retries = Retries::default();
    while !orders.stop.load(Ordering::Acquire) {
        match vcpu.run() {
            Ok(VcpuExit::MemoryFault { gpa, .. }) => go_on(vcpu, memory, Some(gpa), &mut retries)?,
            Ok(exit) => {
                retries = Retries::default();
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
                if look && !fault::is_nested(vcpu) && inspect(vcpu, memory, None).found == Found::Repaired {
                    // What it finds besides is the guest's normal work.
                    tracing::debug!("repaired memory that a vCPU waited for");
                }
            }
            Err(error) if error.errno() == libc::EFAULT => go_on(vcpu, memory, None, &mut retries)?,
            Err(error) => return Err(Fatal::Kvm(format!("KVM_RUN: {error}"))),
        }
    }
    Ok(())
}

/// After KVM has given up an access: has the memory repaired. Where that cannot be, the guest gets a general protection
/// fault, so that who accesses what the host does not have harms itself alone.
fn go_on(
    vcpu: &mut VcpuFd,
    memory: &Memory,
    address: Option<u64>,
    retries: &mut Retries,
) -> Result<(), Fatal> {
    if fault::is_nested(vcpu) {
        let why = "A guest of the guest accesses memory that the host cannot provide";
        return Err(Fatal::Kvm(why.into()));
    }
    let inspection = inspect(vcpu, memory, address);
    if retries.allow(&inspection) {
        return Ok(());
    }
    match fault::refuse(vcpu) {
        Ok(true) if !inspection.is_of_lost_ram(memory) => {
            // No more is said than what is at hand: a guest may cause this as often as it likes.
            tracing::warn!("{inspection}: the guest gets a general protection fault");
            Ok(())
        }
        _ => Err(Fatal::Kvm(inspection.with_mappings(&memory.all.memory()))),
    }
}

/// What a vCPU was about to access, and what became of it.
struct Inspection {
    stopped: Result<fault::StoppedAt, kvm_ioctls::Error>,
    found: Found,
}

/// What became of the memory that a vCPU could not access.
#[derive(PartialEq, Eq)]
enum Found {
    /// It was repaired.
    Repaired,
    /// It is in a window, and nothing is wrong with it any more.
    Fine,
    /// It cannot be accessed; and why not, where a window says so.
    Lost(Option<String>),
}

/// How often a vCPU has tried the same again.
#[derive(Default)]
struct Retries {
    at: Option<fault::StoppedAt>,
    count: u32,
}

impl Retries {
    /// Whether the vCPU may try again, as it may at once after a repair; where there was nothing to repair, this waits.
    fn allow(&mut self, inspection: &Inspection) -> bool {
        match inspection.found {
            Found::Repaired => *self = Retries::default(),
            Found::Lost(_) => return false,
            Found::Fine => {
                let at = inspection.stopped.as_ref().ok();
                // Programs that touch one page after another, each a moment after another vCPU, do nothing wrong.
                if self.at.as_ref() != at {
                    *self = Retries { at: at.cloned(), count: 0 };
                }
                if self.count == MOST_RETRIES {
                    return false;
                }
                self.count += 1;
                if self.count > RETRIES_AT_ONCE {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }
        true
    }
}

/// Looks at what a vCPU is about to access, and has the windows repair what the host cannot provide. `address` is what KVM
/// says of it, if it does.
fn inspect(vcpu: &VcpuFd, memory: &Memory, address: Option<u64>) -> Inspection {
    let mut repairs: Vec<_> =
        address.into_iter().filter_map(|address| memory.windows.repair(address, true)).collect();
    let stopped = fault::stopped_at(vcpu, &memory.all.memory(), |access| {
        repairs.extend(memory.windows.repair(access.address, access.write));
    });
    let is_known = !repairs.is_empty();
    let impossible = |repair| match repair {
        Repair::Impossible(why) => Some(why),
        _ => None,
    };
    let found = match repairs.contains(&Repair::Done) {
        true => Found::Repaired,
        false => match repairs.into_iter().find_map(impossible) {
            None if is_known => Found::Fine,
            why => Found::Lost(why),
        },
    };
    Inspection { stopped, found }
}

/// Whether the host cannot provide a page of this process.
fn is_lost(page: *mut libc::c_void) -> bool {
    // SAFETY: the call changes nothing but the process's page tables.
    let populated = unsafe { libc::madvise(page, PAGE as usize, libc::MADV_POPULATE_READ) };
    // Linux before 5.14 does not know it.
    populated != 0 && io::Error::last_os_error().raw_os_error() != Some(libc::EINVAL)
}

impl Inspection {
    /// Whether the host does not even have the guest's RAM that is accessed: then nothing can be relied on.
    fn is_of_lost_ram(&self, memory: &Memory) -> bool {
        let all = memory.all.memory();
        let accesses = self.stopped.iter().flat_map(|stopped| &stopped.accesses);
        let mut ram = accesses.filter(|access| memory.windows.repair(access.address, false).is_none());
        ram.any(|access| {
            let page = GuestAddress(access.address & !(PAGE - 1));
            all.get_host_address(page).is_ok_and(|host| is_lost(host.cast()))
        })
    }

    /// The same for people, with what the host has at each address.
    fn with_mappings(&self, memory: &GuestMemoryMmap) -> String {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        self.describe(|address| {
            let host = memory.get_host_address(GuestAddress(address)).ok();
            let mapping = host.and_then(|host| mapping_of(&maps, host as u64));
            format!("{address:#x} ({})", mapping.unwrap_or("no memory"))
        })
    }

    /// The same, with `place` for each address.
    fn describe(&self, place: impl Fn(u64) -> String) -> String {
        let what = match &self.stopped {
            Ok(stopped) => {
                let places: Vec<_> = stopped.accesses.iter().map(|access| place(access.address)).collect();
                let (instruction, places) = (stopped.instruction, places.join(", "));
                format!(
                    "the host has no memory for what the instruction at {instruction:#x} accesses, one of {places}"
                )
            }
            Err(error) => format!("the host has no memory for what the guest accesses ({error})"),
        };
        match &self.found {
            Found::Lost(Some(why)) => format!("{what}: {why}"),
            _ => what,
        }
    }
}

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.describe(|address| format!("{address:#x}")))
    }
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
        while self.kick() {
            std::thread::sleep(KICK_AGAIN);
        }
        // A panic of the thread has been reported by the panic hook.
        let _ = self.thread.take().map(JoinHandle::join);
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
    fn who_touches_other_pages_may_try_again_as_often_as_it_likes() {
        let fine = |address| {
            let accesses = vec![fault::Access { address, write: false }];
            let stopped = Ok(fault::StoppedAt { instruction: 0x1000, accesses });
            Inspection { stopped, found: Found::Fine }
        };
        let mut retries = Retries::default();
        assert!((0..3 * u64::from(MOST_RETRIES)).all(|page| retries.allow(&fine(page << 12))));
        assert!((0..MOST_RETRIES).all(|_| retries.allow(&fine(0))));
        assert!(!retries.allow(&fine(0)));
        assert!(retries.allow(&Inspection { found: Found::Repaired, ..fine(0) }) && retries.allow(&fine(0)));
        assert!(!retries.allow(&Inspection { found: Found::Lost(None), ..fine(0) }));
    }

    #[test]
    fn a_page_that_cannot_be_had_is_lost() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(PAGE).unwrap();
        let (protection, fd) = (libc::PROT_READ, std::os::fd::AsRawFd::as_raw_fd(&file));
        // SAFETY: the kernel chooses the place, and nothing there is looked at but by the call that is tried.
        let pages = unsafe {
            libc::mmap(std::ptr::null_mut(), 2 * PAGE as usize, protection, libc::MAP_SHARED, fd, 0)
        };
        assert_ne!(pages, libc::MAP_FAILED);
        assert!(!is_lost(pages));
        assert!(is_lost(pages.wrapping_byte_add(PAGE as usize)), "the file ends before it");
        // SAFETY: it was mapped above.
        unsafe { libc::munmap(pages, 2 * PAGE as usize) };
    }

    #[test]
    fn an_access_is_told_by_its_address_and_with_what_the_host_has_there() {
        let accesses = [0x1000, 0x5000].map(|address| fault::Access { address, write: false });
        let stopped = Ok(fault::StoppedAt { instruction: 0xffff, accesses: accesses.into() });
        let inspection = Inspection { stopped, found: Found::Lost(Some("it is gone".into())) };
        let what = "the host has no memory for what the instruction at 0xffff accesses, one of";
        assert_eq!(inspection.to_string(), format!("{what} 0x1000, 0x5000: it is gone"));
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x2000)]).unwrap();
        let text = inspection.with_mappings(&memory);
        assert!(text.starts_with(&format!("{what} 0x1000 (rw-p ")), "{text}");
        assert!(text.ends_with(", 0x5000 (no memory): it is gone"), "{text}");
    }

    #[test]
    fn all_are_interrupted_until_the_last_one_has_ended() {
        extern "C" fn kicked(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        register_signal_handler(kick_signal(), kicked).unwrap();
        let vcpu = |body: Box<dyn FnOnce() + Send>| Vcpu {
            orders: Arc::default(),
            thread: Some(std::thread::spawn(body)),
        };
        let (sender, receiver) = mpsc::channel();
        // The first one waits for the second one, for which the first few kicks are lost.
        let waits = vcpu(Box::new(move || receiver.recv().unwrap()));
        let spins = vcpu(Box::new(move || {
            for _ in 0..5 {
                // SAFETY: the call takes no pointer; it ends with a signal.
                unsafe { libc::poll(std::ptr::null_mut(), 0, -1) };
            }
            sender.send(()).unwrap();
        }));
        let (stopped, is_stopped) = mpsc::channel();
        std::thread::spawn(move || {
            stop(vec![waits, spins]);
            stopped.send(()).unwrap();
        });
        assert_eq!(is_stopped.recv_timeout(Duration::from_secs(20)), Ok(()));
    }

    #[test]
    fn a_fault_is_given_once_and_in_protected_mode() {
        let Ok(kvm) = Kvm::new() else { return skipped!("no /dev/kvm here") };
        let vm = kvm.create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        assert_eq!(fault::refuse(&vcpu), Ok(false), "in real mode");
        let mut special = vcpu.get_sregs().unwrap();
        special.cr0 |= 1;
        vcpu.set_sregs(&special).unwrap();
        assert_eq!(fault::refuse(&vcpu), Ok(true));
        let exception = vcpu.get_vcpu_events().unwrap().exception;
        assert_eq!((exception.injected, exception.nr, exception.has_error_code), (1, 13, 1));
        assert_eq!(fault::refuse(&vcpu), Ok(false), "another one is on its way");
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
