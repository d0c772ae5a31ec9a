//! Operations by which a guest comes to know a file: within the share's budget, and on its ordinary file systems.

use std::ffi::CStr;
use std::io;

use fuse_backend_rs::abi::fuse_abi::CreateIn;
use fuse_backend_rs::api::filesystem::{Context, Entry, FileSystem};

use super::unnamed::Files;

/// The names and arguments are the library's.
impl Files {
    pub(super) fn lookup(&self, context: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.give_out(context, self.named.lookup(context, parent, name)?)
    }

    pub(super) fn mkdir(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.budget.has_left(1)?;
        self.give_out(context, self.named.mkdir(context, parent, name, mode, umask)?)
    }

    pub(super) fn mknod(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        device: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.budget.has_left(1)?;
        self.give_out(context, self.named.mknod(context, parent, name, mode, device, umask)?)
    }

    pub(super) fn symlink(
        &self,
        context: &Context,
        target: &CStr,
        parent: u64,
        name: &CStr,
    ) -> io::Result<Entry> {
        self.budget.has_left(1)?;
        self.give_out(context, self.named.symlink(context, target, parent, name)?)
    }

    pub(super) fn link(&self, context: &Context, node: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.give_out(context, self.named.link(context, node, parent, name)?)
    }

    /// Returns the handle, too.
    pub(super) fn create(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        ask: CreateIn,
    ) -> io::Result<(Entry, Option<u64>)> {
        self.budget.has_left(2)?;
        let (entry, handle, ..) = self.named.create(context, parent, name, ask)?;
        let node = entry.inode;
        let close = || {
            let close = |handle| self.named.release(context, node, ask.flags, handle, false, false, None);
            handle.map_or(Ok(()), close)
        };
        let entry = self.give_out(context, entry).inspect_err(|_| drop(close()))?;
        if let Err(error) = self.budget.take() {
            close()?;
            self.forget(context, node, 1);
            return Err(error);
        }
        Ok((entry, handle))
    }

    /// Counts what the library is about to give out, or has it forget that.
    fn give_out(&self, context: &Context, entry: Entry) -> io::Result<Entry> {
        let noted = self.pseudo.note(entry.inode, entry.attr.st_dev);
        if let Err(error) = noted.and_then(|()| self.budget.know(entry.inode)) {
            self.named.forget(context, entry.inode, 1);
            return Err(error);
        }
        Ok(entry)
    }
}
