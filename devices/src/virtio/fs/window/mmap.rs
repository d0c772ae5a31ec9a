//! All that a window does to the process's address space.

use std::io;
use std::os::fd::RawFd;

/// What stands behind a range of addresses.
#[derive(Clone, Copy)]
pub(super) enum Backing {
    /// Address space alone, wherever it is free.
    Nothing,
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
        Backing::Nothing => (libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0),
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
    // SAFETY: the range is either chosen by the kernel, or lies in the window that reserved it: `DaxWindow::chunks`
    // has checked it, or the table says so. Rust holds no reference into a window, and the guest expects it to change.
    let mapped = unsafe { libc::mmap(address.cast(), len, protection, flags, fd, offset) };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(mapped.cast()) }
}

/// Gives a range of a window back to the process's free address space.
pub(super) fn give_back(address: *mut u8, len: usize) {
    if len > 0 {
        // SAFETY: the callers own the range: it is the surplus of a reservation just made, or the window being dropped,
        // whose memory slot and devices hold it by reference count and so are gone.
        unsafe { libc::munmap(address.cast(), len) };
    }
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
