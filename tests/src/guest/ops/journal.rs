//! Writing records that are durable one by one.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use rustix::fs::OFlags;

use super::Mapping;
use super::read::at_once;
use crate::guest::journal::{COPIED, RECORD, RENAMED, SLOTS, Way, offset_of, record};
use crate::guest::{Failure, GuestPath, Journal};

/// What O_DIRECT wants the address of a buffer to be a multiple of, wherever it is used.
const ALIGNMENT: usize = 4096;

/// How many records a journal may be ahead of the slowest one. Each record is said on the serial console, whose interrupts all
/// go to one CPU, and on a host that is busy leave a thread there no time.
const LEAD: u64 = SLOTS;

/// Keeps the journals; `say` is told of each record that is durable. The first failure ends them all.
pub fn journal(ask: &Journal, say: impl Fn(&GuestPath, u64) + Sync) -> Result<(), Failure> {
    let (has_failed, say) = (&AtomicBool::new(false), &say);
    let ways = ask.dirs.iter().flat_map(|dir| Way::ALL.map(|way| (dir, way)));
    let written: Vec<_> = ways.clone().map(|_| AtomicU64::new(0)).collect();
    let written = &written[..];
    let is_ahead = |number: u64| written.iter().any(|of_other| number > of_other.load(Relaxed) + LEAD);
    let journals = ways.zip(written).map(|((dir, way), count)| {
        move || {
            let path = dir.join(way.file_name());
            let written = Writer::open(dir, way).and_then(|mut writer| {
                for number in 1..=ask.records {
                    while is_ahead(number) && !has_failed.load(Relaxed) {
                        thread::sleep(Duration::from_millis(1));
                    }
                    if has_failed.load(Relaxed) {
                        break;
                    }
                    writer.write(number, &record(number))?;
                    say(&path, number);
                    count.store(number, Relaxed);
                }
                Ok(())
            });
            has_failed.fetch_or(written.is_err(), Relaxed);
            written.map_err(|failure| failure.within(way.file_name()))
        }
    });
    at_once(journals).map(drop)
}

/// A journal that is being kept, in its way.
enum Writer {
    Write(File),
    Map(Mapping),
    Direct { file: File, buffer: Vec<u8>, start: usize },
    Copy { from: File, to: File },
    Rename { path: GuestPath, new: GuestPath, dir: File },
}

impl Writer {
    fn open(dir: &GuestPath, way: Way) -> Result<Writer, Failure> {
        let path = dir.join(way.file_name());
        let mut options = File::options();
        options.read(true).write(true).create_new(true);
        Ok(match way {
            Way::Write => Writer::Write(options.open(&path)?),
            Way::Map => {
                let file = options.open(&path)?;
                let len = SLOTS * RECORD as u64;
                file.set_len(len)?;
                Writer::Map(Mapping::new(&file, 0, len as usize, true)?)
            }
            Way::Direct => {
                let file = options.custom_flags(OFlags::DIRECT.bits() as i32).open(&path)?;
                let buffer = vec![0; RECORD + ALIGNMENT];
                let start = buffer.as_ptr().align_offset(ALIGNMENT);
                Writer::Direct { file, buffer, start }
            }
            Way::Copy => {
                let from = options.open(dir.join(COPIED))?;
                Writer::Copy { from, to: options.custom_flags(OFlags::SYNC.bits() as i32).open(&path)? }
            }
            Way::Rename => {
                let new = dir.join(RENAMED);
                Writer::Rename { path, new, dir: File::open(dir)? }
            }
        })
    }

    /// Writes a record and makes it durable.
    fn write(&mut self, number: u64, bytes: &[u8]) -> Result<(), Failure> {
        match self {
            Writer::Write(file) => {
                file.write_all_at(bytes, offset_of(number))?;
                if number.is_multiple_of(2) { file.sync_data()? } else { file.sync_all()? }
            }
            Writer::Map(mapping) => {
                mapping.copy_from(offset_of(number), bytes)?;
                mapping.sync()?;
            }
            Writer::Direct { file, buffer, start } => {
                let aligned = &mut buffer[*start..][..RECORD];
                aligned.copy_from_slice(bytes);
                file.write_all_at(aligned, offset_of(number))?;
                file.sync_all()?;
            }
            Writer::Copy { from, to } => {
                from.write_all_at(bytes, 0)?;
                let (mut done, mut place) = (0, offset_of(number));
                while done < RECORD as u64 {
                    let copied =
                        rustix::fs::copy_file_range(&*from, Some(&mut done), &*to, Some(&mut place), RECORD)?;
                    if copied == 0 {
                        return Err(Failure::new("a copy ended before its source"));
                    }
                }
            }
            Writer::Rename { path, new, dir } => {
                let file = File::create(&*new)?;
                file.write_all_at(bytes, 0)?;
                file.sync_all()?;
                fs::rename(&*new, &*path)?;
                dir.sync_all()?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::path::Path;
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn every_record_is_said_and_found() {
        let dir = tempfile::tempdir().unwrap();
        let dirs: Vec<_> = ["a", "b"].map(|name| dir.path().join(name)).to_vec();
        dirs.iter().for_each(|dir| fs::create_dir(dir).unwrap());
        let said = Mutex::new(BTreeMap::<String, Vec<u64>>::new());
        let ask =
            Journal { dirs: dirs.iter().map(|dir| GuestPath::from(dir.as_path())).collect(), records: 70 };
        journal(&ask, |path, number| {
            let name = path.as_path().display().to_string();
            said.lock().unwrap().entry(name).or_default().push(number);
        })
        .unwrap();
        let said = said.into_inner().unwrap();
        assert_eq!(said.len(), 2 * Way::ALL.len());
        assert!(said.values().all(|numbers| numbers.iter().copied().eq(1..=70)), "{said:?}");
        for dir in &dirs {
            for way in Way::ALL {
                assert_eq!(way.check(dir, 70), Ok(70));
            }
            let found =
                fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
            let known = Way::ALL.iter().flat_map(|way| way.file_names()).map(|name| (*name).to_owned());
            let renamed = [RENAMED.to_owned()].into();
            assert_eq!(&known.collect::<BTreeSet<_>>() - &renamed, found.collect(), "what a kill may leave");
        }
    }

    #[test]
    fn the_first_failure_ends_them_all() {
        let missing = GuestPath::from(Path::new("/no/such/directory"));
        let ask = Journal { dirs: vec![missing], records: u64::MAX };
        assert!(journal(&ask, |_, _| ()).is_err());
    }
}
