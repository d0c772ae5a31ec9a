//! A host, or a second queue, that changes what names mean while they are looked up.

use std::os::unix::fs::symlink;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, RenameFlags};

use super::{SECRET, Yard, contains_secret};
use crate::virtio::fs::testing::{FakeGuest, ROOT};

/// How long each race is run. To lose one takes microseconds.
const TIME: Duration = Duration::from_millis(800);

/// Runs `guest` again and again while `host` does the same on another thread. Both must have been busy.
fn race(yard: &mut Yard, host: impl Fn() + Send + Sync, mut guest: impl FnMut(&mut FakeGuest)) {
    let (done, turns) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Relaxed) {
                host();
                turns.fetch_add(1, Relaxed);
            }
        });
        let (start, mut rounds) = (Instant::now(), 0);
        while start.elapsed() < TIME || rounds < 50 || turns.load(Relaxed) < 50 {
            guest(&mut yard.guest);
            rounds += 1;
        }
        done.store(true, Relaxed);
    });
}

fn exchange(one: &std::path::Path, other: &std::path::Path) {
    rustix::fs::renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).unwrap();
}

#[test]
fn a_directory_that_becomes_a_link_leads_nowhere() {
    let mut yard = Yard::new();
    let (directory, link) = (yard.share("directory"), yard.share("link"));
    symlink(yard.guest.path("other"), &link).unwrap();
    let (mut found, mut refused) = (0, 0);
    race(
        &mut yard,
        || exchange(&directory, &link),
        |guest| {
            let entry = guest.lookup(ROOT, "directory").unwrap();
            // Each step by itself, as a guest walks a path.
            match guest.lookup(entry.nodeid, "secret") {
                Err(libc::ENOENT) => found += 1,
                Err(libc::ENOTDIR) => refused += 1,
                outcome => panic!("{:?}", outcome.map(|entry| entry.attr.ino)),
            }
            assert!(
                guest.mkdir(entry.nodeid, "made").is_err_and(|error| error == libc::ENOTDIR) || {
                    guest.rmdir(entry.nodeid, "made").unwrap();
                    true
                }
            );
            let _ = guest.unlink(entry.nodeid, "secret");
            let _ = guest.rename(entry.nodeid, "secret", "taken", 0);
            if let Ok(list) = guest.list(entry.nodeid, 4096, true) {
                assert!(list.iter().all(|(name, ..)| name != "secret"));
            }
            guest.forget(entry.nodeid, 1);
        },
    );
    assert!(found > 0 && refused > 0, "{found} {refused}");
    yard.check("the race");
}

#[test]
fn a_file_that_becomes_something_else_is_read_as_what_was_found() {
    let mut yard = Yard::new();
    let (file, link, fifo) = (yard.share("it"), yard.share("link"), yard.share("fifo"));
    std::fs::write(&file, "hello").unwrap();
    symlink(yard.secret(), &link).unwrap();
    rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::from(0o666), 0).unwrap();
    let turn = || {
        exchange(&file, &link);
        exchange(&file, &fifo);
    };
    let (mut read, mut refused) = (0, 0);
    race(&mut yard, turn, |guest| {
        let entry = guest.lookup(ROOT, "it").unwrap();
        let is_file = entry.attr.mode & libc::S_IFMT == libc::S_IFREG;
        match guest.open(entry.nodeid, libc::O_RDONLY) {
            Ok(open) => {
                assert!(is_file);
                assert_eq!(guest.read(entry.nodeid, open.fh, 0, 100).unwrap(), b"hello");
                guest.release(entry.nodeid, open.fh).unwrap();
                read += 1;
            }
            Err(error) => {
                assert!(!is_file && error == libc::EBADF, "{error}");
                refused += 1;
            }
        }
        // CREATE opens what is there, which may be another thing than what it found a moment before.
        match guest.create(ROOT, "it", libc::O_RDWR) {
            Ok((entry, open)) => {
                assert!(!contains_secret(&guest.read(entry.nodeid, open.fh, 0, 100).unwrap_or_default()));
                let _ = guest.release(entry.nodeid, open.fh);
                guest.forget(entry.nodeid, 1);
            }
            Err(error) => assert_eq!(error, libc::EBADF),
        }
        guest.forget(entry.nodeid, 1);
    });
    assert!(read > 0 && refused > 0, "{read} {refused}");
    yard.check("the race");
}

#[test]
fn names_that_come_and_go_make_nothing_outside() {
    let mut yard = Yard::new();
    let (name, spare) = (yard.share("new"), yard.share("spare"));
    let wanted = yard.guest.path("made");
    symlink(&wanted, &spare).unwrap();
    let turn = || {
        // A link that points outside takes the name, and gives it back.
        if rustix::fs::renameat_with(CWD, &spare, CWD, &name, RenameFlags::NOREPLACE).is_ok() {
            let _ = std::fs::rename(&name, &spare);
        } else {
            let _ = std::fs::remove_file(&name);
            if !spare.is_symlink() {
                let _ = std::fs::remove_file(&spare);
                let _ = symlink(&wanted, &spare);
            }
        }
    };
    let mut made = 0;
    race(&mut yard, turn, |guest| {
        if let Ok((entry, open)) = guest.create(ROOT, "new", libc::O_RDWR) {
            made += 1;
            let _ = guest.write(entry.nodeid, open.fh, 0, b"of the guest");
            let _ = guest.release(entry.nodeid, open.fh);
            guest.forget(entry.nodeid, 1);
        }
        let _ = guest.mknod(ROOT, "new", libc::S_IFREG | 0o644).map(|entry| guest.forget(entry.nodeid, 1));
        let _ = guest.unlink(ROOT, "new");
    });
    assert!(made > 0 && !wanted.exists());
    yard.check("the race");
}

#[test]
fn a_directory_that_leaves_the_share_does_not_show_the_way_out() {
    let mut yard = Yard::new();
    let (inside, outside) = (yard.share("directory"), yard.guest.path("other/directory"));
    let directory = yard.directory;
    let below = yard.guest.lookup(directory, "below").unwrap().nodeid;
    let turn = || {
        std::fs::rename(&inside, &outside).unwrap();
        std::fs::rename(&outside, &inside).unwrap();
    };
    // While it is outside its parent is the secret's directory.
    race(&mut yard, turn, |guest| {
        for node in [directory, below] {
            for name in ["..", "../secret", "../../secret", "."] {
                assert_eq!(guest.lookup(node, name).unwrap_err(), libc::EINVAL);
            }
            assert_eq!(guest.rename(node, "..", "x", 0), Err(libc::EINVAL));
            for (name, entry, _) in guest.list(node, 4096, true).unwrap() {
                assert_ne!(name, "secret");
                if entry.nodeid != 0 {
                    guest.forget(entry.nodeid, 1);
                }
            }
        }
    });
}

/// Two queues of one share: sessions begin on one while everything is used on the other.
#[test]
fn sessions_that_begin_in_the_middle_end_what_was() {
    let mut yard = Yard::new();
    let server = Arc::clone(&yard.guest.device.server);
    let mut sessions = 0;
    race(
        &mut yard,
        move || server.end_session(),
        |guest| {
            let Ok(entry) = guest.lookup(ROOT, "file") else { return };
            let Ok(open) = guest.open(entry.nodeid, libc::O_RDWR) else { return };
            let _ = guest.setupmapping(entry.nodeid, 0, 0, crate::virtio::fs::testing::READ);
            if let Ok(data) = guest.read(entry.nodeid, open.fh, 0, 100) {
                assert_eq!(data, b"hello");
                sessions += 1;
            }
            let _ = guest.release(entry.nodeid, open.fh);
            guest.forget(entry.nodeid, 1);
        },
    );
    yard.guest.init(crate::virtio::fs::testing::PER_FILE).unwrap();
    let file = yard.guest.lookup(ROOT, "file").unwrap().nodeid;
    assert_eq!(file & !(1 << 56), yard.file & !(1 << 56));
    assert!(sessions > 0 && !SECRET.is_empty());
    assert!(yard.guest.device.server.descriptors_used() <= 3);
}
