//! FUSE_ATTR_DAX is the same in every reply.

use std::os::unix::fs::PermissionsExt;

use fuse_backend_rs::abi::fuse_abi::{EntryOut, SetattrIn};

use crate::virtio::fs::abi::{ATTR_DAX, FOPEN_KEEP_CACHE, FOPEN_NOFLUSH, init};
use crate::virtio::fs::policy::Policy;
use crate::virtio::fs::testing::{FakeGuest, PER_FILE, ROOT};

/// The flags of one file in every reply that has attributes.
fn all_flags(guest: &mut FakeGuest) -> Vec<(&'static str, u32)> {
    let flags = |entry: &EntryOut| entry.attr.flags;
    let (created, open) = guest.create(ROOT, "created", libc::O_RDWR).unwrap();
    let node = guest.mknod(ROOT, "node", libc::S_IFREG | 0o644).unwrap();
    let found = guest.lookup(ROOT, "node").unwrap();
    let linked = guest.link(node.nodeid, ROOT, "linked").unwrap();
    let listed = guest.list(ROOT, 4096, true).unwrap();
    let listed = listed.iter().find(|(name, ..)| name == "linked").unwrap().1;
    let set = SetattrIn { valid: 1, mode: 0o600, ..Default::default() };
    vec![
        ("CREATE", flags(&created)),
        ("MKNOD", flags(&node)),
        ("LOOKUP", flags(&found)),
        ("LINK", flags(&linked)),
        ("READDIRPLUS", flags(&listed)),
        ("GETATTR", guest.getattr(node.nodeid, None).unwrap().flags),
        ("GETATTR with handle", guest.getattr(created.nodeid, Some(open.fh)).unwrap().flags),
        ("SETATTR", guest.setattr(node.nodeid, set).unwrap().flags),
    ]
}

#[test]
fn every_reply_says_the_same() {
    let always_client = PER_FILE & !init::HAS_INODE_DAX;
    let no_window_client = PER_FILE & !init::MAP_ALIGNMENT;
    for (policy, offer, expected) in [
        (Policy::Always, PER_FILE, ATTR_DAX),
        (Policy::Never, PER_FILE, 0),
        (Policy::Always, always_client, 0),
        (Policy::Always, no_window_client, 0),
    ] {
        let mut guest = FakeGuest::new(policy.clone());
        guest.init(offer).unwrap();
        for (reply, flags) in all_flags(&mut guest) {
            assert_eq!(flags, expected, "{reply} {policy} {offer:#x}");
        }
    }
}

/// Two ids would be two inodes to the client, each with a size of its own.
#[test]
fn a_file_has_one_node_id_however_the_client_comes_to_know_it() {
    for offer in [PER_FILE, PER_FILE & !init::HAS_INODE_DAX, PER_FILE & !init::MAP_ALIGNMENT, 0] {
        for policy in [Policy::Always, Policy::Never] {
            let mut guest = FakeGuest::new(policy.clone());
            guest.init(offer).unwrap();
            let (created, _) = guest.create(ROOT, "created", libc::O_RDWR).unwrap();
            let linked = guest.link(created.nodeid, ROOT, "linked").unwrap();
            let found = guest.lookup(ROOT, "created").unwrap();
            assert_eq!(
                (linked.nodeid, found.nodeid),
                (created.nodeid, created.nodeid),
                "{policy} {offer:#x}"
            );
        }
    }
}

#[test]
fn without_a_window_nothing_is_dax() {
    let mut guest = FakeGuest::with(|config| config.window_size = 0);
    guest.init(PER_FILE).unwrap();
    assert!(all_flags(&mut guest).iter().all(|(_, flags)| *flags == 0));
    assert_eq!(guest.counters().window, None);
}

#[test]
fn only_regular_files_are_dax() {
    let mut guest = FakeGuest::mounted(Policy::Always);
    let directory = guest.mkdir(ROOT, "directory").unwrap();
    let symlink = guest.symlink(ROOT, "symlink", "directory").unwrap();
    let fifo = guest.mknod(ROOT, "fifo", libc::S_IFIFO | 0o644).unwrap();
    for entry in [directory, symlink, fifo] {
        assert_eq!(entry.attr.flags, 0);
        assert_eq!(guest.getattr(entry.nodeid, None).unwrap().flags, 0);
    }
    assert_eq!(guest.getattr(ROOT, None).unwrap().flags, 0);
    let listed = guest.list(ROOT, 4096, true).unwrap();
    assert!(
        listed.len() == 3 && listed.iter().all(|(_, entry, _)| entry.nodeid != 0 && entry.attr.flags == 0)
    );
    assert_eq!((guest.counters().dax_granted, guest.counters().dax_denied), (0, 0));
}

#[test]
fn set_id_files_are_not_dax() {
    let mut guest = FakeGuest::mounted(Policy::Always);
    guest.host_file("su", 1);
    std::fs::set_permissions(guest.path("su"), PermissionsExt::from_mode(0o4755)).unwrap();
    let file = guest.lookup(ROOT, "su").unwrap();
    assert_eq!(file.attr.flags, 0);
    assert_eq!(guest.open(file.nodeid, libc::O_RDONLY).unwrap().open_flags & FOPEN_KEEP_CACHE, 0);
    assert_eq!((guest.counters().dax_granted, guest.counters().dax_denied), (0, 1));
}

#[test]
fn statx_is_left_to_getattr() {
    let mut guest = FakeGuest::mounted(Policy::Always);
    assert_eq!(guest.call(52, ROOT, &[&[0; 24]]), Err(libc::ENOSYS));
    assert_eq!(guest.counters().requests["STATX"], 1);
}

#[test]
fn opening_a_dax_file_keeps_its_mappings() {
    let always_client = PER_FILE & !init::HAS_INODE_DAX;
    for (policy, offer, kept) in [
        (Policy::Always, PER_FILE, true),
        (Policy::Always, always_client, true),
        (Policy::Never, PER_FILE, false),
        (Policy::Always, 0, false),
    ] {
        let mut guest = FakeGuest::new(policy.clone());
        guest.init(offer).unwrap();
        let (entry, created) = guest.create(ROOT, "file", libc::O_RDWR).unwrap();
        let opened = guest.open(entry.nodeid, libc::O_RDONLY).unwrap();
        for open in [created, opened] {
            assert_eq!(open.open_flags & FOPEN_KEEP_CACHE != 0, kept, "{policy} {offer:#x}");
        }
        assert_eq!(
            (created.open_flags & FOPEN_NOFLUSH, opened.open_flags & FOPEN_NOFLUSH),
            (0, FOPEN_NOFLUSH)
        );
    }
}

#[test]
fn decisions_are_counted() {
    let mut guest = FakeGuest::mounted(Policy::Always);
    guest.create(ROOT, "file", libc::O_RDWR).unwrap();
    guest.lookup(ROOT, "file").unwrap();
    guest.mkdir(ROOT, "directory").unwrap();
    let counters = guest.counters();
    assert_eq!((counters.dax_granted, counters.dax_denied, counters.hint_queries), (1, 0, 0));
    assert_eq!(counters.requests["LOOKUP"], 1);
    assert!(!counters.requests.contains_key("READ"));
}
