//! Shared mappings of files.

use std::ffi::c_void;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::ptr::{self, NonNull};

use rustix::fs::{MemfdFlags, OFlags};
use rustix::mm::{MapFlags, MsyncFlags, ProtFlags};

use crate::guest::data::{BLOCK, first_difference};
use crate::guest::{Bytes, DirectRead, Failure, GuestPath, Map};

/// A shared mapping of a part of a file, unmapped when dropped.
pub struct Mapping {
    start: NonNull<u8>,
    len: usize,
    offset: u64,
}

// SAFETY: a mapping belongs to the process, not to a thread, and all access to its bytes is by copying.
unsafe impl Send for Mapping {}
// SAFETY: as above; concurrent copies may see each other's bytes half done, which the callers' tests expect.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Makes the mapping that is asked for.
    pub fn of(map: &Map) -> Result<Mapping, Failure> {
        let file = File::options().read(true).write(map.writable).open(&map.path)?;
        Mapping::new(&file, map.offset, map.len, map.writable)
    }

    /// Maps `len` bytes of a file from `offset`.
    pub fn new(file: &File, offset: u64, len: usize, writable: bool) -> Result<Mapping, Failure> {
        let protection = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        // SAFETY: the kernel chooses the place, so no memory of ours is replaced.
        let start =
            unsafe { rustix::mm::mmap(ptr::null_mut(), len, protection, MapFlags::SHARED, file, offset)? };
        let start = NonNull::new(start.cast()).ok_or_else(|| Failure::new("mapped at address 0"))?;
        Ok(Mapping { start, len, offset })
    }

    fn at(&self, offset: u64, len: usize) -> Result<*mut u8, Failure> {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(Failure::new(format!("{len} bytes at {offset} of a mapping of {}", self.len)));
        }
        Ok(self.start.as_ptr().wrapping_add(offset))
    }

    /// Copies bytes out by touching them: a page that is not there is a SIGBUS.
    pub fn copy_to(&self, offset: u64, buf: &mut [u8]) -> Result<(), Failure> {
        let from = self.at(offset, buf.len())?;
        // SAFETY: `at` checked the range; the mapping lives as long as `self`. Others may write to the file meanwhile:
        // whatever is copied is only compared or hashed.
        unsafe { ptr::copy_nonoverlapping(from, buf.as_mut_ptr(), buf.len()) };
        Ok(())
    }

    /// Copies bytes in by touching them.
    pub fn copy_from(&self, offset: u64, bytes: &[u8]) -> Result<(), Failure> {
        let to = self.at(offset, bytes.len())?;
        // SAFETY: `at` checked the range; no reference to the mapping's bytes exists. A mapping that is not writable
        // ends the process, which is what a test that does it gets.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }

    /// Reads four bytes at each of eight offsets by one instruction, vpgatherdd.
    pub fn gather(&self, offsets: [u32; 8]) -> Result<[u32; 8], Failure> {
        for offset in offsets {
            self.at(offset.into(), 4)?;
        }
        if !is_x86_feature_detected!("avx2") {
            return Err(Failure::new("the CPU has no AVX2"));
        }
        // SAFETY: the offsets were checked, and the CPU has AVX2.
        Ok(unsafe { gather(self.start.as_ptr(), offsets) })
    }

    /// Copies bytes out through the kernel, for which a missing page is an error.
    pub fn read(&self, offset: u64, len: usize) -> Result<Bytes, Failure> {
        let from = self.at(offset, len)?;
        let carrier = carrier()?;
        let mut done = 0;
        while done < len {
            // SAFETY: the range was checked, and the slice is only handed to the kernel.
            let part = unsafe { std::slice::from_raw_parts(from.wrapping_add(done), len - done) };
            done += rustix::io::pwrite(&carrier, part, done as u64)?;
        }
        let mut bytes = vec![0; len];
        let mut done = 0;
        while done < len {
            done += rustix::io::pread(&carrier, &mut bytes[done..], done as u64)?;
        }
        Ok(Bytes(bytes))
    }

    /// Copies bytes in through the kernel.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Failure> {
        let to = self.at(offset, bytes.len())?;
        let carrier = carrier()?;
        let mut done = 0;
        while done < bytes.len() {
            done += rustix::io::pwrite(&carrier, &bytes[done..], done as u64)?;
        }
        let mut done = 0;
        while done < bytes.len() {
            // SAFETY: the range was checked, and the slice is only handed to the kernel.
            let part = unsafe { std::slice::from_raw_parts_mut(to.wrapping_add(done), bytes.len() - done) };
            done += rustix::io::pread(&carrier, part, done as u64)?;
        }
        Ok(())
    }

    /// Compares the whole with a seed's content at the same place of the file.
    pub fn verify(&self, seed: u64) -> Option<u64> {
        let mut block = [0; BLOCK];
        (0..self.len).step_by(BLOCK).find_map(|at| {
            let block = &mut block[..BLOCK.min(self.len - at)];
            self.copy_to(at as u64, block).ok()?;
            first_difference(seed, self.offset + at as u64, block)
        })
    }

    /// Writes back what was written.
    pub fn sync(&self) -> Result<(), Failure> {
        let start: *mut c_void = self.start.as_ptr().cast();
        // SAFETY: exactly the mapping made in `new`.
        Ok(unsafe { rustix::mm::msync(start, self.len, MsyncFlags::SYNC) }?)
    }
}

/// # Safety
/// The CPU has AVX2, and there are four bytes at each offset from `start`.
#[target_feature(enable = "avx2")]
unsafe fn gather(start: *const u8, offsets: [u32; 8]) -> [u32; 8] {
    use std::arch::x86_64::{_mm256_i32gather_epi32, _mm256_loadu_si256, _mm256_storeu_si256};
    let mut found = [0; 8];
    // SAFETY: as the caller says; the arrays are as large as a vector.
    unsafe {
        let offsets = _mm256_loadu_si256(offsets.as_ptr().cast());
        _mm256_storeu_si256(found.as_mut_ptr().cast(), _mm256_i32gather_epi32::<1>(start.cast(), offsets));
    }
    found
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `new`, of which nothing refers to any byte.
        if let Err(errno) = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) } {
            eprintln!("munmap: {errno}");
        }
    }
}

/// Anonymous memory as a file: what bytes pass through when the kernel does the copying.
fn carrier() -> Result<OwnedFd, Failure> {
    Ok(rustix::fs::memfd_create(c"carrier", MemfdFlags::CLOEXEC)?)
}

/// Reads a file with O_DIRECT into a mapping.
pub fn direct_read(read: &DirectRead, into: &Mapping) -> Result<usize, Failure> {
    let to = into.at(read.at, read.len)?;
    let file = open_direct(&read.path)?;
    // SAFETY: the range was checked, and the slice is only handed to the kernel.
    let buf = unsafe { std::slice::from_raw_parts_mut(to, read.len) };
    Ok(rustix::io::pread(file, buf, read.offset)?)
}

fn open_direct(path: &GuestPath) -> Result<File, Failure> {
    Ok(File::options().read(true).custom_flags(OFlags::DIRECT.bits() as i32).open(path)?)
}
