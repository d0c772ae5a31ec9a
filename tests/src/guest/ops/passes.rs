//! Going over files to see how long it takes, with as little else as possible.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use super::Mapping;
use crate::guest::data::{BLOCK, random_offsets};
use crate::guest::{Failure, Pass, Passes};

/// What is read at a time, in order: as much as cat(1) and cp(1) read.
const STEP: usize = 128 << 10;

/// Goes over a file.
pub fn passes(ask: &Passes) -> Result<Vec<Pass>, Failure> {
    let file = File::open(&ask.path)?;
    let len = file.metadata()?.len();
    let mapping = if ask.mmap { Some(Mapping::new(&file, 0, len as usize, false)?) } else { None };
    let step = if ask.random.is_some() { BLOCK } else { STEP };
    let offsets: Vec<u64> = match ask.random {
        Some(random) => random_offsets(random.seed, random.count, len).collect(),
        None => (0..len).step_by(step).collect(),
    };
    let mut buf = vec![0; step];
    let mut pass = || {
        let start = Instant::now();
        let mut sum = 0;
        for offset in &offsets {
            let part = &mut buf[..(len - offset).min(step as u64) as usize];
            match &mapping {
                Some(mapping) => {
                    for at in (0..part.len() as u64).step_by(BLOCK) {
                        let mut word = [0; 8];
                        mapping.copy_to(offset + at, &mut word)?;
                        sum = add(sum, &word);
                    }
                }
                None => {
                    file.read_exact_at(part, *offset)?;
                    sum = part.chunks(BLOCK).fold(sum, add);
                }
            }
        }
        let micros = start.elapsed().as_micros().try_into().unwrap_or(u64::MAX);
        Ok(Pass { micros, sum })
    };
    (0..ask.passes).map(|_| pass()).collect()
}

/// Adds the first word of a page.
fn add(sum: u64, page: &[u8]) -> u64 {
    let word = page.first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
    sum.wrapping_add(word)
}
