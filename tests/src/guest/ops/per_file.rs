//! Operations for per-file DAX: flags, files that the kernel gets to know in different ways, and opens in a row.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, OFlags};

use super::files::stat_handle;
use super::read::at_once;
use crate::guest::data::first_difference;
use crate::guest::{Failure, GuestPath, Known, MakeKnown, OpenLoop, Opened, Way};

/// The window's unit of mapping.
const CHUNK: u64 = 2 << 20;

/// Gives a name to what a handle stands for.
pub fn link_handle(file: &File, path: &GuestPath) -> Result<(), Failure> {
    use std::os::fd::AsRawFd;
    let from = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(rustix::fs::linkat(CWD, from, CWD, path.as_path(), AtFlags::SYMLINK_FOLLOW)?)
}

fn is_dax(path: &GuestPath) -> Result<bool, Failure> {
    let statx = rustix::fs::statx(
        CWD,
        path.as_path(),
        AtFlags::SYMLINK_NOFOLLOW,
        rustix::fs::StatxFlags::BASIC_STATS,
    )?;
    Ok((statx.stx_attributes_mask & statx.stx_attributes).contains(rustix::fs::StatxAttributes::DAX))
}

/// Has the kernel get to know files, then opens each anew and reads a byte of each chunk.
pub fn make_known(ask: &MakeKnown) -> Result<Vec<Known>, Failure> {
    if let Way::Listing = ask.way {
        for entry in fs::read_dir(&ask.dir)? {
            entry?;
        }
    }
    let make = |&size: &u64| {
        let path = ask.dir.join(size.to_string());
        let known = known_as(ask, size, &path).map_err(|failure| failure.within(&path))?;
        let file = File::open(&path)?;
        let opened = stat_handle(&file)?;
        if opened.size != size {
            return Err(Failure::new(format!("{path} has {} bytes", opened.size)));
        }
        let read = |offset| file.read_exact_at(&mut [0], offset);
        let errno = (0..size).step_by(CHUNK as usize).find_map(|offset| read(offset).err());
        let errno = errno.map_or(0, |error| error.raw_os_error().unwrap_or(-1));
        Ok(Known { known, opened: opened.dax, errno })
    };
    ask.sizes.iter().map(make).collect()
}

/// Whether a file is DAX when it has become known.
fn known_as(ask: &MakeKnown, size: u64, path: &GuestPath) -> Result<bool, Failure> {
    let mut options = File::options();
    options.read(true).write(true);
    let file = match ask.way {
        Way::LookUp | Way::Listing => return is_dax(path),
        Way::Link => {
            fs::hard_link(ask.dir.join(format!("first-{size}")), path)?;
            return is_dax(path);
        }
        Way::Create => options.create_new(true).open(path)?,
        Way::Unnamed => options.custom_flags(OFlags::TMPFILE.bits() as i32).open(&ask.dir)?,
    };
    if size > 0 {
        file.write_all_at(&[1], size - 1)?;
    }
    if let Way::Unnamed = ask.way {
        link_handle(&file, path)?;
    }
    Ok(stat_handle(&file)?.dax)
}

/// Appends to a file again and again, opening it each time. Returns the state at the first open, and each change with the
/// size that the file had.
pub fn append_steps(path: &GuestPath, step: usize, count: u32) -> Result<Vec<(u64, bool)>, Failure> {
    let mut seen: Vec<(u64, bool)> = Vec::new();
    let mut note = |file: &File| {
        let stat = stat_handle(file)?;
        if seen.last().is_none_or(|&(_, dax)| dax != stat.dax) {
            seen.push((stat.size, stat.dax));
        }
        Ok::<_, Failure>(stat.size)
    };
    for _ in 0..count {
        let file = File::options().write(true).open(path)?;
        let size = note(&file)?;
        file.write_all_at(&vec![7; step], size)?;
        // What it is while it is open.
        note(&file)?;
    }
    note(&File::open(path)?)?;
    Ok(seen)
}

/// Opens, reads, compares and closes, by some threads at once, for some time.
pub fn open_loop(ask: &OpenLoop) -> Result<Opened, Failure> {
    let end = Instant::now() + Duration::from_millis(ask.millis);
    let jobs = (0..ask.threads).map(|_| || open_until(ask, end));
    let mut total = Opened::default();
    for one in at_once(jobs)? {
        total.opens += one.opens;
        total.dax += one.dax;
        total.changes += one.changes;
    }
    Ok(total)
}

fn open_until(ask: &OpenLoop, end: Instant) -> Result<Opened, Failure> {
    let (mut opened, mut last) = (Opened::default(), None);
    let mut bytes = vec![0; 8192];
    while Instant::now() < end {
        for (path, content) in &ask.files {
            let file = File::open(path)?;
            let dax = stat_handle(&file)?.dax;
            let offset = opened.opens * 4096 % content.len.saturating_sub(bytes.len() as u64).max(1);
            file.read_exact_at(&mut bytes, offset)?;
            if let Some(at) = first_difference(content.seed, offset, &bytes) {
                return Err(Failure::new(format!("{path} differs at {at}, dax {dax}")));
            }
            if stat_handle(&file)?.dax != dax {
                return Err(Failure::new(format!("{path} changed from dax {dax} while it was open")));
            }
            opened.opens += 1;
            opened.dax += u64::from(dax);
            opened.changes += u64::from(last.replace(dax).is_some_and(|last| last != dax));
        }
    }
    Ok(opened)
}
