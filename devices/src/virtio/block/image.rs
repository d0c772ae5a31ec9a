//! A raw image: what is at a sector's place in the file is what is in the sector. The format of an image is never
//! guessed, since the guest could write the signature of another one.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate, ioctl_blkpbszget, ioctl_blksszget};

use crate::virtio::buffers::IoVectors;

/// Bytes of the sectors in which virtio-blk counts.
pub(super) const SECTOR: u64 = 512;
/// The largest physical block of a file system that is told to the guest, in bytes.
const MAX_PHYSICAL_BLOCK: u64 = 4096;

/// Why a file cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The file is not there, or may not be opened.
    #[error(
        "Cannot open {} to {}: give a raw image or a block device that exists and that you may access so",
        path.display(), access(*read_only)
    )]
    Open {
        /// The file.
        path: PathBuf,
        /// Whether only reading was asked for.
        read_only: bool,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A directory, a terminal, a FIFO.
    #[error("{} cannot be a disk: give a raw image or a block device", .0.display())]
    Kind(PathBuf),
    /// Not as many bytes as sectors have.
    #[error(
        "{path} cannot be a disk, as its {size} bytes are no multiple of 512: is it a raw image? \
         `truncate --size=%512 {path}` fills it up",
        path = path.display()
    )]
    Size {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// No bytes at all.
    #[error("{path} cannot be a disk, as it is empty: `truncate --size=1G {path}` makes it one", path = .0.display())]
    Empty(PathBuf),
    /// Somebody else has it.
    #[error(
        "{} is in use: another VM may {} it; end that one, use a copy, or open it read-only in both",
        path.display(), if *read_only { "write to" } else { "use" }
    )]
    Locked {
        /// The file.
        path: PathBuf,
        /// Whether only reading was asked for.
        read_only: bool,
    },
    /// The file system has no locks, or the device does not tell its size.
    #[error("Cannot {what} {}", path.display())]
    System {
        /// What was being done.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

fn access(read_only: bool) -> &'static str {
    if read_only { "read it" } else { "read and write it" }
}

/// An open image, locked as long as it is.
pub(super) struct Image {
    file: File,
    /// Size in sectors.
    pub sectors: u64,
    /// Whether it was opened so that it cannot be written to.
    pub read_only: bool,
    /// Bytes of the smallest block that can be addressed.
    pub logical_block: u64,
    /// Bytes of the smallest block that can be written without reading; a power of two times `logical_block`.
    pub physical_block: u64,
}

impl Image {
    /// Opens and locks the image at `path`: for one VM, or, if all only read, for several.
    ///
    /// # Errors
    /// [`DiskError`], which names what to change.
    pub fn open(path: &Path, read_only: bool) -> Result<Image, DiskError> {
        let failed = |source| DiskError::Open { path: path.to_owned(), read_only, source };
        let system = |what, source| DiskError::System { what, path: path.to_owned(), source };
        // Before it is opened: that would wait for the other end of a FIFO, or rewind a tape.
        let kind = path.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::Kind(path.to_owned()));
        }
        let mut file = OpenOptions::new().read(true).write(!read_only).open(path).map_err(failed)?;
        match lock(&file, !read_only) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                return Err(DiskError::Locked { path: path.to_owned(), read_only });
            }
            result => result.map_err(|error| system("lock", error))?,
        }
        let size = file.seek(SeekFrom::End(0)).map_err(|error| system("tell the size of", error))?;
        let (logical_block, physical_block) =
            blocks(&file, kind.is_block_device()).map_err(|error| system("tell the blocks of", error))?;
        match size {
            0 => Err(DiskError::Empty(path.to_owned())),
            _ if !size.is_multiple_of(SECTOR) => Err(DiskError::Size { path: path.to_owned(), size }),
            _ => Ok(Image { file, sectors: size / SECTOR, read_only, logical_block, physical_block }),
        }
    }

    /// The bytes of `count` sectors from `first` on; none if they are not all in the image.
    pub fn range(&self, first: u64, count: u64) -> Option<Range<u64>> {
        let end = first.checked_add(count).filter(|end| *end <= self.sectors)?;
        // The file has as many bytes, so this cannot overflow.
        Some(first * SECTOR..end * SECTOR)
    }

    /// Reads from the byte `offset` on into all of `room`.
    ///
    /// # Errors
    /// What preadv(2) says; UnexpectedEof if the image has become shorter.
    pub fn read(&self, room: &mut IoVectors, offset: u64) -> io::Result<()> {
        let end = offset + room.bytes() as u64;
        repeat(room, |room| {
            let at = end - room.bytes() as u64;
            room.read_at(self.file.as_fd(), at).and_then(|read| some(read, io::ErrorKind::UnexpectedEof))
        })
    }

    /// Writes all of `data` from the byte `offset` on.
    ///
    /// # Errors
    /// What pwritev(2) says.
    pub fn write(&self, data: &mut IoVectors, offset: u64) -> io::Result<()> {
        let end = offset + data.bytes() as u64;
        repeat(data, |data| {
            let at = end - data.bytes() as u64;
            data.write_at(self.file.as_fd(), at).and_then(|written| some(written, io::ErrorKind::WriteZero))
        })
    }

    /// Waits until all that was written is on stable storage.
    ///
    /// # Errors
    /// What fdatasync(2) says.
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Makes a range of bytes read as zeros and, if `unmap`, gives its storage back where the host can.
    ///
    /// # Errors
    /// EOPNOTSUPP, and what else fallocate(2) says.
    pub fn zero(&self, range: &Range<u64>, unmap: bool) -> io::Result<()> {
        let how = if unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        let flags = how | FallocateFlags::KEEP_SIZE;
        if range.is_empty() {
            return Ok(());
        }
        Ok(fallocate(&self.file, flags, range.start, range.end - range.start)?)
    }
}

/// Repeats `step`, which uses up some of `vectors`, until there are none left.
fn repeat(vectors: &mut IoVectors, mut step: impl FnMut(&mut IoVectors) -> io::Result<()>) -> io::Result<()> {
    while vectors.bytes() > 0 {
        match step(vectors) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => result?,
        }
    }
    Ok(())
}

fn some(moved: usize, otherwise: io::ErrorKind) -> io::Result<()> {
    if moved == 0 { Err(otherwise.into()) } else { Ok(()) }
}

/// Locks all of a file for as long as it is open, with a lock that other VMMs see too.
fn lock(file: &File, exclusive: bool) -> io::Result<()> {
    let lock = libc::flock {
        l_type: if exclusive { libc::F_WRLCK } else { libc::F_RDLCK } as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the structure lives through the call, which only reads it.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Bytes of logical and physical blocks.
fn blocks(file: &File, is_device: bool) -> io::Result<(u64, u64)> {
    let (logical, physical) = if is_device {
        (ioctl_blksszget(file)?.into(), ioctl_blkpbszget(file)?.into())
    } else {
        (SECTOR, file.metadata()?.blksize().min(MAX_PHYSICAL_BLOCK))
    };
    let is_multiple = physical >= logical && physical.is_power_of_two();
    Ok((logical, if is_multiple { physical } else { logical }))
}
