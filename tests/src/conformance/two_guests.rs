//! What two clients of one directory must see of each other: `conformance peer first DIR` in one guest, `second` in another,
//! or two processes on the host as the reference.
//!
//! They take turns by files that one makes and the other waits for. As shares with `cache=never` promise that nothing is
//! kept, what one has done before its turn ended is looked for once by the other, not until it appears.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use clap::ValueEnum;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// One waits this long for the other: the other's guest may still boot, on an emulated host.
const PATIENCE: Duration = Duration::from_secs(1800);
/// Beyond the end of a chunk of a window.
const LARGE: u64 = (4 << 20) + 123;

/// Who of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Party {
    /// It makes and changes.
    First,
    /// It looks.
    Second,
}

/// One of the two, in the directory that they share.
#[derive(Debug)]
pub struct Peer {
    party: Party,
    dir: PathBuf,
    rounds: u64,
    turns: u64,
}

/// Why a case failed.
type Check = Result<(), Box<dyn std::error::Error>>;

/// What one does, or sees.
type Step = fn(&Peer) -> Check;

/// A case.
struct Case {
    name: &'static str,
    steps: Steps,
}

/// Who does what in a case.
enum Steps {
    /// The first does something, and then the second sees it.
    InTurn(Step, Step),
    /// Both do the same at the same time.
    AtOnce(Step),
}

const fn in_turn(name: &'static str, first: Step, second: Step) -> Case {
    Case { name, steps: Steps::InTurn(first, second) }
}

const fn at_once(name: &'static str, step: Step) -> Case {
    Case { name, steps: Steps::AtOnce(step) }
}

/// The cases, in an order in which each finds what it needs.
const CASES: [Case; 14] = [
    in_turn("a-new-file-is-there", make, made),
    in_turn("a-file-is-written-over", overwrite, overwritten),
    in_turn("a-file-grows", append, appended),
    in_turn("a-file-shrinks", shrink, shrunk),
    in_turn("a-file-is-replaced", replace, replaced),
    in_turn("names-of-all-kinds", names, named),
    in_turn("attributes-change", set_attributes, attributes_set),
    in_turn("names-go", remove, removed),
    in_turn("a-hole-is-punched", punch, punched),
    in_turn("files-for-both", make_ready, made_ready),
    at_once("both-append-to-one-file", append_records),
    at_once("only-one-makes-a-name", exclusive),
    at_once("both-rename-to-one-name", rename_over),
    at_once("nothing-is-lost", look_at_all),
];

/// How many cases each party goes through, with or without [`SHARED_MAPPING`].
pub const fn case_count(mapping: bool) -> usize {
    CASES.len() + mapping as usize
}

/// The case that only files in DAX, or on one host, can pass.
pub const SHARED_MAPPING: &str = "a-mapping-is-shared";

impl Peer {
    /// One of the two. `rounds`: how often both do the same to one file.
    pub fn new(party: Party, dir: PathBuf, rounds: u64) -> Peer {
        Peer { party, dir, rounds, turns: 0 }
    }

    /// Goes through all cases, with [`SHARED_MAPPING`] if `mapping` says so, and prints a line for each: `@case NAME
    /// STATUS`. The names of those that failed here.
    ///
    /// # Errors
    /// The other party does not come, or the directory cannot be used.
    pub fn run(mut self, mapping: bool) -> io::Result<Vec<&'static str>> {
        let shared = mapping.then_some(&const { at_once(SHARED_MAPPING, Peer::shared_memory) });
        let mut failed = Vec::new();
        for case in CASES.iter().chain(shared) {
            let result = match case.steps {
                Steps::AtOnce(step) => step(&self),
                Steps::InTurn(first, second) => {
                    let made = if self.party == Party::First { first(&self) } else { Ok(()) };
                    self.meet()?;
                    if self.party == Party::Second { second(&self) } else { made }
                }
            };
            self.meet()?;
            let status = i32::from(result.is_err());
            if let Err(error) = result {
                println!("{error}");
                failed.push(case.name);
            }
            println!("@case {} {status}", case.name);
        }
        Ok(failed)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Waits until the other is here as well.
    fn meet(&mut self) -> io::Result<()> {
        self.turns += 1;
        let turn = |party: Party| self.path(&format!("turn-{}-{party:?}", self.turns));
        let other = if self.party == Party::First { Party::Second } else { Party::First };
        File::create(turn(self.party))?;
        let start = Instant::now();
        while fs::symlink_metadata(turn(other)).is_err() {
            if start.elapsed() > PATIENCE {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "The other party does not come"));
            }
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Both map one page of a file, and count up by turns: each sees the other's store without a system call.
    fn shared_memory(&self) -> Check {
        let file = OpenOptions::new().read(true).write(true).open(self.path("ready"))?;
        let length = 4096;
        let flags = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: the kernel chooses where, so nothing else is there.
        let page = unsafe { mmap(ptr::null_mut(), length, flags.0, flags.1, &file, 0) }?;
        // SAFETY: the page is mapped, aligned, and unmapped after the last use; whoever else changes it does so atomically.
        let counter = unsafe { AtomicU64::from_ptr(page.cast()) };
        let mine = if self.party == Party::First { 0 } else { 1 };
        let start = Instant::now();
        let mut result = Ok(());
        loop {
            let count = counter.load(Ordering::Acquire);
            if count >= 2 * self.rounds {
                break;
            }
            if count % 2 == mine {
                counter.store(count + 1, Ordering::Release);
            } else if start.elapsed() > PATIENCE / 10 {
                result = Err(format!("it stays at {count}").into());
                break;
            } else {
                thread::sleep(Duration::from_millis(1));
            }
        }
        // SAFETY: it is the mapping made above, and `counter` is not used any more.
        unsafe { munmap(page, length) }?;
        result
    }
}

/// Fails unless it is as expected.
fn expect<T: PartialEq + std::fmt::Debug>(what: &str, found: T, expected: T) -> Check {
    match found == expected {
        true => Ok(()),
        false => Err(format!("{what}: {found:?}, not {expected:?}").into()),
    }
}

/// Contents that differ in each 8 bytes and from one version to another.
fn contents(version: u64, length: u64) -> Vec<u8> {
    let words = (0..length.div_ceil(8)).flat_map(|word| (word * 257 + version).to_le_bytes());
    words.take(usize::try_from(length).unwrap_or(usize::MAX)).collect()
}

/// Reads a file through a new descriptor.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Compares a file without printing it.
fn expect_contents(peer: &Peer, name: &str, expected: &[u8]) -> Check {
    let path = peer.path(name);
    expect("the size", fs::metadata(&path)?.len(), expected.len() as u64)?;
    let found = read(&path)?;
    expect("the bytes read", found.len(), expected.len())?;
    let difference = found.iter().zip(expected).position(|(found, expected)| found != expected);
    expect("the first wrong byte", difference, None)
}

fn make(peer: &Peer) -> Check {
    Ok(fs::write(peer.path("file"), contents(1, LARGE))?)
}

fn made(peer: &Peer) -> Check {
    expect_contents(peer, "file", &contents(1, LARGE))
}

/// In the middle, across the border between two chunks of a window.
fn overwrite(peer: &Peer) -> Check {
    let file = OpenOptions::new().write(true).open(peer.path("file"))?;
    Ok(file.write_all_at(&contents(2, 1 << 20), (2 << 20) - (1 << 19))?)
}

fn overwritten(peer: &Peer) -> Check {
    let mut expected = contents(1, LARGE);
    let begin = (2 << 20) - (1 << 19);
    expected[begin..begin + (1 << 20)].copy_from_slice(&contents(2, 1 << 20));
    expect_contents(peer, "file", &expected)
}

fn append(peer: &Peer) -> Check {
    let mut file = OpenOptions::new().write(true).open(peer.path("file"))?;
    file.set_len(1000)?;
    file.seek(SeekFrom::End(0))?;
    Ok(file.write_all(&contents(3, 5000))?)
}

fn appended(peer: &Peer) -> Check {
    expect_contents(peer, "file", &[contents(1, 1000), contents(3, 5000)].concat())
}

fn shrink(peer: &Peer) -> Check {
    let file = OpenOptions::new().write(true).open(peer.path("file"))?;
    file.set_len(10)?;
    Ok(file.set_len(9000)?)
}

fn shrunk(peer: &Peer) -> Check {
    let mut expected = contents(1, 10);
    expected.resize(9000, 0);
    expect_contents(peer, "file", &expected)
}

fn replace(peer: &Peer) -> Check {
    fs::write(peer.path("new"), contents(4, 7000))?;
    Ok(fs::rename(peer.path("new"), peer.path("file"))?)
}

fn replaced(peer: &Peer) -> Check {
    expect("the old name", peer.path("new").try_exists()?, false)?;
    expect_contents(peer, "file", &contents(4, 7000))
}

fn names(peer: &Peer) -> Check {
    fs::create_dir_all(peer.path("directory/below"))?;
    fs::hard_link(peer.path("file"), peer.path("directory/linked"))?;
    Ok(symlink("linked", peer.path("directory/link"))?)
}

fn named(peer: &Peer) -> Check {
    let (file, linked) = (fs::metadata(peer.path("file"))?, fs::metadata(peer.path("directory/linked"))?);
    expect("the inode", linked.ino(), file.ino())?;
    expect("the number of links", (file.nlink(), linked.nlink()), (2, 2))?;
    expect("the link", fs::read_link(peer.path("directory/link"))?, PathBuf::from("linked"))?;
    expect_contents(peer, "directory/link", &contents(4, 7000))?;
    let mut listed = fs::read_dir(peer.path("directory"))?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<io::Result<Vec<_>>>()?;
    listed.sort();
    expect("the listing", listed, ["below", "link", "linked"].map(str::to_owned).to_vec())
}

/// The mode, owner and time that one sets and the other looks for.
const ATTRIBUTES: (u32, u32, u32, u64) = (0o2751, 1, 2, 1_000_000_000);

fn set_attributes(peer: &Peer) -> Check {
    let (mode, uid, gid, seconds) = ATTRIBUTES;
    std::os::unix::fs::chown(peer.path("file"), Some(uid), Some(gid))?;
    fs::set_permissions(peer.path("file"), Permissions::from_mode(mode))?;
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    Ok(File::open(peer.path("file"))?.set_modified(time)?)
}

fn attributes_set(peer: &Peer) -> Check {
    let found = fs::metadata(peer.path("file"))?;
    let found = (found.mode() & 0o7777, found.uid(), found.gid(), found.mtime().unsigned_abs());
    expect("mode, owner, group, time", found, ATTRIBUTES)
}

fn remove(peer: &Peer) -> Check {
    fs::remove_dir_all(peer.path("directory"))?;
    Ok(fs::remove_file(peer.path("file"))?)
}

fn removed(peer: &Peer) -> Check {
    for name in ["file", "directory", "directory/linked"] {
        let found = fs::symlink_metadata(peer.path(name)).map(|_| ()).map_err(|error| error.kind());
        expect(name, found, Err(io::ErrorKind::NotFound))?;
    }
    Ok(())
}

fn punch(peer: &Peer) -> Check {
    fs::write(peer.path("holes"), contents(5, LARGE))?;
    let file = OpenOptions::new().write(true).open(peer.path("holes"))?;
    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    Ok(rustix::fs::fallocate(&file, flags, 1 << 20, 2 << 20)?)
}

fn punched(peer: &Peer) -> Check {
    let mut expected = contents(5, LARGE);
    expected[1 << 20..3 << 20].fill(0);
    expect_contents(peer, "holes", &expected)
}

fn make_ready(peer: &Peer) -> Check {
    fs::write(peer.path("ready"), vec![0; 4096])?;
    fs::write(peer.path("records"), "")?;
    Ok(fs::write(peer.path("target"), contents(0, 8192))?)
}

fn made_ready(peer: &Peer) -> Check {
    expect_contents(peer, "target", &contents(0, 8192))
}

/// Records of 64 bytes with the party and a number.
fn record(party: Party, number: u64) -> String {
    format!("{:<63}\n", format!("{party:?} {number}"))
}

fn append_records(peer: &Peer) -> Check {
    let mut file = OpenOptions::new().append(true).open(peer.path("records"))?;
    for number in 0..peer.rounds {
        file.write_all(record(peer.party, number).as_bytes())?;
    }
    Ok(())
}

/// O_EXCL: of each name exactly one is the maker, who leaves a file of its own beside it.
fn exclusive(peer: &Peer) -> Check {
    for number in 0..peer.rounds {
        match File::create_new(peer.path(&format!("name-{number}"))) {
            Ok(_) => drop(File::create(peer.path(&format!("name-{number}-{:?}", peer.party)))?),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Whoever reads the name meanwhile gets one version, whole.
fn rename_over(peer: &Peer) -> Check {
    for number in 0..peer.rounds {
        let mine = peer.path(&format!("version-{:?}", peer.party));
        fs::write(&mine, contents(number, 8192))?;
        fs::rename(&mine, peer.path("target"))?;
        let found = read(&peer.path("target"))?;
        let version = found.first_chunk().map(|word| u64::from_le_bytes(*word)).unwrap_or(u64::MAX);
        expect("versions in one file", found == contents(version, 8192), true)?;
    }
    Ok(())
}

fn look_at_all(peer: &Peer) -> Check {
    let records = String::from_utf8(read(&peer.path("records"))?)?;
    expect("the size of all records", records.len() as u64, 64 * 2 * peer.rounds)?;
    for party in [Party::First, Party::Second] {
        let found: Vec<_> =
            records.split_inclusive('\n').filter(|line| line.starts_with(&format!("{party:?}"))).collect();
        let expected: Vec<_> = (0..peer.rounds).map(|number| record(party, number)).collect();
        expect("records in order", found == expected, true)?;
    }
    for number in 0..peer.rounds {
        let makers = [Party::First, Party::Second]
            .into_iter()
            .filter(|party| peer.path(&format!("name-{number}-{party:?}")).exists());
        expect("makers of a name", makers.count(), 1)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_processes_of_one_host_see_each_other() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root gives files away");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let peer = |party| {
            let dir = dir.path().to_owned();
            thread::spawn(move || Peer::new(party, dir, 20).run(true))
        };
        let (first, second) = (peer(Party::First), peer(Party::Second));
        assert_eq!(first.join().unwrap().unwrap(), [""; 0]);
        assert_eq!(second.join().unwrap().unwrap(), [""; 0]);
    }

    #[test]
    fn who_sees_nothing_of_the_other_fails() {
        let dir = tempfile::tempdir().unwrap();
        let peer = Peer::new(Party::Second, dir.path().to_owned(), 1);
        for case in &CASES {
            if let Steps::InTurn(_, second) = case.steps {
                assert_eq!(second(&peer).is_ok(), case.name == "names-go", "{}", case.name);
            }
        }
    }

    #[test]
    fn contents_differ_by_version_and_have_their_length() {
        assert_ne!(contents(1, 100), contents(2, 100));
        assert_eq!(contents(1, 13), &contents(1, 100)[..13]);
    }
}
