//! All that a window does to the process's address space.

use std::io;
use std::ops::Range;
use std::os::fd::RawFd;
use std::ptr;

use rustix::rand::{GetRandomFlags, getrandom};

use super::CHUNK_SIZE;

/// Where windows are in the address space. For what others map the host takes the highest place that is free below the stack,
/// or at the most 5/6 of the address space below its end, at 21 TiB; with `vm.legacy_va_layout` the first one above 42 TiB
/// (arch/x86/mm/mmap.c, Linux 6.12): not one in here, even while a window has a gap.
const PLACES: Range<u64> = 32 << 40..40 << 40;

/// How many places are tried; each may be taken by another window.
const TRIES: usize = 64;

/// What stands behind a range of addresses.
#[derive(Clone, Copy)]
pub(super) enum Backing {
    /// Nothing that can be accessed, where nothing is mapped.
    Gap,
    /// Scratch memory. `placement` is MAP_FIXED or MAP_FIXED_NOREPLACE, as in mmap(2).
    Hole { fd: RawFd, offset: i64, placement: i32 },
    /// A file, in place of what is there.
    File { fd: RawFd, offset: i64, writable: bool },
    /// Zeros that can only be read, in place of what is there; they take no memory.
    Zeros,
    /// Zeros that can be written to, in place of what is there.
    Blank,
    /// A copy of a file's pages that nobody else sees, in place of what is there; made when it is written to.
    Copy { fd: RawFd, offset: i64 },
}

/// Puts `backing` behind `len` bytes at `address`. Callers pass nothing but ranges of a window.
pub(super) fn replace(address: *mut u8, len: usize, backing: Backing) -> io::Result<*mut u8> {
    const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;
    const PRIVATE: i32 = libc::MAP_PRIVATE | libc::MAP_FIXED;
    let (protection, flags, fd, offset) = match backing {
        Backing::Gap => {
            const NEW: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
            (libc::PROT_NONE, NEW, -1, 0)
        }
        Backing::Hole { fd, offset, placement } => (READ_WRITE, libc::MAP_SHARED | placement, fd, offset),
        Backing::File { fd, offset, writable } => {
            let protection = if writable { READ_WRITE } else { libc::PROT_READ };
            (protection, libc::MAP_SHARED | libc::MAP_FIXED, fd, offset)
        }
        Backing::Zeros => (libc::PROT_READ, PRIVATE | libc::MAP_ANONYMOUS, -1, 0),
        Backing::Blank => (READ_WRITE, PRIVATE | libc::MAP_ANONYMOUS, -1, 0),
        Backing::Copy { fd, offset } => (READ_WRITE, PRIVATE, fd, offset),
    };
    let flags = flags | libc::MAP_NORESERVE;
    // SAFETY: the range is either free, or lies in the window that reserved it: `DaxWindow::chunks` has checked it, or the
    // table says so. Rust holds no reference into a window, and the guest expects it to change.
    let mapped = unsafe { libc::mmap(address.cast(), len, protection, flags, fd, offset) };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(mapped.cast()) }
}

/// Reserves `len` bytes of address space, from a multiple of a chunk's size on, at a random place among [`PLACES`].
pub(super) fn reserve(len: u64) -> io::Result<*mut u8> {
    let chunks = (PLACES.end - PLACES.start - len) / CHUNK_SIZE;
    for _ in 0..TRIES {
        let mut random = [0; 8];
        getrandom(&mut random, GetRandomFlags::empty())?;
        let place = PLACES.start + u64::from_ne_bytes(random) % chunks * CHUNK_SIZE;
        match replace(ptr::without_provenance_mut(place as usize), len as usize, Backing::Gap) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => continue,
            result => return result,
        }
    }
    Err(io::Error::from_raw_os_error(libc::ENOMEM))
}

/// Gives a window's range back to the process's free address space.
pub(super) fn give_back(address: *mut u8, len: usize) {
    // SAFETY: the window is being dropped, whose memory slot and devices hold it by reference count and so are gone.
    unsafe { libc::munmap(address.cast(), len) };
}

/// Notes in `pages` which pages from `address` on are in the page cache, one byte a page, as mincore(2) does. It says so of
/// what is mapped now, whatever that is.
///
/// # Errors
/// EAGAIN where the host is short of memory.
pub(super) fn resident(address: *mut u8, pages: &mut [u8]) -> io::Result<()> {
    const PAGE: usize = super::files::PAGE as usize;
    // SAFETY: the range lies in a window; the call writes one byte for each of its pages, and as many are there.
    match unsafe { libc::mincore(address.cast(), pages.len() * PAGE, pages.as_mut_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether the host can make the page at `address` present, as an access to it would have it do. `None` where the host
/// cannot be asked (before Linux 5.14).
///
/// For a write, a page of a hole in the file gets its block, as it would by the write.
pub(super) fn is_there(address: *mut u8, len: usize, write: bool) -> Option<bool> {
    let advice = if write { libc::MADV_POPULATE_WRITE } else { libc::MADV_POPULATE_READ };
    // SAFETY: the range lies in a window; populating changes nothing that is mapped.
    if unsafe { libc::madvise(address.cast(), len, advice) } == 0 {
        return Some(true);
    }
    match io::Error::last_os_error().raw_os_error() {
        // An advice that the kernel does not know.
        Some(libc::EINVAL) => None,
        // The host is short of memory, or was interrupted: nothing is known of the page.
        Some(libc::ENOMEM | libc::EAGAIN | libc::EINTR) => Some(true),
        _ => Some(false),
    }
}
