//! `daxvm run`: boots a guest.

use std::error::Error;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use devices::text::{parse_duration, parse_size};

use super::share::parse_share;
use crate::config::{ShareConfig, ValidConfig, VmConfig};
use crate::console::{make_terminal_raw, restore_terminal};
use crate::outcome::{ExitReason, Stop};
use crate::vm::{ConsoleInput, Ending, Vm, Wiring};

/// Lines of the guest's console that are shown when it failed.
const TAIL_LINES: usize = 50;

/// Boot a guest.
///
/// Exit status: 0 power-off, 32 reset, 33 crash, 34 kernel panic, 124 timeout, 125 an error of daxvm or of its
/// configuration, 128+n when signal n ended it.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The kernel: a bzImage (vmlinuz) or an uncompressed ELF kernel (vmlinux)
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// The initramfs
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Kernel parameters, appended to `console=ttyS0 panic=-1 reboot=a`
    #[arg(long, value_name = "PARAMETERS", default_value = "", hide_default_value = true)]
    cmdline: String,
    /// vCPUs, 1 to 32
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u8,
    /// RAM, 64M or more, in steps of 2M
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_size)]
    memory: u64,
    /// Share a directory: tag=TAG,path=DIR and, if wanted, ro, window=SIZE, dax=POLICY (never, always, inode, size,
    /// size:BYTES, auto, or a rule file); may be repeated
    #[arg(long = "share", value_name = "KEY=VALUE,...", value_parser = parse_share)]
    shares: Vec<ShareConfig>,
    /// End the guest after this time
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    timeout: Option<Duration>,
    /// Write a report as JSON when the guest has ended
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

impl RunArgs {
    /// Runs the guest; returns the exit status.
    pub(super) fn execute(self) -> Result<u8, Box<dyn Error>> {
        let config = ValidConfig::new(VmConfig {
            kernel: self.kernel,
            initrd: self.initrd,
            cmdline: self.cmdline,
            cpus: self.cpus,
            memory: self.memory,
            shares: self.shares,
            disks: Vec::new(),
            rng: false,
            timeout: self.timeout,
        })?;
        let signals = block_signals()?;
        let output = File::from(std::io::stdout().as_fd().try_clone_to_owned()?);
        let mut vm =
            Vm::build(config, Wiring { console: Box::new(output), initramfs: None, ports: Vec::new() })?;
        end_on_signals(signals, vm.ending())?;
        restore_terminal_on_panic(vm.ending());
        let input = std::io::stdin().as_fd().try_clone_to_owned()?;
        let terminal = make_terminal_raw()?;
        let input = if terminal { ConsoleInput::Terminal(input) } else { ConsoleInput::From(input) };
        let result = vm.run(input);
        restore_terminal();
        let report = result?;
        if let Some(path) = &self.report {
            report.write(path).map_err(|e| format!("Cannot write the report {}: {e}", path.display()))?;
        }
        explain(&report.reason, &vm);
        Ok(report.status)
    }
}

/// Tells on standard error how the guest ended, when it was not by its own will.
fn explain(reason: &ExitReason, vm: &Vm) {
    let what = match reason {
        ExitReason::PowerOff | ExitReason::Reset | ExitReason::Stopped(_) => return,
        ExitReason::Crash(message) => format!("The guest crashed: {message}"),
        ExitReason::Panic(message) => format!("The guest's kernel panicked: {message}"),
        ExitReason::Timeout => "The guest did not end within its time (--timeout)".to_owned(),
    };
    eprintln!("daxvm: {what}. The last lines of its console:\n{}", vm.console_tail(TAIL_LINES));
}

/// The signals by which a caller ends the program.
const SIGNALS: [libc::c_int; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];

/// Blocks the signals in this thread and those that it starts; one thread waits for them instead.
fn block_signals() -> Result<libc::sigset_t, Box<dyn Error>> {
    // SAFETY: sigset_t is plain data that sigemptyset initialises; all pointers are to locals.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in SIGNALS {
            libc::sigaddset(&mut set, signal);
        }
        match libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) {
            0 => Ok(set),
            error => Err(std::io::Error::from_raw_os_error(error).into()),
        }
    }
}

fn end_on_signals(set: libc::sigset_t, ending: Ending) -> std::io::Result<()> {
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        loop {
            let mut signal = 0;
            // SAFETY: both pointers are to locals.
            if unsafe { libc::sigwait(&set, &mut signal) } == 0 {
                ending.end(ExitReason::Stopped(Stop::Signal(signal)));
            }
        }
    })?;
    Ok(())
}

/// A panic of any thread ends the VM, with the terminal as it was found.
fn restore_terminal_on_panic(ending: Ending) {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore_terminal();
        default(info);
        ending.end(ExitReason::Crash(format!("a thread of the VMM panicked: {info}")));
    }));
}
