//! What is mounted in the root once it is entered.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};

use super::Failure;
use super::protocol::{Mount, RootMode, Task};
use super::root::{mount_share, no_mount_point, tmpfs};

/// Where a share is mounted while one file of it is bound: devtmpfs is writable whatever the root is.
const STAGING: &str = "/dev/.share";

/// File systems of the kernel that a root has when the kernel has them: type and mount point.
const OPTIONAL: [(&str, &str); 6] = [
    ("cgroup2", "/sys/fs/cgroup"),
    ("bpf", "/sys/fs/bpf"),
    ("tracefs", "/sys/kernel/tracing"),
    ("debugfs", "/sys/kernel/debug"),
    ("configfs", "/sys/kernel/config"),
    ("securityfs", "/sys/kernel/security"),
];

/// Mounts what every root has below `/dev`, `/sys`, on `/run` and, when the root is read-only, on `/tmp`.
///
/// # Errors
/// When the terminals or the shared memory in `/dev` cannot be had.
pub fn system(task: &Task) -> Result<(), Failure> {
    let failure = |target: &str, error: io::Error| Failure::new(format!("mount {target}"), error);
    let devices: [(&str, &str, &CStr); 2] =
        [("devpts", "/dev/pts", c"gid=5,mode=620,ptmxmode=666"), ("tmpfs", "/dev/shm", c"mode=1777")];
    for (fstype, target, options) in devices {
        fs::create_dir_all(target)
            .and_then(|()| Ok(mount(fstype, target, fstype, MountFlags::NOSUID, options)?))
            .map_err(|error| failure(target, error))?;
    }
    let links = [("/proc/self/fd", "fd"), ("fd/0", "stdin"), ("fd/1", "stdout"), ("fd/2", "stderr")];
    for (to, name) in links {
        let path = Path::new("/dev").join(name);
        match symlink(to, &path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Failure::new(format!("make {}", path.display()), error));
            }
            _ => {}
        }
    }
    for (fstype, target) in OPTIONAL {
        // Kernels differ in what they have; a command that needs one of them will say so.
        let _ = mount(fstype, target, fstype, MountFlags::empty(), None::<&CStr>);
    }
    let directory = &task.command.directory;
    let fresh = |target: &str, options| {
        // A root without the directory has no use for it, and the command's own directory must stay in sight.
        if Path::new(target).is_dir() && !directory.starts_with(target) {
            return tmpfs(Path::new(target), options).map_err(|error| failure(target, error.into()));
        }
        Ok(())
    };
    fresh("/run", c"mode=0755")?;
    if task.root.mode == RootMode::Ro {
        fresh("/tmp", c"mode=1777")?;
    }
    Ok(())
}

/// Mounts a share, or one file of it.
///
/// # Errors
/// When the share cannot be mounted, or its target is not there and cannot be made.
pub fn share(share: &Mount) -> Result<(), Failure> {
    let target = &share.target;
    let what = format!("mount the share {} on {}", share.tag, target.display());
    let failure = |error: io::Error| Failure::new(&what, format_args!("{error}{}", no_mount_point(&error)));
    if !share.file {
        fs::create_dir_all(target).map_err(failure)?;
        return mount_share(&what, &share.tag, target, share.read_only, &share.options);
    }
    let name =
        target.file_name().ok_or_else(|| Failure::new(&what, "the target is not the path of a file"))?;
    let staging = Path::new(STAGING);
    mount_share(&what, &share.tag, staging, share.read_only, &share.options)?;
    let bound = bind_file(&staging.join(name), target);
    unmount(staging, UnmountFlags::DETACH).map_err(|error| failure(error.into()))?;
    bound.map_err(failure)
}

/// Binds a file to a path; where there is none, an empty file and its directories are made.
pub fn bind_file(file: &Path, target: &Path) -> io::Result<()> {
    if !target.exists() {
        fs::create_dir_all(target.parent().unwrap_or(Path::new("/")))?;
        File::create_new(target)?;
    }
    Ok(mount_bind(file, target)?)
}
