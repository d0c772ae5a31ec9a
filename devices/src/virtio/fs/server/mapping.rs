//! The DAX window's operations: SETUPMAPPING and REMOVEMAPPING.

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::ops::Range;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use fuse_backend_rs::abi::virtio_fs::{RemovemappingIn, RemovemappingOne, SetupmappingFlags, SetupmappingIn};
use fuse_backend_rs::api::filesystem::{Context, SetattrValid};
use fuse_backend_rs::transport::FsCacheReqHandler;

use super::Server;
use super::decide::CAPABILITIES;
use super::message::{Reply, Request, errno};
use crate::virtio::fs::accounts::Mapped;
use crate::virtio::fs::policy::{Prefault, is_set_id, without_set_id};
use crate::virtio::fs::window::{CHUNK_SHIFT, DaxWindow, MappedPart, WindowError};

/// SETUPMAPPING flags for the library, which opens the file accordingly.
const READ: u64 = SetupmappingFlags::READ.bits();
const WRITE: u64 = SetupmappingFlags::WRITE.bits();

impl Server {
    /// Maps a part of a file where the client says. The client sends no handle: it maps by inode, and a mapping
    /// outlives every RELEASE and FORGET.
    pub(super) fn setup_mapping(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let ask: SetupmappingIn = request.arg()?;
        let window = self.window.as_ref().ok_or_else(|| errno(libc::ENODEV))?;
        if ask.flags & (READ | WRITE) == 0 || ask.flags & !(READ | WRITE) != 0 {
            return Err(errno(libc::EINVAL));
        }
        let write = ask.flags & WRITE != 0;
        if write && self.read_only {
            return Err(errno(libc::EROFS));
        }
        let (context, nodeid) = (self.context(request), request.header.nodeid);
        let (stat, _) = self.fs.getattr(&context, nodeid, None)?;
        let Some(prefault) = self.may_map(request, &stat) else {
            self.counts.denied_mapping();
            tracing::debug!(nodeid, mode = stat.st_mode, "the guest maps a file that is not DAX for it");
            return Err(errno(libc::EPERM));
        };
        if write {
            self.kill_privileges(&context, nodeid, &stat)?;
        }

        let map = |writable| {
            let flags = if writable { READ | WRITE } else { READ };
            let is_own = stat.st_uid == self.uid;
            let mut mapper = Mapper { window: Arc::clone(window), writable, is_own, prefault, prefaulted: 0 };
            self.fs
                .setupmapping(&context, nodeid, ask.foffset, ask.len, flags, ask.moffset, &mut mapper)
                .map(|()| mapper.prefaulted)
        };
        // A client whose tasks touch a chunk at the same time, one to read and one to write, may write through a
        // mapping that it asked for to read (fuse_setup_new_dax_mapping looks again without looking at the mode), and
        // the host can only end the guest then. So what can be written is mapped so at once. Programs are left out,
        // as nobody could start them on the host as long as they are mapped writable (ETXTBSY).
        let is_program = stat.st_mode & 0o111 != 0;
        let mut writable = write || !self.read_only && !is_program;
        let mut result = map(writable);
        if !write && result.as_ref().is_err_and(denies_writing) {
            writable = false;
            result = map(false);
        }
        let prefaulted = result.map_err(no_retry)?;
        if let Some(accounts) = &self.counts.accounts {
            let mapped = Mapped { chunks: chunks(ask.moffset, ask.len), writable, prefaulted };
            accounts.mapped(nodeid, mapped, Instant::now(), || self.path(nodeid));
        }
        reply.empty()
    }

    /// Unmaps what the client lists: a count of 4 bytes and, without padding, as many entries. The client reuses the
    /// ranges whatever the reply says.
    pub(super) fn remove_mapping(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let RemovemappingIn { count } = request.arg()?;
        let window = self.window.as_ref().ok_or_else(|| errno(libc::ENODEV))?;
        if Some(request.left()) != (count as usize).checked_mul(size_of::<RemovemappingOne>()) {
            return Err(errno(libc::EINVAL));
        }
        let mut result = Ok(());
        for _ in 0..count {
            let RemovemappingOne { moffset, len } = request.arg()?;
            // One bad entry does not keep the others mapped.
            let unmapped = window.unmap(moffset, len).map_err(refuse);
            if let (Ok(()), Some(accounts)) = (&unmapped, &self.counts.accounts) {
                accounts.unmapped(chunks(moffset, len), Instant::now());
            }
            result = result.and(unmapped);
        }
        result.map_err(no_retry)?;
        reply.empty()
    }

    /// Takes from a file what a write must take: the set-id bits and the capabilities. The client leaves that to the
    /// server (HANDLE_KILLPRIV_V2), which sees no writes through the window, but always a request for a writable
    /// mapping before the first one.
    pub(super) fn kill_privileges(
        &self,
        context: &Context,
        nodeid: u64,
        stat: &libc::stat64,
    ) -> io::Result<()> {
        self.kill_set_id(context, nodeid, stat)?;
        match self.fs.getxattr(context, nodeid, CAPABILITIES, 0) {
            Ok(_) => self.fs.removexattr(context, nodeid, CAPABILITIES),
            Err(_) => Ok(()),
        }
    }

    /// Takes the set-id bits from a file; the host takes the capabilities by itself when it is written to.
    pub(super) fn kill_set_id(&self, context: &Context, nodeid: u64, stat: &libc::stat64) -> io::Result<()> {
        if !is_set_id(stat.st_mode) {
            return Ok(());
        }
        let mut killed = *stat;
        killed.st_mode = without_set_id(stat.st_mode);
        self.fs.setattr(context, nodeid, killed, None, SetattrValid::MODE).map(drop)
    }

    /// Tells the window the size that the client is about to hear of a file.
    pub(super) fn tell_size(&self, stat: &libc::stat64) {
        if let Some(window) = &self.window {
            window.tell(stat);
        }
    }

    /// Tells the window of a file that the client may have made longer, in a request whose reply does not say so. Costs
    /// nothing as long as no file is short.
    pub(super) fn tell_growth(&self, context: &Context, nodeid: u64) {
        if let Some(window) = self.window.as_ref().filter(|window| window.has_short_files())
            && let Ok((stat, _)) = self.fs.getattr(context, nodeid, None)
        {
            window.tell(&stat);
        }
    }

    /// Carries out a change by which the client itself may shorten a file.
    pub(super) fn resize<T>(&self, context: &Context, nodeid: u64, change: impl FnOnce() -> T) -> T {
        let file = self.window.as_ref().map(|window| (window, self.fs.getattr(context, nodeid, None)));
        match file {
            Some((window, Ok((stat, _)))) => window.resize(&stat, change),
            _ => change(),
        }
    }

    /// Opens a file or directory anew by its node id. The library gives descriptors to mappers only.
    pub(super) fn open_node(&self, context: &Context, nodeid: u64, writable: bool) -> io::Result<File> {
        let mut taker = Taker(None);
        let flags = if writable { READ | WRITE } else { READ };
        self.fs.setupmapping(context, nodeid, 0, 0, flags, 0, &mut taker)?;
        taker.0.ok_or_else(|| errno(libc::EIO))
    }
}

/// The chunks of a range of the window that has been mapped or unmapped, and so is one.
fn chunks(moffset: u64, len: u64) -> Range<usize> {
    (moffset >> CHUNK_SHIFT) as usize..((moffset + len) >> CHUNK_SHIFT) as usize
}

/// Whether a file cannot be opened for writing but perhaps for reading.
fn denies_writing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::EROFS | libc::ETXTBSY))
}

/// The guest's fault handler repeats for ever after EAGAIN, and takes ENOMEM for a want of its own memory.
fn no_retry(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::ENOMEM) => errno(libc::EIO),
        _ => error,
    }
}

fn refuse(error: WindowError) -> io::Error {
    tracing::debug!(%error, "the window refuses a request");
    errno(error.errno())
}

/// Maps the descriptor that the library has opened.
struct Mapper {
    window: Arc<DaxWindow>,
    writable: bool,
    /// Whether the file belongs to the server's user.
    is_own: bool,
    prefault: Prefault,
    /// Bytes that were put in the client's reach.
    prefaulted: u64,
}

impl FsCacheReqHandler for Mapper {
    fn map(&mut self, foffset: u64, moffset: u64, len: u64, _flags: u64, fd: RawFd) -> io::Result<()> {
        // SAFETY: the library keeps the descriptor open until this returns.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let Mapper { writable, is_own, .. } = *self;
        let shown = self.window.map(moffset, foffset, len, writable, fd).map_err(refuse)?;
        let part = MappedPart { fd, foffset, moffset, shown, writable, is_own };
        self.prefaulted = self.window.prefault(part, self.prefault);
        Ok(())
    }

    fn unmap(&mut self, _requests: Vec<RemovemappingOne>) -> io::Result<()> {
        Err(errno(libc::ENOSYS))
    }
}

/// Keeps a copy of the descriptor that the library has opened.
struct Taker(Option<File>);

impl FsCacheReqHandler for Taker {
    fn map(&mut self, _foffset: u64, _moffset: u64, _len: u64, _flags: u64, fd: RawFd) -> io::Result<()> {
        // SAFETY: the library keeps the descriptor open until this returns.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        self.0 = Some(fd.try_clone_to_owned()?.into());
        Ok(())
    }

    fn unmap(&mut self, _requests: Vec<RemovemappingOne>) -> io::Result<()> {
        Err(errno(libc::ENOSYS))
    }
}
