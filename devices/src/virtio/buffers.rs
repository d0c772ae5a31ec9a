//! The memory of descriptor chains in the form that readv(2) and writev(2) take, so that data goes between a guest and
//! a descriptor of the host without a copy.
//!
//! Descriptors may point into a DAX window, where pages may have no file behind them any more. A system call that meets
//! one fails with EFAULT, where an access of the process itself would get a signal (`fs/window/guard.rs`).

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestMemory, GuestMemoryMmap};

use super::worker::ChainError;

/// The most vectors that a system call takes (UIO_MAXIOV).
pub(super) const MAX_VECTORS: usize = 1024;

/// Ranges of guest memory, which belong to nobody while the guest runs and so are only reached by system calls.
pub(super) struct IoVectors<'m> {
    vectors: Vec<libc::iovec>,
    /// Vectors that have been used up.
    done: usize,
    /// Bytes in those that have not.
    bytes: usize,
    memory: PhantomData<&'m GuestMemoryMmap>,
}

impl<'m> IoVectors<'m> {
    /// No memory yet.
    pub fn new() -> IoVectors<'m> {
        IoVectors { vectors: Vec::new(), done: 0, bytes: 0, memory: PhantomData }
    }

    /// Appends the device-readable part of a chain; returns its length in bytes.
    ///
    /// # Errors
    /// A buffer that is not in guest memory.
    pub fn push_readable(
        &mut self,
        memory: &'m GuestMemoryMmap,
        chain: DescriptorChain<&GuestMemoryMmap>,
    ) -> Result<usize, ChainError> {
        self.push_all(memory, chain.readable())
    }

    /// Appends the device-writable part of a chain; returns its length in bytes.
    ///
    /// # Errors
    /// As [`IoVectors::push_readable`].
    pub fn push_writable(
        &mut self,
        memory: &'m GuestMemoryMmap,
        chain: DescriptorChain<&GuestMemoryMmap>,
    ) -> Result<usize, ChainError> {
        self.push_all(memory, chain.writable())
    }

    fn push_all(
        &mut self,
        memory: &'m GuestMemoryMmap,
        mut descriptors: impl Iterator<Item = Descriptor>,
    ) -> Result<usize, ChainError> {
        let before = self.bytes;
        descriptors.try_for_each(|descriptor| self.push(memory, descriptor))?;
        Ok(self.bytes - before)
    }

    fn push(&mut self, memory: &'m GuestMemoryMmap, descriptor: Descriptor) -> Result<(), ChainError> {
        let (address, len) = (descriptor.addr(), descriptor.len());
        for slice in memory.get_slices(address, len as usize) {
            let slice = slice.map_err(|_| {
                ChainError(format!("A buffer of {len} bytes at {:#x} is not in guest memory", address.0))
            })?;
            let base = slice.ptr_guard_mut().as_ptr().cast();
            self.vectors.push(libc::iovec { iov_base: base, iov_len: slice.len() });
            self.bytes += slice.len();
        }
        Ok(())
    }

    /// Bytes that are left.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Number of vectors that are left.
    pub fn count(&self) -> usize {
        self.vectors.len() - self.done
    }

    /// Drops all but the first `bytes` bytes of what is left.
    pub fn truncate(&mut self, bytes: usize) {
        let (mut kept, mut left) = (self.done, bytes.min(self.bytes));
        self.bytes = left;
        while left > 0 {
            let vector = &mut self.vectors[kept];
            vector.iov_len = vector.iov_len.min(left);
            left -= vector.iov_len;
            kept += 1;
        }
        self.vectors.truncate(kept);
    }

    /// Drops the first `bytes` bytes, at most what is left.
    pub fn advance(&mut self, bytes: usize) {
        let mut left = bytes.min(self.bytes);
        self.bytes -= left;
        while left > 0 {
            let vector = &mut self.vectors[self.done];
            let step = vector.iov_len.min(left);
            vector.iov_base = vector.iov_base.wrapping_byte_add(step);
            vector.iov_len -= step;
            left -= step;
            self.done += usize::from(vector.iov_len == 0);
        }
    }

    /// Drops the first vector, if there is one; returns its length.
    pub fn skip_vector(&mut self) -> usize {
        let len = self.vectors.get(self.done).map_or(0, |vector| vector.iov_len);
        self.advance(len);
        len
    }

    /// Writes to `fd` at its offset, in one system call, and drops what was written; returns its length.
    ///
    /// # Errors
    /// What writev(2) says.
    pub fn write_to(&mut self, fd: BorrowedFd) -> io::Result<usize> {
        self.carry_out(|vectors| {
            // SAFETY: the vectors are ranges of guest memory (`push`), which stays mapped for 'm at least.
            unsafe { libc::writev(fd.as_raw_fd(), vectors.as_ptr(), vectors.len() as libc::c_int) }
        })
    }

    /// Reads from `fd` at its offset, in one system call, and drops what was filled; returns its length.
    ///
    /// # Errors
    /// What readv(2) says.
    pub fn read_from(&mut self, fd: BorrowedFd) -> io::Result<usize> {
        self.carry_out(|vectors| {
            // SAFETY: as in `write_to`; nobody holds a reference into guest memory, which changes at any time.
            unsafe { libc::readv(fd.as_raw_fd(), vectors.as_ptr(), vectors.len() as libc::c_int) }
        })
    }

    /// Writes to `fd` from the byte `offset` on; else as [`IoVectors::write_to`].
    ///
    /// # Errors
    /// What pwritev(2) says.
    pub fn write_at(&mut self, fd: BorrowedFd, offset: u64) -> io::Result<usize> {
        self.carry_out(|vectors| {
            let count = vectors.len() as libc::c_int;
            // SAFETY: as in `write_to`.
            unsafe { libc::pwritev(fd.as_raw_fd(), vectors.as_ptr(), count, offset as libc::off_t) }
        })
    }

    /// Reads from `fd` from the byte `offset` on; else as [`IoVectors::read_from`].
    ///
    /// # Errors
    /// What preadv(2) says.
    pub fn read_at(&mut self, fd: BorrowedFd, offset: u64) -> io::Result<usize> {
        self.carry_out(|vectors| {
            let count = vectors.len() as libc::c_int;
            // SAFETY: as in `read_from`.
            unsafe { libc::preadv(fd.as_raw_fd(), vectors.as_ptr(), count, offset as libc::off_t) }
        })
    }

    /// Fills the first vector with entropy of the host, as much of it as one system call gives, and drops what was filled;
    /// returns its length.
    ///
    /// # Errors
    /// What getrandom(2) says.
    pub fn fill_randomly(&mut self) -> io::Result<usize> {
        self.carry_out(|vectors| match vectors {
            // SAFETY: as in `read_from`.
            [first, ..] => unsafe { libc::getrandom(first.iov_base, first.iov_len, 0) },
            [] => 0,
        })
    }

    /// Has `call` transfer the first vectors, as many as a system call takes.
    fn carry_out(&mut self, call: impl FnOnce(&[libc::iovec]) -> isize) -> io::Result<usize> {
        let left = &self.vectors[self.done..];
        match call(&left[..left.len().min(MAX_VECTORS)]) {
            moved @ 0.. => {
                self.advance(moved as usize);
                Ok(moved as usize)
            }
            _ => Err(io::Error::last_os_error()),
        }
    }
}
