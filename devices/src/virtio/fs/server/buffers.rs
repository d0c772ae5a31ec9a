//! The buffers of a chain in one direction: the bytes of a request, or the room for its reply.
//!
//! Short chains, such as those of SETUPMAPPING and REMOVEMAPPING, take no memory of the heap.

use std::io::{self, Read, Write};

use fuse_backend_rs::file_buf::FileVolatileSlice;
use fuse_backend_rs::file_traits::FileReadWriteVolatile;
use smallvec::SmallVec;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestMemory, GuestMemoryMmap, VolatileSlice};

use crate::virtio::worker::ChainError;

/// Buffers that a short chain has at most.
const FEW: usize = 8;

/// Buffers in guest memory, of which those in front are used up. They may lie in a window: see `window/guard.rs`.
#[derive(Clone)]
pub(super) struct Buffers<'m> {
    slices: SmallVec<[VolatileSlice<'m>; FEW]>,
    /// Slices that are used up.
    first: usize,
    /// Bytes that are used up.
    done: usize,
    /// Bytes that are not, and may be.
    left: usize,
}

impl<'m> Buffers<'m> {
    /// The buffers of these descriptors.
    ///
    /// # Errors
    /// [`ChainError`] if one is not in guest memory.
    pub(super) fn new(
        memory: &'m GuestMemoryMmap,
        descriptors: impl Iterator<Item = Descriptor>,
    ) -> Result<Buffers<'m>, ChainError> {
        let mut buffers = Buffers { slices: SmallVec::new(), first: 0, done: 0, left: 0 };
        for descriptor in descriptors {
            for slice in memory.get_slices(descriptor.addr(), descriptor.len() as usize) {
                let slice = slice.map_err(|error| {
                    ChainError(format!("a request's buffer is not in guest memory: {error}"))
                })?;
                buffers.left += slice.len();
                buffers.slices.push(slice);
            }
        }
        Ok(buffers)
    }

    /// Bytes that are not used up.
    pub(super) fn left(&self) -> usize {
        self.left
    }

    /// Bytes that are used up.
    pub(super) fn done(&self) -> usize {
        self.done
    }

    /// Splits off what follows the next `at` bytes; `None` if there are fewer.
    pub(super) fn split_off(&mut self, at: usize) -> Option<Buffers<'m>> {
        let mut rest = self.clone();
        rest.left = self.left.checked_sub(at)?;
        rest.skip(at);
        rest.done = 0;
        self.left = at;
        Some(rest)
    }

    /// Writes the next `count` bytes, or as many as there are, to a file from `offset` on, in one system call; they are
    /// used up as far as they were written.
    ///
    /// # Errors
    /// What the host says.
    pub(super) fn write_to(
        &mut self,
        file: &mut dyn FileReadWriteVolatile,
        count: usize,
        offset: u64,
    ) -> io::Result<usize> {
        self.transfer(count, |vectors| file.write_vectored_at_volatile(vectors, offset))
    }

    /// Fills the next `count` bytes, or as many as there are, from a file from `offset` on; else the same.
    ///
    /// # Errors
    /// What the host says.
    pub(super) fn read_from(
        &mut self,
        file: &mut dyn FileReadWriteVolatile,
        count: usize,
        offset: u64,
    ) -> io::Result<usize> {
        self.transfer(count, |vectors| file.read_vectored_at_volatile(vectors, offset))
    }

    fn transfer(
        &mut self,
        count: usize,
        system_call: impl FnOnce(&[FileVolatileSlice<'_>]) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let moved = match &self.vectors(count)[..] {
            [] => 0,
            vectors => system_call(vectors)?,
        };
        self.use_up(moved);
        Ok(moved)
    }

    fn vectors(&self, count: usize) -> Vec<FileVolatileSlice<'m>> {
        let mut count = count.min(self.left);
        let parts = self.slices[self.first..].iter().map_while(|slice| {
            let part = slice.subslice(0, slice.len().min(count)).ok()?;
            count -= part.len();
            (!part.is_empty()).then(|| FileVolatileSlice::from_volatile_slice(&part))
        });
        parts.collect()
    }

    /// Goes on after so many bytes, which there are.
    pub(super) fn use_up(&mut self, bytes: usize) {
        self.left -= bytes;
        self.skip(bytes);
    }

    fn skip(&mut self, mut bytes: usize) {
        self.done += bytes;
        while let Some(slice) = self.slices.get_mut(self.first).filter(|_| bytes > 0) {
            let step = slice.len().min(bytes);
            bytes -= step;
            match slice.offset(step) {
                Ok(rest) if !rest.is_empty() => *slice = rest,
                _ => self.first += 1,
            }
        }
    }
}

impl Read for Buffers<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let len = bytes.len().min(self.left);
        let mut done = 0;
        while let Some(slice) = self.slices.get(self.first).filter(|_| done < len) {
            let copied = slice.copy_to(&mut bytes[done..len]);
            self.use_up(copied);
            done += copied;
        }
        Ok(done)
    }
}

impl Write for Buffers<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = bytes.len().min(self.left);
        let mut done = 0;
        while let Some(slice) = self.slices.get(self.first).filter(|_| done < len) {
            let step = slice.len().min(len - done);
            slice.copy_from(&bytes[done..done + step]);
            self.use_up(step);
            done += step;
        }
        Ok(done)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    const LENS: [u32; 12] = [3, 1, 0, 7, 2, 5, 4, 1, 1, 6, 8, 2];
    const TOTAL: usize = 40;

    fn memory() -> GuestMemoryMmap {
        let regions = [(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)];
        GuestMemoryMmap::from_ranges(&regions).unwrap()
    }

    /// Buffers of many lengths, with a byte between two of them, across the border of two regions.
    fn descriptors() -> Vec<Descriptor> {
        let mut at = 0x1000 - 20;
        let next = |len: &u32| {
            at += u64::from(*len) + 1;
            Descriptor::new(at - u64::from(*len) - 1, *len, 0, 0)
        };
        LENS.iter().map(next).collect()
    }

    fn buffers(memory: &GuestMemoryMmap) -> Buffers<'_> {
        Buffers::new(memory, descriptors().into_iter()).unwrap()
    }

    #[test]
    fn what_is_written_in_pieces_is_read_in_others() {
        let memory = memory();
        let bytes: Vec<u8> = (1..=TOTAL as u8).collect();
        for piece in 1..=TOTAL {
            let mut room = buffers(&memory);
            bytes.chunks(piece).for_each(|chunk| room.write_all(chunk).unwrap());
            assert_eq!((room.left(), room.done(), room.write(&[1]).unwrap()), (0, TOTAL, 0));
            let (mut request, mut read) = (buffers(&memory), vec![0; TOTAL]);
            read.chunks_mut(TOTAL + 1 - piece).for_each(|chunk| request.read_exact(chunk).unwrap());
            assert_eq!((&read, request.read(&mut [0]).unwrap()), (&bytes, 0));
        }
        for descriptor in descriptors() {
            let behind = GuestAddress(descriptor.addr().0 + u64::from(descriptor.len()));
            assert_eq!(memory.read_obj::<u8>(behind).unwrap(), 0, "what lies between is not touched");
        }
    }

    #[test]
    fn parts_end_where_they_were_split() {
        let memory = memory();
        for at in 0..=TOTAL {
            let mut front = buffers(&memory);
            let mut rest = front.split_off(at).unwrap();
            assert_eq!((front.left(), rest.left(), rest.done()), (at, TOTAL - at, 0));
            assert_eq!(front.write(&[1; TOTAL]).unwrap(), at);
            assert_eq!(rest.write(&[2; TOTAL]).unwrap(), TOTAL - at);
            let mut all = [0; TOTAL];
            buffers(&memory).read_exact(&mut all).unwrap();
            assert_eq!(all.iter().filter(|byte| **byte == 1).count(), at);
            assert!(all.is_sorted());
        }
        assert!(buffers(&memory).split_off(TOTAL + 1).is_none());
    }

    #[test]
    fn files_take_and_give_whole_buffers_and_parts() {
        let memory = memory();
        let mut file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (1..=TOTAL as u8).collect();
        file.write_all_at(&bytes, 10).unwrap();
        let mut room = buffers(&memory);
        assert_eq!(room.read_from(&mut file, 25, 10).unwrap(), 25);
        assert_eq!(room.read_from(&mut file, 100, 35).unwrap(), 15);
        assert_eq!(room.read_from(&mut file, 100, 10).unwrap(), 0);
        let mut request = buffers(&memory);
        assert_eq!(request.write_to(&mut file, 0, 100).unwrap(), 0);
        assert_eq!(request.write_to(&mut file, 11, 100).unwrap(), 11);
        assert_eq!(request.write_to(&mut file, usize::MAX, 111).unwrap(), TOTAL - 11);
        let mut copy = vec![0; TOTAL];
        file.read_exact_at(&mut copy, 100).unwrap();
        assert_eq!(copy, bytes);
    }

    #[test]
    fn buffers_outside_of_guest_memory_are_refused() {
        let memory = memory();
        for (address, len) in [(0x2000, 1), (0x1fff, 2), (u64::MAX, 1), (0, u32::MAX)] {
            let descriptor = Descriptor::new(address, len, 0, 0);
            assert!(Buffers::new(&memory, [descriptor].into_iter()).is_err(), "{address:#x} {len:#x}");
        }
    }
}
