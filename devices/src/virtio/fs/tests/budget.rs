//! What a guest can take of the host, and that it gives all of it back.

use std::fs::File;
use std::process::Command;

use fuse_backend_rs::abi::fuse_abi::CreateIn;
use tempfile::TempDir;
use vm_memory::ByteValued;

use crate::virtio::fs::abi::opcode;
use crate::virtio::fs::budget::divide;
use crate::virtio::fs::policy::Policy;
use crate::virtio::fs::testing::{FakeGuest, PER_FILE, READ, ROOT, WRITE, descriptors_into, nul};
use crate::virtio::fs::window::{CHUNK_SIZE, MIN_WINDOW_SIZE};

fn guest_with_files(descriptors: u64, files: u32) -> FakeGuest {
    let mut guest = FakeGuest::with(|config| config.descriptors = descriptors);
    for file in 0..files {
        std::fs::write(guest.path(&file.to_string()), "hello").unwrap();
    }
    guest.init(PER_FILE).unwrap();
    guest
}

#[test]
fn a_guest_knows_as_many_files_as_its_budget_has_and_no_more() {
    let mut guest = guest_with_files(20, 30);
    let nodes: Vec<u64> = (0..20).map(|file| guest.lookup(ROOT, &file.to_string()).unwrap().nodeid).collect();
    for _ in 0..100 {
        assert_eq!(guest.lookup(ROOT, "29").unwrap_err(), libc::ENFILE);
    }
    // What it knows it can ask for again; what it does not know is not made either.
    guest.lookup(ROOT, "0").unwrap();
    assert_eq!(guest.create(ROOT, "new", libc::O_RDWR).unwrap_err(), libc::ENFILE);
    assert_eq!(guest.mknod(ROOT, "new", libc::S_IFREG).unwrap_err(), libc::ENFILE);
    assert_eq!(guest.mkdir(ROOT, "new").unwrap_err(), libc::ENFILE);
    assert_eq!(guest.symlink(ROOT, "new", "0").unwrap_err(), libc::ENFILE);
    let unnamed = CreateIn { flags: libc::O_RDWR as u32, mode: 0o644, ..Default::default() };
    let outcome = guest.call(opcode::TMPFILE, ROOT, &[unnamed.as_slice(), &nul("/")]);
    assert_eq!(outcome, Err(libc::ENFILE));
    assert_eq!(guest.open(nodes[0], libc::O_RDWR).unwrap_err(), libc::ENFILE);
    assert_eq!(guest.opendir(ROOT), Err(libc::ENFILE));
    assert!(!guest.path("new").exists());
    assert_eq!(guest.link(nodes[0], ROOT, "link").unwrap().nodeid, nodes[0], "it is known already");
    assert_eq!(guest.device.server.descriptors_used(), 20);

    // A few forgotten files are room for others.
    for node in &nodes[1..5] {
        guest.forget(*node, 1);
    }
    let fh = guest.open(nodes[0], libc::O_RDWR).unwrap().fh;
    let directory = guest.opendir(ROOT).unwrap();
    let (entry, open) = guest.create(ROOT, "new", libc::O_RDWR).unwrap();
    assert_eq!(guest.device.server.descriptors_used(), 20);
    assert_eq!(guest.lookup(ROOT, "29").unwrap_err(), libc::ENFILE);
    guest.release(entry.nodeid, open.fh).unwrap();
    guest.forget(entry.nodeid, 1);
    guest.release(nodes[0], fh).unwrap();
    // The rest of a listing has no node ids, and is a listing all the same.
    let listed = guest.list(ROOT, 4096, true);
    assert_eq!(listed.unwrap().len(), 32);
    guest.releasedir(ROOT, directory).unwrap();
    guest.destroy().unwrap();
    assert_eq!(guest.device.server.descriptors_used(), 0);
}

#[test]
fn what_fails_costs_nothing() {
    let mut guest = guest_with_files(50, 1);
    let before = descriptors_into(&guest.directory);
    let file = guest.lookup(ROOT, "0").unwrap().nodeid;
    for _ in 0..100 {
        guest.open(file, libc::O_RDWR | libc::O_ACCMODE).unwrap_err();
        guest.open(77, libc::O_RDWR).unwrap_err();
        guest.opendir(file).unwrap_err();
        guest.release(file, 1234).unwrap_err();
        guest.releasedir(ROOT, 1234).unwrap_err();
        guest.create(ROOT, "0", libc::O_RDWR | libc::O_EXCL).unwrap_err();
        guest.lookup(ROOT, "none").unwrap_err();
        guest.mkdir(ROOT, "0").unwrap_err();
        guest.forget(12345, 1);
    }
    assert_eq!(guest.device.server.descriptors_used(), 1);
    let unnamed = CreateIn { flags: libc::O_RDWR as u32, mode: 0o644, ..Default::default() };
    for _ in 0..30 {
        // Forgotten with a handle still open.
        let reply = guest.call(opcode::TMPFILE, ROOT, &[unnamed.as_slice(), &nul("/")]).unwrap();
        let node = u64::from_le_bytes(reply[..8].try_into().unwrap());
        guest.open(node, libc::O_RDONLY).unwrap();
        guest.forget(node, 1);
    }
    guest.forget(file, 1);
    assert_eq!(guest.device.server.descriptors_used(), 0);
    assert_eq!(descriptors_into(&guest.directory), before);
}

/// Runs an ignored test of this file in a process of its own.
fn alone(name: &str, variables: &[(&str, &str)]) {
    let test = format!("virtio::fs::tests::budget::{name}");
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &test, "--ignored", "--nocapture"]);
    let output = command.envs(variables.iter().copied()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}{errors}");
}

#[test]
fn a_greedy_guest_leaves_enough_to_others() {
    alone("two_shares_with_few_descriptors", &[]);
}

#[test]
#[ignore = "run by the test above, since the limit of open files is the whole process's"]
fn two_shares_with_few_descriptors() {
    const LIMIT: u64 = 1200;
    let limit = libc::rlimit { rlim_cur: LIMIT, rlim_max: LIMIT };
    // SAFETY: the structure lives through the call.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }, 0);
    let descriptors = divide(LIMIT, &[MIN_WINDOW_SIZE, MIN_WINDOW_SIZE]);
    let mut greedy = guest_with_files(descriptors, 2_000);
    let mut modest = guest_with_files(descriptors, 100);
    // All ways to have something open, in turn, until nothing works any more.
    let (mut errors, mut round) = (0, 0);
    while errors < 1_000 {
        let name = (round % 2_000).to_string();
        let mut outcomes = vec![greedy.opendir(ROOT).map(drop)];
        match greedy.lookup(ROOT, &name) {
            Ok(entry) => {
                outcomes.push(greedy.open(entry.nodeid, libc::O_RDWR).map(drop));
                let chunk = round % (MIN_WINDOW_SIZE / CHUNK_SIZE);
                let mapped = greedy.setupmapping(entry.nodeid, 0, chunk * CHUNK_SIZE, READ | WRITE);
                assert!(mapped.is_ok(), "{mapped:?}");
            }
            Err(error) => outcomes.push(Err(error)),
        }
        let create = CreateIn { flags: libc::O_RDWR as u32, mode: 0o644, ..Default::default() };
        outcomes.push(greedy.call(opcode::TMPFILE, ROOT, &[create.as_slice(), &nul("/")]).map(drop));
        for error in outcomes.into_iter().filter_map(Result::err) {
            assert_eq!(error, libc::ENFILE);
            errors += 1;
        }
        round += 1;
    }
    // It can still do all that costs nothing.
    greedy.lookup(ROOT, "0").unwrap();
    assert!(greedy.getattr(ROOT, None).is_ok());
    // The other share has its own, and the process has some, too.
    for file in 0..100 {
        let entry = modest.lookup(ROOT, &file.to_string()).unwrap();
        modest.open(entry.nodeid, libc::O_RDONLY).unwrap();
    }
    let own: Vec<File> = (0..300).map(|_| File::open("/dev/null").unwrap()).collect();
    drop(own);
    greedy.init(PER_FILE).unwrap();
    greedy.lookup(ROOT, "1999").unwrap();
}

/// Resident memory in bytes.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

/// Bytes that the process has allocated and not given back.
fn allocated() -> u64 {
    // SAFETY: the call takes nothing and returns numbers.
    let info = unsafe { libc::mallinfo2() };
    (info.uordblks + info.hblkhd) as u64
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Does something `count` times. After a tenth of them, memory and descriptors grow no more.
fn stays_flat(what: &str, count: u64, mut once: impl FnMut(u64)) {
    (0..count / 10).for_each(&mut once);
    let before = (resident(), allocated(), descriptors());
    (count / 10..count).for_each(&mut once);
    let after = (resident(), allocated(), descriptors());
    println!(
        "{what}: {count} times; resident {} KiB after a tenth, {} KiB at the end; {} and {} bytes allocated; {} and {} descriptors",
        before.0 >> 10,
        after.0 >> 10,
        before.1,
        after.1,
        before.2,
        after.2
    );
    // Pages come and go for other reasons. What is allocated is known to the byte, but for some 20 KiB that are kept for
    // later: so an allocation that each time leaves behind is found in a short run, too.
    assert!(after.0 <= before.0 + (1 << 20), "{what}: {before:?} {after:?}");
    assert!(after.1 <= before.1 + (64 << 10), "{what}: {before:?} {after:?}");
    assert_eq!(before.2, after.2, "{what}");
}

fn count(default: u64) -> u64 {
    std::env::var("COUNT").map_or(default, |count| count.parse().unwrap())
}

#[test]
fn memory_is_flat_over_files_that_come_and_go() {
    alone("files_that_come_and_go", &[("COUNT", "20000")]);
}

#[test]
#[ignore = "run by the test above; by itself a million times, or COUNT times"]
fn files_that_come_and_go() {
    let share = TempDir::new_in("/dev/shm").unwrap();
    let mut guest = FakeGuest::on(share, |config| config.policy = Policy::Auto);
    guest.reply_room = 4096;
    guest.init(PER_FILE).unwrap();
    stays_flat("create, look up, forget", count(1_000_000), |number| {
        let name = format!("file {number}");
        let (entry, open) = guest.create(ROOT, &name, libc::O_RDWR).unwrap();
        guest.release(entry.nodeid, open.fh).unwrap();
        assert_eq!(guest.lookup(ROOT, &name).unwrap().nodeid, entry.nodeid);
        guest.unlink(ROOT, &name).unwrap();
        guest.forget(entry.nodeid, 2);
    });
    assert_eq!(guest.device.server.descriptors_used(), 0);
}

#[test]
fn a_guest_that_opens_as_many_files_as_it_can_gets_enfile_and_costs_little() {
    alone("more_files_than_there_may_be", &[("COUNT", "4000")]);
}

#[test]
#[ignore = "run by the test above; by itself a million files, or COUNT, with as many descriptors as there may be"]
fn more_files_than_there_may_be() {
    /// What the server may remember of a file that is known and open, in bytes.
    const PER_FILE_OPEN: u64 = 1024;
    let count = count(1_000_000);
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the structure lives through the call.
    assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) }, 0);
    limit.rlim_max = limit.rlim_max.min(count);
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: the structure lives through the call.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }, 0);
    let descriptors = divide(limit.rlim_max, &[0, 0]);
    let mut modest = guest_with_files(descriptors, 100);
    let mut greedy =
        FakeGuest::on(TempDir::new_in("/dev/shm").unwrap(), |config| config.descriptors = descriptors);
    greedy.init(PER_FILE).unwrap();
    let before = (resident(), allocated());
    let mut at_half = before;
    let (mut open, mut refused) = (Vec::with_capacity(count as usize), 0);
    for number in 0..count {
        match greedy.create(ROOT, &format!("file {number}"), libc::O_RDWR) {
            Ok((entry, file)) => {
                open.push((entry.nodeid, file.fh));
                if open.len() as u64 == descriptors / 4 {
                    at_half = (resident(), allocated());
                }
            }
            Err(errno) => {
                assert_eq!(errno, libc::ENFILE);
                refused += 1;
            }
        }
    }
    let after = (resident(), allocated());
    println!("{count} files: {} open, {refused} refused; {before:?} {at_half:?} {after:?}", open.len());
    assert_eq!(open.len() as u64, descriptors / 2, "each is known and open");
    assert_eq!(refused, count - descriptors / 2);
    // What the first files of a session cost once does not count.
    let (half, files) = (open.len() as u64 / 2, open.len() as u64);
    assert!(after.1 < at_half.1 + PER_FILE_OPEN * half, "{} bytes", after.1 - at_half.1);
    assert!(after.0 < before.0 + (4 << 20) + PER_FILE_OPEN * files, "{} bytes", after.0 - before.0);
    // The other share has all of its own.
    for file in 0..100 {
        let entry = modest.lookup(ROOT, &file.to_string()).unwrap();
        modest.open(entry.nodeid, libc::O_RDONLY).unwrap();
    }
    assert!(greedy.getattr(ROOT, None).is_ok());
    for (node, handle) in open {
        greedy.release(node, handle).unwrap();
        greedy.forget(node, 1);
    }
    assert_eq!(greedy.device.server.descriptors_used(), 0);
    greedy.create(ROOT, "room again", libc::O_RDWR).unwrap();
}

#[test]
fn memory_is_flat_over_mounts() {
    alone("mounts", &[("COUNT", "1000")]);
}

#[test]
#[ignore = "run by the test above; by itself 10,000 times, or COUNT times"]
fn mounts() {
    let share = TempDir::new_in("/dev/shm").unwrap();
    let mut guest = FakeGuest::on(share, |_| ());
    guest.reply_room = 16 << 10;
    for file in 0..20 {
        std::fs::write(guest.path(&file.to_string()), "hello").unwrap();
    }
    stays_flat("mount, use, unmount", count(10_000), |_| {
        guest.init(PER_FILE).unwrap();
        guest.opendir(ROOT).unwrap();
        for (name, entry, _) in guest.list(ROOT, 4096, true).unwrap() {
            guest.open(entry.nodeid, libc::O_RDWR).unwrap();
            let chunk = name.parse::<u64>().unwrap() % (MIN_WINDOW_SIZE / CHUNK_SIZE);
            guest.setupmapping(entry.nodeid, 0, chunk * CHUNK_SIZE, READ | WRITE).unwrap();
            assert_eq!(guest.window(chunk * CHUNK_SIZE), *b"he");
        }
        let create = CreateIn { flags: libc::O_RDWR as u32, mode: 0o644, ..Default::default() };
        guest.call(opcode::TMPFILE, ROOT, &[create.as_slice(), &nul("/")]).unwrap();
        guest.destroy().unwrap();
    });
}

#[test]
fn open_directories_cost_no_more_than_their_descriptors() {
    alone("many_open_directories", &[]);
}

#[test]
#[ignore = "run by the test above, which needs a process's memory for itself"]
fn many_open_directories() {
    let mut guest = guest_with_files(10_000, 500);
    guest.reply_room = 16 << 10;
    let ask = |fh: u64| {
        let mut ask = [0; 40];
        ask[..8].copy_from_slice(&fh.to_le_bytes());
        ask[16..20].copy_from_slice(&(15u32 << 10).to_le_bytes());
        ask
    };
    let mut read = |count: u64| {
        for _ in 0..count {
            let fh = guest.opendir(ROOT).unwrap();
            assert!(guest.call(opcode::READDIR, ROOT, &[&ask(fh)]).unwrap().len() > 10 << 10);
        }
    };
    read(10);
    let before = resident();
    read(5_000);
    let grown = resident() - before;
    assert!(grown < 5 << 20, "{grown} bytes for 5,000 directories");
}
