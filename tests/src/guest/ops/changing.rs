//! Reading and writing files that change on the host.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use super::Mapping;
use super::read::at_once;
use crate::guest::data::{BLOCK, fill, random_offsets};
use crate::guest::{Changing, Failure, Met};

/// How many blocks a thread accesses between two looks at the clock.
const STEP: u64 = 64;

/// Accesses the file until the time is up.
pub fn changing(ask: &Changing) -> Result<Met, Failure> {
    let end = Instant::now() + Duration::from_millis(ask.millis);
    let file = File::options().read(true).write(ask.writers > 0).open(&ask.path)?;
    let len = ask.content.len as usize;
    let mapping = ask.mmap.then(|| Mapping::new(&file, 0, len, ask.writers > 0)).transpose()?;
    let (file, mapping) = (&file, mapping.as_ref());
    let threads = (0..ask.readers + ask.writers).map(|number| {
        let is_reader = number < ask.readers;
        move || access(ask, file, mapping, number as u64, is_reader, end)
    });
    let mut met = Met::default();
    for one in at_once(threads)? {
        met.right += one.right;
        met.zeros += one.zeros;
        met.written += one.written;
        met.wrong = met.wrong.or(one.wrong);
    }
    Ok(met)
}

fn access(
    ask: &Changing,
    file: &File,
    mapping: Option<&Mapping>,
    number: u64,
    is_reader: bool,
    end: Instant,
) -> Result<Met, Failure> {
    let mut met = Met::default();
    let (mut found, mut expected) = ([0; BLOCK], [0; BLOCK]);
    for seed in (number..).step_by(1000) {
        for offset in random_offsets(seed, STEP, ask.content.len) {
            fill(ask.content.seed, offset, &mut expected);
            if !is_reader {
                match mapping {
                    Some(mapping) => mapping.copy_from(offset, &expected)?,
                    None => file.write_all_at(&expected, offset)?,
                }
                met.written += 1;
                continue;
            }
            let len = match mapping {
                Some(mapping) => mapping.copy_to(offset, &mut found).map(|()| BLOCK)?,
                None => file.read_at(&mut found, offset)?,
            };
            if found[..len] == expected[..len] {
                met.right += 1;
            } else if offset >= ask.stable && is_partly_zeros(&found[..len], &expected[..len]) {
                met.zeros += 1;
            } else {
                met.wrong = Some(offset);
                return Ok(met);
            }
        }
        if Instant::now() > end {
            break;
        }
    }
    Ok(met)
}

/// A block that goes or comes while it is read is there in part.
fn is_partly_zeros(found: &[u8], expected: &[u8]) -> bool {
    found.iter().zip(expected).all(|(found, expected)| found == expected || *found == 0)
}
