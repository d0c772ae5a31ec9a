//! The ways in which kernels and their modules are compressed.

use std::io::{self, Read};

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
    /// What the decompressor says of damaged bytes.
    pub(crate) fn decompress(self, compressed: &[u8]) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        match self {
            Compression::Gzip => flate2::read::MultiGzDecoder::new(compressed).read_to_end(&mut bytes),
            Compression::Lz4 => lz4_flex::frame::FrameDecoder::new(compressed).read_to_end(&mut bytes),
            Compression::Xz => lzma_rust2::XzReader::new(compressed, true).read_to_end(&mut bytes),
            Compression::Zstd => ruzstd::decoding::StreamingDecoder::new(compressed)
                .map_err(io::Error::other)?
                .read_to_end(&mut bytes),
        }?;
        Ok(bytes)
    }
}
