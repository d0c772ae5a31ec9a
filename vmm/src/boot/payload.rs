//! The kernel inside a bzImage, for guests with too little memory for the image to unpack itself.
//!
//! A bzImage unpacks itself at 16 MiB or above, and needs room for the compressed and the unpacked kernel side by side.
//! Unpacked here, the kernel can lie at 2 MiB and needs room for itself alone. What is lost is that the kernel moves
//! itself to a random address (KASLR), which the code that unpacks it does.

use std::io;

use elf::ElfBytes;
use elf::abi::PT_LOAD;
use elf::endian::LittleEndian;
use linux_loader::loader::bootparam::setup_header;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::compression::Compression;

/// Where the boot sector and the sectors of real-mode code end, in units of 512 bytes, follows from `setup_sects`.
const SECTOR: usize = 512;
/// Physical addresses that an uncompressed kernel may be loaded at (arch/x86/kernel/head64.c, `__startup_64`).
const ALIGNMENT: u64 = 2 << 20;

/// A kernel in guest memory.
pub(super) struct Unpacked {
    /// Physical address of startup_64.
    pub(super) entry: u64,
    /// First address behind it.
    pub(super) end: u64,
}

/// The ELF kernel inside of a bzImage.
///
/// # Errors
/// InvalidData, if the image is cut short or compressed in a way that is not supported.
pub(super) fn unpack(image: &[u8], header: &setup_header) -> io::Result<Vec<u8>> {
    let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    // Zero stands for four (boot.rst, setup_sects).
    let setup_sects = if header.setup_sects == 0 { 4 } else { usize::from(header.setup_sects) };
    let start = (setup_sects + 1) * SECTOR + header.payload_offset as usize;
    let payload = image.get(start..).and_then(|rest| rest.get(..header.payload_length as usize));
    // The last four bytes are the unpacked size.
    let payload = payload
        .and_then(|payload| payload.split_last_chunk::<4>())
        .map(|(payload, _)| payload)
        .ok_or_else(|| invalid("the image is cut short".into()))?;
    let compression = Compression::of(payload).ok_or_else(|| {
        let magic = &payload[..payload.len().min(4)];
        invalid(format!("it is compressed in an unknown way (magic {magic:02x?})"))
    })?;
    compression.decompress(payload)
}

/// Puts an ELF kernel in guest memory, from `start` on.
///
/// # Errors
/// InvalidData, if it is no kernel; what the guest's memory says if it ends before the kernel does.
pub(super) fn place(kernel: &[u8], memory: &GuestMemoryMmap, start: u64) -> io::Result<Unpacked> {
    let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let file = ElfBytes::<LittleEndian>::minimal_parse(kernel).map_err(io::Error::other)?;
    let segments = file.segments().ok_or_else(|| invalid("it has no segments"))?;
    let loaded = || segments.iter().filter(|segment| segment.p_type == PT_LOAD);
    let first = loaded().map(|segment| segment.p_paddr).min().ok_or_else(|| invalid("nothing to load"))?;
    if !start.is_multiple_of(ALIGNMENT) || !first.is_multiple_of(ALIGNMENT) {
        return Err(invalid("it cannot be moved there"));
    }
    let moved = |address: u64| address.wrapping_sub(first).checked_add(start);
    let mut end = start;
    for segment in loaded() {
        let bytes = file.segment_data(&segment).map_err(io::Error::other)?;
        let at = moved(segment.p_paddr).ok_or_else(|| invalid("it lies beyond all memory"))?;
        memory.write_slice(bytes, GuestAddress(at)).map_err(io::Error::other)?;
        end = end.max(at.saturating_add(segment.p_memsz));
    }
    // The rest of each segment is zero, as guest memory is.
    let entry = moved(file.ehdr.e_entry).filter(|entry| (start..end).contains(entry));
    Ok(Unpacked { entry: entry.ok_or_else(|| invalid("it begins outside of itself"))?, end })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// An image of one sector of boot code, one of setup code, and a payload.
    fn image(compressed: &[u8], size: u32) -> (Vec<u8>, setup_header) {
        let header = setup_header {
            setup_sects: 1,
            payload_offset: 16,
            payload_length: compressed.len() as u32 + 4,
            ..Default::default()
        };
        let image = [&[0; 2 * SECTOR + 16][..], compressed, &size.to_le_bytes(), b"behind"].concat();
        (image, header)
    }

    #[test]
    fn payloads_are_unpacked() {
        let kernel = b"a kernel ".repeat(100);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&kernel).unwrap();
        let zstd =
            ruzstd::encoding::compress_to_vec(&kernel[..], ruzstd::encoding::CompressionLevel::Fastest);
        for compressed in [gzip.finish().unwrap(), zstd] {
            let (image, header) = image(&compressed, kernel.len() as u32);
            assert_eq!(unpack(&image, &header).unwrap(), kernel);
            let cut = unpack(&image[..image.len() - 20], &header).unwrap_err();
            assert!(cut.to_string().contains("cut short"), "{cut}");
        }
        let (image, header) = image(b"plain", 5);
        assert!(unpack(&image, &header).unwrap_err().to_string().contains("unknown way"));
    }

    #[test]
    fn a_kernel_is_moved_as_a_whole() {
        // One segment for 16 MiB, entered at its second byte.
        let mut kernel = vec![0; 64 + 56];
        kernel[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\0");
        let mut put = |at: usize, bytes: &[u8]| kernel[at..at + bytes.len()].copy_from_slice(bytes);
        put(16, &2u16.to_le_bytes());
        put(18, &62u16.to_le_bytes());
        put(20, &1u32.to_le_bytes());
        put(24, &0x100_0001u64.to_le_bytes());
        put(32, &64u64.to_le_bytes());
        put(52, &64u16.to_le_bytes());
        put(54, &56u16.to_le_bytes());
        put(56, &1u16.to_le_bytes());
        put(64, &1u32.to_le_bytes());
        for (at, value) in [(72, 120u64), (88, 0x100_0000), (96, 4), (104, 0x3000)] {
            put(at, &value.to_le_bytes());
        }
        kernel.extend(b"code");
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 8 << 20)]).unwrap();
        let unpacked = place(&kernel, &memory, 2 << 20).unwrap();
        assert_eq!((unpacked.entry, unpacked.end), ((2 << 20) + 1, (2 << 20) + 0x3000));
        assert_eq!(&memory.read_obj::<[u8; 4]>(GuestAddress(2 << 20)).unwrap(), b"code");
        assert!(place(&kernel, &memory, 8 << 20).is_err(), "beyond memory");
        assert!(place(&kernel, &memory, 4096).is_err(), "unaligned");
        assert!(place(b"nothing", &memory, 2 << 20).is_err());
    }
}
