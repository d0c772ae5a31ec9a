//! Limits of the process's own (getrlimit(2)).
//!
//! Open files are raised to what is allowed, by the device (the server keeps a descriptor for each inode that the guest
//! knows). The number of processes is left alone: it counts those of the user, wherever they are, and seccomp lets
//! nobody make one. File sizes are the guest's business.

use rustix::process::{Resource, Rlimit, setrlimit};

use super::{Layer, SandboxError};

/// What is done, or would be.
pub(super) fn layer() -> Layer {
    Layer::applied("limits", "no core dumps")
}

/// Forbids core dumps, which would hold the guest's memory and files.
pub(super) fn apply() -> Result<Layer, SandboxError> {
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })
        .map_err(SandboxError::new("limit core dumps"))?;
    Ok(layer())
}
