//! The identity that a thread has on the host while it makes a file in the name of one of the guest's users.
//!
//! The guest's kernel checks permissions itself (`default_permissions` of fs/fuse/dir.c) before it asks, by what it knows of the
//! user: groups, capabilities, user namespaces. None of that comes with a request, which names one user and one group. So what
//! is made is made with that user and group, that it may be made is taken as settled, and a right that the host would give
//! beyond that (to keep set-id bits) is not there.

use std::io;

use fuse_backend_rs::api::filesystem::Context;
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

/// What stands for the guest's own check.
const CHECKED: CapabilitySet = CapabilitySet::DAC_OVERRIDE.union(CapabilitySet::DAC_READ_SEARCH);

/// The thread acts as one of the guest's users until this goes.
#[must_use]
pub(super) struct Identity {
    uid: u32,
    gid: u32,
}

impl Identity {
    /// Of the user who asks, with the rights that user and group have on the host.
    ///
    /// # Errors
    /// What setresgid(2) and setresuid(2) say.
    pub(super) fn of(context: &Context) -> io::Result<Identity> {
        let mut identity = Identity { uid: 0, gid: 0 };
        // By system call: the C library's functions change all threads. The group first, while it can be changed.
        if context.gid != 0 {
            set(libc::SYS_setresgid, context.gid)?;
            identity.gid = context.gid;
        }
        if context.uid != 0 {
            set(libc::SYS_setresuid, context.uid)?;
            identity.uid = context.uid;
        }
        Ok(identity)
    }

    /// Of the user who asks, where the guest's kernel has seen to it that the user may do what is asked.
    ///
    /// # Errors
    /// Those of [`of`](Self::of), and of capset(2).
    pub(super) fn checked(context: &Context) -> io::Result<Identity> {
        let identity = Identity::of(context)?;
        if identity.uid != 0 {
            let now = capabilities(None)?;
            set_capabilities(None, CapabilitySets { effective: now.permitted & CHECKED, ..now })?;
        }
        Ok(identity)
    }
}

impl Drop for Identity {
    /// # Panics
    /// If the thread cannot be root again: it would do in a user's name what others ask for.
    fn drop(&mut self) {
        // With the user, all permitted capabilities come back.
        if self.uid != 0 {
            set(libc::SYS_setresuid, 0).expect("a thread whose real user is root can act as root");
        }
        if self.gid != 0 {
            set(libc::SYS_setresgid, 0).expect("a thread that is root can act in root's group");
        }
    }
}

/// Sets the effective id.
fn set(call: libc::c_long, id: u32) -> io::Result<()> {
    // SAFETY: the call takes three numbers, of which -1 leaves the real and the saved id, and touches no memory.
    match unsafe { libc::syscall(call, -1, id, -1) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
