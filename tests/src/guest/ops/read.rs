//! Reading files whole, in many ways and by many readers.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Barrier;
use std::thread;
use std::time::Instant;

use super::Mapping;
use crate::guest::data::{BLOCK, Content, Hasher, first_difference, random_offsets};
use crate::guest::{Access, Bytes, Digest, Failure, GuestPath, Sha256, Verified, Verify};

const STEP: usize = 64 << 10;

/// Runs the jobs at once, each in a thread of its own that starts when all are there; their results in order.
pub fn at_once<T: Send>(
    jobs: impl IntoIterator<Item = impl FnOnce() -> Result<T, Failure> + Send>,
) -> Result<Vec<T>, Failure> {
    let jobs: Vec<_> = jobs.into_iter().collect();
    let start = Barrier::new(jobs.len());
    let start = &start;
    thread::scope(|scope| {
        let spawn = |job| scope.spawn(move || run_after(start, job));
        let threads: Vec<_> = jobs.into_iter().map(spawn).collect();
        let join = |thread: thread::ScopedJoinHandle<'_, Result<T, Failure>>| {
            thread.join().unwrap_or_else(|_| Err(Failure::new("a thread of the agent panicked")))
        };
        threads.into_iter().map(join).collect()
    })
}

fn run_after<T>(start: &Barrier, job: impl FnOnce() -> T) -> T {
    start.wait();
    job()
}

fn micros_since(start: Instant) -> u64 {
    start.elapsed().as_micros().try_into().unwrap_or(u64::MAX)
}

/// Digests of a file, one a reader.
pub fn sha256(request: &Sha256) -> Result<Vec<Digest>, Failure> {
    at_once((0..request.readers.max(1) as u64).map(|reader| {
        let how = match request.how {
            Access::RandomRead(random) => Access::RandomRead(random.nth(reader)),
            Access::RandomMmap(random) => Access::RandomMmap(random.nth(reader)),
            other => other,
        };
        move || digest(&request.path, how)
    }))
}

fn digest(path: &GuestPath, how: Access) -> Result<Digest, Failure> {
    let start = Instant::now();
    let file = File::open(path)?;
    let len = file.metadata()?.len();
    let mut hasher = Hasher::default();
    let mut bytes = 0;
    match how {
        Access::Read(step) => {
            let mut buf = vec![0; step.max(1)];
            loop {
                match file.read_at(&mut buf, bytes)? {
                    0 => break,
                    some => {
                        hasher.update(&buf[..some]);
                        bytes += some as u64;
                    }
                }
            }
        }
        Access::Mmap => {
            let mapping = Mapping::new(&file, 0, len as usize, false)?;
            let mut buf = vec![0; STEP];
            while bytes < len {
                let step = &mut buf[..(len - bytes).min(STEP as u64) as usize];
                mapping.copy_to(bytes, step)?;
                hasher.update(step);
                bytes += step.len() as u64;
            }
        }
        Access::Touch => {
            let mapping = Mapping::new(&file, 0, len as usize, false)?;
            let mut touched = vec![0; len.div_ceil(BLOCK as u64) as usize];
            for (offset, byte) in (0..len).step_by(BLOCK).zip(touched.chunks_mut(1)) {
                mapping.copy_to(offset, byte)?;
            }
            bytes = touched.len() as u64;
            hasher.update(&touched);
        }
        Access::RandomRead(random) => {
            let mut block = [0; BLOCK];
            for offset in random_offsets(random.seed, random.count, len) {
                file.read_exact_at(&mut block, offset)?;
                hasher.update_block(offset, &block);
                bytes += BLOCK as u64;
            }
        }
        Access::RandomMmap(random) => {
            let mapping = Mapping::new(&file, 0, len as usize, false)?;
            let mut block = [0; BLOCK];
            for offset in random_offsets(random.seed, random.count, len) {
                mapping.copy_to(offset, &mut block)?;
                hasher.update_block(offset, &block);
                bytes += BLOCK as u64;
            }
        }
    }
    Ok(Digest { sha256: hasher.finish(), bytes, micros: micros_since(start) })
}

/// Compares files with what they must contain.
pub fn verify(request: &Verify) -> Result<Verified, Failure> {
    let start = Instant::now();
    let readers = request.readers.max(1);
    let jobs = request.files.iter().flat_map(|(path, content)| {
        (0..readers).map(move |reader| {
            move || verify_one(path, *content, request.mmap, content.len / readers as u64 * reader as u64)
        })
    });
    let mut verified = Verified { bytes: 0, differs: Vec::new(), micros: 0 };
    for ((path, _), results) in request.files.iter().zip(at_once(jobs)?.chunks(readers)) {
        for (bytes, differs) in results {
            verified.bytes += bytes;
            verified.differs.extend(differs.map(|at| (path.clone(), at)));
        }
    }
    verified.micros = micros_since(start);
    Ok(verified)
}

fn verify_one(
    path: &GuestPath,
    content: Content,
    mmap: bool,
    first: u64,
) -> Result<(u64, Option<u64>), Failure> {
    let file = File::open(path)?;
    let len = file.metadata()?.len();
    if len != content.len {
        return Ok((0, Some(len.min(content.len))));
    }
    let mapping = if mmap { Some(Mapping::new(&file, 0, len as usize, false)?) } else { None };
    let first = first / STEP as u64 * STEP as u64;
    let mut buf = vec![0; STEP];
    let mut bytes = 0;
    for offset in (first..len).step_by(STEP).chain((0..first).step_by(STEP)) {
        let step = &mut buf[..(len - offset).min(STEP as u64) as usize];
        match &mapping {
            Some(mapping) => mapping.copy_to(offset, step)?,
            None => file.read_exact_at(step, offset)?,
        }
        bytes += step.len() as u64;
        if let Some(at) = first_difference(content.seed, offset, step) {
            return Ok((bytes, Some(at)));
        }
    }
    Ok((bytes, None))
}

/// Bytes of a file.
pub fn read_bytes(path: &GuestPath, offset: u64, len: usize) -> Result<Bytes, Failure> {
    read_at(&File::open(path)?, offset, len)
}

/// Bytes of an open file; fewer at its end.
pub fn read_at(file: &File, offset: u64, len: usize) -> Result<Bytes, Failure> {
    let mut bytes = vec![0; len];
    let mut done = 0;
    while done < len {
        match file.read_at(&mut bytes[done..], offset + done as u64)? {
            0 => break,
            some => done += some,
        }
    }
    bytes.truncate(done);
    Ok(Bytes(bytes))
}
