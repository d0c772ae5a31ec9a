//! The flags of inodes that chattr(1), lsattr(1) and xfs_io(8) deal in, on this machine or in a guest.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::IFlags;
use rustix::ioctl::{self, Getter, Setter, opcode};
use serde::{Deserialize, Serialize};

/// FS_DAX_FL: the `x` of lsattr.
pub const DAX: u32 = 0x0200_0000;
/// FS_XFLAG_DAX, the same among the extended attributes.
pub const XFLAG_DAX: u32 = 0x8000;

/// struct fsxattr of include/uapi/linux/fs.h.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[repr(C)]
pub struct Extended {
    /// FS_XFLAG_ flags.
    pub xflags: u32,
    /// The extent size that is wished for.
    pub extsize: u32,
    /// How many extents there are; only ever reported.
    pub nextents: u32,
    /// The project.
    pub projid: u32,
    /// The extent size that is wished for when blocks are copied on write.
    pub cowextsize: u32,
    /// Nothing.
    pub pad: [u8; 8],
}

/// FS_IOC_GETFLAGS of a file or directory.
pub fn get(path: &Path) -> io::Result<u32> {
    Ok(rustix::fs::ioctl_getflags(File::open(path)?)?.bits())
}

/// FS_IOC_SETFLAGS.
pub fn set(path: &Path, flags: u32) -> io::Result<()> {
    Ok(rustix::fs::ioctl_setflags(File::open(path)?, IFlags::from_bits_retain(flags))?)
}

/// FS_IOC_FSGETXATTR of a file or directory.
pub fn get_extended(path: &Path) -> io::Result<Extended> {
    let file = File::open(path)?;
    // SAFETY: the call fills in a `struct fsxattr`, which `Extended` is, and its number carries that size.
    let get = unsafe { Getter::<{ opcode::read::<Extended>(b'X', 31) }, Extended>::new() };
    // SAFETY: as above; the call does nothing else.
    Ok(unsafe { ioctl::ioctl(file, get)? })
}

/// FS_IOC_FSSETXATTR.
pub fn set_extended(path: &Path, attributes: Extended) -> io::Result<()> {
    let file = File::open(path)?;
    // SAFETY: the call reads a `struct fsxattr`, which `Extended` is, and its number carries that size.
    let set = unsafe { Setter::<{ opcode::write::<Extended>(b'X', 32) }, Extended>::new(attributes) };
    // SAFETY: as above; the call touches no memory of the process but that.
    unsafe { ioctl::ioctl(file, set)? };
    Ok(())
}
