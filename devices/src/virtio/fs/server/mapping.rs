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
use super::unnamed::Files;
use crate::text::exact_size;
use crate::virtio::fs::accounts::Mapped;
use crate::virtio::fs::policy::{Prefault, is_set_id, without_set_id};
use crate::virtio::fs::thrash::TooSmall;
use crate::virtio::fs::window::{CHUNK_SHIFT, DaxWindow, KnownFile, MappedPart, WindowError};

/// Entries of a REMOVEMAPPING that are looked at together; Linux sends no more (FUSE_REMOVEMAPPING_MAX_ENTRY).
const ENTRIES_AT_ONCE: usize = 256;

/// SETUPMAPPING flags for the library, which opens the file accordingly.
const READ: u64 = SetupmappingFlags::READ.bits();
const WRITE: u64 = SetupmappingFlags::WRITE.bits();

impl Server {
    /// Maps a part of a file where the client says. The client sends no handle: it maps by inode, and a mapping
    /// outlives every RELEASE and FORGET.
    pub(super) fn setup_mapping(
        &self,
        request: &mut Request<'_>,
        reply: &mut Reply<'_>,
        now: Instant,
    ) -> io::Result<u32> {
        let ask: SetupmappingIn = request.arg()?;
        let window = self.window.as_ref().ok_or_else(|| errno(libc::ENODEV))?;
        if ask.flags & (READ | WRITE) == 0 || ask.flags & !(READ | WRITE) != 0 {
            return Err(errno(libc::EINVAL));
        }
        let write = ask.flags & WRITE != 0;
        if write && self.read_only {
            return Err(errno(libc::EROFS));
        }
        let (context, node) = (self.context(request), request.header.nodeid);
        let (stat, _) = self.fs.getattr(&context, node, None).map_err(no_retry)?;
        let Some(prefault) = self.may_map(request, &stat) else {
            self.counts.denied_mapping();
            tracing::debug!(node, mode = stat.st_mode, "the guest maps a file that is not DAX for it");
            return Err(errno(libc::EPERM));
        };
        // A client whose tasks touch a chunk at the same time, one to read and one to write, may write through a
        // mapping that it asked for to read (fuse_setup_new_dax_mapping looks again without looking at the mode), and
        // the host can only end the guest then. So what can be written is mapped so at once. Programs are left out,
        // as nobody could start them on the host as long as they are mapped writable (ETXTBSY).
        let is_program = stat.st_mode & 0o111 != 0;
        let part = Part {
            window,
            context,
            node,
            stat,
            ask,
            prefault,
            write,
            may_write: write || !self.read_only && !is_program,
        };
        // The window keeps a descriptor of each file that it shows. One that cannot be written to will do until the
        // client asks to write.
        let placed = match window.known(&part.stat).filter(|known| known.is_writable() || !write) {
            Some(known) => self.map_known(&part, &known),
            None => self.map_anew(&part),
        };
        let placed = placed.map_err(no_retry)?;
        self.note_mapped(node, &part.ask, placed, now);
        reply.empty()
    }

    fn note_mapped(&self, nodeid: u64, ask: &SetupmappingIn, placed: Placed, now: Instant) {
        let chunks = chunks(ask.moffset, ask.len);
        let too_small = self
            .counts
            .thrash
            .as_ref()
            .and_then(|thrash| thrash.mapped(nodeid, ask.foffset, chunks.clone(), now));
        if let Some(accounts) = &self.counts.accounts {
            let Placed { writable, prefaulted } = placed;
            accounts.mapped(nodeid, Mapped { chunks, writable, prefaulted }, now, || self.path(nodeid));
        }
        if let Some(TooSmall { sufficient, refaults, of }) = too_small {
            let (share, size) = (&*self.tag, exact_size(sufficient));
            tracing::warn!(
                share,
                "the window is too small for what the guest does: of the last {of} chunks that it mapped, it had mapped \
                 {refaults} before and lost them for want of room. `window={size}` would do, as would fewer DAX files"
            );
        }
    }

    /// Maps a part of a file by the descriptor that the window has. No file is opened and nothing is allocated.
    fn map_known(&self, part: &Part<'_>, known: &KnownFile) -> io::Result<Placed> {
        let Part { window, context, node, stat, ask, .. } = part;
        if part.write {
            self.kill_set_id(context, *node, stat)?;
            kill_capabilities(known.fd())?;
        }
        let writable = part.may_write && known.is_writable();
        let shown = window.map_known(ask.moffset, ask.foffset, ask.len, writable, known).map_err(refuse)?;
        let mapped = MappedPart {
            fd: known.fd(),
            foffset: ask.foffset,
            moffset: ask.moffset,
            shown,
            writable,
            is_own: stat.st_uid == self.uid,
        };
        Ok(Placed { writable, prefaulted: window.prefault(mapped, part.prefault) })
    }

    /// Opens a file and maps a part of it.
    fn map_anew(&self, part: &Part<'_>) -> io::Result<Placed> {
        let Part { window, context, node, stat, ask, prefault, .. } = part;
        if part.write {
            self.kill_privileges(context, *node, stat)?;
        }
        let map = |writable| {
            let flags = if writable { READ | WRITE } else { READ };
            let is_own = stat.st_uid == self.uid;
            let window = Arc::clone(window);
            let mut mapper = Mapper { window, writable, is_own, prefault: *prefault, prefaulted: 0 };
            let (from, len, to) = (ask.foffset, ask.len, ask.moffset);
            self.fs.setupmapping(context, *node, from, len, flags, to, &mut mapper)?;
            Ok(Placed { writable, prefaulted: mapper.prefaulted })
        };
        match map(part.may_write) {
            Err(error) if !part.write && denies_writing(&error) => map(false),
            result => result,
        }
    }

    /// Unmaps what the client lists: a count of 4 bytes and, without padding, as many entries. The client reuses the
    /// ranges whatever the reply says.
    pub(super) fn remove_mapping(
        &self,
        request: &mut Request<'_>,
        reply: &mut Reply<'_>,
        now: Instant,
    ) -> io::Result<u32> {
        let RemovemappingIn { count } = request.arg()?;
        let window = self.window.as_ref().ok_or_else(|| errno(libc::ENODEV))?;
        let mut left = count as usize;
        if Some(request.left()) != left.checked_mul(size_of::<RemovemappingOne>()) {
            return Err(errno(libc::EINVAL));
        }
        let mapped = window.mapped_chunks();
        let unmapped = |chunks: Range<usize>| {
            if let Some(thrash) = &self.counts.thrash {
                thrash.unmapped(chunks.clone(), mapped);
            }
            if let Some(accounts) = &self.counts.accounts {
                accounts.unmapped(chunks, now);
            }
        };
        let mut ranges = [(0, 0); ENTRIES_AT_ONCE];
        let mut result = Ok(());
        while left > 0 {
            let ranges = &mut ranges[..left.min(ENTRIES_AT_ONCE)];
            for range in &mut *ranges {
                let RemovemappingOne { moffset, len } = request.arg()?;
                *range = (moffset, len);
            }
            left -= ranges.len();
            // One bad entry does not keep the others mapped.
            result = result.and(window.unmap_all(ranges, unmapped).map_err(refuse));
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

    /// Opens a file or directory anew by its node id.
    pub(super) fn open_node(&self, context: &Context, nodeid: u64, writable: bool) -> io::Result<File> {
        self.fs.reopen(context, nodeid, writable)
    }
}

impl Files {
    /// Opens a file or directory anew by its node id. The library gives descriptors to mappers only.
    pub(super) fn reopen(&self, context: &Context, node: u64, writable: bool) -> io::Result<File> {
        let mut taker = Taker(None);
        let flags = if writable { READ | WRITE } else { READ };
        self.setupmapping(context, node, 0, 0, flags, 0, &mut taker)?;
        taker.0.ok_or_else(|| errno(libc::EIO))
    }
}

/// A part of a file that may be mapped.
struct Part<'a> {
    window: &'a Arc<DaxWindow>,
    context: Context,
    node: u64,
    stat: libc::stat64,
    ask: SetupmappingIn,
    prefault: Prefault,
    /// Whether the client asks to write.
    write: bool,
    /// Whether the mapping is to be writable, if the file can be opened so.
    may_write: bool,
}

/// How a part was mapped.
#[derive(Clone, Copy)]
struct Placed {
    writable: bool,
    /// Bytes that were put in the client's reach.
    prefaulted: u64,
}

/// Takes the capabilities from a file.
fn kill_capabilities(file: BorrowedFd<'_>) -> io::Result<()> {
    match rustix::fs::fgetxattr(file, CAPABILITIES, &mut [0_u8; 0]) {
        Ok(_) => Ok(rustix::fs::fremovexattr(file, CAPABILITIES)?),
        Err(_) => Ok(()),
    }
}

/// The chunks of a range of the window that has been mapped, and so is one.
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
