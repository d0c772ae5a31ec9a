//! Writing files.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::Mapping;
use super::read::at_once;
use crate::guest::data::fill;
use crate::guest::{Data, Failure, Write};

const STEP: usize = 64 << 10;
const PAGE: u64 = 4096;

/// Writes as asked: the range is cut into one part a writer, on page boundaries.
pub fn write(request: &Write) -> Result<(), Failure> {
    let file = File::options().read(true).write(true).open(&request.path)?;
    let len = match &request.data {
        Data::Bytes(bytes) => bytes.0.len() as u64,
        Data::Content(content) => content.len,
    };
    let part = len.div_ceil(request.writers.max(1) as u64).next_multiple_of(PAGE);
    let file = &file;
    let jobs = (0..len)
        .step_by(part.max(1) as usize)
        .map(|from| move || write_part(file, request, from, part.min(len - from)));
    at_once(jobs)?;
    if request.fsync {
        file.sync_all()?;
    }
    Ok(())
}

/// Writes the bytes `from..from + len` of what is to be written.
fn write_part(file: &File, request: &Write, from: u64, len: u64) -> Result<(), Failure> {
    let start = request.offset + from;
    // A mapping starts on a page, what is written need not.
    let lead = start % PAGE;
    let mapping = match request.mmap {
        true => Some(Mapping::new(file, start - lead, (lead + len) as usize, true)?),
        false => None,
    };
    let mut buf = vec![0; STEP];
    for done in (0..len).step_by(STEP) {
        let step = &mut buf[..(len - done).min(STEP as u64) as usize];
        match &request.data {
            Data::Bytes(bytes) => step.copy_from_slice(&bytes.0[(from + done) as usize..][..step.len()]),
            Data::Content(content) => fill(content.seed, start + done, step),
        }
        match &mapping {
            Some(mapping) => mapping.copy_from(lead + done, step)?,
            None => write_at(file, start + done, step)?,
        }
    }
    mapping.map_or(Ok(()), |mapping| mapping.sync())
}

/// Writes all bytes to an open file.
pub fn write_at(file: &File, offset: u64, bytes: &[u8]) -> Result<(), Failure> {
    Ok(file.write_all_at(bytes, offset)?)
}
