//! Memory whose guest-physical address is known.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::ptr::{self, NonNull};
use std::sync::atomic::{Ordering, fence};

use rustix::mm::{MapFlags, ProtFlags};

use crate::guest::Failure;

/// Bytes of [`DmaMemory`]: a huge page.
pub const SIZE: u64 = 2 << 20;

/// Entries of /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst).
const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;
const PAGE: u64 = 4096;

/// A huge page, which is one piece and which the kernel leaves where it is.
pub struct DmaMemory {
    start: NonNull<u8>,
    physical: u64,
}

impl DmaMemory {
    /// Has the kernel set huge pages aside.
    pub fn reserve(pages: usize) -> Result<(), Failure> {
        Ok(fs::write("/proc/sys/vm/nr_hugepages", pages.to_string())?)
    }

    /// Takes one of them.
    pub fn new() -> Result<DmaMemory, Failure> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::HUGETLB | MapFlags::POPULATE | MapFlags::LOCKED;
        // SAFETY: the kernel chooses the place, so no memory of ours is replaced.
        let start = unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), SIZE as usize, protection, flags)? };
        let start = NonNull::new(start.cast::<u8>()).ok_or_else(|| Failure::new("mapped at address 0"))?;
        let mut entry = [0; 8];
        let page = start.as_ptr() as u64 / PAGE;
        File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, page * 8)?;
        let entry = u64::from_le_bytes(entry);
        let physical = (entry & FRAME) * PAGE;
        if entry & PRESENT == 0 || physical == 0 || !physical.is_multiple_of(SIZE) {
            return Err(Failure::new(format!("no huge page: the page map says {entry:#x}")));
        }
        Ok(DmaMemory { start, physical })
    }

    /// The guest-physical address of a byte.
    pub fn physical(&self, offset: u64) -> u64 {
        self.physical + offset
    }

    /// Copies bytes in. What was written before is there for the device first.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        fence(Ordering::SeqCst);
        let to = self.at(offset, bytes.len());
        // SAFETY: `at` has checked the range; no reference into it exists, and the device writes when it likes.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        fence(Ordering::SeqCst);
    }

    /// Fills a range.
    pub fn fill(&self, offset: u64, len: usize, byte: u8) {
        // SAFETY: as in `write`.
        unsafe { ptr::write_bytes(self.at(offset, len), byte, len) };
    }

    /// Copies bytes out.
    pub fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        fence(Ordering::SeqCst);
        let mut bytes = vec![0; len];
        // SAFETY: as in `write`.
        unsafe { ptr::copy_nonoverlapping(self.at(offset, len), bytes.as_mut_ptr(), len) };
        bytes
    }

    /// A number that the device may write meanwhile.
    pub fn load(&self, offset: u64) -> u16 {
        // SAFETY: as in `write`; `offset` is even, and so is the start.
        let value = unsafe { self.at(offset & !1, 2).cast::<u16>().read_volatile() };
        fence(Ordering::SeqCst);
        value
    }

    /// # Panics
    /// When the range is not in the memory: a mistake of the attempt.
    fn at(&self, offset: u64, len: usize) -> *mut u8 {
        assert!(offset + len as u64 <= SIZE, "{len} bytes at {offset:#x} are not in the memory");
        self.start.as_ptr().wrapping_add(offset as usize)
    }
}

impl Drop for DmaMemory {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `new`; no reference into it exists.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), SIZE as usize) };
    }
}
