//! Test data that nobody has to carry: every byte follows from a seed and its offset, so that the host can say what the
//! guest must have read, and the guest what the host wrote.
//!
//! The generator is SplitMix64 by index. With `mix` its finaliser and `G` = 0x9e3779b97f4a7c15, all arithmetic modulo
//! 2^64, word `i` of stream `seed` is `mix(mix(seed) + (i + 1) * G)`. The content of a file is its words in little-endian
//! order: byte `n` belongs to word `n / 8`. Random offsets are block numbers: the `i`-th of stream `seed` is
//! `word(seed, i) % blocks`, times 4096.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// The unit of random reads.
pub const BLOCK: usize = 4096;

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
const COPY: usize = 1 << 20;

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Word `index` of the stream `seed`.
pub fn word(seed: u64, index: u64) -> u64 {
    mix(mix(seed).wrapping_add(index.wrapping_add(1).wrapping_mul(GOLDEN)))
}

/// Fills `buf` with the content that the stream `seed` has at `offset`.
pub fn fill(seed: u64, offset: u64, buf: &mut [u8]) {
    let base = mix(seed);
    let at = |index: u64| mix(base.wrapping_add(index.wrapping_add(1).wrapping_mul(GOLDEN))).to_le_bytes();
    let skip = (offset % 8) as usize;
    let head = if skip == 0 { 0 } else { (8 - skip).min(buf.len()) };
    let (first, rest) = buf.split_at_mut(head);
    first.copy_from_slice(&at(offset / 8)[skip..][..head]);
    for (index, chunk) in ((offset + head as u64) / 8..).zip(rest.chunks_mut(8)) {
        chunk.copy_from_slice(&at(index)[..chunk.len()]);
    }
}

/// The offset of the first byte of `buf`, read at `offset`, that is not what the stream `seed` has there.
pub fn first_difference(seed: u64, offset: u64, buf: &[u8]) -> Option<u64> {
    let mut expected = [0; BLOCK];
    let mut done = 0;
    for chunk in buf.chunks(BLOCK) {
        let expected = &mut expected[..chunk.len()];
        fill(seed, offset + done, expected);
        if expected != chunk {
            let differs = expected.iter().zip(chunk).position(|(a, b)| a != b);
            return differs.map(|at| offset + done + at as u64);
        }
        done += chunk.len() as u64;
    }
    None
}

/// The offsets of `count` random blocks of a file of `len` bytes, of which there must be one whole block.
pub fn random_offsets(seed: u64, count: u64, len: u64) -> impl Iterator<Item = u64> {
    let blocks = (len / BLOCK as u64).max(1);
    (0..count).map(move |index| word(seed, index) % blocks * BLOCK as u64)
}

/// A digest over content given piece by piece: SHA-256, in lower-case hexadecimal.
#[derive(Default)]
pub struct Hasher(Sha256);

impl Hasher {
    /// Adds the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Adds a block that was read at a random offset; the offset is part of what is hashed.
    pub fn update_block(&mut self, offset: u64, block: &[u8]) {
        self.0.update(offset.to_le_bytes());
        self.0.update(block);
    }

    /// The digest.
    pub fn finish(self) -> String {
        self.0.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// A file's content: `len` bytes of the stream `seed`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content {
    /// The stream.
    pub seed: u64,
    /// The length in bytes.
    pub len: u64,
}

impl Content {
    /// Calls `each` for the whole content in pieces.
    fn pieces<E>(self, mut each: impl FnMut(u64, &[u8]) -> Result<(), E>) -> Result<(), E> {
        let mut buf = vec![0; COPY.min(self.len as usize)];
        let mut offset = 0;
        while offset < self.len {
            let piece = (self.len - offset).min(COPY as u64) as usize;
            fill(self.seed, offset, &mut buf[..piece]);
            each(offset, &buf[..piece])?;
            offset += piece as u64;
        }
        Ok(())
    }

    /// Creates or replaces a file with this content.
    pub fn write_to(self, path: &Path) -> io::Result<()> {
        let file = File::create(path)?;
        self.pieces(|offset, piece| file.write_all_at(piece, offset))
    }

    /// The first offset at which a file differs, its length counted as content; `None` if it is as it should be.
    pub fn differs_from(self, file: &File) -> io::Result<Option<u64>> {
        let len = file.metadata()?.len();
        let mut buf = vec![0; COPY];
        let mut offset = 0;
        while offset < self.len.min(len) {
            let piece = &mut buf[..(self.len.min(len) - offset).min(COPY as u64) as usize];
            file.read_exact_at(piece, offset)?;
            if let Some(at) = first_difference(self.seed, offset, piece) {
                return Ok(Some(at));
            }
            offset += piece.len() as u64;
        }
        Ok((len != self.len).then_some(offset))
    }

    /// The SHA-256 of the whole.
    pub fn sha256(self) -> String {
        let mut hasher = Hasher::default();
        let Ok(()) = self.pieces(|_, piece| {
            hasher.update(piece);
            Ok::<_, std::convert::Infallible>(())
        });
        hasher.finish()
    }

    /// The sum, modulo 2^64, of the first words of the blocks at these offsets, multiples of 8.
    pub fn sum_of_words(self, offsets: impl IntoIterator<Item = u64>) -> u64 {
        offsets.into_iter().fold(0, |sum, offset| sum.wrapping_add(word(self.seed, offset / 8)))
    }

    /// The digest over `count` random blocks, offsets of the stream `seed`, as the guest must find it.
    pub fn random_sha256(self, seed: u64, count: u64) -> String {
        let mut hasher = Hasher::default();
        let mut block = [0; BLOCK];
        for offset in random_offsets(seed, count, self.len) {
            fill(self.seed, offset, &mut block);
            hasher.update_block(offset, &block);
        }
        hasher.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fill_at_any_offset_is_a_window_of_the_same_stream() {
        let mut whole = [0; 64];
        fill(7, 0, &mut whole);
        for start in 0..20 {
            for len in 0..40 {
                let mut part = vec![0; len];
                fill(7, start as u64, &mut part);
                assert_eq!(part, whole[start..start + len], "{start}+{len}");
            }
        }
    }

    #[test]
    fn streams_and_neighbours_differ() {
        assert_eq!(word(0, 0), mix(GOLDEN));
        let words: std::collections::HashSet<u64> =
            (0..50).flat_map(|seed| (0..50).map(move |i| word(seed, i))).collect();
        assert_eq!(words.len(), 2500);
    }

    #[test]
    fn a_changed_byte_and_a_changed_length_are_found() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("f");
        let content = Content { seed: 3, len: (COPY + 4097) as u64 };
        content.write_to(&path)?;
        let file = File::options().read(true).write(true).open(&path)?;
        assert_eq!(content.differs_from(&file)?, None);
        let longer = Content { len: content.len + 1, ..content };
        assert_eq!(longer.differs_from(&file)?, Some(content.len));
        let mut byte = [0];
        file.read_exact_at(&mut byte, COPY as u64 + 4096)?;
        file.write_all_at(&[!byte[0]], COPY as u64 + 4096)?;
        assert_eq!(content.differs_from(&file)?, Some(COPY as u64 + 4096));
        Ok(())
    }

    #[test]
    fn the_digest_is_sha256() {
        assert_eq!(
            Hasher::default().finish(),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
    }
}
