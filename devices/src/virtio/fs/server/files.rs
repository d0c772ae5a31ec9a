//! Operations on files: attributes, opening, data.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr;

use fuse_backend_rs::abi::fuse_abi::{
    AccessIn, CopyFileRangeIn, CreateIn, FATTR_FH, FSYNC_FDATASYNC, FallocateIn, FlushIn, FsyncIn,
    GETATTR_FH, GetattrIn, LseekIn, LseekOut, OpenIn, OpenOut, ReadIn, ReleaseIn, SetattrIn, WRITE_CACHE,
    WriteIn, WriteOut,
};
use fuse_backend_rs::api::filesystem::{FileSystem, SetattrValid};
use vm_memory::ByteValued;

use super::Server;
use super::init::MAX_WRITE;
use super::message::{Reply, Request, errno};
use super::names::NO_NAME;
use crate::virtio::fs::abi::{FOPEN_KEEP_CACHE, FOPEN_NOFLUSH};
use crate::virtio::fs::per_file_dax::ClientDax;

/// The most bytes that one COPY_FILE_RANGE copies, so that it does not hold the queue up for long.
const COPY_MAX: u64 = 1 << 30;

impl Server {
    pub(super) fn getattr(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let GetattrIn { flags, fh, .. } = request.arg()?;
        let handle = (flags & GETATTR_FH != 0).then_some(fh);
        let (stat, timeout) = self.fs.getattr(&self.context(request), request.header.nodeid, handle)?;
        reply.object(&self.dax.attr_out(stat, timeout))
    }

    pub(super) fn setattr(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let ask: SetattrIn = request.arg()?;
        let handle = (ask.valid & FATTR_FH != 0).then_some(ask.fh);
        let valid = SetattrValid::from_bits_truncate(ask.valid);
        let (context, nodeid) = (self.context(request), request.header.nodeid);
        let (stat, timeout) = self.fs.setattr(&context, nodeid, ask.into(), handle, valid)?;
        reply.object(&self.dax.attr_out(stat, timeout))
    }

    pub(super) fn access(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let AccessIn { mask, .. } = request.arg()?;
        if self.read_only && mask & libc::W_OK as u32 != 0 {
            return Err(errno(libc::EROFS));
        }
        self.fs.access(&self.context(request), request.header.nodeid, mask)?;
        reply.empty()
    }

    pub(super) fn open(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let OpenIn { flags, fuse_flags } = request.arg()?;
        self.check_open(flags)?;
        let (context, nodeid) = (self.context(request), request.header.nodeid);
        let host_flags = host_flags(flags) | flags & libc::O_TRUNC as u32;
        let (handle, _, _) = self.fs.open(&context, nodeid, host_flags, fuse_flags)?;
        let is_dax = self.dax.client() != ClientDax::Off
            && self.fs.getattr(&context, nodeid, handle).is_ok_and(|(stat, _)| self.dax.is_dax(&stat));
        reply.object(&open_out(handle, flags, is_dax))
    }

    pub(super) fn create(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let mut ask: CreateIn = request.arg()?;
        let mut name = NO_NAME;
        let name = request.name(&mut name)?;
        self.check_open(ask.flags)?;
        let flags = ask.flags;
        // The library passes them to openat(2), where O_PATH, for one, would follow a symbolic link out of the share.
        ask.flags = host_flags(flags) | flags & (libc::O_TRUNC | libc::O_EXCL) as u32;
        let (entry, handle, _, _) =
            self.fs.create(&self.context(request), request.header.nodeid, name, ask)?;
        let is_dax = self.dax.is_dax(&entry.attr);
        let entry = self.dax.entry_out(entry);
        reply.send(&[entry.as_slice(), open_out(handle, flags, is_dax).as_slice()])
    }

    /// Refuses what a share or any share does not allow to open a file for.
    fn check_open(&self, flags: u32) -> io::Result<()> {
        let flags = flags as i32;
        let access = flags & libc::O_ACCMODE;
        if access == libc::O_ACCMODE {
            return Err(errno(libc::EINVAL));
        }
        if self.read_only && (access != libc::O_RDONLY || flags & libc::O_TRUNC != 0) {
            return Err(errno(libc::EROFS));
        }
        Ok(())
    }

    pub(super) fn read(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let ReadIn { fh, offset, size, flags, .. } = request.arg()?;
        let mut body = reply.body()?;
        let (context, nodeid, size) = (self.context(request), request.header.nodeid, size.min(MAX_WRITE));
        let read = self.fs.read(&context, nodeid, fh, &mut body, size, offset, None, host_flags(flags))?;
        reply.finish(read)
    }

    pub(super) fn write(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let WriteIn { fh, offset, size, fuse_flags, flags, .. } = request.arg()?;
        if size as usize != request.left() {
            return Err(errno(libc::EINVAL));
        }
        let (context, nodeid) = (self.context(request), request.header.nodeid);
        let delayed = fuse_flags & WRITE_CACHE != 0;
        let flags = host_flags(flags);
        let data = &mut request.data();
        let written =
            self.fs.write(&context, nodeid, fh, data, size, offset, None, delayed, flags, fuse_flags)?;
        reply.object(&WriteOut { size: written as u32, padding: 0 })
    }

    pub(super) fn flush(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let FlushIn { fh, lock_owner, .. } = request.arg()?;
        self.fs.flush(&self.context(request), request.header.nodeid, fh, lock_owner)?;
        reply.empty()
    }

    pub(super) fn fsync(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let FsyncIn { fh, fsync_flags, .. } = request.arg()?;
        let data_only = fsync_flags & FSYNC_FDATASYNC != 0;
        self.fs.fsync(&self.context(request), request.header.nodeid, data_only, fh)?;
        reply.empty()
    }

    pub(super) fn release(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let ReleaseIn { fh, flags, .. } = request.arg()?;
        self.fs.release(&self.context(request), request.header.nodeid, flags, fh, false, false, None)?;
        reply.empty()
    }

    pub(super) fn fallocate(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let FallocateIn { fh, offset, length, mode, .. } = request.arg()?;
        let (context, nodeid) = (self.context(request), request.header.nodeid);
        // The host leaves the set-id bits to a privileged server, and the client leaves them to us.
        let (stat, _) = self.fs.getattr(&context, nodeid, Some(fh))?;
        self.kill_set_id(&context, nodeid, &stat)?;
        self.fs.fallocate(&context, nodeid, fh, mode, offset, length)?;
        reply.empty()
    }

    pub(super) fn lseek(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let LseekIn { fh, offset, whence, .. } = request.arg()?;
        // The client keeps the position itself and asks for data and holes alone.
        if !matches!(whence as i32, libc::SEEK_DATA | libc::SEEK_HOLE) {
            return Err(errno(libc::EINVAL));
        }
        let offset = self.fs.lseek(&self.context(request), request.header.nodeid, fh, offset, whence)?;
        reply.object(&LseekOut { offset })
    }

    /// Copies within the host, without the data passing through the guest; shares the blocks where the host can.
    pub(super) fn copy_file_range(
        &self,
        request: &mut Request<'_>,
        reply: &mut Reply<'_>,
    ) -> io::Result<u32> {
        let ask: CopyFileRangeIn = request.arg()?;
        if ask.flags != 0 {
            return Err(errno(libc::EINVAL));
        }
        let (context, source, target) = (self.context(request), request.header.nodeid, ask.nodeid_out);
        // Both must be open, as the client says that they are.
        self.fs.getattr(&context, source, Some(ask.fh_in))?;
        let (stat, _) = self.fs.getattr(&context, target, Some(ask.fh_out))?;
        // The library keeps its descriptors to itself, so they are opened anew. What cannot be (a file that was
        // created without the right to open it again) the client copies by itself after EOPNOTSUPP.
        let again = |_| errno(libc::EOPNOTSUPP);
        let from = self.open_node(&context, source, false).map_err(again)?;
        let to = self.open_node(&context, target, true).map_err(again)?;
        self.kill_set_id(&context, target, &stat)?;
        let mut offset_in = i64::try_from(ask.offset_in).map_err(|_| errno(libc::EINVAL))?;
        let mut offset_out = i64::try_from(ask.offset_out).map_err(|_| errno(libc::EINVAL))?;
        let len = ask.len.min(COPY_MAX) as usize;
        // SAFETY: both offsets live through the call, which changes them and no other memory.
        let copied = unsafe {
            libc::copy_file_range(
                from.as_raw_fd(),
                ptr::from_mut(&mut offset_in),
                to.as_raw_fd(),
                ptr::from_mut(&mut offset_out),
                len,
                0,
            )
        };
        if copied < 0 {
            return Err(io::Error::last_os_error());
        }
        reply.object(&WriteOut { size: copied as u32, padding: 0 })
    }

    /// Writes out the file system that the share is on.
    pub(super) fn syncfs(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        if !self.read_only {
            let root = self.open_node(&self.context(request), request.header.nodeid, false)?;
            // SAFETY: syncfs(2) touches no memory of the process.
            if unsafe { libc::syncfs(root.as_raw_fd()) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        reply.empty()
    }
}

/// The flags of the host's descriptor for a file that the guest opens with `flags`. Only flags that mean something
/// to the host pass: O_DIRECT is between the guest and its own cache, others could make openat(2) open something else.
/// READ and WRITE repeat them, and must come to the same, or the library would set them anew each time.
fn host_flags(flags: u32) -> u32 {
    const KEPT: i32 = libc::O_ACCMODE | libc::O_APPEND | libc::O_SYNC | libc::O_DSYNC | libc::O_NOATIME;
    flags & KEPT as u32 | (libc::O_CLOEXEC | libc::O_NOFOLLOW) as u32
}

/// The reply to OPEN, and to CREATE after its entry.
fn open_out(handle: Option<u64>, flags: u32, is_dax: bool) -> OpenOut {
    let mut open_flags = 0;
    if is_dax {
        // The host's page cache is all there is, so nothing can be stale; without this the client would take all
        // mappings of the file out of its page tables.
        open_flags |= FOPEN_KEEP_CACHE;
    }
    if flags as i32 & libc::O_ACCMODE == libc::O_RDONLY {
        // Nothing can be left to write when it is closed.
        open_flags |= FOPEN_NOFLUSH;
    }
    OpenOut { fh: handle.unwrap_or_default(), open_flags, ..Default::default() }
}
