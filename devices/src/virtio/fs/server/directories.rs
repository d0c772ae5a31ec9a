//! Open directories, and reading them.
//!
//! The library's own reading is not used: it looks up each entry even for READDIR, reports node ids as inode numbers,
//! and ends a listing early, as if it were complete, when an entry disappears meanwhile.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::mem::{offset_of, size_of};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use fuse_backend_rs::abi::fuse_abi::{
    Dirent, EntryOut, FSYNC_FDATASYNC, FsyncIn, OpenIn, OpenOut, ReadIn, ReleaseIn,
};
use fuse_backend_rs::api::filesystem::ZeroCopyWriter;
use vm_memory::ByteValued;

use super::Server;
use super::message::{Reply, Request, errno};
use crate::virtio::fs::budget::Budget;

/// The most bytes of host entries that one request reads.
const READ_MAX: usize = 32 << 10;
/// Enough for one host entry with the longest name.
const READ_MIN: usize = 512;

thread_local! {
    /// Host entries as they are read: one buffer a queue, since a guest may have any number of directories open.
    static ENTRIES: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_MAX]);
}

/// The directories that the guest has open, by their handles.
pub(super) struct Directories {
    last_handle: AtomicU64,
    open: RwLock<HashMap<u64, Arc<Directory>>>,
    budget: Arc<Budget>,
}

struct Directory {
    nodeid: u64,
    file: File,
    /// Held by whoever moves the file's position.
    position: Mutex<()>,
}

impl Directories {
    pub(super) fn new(budget: Arc<Budget>) -> Directories {
        Directories { last_handle: AtomicU64::default(), open: RwLock::default(), budget }
    }

    fn insert(&self, nodeid: u64, file: File) -> io::Result<u64> {
        self.budget.take()?;
        let handle = self.last_handle.fetch_add(1, Relaxed) + 1;
        let directory = Arc::new(Directory { nodeid, file, position: Mutex::default() });
        self.open.write().unwrap_or_else(PoisonError::into_inner).insert(handle, directory);
        Ok(handle)
    }

    fn get(&self, handle: u64, nodeid: u64) -> io::Result<Arc<Directory>> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        let directory = open.get(&handle).filter(|directory| directory.nodeid == nodeid);
        directory.cloned().ok_or_else(|| errno(libc::EBADF))
    }

    /// The directory that a handle is open on.
    ///
    /// # Errors
    /// EBADF if it is none of this node's; EMFILE.
    pub(super) fn file(&self, handle: u64, nodeid: u64) -> io::Result<File> {
        self.get(handle, nodeid)?.file.try_clone()
    }

    fn remove(&self, handle: u64, nodeid: u64) -> io::Result<()> {
        self.get(handle, nodeid)?;
        if self.open.write().unwrap_or_else(PoisonError::into_inner).remove(&handle).is_some() {
            self.budget.give_back();
        }
        Ok(())
    }

    /// Closes all, at the end of a session, when the budget is cleared as well.
    pub(super) fn clear(&self) {
        self.open.write().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl Server {
    pub(super) fn opendir(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let OpenIn { .. } = request.arg()?;
        let nodeid = request.header.nodeid;
        let file = self.open_node(&self.context(request), nodeid, false)?;
        if !file.metadata()?.is_dir() {
            return Err(errno(libc::ENOTDIR));
        }
        let fh = self.directories.insert(nodeid, file)?;
        reply.object(&OpenOut { fh, open_flags: self.cache.directory_flags(), ..Default::default() })
    }

    /// READDIR, and READDIRPLUS, which gives the inodes too.
    pub(super) fn readdir(
        &self,
        request: &mut Request<'_>,
        reply: &mut Reply<'_>,
        plus: bool,
    ) -> io::Result<u32> {
        let ReadIn { fh, offset, size, .. } = request.arg()?;
        let (context, nodeid) = (self.context(request), request.header.nodeid);
        let directory = self.directories.get(fh, nodeid)?;
        let mut body = reply.body()?;
        let mut room = body.available_bytes().min(size as usize);
        // An entry with its inode takes four times the room that it takes on the host, or more.
        let want = if plus { room / 4 } else { room };
        ENTRIES.with_borrow_mut(|buffer| {
            let mut rest = directory.read(offset, &mut buffer[..want.clamp(READ_MIN, READ_MAX)])?;
            while let Some((entry, next)) = HostEntry::parse(rest) {
                let name = entry.name.to_bytes();
                let padded = (size_of::<Dirent>() + name.len()).next_multiple_of(8);
                let len = if plus { size_of::<EntryOut>() + padded } else { padded };
                if len > room {
                    if body.written() == 0 {
                        return Err(errno(libc::EINVAL));
                    }
                    break;
                }
                if plus {
                    // Entries without a node id are legal: the client looks them up when it needs them. These are the
                    // two dots, what disappeared just now, and what the budget has nothing left for.
                    let found = match name {
                        b"." | b".." => None,
                        _ => self.fs.lookup(&context, nodeid, entry.name).ok(),
                    };
                    let found = found.map_or_else(EntryOut::default, |found| self.entry_out(&context, found));
                    body.write_all(found.as_slice())?;
                }
                let dirent = Dirent {
                    ino: entry.ino,
                    off: entry.next_offset,
                    namelen: name.len() as u32,
                    type_: entry.kind,
                };
                body.write_all(dirent.as_slice())?;
                body.write_all(name)?;
                body.write_all(&[0; 8][..padded - size_of::<Dirent>() - name.len()])?;
                room -= len;
                rest = next;
            }
            reply.finish(body.written())
        })
    }

    pub(super) fn releasedir(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let ReleaseIn { fh, .. } = request.arg()?;
        self.directories.remove(fh, request.header.nodeid)?;
        reply.empty()
    }

    pub(super) fn fsyncdir(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let FsyncIn { fh, fsync_flags, .. } = request.arg()?;
        let directory = self.directories.get(fh, request.header.nodeid)?;
        if fsync_flags & FSYNC_FDATASYNC != 0 {
            directory.file.sync_data()?;
        } else {
            directory.file.sync_all()?;
        }
        reply.empty()
    }
}

impl Directory {
    /// Reads host entries from `offset` on, as many as `buffer` has room for; none at the end.
    fn read<'b>(&self, offset: u64, buffer: &'b mut [u8]) -> io::Result<&'b [u8]> {
        let _position = self.position.lock().unwrap_or_else(PoisonError::into_inner);
        (&self.file).seek(SeekFrom::Start(offset))?;
        let (start, len) = (buffer.as_mut_ptr(), buffer.len());
        // SAFETY: the buffer has `len` bytes and outlives the call, which writes no more than these.
        let read = unsafe { libc::syscall(libc::SYS_getdents64, self.file.as_raw_fd(), start, len) };
        if read < 0 { Err(io::Error::last_os_error()) } else { Ok(&buffer[..read as usize]) }
    }
}

/// One entry as the host's kernel gives it (struct linux_dirent64).
struct HostEntry<'b> {
    ino: u64,
    next_offset: u64,
    kind: u32,
    name: &'b CStr,
}

impl HostEntry<'_> {
    /// The first entry in `bytes` and what follows it.
    fn parse(bytes: &[u8]) -> Option<(HostEntry<'_>, &[u8])> {
        let word = |at: usize| Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        let len_at = offset_of!(libc::dirent64, d_reclen);
        let len = u16::from_ne_bytes(bytes.get(len_at..len_at + 2)?.try_into().ok()?);
        let (entry, rest) = bytes.split_at_checked(usize::from(len))?;
        let entry = HostEntry {
            ino: word(offset_of!(libc::dirent64, d_ino))?,
            next_offset: word(offset_of!(libc::dirent64, d_off))?,
            kind: u32::from(*entry.get(offset_of!(libc::dirent64, d_type))?),
            name: CStr::from_bytes_until_nul(entry.get(offset_of!(libc::dirent64, d_name)..)?).ok()?,
        };
        Some((entry, rest))
    }
}
