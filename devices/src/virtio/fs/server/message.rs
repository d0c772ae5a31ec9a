//! A request and its reply: what is in a chain of descriptors, read and written once, with every length checked.

use std::ffi::CStr;
use std::io::{self, Read, Write};
use std::mem::size_of;

use fuse_backend_rs::abi::fuse_abi::{InHeader, OutHeader, WriteIn};
use fuse_backend_rs::api::filesystem::{ZeroCopyReader, ZeroCopyWriter};
use fuse_backend_rs::file_buf::FileVolatileSlice;
use fuse_backend_rs::file_traits::FileReadWriteVolatile;
use vm_memory::ByteValued;

use super::buffers::Buffers;
use super::identity::NOBODY;
use super::init::MAX_WRITE;
use crate::virtio::fs::abi::EXT_GROUPS;
use crate::virtio::fs::inodes::host_node;

/// The longest name of a file, in bytes (NAME_MAX).
pub(super) const NAME_MAX: usize = 255;

/// The longest request, in bytes: a WRITE. A chain may be 4 GiB long, of the same memory again and again, and to go through
/// that would keep a queue's thread, and so a reset and the VM's end, for minutes.
const MAX_LENGTH: usize = size_of::<InHeader>() + size_of::<WriteIn>() + MAX_WRITE as usize;

/// A buffer for one name and its NUL.
pub(super) type NameBuffer = [u8; NAME_MAX + 1];

/// An error for the guest.
pub(super) fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

/// A request from the guest. Its memory may change while it is read, so nothing is read twice.
pub(super) struct Request<'m> {
    /// The header; `len` has been checked against the chain, `nodeid` is the library's.
    pub(super) header: InHeader,
    /// Whether the node id that the client gave is that of a DAX inode.
    pub(super) dax: bool,
    body: Buffers<'m>,
    /// Bytes of the body that are not yet read.
    left: usize,
    /// Bytes of the extensions that follow the body and are not yet read.
    extensions: usize,
}

impl<'m> Request<'m> {
    /// Reads the header. `None` if there is none: then there is nothing to reply to either.
    pub(super) fn parse(mut body: Buffers<'m>) -> Option<Request<'m>> {
        let mut header = InHeader::default();
        body.read_exact(header.as_mut_slice()).ok()?;
        // `total_extlen`, in units of 8 bytes; the library's header is of an older protocol.
        let extensions = usize::from(header.padding as u16) * 8;
        let left = (header.len as usize).saturating_sub(size_of::<InHeader>() + extensions);
        let dax;
        (header.nodeid, dax) = host_node(header.nodeid);
        Some(Request { header, dax, body, left, extensions })
    }

    /// Checks that the request is as long as it says, and no longer than [`MAX_LENGTH`].
    ///
    /// # Errors
    /// EINVAL if not.
    pub(super) fn check_length(&self) -> io::Result<()> {
        let lengths = size_of::<InHeader>() + self.extensions..=MAX_LENGTH;
        let is_possible = lengths.contains(&(self.header.len as usize));
        let all_there = self.left + self.extensions <= self.body.left();
        if is_possible && all_there { Ok(()) } else { Err(errno(libc::EINVAL)) }
    }

    /// Bytes of the body that are not yet read.
    pub(super) fn left(&self) -> usize {
        self.left
    }

    /// Reads a structure.
    ///
    /// # Errors
    /// EINVAL if the request is too short.
    pub(super) fn arg<T: ByteValued>(&mut self) -> io::Result<T> {
        self.left = self.left.checked_sub(size_of::<T>()).ok_or_else(|| errno(libc::EINVAL))?;
        let mut arg = T::zeroed();
        self.body.read_exact(arg.as_mut_slice()).map_err(|_| errno(libc::EINVAL))?;
        Ok(arg)
    }

    /// Reads the rest into the start of `buffer`.
    ///
    /// # Errors
    /// `too_long` if it does not fit.
    pub(super) fn rest<'b>(&mut self, buffer: &'b mut [u8], too_long: i32) -> io::Result<&'b [u8]> {
        let buffer = buffer.get_mut(..self.left).ok_or_else(|| errno(too_long))?;
        self.body.read_exact(buffer).map_err(|_| errno(libc::EINVAL))?;
        self.left = 0;
        Ok(buffer)
    }

    /// Leaves the rest out.
    pub(super) fn skip_rest(&mut self) {
        self.body.use_up(std::mem::take(&mut self.left));
    }

    /// Reads the rest as the name of a directory's entry.
    ///
    /// # Errors
    /// As [`check_name`] says; ENAMETOOLONG and EINVAL also if it is no string.
    pub(super) fn name<'b>(&mut self, buffer: &'b mut NameBuffer) -> io::Result<&'b CStr> {
        check_name(string(self.rest(buffer, libc::ENAMETOOLONG)?)?)
    }

    /// Reads the extensions for a supplementary group of the user: the parent directory's, if the user is a member
    /// (fs/fuse/dir.c, get_create_supp_group). The body must have been read.
    ///
    /// # Errors
    /// EINVAL if they are not what they say, or there are more groups than one.
    pub(super) fn supplementary_group(&mut self) -> io::Result<Option<u32>> {
        const HEADER: usize = 2 * size_of::<u32>();
        self.left += std::mem::take(&mut self.extensions);
        let mut group = None;
        while self.left > 0 {
            let [size, kind] = self.arg::<[u32; 2]>()?;
            let body = (size as usize).checked_sub(HEADER).filter(|body| body % 8 == 0 && *body <= self.left);
            let body = body.ok_or_else(|| errno(libc::EINVAL))?;
            match kind {
                EXT_GROUPS if body == 8 && group.is_none() => {
                    let [count, first] = self.arg::<[u32; 2]>()?;
                    let is_one = count == 1 && first != NOBODY;
                    group = Some(is_one.then_some(first).ok_or_else(|| errno(libc::EINVAL))?);
                }
                _ => return Err(errno(libc::EINVAL)),
            }
        }
        Ok(group)
    }

    /// The payload of a write.
    pub(super) fn data(&mut self) -> Payload<'_, 'm> {
        Payload(&mut self.body)
    }
}

/// Takes `bytes` as one string that ends with its only NUL.
///
/// # Errors
/// EINVAL if it is something else.
pub(super) fn string(bytes: &[u8]) -> io::Result<&CStr> {
    CStr::from_bytes_with_nul(bytes).map_err(|_| errno(libc::EINVAL))
}

/// Takes `bytes` as two strings, one after the other.
///
/// # Errors
/// EINVAL if they are something else.
pub(super) fn two_strings(bytes: &[u8]) -> io::Result<(&CStr, &CStr)> {
    let first = CStr::from_bytes_until_nul(bytes).map_err(|_| errno(libc::EINVAL))?;
    Ok((first, string(&bytes[first.count_bytes() + 1..])?))
}

/// Checks that a name is one of a directory's own entries, so that it cannot lead anywhere else on the host: the
/// server looks nowhere but in the share only because of this and because it never follows symbolic links.
///
/// # Errors
/// EINVAL for the empty name, `.`, `..`, and names with a slash; ENAMETOOLONG for more than 255 bytes.
pub(super) fn check_name(name: &CStr) -> io::Result<&CStr> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(errno(libc::EINVAL)),
        bytes if bytes.contains(&b'/') => Err(errno(libc::EINVAL)),
        bytes if bytes.len() > NAME_MAX => Err(errno(libc::ENAMETOOLONG)),
        _ => Ok(name),
    }
}

/// The payload of a write, which goes from guest memory to the file without a copy.
pub(super) struct Payload<'r, 'm>(&'r mut Buffers<'m>);

impl ZeroCopyReader for Payload<'_, '_> {
    fn read_to(&mut self, f: &mut dyn FileReadWriteVolatile, count: usize, off: u64) -> io::Result<usize> {
        match self.0.write_to(f, count, off) {
            Err(error) if is_missing(&error) => {
                let mut bytes = vec![0; count];
                let read = self.0.read(&mut bytes)?;
                // SAFETY: the slice refers to `bytes`, which lives through the call and is used by nobody else.
                let slice = unsafe { FileVolatileSlice::from_mut_slice(&mut bytes[..read]) };
                f.write_at_volatile(slice, off)
            }
            result => result,
        }
    }
}

impl Read for Payload<'_, '_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

/// Where the reply goes. Nothing is written before all of it is known to fit, so that an error can always follow.
pub(super) struct Reply<'m> {
    writer: Buffers<'m>,
    unique: u64,
}

impl<'m> Reply<'m> {
    /// A reply to the request with this number.
    pub(super) fn new(writer: Buffers<'m>, unique: u64) -> Reply<'m> {
        Reply { writer, unique }
    }

    /// Replies success with the given parts, one after the other; returns the reply's length in bytes.
    ///
    /// # Errors
    /// EINVAL if the guest has left too little room, in which case nothing was written.
    pub(super) fn send(&mut self, parts: &[&[u8]]) -> io::Result<u32> {
        let len = parts.iter().fold(size_of::<OutHeader>(), |len, part| len + part.len());
        if len > self.writer.left() {
            return Err(errno(libc::EINVAL));
        }
        self.header(len, 0)?;
        for part in parts {
            self.writer.write_all(part)?;
        }
        Ok(len as u32)
    }

    /// Replies success and nothing else.
    ///
    /// # Errors
    /// As [`Reply::send`].
    pub(super) fn empty(&mut self) -> io::Result<u32> {
        self.send(&[])
    }

    /// Replies success with one structure.
    ///
    /// # Errors
    /// As [`Reply::send`].
    pub(super) fn object<T: ByteValued>(&mut self, object: &T) -> io::Result<u32> {
        self.send(&[object.as_slice()])
    }

    /// Replies an error; returns 0 if the guest has left no room even for that.
    pub(super) fn error(&mut self, error: &io::Error) -> u32 {
        let code = error.raw_os_error().unwrap_or(libc::EIO);
        if self.writer.left() < size_of::<OutHeader>() {
            return 0;
        }
        self.header(size_of::<OutHeader>(), -code).map_or(0, |()| size_of::<OutHeader>() as u32)
    }

    /// Splits off the part of the reply that follows the header, to be filled before [`Reply::finish`].
    ///
    /// # Errors
    /// EINVAL if there is no room for a header.
    pub(super) fn body(&mut self) -> io::Result<Body<'m>> {
        self.writer.split_off(size_of::<OutHeader>()).map(Body).ok_or_else(|| errno(libc::EINVAL))
    }

    /// Replies success after `written` bytes of the body.
    ///
    /// # Errors
    /// EINVAL if there is no room for a header.
    pub(super) fn finish(&mut self, written: usize) -> io::Result<u32> {
        let len = size_of::<OutHeader>() + written;
        self.header(len, 0)?;
        Ok(len as u32)
    }

    fn header(&mut self, len: usize, error: i32) -> io::Result<()> {
        let header = OutHeader { len: len as u32, error, unique: self.unique };
        self.writer.write_all(header.as_slice()).map_err(|_| errno(libc::EINVAL))
    }
}

/// Whether the host's kernel could not copy to or from guest memory: it lies in a window, where the host has taken a page
/// away. A copy by the device itself gets over that (window/guard.rs).
fn is_missing(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EFAULT)
}

/// The body of a reply, which goes from the file to guest memory without a copy.
pub(super) struct Body<'m>(Buffers<'m>);

impl ZeroCopyWriter for Body<'_> {
    fn write_from(&mut self, f: &mut dyn FileReadWriteVolatile, count: usize, off: u64) -> io::Result<usize> {
        if count > self.0.left() {
            return Err(errno(libc::EINVAL));
        }
        match self.0.read_from(f, count, off) {
            Err(error) if is_missing(&error) => {
                let mut bytes = vec![0; count];
                // SAFETY: the slice refers to `bytes`, which lives through the call and is used by nobody else.
                let read =
                    f.read_at_volatile(unsafe { FileVolatileSlice::from_mut_slice(&mut bytes) }, off)?;
                self.0.write_all(&bytes[..read]).map(|()| read)
            }
            result => result,
        }
    }

    fn available_bytes(&self) -> usize {
        self.0.left()
    }
}

impl Write for Body<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Body<'_> {
    /// Bytes written so far.
    pub(super) fn written(&self) -> usize {
        self.0.done()
    }
}
