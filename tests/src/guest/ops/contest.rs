//! Groups of readers that want more of a window than there is.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use super::Mapping;
use super::read::at_once;
use crate::guest::data::{BLOCK, first_difference, word};
use crate::guest::{Contest, Crowd, Failure, Fared, ReadOrder};

/// From one block of a stream to the next.
const STRIDE: u64 = 64 << 10;

/// Has all crowds read, and says how each fared.
pub fn contest(ask: &Contest) -> Result<Vec<Fared>, Failure> {
    let time = Duration::from_millis(ask.millis);
    let jobs = ask
        .crowds
        .iter()
        .flat_map(|crowd| (0..crowd.readers as u64).map(move |reader| move || read(crowd, reader, time)));
    let mut all = at_once(jobs)?.into_iter();
    Ok(ask.crowds.iter().map(|crowd| together(all.by_ref().take(crowd.readers))).collect())
}

fn together(readers: impl Iterator<Item = Fared>) -> Fared {
    let join = |all: Fared, one: Fared| Fared {
        blocks: all.blocks + one.blocks,
        fewest: all.fewest.min(one.fewest),
        longest_micros: all.longest_micros.max(one.longest_micros),
        wrong: all.wrong.or(one.wrong),
    };
    readers.reduce(join).unwrap_or_default()
}

fn read(crowd: &Crowd, reader: u64, time: Duration) -> Result<Fared, Failure> {
    let mut files = Vec::new();
    for (path, content) in &crowd.files {
        let file = File::open(path)?;
        let mapping = match crowd.mmap {
            true => Some(Mapping::new(&file, 0, content.len as usize, false)?),
            false => None,
        };
        files.push((file, mapping, *content));
    }
    let stream = files.iter().enumerate().flat_map(|(number, (_, _, content))| {
        (0..content.len / STRIDE).map(move |stride| (number, stride * STRIDE))
    });
    let mut stream = stream.cycle();
    let mut fared = Fared::default();
    let mut block = [0; BLOCK];
    let start = Instant::now();
    for turn in 0.. {
        let next = match crowd.order {
            ReadOrder::Stream => stream.next(),
            ReadOrder::Random => {
                let number = word(reader, 2 * turn) as usize % files.len().max(1);
                let blocks =
                    |(_, _, content): &(_, _, crate::guest::data::Content)| content.len / BLOCK as u64;
                let blocks = files.get(number).map_or(1, blocks).max(1);
                Some((number, word(reader, 2 * turn + 1) % blocks * BLOCK as u64))
            }
        };
        let Some((number, offset)) = next else { break };
        let Some((file, mapping, content)) = files.get(number) else { break };
        let asked = Instant::now();
        match mapping {
            Some(mapping) => mapping.copy_to(offset, &mut block)?,
            None => file.read_exact_at(&mut block, offset)?,
        }
        let took = asked.elapsed().as_micros().try_into().unwrap_or(u64::MAX);
        fared.longest_micros = fared.longest_micros.max(took);
        fared.blocks += 1;
        if first_difference(content.seed, offset, &block).is_some() {
            fared.wrong = Some((number, offset));
            break;
        }
        if start.elapsed() >= time {
            break;
        }
    }
    fared.fewest = fared.blocks;
    Ok(fared)
}
