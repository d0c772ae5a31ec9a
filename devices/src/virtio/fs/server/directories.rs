//! Open directories, and reading them.
//!
//! The library's own reading is not used: it looks up each entry even for READDIR, reports node ids as inode numbers,
//! and ends a listing early, as if it were complete, when an entry disappears meanwhile.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::iter;
use std::mem::{offset_of, size_of};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use fuse_backend_rs::abi::fuse_abi::{
    Dirent, EntryOut, FSYNC_FDATASYNC, FsyncIn, OpenIn, OpenOut, ReadIn, ReleaseIn,
};
use fuse_backend_rs::api::filesystem::{Context, ZeroCopyWriter};
use vm_memory::ByteValued;

use super::Server;
use super::message::{Body, Reply, Request, errno};
use crate::virtio::fs::budget::Budget;

/// The most bytes of host entries that are read at once.
const READ_MAX: usize = 32 << 10;
/// The longest host entry in bytes: with the longest name that clients take (FUSE_NAME_MAX; in UTF-8 names of 255 characters are
/// longer than NAME_MAX, on file systems that count characters).
const LONGEST: usize = (offset_of!(libc::dirent64, d_name) + 1024 + 1).next_multiple_of(8);
/// The most bytes of entries in one reply, so that it does not hold the queue up for long.
const REPLY_MAX: usize = 128 << 10;

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
    /// Where the file's position is, if that is known. Held by whoever moves it.
    position: Mutex<Option<u64>>,
}

impl Directories {
    pub(super) fn new(budget: Arc<Budget>) -> Directories {
        Directories { last_handle: AtomicU64::default(), open: RwLock::default(), budget }
    }

    fn insert(&self, nodeid: u64, file: File) -> io::Result<u64> {
        self.budget.take()?;
        let handle = self.last_handle.fetch_add(1, Relaxed) + 1;
        let directory = Arc::new(Directory { nodeid, file, position: Mutex::new(Some(0)) });
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
        let mut room = body.available_bytes().min(size as usize).min(REPLY_MAX);
        let mut from = offset;
        ENTRIES.with_borrow_mut(|buffer| {
            loop {
                let len = surely_fits(room, plus);
                let read = match directory.read(from, &mut buffer[..len]) {
                    // What was read before comes first, and most often the reply is full.
                    Err(_) if body.written() > 0 => break,
                    // The next entry is longer.
                    Err(error) if error.raw_os_error() == Some(libc::EINVAL) && len < LONGEST => {
                        directory.read(from, &mut buffer[..LONGEST])?
                    }
                    read => read?,
                };
                if read == 0 {
                    break;
                }
                for entry in entries(&buffer[..read]) {
                    let len = entry.reply_len(plus);
                    if len > room {
                        let is_none = body.written() == 0;
                        return if is_none { Err(errno(libc::EINVAL)) } else { reply.finish(body.written()) };
                    }
                    self.put_entry(&context, nodeid, &entry, plus, &mut body)?;
                    room -= len;
                    from = entry.next_offset;
                }
            }
            reply.finish(body.written())
        })
    }

    /// Adds an entry to a reply, which has room for it.
    fn put_entry(
        &self,
        context: &Context,
        directory: u64,
        entry: &HostEntry<'_>,
        plus: bool,
        body: &mut Body<'_>,
    ) -> io::Result<()> {
        let name = entry.name.to_bytes();
        if plus {
            // Entries without a node id are legal: the client looks them up when it needs them. These are the two dots, what
            // disappeared just now, and what the budget has nothing left for.
            let found = match name {
                b"." | b".." => None,
                _ => self.fs.lookup(context, directory, entry.name).ok(),
            };
            let found = found.map_or_else(EntryOut::default, |found| self.entry_out(context, found));
            body.write_all(found.as_slice())?;
        }
        let dirent =
            Dirent { ino: entry.ino, off: entry.next_offset, namelen: name.len() as u32, type_: entry.kind };
        body.write_all(dirent.as_slice())?;
        body.write_all(name)?;
        let len = size_of::<Dirent>() + name.len();
        body.write_all(&[0; 8][..len.next_multiple_of(8) - len])
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
    /// Reads host entries from `offset` on, as many as `buffer` has room for; returns their bytes, 0 at the end.
    ///
    /// # Errors
    /// EINVAL if there is too little room for the next one.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let mut position = self.position.lock().unwrap_or_else(PoisonError::into_inner);
        if position.take() != Some(offset) {
            (&self.file).seek(SeekFrom::Start(offset))?;
        }
        let (start, len) = (buffer.as_mut_ptr(), buffer.len());
        // SAFETY: the buffer has `len` bytes and outlives the call, which writes no more than these.
        let read = unsafe { libc::syscall(libc::SYS_getdents64, self.file.as_raw_fd(), start, len) };
        if read < 0 {
            return Err(io::Error::last_os_error());
        }
        let read = read as usize;
        *position = entries(&buffer[..read]).last().map(|entry| entry.next_offset);
        Ok(read)
    }
}

/// How many bytes of host entries fit in a reply with this much room, however long their names are.
///
/// More must not be read: the next request would have to move the position back, and where a position is a count of
/// entries (tmpfs before Linux 6.6) it would leave out as many as were removed meanwhile.
fn surely_fits(room: usize, plus: bool) -> usize {
    // An entry takes 20 + n bytes on the host and 24 + n here, each rounded up to 8, for a name of n: the same or 8 more. The
    // worst are names of up to 4 bytes, with 24 on the host, and 32 here or, with the inode, 160.
    const _: () = assert!(size_of::<EntryOut>() == 128);
    let fits = if plus { room * 3 / 20 } else { room * 3 / 4 };
    fits.min(READ_MAX)
}

/// One entry as the host's kernel gives it (struct linux_dirent64).
struct HostEntry<'b> {
    ino: u64,
    next_offset: u64,
    kind: u32,
    name: &'b CStr,
}

/// The host entries in `bytes`.
fn entries(mut bytes: &[u8]) -> impl Iterator<Item = HostEntry<'_>> {
    iter::from_fn(move || {
        let (entry, rest) = HostEntry::parse(bytes)?;
        bytes = rest;
        Some(entry)
    })
}

impl HostEntry<'_> {
    /// How many bytes it takes in a reply.
    fn reply_len(&self, plus: bool) -> usize {
        let len = (size_of::<Dirent>() + self.name.count_bytes()).next_multiple_of(8);
        if plus { size_of::<EntryOut>() + len } else { len }
    }

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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::ffi::CString;

    use super::*;
    use crate::virtio::fs::abi::opcode;
    use crate::virtio::fs::inodes::host_node;
    use crate::virtio::fs::policy::Policy;
    use crate::virtio::fs::testing::{FakeGuest, PER_FILE, directories_with_hints};

    #[test]
    fn what_surely_fits_does() {
        for plus in [false, true] {
            for len in 1..=255 {
                let name = CString::new(vec![b'n'; len]).unwrap();
                let entry = HostEntry { ino: 1, next_offset: 1, kind: 0, name: &name };
                let on_host = (offset_of!(libc::dirent64, d_name) + len + 1).next_multiple_of(8);
                for room in 0..8192 {
                    let fit = surely_fits(room, plus) / on_host;
                    assert!(fit * entry.reply_len(plus) <= room, "{len} in {room}");
                }
            }
        }
    }

    /// `while readdir: unlink`, by a client that takes all of each reply.
    #[test]
    fn entries_that_go_as_they_are_listed_hide_no_others() {
        for share in directories_with_hints() {
            let mut guest = FakeGuest::on(share, |config| config.policy = Policy::Never);
            guest.init(PER_FILE).unwrap();
            for plus in [false, true] {
                for size in [700, 4096, 1 << 16] {
                    let name = |number: usize| format!("{number}{}", "n".repeat(number % 17 * (number % 3)));
                    let names: BTreeSet<String> = (0..1000).map(name).collect();
                    let directory = format!("{plus} {size}");
                    let node = guest.mkdir(1, &directory).unwrap().nodeid;
                    for name in &names {
                        File::create(guest.path(&directory).join(name)).unwrap();
                    }
                    let fh = guest.opendir(node).unwrap();
                    let position = guest.device.server.directories.file(fh, host_node(node).0).unwrap();
                    let code = if plus { opcode::READDIRPLUS } else { opcode::READDIR };
                    let (mut offset, mut listed) = (0, BTreeSet::new());
                    loop {
                        let ask = ReadIn { fh, offset, size, ..Default::default() };
                        let reply = guest.call(code, node, &[ask.as_slice()]).unwrap();
                        if reply.is_empty() {
                            break;
                        }
                        let mut rest = &reply[if plus { size_of::<EntryOut>() } else { 0 }..];
                        loop {
                            let (dirent, tail) = rest.split_at(size_of::<Dirent>());
                            let dirent = *Dirent::from_slice(dirent).unwrap();
                            let name = String::from_utf8(tail[..dirent.namelen as usize].to_vec()).unwrap();
                            if !name.starts_with('.') {
                                std::fs::remove_file(guest.path(&directory).join(&name)).unwrap();
                                assert!(listed.insert(name));
                            }
                            offset = dirent.off;
                            let inode = if plus { size_of::<EntryOut>() } else { 0 };
                            let len = (dirent.namelen as usize).next_multiple_of(8) + inode;
                            match tail.get(len..) {
                                Some(next) if !next.is_empty() => rest = next,
                                _ => break,
                            }
                        }
                        // Behind the last entry it may be elsewhere.
                        let position = (&position).stream_position().unwrap();
                        assert!(position == offset || listed == names, "nothing is read in advance");
                    }
                    assert_eq!(listed, names, "{directory}");
                }
            }
        }
    }
}
