//! Work on many small files.

use std::fs;
use std::time::Instant;

use crate::guest::data::{Content, fill, first_difference};
use crate::guest::{Failure, GuestPath, SmallFiles, SmallFilesPhase};

/// Does one phase; says how many microseconds it took.
pub fn small_files(work: &SmallFiles) -> Result<u64, Failure> {
    let start = Instant::now();
    let new_name = |number: u32| work.dir.join(format!("renamed-{number:06}"));
    for number in work.first..work.first + work.count {
        match work.phase {
            SmallFilesPhase::Create => create(&work.path(number), work.content(number)),
            SmallFilesPhase::Read => read(&work.path(number), work.content(number)),
            SmallFilesPhase::Rename => fs::rename(work.path(number), new_name(number)).map_err(Failure::from),
            SmallFilesPhase::Remove => fs::remove_file(new_name(number)).map_err(Failure::from),
        }
        .map_err(|failure| failure.within(format_args!("file {number}")))?;
    }
    Ok(start.elapsed().as_micros().try_into().unwrap_or(u64::MAX))
}

fn create(path: &GuestPath, content: Content) -> Result<(), Failure> {
    let mut bytes = vec![0; content.len as usize];
    fill(content.seed, 0, &mut bytes);
    Ok(fs::write(path, bytes)?)
}

fn read(path: &GuestPath, content: Content) -> Result<(), Failure> {
    let bytes = fs::read(path)?;
    if bytes.len() as u64 != content.len {
        return Err(Failure::new(format!("{} bytes instead of {}", bytes.len(), content.len)));
    }
    match first_difference(content.seed, 0, &bytes) {
        Some(at) => Err(Failure::new(format!("another byte at {at}"))),
        None => Ok(()),
    }
}
