//! Mappings that a process keeps back for when it has no more (vm.max_map_count).
//!
//! The host refuses mmap(2) at that limit even where it would take away more than it adds, so a window that is full could
//! not be emptied: each hole is a mapping itself. A few pages that do nothing but count are given up then, which is
//! always allowed, and are taken again when there is room.

use std::io;
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering::AcqRel, Ordering::Acquire, Ordering::Release};

const PAGE: usize = super::files::PAGE as usize;
/// How many there are, of one page each.
const SPARE: usize = 64;

/// Where they are; 0 until there are any.
static START: AtomicUsize = AtomicUsize::new(0);
/// How many are left.
static LEFT: AtomicUsize = AtomicUsize::new(0);

/// Takes them, once in a process. Without room for them there are none.
pub(super) fn keep() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if let Ok(start) = map(ptr::null_mut(), SPARE * PAGE, 0, 0) {
            START.store(start, Release);
            // Those that are mapped over it count from the first on, and neighbours that are alike would be one mapping.
            (0..SPARE).filter(|index| index % 2 == 1).for_each(|index| {
                let _ = map((start + index * PAGE) as *mut u8, PAGE, libc::PROT_READ, libc::MAP_FIXED);
            });
            LEFT.store(SPARE, Release);
        }
    });
}

/// Gives one up. Async-signal-safe.
pub(super) fn give_up() -> bool {
    let taken = LEFT.fetch_update(AcqRel, Acquire, |left| left.checked_sub(1));
    taken.is_ok_and(|left| {
        let page = START.load(Acquire) + (left - 1) * PAGE;
        // SAFETY: the page is one of those that were mapped to this end, which nobody refers to.
        unsafe { libc::munmap(page as *mut libc::c_void, PAGE) == 0 }
    })
}

/// Gives up a few, for what else the process needs: threads, memory.
pub(super) fn give_up_some() {
    (0..SPARE / 4).for_each(|_| {
        give_up();
    });
}

/// Takes those again that were given up, as far as there is room.
pub(super) fn take_again() {
    loop {
        let (start, left) = (START.load(Acquire), LEFT.load(Acquire));
        if start == 0 || left == SPARE {
            return;
        }
        let page = (start + left * PAGE) as *mut u8;
        let protection = if left % 2 == 1 { libc::PROT_READ } else { libc::PROT_NONE };
        if map(page, PAGE, protection, libc::MAP_FIXED_NOREPLACE).is_err() {
            return;
        }
        if LEFT.compare_exchange(left, left + 1, AcqRel, Acquire).is_err() {
            // SAFETY: the page was just mapped here, and nobody refers to it.
            unsafe { libc::munmap(page.cast(), PAGE) };
        }
    }
}

/// Does `work` again for as long as it fails for want of a mapping and there is one to give up.
pub(super) fn with_spare<T>(mut work: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match work() {
            Err(error) if error.raw_os_error() == Some(libc::ENOMEM) && give_up() => {}
            result => return result,
        }
    }
}

fn map(address: *mut u8, len: usize, protection: i32, placement: i32) -> io::Result<usize> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | placement;
    // SAFETY: the range is either chosen by the kernel, or one of this module's own, which nobody refers to.
    let mapped = unsafe { libc::mmap(address.cast(), len, protection, flags, -1, 0) };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(mapped as usize) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Mappings within the spare pages.
    fn mappings() -> usize {
        let range = START.load(Acquire)..START.load(Acquire) + SPARE * PAGE;
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let starts = maps.lines().filter_map(|line| usize::from_str_radix(line.split('-').next()?, 16).ok());
        starts.filter(|start| range.contains(start)).count()
    }

    #[test]
    fn they_are_given_up_and_taken_again() {
        keep();
        keep();
        assert!(LEFT.load(Acquire) == SPARE && mappings() >= SPARE - 1, "the first may have a neighbour");
        let mut tries = 0;
        let result = with_spare(|| {
            tries += 1;
            if tries < 4 { Err(io::Error::from_raw_os_error(libc::ENOMEM)) } else { Ok(()) }
        });
        assert!(result.is_ok() && LEFT.load(Acquire) == SPARE - 3 && mappings() <= SPARE - 3);
        let refused = with_spare(|| Err::<(), _>(io::ErrorKind::PermissionDenied.into()));
        assert!(refused.is_err() && LEFT.load(Acquire) == SPARE - 3);
        while give_up() {}
        assert!(with_spare(|| Err::<(), _>(io::Error::from_raw_os_error(libc::ENOMEM))).is_err());
        assert_eq!(mappings(), 0);
        take_again();
        assert!(LEFT.load(Acquire) == SPARE && mappings() >= SPARE - 1);
    }
}
