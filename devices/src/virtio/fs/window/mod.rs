//! The DAX window: the range of address space, shared with the guest, into which the device maps parts of files.
//!
//! Everything that changes what the guest sees in the window goes through [`DaxWindow::map`] and [`DaxWindow::unmap`].
//! The window knows chunks and descriptors; which file a guest may map is decided elsewhere.

mod cached;
mod counters;
mod files;
mod guard;
mod lost;
mod mmap;
mod prefault;
mod repair;
mod scratch;
mod size;
mod spare;
mod state;
mod table;
#[cfg(test)]
mod tests;
mod watch;

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use self::counters::Counts;
pub use self::counters::WindowCounters;
pub use self::files::KnownFile;
use self::files::{FileKey, Files};
use self::guard::Guard;
use self::lost::LostFiles;
pub use self::prefault::{MappedPart, Shown};
use self::scratch::Scratch;
pub use self::size::{
    MAX_WINDOW_SIZE, MIN_WINDOW_SIZE, WindowSizeError, check_window_size, default_window_size,
};
use self::state::{Shared, State};
use self::table::ChunkTable;
use self::watch::Watcher;
use crate::virtio::device::{HostMemory, NestedPaging, Repair};

/// log2 of [`CHUNK_SIZE`], which is what the device tells the guest in `map_alignment`.
pub const CHUNK_SHIFT: u32 = 21;

/// The unit of mapping, in bytes: 2 MiB, the size of the guest's ranges (fs/fuse/dax.c, FUSE_DAX_SHIFT) and of a huge
/// page, so that the page cache's huge pages can be mapped as such.
pub const CHUNK_SIZE: u64 = 1 << CHUNK_SHIFT;

/// Why a part of the window was not mapped or unmapped.
#[derive(Debug, thiserror::Error)]
pub enum WindowError {
    /// An offset or a length is not a multiple of 2 MiB, or the length is 0.
    #[error("the window is mapped in chunks of 2 MiB, which {what} {value:#x} is not a multiple of")]
    Unaligned {
        /// Which of the request's numbers.
        what: &'static str,
        /// Its value in bytes.
        value: u64,
    },
    /// The range does not lie in the window.
    #[error("the range of {len:#x} bytes at {moffset:#x} does not lie in the window of {size:#x} bytes")]
    OutOfWindow {
        /// Offset in the window, in bytes.
        moffset: u64,
        /// Length of the range, in bytes.
        len: u64,
        /// Size of the window, in bytes.
        size: u64,
    },
    /// The part of the file ends beyond what any file can have.
    #[error("a file has no {len:#x} bytes at {foffset:#x}")]
    OutOfFile {
        /// Offset in the file, in bytes.
        foffset: u64,
        /// Length of the range, in bytes.
        len: u64,
    },
    /// The host cannot map or unmap.
    #[error("the host cannot map it")]
    Map(#[source] io::Error),
}

impl WindowError {
    /// The errno that tells the guest.
    pub fn errno(&self) -> i32 {
        match self {
            WindowError::Map(error) => error.raw_os_error().unwrap_or(libc::EIO),
            _ => libc::EINVAL,
        }
    }
}

/// The DAX window of one share.
///
/// All of it is mapped from the start, so that nothing else of the process can ever lie in it: what does not show a file
/// is a hole, which shows scratch memory (`scratch.rs`). Mapping replaces a part of it in place with one system call.
///
/// All queues share the window. One lock covers the system call and the table together, because they must agree when
/// two queues touch the same chunk. It costs little beyond what is there anyway: the host's kernel carries out one
/// change of the address space at a time. Nothing else is done under it (`Index`, `lock` in `state.rs`).
///
/// Files change on the host while they are mapped. docs/window.md says what the window does then.
pub struct DaxWindow(Arc<Shared>);

/// A checked range of chunks.
#[derive(Clone, Copy)]
struct Chunks {
    first: usize,
    count: usize,
}

impl Chunks {
    /// Those of a range in bytes, which has been checked.
    fn of(start: u64, len: u64) -> Chunks {
        Chunks { first: (start >> CHUNK_SHIFT) as usize, count: (len >> CHUNK_SHIFT) as usize }
    }

    /// The number of the first one behind it.
    fn end(self) -> usize {
        self.first + self.count
    }

    /// Their numbers.
    fn range(self) -> Range<usize> {
        self.first..self.end()
    }

    /// Where it starts in the window, in bytes.
    fn start(self) -> u64 {
        (self.first as u64) << CHUNK_SHIFT
    }

    /// Its length in bytes.
    fn bytes(self) -> u64 {
        (self.count as u64) << CHUNK_SHIFT
    }
}

impl DaxWindow {
    /// Reserves the address space of a window of `size` bytes; no memory is committed.
    ///
    /// # Errors
    /// EINVAL if [`check_window_size`] refuses the size or it is 0; ENOMEM if the host has no address space.
    pub fn new(size: u64) -> io::Result<DaxWindow> {
        if size == 0 || check_window_size(size).is_err() {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        spare::keep();
        let scratch = Scratch::new(size)?;
        let base = mmap::reserve(size)?;
        let guard = Guard::new(base as usize..base as usize + size as usize)?;
        let files = Files::default();
        let index = files.index.clone();
        let state = State { table: ChunkTable::new(size), files, copies: BTreeSet::new() };
        let shared = Arc::new_cyclic(|me| Shared {
            base,
            size,
            guard,
            scratch,
            state: Mutex::new(state),
            index,
            nested_paging: RwLock::new(None),
            counts: Counts::default(),
            lost: LostFiles::default(),
            short_files: AtomicU64::new(0),
            is_read_only: AtomicBool::new(false),
            full_at: AtomicU64::new(0),
            me: Weak::clone(me),
        });
        let all = shared.all();
        shared.punch(all.start(), all.bytes(), libc::MAP_FIXED)?;
        if let Some(watcher) = Watcher::get() {
            watcher.add_window(Arc::downgrade(&shared));
        }
        Ok(DaxWindow(shared))
    }

    /// Has messages name files by their place below `origin`, where the share's tree has been copied from.
    pub fn begin_paths_at(&self, origin: &Path) {
        self.0.lost.begin_at(origin);
    }

    /// Has no file changed through the window, not even where the guest gets to write to what it has mapped to read.
    pub fn set_read_only(&self) {
        self.0.is_read_only.store(true, Relaxed);
    }

    /// Shows `len` bytes of a file from `foffset` on at `moffset` of the window, shared with everyone else who maps or
    /// reads the file. All three are in bytes and multiples of 2 MiB; the part may lie beyond the file's end.
    ///
    /// What the range showed before is replaced at once, without a moment in which the guest sees a hole: a client
    /// makes a mapping writable this way while others read it, and it may reuse a range that it could not unmap. If
    /// this fails, the range shows what it showed.
    ///
    /// # Errors
    /// [`WindowError`]; among them what the host says of `fd` (EACCES if `writable` is asked of a descriptor that is
    /// not open for reading and writing).
    pub fn map(
        &self,
        moffset: u64,
        foffset: u64,
        len: u64,
        writable: bool,
        fd: BorrowedFd<'_>,
    ) -> Result<Shown, WindowError> {
        self.map_as(moffset, foffset, len, writable, fd, None)
    }

    /// The same for a file that shows in the window already, as a rule with a single system call.
    ///
    /// # Errors
    /// As [`DaxWindow::map`].
    pub fn map_known(
        &self,
        moffset: u64,
        foffset: u64,
        len: u64,
        writable: bool,
        file: &KnownFile,
    ) -> Result<Shown, WindowError> {
        self.map_as(moffset, foffset, len, writable, file.fd(), Some(file))
    }

    fn map_as(
        &self,
        moffset: u64,
        foffset: u64,
        len: u64,
        writable: bool,
        fd: BorrowedFd<'_>,
        known: Option<&KnownFile>,
    ) -> Result<Shown, WindowError> {
        let result = self.check(moffset, foffset, len);
        let result = result.and_then(|chunks| self.0.map(chunks, foffset, writable, fd, known));
        if result.is_err() {
            self.0.counts.map_failed();
        }
        result
    }

    /// The file that `stat` is of, if any of its chunks are mapped.
    pub fn known(&self, stat: &libc::stat64) -> Option<KnownFile> {
        self.0.index.get(FileKey::of(stat))
    }

    fn check(&self, moffset: u64, foffset: u64, len: u64) -> Result<Chunks, WindowError> {
        let chunks = self.chunks(moffset, len)?;
        aligned("the offset in the file", foffset)?;
        match foffset.checked_add(len) {
            Some(end) if end <= i64::MAX as u64 => Ok(chunks),
            _ => Err(WindowError::OutOfFile { foffset, len }),
        }
    }

    /// Makes a hole of `len` bytes at `moffset`, both multiples of 2 MiB, whatever was mapped there.
    ///
    /// # Errors
    /// [`WindowError`].
    pub fn unmap(&self, moffset: u64, len: u64) -> Result<(), WindowError> {
        self.unmap_all(&mut [(moffset, len)], |_| ())
    }

    /// Does the same for many ranges, of an offset and a length each, in any order and as often as they like: what lies
    /// side by side becomes a hole together. `unmapped` is told the chunks of each hole. The ranges are sorted.
    ///
    /// # Errors
    /// [`WindowError`] for a range that cannot be unmapped; the others are.
    pub fn unmap_all(
        &self,
        ranges: &mut [(u64, u64)],
        mut unmapped: impl FnMut(Range<usize>),
    ) -> Result<(), WindowError> {
        ranges.sort_unstable();
        let checked = || ranges.iter().map(|(moffset, len)| self.chunks(*moffset, *len));
        let mut result = checked().find_map(Result::err).map_or(Ok(()), Err);
        let mut rest = checked().flatten().peekable();
        while let Some(mut hole) = rest.next() {
            let mut entries = 1;
            while let Some(next) = rest.next_if(|next| next.first <= hole.end()) {
                hole.count = hole.end().max(next.end()) - hole.first;
                entries += 1;
            }
            match self.0.unmap(hole) {
                Ok(()) => {
                    self.0.counts.unmapped(entries);
                    unmapped(hole.range());
                }
                Err(error) => result = result.and(Err(WindowError::Map(error))),
            }
        }
        result
    }

    /// Makes the whole window a hole: a session with the guest's driver has ended.
    ///
    /// # Errors
    /// What the host says if it cannot.
    pub fn clear(&self) -> io::Result<()> {
        self.0.clear()
    }

    /// To be called before the guest is told that a file has the size of `stat`: from when this returns it sees that much
    /// of the file wherever it has it mapped, though the file was shorter in between. Costs one load if none was.
    pub fn tell(&self, stat: &libc::stat64) {
        self.0.tell(FileKey::of(stat), u64::try_from(stat.st_size).unwrap_or(0));
    }

    /// Whether any file is shorter than the guest may believe, so that sizes matter that are not known from a reply.
    pub fn has_short_files(&self) -> bool {
        self.0.short_files.load(SeqCst) > 0
    }

    /// Carries out a change by which the guest itself may set the size of the file that `stat` is of: it knows what it
    /// loses.
    pub fn resize<T>(&self, stat: &libc::stat64, change: impl FnOnce() -> T) -> T {
        struct Resizing<'a>(&'a Shared, FileKey);
        impl Drop for Resizing<'_> {
            fn drop(&mut self) {
                self.0.end_resize(self.1);
            }
        }
        let key = FileKey::of(stat);
        self.0.begin_resize(key);
        let _resizing = Resizing(&self.0, key);
        change()
    }

    /// Whether the host has no mappings left (vm.max_map_count), so that no more files should be mapped.
    pub fn is_full(&self) -> bool {
        self.0.is_full()
    }

    /// Chunks that are mapped now; costs one load.
    pub fn mapped_chunks(&self) -> u64 {
        self.0.counts.mapped_chunks()
    }

    /// The counters; takes no lock.
    pub fn counters(&self) -> WindowCounters {
        let Shared { scratch, guard, counts, lost, size, .. } = &*self.0;
        WindowCounters {
            stray_bytes: scratch.touched(),
            replaced_pages: guard.replaced(),
            lost_files: lost.short(),
            unwatched_files: lost.unwatched(),
            ..counts.snapshot(*size)
        }
    }

    /// Paths on the host of the first files whose pages the host took away or could not provide.
    pub fn lost_paths(&self) -> Vec<String> {
        self.0.lost.paths()
    }

    /// Checks a range in bytes.
    fn chunks(&self, moffset: u64, len: u64) -> Result<Chunks, WindowError> {
        aligned("the offset in the window", moffset)?;
        aligned("the length", len)?;
        if len == 0 {
            return Err(WindowError::Unaligned { what: "the length", value: 0 });
        }
        match moffset.checked_add(len) {
            Some(end) if end <= self.0.size => Ok(Chunks::of(moffset, len)),
            _ => Err(WindowError::OutOfWindow { moffset, len, size: self.0.size }),
        }
    }
}

impl HostMemory for DaxWindow {
    fn host_address(&self) -> *mut u8 {
        self.0.base
    }

    fn size(&self) -> u64 {
        self.0.size
    }

    fn is_used(&self) -> bool {
        self.mapped_chunks() > 0
    }

    fn set_nested_paging(&self, nested: Option<Arc<dyn NestedPaging>>) {
        *self.0.nested_paging.write().unwrap_or_else(PoisonError::into_inner) = nested;
    }

    fn repair(&self, offset: u64, write: bool) -> Repair {
        if offset < self.0.size { self.0.repair(offset, write) } else { Repair::Unneeded }
    }
}

impl Drop for DaxWindow {
    fn drop(&mut self) {
        // The watcher may still look at it, and needs no lock for that but the window's own.
        let _ = self.0.clear();
    }
}

fn aligned(what: &'static str, value: u64) -> Result<(), WindowError> {
    if value.is_multiple_of(CHUNK_SIZE) { Ok(()) } else { Err(WindowError::Unaligned { what, value }) }
}
