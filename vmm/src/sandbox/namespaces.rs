//! Mounts: a tree of its own for each share, and an empty root directory for the process. Both need CAP_SYS_ADMIN.
//!
//! A share is a copy of the mounts at and below its directory that is mounted nowhere (open_tree(2)): `..` of its root is
//! its root, no path leads to it, and attributes of its own bind whoever comes by it: read-only, no devices, no set-id,
//! no programs, and no symbolic links to follow. What the host mounts below the directory later is not in it.

use std::ffi::c_int;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, fstat};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_change,
    mount_move, mount_remount, move_mount, open_tree, unmount,
};
use rustix::process::{chdir, chroot, pivot_root};
use rustix::thread::{CapabilitySet, UnshareFlags, capabilities, unshare_unsafe};

use super::{Layer, Outputs, SandboxError};

const NAME: &str = "mounts";

/// What nobody needs of any tree.
const HARMLESS: u64 = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;

/// Opens the directory `path` as the root of a tree of its own. The tree is there as long as the descriptor is open.
///
/// # Errors
/// ENOTDIR; what open_tree(2) and mount_setattr(2) say: EPERM without privileges, ENOSYS before Linux 5.12.
pub(crate) fn own_tree(path: &Path, read_only: bool) -> io::Result<OwnedFd> {
    let tree = copy(path, OpenTreeFlags::AT_RECURSIVE)?;
    if FileType::from_raw_mode(fstat(&tree)?.st_mode) != FileType::Directory {
        return Err(Errno::NOTDIR.into());
    }
    let attributes = HARMLESS | if read_only { libc::MOUNT_ATTR_RDONLY } else { 0 };
    // Linux 5.14 is the first that can be told not to follow links.
    set_attributes(tree.as_fd(), attributes | libc::MOUNT_ATTR_NOSYMFOLLOW)
        .or_else(|_| set_attributes(tree.as_fd(), attributes))?;
    Ok(tree)
}

fn copy(path: &Path, more: OpenTreeFlags) -> rustix::io::Result<OwnedFd> {
    open_tree(CWD, path, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | more)
}

/// Sets attributes of all mounts of a tree.
fn set_attributes(tree: BorrowedFd<'_>, attributes: u64) -> io::Result<()> {
    let attributes = libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation: 0, userns_fd: 0 };
    let flags: c_int = libc::AT_EMPTY_PATH | libc::AT_RECURSIVE;
    // SAFETY: path and structure live through the call, which reads as many bytes of the latter as it is told.
    let set = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What the new root would show.
pub(super) fn plan(outputs: &Outputs) -> Layer {
    let can_mount = || capabilities(None).is_ok_and(|now| now.effective.contains(CapabilitySet::SYS_ADMIN));
    if directories(outputs).any(|directory| directory == Path::new("/")) {
        return Layer::missing(
            NAME,
            "a file that is written or removed is in `/`, which therefore has to stay",
        );
    }
    match copy(Path::new("/proc"), OpenTreeFlags::empty()) {
        Ok(_) => layer(outputs),
        Err(_) if !can_mount() => Layer::missing(NAME, "it takes CAP_SYS_ADMIN, which root has"),
        Err(error) => Layer::missing(NAME, error.to_string()),
    }
}

/// Goes to a root directory that is empty but for the process's own directory in /proc and the directories of `outputs`.
pub(super) fn apply(outputs: &Outputs) -> Result<Layer, SandboxError> {
    let planned = plan(outputs);
    if !planned.applied {
        return Ok(planned);
    }
    // SAFETY: the flag has nothing to do with descriptors.
    match unsafe { unshare_unsafe(UnshareFlags::NEWNS) } {
        Ok(()) => {}
        Err(error) => {
            return Ok(Layer::missing(NAME, format!("there is no mount namespace to be had: {error}")));
        }
    }
    // Nothing that is done from here on is to be seen elsewhere.
    match mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE) {
        Ok(()) => {}
        Err(Errno::INVAL) => {
            return Ok(Layer::missing(NAME, "the root directory is no mount, as after chroot(2)"));
        }
        Err(error) => return Err(SandboxError::new("have mounts of its own")(error)),
    }
    enter_empty_root(&shown(outputs)).map_err(SandboxError::new("go to an empty root directory"))?;
    Ok(layer(outputs))
}

fn layer(outputs: &Outputs) -> Layer {
    let mut shown = vec!["/proc/self".to_owned()];
    shown.extend(directories(outputs).map(|path| path.display().to_string()));
    Layer::applied(NAME, format!("a root directory of its own with nothing in it but {}", shown.join(", ")))
}

fn directories(outputs: &Outputs) -> impl Iterator<Item = &Path> {
    let mut directories = [outputs.replaced_in(), outputs.removed_in()].concat();
    directories.sort();
    directories.dedup();
    directories.into_iter()
}

/// What is at the same place in the new root. A directory below another comes after it, and is in it already.
fn shown(outputs: &Outputs) -> Vec<PathBuf> {
    let mut shown: Vec<PathBuf> = Vec::new();
    for directory in directories(outputs) {
        if !shown.iter().any(|above| directory.starts_with(above)) {
            shown.push(directory.to_owned());
        }
    }
    shown
}

/// Files in /proc that are read when something is wrong.
const LIMIT_OF_MAPPINGS: &str = "/proc/sys/vm/max_map_count";

fn enter_empty_root(shown: &[PathBuf]) -> io::Result<()> {
    let mut trees = Vec::new();
    for directory in shown {
        trees.push((directory.as_path(), copy(directory, OpenTreeFlags::empty())?));
    }
    // What is read of the process itself, and nothing of the others. The final slash leads to the directory.
    trees.push((Path::new("/proc/self"), copy(Path::new("/proc/self/"), OpenTreeFlags::empty())?));
    let limit = copy(Path::new(LIMIT_OF_MAPPINGS), OpenTreeFlags::empty())?;

    // A place that is there on every machine: the devices have found it already.
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("tmpfs", "/proc", "tmpfs", flags, c"size=256k,mode=0755")?;
    chdir("/proc")?;
    for (place, tree) in &trees {
        let place = place.strip_prefix("/").unwrap_or(place);
        std::fs::create_dir_all(place)?;
        set_attributes(tree.as_fd(), HARMLESS)?;
        attach(tree.as_fd(), place)?;
    }
    let place = Path::new(LIMIT_OF_MAPPINGS).strip_prefix("/").unwrap_or(Path::new(""));
    std::fs::create_dir_all(place.parent().unwrap_or(Path::new("")))?;
    std::fs::File::create(place)?;
    attach(limit.as_fd(), place)?;
    // The mount at the top alone: what is on it keeps its own flags.
    mount_remount("/proc", flags | MountFlags::BIND | MountFlags::RDONLY, c"")?;
    match pivot_root(".", ".") {
        // The old root is on top of the new one now.
        Ok(()) => unmount(".", UnmountFlags::DETACH)?,
        // The root that the kernel booted with cannot be left, but covered.
        Err(Errno::INVAL) => {
            mount_move(".", "/")?;
            chroot(".")?;
        }
        Err(error) => return Err(error.into()),
    }
    Ok(chdir("/")?)
}

fn attach(tree: BorrowedFd<'_>, place: &Path) -> io::Result<()> {
    Ok(move_mount(tree, "", CWD, place, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}
