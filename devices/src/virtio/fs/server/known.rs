//! Operations by which a guest comes to know a file: within the share's budget, and on its ordinary file systems.

use std::ffi::CStr;
use std::io;

use fuse_backend_rs::abi::fuse_abi::CreateIn;
use fuse_backend_rs::api::filesystem::{Context, Entry, FileSystem};

use super::Server;
use super::identity::{Identity, Maker};
use super::message::errno;
use super::unnamed::Files;

/// How often CREATE looks again for a name that comes and goes.
const ATTEMPTS: usize = 8;

/// For the library, which does nothing in anybody's name then: [`Identity`] does.
const ROOT: Context = Context { uid: 0, gid: 0, pid: 0 };

/// Flags that are about making a file.
const MAKING: u32 = (libc::O_CREAT | libc::O_EXCL) as u32;

fn is_exclusive(ask: &CreateIn) -> bool {
    ask.flags & libc::O_EXCL as u32 != 0
}

impl Server {
    /// Makes a file, or opens the one that is there. Returns its handle, too, and whether it is new.
    pub(super) fn create_or_open(
        &self,
        maker: &Maker,
        parent: u64,
        name: &CStr,
        ask: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, bool)> {
        for _ in 0..ATTEMPTS {
            match self.fs.create_new(maker, parent, name, ask) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && !is_exclusive(&ask) => {}
                made => return made.map(|(entry, handle)| (entry, handle, true)),
            }
            match self.open_existing(&maker.context, parent, name, ask) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                opened => return opened.map(|(entry, handle)| (entry, handle, false)),
            }
        }
        Err(errno(libc::EAGAIN))
    }

    /// Opens a file that is there already, as far as the user may: what O_TRUNC takes, nobody gives back.
    fn open_existing(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        ask: CreateIn,
    ) -> io::Result<(Entry, Option<u64>)> {
        let mut entry = self.fs.lookup(context, parent, name)?;
        let (node, flags) = (entry.inode, ask.flags & !MAKING);
        let open = || {
            let _user = Identity::of(context)?;
            self.fs.open(&ROOT, node, flags, ask.fuse_flags)
        };
        let opened = if flags & libc::O_TRUNC as u32 == 0 {
            open()
        } else {
            self.resize(context, node, open).and_then(|handle| {
                // The client believes the reply: of the size, and of the set-id bits that truncating has taken.
                (entry.attr, _) = self.fs.getattr(context, node, None).inspect_err(|_| {
                    let close = |handle| self.fs.release(context, node, flags, handle);
                    drop(handle.map(close));
                })?;
                Ok(handle)
            })
        };
        let handle = opened.inspect_err(|_| self.fs.forget(context, node, 1))?;
        Ok((entry, handle))
    }
}

/// The names and arguments are the library's.
impl Files {
    pub(super) fn lookup(&self, context: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.give_out(context, self.named.lookup(context, parent, name)?)
    }

    pub(super) fn mkdir(
        &self,
        maker: &Maker,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.make(maker, || self.named.mkdir(&ROOT, parent, name, mode, umask))
    }

    pub(super) fn mknod(
        &self,
        maker: &Maker,
        parent: u64,
        name: &CStr,
        mode: u32,
        device: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.make(maker, || self.named.mknod(&ROOT, parent, name, mode, device, umask))
    }

    pub(super) fn symlink(
        &self,
        maker: &Maker,
        target: &CStr,
        parent: u64,
        name: &CStr,
    ) -> io::Result<Entry> {
        self.make(maker, || self.named.symlink(&ROOT, target, parent, name))
    }

    /// Has the library make something in the name of the user who asks.
    fn make(&self, maker: &Maker, make: impl FnOnce() -> io::Result<Entry>) -> io::Result<Entry> {
        self.budget.has_left(1)?;
        let entry = {
            let _user = Identity::checked(maker)?;
            make()?
        };
        self.give_out(&maker.context, entry)
    }

    pub(super) fn link(&self, context: &Context, node: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.give_out(context, self.named.link(context, node, parent, name)?)
    }

    /// Makes a file that is not there.
    fn create_new(
        &self,
        maker: &Maker,
        parent: u64,
        name: &CStr,
        ask: CreateIn,
    ) -> io::Result<(Entry, Option<u64>)> {
        let context = &maker.context;
        self.budget.has_left(2)?;
        // Of a file that is there, and cannot be opened, the library would keep a descriptor of which nobody knows.
        let exclusive = CreateIn { flags: ask.flags | libc::O_EXCL as u32, ..ask };
        let (entry, handle, ..) = {
            let _user = Identity::checked(maker)?;
            self.named.create(&ROOT, parent, name, exclusive)?
        };
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
        self.note_synchronous(context, node, handle, ask.flags);
        Ok((entry, handle))
    }

    /// Counts what the library is about to give out, or has it forget that.
    fn give_out(&self, context: &Context, entry: Entry) -> io::Result<Entry> {
        let open = || match entry.attr.st_mode & libc::S_IFMT {
            libc::S_IFDIR | libc::S_IFREG => self.reopen(context, entry.inode, false),
            _ => Err(errno(libc::EBADF)),
        };
        let noted = self.pseudo.note(entry.inode, entry.attr.st_dev, open);
        if let Err(error) = noted.and_then(|()| self.budget.know(entry.inode)) {
            self.named.forget(context, entry.inode, 1);
            return Err(error);
        }
        Ok(entry)
    }
}
