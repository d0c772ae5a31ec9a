//! What a new file has of its directory.

use std::fs::File;
use std::os::fd::AsFd;

use crate::virtio::fs::abi::ATTR_DAX;
use crate::virtio::fs::hint::{self, HintStore};
use crate::virtio::fs::policy::Policy;
use crate::virtio::fs::testing::{
    FakeGuest, PER_FILE, ROOT, directories_with_hints, directory_with_attributes, directory_with_flags,
};

/// A guest with a directory that has the hint, and that directory.
fn guest_with_directory(share: tempfile::TempDir) -> (FakeGuest, u64) {
    std::fs::create_dir(share.path().join("d")).unwrap();
    HintStore::default().write(File::open(share.path().join("d")).unwrap().as_fd(), true).unwrap();
    std::fs::write(share.path().join("d/old"), "").unwrap();
    HintStore::default().write(File::open(share.path().join("d/old")).unwrap().as_fd(), false).unwrap();
    let mut guest = FakeGuest::on(share, |config| config.policy = Policy::Inode);
    guest.init(PER_FILE).unwrap();
    let directory = guest.lookup(ROOT, "d").unwrap().nodeid;
    (guest, directory)
}

#[test]
fn files_and_directories_inherit() {
    for share in directories_with_hints() {
        let (mut guest, directory) = guest_with_directory(share);
        let hint = |guest: &FakeGuest, name: &str| hint::read(&guest.path(name)).unwrap();
        let (created, _) = guest.create(directory, "created", libc::O_RDWR | libc::O_EXCL).unwrap();
        let (loosely, _) = guest.create(directory, "loosely", libc::O_RDONLY).unwrap();
        let node = guest.mknod(directory, "node", libc::S_IFREG | 0o644).unwrap();
        let below = guest.mkdir(directory, "below").unwrap().nodeid;
        let (deep, _) = guest.create(below, "deep", libc::O_RDWR).unwrap();
        for entry in [created, loosely, node, deep] {
            assert_eq!(entry.attr.flags, ATTR_DAX);
        }
        for name in ["d/created", "d/loosely", "d/node", "d/below", "d/below/deep"] {
            assert!(hint(&guest, name), "{name}");
        }

        // Nothing that cannot have it, nothing that was there, nothing elsewhere.
        guest.mknod(directory, "fifo", libc::S_IFIFO | 0o644).unwrap();
        guest.symlink(directory, "symlink", "created").unwrap();
        let (old, _) = guest.create(directory, "old", libc::O_RDWR).unwrap();
        assert_eq!((old.attr.flags, hint(&guest, "d/old")), (0, false));
        assert_eq!(guest.create(directory, "old", libc::O_EXCL).unwrap_err(), libc::EEXIST);
        guest.create(ROOT, "elsewhere", libc::O_RDWR).unwrap();
        assert!(!hint(&guest, "elsewhere"));
        assert!(!hint(&guest, "d/fifo") && !hint(&guest, "d/symlink"));
    }
}

#[test]
fn the_host_is_not_asked_where_it_does_it_by_itself() {
    let Some(share) = directory_with_flags() else { return };
    let (mut guest, directory) = guest_with_directory(share);
    for number in 0..10 {
        guest.mkdir(directory, &number.to_string()).unwrap();
    }
    assert_eq!(guest.counters().hint_queries, 0);
    let Some(share) = directory_with_attributes() else { return };
    let (mut guest, directory) = guest_with_directory(share);
    for number in 0..10 {
        guest.mkdir(directory, &number.to_string()).unwrap();
    }
    assert_eq!(guest.counters().hint_queries, 10);
}
