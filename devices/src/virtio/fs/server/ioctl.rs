//! IOCTL: what chattr(1), lsattr(1) and xfs_io(8) do in the guest, on files and on directories.
//!
//! Only the DAX hint can be changed. All else is reported as the host has it, and a request to change it gets
//! EOPNOTSUPP: that is what ext4, xfs and tmpfs say of a flag that they do not have, and chattr prints as `Operation not
//! supported`. EPERM would tell the user to become root, which would not help.
//!
//! Whether the caller owns the file is checked by the guest's kernel; what this process may do, by the host's.

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::AsFd;

use fuse_backend_rs::abi::fuse_abi::{IoctlIn, IoctlOut};
use vm_memory::ByteValued;

use super::Server;
use super::message::{Reply, Request, errno};
use crate::virtio::fs::hint::{self, FLAG, FsXattr, XFLAG};

/// The commands (include/uapi/linux/fs.h). The first two say 8 bytes and carry 4.
const FS_IOC_GETFLAGS: u32 = 0x8008_6601;
const FS_IOC_SETFLAGS: u32 = 0x4008_6602;
const FS_IOC_FSGETXATTR: u32 = 0x801c_581f;
const FS_IOC_FSSETXATTR: u32 = 0x401c_5820;

/// FUSE_IOCTL_DIR: the handle is that of a directory.
const IOCTL_DIR: u32 = 1 << 4;

/// FS_XFLAG_PREALLOC and FS_XFLAG_HASATTR, which are only ever reported. Newer kernels leave them out when they set.
const REPORTED_ONLY: u32 = 0x8000_0002;

impl Server {
    pub(super) fn ioctl(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let ask: IoctlIn = request.arg()?;
        match ask.cmd {
            FS_IOC_GETFLAGS => {
                check_sizes(&ask, request, 0, size_of::<u32>())?;
                let flags = self.flags(&self.ioctl_file(request, &ask)?)?;
                reply.send(&[IoctlOut::default().as_slice(), flags.as_slice()])
            }
            FS_IOC_FSGETXATTR => {
                check_sizes(&ask, request, 0, size_of::<FsXattr>())?;
                let attributes = self.attributes(&self.ioctl_file(request, &ask)?)?;
                reply.send(&[IoctlOut::default().as_slice(), attributes.as_slice()])
            }
            FS_IOC_SETFLAGS => {
                check_sizes(&ask, request, size_of::<u32>(), 0)?;
                let wanted: u32 = request.arg()?;
                let file = self.file_to_change(request, &ask)?;
                let changed = wanted ^ self.flags(&file)?;
                self.change_hint(&file, changed, FLAG, wanted)?;
                reply.object(&IoctlOut::default())
            }
            FS_IOC_FSSETXATTR => {
                check_sizes(&ask, request, size_of::<FsXattr>(), 0)?;
                let wanted: FsXattr = request.arg()?;
                let file = self.file_to_change(request, &ask)?;
                let now = self.attributes(&file)?;
                let rest =
                    |attributes: &FsXattr| (attributes.extsize, attributes.projid, attributes.cowextsize);
                if rest(&wanted) != rest(&now) {
                    return Err(errno(libc::EOPNOTSUPP));
                }
                let changed = (wanted.xflags ^ now.xflags) & !REPORTED_ONLY;
                self.change_hint(&file, changed, XFLAG, wanted.xflags)?;
                reply.object(&IoctlOut::default())
            }
            _ => Err(errno(libc::ENOTTY)),
        }
    }

    /// The file or directory that the handle is open on, open for reading.
    fn ioctl_file(&self, request: &Request<'_>, ask: &IoctlIn) -> io::Result<File> {
        let (context, nodeid) = (self.context(request), request.header.nodeid);
        if ask.flags & IOCTL_DIR != 0 {
            return self.directories.file(ask.fh, nodeid);
        }
        self.fs.getattr(&context, nodeid, Some(ask.fh))?;
        self.open_node(&context, nodeid, false)
    }

    fn file_to_change(&self, request: &Request<'_>, ask: &IoctlIn) -> io::Result<File> {
        if self.read_only { Err(errno(libc::EROFS)) } else { self.ioctl_file(request, ask) }
    }

    /// The host's flags, with the hint in the place of the host's own.
    fn flags(&self, file: &File) -> io::Result<u32> {
        let flags = hint::flags(file.as_fd())?;
        Ok(if self.hints.read(file.as_fd())? { flags | FLAG } else { flags & !FLAG })
    }

    /// The host's attributes, with the hint in the place of the host's own flag.
    fn attributes(&self, file: &File) -> io::Result<FsXattr> {
        let mut attributes = hint::attributes(file.as_fd())?.unwrap_or_default();
        attributes.xflags &= !XFLAG;
        if self.hints.read(file.as_fd())? {
            attributes.xflags |= XFLAG;
        }
        Ok(attributes)
    }

    /// Sets the hint to `bit` of `wanted` if that is all that is `changed`.
    fn change_hint(&self, file: &File, changed: u32, bit: u32, wanted: u32) -> io::Result<()> {
        match changed {
            0 => Ok(()),
            _ if changed == bit => self.hints.write(file.as_fd(), wanted & bit != 0),
            _ => Err(errno(libc::EOPNOTSUPP)),
        }
    }
}

/// Checks that the request carries, and has room for, as many bytes as its command takes.
fn check_sizes(ask: &IoctlIn, request: &Request<'_>, input: usize, output: usize) -> io::Result<()> {
    let asked = (ask.in_size as usize, ask.out_size as usize, request.left());
    if asked == (input, output, input) { Ok(()) } else { Err(errno(libc::EINVAL)) }
}
