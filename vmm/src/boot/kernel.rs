//! The kernel image: a bzImage, entered by the 64-bit boot protocol, or an uncompressed ELF vmlinux, entered by PVH.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};

use elf::ElfStream;
use elf::abi::PT_LOAD;
use elf::endian::LittleEndian;
use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{BootError, payload};
use crate::arch::x86_64::entry::EntryPoint;
use crate::layout::{self, boot};

/// Offset of the 64-bit entry point from the start of the protected-mode kernel.
const ENTRY_64: u64 = 0x200;
/// xloadflags: the kernel has the 64-bit entry point.
const XLF_KERNEL_64: u16 = 1;
/// Where a kernel goes that is not to unpack itself: the lowest place that it may be moved to.
const UNPACKED: u64 = 2 << 20;
/// Offset of the magic number in a bzImage.
const MAGIC: usize = 0x202;

/// What a kernel image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelFormat {
    /// A compressed kernel that unpacks itself (arch/x86/boot).
    BzImage,
    /// An uncompressed kernel, `vmlinux`.
    Elf,
}

/// A kernel image file of a known format.
#[derive(Debug)]
pub struct KernelImage {
    path: PathBuf,
    file: File,
    format: KernelFormat,
}

/// A kernel in guest memory.
pub(super) struct LoadedKernel {
    pub entry: EntryPoint,
    pub setup_header: Option<setup_header>,
    /// First address that the kernel leaves alone while it unpacks itself.
    pub end: u64,
    /// The initramfs must lie below this.
    pub initramfs_limit: u64,
}

impl KernelImage {
    /// Opens `path` and recognises its format.
    ///
    /// # Errors
    /// [`BootError::Read`] and [`BootError::UnknownFormat`].
    pub fn open(path: &Path) -> Result<KernelImage, BootError> {
        let failed = |source| BootError::Read { what: "kernel", path: path.to_owned(), source };
        let mut file = File::open(path).map_err(failed)?;
        let mut start = Vec::new();
        file.by_ref().take(1024).read_to_end(&mut start).map_err(failed)?;
        file.rewind().map_err(failed)?;
        let format = match &start[..] {
            start if start.get(MAGIC..MAGIC + 4) == Some(b"HdrS") => KernelFormat::BzImage,
            // 64-bit, little-endian.
            start if start.starts_with(b"\x7fELF\x02\x01") => KernelFormat::Elf,
            _ => return Err(BootError::UnknownFormat(path.to_owned())),
        };
        Ok(KernelImage { path: path.to_owned(), file, format })
    }

    /// The format.
    pub fn format(&self) -> KernelFormat {
        self.format
    }

    /// Loads the image to guest memory of which `low_ram` bytes lie below the hole; `beside` of them are for the
    /// initramfs.
    pub(super) fn load(
        mut self,
        memory: &GuestMemoryMmap,
        low_ram: u64,
        beside: u64,
    ) -> Result<LoadedKernel, BootError> {
        match self.format {
            KernelFormat::BzImage => self.load_bzimage(memory, low_ram, beside),
            KernelFormat::Elf => self.load_elf(memory, low_ram),
        }
    }

    fn load_bzimage(
        &mut self,
        memory: &GuestMemoryMmap,
        low_ram: u64,
        beside: u64,
    ) -> Result<LoadedKernel, BootError> {
        let start = GuestAddress(boot::HIGH_MEMORY);
        let loaded = BzImage::load(memory, Some(start), &mut self.file, Some(start))
            .map_err(|source| self.load_error(source, low_ram))?;
        let header = loaded.setup_header.ok_or_else(|| BootError::UnknownFormat(self.path.clone()))?;
        if header.version < 0x20c || header.xloadflags & XLF_KERNEL_64 == 0 {
            return Err(BootError::TooOld(self.path.clone()));
        }
        // Where it unpacks itself to, unless it finds a better place (boot.rst, init_size).
        let runtime_start = header.pref_address.max(boot::HIGH_MEMORY);
        let end = runtime_start.saturating_add(header.init_size.into()).max(loaded.kernel_end);
        let needed = end.saturating_add(beside);
        if needed > low_ram {
            return self.load_payload(memory, header, needed, low_ram);
        }
        Ok(LoadedKernel {
            entry: EntryPoint::Linux64(loaded.kernel_load.0 + ENTRY_64),
            setup_header: Some(header),
            end,
            initramfs_limit: u64::from(header.initrd_addr_max) + 1,
        })
    }

    /// Loads the kernel that is inside of an image which needs memory to address `needed` to unpack itself.
    fn load_payload(
        &mut self,
        memory: &GuestMemoryMmap,
        header: setup_header,
        needed: u64,
        low_ram: u64,
    ) -> Result<LoadedKernel, BootError> {
        let failed =
            |source| BootError::Unpack { path: self.path.clone(), needed: needed.div_ceil(1 << 20), source };
        let mut image = Vec::new();
        self.file.rewind().and_then(|()| self.file.read_to_end(&mut image)).map_err(failed)?;
        let kernel = payload::unpack(&image, &header).map_err(failed)?;
        // What was loaded of the image lies where the kernel's own zeros are to be.
        let start = boot::HIGH_MEMORY;
        let zeros = vec![0; image.len().min((low_ram - start) as usize)];
        memory.write_slice(&zeros, GuestAddress(start)).map_err(|error| failed(io::Error::other(error)))?;
        let unpacked = payload::place(&kernel, memory, UNPACKED).map_err(failed)?;
        if unpacked.end > low_ram {
            return Err(self.too_big(unpacked.end, low_ram));
        }
        tracing::warn!(
            "with so little memory the kernel is unpacked by daxvm and does not move itself to a random address (KASLR)"
        );
        Ok(LoadedKernel {
            entry: EntryPoint::Linux64(unpacked.entry),
            setup_header: Some(header),
            end: unpacked.end,
            initramfs_limit: u64::from(header.initrd_addr_max) + 1,
        })
    }

    fn load_elf(&mut self, memory: &GuestMemoryMmap, low_ram: u64) -> Result<LoadedKernel, BootError> {
        let end = self.elf_end()?;
        if end > low_ram {
            return Err(self.too_big(end, low_ram));
        }
        let loaded = Elf::load(memory, None, &mut self.file, Some(GuestAddress(boot::HIGH_MEMORY)))
            .map_err(|source| self.load_error(source, low_ram))?;
        let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
            return Err(BootError::NoPvh(self.path.clone()));
        };
        Ok(LoadedKernel {
            entry: EntryPoint::Pvh(entry.0),
            setup_header: None,
            end,
            initramfs_limit: layout::HOLE.start,
        })
    }

    /// The first address behind an ELF kernel and its zeros, which linux-loader only knows of what is in the file.
    fn elf_end(&mut self) -> Result<u64, BootError> {
        let damaged = |_| BootError::UnknownFormat(self.path.clone());
        let stream = ElfStream::<LittleEndian, _>::open_stream(&mut self.file).map_err(damaged)?;
        let ends = stream.segments().iter().filter(|segment| segment.p_type == PT_LOAD);
        let end = ends.map(|segment| segment.p_paddr.saturating_add(segment.p_memsz)).max();
        end.ok_or_else(|| BootError::UnknownFormat(self.path.clone()))
    }

    /// linux-loader does not tell a short read of the file from a write past the end of guest memory.
    fn load_error(&self, source: linux_loader::loader::Error, low_ram: u64) -> BootError {
        let size = self.file.metadata().map_or(0, |metadata| metadata.len());
        if boot::HIGH_MEMORY + size > low_ram {
            return self.too_big(boot::HIGH_MEMORY + size, low_ram);
        }
        BootError::Load { path: self.path.clone(), source }
    }

    fn too_big(&self, end: u64, low_ram: u64) -> BootError {
        let needed = end.div_ceil(1 << 20);
        BootError::TooLittleMemory { what: "the kernel", needed, given: low_ram >> 20 }
    }
}
