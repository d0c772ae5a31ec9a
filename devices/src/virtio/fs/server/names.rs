//! Operations on the directory tree: names come into being, are looked up and go.

use std::io;

use fuse_backend_rs::abi::fuse_abi::{
    BatchForgetIn, ForgetIn, ForgetOne, Kstatfs, LinkIn, MkdirIn, MknodIn, Rename2In, RenameIn,
};
use fuse_backend_rs::api::filesystem::{Context, FileSystem};

use super::Server;
use super::message::{NAME_MAX, NameBuffer, Reply, Request, check_name, errno, two_strings};
use crate::virtio::fs::inodes::host_node;
use crate::virtio::fs::per_file_dax::ClientDax;

/// An empty buffer for a name.
pub(super) const NO_NAME: NameBuffer = [0; NAME_MAX + 1];

const RENAME_FLAGS: u32 = libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE | libc::RENAME_WHITEOUT;

impl Server {
    pub(super) fn lookup(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let mut name = NO_NAME;
        let name = request.name(&mut name)?;
        let context = self.context(request);
        let entry = self.fs.lookup(&context, request.header.nodeid, name)?;
        reply.object(&self.entry_out(&context, entry))
    }

    pub(super) fn forget(&self, request: &mut Request<'_>) -> io::Result<u32> {
        let ForgetIn { nlookup } = request.arg()?;
        self.forget_one(&self.context(request), request.header.nodeid, request.dax, nlookup);
        Ok(0)
    }

    pub(super) fn batch_forget(&self, request: &mut Request<'_>) -> io::Result<u32> {
        let BatchForgetIn { count, .. } = request.arg()?;
        let context = self.context(request);
        for _ in 0..count {
            // The request's own end ends this, whatever the count says.
            let ForgetOne { nodeid, nlookup } = request.arg()?;
            let (node, dax) = host_node(nodeid);
            self.forget_one(&context, node, dax, nlookup);
        }
        Ok(0)
    }

    fn forget_one(&self, context: &Context, node: u64, dax: bool, nlookup: u64) {
        // What is kept of a file goes after its node is unknown, so that nobody keeps it again, and before its descriptor: then
        // the host may give its number to another file.
        self.fs.budget.forget(node, nlookup);
        if self.dax.client() == ClientDax::PerFile {
            self.dax.inodes.forget(node, dax, nlookup, || self.fs.budget.knows(node));
        }
        self.fs.forget_budgeted(context, node, nlookup);
    }

    pub(super) fn readlink(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let target = self.fs.readlink(&self.context(request), request.header.nodeid)?;
        reply.send(&[&target])
    }

    pub(super) fn symlink(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let mut buffer = [0; NAME_MAX + 1 + libc::PATH_MAX as usize];
        let (name, target) = two_strings(request.rest(&mut buffer, libc::ENAMETOOLONG)?)?;
        let name = check_name(name)?;
        let maker = self.maker(request)?;
        let entry = self.fs.symlink(&maker, target, request.header.nodeid, name)?;
        reply.object(&self.entry_out(&maker.context, entry))
    }

    pub(super) fn mknod(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let MknodIn { mode, rdev, umask, .. } = request.arg()?;
        let mut name = NO_NAME;
        let name = request.name(&mut name)?;
        let (maker, parent) = (self.maker(request)?, request.header.nodeid);
        let context = &maker.context;
        let inherits = self.passes_hint_on(context, parent);
        let entry = self.fs.mknod(&maker, parent, name, mode, rdev, umask & 0o777)?;
        if inherits && mode & libc::S_IFMT == libc::S_IFREG {
            self.inherit(context, entry.inode);
        }
        reply.object(&self.entry_out(context, entry))
    }

    pub(super) fn mkdir(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let MkdirIn { mode, umask } = request.arg()?;
        let mut name = NO_NAME;
        let name = request.name(&mut name)?;
        let (maker, parent) = (self.maker(request)?, request.header.nodeid);
        let context = &maker.context;
        let inherits = self.passes_hint_on(context, parent);
        let entry = self.fs.mkdir(&maker, parent, name, mode, umask & 0o777)?;
        if inherits {
            self.inherit(context, entry.inode);
        }
        reply.object(&self.entry_out(context, entry))
    }

    pub(super) fn unlink(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let mut name = NO_NAME;
        let name = request.name(&mut name)?;
        self.fs.unlink(&self.context(request), request.header.nodeid, name)?;
        reply.empty()
    }

    pub(super) fn rmdir(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let mut name = NO_NAME;
        let name = request.name(&mut name)?;
        self.fs.rmdir(&self.context(request), request.header.nodeid, name)?;
        reply.empty()
    }

    pub(super) fn rename(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let RenameIn { newdir } = request.arg()?;
        self.rename_to(request, reply, newdir, 0)
    }

    pub(super) fn rename2(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let Rename2In { newdir, flags, .. } = request.arg()?;
        if flags & !RENAME_FLAGS != 0 {
            return Err(errno(libc::EINVAL));
        }
        self.rename_to(request, reply, newdir, flags)
    }

    fn rename_to(
        &self,
        request: &mut Request<'_>,
        reply: &mut Reply<'_>,
        new_parent: u64,
        flags: u32,
    ) -> io::Result<u32> {
        let mut buffer = [0; 2 * (NAME_MAX + 1)];
        let (old, new) = two_strings(request.rest(&mut buffer, libc::ENAMETOOLONG)?)?;
        let (old, new) = (check_name(old)?, check_name(new)?);
        self.fs.rename(&self.context(request), request.header.nodeid, old, new_parent, new, flags)?;
        reply.empty()
    }

    pub(super) fn link(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let LinkIn { oldnodeid } = request.arg()?;
        let mut name = NO_NAME;
        let name = request.name(&mut name)?;
        let (context, node, parent) = (self.context(request), host_node(oldnodeid).0, request.header.nodeid);
        let entry = match self.fs.unnamed(node) {
            Some(unnamed) => {
                unnamed.name(&self.open_node(&context, parent, false)?, name)?;
                self.fs.lookup(&context, parent, name)?
            }
            None => self.fs.link(&context, node, parent, name)?,
        };
        reply.object(&self.entry_out(&context, entry))
    }

    pub(super) fn statfs(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let stat = self.fs.statfs(&self.context(request), request.header.nodeid)?;
        reply.object(&Kstatfs::from(stat))
    }
}
