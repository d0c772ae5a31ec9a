//! From files to a guest that can be entered: the kernel image, the initramfs, the command line in guest memory.

mod kernel;
mod payload;

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use linux_loader::cmdline::Cmdline;
use linux_loader::loader::load_cmdline;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::arch::x86_64::boot_params::{self, BootInfo};
use crate::arch::x86_64::entry::EntryPoint;
use crate::layout::{self, boot};

pub use kernel::{KernelFormat, KernelImage};

/// Why a guest could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be opened or read.
    #[error("Cannot read {what} {path}")]
    Read {
        /// "kernel" or "initramfs".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The kernel image is of no known kind.
    #[error(
        "{0} is neither a bzImage nor an uncompressed x86_64 ELF kernel; \
         give --kernel the vmlinuz of a distribution or the vmlinux of a kernel build"
    )]
    UnknownFormat(PathBuf),
    /// An ELF kernel without a PVH entry point.
    #[error("{0} has no PVH entry point; build the kernel with CONFIG_PVH=y, or use its bzImage")]
    NoPvh(PathBuf),
    /// A bzImage too old for the 64-bit boot protocol.
    #[error("{0} does not support the 64-bit boot protocol (Linux 3.8 or newer does)")]
    TooOld(PathBuf),
    /// linux-loader refuses the image.
    #[error("Cannot load kernel {path}")]
    Load {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: linux_loader::loader::Error,
    },
    /// Kernel and initramfs need more than there is.
    #[error("The guest needs at least {needed} MiB of memory for {what}, it has {given} MiB: raise --memory")]
    TooLittleMemory {
        /// What does not fit.
        what: &'static str,
        /// MiB needed.
        needed: u64,
        /// MiB given.
        given: u64,
    },
    /// The command line is longer than the kernel takes.
    #[error("The kernel command line cannot be used: {0}")]
    CommandLine(String),
    /// The compressed kernel inside an image cannot be unpacked.
    #[error(
        "Cannot unpack the kernel in {path}; with at least {needed} MiB of memory (--memory) it would do so itself"
    )]
    Unpack {
        /// The file.
        path: PathBuf,
        /// MiB with which the image unpacks itself.
        needed: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The initramfs cannot be written.
    #[error("Cannot write the initramfs to guest memory")]
    Initramfs(#[source] GuestMemoryError),
    /// The boot structures cannot be written.
    #[error("Cannot write the boot parameters to guest memory")]
    Params(#[source] linux_loader::configurator::Error),
}

/// What to boot.
pub struct Boot<'a> {
    /// The kernel image.
    pub kernel: &'a Path,
    /// The initramfs.
    pub initramfs: Option<Initramfs<'a>>,
    /// The kernel command line.
    pub command_line: &'a str,
    /// Bytes of RAM.
    pub ram: u64,
    /// Guest-physical address of the RSDP.
    pub rsdp: u64,
}

/// An initramfs.
#[derive(Clone, Copy)]
pub enum Initramfs<'a> {
    /// In this file.
    File(&'a Path),
    /// In memory.
    Bytes(&'a [u8]),
}

/// Loads everything and writes the boot parameters; returns where the first vCPU begins.
///
/// # Errors
/// See [`BootError`].
pub fn load(memory: &GuestMemoryMmap, what: &Boot) -> Result<EntryPoint, BootError> {
    let low_ram = layout::ram_ranges(what.ram)[0].end;
    let image = KernelImage::open(what.kernel)?;
    let beside = what.initramfs.map_or(Ok(0), initramfs_size)?;
    let kernel = image.load(memory, low_ram, beside)?;
    let limit = low_ram.min(kernel.initramfs_limit);
    let initramfs = match what.initramfs {
        Some(initramfs) => load_initramfs(memory, initramfs, kernel.end..limit)?,
        None => 0..0,
    };
    write_command_line(memory, what.command_line)?;
    let info = BootInfo {
        ram: what.ram,
        initramfs,
        command_line_length: what.command_line.len() as u32,
        rsdp: what.rsdp,
        setup_header: kernel.setup_header.as_ref(),
    };
    match kernel.entry {
        EntryPoint::Linux64(_) => boot_params::write_zero_page(memory, &info),
        EntryPoint::Pvh(_) => boot_params::write_start_info(memory, &info),
    }
    .map_err(BootError::Params)?;
    Ok(kernel.entry)
}

fn initramfs_failed(path: &Path, source: io::Error) -> BootError {
    BootError::Read { what: "initramfs", path: path.to_owned(), source }
}

/// Bytes of memory that an initramfs takes, in whole pages.
fn initramfs_size(initramfs: Initramfs) -> Result<u64, BootError> {
    let size = match initramfs {
        Initramfs::File(path) => {
            std::fs::metadata(path).map_err(|source| initramfs_failed(path, source))?.len()
        }
        Initramfs::Bytes(bytes) => bytes.len() as u64,
    };
    Ok(size.next_multiple_of(0x1000))
}

/// Puts the initramfs at the end of `free`, page-aligned: as far from the kernel as can be, as boot loaders do.
fn load_initramfs(
    memory: &GuestMemoryMmap,
    initramfs: Initramfs,
    free: Range<u64>,
) -> Result<Range<u64>, BootError> {
    match initramfs {
        Initramfs::File(path) => {
            let failed = |source| initramfs_failed(path, source);
            let mut file = File::open(path).map_err(failed)?;
            let size = file.seek(SeekFrom::End(0)).map_err(failed)?;
            file.rewind().map_err(failed)?;
            let start = place_initramfs(size, &free)?;
            memory
                .read_exact_volatile_from(GuestAddress(start), &mut file, size as usize)
                .map_err(|error| failed(io::Error::other(error)))?;
            Ok(start..start + size)
        }
        Initramfs::Bytes(bytes) => {
            let start = place_initramfs(bytes.len() as u64, &free)?;
            memory.write_slice(bytes, GuestAddress(start)).map_err(BootError::Initramfs)?;
            Ok(start..start + bytes.len() as u64)
        }
    }
}

/// Where an initramfs of `size` bytes begins.
fn place_initramfs(size: u64, free: &Range<u64>) -> Result<u64, BootError> {
    let start = free.end.checked_sub(size).map(|start| start & !0xfff).filter(|start| *start >= free.start);
    start.ok_or(BootError::TooLittleMemory {
        what: "kernel and initramfs",
        needed: free.start.saturating_add(size).div_ceil(1 << 20),
        given: free.end >> 20,
    })
}

fn write_command_line(memory: &GuestMemoryMmap, text: &str) -> Result<(), BootError> {
    let refused = |error: linux_loader::cmdline::Error| BootError::CommandLine(error.to_string());
    let capacity = (boot::COMMAND_LINE.end - boot::COMMAND_LINE.start) as usize;
    let command_line = Cmdline::try_from(text, capacity).map_err(refused)?;
    load_cmdline(memory, GuestAddress(boot::COMMAND_LINE.start), &command_line)
        .map_err(|error| BootError::CommandLine(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 8 << 20)]).unwrap()
    }

    #[test]
    fn the_initramfs_ends_up_page_aligned_at_the_top() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[7; 5000]).unwrap();
        let memory = memory();
        let initramfs = Initramfs::File(file.path());
        let range = load_initramfs(&memory, initramfs, 1 << 20..8 << 20).unwrap();
        assert_eq!(range, (8 << 20) - 8192..(8 << 20) - 8192 + 5000);
        let mut last = [0];
        memory.read_slice(&mut last, GuestAddress(range.end - 1)).unwrap();
        assert_eq!(last, [7]);
        for initramfs in [initramfs, Initramfs::Bytes(&[7; 5000])] {
            let error = load_initramfs(&memory, initramfs, (8 << 20) - 4096..8 << 20).unwrap_err();
            assert!(error.to_string().contains("raise --memory"), "{error}");
        }
        let range = load_initramfs(&memory, Initramfs::Bytes(&[8; 5000]), 1 << 20..4 << 20).unwrap();
        assert_eq!(range, (4 << 20) - 8192..(4 << 20) - 8192 + 5000);
        memory.read_slice(&mut last, GuestAddress(range.end - 1)).unwrap();
        assert_eq!(last, [8]);
    }

    #[test]
    fn a_missing_file_is_named() {
        let error =
            load_initramfs(&memory(), Initramfs::File(Path::new("/no/such/file")), 0..8 << 20).unwrap_err();
        assert_eq!(error.to_string(), "Cannot read initramfs /no/such/file");
    }

    #[test]
    fn the_command_line_is_bounded() {
        let memory = memory();
        write_command_line(&memory, "console=ttyS0 -- arg").unwrap();
        let mut text = [0; 21];
        memory.read_slice(&mut text, GuestAddress(boot::COMMAND_LINE.start)).unwrap();
        assert_eq!(&text, b"console=ttyS0 -- arg\0");
        assert!(write_command_line(&memory, &"x".repeat(2048)).is_err());
    }
}
