//! Files without a name (O_TMPFILE), beside the library's.
//!
//! The library finds inodes by name only. A name could be given to such a file and taken away at once, but then no other
//! could ever be given to it: the host's kernel lets a file be linked from nothing once. So these files have node ids of
//! their own, above the library's, and the few operations that a client does on them are carried out here.
//! [`Files`] is the library's file system with these files in it.
//!
//! A file that gets its name (FUSE_LINK) is found under it by the library from then on, with a node id of the library's.
//! Nothing is left on the host by a crash: the host removes an unnamed file when its last descriptor is closed.

use std::collections::{HashMap, HashSet};
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, FOPEN_IN_KILL_SUIDGID, WRITE_KILL_PRIV};
use fuse_backend_rs::abi::virtio_fs::SetupmappingFlags;
use fuse_backend_rs::api::filesystem::{
    Context, Entry, FileSystem, GetxattrReply, ListxattrReply, SetattrValid, ZeroCopyReader, ZeroCopyWriter,
};
use fuse_backend_rs::passthrough::PassthroughFs;
use fuse_backend_rs::transport::FsCacheReqHandler;
use rustix::fs::{AtFlags, CWD, FallocateFlags, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags};

use super::identity::Maker;
use super::message::errno;
use super::pseudo::PseudoFileSystems;
use crate::virtio::fs::budget::Budget;
use crate::virtio::fs::policy::{is_set_id, without_set_id};

/// Where the node ids of unnamed files begin: above the library's, and above the bit that says DAX.
const FIRST_NODE: u64 = 1 << 57;

/// The library's file system, and the files without a name.
pub(super) struct Files {
    pub(super) named: PassthroughFs,
    pub(super) pseudo: PseudoFileSystems,
    /// Counts what the guest knows and has open, directories included.
    pub(super) budget: Arc<Budget>,
    unnamed: RwLock<HashMap<u64, Arc<Unnamed>>>,
    /// The library's handles of which each write is to be stable (O_SYNC, O_DSYNC); it does not tell.
    synchronous: RwLock<HashSet<u64>>,
    /// Counts node ids and handles; neither is ever given out twice.
    last: AtomicU64,
    timeout: Duration,
}

/// A file without a name, as long as the client knows it.
pub(super) struct Unnamed {
    /// As it was opened first; opened anew by way of /proc.
    file: File,
    handles: Mutex<HashMap<u64, Arc<Mutex<File>>>>,
}

impl Unnamed {
    fn handle(&self, handle: u64) -> io::Result<Arc<Mutex<File>>> {
        let handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
        handles.get(&handle).cloned().ok_or_else(|| errno(libc::EBADF))
    }

    fn insert(&self, handle: u64, file: File) {
        let mut handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
        handles.insert(handle, Arc::new(Mutex::new(file)));
    }

    /// Whether writes by this handle are to be stable: the descriptor says so.
    fn is_synchronous(&self, handle: u64) -> bool {
        let Ok(file) = self.handle(handle) else { return false };
        let flags = rustix::fs::fcntl_getfl(&*file.lock().unwrap_or_else(PoisonError::into_inner));
        // O_SYNC has the bit of O_DSYNC; rustix takes both for O_SYNC.
        flags.is_ok_and(|flags| flags.bits() & libc::O_DSYNC as u32 != 0)
    }

    /// Lets go of all that is open of it; returns how many that were.
    fn take_handles(&self) -> usize {
        std::mem::take(&mut *self.handles.lock().unwrap_or_else(PoisonError::into_inner)).len()
    }

    fn open(&self, flags: i32, fuse_flags: u32) -> io::Result<File> {
        if fuse_flags & FOPEN_IN_KILL_SUIDGID != 0 {
            self.kill_set_id()?;
        }
        // O_NOFOLLOW would open the link in /proc.
        let flags = OFlags::from_bits_retain((flags & !libc::O_NOFOLLOW) as u32) | OFlags::CLOEXEC;
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        Ok(rustix::fs::open(path, flags, Mode::empty())?.into())
    }

    /// Gives it its name in `directory`, which is open for reading, or another one.
    pub(super) fn name(&self, directory: &File, name: &CStr) -> io::Result<()> {
        // By way of /proc, which needs no privileges: open(2), at O_TMPFILE.
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        Ok(rustix::fs::linkat(CWD, path, directory, name, AtFlags::SYMLINK_FOLLOW)?)
    }

    /// Takes what a write takes from a set-id file; the host does not do it for a privileged writer.
    fn kill_set_id(&self) -> io::Result<()> {
        let mode = stat(&self.file)?.st_mode;
        if is_set_id(mode) {
            rustix::fs::fchmod(&self.file, Mode::from_raw_mode(without_set_id(mode) & 0o7777))?;
        }
        Ok(())
    }
}

impl Deref for Files {
    type Target = PassthroughFs;
    fn deref(&self) -> &PassthroughFs {
        &self.named
    }
}

/// The operations on nodes; the names and arguments are the library's.
#[allow(clippy::too_many_arguments)]
impl Files {
    pub(super) fn new(
        named: PassthroughFs,
        pseudo: PseudoFileSystems,
        budget: Arc<Budget>,
        timeout: Duration,
    ) -> Files {
        let last = AtomicU64::new(FIRST_NODE);
        let (unnamed, synchronous) = (RwLock::default(), RwLock::default());
        Files { named, pseudo, budget, unnamed, synchronous, last, timeout }
    }

    /// The file without a name that has this node id.
    pub(super) fn unnamed(&self, node: u64) -> Option<Arc<Unnamed>> {
        if node < FIRST_NODE {
            return None;
        }
        self.unnamed.read().unwrap_or_else(PoisonError::into_inner).get(&node).cloned()
    }

    /// Makes a file without a name in `directory`, which is open for reading, and opens it. In the name of `owner`, if
    /// there is one.
    pub(super) fn tmpfile(
        &self,
        directory: &File,
        owner: Option<&Maker>,
        ask: &CreateIn,
    ) -> io::Result<(Entry, u64)> {
        self.budget.has_left(2)?;
        let flags = OFlags::from_bits_retain(ask.flags) | OFlags::TMPFILE | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(ask.mode & 0o7777 & !ask.umask);
        let file = File::from(rustix::fs::openat(directory, c".", flags, mode)?);
        if let Some(&Maker { context: Context { uid, gid, .. }, group: membership }) = owner {
            // In a set-group-id directory the host has given it the directory's group.
            let directory = stat(directory)?;
            let keeps_group = directory.st_mode & libc::S_ISGID != 0;
            let group = if keeps_group { None } else { Some(Gid::from_raw(gid)) };
            rustix::fs::fchown(&file, Some(Uid::from_raw(uid)), group)?;
            if ask.mode & (libc::S_ISUID | libc::S_ISGID) != 0 {
                // A program that runs as a group is for its members to make (CVE-2022-0358); so says the host's
                // kernel when it creates a file in a user's name.
                let is_member = gid == directory.st_gid || membership == Some(directory.st_gid);
                let is_stranger = uid != 0 && keeps_group && !is_member;
                let lost = if is_stranger && mode.contains(Mode::XGRP) { Mode::SGID } else { Mode::empty() };
                rustix::fs::fchmod(&file, mode - lost)?;
            }
        }
        let attr = stat(&file)?;
        let node = self.last.fetch_add(2, Relaxed) + 1;
        let handle = node + 1;
        let unnamed = Unnamed { file: file.try_clone()?, handles: Mutex::default() };
        unnamed.insert(handle, file);
        self.budget.know(node)?;
        if let Err(error) = self.budget.take() {
            self.budget.forget(node, 1);
            return Err(error);
        }
        self.unnamed.write().unwrap_or_else(PoisonError::into_inner).insert(node, Arc::new(unnamed));
        let (attr_timeout, entry_timeout) = (self.timeout, self.timeout);
        let entry = Entry { inode: node, generation: 0, attr, attr_flags: 0, attr_timeout, entry_timeout };
        Ok((entry, handle))
    }

    pub(super) fn forget(&self, context: &Context, node: u64, count: u64) {
        self.budget.forget(node, count);
        self.forget_budgeted(context, node, count);
    }

    /// The rest of it, after the budget's part.
    pub(super) fn forget_budgeted(&self, context: &Context, node: u64, count: u64) {
        if node < FIRST_NODE {
            self.named.forget(context, node, count);
        } else if count > 0 {
            // It is given out once, when it is made. What is still open of it is closed with it.
            let gone = self.unnamed.write().unwrap_or_else(PoisonError::into_inner).remove(&node);
            let open = gone.map_or(0, |gone| gone.take_handles());
            (0..open).for_each(|_| self.budget.give_back());
        }
    }

    pub(super) fn destroy(&self) {
        self.budget.clear();
        self.unnamed.write().unwrap_or_else(PoisonError::into_inner).clear();
        self.synchronous.write().unwrap_or_else(PoisonError::into_inner).clear();
        self.named.destroy();
    }

    pub(super) fn getattr(
        &self,
        context: &Context,
        node: u64,
        handle: Option<u64>,
    ) -> io::Result<(libc::stat64, Duration)> {
        let Some(unnamed) = self.unnamed(node) else { return self.named.getattr(context, node, handle) };
        handle.map(|handle| unnamed.handle(handle)).transpose()?;
        Ok((stat(&unnamed.file)?, self.timeout))
    }

    pub(super) fn setattr(
        &self,
        context: &Context,
        node: u64,
        attr: libc::stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(libc::stat64, Duration)> {
        let Some(unnamed) = self.unnamed(node) else {
            return self.named.setattr(context, node, attr, handle, valid);
        };
        let file = &unnamed.file;
        if valid.contains(SetattrValid::MODE) {
            rustix::fs::fchmod(file, Mode::from_raw_mode(attr.st_mode & 0o7777))?;
        }
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            let uid = valid.contains(SetattrValid::UID).then(|| Uid::from_raw(attr.st_uid));
            let gid = valid.contains(SetattrValid::GID).then(|| Gid::from_raw(attr.st_gid));
            rustix::fs::fchown(file, uid, gid)?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let size = u64::try_from(attr.st_size).map_err(|_| errno(libc::EINVAL))?;
            if valid.contains(SetattrValid::KILL_SUIDGID) {
                unnamed.kill_set_id()?;
            }
            // It was opened to be written, as O_TMPFILE requires.
            rustix::fs::ftruncate(file, size)?;
        }
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            let time = |given, now, tv_sec, tv_nsec| match (valid.contains(given), valid.contains(now)) {
                (_, true) => Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW },
                (true, false) => Timespec { tv_sec, tv_nsec },
                (false, false) => Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT },
            };
            let (access, access_now) = (SetattrValid::ATIME, SetattrValid::ATIME_NOW);
            let (change, change_now) = (SetattrValid::MTIME, SetattrValid::MTIME_NOW);
            let times = Timestamps {
                last_access: time(access, access_now, attr.st_atime, attr.st_atime_nsec),
                last_modification: time(change, change_now, attr.st_mtime, attr.st_mtime_nsec),
            };
            rustix::fs::futimens(file, &times)?;
        }
        Ok((stat(file)?, self.timeout))
    }

    pub(super) fn open(
        &self,
        context: &Context,
        node: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<Option<u64>> {
        self.budget.take()?;
        let opened = match self.unnamed(node) {
            None => self.named.open(context, node, flags, fuse_flags).map(|(handle, ..)| {
                self.note_synchronous(context, node, handle, flags);
                handle
            }),
            Some(unnamed) => unnamed.open(flags as i32, fuse_flags).map(|file| {
                let handle = self.last.fetch_add(1, Relaxed) + 1;
                unnamed.insert(handle, file);
                Some(handle)
            }),
        };
        opened.inspect_err(|_| self.budget.give_back())
    }

    /// Notes a handle that the library has given out, if its writes are to be stable.
    pub(super) fn note_synchronous(&self, context: &Context, node: u64, handle: Option<u64>, flags: u32) {
        // O_SYNC has the bit of O_DSYNC.
        if let Some(handle) = handle.filter(|_| flags & libc::O_DSYNC as u32 != 0) {
            self.synchronous.write().unwrap_or_else(PoisonError::into_inner).insert(handle);
            // A client that has guessed it may have closed it already, by another queue, when there was nothing to take back.
            if self.named.getattr(context, node, Some(handle)).is_err() {
                self.forget_synchronous(handle);
            }
        }
    }

    fn forget_synchronous(&self, handle: u64) {
        if self.synchronous.read().unwrap_or_else(PoisonError::into_inner).contains(&handle) {
            self.synchronous.write().unwrap_or_else(PoisonError::into_inner).remove(&handle);
        }
    }

    /// Whether what is written by way of this handle is to be stable when the reply comes.
    pub(super) fn is_synchronous(&self, node: u64, handle: u64) -> bool {
        match self.unnamed(node) {
            None => self.synchronous.read().unwrap_or_else(PoisonError::into_inner).contains(&handle),
            Some(unnamed) => unnamed.is_synchronous(handle),
        }
    }

    pub(super) fn release(&self, context: &Context, node: u64, flags: u32, handle: u64) -> io::Result<()> {
        match self.unnamed(node) {
            None => {
                self.named.release(context, node, flags, handle, false, false, None)?;
                self.forget_synchronous(handle);
            }
            Some(unnamed) => {
                let mut handles = unnamed.handles.lock().unwrap_or_else(PoisonError::into_inner);
                handles.remove(&handle).ok_or_else(|| errno(libc::EBADF))?;
            }
        }
        self.budget.give_back();
        Ok(())
    }

    pub(super) fn read(
        &self,
        context: &Context,
        node: u64,
        handle: u64,
        writer: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        flags: u32,
    ) -> io::Result<usize> {
        let Some(unnamed) = self.unnamed(node) else {
            return self.named.read(context, node, handle, writer, size, offset, None, flags);
        };
        let file = unnamed.handle(handle)?;
        let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
        writer.write_from(&mut *file, size as usize, offset)
    }

    pub(super) fn write(
        &self,
        context: &Context,
        node: u64,
        handle: u64,
        reader: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        is_delayed: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        let Some(unnamed) = self.unnamed(node) else {
            let named = &self.named;
            return named
                .write(context, node, handle, reader, size, offset, None, is_delayed, flags, fuse_flags);
        };
        let file = unnamed.handle(handle)?;
        if fuse_flags & WRITE_KILL_PRIV != 0 {
            unnamed.kill_set_id()?;
        }
        let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
        // fcntl(2) changes it in the client, and here the host would append wherever it is to be written to.
        let (now, append) = (rustix::fs::fcntl_getfl(&*file)?, flags & libc::O_APPEND as u32 != 0);
        if now.contains(OFlags::APPEND) != append {
            let mut changed = now;
            changed.set(OFlags::APPEND, append);
            rustix::fs::fcntl_setfl(&*file, changed)?;
        }
        reader.read_to(&mut *file, size as usize, offset)
    }

    pub(super) fn flush(&self, context: &Context, node: u64, handle: u64, owner: u64) -> io::Result<()> {
        match self.unnamed(node) {
            // Nobody else can see it, on the host either.
            Some(unnamed) => unnamed.handle(handle).map(drop),
            None => self.named.flush(context, node, handle, owner),
        }
    }

    pub(super) fn fsync(&self, context: &Context, node: u64, data_only: bool, handle: u64) -> io::Result<()> {
        match self.unnamed(node) {
            Some(unnamed) if data_only => unnamed.file.sync_data(),
            Some(unnamed) => unnamed.file.sync_all(),
            None => self.named.fsync(context, node, data_only, handle),
        }
    }

    pub(super) fn fallocate(
        &self,
        context: &Context,
        node: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let Some(unnamed) = self.unnamed(node) else {
            return self.named.fallocate(context, node, handle, mode, offset, length);
        };
        let mode = FallocateFlags::from_bits_retain(mode);
        Ok(rustix::fs::fallocate(&unnamed.file, mode, offset, length)?)
    }

    pub(super) fn lseek(
        &self,
        context: &Context,
        node: u64,
        handle: u64,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        let Some(unnamed) = self.unnamed(node) else {
            return self.named.lseek(context, node, handle, offset, whence);
        };
        let offset = i64::try_from(offset).map_err(|_| errno(libc::EINVAL))?;
        let position = match whence as i32 {
            libc::SEEK_DATA => rustix::fs::SeekFrom::Data(offset as u64),
            libc::SEEK_HOLE => rustix::fs::SeekFrom::Hole(offset as u64),
            _ => return Err(errno(libc::EINVAL)),
        };
        Ok(rustix::fs::seek(&unnamed.file, position)?)
    }

    pub(super) fn access(&self, context: &Context, node: u64, mask: u32) -> io::Result<()> {
        // The client checks permissions itself, and asks only where a mount has it not do so.
        if self.unnamed(node).is_some() { Ok(()) } else { self.named.access(context, node, mask) }
    }

    pub(super) fn statfs(&self, context: &Context, node: u64) -> io::Result<libc::statvfs64> {
        // Every node is on the share; the root tells as much.
        let node = if self.unnamed(node).is_some() { fuse_backend_rs::abi::fuse_abi::ROOT_ID } else { node };
        self.named.statfs(context, node)
    }

    pub(super) fn setupmapping(
        &self,
        context: &Context,
        node: u64,
        foffset: u64,
        len: u64,
        flags: u64,
        moffset: u64,
        mapper: &mut dyn FsCacheReqHandler,
    ) -> io::Result<()> {
        let Some(unnamed) = self.unnamed(node) else {
            return self.named.setupmapping(context, node, 0, foffset, len, flags, moffset, mapper);
        };
        let is_writable = flags & SetupmappingFlags::WRITE.bits() != 0;
        let file = unnamed.open(if is_writable { libc::O_RDWR } else { libc::O_RDONLY }, 0)?;
        mapper.map(foffset, moffset, len, flags, file.as_raw_fd())
    }

    pub(super) fn getxattr(
        &self,
        context: &Context,
        node: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        let Some(unnamed) = self.unnamed(node) else { return self.named.getxattr(context, node, name, size) };
        if size == 0 {
            return Ok(GetxattrReply::Count(rustix::fs::fgetxattr_query(&unnamed.file, name)? as u32));
        }
        let mut value = vec![0; size as usize];
        let len = rustix::fs::fgetxattr(&unnamed.file, name, &mut value[..])?;
        value.truncate(len);
        Ok(GetxattrReply::Value(value))
    }

    pub(super) fn listxattr(&self, context: &Context, node: u64, size: u32) -> io::Result<ListxattrReply> {
        let Some(unnamed) = self.unnamed(node) else { return self.named.listxattr(context, node, size) };
        if size == 0 {
            return Ok(ListxattrReply::Count(rustix::fs::flistxattr_query(&unnamed.file)? as u32));
        }
        let mut names = vec![0; size as usize];
        let len = rustix::fs::flistxattr(&unnamed.file, &mut names[..])?;
        names.truncate(len);
        Ok(ListxattrReply::Names(names))
    }

    pub(super) fn setxattr(
        &self,
        context: &Context,
        node: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        let Some(unnamed) = self.unnamed(node) else {
            return self.named.setxattr(context, node, name, value, flags);
        };
        let flags = XattrFlags::from_bits_retain(flags);
        Ok(rustix::fs::fsetxattr(&unnamed.file, name, value, flags)?)
    }

    pub(super) fn removexattr(&self, context: &Context, node: u64, name: &CStr) -> io::Result<()> {
        let Some(unnamed) = self.unnamed(node) else { return self.named.removexattr(context, node, name) };
        Ok(rustix::fs::fremovexattr(&unnamed.file, name)?)
    }
}

fn stat(file: &File) -> io::Result<libc::stat64> {
    let mut stat = MaybeUninit::<libc::stat64>::uninit();
    // SAFETY: fstat(2) writes no more than the structure, which lives through the call.
    if unsafe { libc::fstat64(file.as_raw_fd(), stat.as_mut_ptr()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has succeeded and so has filled it in.
    Ok(unsafe { stat.assume_init() })
}

#[cfg(test)]
mod tests {
    use vm_memory::ByteValued;

    use super::*;
    use crate::virtio::fs::abi::opcode;
    use crate::virtio::fs::inodes::host_node;
    use crate::virtio::fs::policy::Policy;
    use crate::virtio::fs::testing::{FakeGuest, ROOT, nul};

    #[test]
    fn no_handle_is_remembered_longer_than_it_is_open() {
        let mut guest = FakeGuest::mounted(Policy::Never);
        let server = Arc::clone(&guest.device.server);
        let files = &server.fs;
        let remembered = || files.synchronous.read().unwrap().len();
        let stable = libc::O_RDWR | libc::O_DSYNC;

        let ask = CreateIn { flags: stable as u32, mode: 0o100_600, ..Default::default() };
        let reply = guest.call(opcode::TMPFILE, ROOT, &[ask.as_slice(), &nul("/")]).unwrap();
        let node = u64::from_le_bytes(reply[..8].try_into().unwrap());
        let handles = [stable, libc::O_RDWR | libc::O_SYNC].map(|flags| guest.open(node, flags).unwrap().fh);
        let plain = guest.open(node, libc::O_RDWR).unwrap().fh;
        let host = host_node(node).0;
        assert_eq!(handles.map(|handle| files.is_synchronous(host, handle)), [true; 2]);
        assert!(!files.is_synchronous(host, plain) && !files.is_synchronous(host, u64::MAX));
        guest.forget(node, 1);
        assert_eq!((remembered(), files.is_synchronous(host, handles[0])), (0, false));

        let (entry, open) = guest.create(ROOT, "file", stable).unwrap();
        let (node, host) = (entry.nodeid, host_node(entry.nodeid).0);
        let again = guest.open(node, stable).unwrap().fh;
        let plain = guest.open(node, libc::O_RDWR).unwrap().fh;
        assert!(files.is_synchronous(host, open.fh) && files.is_synchronous(host, again));
        assert!(!files.is_synchronous(host, plain));
        for fh in [open.fh, again, plain] {
            guest.release(node, fh).unwrap();
        }
        assert_eq!(remembered(), 0);
        // As when a RELEASE overtakes the end of the OPEN.
        files.note_synchronous(&Context::default(), host, Some(again), stable as u32);
        assert_eq!(remembered(), 0);
    }
}
