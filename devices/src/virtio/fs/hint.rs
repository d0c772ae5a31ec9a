//! The persistent DAX hint of a host file: what `chattr +x` sets, and what the policy `inode` goes by.
//!
//! It is the file's own flag (FS_XFLAG_DAX, which chattr(1) and lsattr(1) show as `x`) where the file system has it: ext4
//! and xfs do. Elsewhere it is the extended attribute [`ATTRIBUTE`]. Either way it lives with the file on the host.
//!
//! Nobody can ask a file system whether it has the flag: tmpfs reports flags, and refuses this one when it is set; old
//! ext4 takes it and forgets it. So a flag counts as kept when it is still there after it was set, and where it is not,
//! the attribute is used.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{PoisonError, RwLock};

use rustix::fs::{FileType, Mode, OFlags, XattrFlags};
use rustix::io::Errno;
use rustix::ioctl::{self, Getter, Setter, opcode};
use vm_memory::ByteValued;

/// The extended attribute that is the hint where a file system has no flag for it. It is set when it is there with any
/// value but `0`; daxvm writes `1`.
pub const ATTRIBUTE: &CStr = c"user.daxvm.dax";

/// FS_DAX_FL of FS_IOC_GETFLAGS (include/uapi/linux/fs.h).
pub(super) const FLAG: u32 = 0x0200_0000;
/// FS_XFLAG_DAX of FS_IOC_FSGETXATTR.
pub(super) const XFLAG: u32 = 0x8000;

/// File systems that keep the flag themselves, by `f_type` of statfs(2): ext4 and xfs.
const NATIVE: [u64; 2] = [0xef53, 0x5846_5342];

/// struct fsxattr (include/uapi/linux/fs.h): the attributes of a file that ext4 and xfs have in common.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub(super) struct FsXattr {
    pub(super) xflags: u32,
    pub(super) extsize: u32,
    pub(super) nextents: u32,
    pub(super) projid: u32,
    pub(super) cowextsize: u32,
    pub(super) pad: [u8; 8],
}

// SAFETY: integers without padding between them, for which all bytes are valid.
unsafe impl ByteValued for FsXattr {}

/// Reads the hint of the file or directory at `path`; anything else has none, nor is it opened. A symbolic link is not
/// followed.
///
/// # Errors
/// What the host says: there is no such file, or it may not be read.
pub fn read(path: &Path) -> io::Result<bool> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty())?;
    match open(file.as_fd())? {
        Some(file) => HintStore::default().read(file.as_fd()),
        None => Ok(false),
    }
}

/// Opens anew, to be read, what an O_PATH descriptor stands for. `None` if it is neither a file nor a directory: to open
/// a FIFO may wait for ever, and to open a device may do anything.
fn open(file: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    let kind = FileType::from_raw_mode(rustix::fs::fstat(file)?.st_mode);
    if !matches!(kind, FileType::RegularFile | FileType::Directory) {
        return Ok(None);
    }
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    // Not blocking, so that a lease that somebody holds is not waited for.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    Ok(Some(rustix::fs::open(path, flags, Mode::empty())?))
}

/// Reads and writes hints, and remembers which file systems keep the flag themselves.
#[derive(Debug, Default)]
pub struct HintStore {
    /// By the file system's device number. A share has one or few.
    native: RwLock<Vec<(u64, bool)>>,
}

impl HintStore {
    /// Reads the hint of a file or directory that is open for reading (not with O_PATH).
    ///
    /// # Errors
    /// What the host says. A file system that can store no hint is no error.
    pub fn read(&self, file: BorrowedFd<'_>) -> io::Result<bool> {
        match attributes(file)? {
            Some(FsXattr { xflags, .. }) if xflags & XFLAG != 0 => Ok(true),
            _ if self.is_native(file)? => Ok(false),
            _ => read_attribute(file),
        }
    }

    /// Writes the hint of a file or directory that is open (not with O_PATH; for reading is enough).
    ///
    /// # Errors
    /// EOPNOTSUPP if the file system can store no hint, or ext4 and xfs none for this file (encrypted, verity); else what
    /// the host says, EPERM to those who do not own the file.
    pub fn write(&self, file: BorrowedFd<'_>, hint: bool) -> io::Result<()> {
        let attributes_now = attributes(file)?;
        let has_flag = attributes_now.is_some_and(|now| now.xflags & XFLAG != 0);
        match attributes_now {
            Some(now) if !hint && has_flag => set_attributes(file, now)?,
            Some(now) if hint && !has_flag => match set_attributes(file, now) {
                Ok(()) => {
                    let kept = attributes(file)?.is_some_and(|now| now.xflags & XFLAG != 0);
                    self.learn(file, kept)?;
                    if kept {
                        return Ok(());
                    }
                }
                Err(error) if !is_unknown(error) || self.is_native(file)? => return Err(error.into()),
                Err(_) => self.learn(file, false)?,
            },
            _ => {}
        }
        match hint {
            true if has_flag => Ok(()),
            true => Ok(rustix::fs::fsetxattr(file, ATTRIBUTE, b"1", XattrFlags::empty())?),
            false if read_attribute(file)? => Ok(rustix::fs::fremovexattr(file, ATTRIBUTE)?),
            false => Ok(()),
        }
    }

    /// Whether it is known of the file system with this device number that it keeps the flag itself.
    pub(super) fn is_known_native(&self, device: u64) -> bool {
        self.known(device) == Some(true)
    }

    fn known(&self, device: u64) -> Option<bool> {
        let known = self.native.read().unwrap_or_else(PoisonError::into_inner);
        known.iter().find(|(known, _)| *known == device).map(|(_, native)| *native)
    }

    /// Whether the file system of an open file keeps the flag itself, and so lets new files inherit it too.
    ///
    /// # Errors
    /// What the host says.
    pub(super) fn is_native(&self, file: BorrowedFd<'_>) -> io::Result<bool> {
        let device = rustix::fs::fstat(file)?.st_dev;
        if let Some(native) = self.known(device) {
            return Ok(native);
        }
        let native = NATIVE.contains(&(rustix::fs::fstatfs(file)?.f_type as u64));
        self.learn(file, native)?;
        Ok(native)
    }

    fn learn(&self, file: BorrowedFd<'_>, native: bool) -> io::Result<()> {
        let device = rustix::fs::fstat(file)?.st_dev;
        let mut known = self.native.write().unwrap_or_else(PoisonError::into_inner);
        match known.iter_mut().find(|(known, _)| *known == device) {
            Some(entry) => entry.1 = native,
            None => known.push((device, native)),
        }
        Ok(())
    }
}

/// FS_IOC_GETFLAGS; 0 if the file system has no flags.
pub(super) fn flags(file: BorrowedFd<'_>) -> io::Result<u32> {
    match rustix::fs::ioctl_getflags(file) {
        Ok(flags) => Ok(flags.bits()),
        Err(error) if is_unknown(error) => Ok(0),
        Err(error) => Err(error.into()),
    }
}

/// FS_IOC_FSGETXATTR; `None` if the file system does not know it.
pub(super) fn attributes(file: BorrowedFd<'_>) -> io::Result<Option<FsXattr>> {
    // SAFETY: the call fills in a `struct fsxattr`, which `FsXattr` is, and its number carries that size.
    let get = unsafe { Getter::<{ opcode::read::<FsXattr>(b'X', 31) }, FsXattr>::new() };
    // SAFETY: as above; the call does nothing else.
    match unsafe { ioctl::ioctl(file, get) } {
        Ok(attributes) => Ok(Some(attributes)),
        Err(error) if is_unknown(error) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// FS_IOC_FSSETXATTR with the file's own attributes and the flag for DAX turned over.
fn set_attributes(file: BorrowedFd<'_>, now: FsXattr) -> Result<(), Errno> {
    let attributes = FsXattr { xflags: now.xflags ^ XFLAG, ..now };
    // SAFETY: the call reads a `struct fsxattr`, which `FsXattr` is, and its number carries that size.
    let set = unsafe { Setter::<{ opcode::write::<FsXattr>(b'X', 32) }, FsXattr>::new(attributes) };
    // SAFETY: as above; the call touches no memory of the process but that.
    unsafe { ioctl::ioctl(file, set) }
}

fn read_attribute(file: BorrowedFd<'_>) -> io::Result<bool> {
    let mut value = [0; 8];
    match rustix::fs::fgetxattr(file, ATTRIBUTE, &mut value) {
        Ok(len) => Ok(value[..len] != *b"0"),
        // It is there, and longer than what is looked at.
        Err(Errno::RANGE) => Ok(true),
        Err(Errno::NODATA) => Ok(false),
        Err(error) if is_unknown(error) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Whether a file system says that it does not have what it was asked for.
fn is_unknown(error: Errno) -> bool {
    matches!(error, Errno::NOTTY | Errno::OPNOTSUPP | Errno::NOSYS)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use tempfile::TempDir;

    use super::*;
    use crate::virtio::fs::testing::{directory_with_attributes, directory_with_flags};

    fn attribute(file: &File) -> Result<usize, Errno> {
        rustix::fs::fgetxattr(file, ATTRIBUTE, &mut [0; 8])
    }

    #[test]
    fn ext4_and_xfs_keep_the_flag() {
        let Some(directory) = directory_with_flags() else { return };
        let hints = HintStore::default();
        let path = directory.path().join("file");
        let file = File::create(&path).unwrap();
        assert!(!hints.read(file.as_fd()).unwrap());
        for (path, file) in
            [(path.as_path(), file), (directory.path(), File::open(directory.path()).unwrap())]
        {
            let before = flags(file.as_fd()).unwrap();
            hints.write(file.as_fd(), true).unwrap();
            hints.write(file.as_fd(), true).unwrap();
            assert!(hints.read(file.as_fd()).unwrap() && read(path).unwrap());
            assert_eq!(flags(file.as_fd()).unwrap(), before | FLAG);
            assert_eq!(attribute(&file), Err(Errno::NODATA));
        }
        let directory_file = File::open(directory.path()).unwrap();
        assert!(hints.is_native(directory_file.as_fd()).unwrap());
        let heir = directory.path().join("heir");
        File::create(&heir).unwrap();
        assert!(read(&heir).unwrap());

        let file = File::open(&path).unwrap();
        hints.write(file.as_fd(), false).unwrap();
        assert!(!hints.read(file.as_fd()).unwrap() && !read(&path).unwrap());
        assert_eq!(flags(file.as_fd()).unwrap() & FLAG, 0);
        // An attribute that came with a copy from elsewhere says nothing here.
        rustix::fs::fsetxattr(&file, ATTRIBUTE, b"1", XattrFlags::empty()).unwrap();
        assert!(!hints.read(file.as_fd()).unwrap());
    }

    #[test]
    fn tmpfs_keeps_an_attribute() {
        let Some(directory) = directory_with_attributes() else { return };
        let path = directory.path().join("file");
        let file = File::create(&path).unwrap();
        let hints = HintStore::default();
        for (path, file) in
            [(path.as_path(), file), (directory.path(), File::open(directory.path()).unwrap())]
        {
            assert!(!hints.read(file.as_fd()).unwrap());
            hints.write(file.as_fd(), true).unwrap();
            assert!(hints.read(file.as_fd()).unwrap() && read(path).unwrap());
            assert_eq!((attribute(&file), hints.is_native(file.as_fd()).unwrap()), (Ok(1), false));
            hints.write(file.as_fd(), false).unwrap();
            hints.write(file.as_fd(), false).unwrap();
            assert!(!hints.read(file.as_fd()).unwrap() && !read(path).unwrap());
            assert_eq!(attribute(&file), Err(Errno::NODATA));
        }
        let file = File::open(path).unwrap();
        for (value, hint) in [(&b"1"[..], true), (b"", true), (b"yes, please", true), (b"0", false)] {
            rustix::fs::fsetxattr(&file, ATTRIBUTE, value, XattrFlags::empty()).unwrap();
            assert_eq!(hints.read(file.as_fd()).unwrap(), hint, "{value:?}");
        }
    }

    #[test]
    fn what_cannot_have_a_hint_has_none() {
        let hints = HintStore::default();
        let proc = File::open("/proc/self/comm").unwrap();
        assert!(!hints.read(proc.as_fd()).unwrap());
        assert_eq!(hints.write(proc.as_fd(), true).unwrap_err().raw_os_error(), Some(libc::EOPNOTSUPP));
        assert!(hints.write(proc.as_fd(), false).is_ok());

        let directory = TempDir::new().unwrap();
        let fifo = directory.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::RUSR, 0).unwrap();
        // To open it would wait for a writer; that this test ends is a part of the test.
        assert!(!read(&fifo).unwrap());
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&fifo, &link).unwrap();
        assert!(!read(&link).unwrap());
        assert!(!read(Path::new("/dev/zero")).unwrap());
        assert_eq!(read(&directory.path().join("none")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
