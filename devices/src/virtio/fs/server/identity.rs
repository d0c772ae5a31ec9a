//! The identity that a thread has on the host while it makes a file in the name of one of the guest's users.
//!
//! The guest's kernel checks permissions itself (`default_permissions` of fs/fuse/dir.c) before it asks, by what it knows of the
//! user: groups, capabilities, user namespaces. Of that there comes with a request one user, one group, and the directory's
//! group if the user is a member. So what is made is made with these, that it may be made is taken as settled, and a right
//! that the host would give beyond that (to keep set-id bits) is not there.

use std::io;

use fuse_backend_rs::api::filesystem::Context;
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

/// The number that no user and no group has; for the host's kernel it means "as it is".
pub(super) const NOBODY: u32 = u32::MAX;

/// A user of the guest who makes a file.
pub(super) struct Maker {
    pub(super) context: Context,
    /// A supplementary group, which decides whether a file in a set-group-id directory may be set-group-id itself.
    pub(super) group: Option<u32>,
}

/// What stands for the guest's own check.
const CHECKED: CapabilitySet = CapabilitySet::DAC_OVERRIDE.union(CapabilitySet::DAC_READ_SEARCH);

/// The thread acts as one of the guest's users until this goes.
#[must_use]
#[derive(Default)]
pub(super) struct Identity {
    uid: u32,
    gid: u32,
    in_group: bool,
}

impl Identity {
    /// Of the user who asks, with the rights that user and group have on the host.
    ///
    /// # Errors
    /// What setresgid(2) and setresuid(2) say.
    pub(super) fn of(context: &Context) -> io::Result<Identity> {
        let mut identity = Identity::default();
        identity.take_on(context)?;
        Ok(identity)
    }

    /// Of the user who asks, where the guest's kernel has seen to it that the user may do what is asked.
    ///
    /// # Errors
    /// Those of [`of`](Self::of), of setgroups(2) and capset(2).
    pub(super) fn checked(maker: &Maker) -> io::Result<Identity> {
        let mut identity = Identity::default();
        // Root needs to be in no group.
        let group = maker.group.filter(|_| maker.context.uid != 0);
        if group.is_some() {
            set_groups(group.as_slice())?;
            identity.in_group = true;
        }
        identity.take_on(&maker.context)?;
        if identity.uid != 0 {
            let now = capabilities(None)?;
            set_capabilities(None, CapabilitySets { effective: now.permitted & CHECKED, ..now })?;
        }
        Ok(identity)
    }

    /// What is set goes again, even if not all can be.
    fn take_on(&mut self, context: &Context) -> io::Result<()> {
        // By system call: the C library's functions change all threads. The groups first, while they can be changed.
        if context.gid != 0 {
            set(libc::SYS_setresgid, context.gid)?;
            self.gid = context.gid;
        }
        if context.uid != 0 {
            set(libc::SYS_setresuid, context.uid)?;
            self.uid = context.uid;
        }
        Ok(())
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
        if self.in_group {
            set_groups(&[]).expect("a thread that is root can leave a group");
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

/// Sets the supplementary groups.
fn set_groups(groups: &[u32]) -> io::Result<()> {
    // SAFETY: the call reads as many groups as it is told, which live through it.
    match unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
