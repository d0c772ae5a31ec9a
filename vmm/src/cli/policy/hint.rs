//! The persistent per-inode flag of a host file, for commands that run without a device.

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// FS_IOC_FSGETXATTR and its flag (linux/fs.h).
const FS_IOC_FSGETXATTR: libc::c_ulong = 0x801c_581f;
const FS_XFLAG_DAX: u32 = 0x8000;
/// Where the device keeps the flag on file systems that have none.
const XATTR: &str = "user.daxvm.dax";

/// `struct fsxattr` (linux/fs.h).
#[repr(C)]
#[derive(Default)]
struct FsXattr {
    xflags: u32,
    others: [u32; 6],
}

/// Whether the flag of a regular file is set; what cannot be read counts as not set. To be switched to the device's
/// own reader, so that both say the same.
pub(super) fn read(path: &Path) -> bool {
    flag(path).unwrap_or(false) || xattr(path)
}

fn flag(path: &Path) -> Option<bool> {
    // A FIFO that has taken the file's place meanwhile must not make us wait.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).ok()?;
    let mut attributes = FsXattr::default();
    // SAFETY: the ioctl writes a struct fsxattr, which the pointer is to.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FSGETXATTR as _, &mut attributes) };
    (result == 0).then_some(attributes.xflags & FS_XFLAG_DAX != 0)
}

fn xattr(path: &Path) -> bool {
    let mut value = [0; 1];
    rustix::fs::lgetxattr(path, XATTR, &mut value).is_ok_and(|length| value[..length] == *b"1")
}
