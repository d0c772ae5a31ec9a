//! Limits of the process's own (getrlimit(2)).
//!
//! Open files are raised to what is allowed, by the device (the server keeps a descriptor for each inode that the guest
//! knows). The number of processes is left alone: it counts those of the user, wherever they are, and seccomp lets
//! nobody make one. What its caller set for file sizes holds for the guest,
//! too, as an error ([`survive_file_size`]).

use rustix::process::{Resource, Rlimit, setrlimit};

use super::{Layer, SandboxError};

/// What is done, or would be.
pub(super) fn layer() -> Layer {
    Layer::applied("limits", "no core dumps")
}

/// Has what goes beyond a limit of file sizes (`ulimit -f`) fail with EFBIG, which the guest is told. By default a signal
/// (SIGXFSZ) ends the process, and any program in the guest could bring that about.
pub(crate) fn survive_file_size() {
    // SAFETY: a signal that is ignored runs no code.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

/// Forbids core dumps, which would hold the guest's memory and files.
pub(super) fn apply() -> Result<Layer, SandboxError> {
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })
        .map_err(SandboxError::new("limit core dumps"))?;
    Ok(layer())
}
