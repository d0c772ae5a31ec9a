//! What the program does inside a guest, as PID 1: it is the `/init` of the initramfs that the runner makes in memory
//! ([`image`]).
//!
//! In this order: the kernel's own file systems, the modules, the ports (`ports`), [`FromGuest::Ready`]; the root and
//! what is mounted in it (`root`, `mounts`); the command and its streams (`session`); the end of all that is left
//! (`end`), and the last message, at which the runner ends the machine. A step that fails is told by
//! [`FromGuest::Failed`] and on the console; where there is no runner to be told, the machine is switched off.
//!
//! What a command finds: the root as the task wants it; `/proc`, `/sys`, `/dev` and what belongs into them; a new tmpfs
//! on `/run`, since sockets and locks of the host mean nothing here; the root's own `/tmp`, which an overlay makes
//! writable, or a new tmpfs when the root is read-only. A tmpfs never hides the command's own directory. Mount points
//! that are missing are made where the root can be written to.

mod command;
mod end;
mod environment;
pub mod image;
pub mod kernel;
mod mounts;
#[cfg(test)]
mod namespace;
mod ports;
pub mod protocol;
mod pump;
mod root;
mod session;

use std::fmt;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

use protocol::{FromGuest, MODULES_DIR, TASK_FILE, Task};
use session::Control;

/// The file of the initramfs that the kernel starts.
const INIT: &str = "/init";

/// A step that failed.
#[derive(Debug, thiserror::Error)]
#[error("could not {what}: {error}")]
struct Failure {
    /// What was being done.
    what: String,
    /// What the system said, and what to do about it.
    error: String,
}

impl Failure {
    fn new(what: impl Into<String>, error: impl fmt::Display) -> Failure {
        Failure { what: what.into(), error: error.to_string() }
    }
}

/// Whether this process was started by a guest's kernel. A container's PID 1 may be this program too, under its own name.
pub fn is_init() -> bool {
    std::process::id() == 1 && std::env::args_os().next().is_some_and(|name| name == INIT)
}

/// Does all that a guest does. Returns only if the runner does not listen and the machine cannot be switched off.
pub fn main() -> ExitCode {
    let mut control = None;
    let last = boot(&mut control).unwrap_or_else(|failure| {
        kernel::tell(&failure);
        FromGuest::Failed { what: failure.what, error: failure.error }
    });
    end::stop_processes();
    end::release_file_systems();
    match control.map(|control: Control| control.send(&last)) {
        // The runner ends the machine when it has written all output. Switching it off would reset the ports, and take
        // from their queues what a slow reader has not read yet.
        Some(Ok(())) => loop {
            std::thread::park();
        },
        Some(Err(error)) => kernel::tell(&format_args!("the runner does not hear {last:?}: {error}")),
        None => {}
    }
    kernel::tell(&format_args!("the machine stays on: {}", end::power_off()));
    ExitCode::FAILURE
}

fn boot(control: &mut Option<Control>) -> Result<FromGuest, Failure> {
    for (fstype, target) in kernel::FILE_SYSTEMS {
        let mount = kernel::mount_once(fstype, Path::new(target));
        mount.map_err(|error| Failure::new(format!("mount {fstype} on {target}"), error))?;
    }
    let task = read_task()?;
    for module in &task.modules {
        load(module)?;
    }
    let ports = ports::open(&task.command)?;
    let control = control.insert(ports.control);
    control.send(&FromGuest::Ready).map_err(|error| Failure::new("tell that the guest runs", error))?;
    root::mount(&task.root, Path::new(root::NEW_ROOT))?;
    root::enter(Path::new(root::NEW_ROOT), root::Initramfs::Free)?;
    mounts::system(&task)?;
    for mount in &task.mounts {
        mounts::share(mount)?;
    }
    environment::prepare();
    session::run(&task.command, control, ports.streams)
}

fn read_task() -> Result<Task, Failure> {
    let failure = |error: &dyn fmt::Display| Failure::new(format!("read {TASK_FILE}"), error);
    let json = fs::read(TASK_FILE).map_err(|error| failure(&error))?;
    serde_json::from_slice(&json).map_err(|error| failure(&error))
}

fn load(module: &str) -> Result<(), Failure> {
    let path = Path::new(MODULES_DIR).join(format!("{module}.ko"));
    kernel::load_module(&path).map_err(|error| {
        let advice = match error.raw_os_error() {
            Some(libc::ENOEXEC) => "; is it of this kernel? --modules names the directory of its modules",
            Some(libc::ENOENT) => "; it needs a symbol or a module that is not there: is it of this kernel?",
            _ => "",
        };
        Failure::new(format!("load the module {module}"), format_args!("{error}{advice}"))
    })
}
