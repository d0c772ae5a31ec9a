//! The host's side of `daxvm run`: from what a user asks for to an exit status.
//!
//! [`plan()`] resolves it all: the kernel and its modules, the machine, the guest's task. [`run`] carries it out. With a
//! command, an initramfs with daxvm itself as init is made in memory; the command's streams are ports of a
//! virtio-console device, and so is the control channel, on which the guest tells how far it is (`session`). Until it
//! does for the first time, a watchdog looks whether it lives. Nothing of this is ever in the host's file systems.

mod explain;
mod kernel;
mod last_resort;
mod observers;
mod own_init;
mod plan;
mod session;
mod signals;
mod stdio;
mod terminal;
mod watchdog;

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub use kernel::KernelError;
pub(crate) use plan::OWN_TAGS;
pub use plan::{Console, Plan, PlanError, plan};

use crate::api::SocketError;
use crate::builder::BuildError;
use crate::config::{ConfigError, RunConfig, SandboxMode, ValidConfig, VmConfig};
use crate::console::restore_terminal;
use crate::guest::image::ImageError;
use crate::metrics::MetricsFileError;
use crate::outcome::ExitReason;
use crate::report::Report;
use crate::sandbox::SandboxError;
use crate::vm::{Ending, Vm};

/// Why a guest could not be run. The message names what to do where the user can do something.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// What was asked for cannot be.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The machine cannot be.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The VM cannot be built.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// There is no initramfs.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The console's file cannot be written.
    #[error("Cannot write the console to {path}")]
    Console {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The report cannot be written.
    #[error(
        "Cannot write the report {path}: name a file that you may write to, in a directory that exists and has room"
    )]
    Report {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// There is no API socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The process cannot be confined.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The metrics cannot be written.
    #[error(transparent)]
    Metrics(#[from] MetricsFileError),
    /// The system refuses something that the runner needs.
    #[error("Cannot {0}")]
    System(&'static str, #[source] io::Error),
}

/// Runs a guest as a program does: with the process's standard streams, terminal and signals. Returns the exit status.
///
/// # Errors
/// See [`RunError`]. How the guest ended is never an error.
pub fn run(config: RunConfig) -> Result<u8, RunError> {
    let begin = Instant::now();
    let signals = signals::Signals::block().map_err(|e| RunError::System("block signals", e))?;
    let plan = plan(&config)?;
    match plan.task.clone() {
        Some(task) => session::run(plan, task, signals, begin),
        None => own_init::run(plan, signals, begin),
    }
}

/// The machine, with what is left of its time.
fn machine(plan: &Plan, begin: Instant) -> Result<ValidConfig, ConfigError> {
    // Not zero, which would be no limit that anybody could mean.
    let left = |limit: Duration| limit.saturating_sub(begin.elapsed()).max(Duration::from_millis(1));
    let timeout = plan.machine.timeout.map(left);
    ValidConfig::new(VmConfig { timeout, ..VmConfig::clone(&plan.machine) })
}

/// Where the console's output goes.
fn console(console: &Console) -> Result<Box<dyn Write + Send>, RunError> {
    let duplicate = |fd: &dyn AsFd| {
        let fd = fd.as_fd().try_clone_to_owned().map_err(|e| RunError::System("use a standard stream", e))?;
        // Unbuffered, unlike the standard library's.
        Ok(Box::new(File::from(fd)) as Box<dyn Write + Send>)
    };
    match console {
        Console::Kept => Ok(Box::new(io::sink())),
        Console::Terminal => duplicate(&io::stdout()),
        Console::StandardError => duplicate(&io::stderr()),
        Console::File(path) => {
            let file = File::create(path);
            Ok(Box::new(file.map_err(|source| RunError::Console { path: path.clone(), source })?))
        }
    }
}

/// The file of the report, open: a confined process could not open it later.
struct ReportFile(Option<(PathBuf, File)>);

impl ReportFile {
    fn write(self, report: &Report) -> Result<(), RunError> {
        let Some((path, file)) = self.0 else { return Ok(()) };
        report.write(&file).map_err(|source| {
            // Half a report would be taken for one that is damaged.
            let _ = file.set_len(0);
            RunError::Report { path, source }
        })
    }
}

/// What comes between a VM that is built and its first thread: what is to be opened is, and all that is not needed any
/// more is given up.
fn confine(vm: &mut Vm, plan: &Plan, begin: Instant) -> Result<ReportFile, RunError> {
    let mode = 0o644 & !plan.umask.bits();
    let create = |path: &Path| File::options().write(true).create(true).truncate(true).mode(mode).open(path);
    let open = |path: &PathBuf| match create(path) {
        Ok(file) => Ok((path.clone(), file)),
        Err(source) => Err(RunError::Report { path: path.clone(), source }),
    };
    let report = plan.report.as_ref().map(open).transpose()?;
    if plan.machine.sandbox == SandboxMode::Off {
        tracing::warn!(
            "The sandbox is off: a guest that finds a flaw in daxvm can do all that you can. Leave out --sandbox=off"
        );
    }
    vm.confine(&plan.outputs())?;
    if let Some(timeout) = plan.machine.timeout {
        last_resort::after_limit(timeout.saturating_sub(begin.elapsed()))
            .map_err(|e| RunError::System("start a thread", e))?;
    }
    Ok(ReportFile(report))
}

/// A panic of any thread ends the VM, with the terminal as it was found.
fn end_on_panic(ending: Ending) {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore_terminal();
        default(info);
        ending.end(ExitReason::Crash(format!("a thread of the VMM panicked: {info}")));
    }));
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::thread;

    use super::*;

    #[test]
    fn a_panic_of_any_thread_ends_the_vm_with_a_reason() {
        // In a process of its own: the hook is the whole process's.
        let test = "runner::tests::a_thread_panics";
        let this = std::env::current_exe().unwrap();
        let output = Command::new(this).args(["--exact", test, "--ignored"]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
    }

    #[test]
    #[ignore = "run by the test above"]
    fn a_thread_panics() {
        let ending = Ending::new().unwrap();
        end_on_panic(ending.clone());
        assert_eq!(ending.reason(), None);
        let worker = thread::Builder::new().name("fs1-share".into());
        assert!(worker.spawn(|| panic!("a request that nobody thought of")).unwrap().join().is_err());
        let Some(ExitReason::Crash(why)) = ending.reason() else { panic!("{:?}", ending.reason()) };
        assert!(why.contains("a thread of the VMM panicked") && why.contains("nobody thought of"), "{why}");
        // The event loop is woken.
        assert_eq!(ending.wake().read().unwrap(), 1);
    }
}
