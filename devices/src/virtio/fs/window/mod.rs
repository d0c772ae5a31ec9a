//! The DAX window: the range of address space, shared with the guest, into which the device maps parts of files.
//!
//! Everything that changes what the guest sees in the window goes through [`DaxWindow::map`] and [`DaxWindow::unmap`].
//! The window knows chunks and descriptors; which file a guest may map is decided elsewhere.

mod counters;
mod guard;
mod scratch;
mod size;
mod table;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use self::counters::Counts;
pub use self::counters::WindowCounters;
use self::guard::Guard;
use self::scratch::Scratch;
pub use self::size::{
    MAX_WINDOW_SIZE, MIN_WINDOW_SIZE, WindowSizeError, check_window_size, default_window_size,
};
use self::table::ChunkTable;
use crate::virtio::device::HostMemory;

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
/// two queues touch the same chunk. It costs nothing beyond what is there anyway: the host's kernel carries out one
/// change of the address space at a time.
pub struct DaxWindow {
    /// The first byte; aligned to 2 MiB, and `size` bytes from it belong to this object alone until it is dropped.
    base: *mut u8,
    /// In bytes, a valid window size.
    size: u64,
    guard: Guard,
    scratch: Scratch,
    table: Mutex<ChunkTable>,
    counts: Counts,
}

// SAFETY: `base` is never dereferenced here and never changes; what it points at is only replaced under the lock.
unsafe impl Send for DaxWindow {}
// SAFETY: as above.
unsafe impl Sync for DaxWindow {}

/// A checked range of chunks.
#[derive(Clone, Copy)]
struct Chunks {
    first: usize,
    count: usize,
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
        let scratch = Scratch::new(size)?;
        // One chunk more than is needed always holds an aligned start; the rest is given back.
        let reserved = (size + CHUNK_SIZE) as usize;
        let start = replace(ptr::null_mut(), reserved, Backing::Nothing)?;
        let head = start.align_offset(CHUNK_SIZE as usize);
        let base = start.wrapping_add(head);
        give_back(start, head);
        give_back(base.wrapping_add(size as usize), reserved - head - size as usize);
        let table = Mutex::new(ChunkTable::new(size));
        let guard = Guard::new(base as usize..base as usize + size as usize)?;
        let window = DaxWindow { base, size, guard, scratch, table, counts: Counts::default() };
        window.punch(window.all(), libc::MAP_FIXED)?;
        Ok(window)
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
    ) -> Result<(), WindowError> {
        let result = self.try_map(moffset, foffset, len, writable, fd);
        if result.is_err() {
            self.counts.map_failed();
        }
        result
    }

    fn try_map(
        &self,
        moffset: u64,
        foffset: u64,
        len: u64,
        writable: bool,
        fd: BorrowedFd<'_>,
    ) -> Result<(), WindowError> {
        let chunks = self.chunks(moffset, len)?;
        aligned("the offset in the file", foffset)?;
        if foffset.checked_add(len).is_none_or(|end| end > i64::MAX as u64) {
            return Err(WindowError::OutOfFile { foffset, len });
        }

        let mut table = self.lock();
        let backing = Backing::File { fd: fd.as_raw_fd(), offset: foffset as i64, writable };
        if let Err(error) = replace(self.address(chunks), bytes(chunks), backing) {
            // Before Linux 6.12 a mapping that fails late (in the file system) has removed the old one already. The
            // gap must be closed at once, or something else of the process would come to lie in the window. Where the
            // old mapping is whole, this says EEXIST and does nothing.
            if self.punch(chunks, libc::MAP_FIXED_NOREPLACE).is_ok() {
                self.counts.lost(table.unmap(chunks.first, chunks.count));
            }
            return Err(WindowError::Map(error));
        }
        self.counts.mapped(table.map(chunks.first, chunks.count, foffset >> CHUNK_SHIFT, writable));
        Ok(())
    }

    /// Makes a hole of `len` bytes at `moffset`, both multiples of 2 MiB, whatever was mapped there.
    ///
    /// # Errors
    /// [`WindowError`].
    pub fn unmap(&self, moffset: u64, len: u64) -> Result<(), WindowError> {
        let chunks = self.chunks(moffset, len)?;
        let mut table = self.lock();
        self.punch(chunks, libc::MAP_FIXED).map_err(WindowError::Map)?;
        self.counts.unmapped(table.unmap(chunks.first, chunks.count));
        Ok(())
    }

    /// Makes the whole window a hole: a session with the guest's driver has ended.
    ///
    /// # Errors
    /// What the host says if it cannot.
    pub fn clear(&self) -> io::Result<()> {
        let all = self.all();
        let mut table = self.lock();
        if self.mapped_chunks() > 0 {
            self.punch(all, libc::MAP_FIXED)?;
            self.counts.cleared(table.unmap(all.first, all.count));
        }
        self.scratch.clear()
    }

    /// Chunks that are mapped now; costs one load.
    pub fn mapped_chunks(&self) -> u64 {
        self.counts.mapped_chunks()
    }

    /// The counters; takes no lock.
    pub fn counters(&self) -> WindowCounters {
        WindowCounters {
            stray_bytes: self.scratch.touched(),
            replaced_pages: self.guard.replaced(),
            ..self.counts.snapshot(self.size)
        }
    }

    fn all(&self) -> Chunks {
        Chunks { first: 0, count: (self.size / CHUNK_SIZE) as usize }
    }

    /// Makes a hole; `placement` is MAP_FIXED or MAP_FIXED_NOREPLACE, as in mmap(2).
    fn punch(&self, chunks: Chunks, placement: i32) -> io::Result<()> {
        for (at, offset, len) in
            self.scratch.pieces((chunks.first as u64) << CHUNK_SHIFT, bytes(chunks) as u64)
        {
            let backing = Backing::Hole { fd: self.scratch.fd(), offset: offset as i64, placement };
            replace(self.base.wrapping_add(at as usize), len as usize, backing)?;
        }
        Ok(())
    }

    /// Checks a range in bytes.
    fn chunks(&self, moffset: u64, len: u64) -> Result<Chunks, WindowError> {
        aligned("the offset in the window", moffset)?;
        aligned("the length", len)?;
        if len == 0 {
            return Err(WindowError::Unaligned { what: "the length", value: 0 });
        }
        match moffset.checked_add(len) {
            Some(end) if end <= self.size => {
                let (first, count) = (moffset >> CHUNK_SHIFT, len >> CHUNK_SHIFT);
                Ok(Chunks { first: first as usize, count: count as usize })
            }
            _ => Err(WindowError::OutOfWindow { moffset, len, size: self.size }),
        }
    }

    fn address(&self, chunks: Chunks) -> *mut u8 {
        self.base.wrapping_add(chunks.first << CHUNK_SHIFT)
    }

    /// The table stays right through a panic: it is changed after all that can fail.
    fn lock(&self) -> MutexGuard<'_, ChunkTable> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HostMemory for DaxWindow {
    fn host_address(&self) -> *mut u8 {
        self.base
    }

    fn size(&self) -> u64 {
        self.size
    }
}

impl Drop for DaxWindow {
    fn drop(&mut self) {
        give_back(self.base, self.size as usize);
    }
}

fn aligned(what: &'static str, value: u64) -> Result<(), WindowError> {
    if value.is_multiple_of(CHUNK_SIZE) { Ok(()) } else { Err(WindowError::Unaligned { what, value }) }
}

fn bytes(chunks: Chunks) -> usize {
    chunks.count << CHUNK_SHIFT
}

/// What stands behind a range of addresses.
#[derive(Clone, Copy)]
enum Backing {
    /// Address space alone, wherever it is free.
    Nothing,
    /// Scratch memory. `placement` is MAP_FIXED or MAP_FIXED_NOREPLACE, as in mmap(2).
    Hole { fd: RawFd, offset: i64, placement: i32 },
    /// A file, in place of what is there.
    File { fd: RawFd, offset: i64, writable: bool },
}

/// Puts `backing` behind `len` bytes at `address`. All that this module does to the address space is here and in
/// [`give_back`]; callers pass nothing but ranges of a window.
fn replace(address: *mut u8, len: usize, backing: Backing) -> io::Result<*mut u8> {
    let (protection, flags, fd, offset) = match backing {
        Backing::Nothing => {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            (libc::PROT_NONE, flags, -1, 0)
        }
        Backing::Hole { fd, offset, placement } => {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            (protection, libc::MAP_SHARED | libc::MAP_NORESERVE | placement, fd, offset)
        }
        Backing::File { fd, offset, writable } => {
            let protection = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
            (protection, libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE, fd, offset)
        }
    };
    // SAFETY: the range is either chosen by the kernel, or lies in the window that reserved it: `DaxWindow::chunks`
    // has checked it. Rust holds no reference into a window, and the guest expects it to change.
    let mapped = unsafe { libc::mmap(address.cast(), len, protection, flags, fd, offset) };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(mapped.cast()) }
}

/// Gives a range of a window back to the process's free address space.
fn give_back(address: *mut u8, len: usize) {
    if len > 0 {
        // SAFETY: the callers own the range: it is the surplus of a reservation just made, or the window being dropped,
        // whose memory slot and devices hold it by reference count and so are gone.
        unsafe { libc::munmap(address.cast(), len) };
    }
}
