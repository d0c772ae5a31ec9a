//! Guests without a command: they have an init of their own, and the caller's terminal is their serial console.

use std::io;
use std::os::fd::AsFd;
use std::time::Instant;

use super::observers::Observers;
use super::signals::Signals;
use super::{Plan, RunError, confine, console, end_on_panic, explain, last_resort, machine};
use crate::console::{make_terminal_raw, restore_terminal};
use crate::vm::{ConsoleInput, Vm, Wiring};

/// Runs the guest to its end; returns the exit status.
pub(super) fn run(plan: Plan, signals: Signals, begin: Instant) -> Result<u8, RunError> {
    let observers = Observers::prepare(&plan)?;
    let console = console(&plan.console)?;
    let wiring = Wiring { console, console_is_the_kernels: false, initramfs: None, ports: Vec::new() };
    let mut vm = Vm::build(machine(&plan, begin)?, wiring)?;
    let report_file = confine(&mut vm, &plan, begin)?;
    let observers = observers.start(&plan, &vm)?;
    let system = |what| move |error| RunError::System(what, error);
    end_on_panic(vm.ending());
    last_resort::after_end(vm.ending(), |reason| reason.status(false)).map_err(system("start a thread"))?;
    signals.handle(vm.ending(), None).map_err(system("start a thread"))?;
    let input = io::stdin().as_fd().try_clone_to_owned().map_err(system("use standard input"))?;
    let terminal = make_terminal_raw().map_err(system("set up the terminal"))?;
    let input = if terminal { ConsoleInput::Terminal(input) } else { ConsoleInput::From(input) };
    let result = vm.run(input);
    restore_terminal();
    drop(observers);
    let report = result.map_err(system("run the guest"))?;
    explain::own_init(&report.reason, || vm.console_tail(explain::TAIL_LINES));
    report_file.write(&report)?;
    Ok(report.status)
}
