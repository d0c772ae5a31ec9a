//! Operations on files: attributes and data.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr;

use fuse_backend_rs::abi::fuse_abi::{
    AccessIn, CopyFileRangeIn, FATTR_FH, FSYNC_FDATASYNC, FallocateIn, FlushIn, FsyncIn, GETATTR_FH,
    GetattrIn, LseekIn, LseekOut, ReadIn, SetattrIn, WRITE_CACHE, WRITE_KILL_PRIV, WriteIn, WriteOut,
};
use fuse_backend_rs::api::filesystem::{Context, SetattrValid, ZeroCopyReader};

use super::init::MAX_WRITE;
use super::message::{Payload, Reply, Request, errno};
use super::{NOBODY, Server};
use crate::virtio::fs::inodes::host_node;

/// The most bytes that one COPY_FILE_RANGE copies, so that it does not hold the queue up for long.
const COPY_MAX: u64 = 1 << 30;

impl Server {
    pub(super) fn getattr(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let GetattrIn { flags, fh, .. } = request.arg()?;
        let handle = (flags & GETATTR_FH != 0).then_some(fh);
        let (stat, timeout) = self.fs.getattr(&self.context(request), request.header.nodeid, handle)?;
        self.tell_size(&stat);
        reply.object(&self.dax.attr_out(stat, timeout, request.dax))
    }

    pub(super) fn setattr(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let ask: SetattrIn = request.arg()?;
        let handle = (ask.valid & FATTR_FH != 0).then_some(ask.fh);
        let valid = SetattrValid::from_bits_truncate(ask.valid);
        if valid.contains(SetattrValid::UID) && ask.uid == NOBODY
            || valid.contains(SetattrValid::GID) && ask.gid == NOBODY
        {
            return Err(errno(libc::EINVAL));
        }
        let (context, nodeid) = (self.context(request), request.header.nodeid);
        if valid.difference(SetattrValid::KILL_SUIDGID).is_empty() {
            // A client that writes to a DAX file which looks set-id asks so (file_remove_privs of fs/inode.c, of which
            // fuse_setattr leaves no attribute): it writes by a mapping that it may have had before the file was.
            let (stat, _) = self.fs.getattr(&context, nodeid, handle)?;
            if stat.st_mode & libc::S_IFMT == libc::S_IFREG {
                self.kill_privileges(&context, nodeid, &stat)?;
            }
        }
        let set = || self.fs.setattr(&context, nodeid, ask.into(), handle, valid);
        let (stat, timeout) = match valid.contains(SetattrValid::SIZE) {
            true => self.resize(&context, nodeid, set),
            false => set(),
        }?;
        self.tell_size(&stat);
        reply.object(&self.dax.attr_out(stat, timeout, request.dax))
    }

    pub(super) fn access(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let AccessIn { mask, .. } = request.arg()?;
        if self.read_only && mask & libc::W_OK as u32 != 0 {
            return Err(errno(libc::EROFS));
        }
        self.fs.access(&self.context(request), request.header.nodeid, mask)?;
        reply.empty()
    }

    pub(super) fn read(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let ReadIn { fh, offset, size, flags, .. } = request.arg()?;
        let mut body = reply.body()?;
        let (context, nodeid, size) = (self.context(request), request.header.nodeid, size.min(MAX_WRITE));
        let read = self.fs.read(&context, nodeid, fh, &mut body, size, offset, self.host_flags(flags))?;
        reply.finish(read)
    }

    pub(super) fn write(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let WriteIn { fh, offset, size, fuse_flags, flags, .. } = request.arg()?;
        if size as usize != request.left() || size > MAX_WRITE {
            return Err(errno(libc::EINVAL));
        }
        let (context, nodeid) = (self.context(request), request.header.nodeid);
        let data = &mut request.data();
        let written = if fuse_flags & WRITE_CACHE != 0 {
            self.write_back(&context, nodeid, fh, data, size, offset, fuse_flags)?;
            size as usize
        } else {
            let flags = self.host_flags(flags);
            self.fs.write(&context, nodeid, fh, data, size, offset, false, flags, fuse_flags)?
        };
        self.tell_growth(&context, nodeid);
        reply.object(&WriteOut { size: written as u32, padding: 0 })
    }

    /// Writes what a program has stored in a mapping of a file that is not DAX. It no longer waits, and the client looks at
    /// nothing but the error (`fuse_writepage_end` of fs/fuse/file.c), so all is written or there is one.
    #[allow(clippy::too_many_arguments)]
    fn write_back(
        &self,
        context: &Context,
        node: u64,
        handle: u64,
        data: &mut Payload<'_, '_>,
        size: u32,
        offset: u64,
        fuse_flags: u32,
    ) -> io::Result<()> {
        let (stat, _) = self.fs.getattr(context, node, Some(handle))?;
        if fuse_flags & WRITE_KILL_PRIV != 0 {
            self.kill_set_id(context, node, &stat)?;
        }
        // The handle may append, in another queue's thread at this moment, and this must not.
        let mut own = self.open_node(context, node, true).ok();
        let mut done = 0;
        while done < size {
            let (left, at) = (size - done, offset.saturating_add(done.into()));
            let written = match &mut own {
                Some(file) => data.read_to(file, left as usize, at)?,
                // Made without the right to open it again.
                None => self.fs.write(context, node, handle, data, left, at, true, libc::O_RDWR as u32, 0)?,
            };
            if written == 0 {
                return Err(errno(libc::EIO));
            }
            done += written as u32;
        }
        Ok(())
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

    pub(super) fn fallocate(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let FallocateIn { fh, offset, length, mode, .. } = request.arg()?;
        let (context, nodeid) = (self.context(request), request.header.nodeid);
        // The host leaves the set-id bits to a privileged server, and the client leaves them to us.
        let (stat, _) = self.fs.getattr(&context, nodeid, Some(fh))?;
        self.kill_set_id(&context, nodeid, &stat)?;
        self.fs.fallocate(&context, nodeid, fh, mode, offset, length)?;
        self.tell_growth(&context, nodeid);
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
        let (context, source) = (self.context(request), request.header.nodeid);
        let target = host_node(ask.nodeid_out).0;
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
        if self.fs.is_synchronous(target, ask.fh_out) {
            to.sync_data()?;
        }
        self.tell_growth(&context, target);
        reply.object(&WriteOut { size: copied as u32, padding: 0 })
    }

    /// Writes out the file systems that the share is on.
    pub(super) fn syncfs(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        if !self.read_only {
            let root = self.open_node(&self.context(request), request.header.nodeid, false)?;
            self.fs.pseudo.for_each_mount(|mount| Ok(rustix::fs::syncfs(mount)?))?;
            rustix::fs::syncfs(root)?;
        }
        reply.empty()
    }
}
