//! A virtual machine: owns everything that it is made of, runs it, ends it.

use std::io;
use std::os::fd::OwnedFd;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use devices::legacy::{PowerEvent, SerialPort};
use devices::virtio::block::DiskCountersHandle;
pub use devices::virtio::console::{Port, PortsHandle};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::api::Probe;
use crate::builder::BuildError;
use crate::config::ValidConfig;
use crate::console::ConsoleLog;
use crate::event_loop::{self, Wakeups};
use crate::exit::{Buses, Fatal};
use crate::memory::{GuestRam, Slot};
use crate::outcome::{ExitReason, Stop};
use crate::own_code;
use crate::patrol::patrol;
use crate::report::{Report, ShareCounters, Timing};
use crate::sandbox::{self, Layer, Outputs, SandboxError, SandboxMode};
use crate::vcpu::{self, Memory, Vcpu};

/// A machine that is ready to run.
///
/// Fields are dropped in their order: vCPUs first, then the devices with their threads, guest memory last.
pub struct Vm {
    vcpus: Vec<Vcpu>,
    idle_vcpus: Vec<VcpuFd>,
    pub(crate) parts: Parts,
    ending: Ending,
}

/// What the builder makes.
pub(crate) struct Parts {
    /// Leads to all devices, and so owns them.
    pub buses: Buses,
    /// RAM and the windows that the guest has enabled.
    pub memory: Memory,
    pub serial: Arc<SerialPort>,
    pub room_in_serial: EventFd,
    pub panicked: EventFd,
    pub console_log: Arc<Mutex<ConsoleLog>>,
    pub shares: Vec<ShareCounters>,
    /// What confinement has to know of them, and their root directories, as long as it is to come.
    pub to_confine: (Vec<sandbox::Share>, Vec<OwnedFd>),
    /// How the process is confined.
    pub layers: Vec<Layer>,
    pub disks: Vec<DiskCountersHandle>,
    pub ports: PortsHandle,
    pub config: ValidConfig,
    pub started: Instant,
    /// Shows the guest its RAM; goes before it.
    pub _slots: Vec<Slot>,
    pub ram: GuestRam,
}

/// Ends a VM, from any thread.
#[derive(Clone)]
pub struct Ending {
    told: Arc<(Mutex<Told>, Condvar)>,
    wake: Arc<EventFd>,
}

/// What an [`Ending`] was told.
#[derive(Default)]
struct Told {
    reason: Option<ExitReason>,
    /// Whether it was told anything but the command's own end, at which readers that are slow are waited for.
    is_urgent: bool,
}

impl Ending {
    pub(crate) fn new() -> io::Result<Ending> {
        Ok(Ending { told: Arc::default(), wake: Arc::new(EventFd::new(EFD_NONBLOCK)?) })
    }

    /// Ends the VM for `reason`. Only the first reason counts.
    pub fn end(&self, reason: ExitReason) {
        let (told, news) = &*self.told;
        let mut told = told.lock().unwrap_or_else(|e| e.into_inner());
        told.is_urgent |= !matches!(reason, ExitReason::Exited { .. } | ExitReason::Signaled { .. });
        told.reason.get_or_insert(reason);
        drop(told);
        news.notify_all();
        // Non-blocking and the counter cannot overflow within the life of a VM.
        let _ = self.wake.write(1);
    }

    /// Ends the VM on the caller's request.
    pub fn stop(&self) {
        self.end(ExitReason::Stopped(Stop::Request));
    }

    pub(crate) fn power_event(&self, event: PowerEvent) {
        self.end(match event {
            PowerEvent::Off => ExitReason::PowerOff,
            PowerEvent::Reset => ExitReason::Reset,
        });
    }

    pub(crate) fn fatal(&self, fatal: Fatal) {
        self.end(ExitReason::Crash(match fatal {
            Fatal::TripleFault => "triple fault".into(),
            Fatal::Kvm(message) => message,
        }));
    }

    pub(crate) fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// Why the VM is to end, if it is.
    pub(crate) fn reason(&self) -> Option<ExitReason> {
        self.told.0.lock().unwrap_or_else(|e| e.into_inner()).reason.clone()
    }

    /// Waits until the VM is to end, and not only because its command has ended; returns why it ends.
    pub(crate) fn wait(&self) -> Option<ExitReason> {
        let (told, news) = &*self.told;
        let told = told.lock().unwrap_or_else(|e| e.into_inner());
        let told = news.wait_while(told, |told| !told.is_urgent).unwrap_or_else(|e| e.into_inner());
        told.reason.clone()
    }
}

/// What a machine is connected to, beside what its configuration names.
pub struct Wiring {
    /// Where the output of the serial port goes.
    pub console: Box<dyn io::Write + Send>,
    /// Whether nobody in the guest but its kernel, and who could as well end the VM, writes to the serial port. Only then
    /// the words with which a kernel panics end the VM, 3 s later: where users log in, anybody can print them.
    pub console_is_the_kernels: bool,
    /// An initramfs in memory; goes before that of the configuration.
    pub initramfs: Option<Vec<u8>>,
    /// The ports of a virtio-console device; there is no such device when they are none.
    pub ports: Vec<Port>,
}

/// Where the guest's console input comes from.
pub enum ConsoleInput {
    /// Nowhere.
    None,
    /// This descriptor.
    From(OwnedFd),
    /// A terminal in raw mode: as above, and the escape sequence ends the VM.
    Terminal(OwnedFd),
}

impl Vm {
    pub(crate) fn new(parts: Parts, vcpus: Vec<VcpuFd>, ending: Ending) -> Vm {
        Vm { vcpus: Vec::new(), idle_vcpus: vcpus, parts, ending }
    }

    /// Builds a VM from its configuration. The steps are in `builder.rs`.
    ///
    /// # Errors
    /// See [`BuildError`].
    pub fn build(config: ValidConfig, wiring: Wiring) -> Result<Vm, BuildError> {
        crate::builder::build(config, wiring)
    }

    /// The means to end this VM from elsewhere.
    pub fn ending(&self) -> Ending {
        self.ending.clone()
    }

    /// The ports of the wiring.
    pub fn ports(&self) -> PortsHandle {
        self.parts.ports.clone()
    }

    /// A view of the VM's counters, which outlives it.
    pub fn probe(&self) -> Probe {
        let Parts { config, started, shares, disks, ports, .. } = &self.parts;
        let shares = shares.iter().map(|share| share.counters.clone()).collect();
        Probe::new(config.clone(), *started, shares, disks.clone(), ports.clone())
    }

    /// The last lines of the guest's console.
    pub fn console_tail(&self, lines: usize) -> String {
        self.parts.console_log.lock().unwrap_or_else(|e| e.into_inner()).tail(lines)
    }

    /// Counts the guest's accesses to its devices, but for doorbells: a guest that boots makes some all the time.
    pub(crate) fn activity(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.parts.buses.activity)
    }

    /// Takes from the calling thread, and from all that it starts from now on, what the guest does not need, as far as the
    /// machine allows; of the file system it leaves the shares and `outputs`. `sandbox/mod.rs` lists the layers, and so does
    /// the report. Nothing happens if the configuration says [`SandboxMode::Off`].
    ///
    /// There should be no other threads: each of them keeps what it has, and can be made to do what this one no longer
    /// can. The process does not get anything back when the VM has ended. Its panic hook is replaced by one that prints no
    /// backtrace, which would be a forbidden system call.
    ///
    /// # Errors
    /// A layer fails that the machine has.
    pub fn confine(&mut self, outputs: &Outputs) -> Result<(), SandboxError> {
        let (shares, roots) = std::mem::take(&mut self.parts.to_confine);
        if self.parts.config.sandbox == SandboxMode::On {
            self.parts.layers = sandbox::apply(&shares, &roots, outputs)?;
        }
        Ok(())
    }

    /// Runs the guest to its end.
    ///
    /// # Errors
    /// The system refuses a thread or an event descriptor.
    pub fn run(&mut self, input: ConsoleInput) -> io::Result<Report> {
        let vmm = self.parts.started.elapsed();
        if let Err(error) = own_code::let_go() {
            tracing::debug!(%error, "The code that the start needed stays in memory");
        }
        for (id, fd) in (0..).zip(self.idle_vcpus.drain(..)) {
            let ending = self.ending.clone();
            let (buses, memory) = (self.parts.buses.clone(), self.parts.memory.clone());
            self.vcpus.push(Vcpu::start(id, fd, buses, memory, move |fatal| ending.fatal(fatal))?);
        }
        let wakeups = Wakeups {
            ending: &self.ending,
            serial: Arc::clone(&self.parts.serial),
            room_in_serial: self.parts.room_in_serial.try_clone()?,
            panicked: self.parts.panicked.try_clone()?,
            input,
            timeout: self
                .parts
                .config
                .timeout
                .map(|limit| limit.saturating_sub(self.parts.started.elapsed())),
        };
        let (vcpus, windows, stop) = (&self.vcpus, &self.parts.memory.windows, &AtomicBool::new(false));
        // A caller need not have a panic hook that ends the guest and says more.
        let panicked = || self.ending.end(ExitReason::Crash("a thread of the VMM panicked".into()));
        let outcome = thread::scope(|scope| {
            let builder = thread::Builder::new().name("vcpu-patrol".into());
            let patrol = || patrol(vcpus, windows, stop);
            let patrol = move || panic::catch_unwind(AssertUnwindSafe(patrol)).unwrap_or_else(|_| panicked());
            let thread = builder.spawn_scoped(scope, patrol)?;
            let outcome = panic::catch_unwind(AssertUnwindSafe(|| event_loop::run(wakeups)));
            stop.store(true, Ordering::Release);
            thread.thread().unpark();
            outcome.unwrap_or_else(|_| {
                panicked();
                Ok(())
            })
        });
        vcpu::stop(std::mem::take(&mut self.vcpus));
        outcome?;
        let reason = self.ending.reason().unwrap_or(ExitReason::Stopped(Stop::Request));
        Ok(self.report(self.refine(reason), vmm))
    }

    /// A kernel that has panicked resets, hangs or crashes: what it said before counts.
    fn refine(&self, reason: ExitReason) -> ExitReason {
        let log = self.parts.console_log.lock().unwrap_or_else(|e| e.into_inner());
        match (log.panic(), &reason) {
            (
                Some(panic),
                ExitReason::Reset
                | ExitReason::Crash(_)
                | ExitReason::Panic(_)
                | ExitReason::Timeout
                | ExitReason::BootFailed { .. },
            ) => ExitReason::Panic(panic.to_owned()),
            _ => reason,
        }
    }

    fn report(&self, reason: ExitReason, vmm: Duration) -> Report {
        let timing = Timing::new(vmm, self.parts.started.elapsed());
        Report::new(reason, timing, &self.parts)
    }
}
