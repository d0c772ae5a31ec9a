//! The program's own code in memory: what a VM starts with is not what it runs on.
//!
//! Command line, configuration, loader and filters are most of the program, and are done with when the guest begins. Linux has
//! their pages mapped (and whatever lay beside them in the page cache), so they count as the process's memory until somebody
//! lets go of them.

use std::io;
use std::ops::Range;

const PAGE: usize = 4096;

unsafe extern "C" {
    /// Where the program's file begins in memory (GNU ld's, lld's and mold's scripts define both).
    static __executable_start: u8;
    /// Where its code ends. Nothing that can be written to lies between the two.
    static etext: u8;
}

fn range() -> Range<usize> {
    // Only the addresses are taken.
    let (start, end) = (&raw const __executable_start as usize, &raw const etext as usize);
    start..end / PAGE * PAGE
}

/// Lets go of the pages of the program's code; those that are needed come back from the page cache when they are.
///
/// # Errors
/// What madvise(2) says; all is as it was then.
pub(crate) fn let_go() -> io::Result<()> {
    let range = range();
    // SAFETY: these are pages of a file, mapped privately and never written to: what is read there next is the same.
    match unsafe { libc::madvise(range.start as *mut libc::c_void, range.len(), libc::MADV_DONTNEED) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_code_of_a_file_that_goes_and_comes_back() {
        let range = range();
        let own = let_go as *const () as usize;
        assert!(range.contains(&own) && range.start.is_multiple_of(PAGE), "{range:x?} {own:x}");
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let writable = maps.lines().any(|line| {
            let (addresses, rest) = line.split_once(' ').unwrap();
            let (start, end) = addresses.split_once('-').unwrap();
            let [start, end] = [start, end].map(|text| usize::from_str_radix(text, 16).unwrap());
            start < range.end && end > range.start && rest.as_bytes()[1] == b'w'
        });
        assert!(!writable, "{range:x?} in\n{maps}");
        let_go().unwrap();
        assert_eq!(super::range(), range);
    }
}
