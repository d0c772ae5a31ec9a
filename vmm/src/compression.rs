//! The ways in which kernels and their modules are compressed.

use std::io::{self, Read};

/// The most bytes that are unpacked; no kernel for x86 is larger (arch/x86, KERNEL_IMAGE_SIZE).
const MAX_SIZE: u64 = 1 << 30;

/// How some bytes are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    Gzip,
    Lz4,
    Xz,
    Zstd,
}

impl Compression {
    /// By the bytes themselves; `None` if they begin like nothing that is known.
    pub(crate) fn of(bytes: &[u8]) -> Option<Compression> {
        match bytes {
            [0x1f, 0x8b, ..] => Some(Compression::Gzip),
            // The legacy frame, which Linux uses.
            [0x02, 0x21, 0x4c, 0x18, ..] => Some(Compression::Lz4),
            [0xfd, b'7', b'z', b'X', b'Z', ..] => Some(Compression::Xz),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Compression::Zstd),
            _ => None,
        }
    }

    /// By the extension of a module's file name.
    pub(crate) fn of_module(extension: &str) -> Option<Compression> {
        match extension {
            "gz" => Some(Compression::Gzip),
            "xz" => Some(Compression::Xz),
            "zst" => Some(Compression::Zstd),
            _ => None,
        }
    }

    /// What was compressed.
    ///
    /// # Errors
    /// What the decompressor says of damaged bytes; more than a GiB of them.
    pub(crate) fn decompress(self, compressed: &[u8]) -> io::Result<Vec<u8>> {
        self.decompress_at_most(MAX_SIZE, compressed)
    }

    fn decompress_at_most(self, most: u64, compressed: &[u8]) -> io::Result<Vec<u8>> {
        let decoder: &mut dyn Read = match self {
            Compression::Gzip => &mut flate2::read::MultiGzDecoder::new(compressed),
            Compression::Lz4 => &mut lz4_flex::frame::FrameDecoder::new(compressed),
            Compression::Xz => &mut lzma_rust2::XzReader::new(compressed, true),
            Compression::Zstd => {
                &mut ruzstd::decoding::StreamingDecoder::new(compressed).map_err(io::Error::other)?
            }
        };
        let mut bytes = Vec::new();
        decoder.take(most + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > most {
            return Err(io::Error::other(format!("it unpacks to more than {most} bytes")));
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_small_file_does_not_unpack_to_any_size() {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&vec![0; 5 << 20]).unwrap();
        let compressed = gzip.finish().unwrap();
        let unpack = |most| Compression::Gzip.decompress_at_most(most, &compressed);
        assert_eq!(unpack(5 << 20).unwrap().len(), 5 << 20);
        assert!(unpack((5 << 20) - 1).unwrap_err().to_string().contains("more than"));
    }
}
