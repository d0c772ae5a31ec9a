//! Ranges of guest-physical addresses in user space, accessed with instructions of a chosen width.

use std::arch::asm;
use std::fs::File;
use std::ptr::{self, NonNull};

use rustix::mm::{MapFlags, ProtFlags};

use crate::guest::Failure;

/// The widths that the processor accesses memory with, in bytes.
pub const WIDTHS: [usize; 4] = [1, 2, 4, 8];

/// A mapped range: a BAR, or what /dev/mem shows.
pub struct Io {
    start: NonNull<u8>,
    len: usize,
}

impl Io {
    /// Maps `len` bytes of a file of the kernel that stands for memory, from `offset`.
    pub fn map(file: &File, offset: u64, len: usize) -> Result<Io, Failure> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the place, so no memory of ours is replaced.
        let start =
            unsafe { rustix::mm::mmap(ptr::null_mut(), len, protection, MapFlags::SHARED, file, offset)? };
        let start = NonNull::new(start.cast()).ok_or_else(|| Failure::new("mapped at address 0"))?;
        Ok(Io { start, len })
    }

    /// Maps guest-physical memory that is not RAM. The kernel has to be told `iomem=relaxed`.
    pub fn physical(address: u64, len: usize) -> Result<Io, Failure> {
        let memory = File::options().read(true).write(true).open("/dev/mem")?;
        Io::map(&memory, address, len).map_err(|failure| failure.within(format_args!("{address:#x}")))
    }

    /// Bytes of the range.
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Reads `width` bytes with one instruction.
    pub fn read(&self, offset: u64, width: usize) -> Result<u64, Failure> {
        let at = self.at(offset, width)?;
        let value: u64;
        // SAFETY: `at` has checked the range, which is mapped as long as `self` lives. Nothing that Rust knows of is there.
        unsafe {
            match width {
                1 => asm!("movzx {0:e}, byte ptr [{1}]", out(reg) value, in(reg) at, options(nostack)),
                2 => asm!("movzx {0:e}, word ptr [{1}]", out(reg) value, in(reg) at, options(nostack)),
                4 => asm!("mov {0:e}, dword ptr [{1}]", out(reg) value, in(reg) at, options(nostack)),
                _ => asm!("mov {0}, qword ptr [{1}]", out(reg) value, in(reg) at, options(nostack)),
            }
        }
        Ok(value)
    }

    /// Writes the lowest `width` bytes of `value` with one instruction.
    pub fn write(&self, offset: u64, width: usize, value: u64) -> Result<(), Failure> {
        let at = self.at(offset, width)?;
        // SAFETY: as in `read`.
        unsafe {
            match width {
                1 => asm!("mov byte ptr [{0}], {1}", in(reg) at, in(reg_byte) value as u8, options(nostack)),
                2 => asm!("mov word ptr [{0}], {1:x}", in(reg) at, in(reg) value, options(nostack)),
                4 => asm!("mov dword ptr [{0}], {1:e}", in(reg) at, in(reg) value, options(nostack)),
                _ => asm!("mov qword ptr [{0}], {1}", in(reg) at, in(reg) value, options(nostack)),
            }
        }
        Ok(())
    }

    /// Writes bytes, one at a time.
    pub fn write_bytes(&self, offset: u64, bytes: &[u8]) -> Result<(), Failure> {
        (offset..).zip(bytes).try_for_each(|(at, byte)| self.write(at, 1, u64::from(*byte)))
    }

    /// Reads bytes, one at a time.
    pub fn read_bytes(&self, offset: u64, len: u64) -> Result<Vec<u8>, Failure> {
        (offset..offset + len).map(|at| Ok(self.read(at, 1)? as u8)).collect()
    }

    fn at(&self, offset: u64, width: usize) -> Result<*mut u8, Failure> {
        let fits = usize::try_from(offset)
            .ok()
            .filter(|offset| offset.checked_add(width).is_some_and(|end| end <= self.len));
        let outside = || Failure::new(format!("{width} bytes at {offset:#x} of {:#x}", self.len));
        Ok(self.start.as_ptr().wrapping_add(fits.ok_or_else(outside)?))
    }
}

impl Drop for Io {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `map`; no reference into it exists.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// Does `work`, which must not allocate, in a process of its own. Returns the number of the signal that ended it, 0 if it
/// ended by itself.
pub fn signal_of_child(work: impl FnOnce() -> bool) -> Result<u64, Failure> {
    // SAFETY: the child has this thread alone, and calls nothing that could wait for another one.
    let child = match unsafe { libc::fork() } {
        -1 => return Err(std::io::Error::last_os_error().into()),
        0 => {
            let is_done = work();
            // SAFETY: it does not return.
            unsafe { libc::_exit(i32::from(!is_done)) }
        }
        child => child,
    };
    let mut status = 0;
    // SAFETY: `status` lives through the call.
    match unsafe { libc::waitpid(child, &mut status, 0) } {
        -1 => Err(std::io::Error::last_os_error().into()),
        _ => Ok(if libc::WIFSIGNALED(status) { libc::WTERMSIG(status) as u64 } else { 0 }),
    }
}

/// Access to I/O ports.
pub struct Ports(());

impl Ports {
    /// Asks the kernel for all ports.
    pub fn open() -> Result<Ports, Failure> {
        // SAFETY: iopl(2) touches no memory.
        match unsafe { libc::iopl(3) } {
            0 => Ok(Ports(())),
            _ => Err(std::io::Error::last_os_error().into()),
        }
    }

    /// Reads 1, 2 or 4 bytes.
    pub fn read(&self, port: u16, width: usize) -> u32 {
        let value: u32;
        // SAFETY: whoever has `self` may do so; the ports that are used are those of PCI's configuration mechanism.
        unsafe {
            match width {
                1 => {
                    asm!("in al, dx", "movzx eax, al", in("dx") port, out("eax") value, options(nomem, nostack))
                }
                2 => {
                    asm!("in ax, dx", "movzx eax, ax", in("dx") port, out("eax") value, options(nomem, nostack))
                }
                _ => asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack)),
            }
        }
        value
    }

    /// Writes 1, 2 or 4 bytes.
    pub fn write(&self, port: u16, width: usize, value: u32) {
        // SAFETY: as in `read`.
        unsafe {
            match width {
                1 => asm!("out dx, al", in("dx") port, in("al") value as u8, options(nomem, nostack)),
                2 => asm!("out dx, ax", in("dx") port, in("ax") value as u16, options(nomem, nostack)),
                _ => asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack)),
            }
        }
    }
}

impl Drop for Ports {
    fn drop(&mut self) {
        // SAFETY: iopl(2) touches no memory.
        unsafe { libc::iopl(0) };
    }
}
