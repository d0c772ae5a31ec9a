//! Opening files, creating them, and closing them.

use std::io;
use std::os::fd::AsFd;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, OpenIn, OpenOut, ReleaseIn};
use fuse_backend_rs::api::filesystem::Context;
use vm_memory::ByteValued;

use super::Server;
use super::decide::Opening;
use super::message::{Reply, Request, errno};
use super::names::NO_NAME;
use crate::virtio::fs::abi::{FOPEN_KEEP_CACHE, FOPEN_NOFLUSH};
use crate::virtio::fs::per_file_dax::ClientDax;

impl Server {
    pub(super) fn open(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let OpenIn { flags, fuse_flags } = request.arg()?;
        self.check_open(flags)?;
        let (context, nodeid) = (self.context(request), request.header.nodeid);
        let opening = self.admit(&context, request, flags)?;
        let host_flags = self.host_flags(flags) | flags & libc::O_TRUNC as u32;
        let open = || self.fs.open(&context, nodeid, host_flags, fuse_flags);
        let opened = match flags as i32 & libc::O_TRUNC != 0 {
            true => self.resize(&context, nodeid, open),
            false => open(),
        };
        match opened {
            Ok(handle) => reply.object(&self.open_out(handle, flags, opening)),
            Err(error) => {
                self.closed(request);
                Err(error)
            }
        }
    }

    pub(super) fn create(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let mut ask: CreateIn = request.arg()?;
        let mut name = NO_NAME;
        let name = request.name(&mut name)?;
        self.check_open(ask.flags)?;
        let flags = ask.flags;
        // The library passes them to openat(2), where O_PATH, for one, would follow a symbolic link out of the share.
        ask.flags = self.host_flags(flags) | flags & (libc::O_TRUNC | libc::O_EXCL) as u32;
        let (maker, parent) = (self.maker(request)?, request.header.nodeid);
        let context = &maker.context;
        let inherits = self.passes_hint_on(context, parent);
        let (entry, handle, is_new) = self.create_or_open(&maker, parent, name, ask)?;
        if inherits && is_new {
            self.inherit(context, entry.inode);
        }
        let opening = self.admit_created(context, &entry);
        self.tell_size(&entry.attr);
        let entry = self.dax.entry_out(entry, opening.dax);
        reply.send(&[entry.as_slice(), self.open_out(handle, flags, opening).as_slice()])
    }

    /// Creates a file without a name. The name that the request has all the same means nothing.
    pub(super) fn tmpfile(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let mut ask: CreateIn = request.arg()?;
        request.skip_rest();
        self.check_open(ask.flags)?;
        let flags = ask.flags;
        ask.flags = self.host_flags(flags) | flags & libc::O_EXCL as u32;
        let (maker, parent) = (self.maker(request)?, request.header.nodeid);
        let context = &maker.context;
        let directory = self.open_node(context, parent, false)?;
        let inherits = self.passes_hint_on(context, parent);
        let owner = self.is_privileged().then_some(&maker);
        let (entry, handle) = self.fs.tmpfile(&directory, owner, &ask)?;
        if inherits {
            self.inherit(context, entry.inode);
        }
        let opening = self.admit_created(context, &entry);
        let entry = self.dax.entry_out(entry, opening.dax);
        reply.send(&[entry.as_slice(), self.open_out(Some(handle), flags, opening).as_slice()])
    }

    pub(super) fn release(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let ReleaseIn { fh, flags, .. } = request.arg()?;
        self.fs.release(&self.context(request), request.header.nodeid, flags, fh)?;
        self.closed(request);
        reply.empty()
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

    /// The reply to OPEN, and to CREATE after its entry.
    fn open_out(&self, handle: Option<u64>, flags: u32, opening: Opening) -> OpenOut {
        let mut open_flags = match opening.dax {
            // The host's page cache is all there is, so nothing can be stale; without this the client would take all
            // mappings of the file out of its page tables.
            true => FOPEN_KEEP_CACHE,
            false => self.cache.file_flags(opening.has_old_pages),
        };
        if flags as i32 & libc::O_ACCMODE == libc::O_RDONLY {
            // Nothing can be left to write when it is closed.
            open_flags |= FOPEN_NOFLUSH;
        }
        OpenOut { fh: handle.unwrap_or_default(), open_flags, ..Default::default() }
    }

    /// Whether what is created in a directory is to get the directory's hint from here: it has one, and its file system
    /// does not do it by itself. As all that costs questions to the host, only for clients with per-file DAX.
    pub(super) fn passes_hint_on(&self, context: &Context, directory: u64) -> bool {
        if self.dax.client() != ClientDax::PerFile {
            return false;
        }
        let Ok((stat, _)) = self.fs.getattr(context, directory, None) else { return false };
        if self.hints.is_known_native(stat.st_dev) {
            return false;
        }
        let Ok(directory) = self.open_node(context, directory, false) else { return false };
        if self.hints.is_native(directory.as_fd()).unwrap_or(true) {
            return false;
        }
        self.counts.hint_query();
        self.hints.read(directory.as_fd()).unwrap_or(false)
    }

    /// Gives what was just created its directory's hint. That it cannot have it is no reason to fail: it exists.
    pub(super) fn inherit(&self, context: &Context, node: u64) {
        let file = self.open_node(context, node, false);
        if let Err(error) = file.and_then(|file| self.hints.write(file.as_fd(), true)) {
            tracing::debug!(node, %error, "cannot pass a directory's DAX hint on");
        }
    }

    /// The flags of the host's descriptor for a file that the guest opens with `flags`. Only flags that mean something
    /// to the host pass: O_DIRECT is between the guest and its own cache, others could make openat(2) open something else.
    /// READ and WRITE repeat them, and must come to the same, or the library would set them anew each time.
    pub(super) fn host_flags(&self, flags: u32) -> u32 {
        const KEPT: i32 = libc::O_ACCMODE | libc::O_APPEND | libc::O_SYNC | libc::O_DSYNC;
        // The host grants it to the owner of a file and to root. The client's overlayfs asks for it of all its layers.
        let kept = if self.is_privileged() { KEPT | libc::O_NOATIME } else { KEPT };
        flags & kept as u32 | (libc::O_CLOEXEC | libc::O_NOFOLLOW) as u32
    }
}
