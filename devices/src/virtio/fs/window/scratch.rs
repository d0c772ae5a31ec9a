//! What the guest sees where nothing is mapped: memory that belongs to no file.
//!
//! A driver that works as it should never touches such a place. One that does must not bring the VM down: KVM ends a vCPU
//! that writes to memory which the host cannot provide, and a device that copies there would be killed by a signal. So
//! holes are memory like any other, but little of it: they all show the same few chunks, again and again, which bounds
//! what a guest can take of the host beside its RAM. Nobody but the guest writes there, so it learns nothing from it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::fs::MetadataExt;

use super::CHUNK_SIZE;

/// The holes of a window take at most as many mappings when nothing is mapped. The system allows a process 65,530 of them
/// (vm.max_map_count), and the chunks that are mapped need one each.
const MOST_MAPPINGS: u64 = 256;

/// What it shows repeats after so many bytes at least, so that neighbours that become holes together are one mapping.
const LEAST_SPAN: u64 = 32 << 20;

/// A mapping that is a part of a hole: its offset in the window, its offset in the scratch memory, and its length, in
/// bytes.
pub(super) type Piece = (u64, u64, u64);

/// The memory behind a window's holes; what it shows repeats every [`Scratch::span`] bytes.
pub(super) struct Scratch {
    file: File,
    span: u64,
}

impl Scratch {
    /// The scratch memory of a window of `size` bytes; nothing is committed.
    ///
    /// # Errors
    /// ENFILE and EMFILE, if there are no descriptors.
    pub(super) fn new(size: u64) -> io::Result<Scratch> {
        let span = size.div_ceil(MOST_MAPPINGS).max(LEAST_SPAN).next_multiple_of(CHUNK_SIZE);
        // SAFETY: the name is a C string; no flag asks for anything else.
        let fd = unsafe { libc::memfd_create(c"daxvm-window-holes".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made, and nobody else owns it.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(span)?;
        Ok(Scratch { file, span })
    }

    /// The mappings that make a hole of `len` bytes at `offset` of the window, multiples of 2 MiB.
    pub(super) fn pieces(&self, offset: u64, len: u64) -> impl Iterator<Item = Piece> + use<> {
        let (span, end) = (self.span, offset + len);
        std::iter::successors(Some(offset), move |at| Some((at / span + 1) * span))
            .take_while(move |at| *at < end)
            .map(move |at| (at, at % span, (end - at).min(span - at % span)))
    }

    /// Gives back all memory that was touched; holes show zeros again.
    ///
    /// # Errors
    /// EINTR, and what else fallocate(2) has.
    pub(super) fn clear(&self) -> io::Result<()> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: fallocate(2) on a descriptor that this object owns; memory of the process is not touched.
        match unsafe { libc::fallocate(self.file.as_raw_fd(), mode, 0, self.span as i64) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Bytes that a guest has touched where nothing was mapped, as long as they take memory.
    pub(super) fn touched(&self) -> u64 {
        self.file.metadata().map_or(0, |metadata| metadata.blocks() * 512)
    }

    /// For mmap(2).
    pub(super) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::fs::window::MAX_WINDOW_SIZE;

    const CHUNK: u64 = CHUNK_SIZE;

    #[test]
    fn pieces_cover_a_hole_and_repeat() {
        let scratch = Scratch::new(8192 * CHUNK).unwrap();
        let pieces = |offset, len| scratch.pieces(offset * CHUNK, len * CHUNK).collect::<Vec<_>>();
        assert_eq!(pieces(33, 1), [(33 * CHUNK, CHUNK, CHUNK)]);
        assert_eq!(
            pieces(31, 34),
            [(31 * CHUNK, 31 * CHUNK, CHUNK), (32 * CHUNK, 0, 32 * CHUNK), (64 * CHUNK, 0, CHUNK)]
        );
        assert_eq!(pieces(0, 8192).len(), 256);
    }

    #[test]
    fn no_window_needs_too_many_mappings() {
        for size in [16 * CHUNK, 257 * CHUNK, MAX_WINDOW_SIZE] {
            let scratch = Scratch::new(size).unwrap();
            let pieces: Vec<_> = scratch.pieces(0, size).collect();
            assert!(pieces.len() as u64 <= MOST_MAPPINGS, "{size:#x}: {}", pieces.len());
            assert_eq!(pieces.iter().map(|(_, _, len)| len).sum::<u64>(), size);
        }
    }
}
