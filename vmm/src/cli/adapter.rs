//! Runs guests that have an init of their own.

use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;

use crate::config::{RunConfig, ValidConfig, VmConfig};
use crate::console::{make_terminal_raw, restore_terminal};
use crate::outcome::{ExitReason, Stop};
use crate::vm::{ConsoleInput, Ending, Vm};

/// Lines of the guest's console that are shown when it failed.
const TAIL_LINES: usize = 50;

/// The machine that comes of a configuration, whose defaults have been filled in; none for a guest with a command.
pub(super) fn machine(config: &RunConfig) -> Result<Option<ValidConfig>, Box<dyn Error>> {
    let (Some(kernel), Some(cpus), Some(memory)) = (&config.kernel, config.cpus, config.memory) else {
        return Ok(None);
    };
    if !config.command.is_empty() {
        return Ok(None);
    }
    Ok(Some(ValidConfig::new(VmConfig {
        kernel: kernel.clone(),
        initrd: config.initrd.clone(),
        cmdline: config.cmdline.clone(),
        cpus,
        memory,
        shares: config.shares.clone(),
        disks: config.disks.clone(),
        rng: config.rng == Some(true),
        timeout: config.timeout,
    })?))
}

/// Runs the guest; returns the exit status.
pub(super) fn run(config: &RunConfig) -> Result<u8, Box<dyn Error>> {
    let Some(machine) = machine(config)? else {
        return Err("This daxvm cannot run commands in a guest: boot one with --kernel and --initrd".into());
    };
    let signals = block_signals()?;
    let output: Box<dyn Write + Send> = match &config.console {
        Some(path) if path.as_os_str() == "stderr" => Box::new(std::io::stderr()),
        Some(path) => Box::new(
            File::create(path).map_err(|e| format!("Cannot write the console to {}: {e}", path.display()))?,
        ),
        None => Box::new(File::from(std::io::stdout().as_fd().try_clone_to_owned()?)),
    };
    let mut vm = Vm::build(machine, output)?;
    end_on_signals(signals, vm.ending())?;
    restore_terminal_on_panic(vm.ending());
    let input = std::io::stdin().as_fd().try_clone_to_owned()?;
    let terminal = make_terminal_raw()?;
    let input = if terminal { ConsoleInput::Terminal(input) } else { ConsoleInput::From(input) };
    let result = vm.run(input);
    restore_terminal();
    let report = result?;
    if let Some(path) = &config.report {
        report.write(path).map_err(|e| format!("Cannot write the report {}: {e}", path.display()))?;
    }
    explain(&report.reason, &vm);
    Ok(report.status)
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
