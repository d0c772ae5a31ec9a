//! Capabilities and no_new_privs (capabilities(7)): root without most of what makes it root.

use rustix::process::Gid;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs, set_thread_groups,
};

use super::{Layer, SandboxError, Share};

const NAME: &str = "capabilities";

/// What the server needs to read what root may read: files and directories of others, and O_NOATIME, with which
/// overlayfs opens its layers.
const TO_READ: CapabilitySet = CapabilitySet::DAC_READ_SEARCH.union(CapabilitySet::FOWNER);

/// What it needs besides to do on the host what the guest's root does in the guest: files of others, owners, modes with
/// set-id bits, device nodes, file capabilities; and to create files in the name of the guest's users.
const TO_WRITE: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID);

/// What shares like these need.
fn needed(shares: &[Share]) -> CapabilitySet {
    let mut needed = CapabilitySet::empty();
    if !shares.is_empty() {
        needed |= TO_READ;
    }
    if shares.iter().any(|share| !share.read_only) {
        needed |= TO_WRITE;
    }
    needed
}

fn layer(kept: CapabilitySet) -> Layer {
    let names: Vec<_> = kept.iter_names().map(|(name, _)| name.to_lowercase()).collect();
    Layer::applied(NAME, if names.is_empty() { "none".to_owned() } else { names.join(", ") })
}

/// The capabilities that would be left.
pub(super) fn plan(shares: &[Share]) -> Layer {
    match capabilities(None) {
        Ok(now) => layer(now.permitted & needed(shares)),
        Err(error) => Layer::missing(NAME, error.to_string()),
    }
}

/// Gives up what is not needed, for good.
pub(super) fn apply(shares: &[Share]) -> Result<Layer, SandboxError> {
    let failed = || SandboxError::new("give up capabilities");
    let now = capabilities(None).map_err(failed())?;
    if now.effective.contains(CapabilitySet::SETGID) {
        // Groups of the caller's would open files to the guest's users.
        set_thread_groups(&[] as &[Gid]).map_err(SandboxError::new("leave supplementary groups"))?;
    }
    let kept = now.permitted & needed(shares);
    if now.effective.contains(CapabilitySet::SETPCAP) {
        // Beyond the last one that the kernel knows there are none.
        for capability in CapabilitySet::all().iter() {
            if !kept.contains(capability) && remove_capability_from_bounding_set(capability).is_err() {
                break;
            }
        }
    }
    // Kernels before 4.3 have no such set.
    let _ = clear_ambient_capability_set();
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).map_err(failed())?;
    Ok(layer(kept))
}

/// What is done, or would be.
pub(super) fn no_new_privileges() -> Layer {
    Layer::applied("no-new-privileges", "no program that is run gives any")
}

/// Has no program that is run give privileges, which seccomp and Landlock ask for, too.
pub(super) fn forbid_new_privileges() -> Result<Layer, SandboxError> {
    set_no_new_privs(true).map_err(SandboxError::new("set no_new_privs"))?;
    Ok(no_new_privileges())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(read_only: bool) -> Share {
        Share { path: "/srv".into(), read_only, not_own: None }
    }

    #[test]
    fn what_is_only_read_needs_less() {
        assert_eq!(needed(&[]), CapabilitySet::empty());
        assert_eq!(needed(&[share(true)]), TO_READ);
        assert_eq!(needed(&[share(true), share(false)]), TO_READ | TO_WRITE);
        for never in [CapabilitySet::SYS_ADMIN, CapabilitySet::SYS_PTRACE, CapabilitySet::SYS_RAWIO] {
            assert!(!needed(&[share(false)]).contains(never));
        }
    }

    #[test]
    fn names_are_those_of_the_manual() {
        assert_eq!(layer(TO_READ).detail, "dac_read_search, fowner");
        assert_eq!(layer(CapabilitySet::empty()).detail, "none");
    }
}
