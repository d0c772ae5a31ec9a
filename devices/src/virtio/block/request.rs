//! One request: a header, data, and a status at the end of what the device may write.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::{DescriptorChain, Reader, Writer};
use vm_memory::{ByteValued, GuestMemoryMmap, Le32, Le64};

use super::counters::Counts;
use super::image::{Image, SECTOR};
use crate::virtio::buffers::IoVectors;
use crate::virtio::worker::{ChainError, ChainHandler};

/// Most ranges of one request to discard.
pub(super) const MAX_DISCARD_RANGES: u32 = 32;
/// Most ranges of one request to write zeroes. A host that has no better way writes them all, in a system call that cannot be
/// interrupted, and the queue's thread ends between requests.
pub(super) const MAX_ZERO_RANGES: u32 = 1;
/// Most sectors of a range of either: 64 MiB.
pub(super) const MAX_RANGE_SECTORS: u32 = 128 << 10;

/// `struct virtio_blk_req`, its first part.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Header {
    /// One of VIRTIO_BLK_T_*.
    pub kind: Le32,
    pub reserved: Le32,
    /// The first sector.
    pub sector: Le64,
}

// SAFETY: plain integers, 4 + 4 + 8 bytes without padding.
unsafe impl ByteValued for Header {}

/// `struct virtio_blk_discard_write_zeroes`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct ZeroRange {
    /// The first sector.
    pub sector: Le64,
    /// How many there are.
    pub sectors: Le32,
    /// Bit 0: unmap.
    pub flags: Le32,
}

// SAFETY: plain integers, 8 + 4 + 4 bytes without padding.
unsafe impl ByteValued for ZeroRange {}

/// Why a request is not carried out.
enum Failure {
    /// The host cannot.
    Host(io::Error),
    /// It makes no sense, or is not allowed.
    Refused(&'static str),
    /// The device does not know such requests.
    Unsupported,
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        match error.raw_os_error() {
            Some(libc::EOPNOTSUPP) => Failure::Unsupported,
            _ => Failure::Host(error),
        }
    }
}

/// The chain of a request.
struct Request<'c, 'm> {
    memory: &'m GuestMemoryMmap,
    chain: &'c DescriptorChain<&'m GuestMemoryMmap>,
    /// What follows the header.
    reader: Reader<'m>,
    /// What comes before the status.
    writer: Writer<'m>,
}

/// What a queue's thread does.
#[derive(Clone)]
pub(super) struct Handler {
    pub image: Arc<Image>,
    pub counts: Arc<Counts>,
    /// What the guest gets for VIRTIO_BLK_T_GET_ID.
    pub id: Arc<str>,
    /// Whether the driver has not negotiated to flush: then what was written is on stable storage when a request ends.
    pub writes_through: bool,
}

impl ChainHandler for Handler {
    fn handle(
        &mut self,
        memory: &GuestMemoryMmap,
        chain: DescriptorChain<&GuestMemoryMmap>,
    ) -> Result<u32, ChainError> {
        let bad_buffer =
            |error: virtio_queue::Error| ChainError(format!("A buffer is not in guest memory: {error}"));
        let reader = chain.clone().reader(memory).map_err(bad_buffer)?;
        let mut writer = chain.clone().writer(memory).map_err(bad_buffer)?;
        // Without room for a status nothing can be said, so nothing is done either.
        let Some(room) = writer.available_bytes().checked_sub(1) else { return Ok(0) };
        let bad_split = |error| ChainError(format!("A chain cannot be split: {error}"));
        let mut status = writer.split_at(room).map_err(bad_split)?;
        let (code, written) = match self.carry_out(Request { memory, chain: &chain, reader, writer })? {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(failure) => (self.explain(&failure), 0),
        };
        status
            .write_obj(code as u8)
            .map_err(|error| ChainError(format!("Cannot write a status: {error}")))?;
        Ok(written + 1)
    }
}

impl Handler {
    fn explain(&self, failure: &Failure) -> u32 {
        self.counts.failed.fetch_add(1, Relaxed);
        match failure {
            Failure::Host(error) => tracing::warn!(disk = &*self.id, %error, "A request failed"),
            Failure::Refused(why) => tracing::debug!(disk = &*self.id, why, "A request is refused"),
            Failure::Unsupported => return VIRTIO_BLK_S_UNSUPP,
        }
        VIRTIO_BLK_S_IOERR
    }

    /// Returns the bytes of data written to the guest.
    fn carry_out(&self, mut request: Request) -> Result<Result<u32, Failure>, ChainError> {
        let Ok(header) = request.reader.read_obj::<Header>() else {
            return Ok(Err(Failure::Refused("it has no header")));
        };
        let sector = header.sector.to_native();
        Ok(match header.kind.to_native() {
            VIRTIO_BLK_T_IN => {
                let mut room = IoVectors::new();
                room.push_writable(request.memory, request.chain.clone())?;
                room.truncate(request.writer.available_bytes());
                self.read(&mut room, sector)
            }
            VIRTIO_BLK_T_OUT => {
                let mut data = IoVectors::new();
                data.push_readable(request.memory, request.chain.clone())?;
                data.advance(size_of::<Header>());
                self.write(&mut data, sector).map(|()| 0)
            }
            VIRTIO_BLK_T_FLUSH => {
                count(&self.counts.flushes, 1);
                self.image.flush().map_err(Failure::from).map(|()| 0)
            }
            VIRTIO_BLK_T_GET_ID => self.tell_id(&mut request.writer),
            VIRTIO_BLK_T_DISCARD => self.zero(&mut request.reader, false).map(|()| 0),
            VIRTIO_BLK_T_WRITE_ZEROES => self.zero(&mut request.reader, true).map(|()| 0),
            _ => Err(Failure::Unsupported),
        })
    }

    fn read(&self, room: &mut IoVectors, sector: u64) -> Result<u32, Failure> {
        let (bytes, offset) = (room.bytes(), self.offset(room, sector)?);
        count(&self.counts.reads, 1);
        self.image.read(room, offset)?;
        count(&self.counts.bytes_read, bytes as u64);
        Ok(bytes as u32)
    }

    fn write(&self, data: &mut IoVectors, sector: u64) -> Result<(), Failure> {
        self.check_writable()?;
        let (bytes, offset) = (data.bytes(), self.offset(data, sector)?);
        count(&self.counts.writes, 1);
        self.image.write(data, offset)?;
        count(&self.counts.bytes_written, bytes as u64);
        self.settle()
    }

    fn tell_id(&self, writer: &mut Writer) -> Result<u32, Failure> {
        // Padded with NUL; one of the full length has none.
        let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
        let len = self.id.len().min(id.len());
        id[..len].copy_from_slice(&self.id.as_bytes()[..len]);
        let room = writer.available_bytes().min(id.len());
        io::Write::write_all(writer, &id[..room])?;
        Ok(room as u32)
    }

    /// Discards, or writes zeroes to, the ranges that `reader` has.
    fn zero(&self, reader: &mut Reader, exactly: bool) -> Result<(), Failure> {
        self.check_writable()?;
        let size = size_of::<ZeroRange>();
        let len = reader.available_bytes();
        let most = if exactly { MAX_ZERO_RANGES } else { MAX_DISCARD_RANGES };
        if len == 0 || !len.is_multiple_of(size) || len / size > most as usize {
            return Err(Failure::Refused("it has no ranges, too many, or a part of one"));
        }
        // All are looked at before the first is zeroed.
        let ranges = (0..len / size).map(|_| {
            let range: ZeroRange = reader.read_obj()?;
            let unmap = match (range.flags.to_native(), exactly) {
                (0, _) => !exactly,
                (VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP, true) => true,
                _ => return Err(Failure::Unsupported),
            };
            let sectors = range.sectors.to_native();
            let bytes = self.image.range(range.sector.to_native(), sectors.into());
            let bytes = bytes.filter(|_| sectors <= MAX_RANGE_SECTORS);
            Ok((bytes.ok_or(Failure::Refused("a range is not on the disk, or too long"))?, unmap))
        });
        let ranges = ranges.collect::<Result<Vec<_>, Failure>>()?;
        count(&self.counts.discards, 1);
        for (range, unmap) in &ranges {
            self.image.zero(range, *unmap)?;
        }
        self.settle()
    }

    fn check_writable(&self) -> Result<(), Failure> {
        if self.image.read_only { Err(Failure::Refused("the disk is read-only")) } else { Ok(()) }
    }

    /// Where data of this length goes to or comes from.
    fn offset(&self, data: &IoVectors, sector: u64) -> Result<u64, Failure> {
        let bytes = data.bytes() as u64;
        if !bytes.is_multiple_of(SECTOR) {
            return Err(Failure::Refused("its data are no whole sectors"));
        }
        let range = self.image.range(sector, bytes / SECTOR);
        Ok(range.ok_or(Failure::Refused("its sectors are not on the disk"))?.start)
    }

    /// A driver that cannot flush need not.
    fn settle(&self) -> Result<(), Failure> {
        if self.writes_through { Ok(self.image.flush()?) } else { Ok(()) }
    }
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Relaxed);
}
