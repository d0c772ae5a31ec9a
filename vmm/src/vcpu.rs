//! A vCPU: a thread that runs the guest and carries out its exits.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::exit::{Buses, Fatal};

/// Interrupts KVM_RUN; its handler does nothing.
const KICK: libc::c_int = 0;
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
        on_fatal: impl FnOnce(Fatal) + Send + 'static,
    ) -> io::Result<Vcpu> {
        extern "C" fn kicked(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        register_signal_handler(SIGRTMIN() + KICK, kicked)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name(format!("vcpu-{id}")).spawn(move || {
            if let Err(fatal) = run(&mut fd, &buses, &stopping) {
                on_fatal(fatal);
            }
        })?;
        Ok(Vcpu { stop, thread: Some(thread) })
    }
}

fn run(vcpu: &mut VcpuFd, buses: &Buses, stop: &AtomicBool) -> Result<(), Fatal> {
    while !stop.load(Ordering::Acquire) {
        match vcpu.run() {
            Ok(exit) => buses.handle(exit)?,
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) => return Err(Fatal::Kvm(format!("KVM_RUN: {error}"))),
        }
    }
    Ok(())
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let Some(thread) = self.thread.take() else { return };
        while !thread.is_finished() {
            if thread.kill(KICK).is_err() {
                break;
            }
            std::thread::sleep(KICK_AGAIN);
        }
        // A panic of the thread has been reported by the panic hook.
        let _ = thread.join();
    }
}
