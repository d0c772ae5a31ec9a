//! Which pages of a file are in the host's page cache.
//!
//! cachestat(2) (Linux 6.5) counts them in a microsecond, cold or warm; mincore(2) names them, which takes some ten
//! microseconds for a chunk. Both are for those who could change the file: Linux hides from others what is cached of it,
//! since that tells who reads it. mincore(2) does so by saying that all is (Linux 5.2).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::files::PAGE;

/// cachestat(2) has this number on all architectures that the libc crate knows it for, and on x86_64.
const SYS_CACHESTAT: libc::c_long = 451;

/// File systems whose files have their pages in the files of another one, so that they seem to have none: overlayfs,
/// eCryptfs, FUSE.
const STACKED: [i64; 3] = [0x794c_7630, 0xf15f, 0x6573_5546];

/// struct cachestat_range of linux/mman.h.
#[repr(C)]
struct Range {
    offset: u64,
    len: u64,
}

/// struct cachestat of linux/mman.h.
#[repr(C)]
#[derive(Default)]
struct Stat {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// How much of a part of a file is cached.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Cached {
    /// Nothing.
    Nothing,
    /// All of it.
    All,
    /// mincore(2) would have to tell.
    Unknown,
}

/// How much of `len` bytes at `offset` of a file is cached, as far as cachestat(2) tells.
pub(super) fn cached(fd: BorrowedFd<'_>, offset: u64, len: u64) -> Cached {
    match cached_pages(fd, offset, len) {
        Ok(0) if !is_stacked(fd) => Cached::Nothing,
        Ok(pages) if pages >= len.div_ceil(PAGE) => Cached::All,
        _ => Cached::Unknown,
    }
}

fn cached_pages(fd: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<u64> {
    let (range, mut stat) = (Range { offset, len }, Stat::default());
    // SAFETY: both structures are the kernel's and live through the call, which reads the one and writes the other.
    match unsafe { libc::syscall(SYS_CACHESTAT, fd.as_raw_fd(), &range, &mut stat, 0) } {
        0 => Ok(stat.cached),
        _ => Err(io::Error::last_os_error()),
    }
}

fn is_stacked(fd: BorrowedFd<'_>) -> bool {
    rustix::fs::fstatfs(fd).is_ok_and(|of| STACKED.contains(&of.f_type))
}

/// Whether mincore(2) says the truth about a file to somebody who neither owns it nor has it open for writing.
pub(super) fn is_told(fd: BorrowedFd<'_>) -> bool {
    let flags = libc::AT_EMPTY_PATH | libc::AT_EACCESS;
    // By system call (Linux 5.8), because the C library's function may look at another user's rights.
    // SAFETY: the path is a literal with its NUL, and nothing is written to.
    unsafe { libc::syscall(libc::SYS_faccessat2, fd.as_raw_fd(), c"".as_ptr(), libc::W_OK, flags) == 0 }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::virtio::fs::testing::directory_with_flags;

    #[test]
    fn it_is_told_how_much_is_cached() {
        let Some(directory) = directory_with_flags() else { return };
        let file = tempfile::tempfile_in(directory.path()).unwrap();
        file.set_len(20 * PAGE).unwrap();
        if cached_pages(file.as_fd(), 0, 1).is_err_and(|error| error.raw_os_error() == Some(libc::ENOSYS)) {
            return skipped!("no cachestat(2) here");
        }
        file.write_all_at(&[1; 8 * PAGE as usize + 1], 0).unwrap();
        let tell = |offset, len| cached(file.as_fd(), offset, len);
        assert_eq!(tell(0, 8 * PAGE), Cached::All);
        assert_eq!(tell(4 * PAGE, 4 * PAGE + 1), Cached::All);
        assert_eq!(tell(0, 20 * PAGE), Cached::Unknown);
        assert_eq!(tell(16 * PAGE, 4 * PAGE), Cached::Nothing);
        assert!(is_told(file.as_fd()));
    }
}
