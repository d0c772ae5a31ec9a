//! Looks after vCPUs that may wait for a page which never comes.
//!
//! When the host cannot provide a page, KVM as a rule does not say so: it has the page fetched in the background, does not
//! look at what came of it, and lets the vCPU access it again, for ever (Linux 6.12, virt/kvm/async_pf.c). So once in a
//! while each vCPU that uses the CPU is stopped for a moment, to see what it is about to access.
//!
//! A process that goes on after it stood still has its vCPUs interrupted for that, and this patrol overdue. A vCPU could not
//! tell one interruption from the other, so it is told here.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::device_manager::Windows;
use crate::vcpu::{self, Vcpu};

/// How long a vCPU may wait for nothing. Stopping one takes some ten microseconds.
const INTERVAL: Duration = Duration::from_millis(250);

/// A vCPU that uses less of an interval than this is idle.
const IDLE: Duration = Duration::from_millis(1);

/// A patrol that takes longer than this to wake has stood still with the whole process, or had no CPU, which is the same to a
/// guest. Its watchdogs wait for 10 s at least.
const STOOD_STILL: Duration = Duration::from_secs(1);

/// The clock that goes on while the host sleeps, as the guest's does.
fn now() -> Duration {
    vcpu::time_of(libc::CLOCK_BOOTTIME).unwrap_or_default()
}

/// Looks after `vcpus` until `stop` is set and this thread is unparked.
pub(crate) fn patrol(vcpus: &[Vcpu], windows: &Arc<Windows>, stop: &AtomicBool) {
    let mut used = vec![Duration::ZERO; vcpus.len()];
    while !stop.load(Ordering::Acquire) {
        let before = now();
        thread::park_timeout(INTERVAL);
        if now().saturating_sub(before) > INTERVAL + STOOD_STILL {
            vcpus.iter().for_each(Vcpu::stood_still);
        }
        if !windows.are_used() {
            continue;
        }
        for (vcpu, used) in vcpus.iter().zip(&mut used) {
            // One whose time is not known is looked at as well.
            let now = vcpu.cpu_time().unwrap_or(*used + 2 * IDLE);
            if now.saturating_sub(*used) > IDLE {
                vcpu.look();
            }
            *used = now;
        }
    }
}
