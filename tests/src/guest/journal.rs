//! What the driver can ask about writes that must outlive the virtual machine, and how it finds out whether they have.
//!
//! A journal is a file to which records are written one after another, each of which is made durable before the next one
//! is begun. All but [`Way::Rename`] write them in turn to the slots of a file; that one replaces the file. So at any
//! moment at most one record is being written, and what every slot contains follows from the number of the newest record.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::GuestPath;
use super::data::fill;

/// Bytes of a record: two pages, so that one of them can be there and the other not.
pub const RECORD: usize = 8192;

/// Records that a file has room for; the next one takes the place of the oldest.
pub const SLOTS: u64 = 32;

/// From where [`Way::Copy`] copies a record.
pub(crate) const COPIED: &str = "copy.from";
/// What [`Way::Rename`] renames.
pub(crate) const RENAMED: &str = "rename.new";

/// Journals to keep. For each record that is durable a line `synced PATH NUMBER` is printed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Journal {
    /// The directories; in each of them a file is written in each [`Way`], by a thread of its own.
    pub dirs: Vec<GuestPath>,
    /// How many records each file gets; the first has number 1.
    pub records: u64,
}

/// How records are written and made durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// pwrite(2), fsync(2) and fdatasync(2) in turn.
    Write,
    /// A shared mapping, msync(2).
    Map,
    /// O_DIRECT, fsync(2).
    Direct,
    /// copy_file_range(2) to a file that was opened with O_SYNC.
    Copy,
    /// A new file, fsync(2), rename(2) over the old one, fsync(2) of the directory.
    Rename,
}

impl Way {
    /// All of them.
    pub const ALL: [Way; 5] = [Way::Write, Way::Map, Way::Direct, Way::Copy, Way::Rename];

    /// The name of the file that is written so.
    pub fn file_name(self) -> &'static str {
        self.file_names()[0]
    }

    /// The names of all files that are written for it: beside that one, a record on its way into it.
    pub fn file_names(self) -> &'static [&'static str] {
        match self {
            Way::Write => &["write"],
            Way::Map => &["map"],
            Way::Direct => &["direct"],
            Way::Copy => &["copy", COPIED],
            Way::Rename => &["rename", RENAMED],
        }
    }

    /// Finds what has become of a journal in `dir` of which `synced` records were said to be durable. Returns the number of
    /// the newest record that is there.
    ///
    /// # Errors
    /// A record is missing or damaged that was durable; the file cannot be read.
    pub fn check(self, dir: &Path, synced: u64) -> Result<u64, String> {
        let path = dir.join(self.file_name());
        let newest = File::open(&path)
            .map_err(|error| error.to_string())
            .and_then(|file| self.newest(&file))
            .map_err(|error| {
                format!("{}, of which {synced} records were durable: {error}", path.display())
            })?;
        if newest < synced {
            return Err(format!("{}: {synced} records were durable, and {newest} are there", path.display()));
        }
        Ok(newest)
    }

    fn newest(self, file: &File) -> Result<u64, String> {
        let slots = if self == Way::Rename { 1 } else { SLOTS };
        let mut found = Vec::new();
        for slot in 0..slots {
            found.push(read_slot(file, slot).map_err(|error| error.to_string())?);
        }
        let newest = found.iter().filter_map(|bytes| number_of(bytes)).max().unwrap_or(0);
        if self == Way::Rename {
            // What is renamed is whole, whatever happens.
            return number_of(&found[0]).ok_or_else(|| format!("a damaged record, {:?}...", &found[0][..16]));
        }
        for (slot, bytes) in (0..slots).zip(&found) {
            let expected = record(newest_in(slot, newest));
            let in_flight = record(newest + 1);
            let is_next = slot == newest % SLOTS;
            let is_right = if is_next { is_mix(bytes, &expected, &in_flight) } else { *bytes == expected };
            if !is_right {
                let what =
                    number_of(bytes).map_or("a damaged record".into(), |number| format!("record {number}"));
                return Err(format!("the newest record is {newest}, and slot {slot} has {what}"));
            }
        }
        Ok(newest)
    }
}

/// The bytes of the record with a number; number 0 stands for a slot to which nothing has been written.
pub fn record(number: u64) -> Vec<u8> {
    let mut bytes = vec![0; RECORD];
    if number > 0 {
        fill(number, 0, &mut bytes);
        bytes[..8].copy_from_slice(&number.to_le_bytes());
    }
    bytes
}

/// Where the record with a number is in a file with slots.
pub fn offset_of(number: u64) -> u64 {
    (number - 1) % SLOTS * RECORD as u64
}

/// The number of the record that these bytes are, if they are a whole one.
fn number_of(bytes: &[u8]) -> Option<u64> {
    let number = u64::from_le_bytes(bytes[..8].try_into().ok()?);
    (record(number) == bytes).then_some(number)
}

/// The number of the record that is in a slot when `newest` have been written.
fn newest_in(slot: u64, newest: u64) -> u64 {
    if newest <= slot { 0 } else { newest - (newest - 1 - slot) % SLOTS }
}

/// Whether each word is that of one record or of the other.
fn is_mix(bytes: &[u8], old: &[u8], new: &[u8]) -> bool {
    let words = bytes.chunks(8).zip(old.chunks(8).zip(new.chunks(8)));
    words.into_iter().all(|(word, (old, new))| word == old || word == new)
}

/// The bytes of a slot; zeros behind the end of the file.
fn read_slot(file: &File, slot: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; RECORD];
    let mut done = 0;
    while done < RECORD {
        match file.read_at(&mut bytes[done..], slot * RECORD as u64 + done as u64)? {
            0 => break,
            len => done += len,
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A journal of so many records, and some bytes of the next.
    fn journal(records: u64, of_next: usize) -> (tempfile::TempDir, File) {
        let dir = tempfile::tempdir().unwrap();
        let file = File::create_new(dir.path().join("write")).unwrap();
        for number in 1..=records {
            file.write_all_at(&record(number), offset_of(number)).unwrap();
        }
        file.write_all_at(&record(records + 1)[..of_next], offset_of(records + 1)).unwrap();
        (dir, file)
    }

    #[test]
    fn journals_are_found_as_they_were_left() {
        for records in [0, 1, 7, SLOTS - 1, SLOTS, SLOTS + 1, 5 * SLOTS + 3] {
            for of_next in [0, 8, 4096, 5000] {
                let (dir, _file) = journal(records, of_next);
                assert_eq!(
                    Way::Write.check(dir.path(), records),
                    Ok(records),
                    "{records} and {of_next} bytes"
                );
            }
            let (dir, _file) = journal(records, RECORD);
            assert_eq!(Way::Write.check(dir.path(), records), Ok(records + 1), "one that nobody was told of");
        }
    }

    #[test]
    fn what_was_lost_or_damaged_is_found() {
        let (dir, _file) = journal(40, 0);
        assert!(Way::Write.check(dir.path(), 41).unwrap_err().contains("41 records were durable, and 40"));
        // An old record that came back, one that never was, a byte, and a part of the newest that is missing.
        let damages: [(u64, Vec<u8>); 4] = [
            (offset_of(35), record(3)),
            (offset_of(20), record(1000)),
            (offset_of(30) + 5000, vec![1]),
            (offset_of(40) + 4096, record(8)[4096..].to_vec()),
        ];
        for (offset, bytes) in damages {
            let (dir, file) = journal(40, 0);
            file.write_all_at(&bytes, offset).unwrap();
            assert!(Way::Write.check(dir.path(), 40).is_err(), "{} bytes at {offset}", bytes.len());
        }
        let (dir, file) = journal(3, 0);
        file.set_len(2 * RECORD as u64 + 100).unwrap();
        assert!(Way::Write.check(dir.path(), 3).is_err());
    }

    #[test]
    fn a_file_that_was_renamed_is_never_half_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rename");
        std::fs::write(&path, record(9)).unwrap();
        assert_eq!(Way::Rename.check(dir.path(), 8), Ok(9));
        assert!(Way::Rename.check(dir.path(), 10).is_err());
        std::fs::write(&path, &record(9)[..4096]).unwrap();
        assert!(Way::Rename.check(dir.path(), 8).is_err());
    }
}
