//! A file changes its DAX state at the first open after its last close, and at no other time.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Barrier;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{EntryOut, InHeader, OpenIn, OpenOut};
use tempfile::TempDir;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::MockSplitQueue;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

use crate::virtio::fs::CacheMode;
use crate::virtio::fs::abi::{ATTR_DAX, FOPEN_KEEP_CACHE, init, opcode};
use crate::virtio::fs::hint::HintStore;
use crate::virtio::fs::policy::Policy;
use crate::virtio::fs::testing::{
    FakeGuest, PER_FILE, READ, ROOT, directories_with_hints, directory_with_flags, nul,
};
use crate::virtio::fs::window::CHUNK_SIZE;

fn mounted_on(directory: TempDir, policy: Policy) -> FakeGuest {
    let mut guest = FakeGuest::on(directory, |config| config.policy = policy);
    guest.init(PER_FILE).unwrap();
    guest
}

fn set_hint(guest: &FakeGuest, name: &str, hint: bool) {
    let file = File::open(guest.path(name)).unwrap();
    HintStore::default().write(file.as_fd(), hint).unwrap();
}

fn is_dax(entry: &EntryOut) -> bool {
    entry.attr.flags & ATTR_DAX != 0
}

/// Opens a file as the client's kernel does that knows it by a name and a node id: once more, after a look-up, when it is
/// told ESTALE. Returns the node id that it has then, and the handle.
fn open_by_name(guest: &mut FakeGuest, name: &str, nodeid: u64) -> (u64, u64) {
    match guest.open(nodeid, libc::O_RDWR) {
        Ok(open) => (nodeid, open.fh),
        Err(error) => {
            assert_eq!(error, libc::ESTALE);
            let nodeid = guest.lookup(ROOT, name).unwrap().nodeid;
            (nodeid, guest.open(nodeid, libc::O_RDWR).unwrap().fh)
        }
    }
}

#[test]
fn a_change_shows_at_the_first_open_after_the_last_close() {
    let caches = [CacheMode::Never, CacheMode::Auto, CacheMode::Metadata, CacheMode::Always];
    for (cache, hint) in caches.into_iter().flat_map(|cache| [(cache, true), (cache, false)]) {
        for directory in directories_with_hints() {
            let mut guest = FakeGuest::on(directory, |config| {
                config.policy = Policy::Inode;
                config.cache = cache;
            });
            guest.host_file("file", 1);
            set_hint(&guest, "file", !hint);
            guest.init(PER_FILE).unwrap();
            let old = guest.lookup(ROOT, "file").unwrap();
            assert_eq!(is_dax(&old), !hint);
            let first = guest.open(old.nodeid, libc::O_RDWR).unwrap().fh;
            set_hint(&guest, "file", hint);

            // Nothing changes while it is open, whoever asks and opens.
            let second = guest.open(old.nodeid, libc::O_RDONLY).unwrap().fh;
            let found = guest.lookup(ROOT, "file").unwrap();
            assert_eq!((found.nodeid, found.attr.flags), (old.nodeid, old.attr.flags));
            assert_eq!(guest.getattr(old.nodeid, Some(first)).unwrap().flags, old.attr.flags);
            let listed = guest.list(ROOT, 4096, true).unwrap();
            assert_eq!((listed[0].1.nodeid, listed[0].1.attr.flags), (old.nodeid, old.attr.flags));
            let (created, third) = guest.create(ROOT, "file", libc::O_RDWR).unwrap();
            assert_eq!(created.nodeid, old.nodeid);
            assert_eq!(guest.setupmapping(old.nodeid, 0, 0, READ).is_ok(), !hint);
            for fh in [third.fh, first] {
                guest.release(old.nodeid, fh).unwrap();
                assert_eq!(guest.lookup(ROOT, "file").unwrap().nodeid, old.nodeid);
                assert_eq!(guest.counters().reincarnations, 0);
            }
            guest.release(old.nodeid, second).unwrap();

            // A look-up alone changes nothing: what is cached of the file is not thrown away for being listed.
            assert_eq!(guest.lookup(ROOT, "file").unwrap().nodeid, old.nodeid);
            assert_eq!(guest.open(old.nodeid, libc::O_RDWR).unwrap_err(), libc::ESTALE);
            let new = guest.lookup(ROOT, "file").unwrap();
            assert_eq!((is_dax(&new), new.nodeid == old.nodeid), (hint, false));
            assert_eq!(new.attr.ino, old.attr.ino);
            let fh = guest.open(new.nodeid, libc::O_RDWR).unwrap().fh;
            assert_eq!(guest.setupmapping(new.nodeid, 0, CHUNK_SIZE, READ).is_ok(), hint);
            assert_eq!(guest.counters().reincarnations, 1);

            // The old inode is as it was until it is forgotten, and does not come back.
            assert_eq!(guest.getattr(old.nodeid, None).unwrap().flags, old.attr.flags);
            assert_eq!(guest.getattr(new.nodeid, None).unwrap().flags, new.attr.flags);
            guest.forget(old.nodeid, 6);
            assert_eq!(guest.read(new.nodeid, fh, 0, 1).unwrap(), b"f");
            guest.release(new.nodeid, fh).unwrap();
            assert!(guest.open(new.nodeid, libc::O_RDWR).is_ok(), "{cache} {hint}");
            let counters = guest.counters();
            assert_eq!((counters.dax_granted, counters.dax_denied), (1, 1));
        }
    }
}

#[test]
fn a_file_created_empty_is_dax_once_it_has_grown() {
    let mut guest = mounted_on(TempDir::new().unwrap(), Policy::Size(32 << 10));
    let (entry, open) = guest.create(ROOT, "file", libc::O_RDWR).unwrap();
    assert!(!is_dax(&entry));
    guest.write(entry.nodeid, open.fh, 0, &[1; 40 << 10]).unwrap();
    assert!(guest.open(entry.nodeid, libc::O_RDONLY).is_ok_and(|again| {
        guest.release(entry.nodeid, again.fh).unwrap();
        true
    }));
    guest.release(entry.nodeid, open.fh).unwrap();
    let (nodeid, fh) = open_by_name(&mut guest, "file", entry.nodeid);
    assert_ne!(nodeid, entry.nodeid);
    assert!(guest.setupmapping(nodeid, 0, 0, READ).is_ok());
    guest.release(nodeid, fh).unwrap();
    // And back, by CREATE, which can say so at once.
    File::options().write(true).open(guest.path("file")).unwrap().set_len(10).unwrap();
    let (created, _) = guest.create(ROOT, "file", libc::O_RDWR).unwrap();
    assert_eq!((created.nodeid, is_dax(&created)), (entry.nodeid, false));
    assert_eq!(guest.counters().reincarnations, 2);
}

#[test]
fn every_name_of_a_file_follows() {
    let Some(directory) = directory_with_flags() else { return };
    let mut guest = mounted_on(directory, Policy::Inode);
    guest.host_file("a", 1);
    let old = guest.lookup(ROOT, "a").unwrap().nodeid;
    assert_eq!(guest.link(old, ROOT, "b").unwrap().nodeid, old);
    set_hint(&guest, "a", true);
    let (new, fh) = open_by_name(&mut guest, "a", old);
    assert_ne!(new, old);
    // By the other name the guest still has the old inode, and the same thread opens it now.
    assert_eq!(guest.open(old, libc::O_RDONLY).unwrap_err(), libc::ESTALE);
    assert_eq!(guest.lookup(ROOT, "b").unwrap().nodeid, new);
    let again = guest.open(new, libc::O_RDONLY).unwrap().fh;
    guest.release(new, fh).unwrap();
    guest.release(new, again).unwrap();
    assert_eq!(guest.open(old, libc::O_RDONLY).unwrap_err(), libc::ESTALE);
    assert_eq!(guest.link(old, ROOT, "c").unwrap().nodeid, new);
}

#[test]
fn an_open_that_cannot_be_retried_does_not_fail_for_ever() {
    let Some(directory) = directory_with_flags() else { return };
    let mut guest = mounted_on(directory, Policy::Inode);
    guest.host_file("file", 1);
    let old = guest.lookup(ROOT, "file").unwrap().nodeid;
    set_hint(&guest, "file", true);
    assert_eq!(guest.open(old, libc::O_RDONLY).unwrap_err(), libc::ESTALE);
    // Another thread is not it.
    guest.thread += 1;
    assert_eq!(guest.open(old, libc::O_RDONLY).unwrap_err(), libc::ESTALE);
    guest.thread -= 1;
    // By /proc/self/fd the kernel comes back with the same inode, without a look-up.
    let fh = guest.open(old, libc::O_RDONLY).unwrap().fh;
    // It is open so now, and so it stays for everybody until it is closed.
    let found = guest.lookup(ROOT, "file").unwrap();
    assert_eq!((found.nodeid, is_dax(&found)), (old, false));
    let other = guest.open(old, libc::O_RDONLY).unwrap().fh;
    guest.release(old, fh).unwrap();
    guest.release(old, other).unwrap();
    assert_eq!(guest.open(old, libc::O_RDONLY).unwrap_err(), libc::ESTALE);
    assert!(is_dax(&guest.lookup(ROOT, "file").unwrap()));
}

#[test]
fn opens_that_are_not_by_path_are_not_refused() {
    let Some(directory) = directory_with_flags() else { return };
    let mut guest = mounted_on(directory, Policy::Inode);
    guest.host_file("file", 1);
    let old = guest.lookup(ROOT, "file").unwrap().nodeid;
    set_hint(&guest, "file", true);
    let internal = OpenIn::default();
    for _ in 0..3 {
        let opened = guest.call(opcode::OPEN, old, &[internal.as_slice()]).unwrap();
        let opened = *OpenOut::from_slice(&opened).unwrap();
        guest.release(old, opened.fh).unwrap();
        // Overlayfs.
        let fh = guest.open(old, libc::O_RDONLY | libc::O_NOATIME).unwrap().fh;
        // It is open so now, for others too.
        assert_eq!(guest.lookup(ROOT, "file").unwrap().nodeid, old);
        guest.release(old, fh).unwrap();
    }
    assert_eq!(guest.open(old, libc::O_RDONLY).unwrap_err(), libc::ESTALE);
}

#[test]
fn a_hint_is_asked_for_again_when_the_file_has_changed() {
    for directory in directories_with_hints() {
        let mut guest = mounted_on(directory, Policy::Inode);
        guest.host_file("file", 1);
        std::thread::sleep(Duration::from_millis(60));
        let mut file = guest.lookup(ROOT, "file").unwrap().nodeid;
        guest.lookup(ROOT, "file").unwrap();
        guest.getattr(file, None).unwrap();
        for _ in 0..3 {
            let fh = guest.open(file, libc::O_RDONLY).unwrap().fh;
            guest.release(file, fh).unwrap();
        }
        assert_eq!(guest.counters().hint_queries, 1);
        // Back and forth within the same tick of the host's clock, or not: each is seen.
        for round in 0..20 {
            set_hint(&guest, "file", round % 2 == 0);
            let before = file;
            let (nodeid, fh) = open_by_name(&mut guest, "file", file);
            guest.release(nodeid, fh).unwrap();
            file = nodeid;
            assert_ne!(file, before, "{round}");
        }
        assert_eq!(guest.counters().reincarnations, 20);
    }
}

#[test]
fn what_was_not_negotiated_costs_nothing() {
    let always_client = PER_FILE & !init::HAS_INODE_DAX;
    let no_window_client = PER_FILE & !init::MAP_ALIGNMENT;
    for directory in directories_with_hints() {
        let mut guest = FakeGuest::on(directory, |config| config.policy = Policy::Inode);
        guest.host_file("file", 1);
        guest.host_file("other", 1);
        std::fs::create_dir(guest.path("directory")).unwrap();
        for name in ["file", "directory"] {
            set_hint(&guest, name, true);
        }
        for offer in [0, always_client, no_window_client] {
            guest.init(offer).unwrap();
            let file = guest.lookup(ROOT, "file").unwrap();
            assert_eq!(file.attr.flags, 0);
            let directory = guest.lookup(ROOT, "directory").unwrap().nodeid;
            let (created, open) = guest.create(directory, "created", libc::O_RDWR).unwrap();
            guest.release(created.nodeid, open.fh).unwrap();
            let fh = guest.open(file.nodeid, libc::O_RDONLY).unwrap().fh;
            set_hint(&guest, "file", false);
            guest.release(file.nodeid, fh).unwrap();
            assert!(guest.open(file.nodeid, libc::O_RDONLY).is_ok());
            set_hint(&guest, "file", true);
            assert!(guest.open(file.nodeid, libc::O_RDONLY).is_ok());
            guest.list(ROOT, 4096, true).unwrap();
            let counters = guest.counters();
            assert_eq!((counters.hint_queries, counters.reincarnations), (0, 0), "{offer:#x}");
            assert_eq!((counters.dax_granted, counters.dax_denied), (0, 0));
            std::fs::remove_file(guest.path("directory/created")).unwrap();
        }
        // Nor what the policy does not look at.
        let directory = TempDir::new_in(guest.directory.path()).unwrap();
        let mut guest = mounted_on(directory, Policy::Size(1));
        guest.host_file("file", 1);
        assert!(is_dax(&guest.lookup(ROOT, "file").unwrap()));
        assert_eq!(guest.counters().hint_queries, 0);
    }
}

#[test]
fn a_session_knows_nothing_of_the_last_one() {
    let Some(directory) = directory_with_flags() else { return };
    let mut guest = mounted_on(directory, Policy::Inode);
    guest.host_file("file", 1);
    let old = guest.lookup(ROOT, "file").unwrap().nodeid;
    guest.open(old, libc::O_RDONLY).unwrap();
    set_hint(&guest, "file", true);
    guest.destroy().unwrap();
    guest.init(PER_FILE).unwrap();
    let new = guest.lookup(ROOT, "file").unwrap();
    assert!(is_dax(&new));
    assert!(guest.open(new.nodeid, libc::O_RDONLY).is_ok());
    assert_eq!(guest.counters().reincarnations, 0);
}

#[test]
fn a_forgotten_file_is_decided_about_anew() {
    let mut guest = mounted_on(TempDir::new().unwrap(), Policy::Size(1));
    guest.host_file("file", 0);
    let entry = guest.lookup(ROOT, "file").unwrap();
    assert!(!is_dax(&entry));
    std::fs::write(guest.path("file"), "grown").unwrap();
    assert!(!is_dax(&guest.lookup(ROOT, "file").unwrap()));
    let batch = [entry.nodeid.to_le_bytes(), 2u64.to_le_bytes()].concat();
    guest.post(opcode::BATCH_FORGET, 0, &[&1u32.to_le_bytes(), &[0; 4], &batch]);
    assert!(is_dax(&guest.lookup(ROOT, "file").unwrap()));
    assert_eq!(guest.counters().reincarnations, 0);
}

#[test]
fn only_what_was_granted_is_mapped() {
    let mut guest = mounted_on(TempDir::new().unwrap(), Policy::Size(1));
    guest.host_file("large", 1);
    guest.host_file("small", 0);
    let large = guest.lookup(ROOT, "large").unwrap().nodeid;
    let small = guest.lookup(ROOT, "small").unwrap().nodeid;
    let forged = small | (large & !(large & ((1 << 56) - 1)));
    assert_ne!(forged, small);
    assert_eq!(guest.setupmapping(small, 0, 0, READ), Err(libc::EPERM));
    assert_eq!(guest.setupmapping(forged, 0, 0, READ), Err(libc::EPERM));
    assert_eq!(guest.setupmapping(large & ((1 << 56) - 1), 0, 0, READ), Err(libc::EPERM));
    guest.setupmapping(large, 0, 0, READ).unwrap();
    // Having been granted it keeps, until it changes or is forgotten.
    File::options().write(true).open(guest.path("large")).unwrap().set_len(0).unwrap();
    guest.setupmapping(large, 0, CHUNK_SIZE, READ).unwrap();
    guest.forget(large, 1);
    assert_eq!(guest.setupmapping(large, 0, 0, READ), Err(libc::EBADF));
}

#[test]
fn pages_from_before_are_dropped_when_a_file_is_dax_no_more() {
    let Some(directory) = directory_with_flags() else { return };
    let mut guest = FakeGuest::on(directory, |config| {
        config.policy = Policy::Inode;
        config.cache = CacheMode::Always;
    });
    guest.host_file("file", 1);
    guest.init(PER_FILE).unwrap();
    let plain = guest.lookup(ROOT, "file").unwrap().nodeid;
    let keeps = |guest: &mut FakeGuest, nodeid| {
        let open = guest.open(nodeid, libc::O_RDWR).unwrap();
        guest.release(nodeid, open.fh).unwrap();
        open.open_flags & FOPEN_KEEP_CACHE != 0
    };
    assert!(keeps(&mut guest, plain));
    for _ in 0..2 {
        set_hint(&guest, "file", true);
        let (dax, fh) = open_by_name(&mut guest, "file", plain);
        guest.release(dax, fh).unwrap();
        set_hint(&guest, "file", false);
        assert_eq!(guest.open(dax, libc::O_RDWR).unwrap_err(), libc::ESTALE);
        assert_eq!(guest.lookup(ROOT, "file").unwrap().nodeid, plain);
        assert!(!keeps(&mut guest, plain));
        assert!(keeps(&mut guest, plain));
    }
}

#[test]
fn counts_that_no_client_sends_do_no_harm() {
    let mut guest = mounted_on(TempDir::new().unwrap(), Policy::Size(1));
    guest.host_file("file", 1);
    let file = guest.lookup(ROOT, "file").unwrap().nodeid;
    let fh = guest.open(file, libc::O_RDONLY).unwrap().fh;
    let other = file & ((1 << 56) - 1);
    for nodeid in [other, file | 1 << 63, u64::MAX, 0, ROOT | 1 << 56] {
        guest.forget(nodeid, u64::MAX);
        let _ = guest.release(nodeid, fh + 7);
        let _ = guest.open(nodeid, libc::O_RDONLY);
        let _ = guest.getattr(nodeid, None);
    }
    guest.forget(file, u64::MAX);
    let _ = guest.release(file, fh);
    let _ = guest.release(file, fh);
    assert!(is_dax(&guest.lookup(ROOT, "file").unwrap()));
}

#[test]
fn queues_agree_on_what_a_file_is() {
    let mut guest = mounted_on(TempDir::new().unwrap(), Policy::Size(1));
    for round in 0..50 {
        let name = format!("file{round}");
        guest.host_file(&name, 0);
        let message = guest.message(opcode::LOOKUP, ROOT, &[&nul(&name)]);
        assert!(message.len() > size_of::<InHeader>());
        let (barrier, server, path) = (Barrier::new(3), &guest.device.server, guest.path(&name));
        let ids: Vec<u64> = std::thread::scope(|scope| {
            let lookup = || {
                let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
                memory.write_slice(&message, GuestAddress(0x8000)).unwrap();
                let descriptors = [
                    RawDescriptor::from(Descriptor::new(0x8000, message.len() as u32, 0, 0)),
                    RawDescriptor::from(Descriptor::new(0x9000, 4096, 2, 0)),
                ];
                let queue = MockSplitQueue::new(&memory, 16);
                let chain = queue.build_desc_chain(&descriptors).unwrap();
                barrier.wait();
                server.handle(&memory, chain).unwrap();
                let mut entry = EntryOut::default();
                memory.read_slice(entry.as_mut_slice(), GuestAddress(0x9010)).unwrap();
                entry.nodeid
            };
            let lookups = [scope.spawn(lookup), scope.spawn(lookup)];
            barrier.wait();
            std::fs::write(&path, "grown").unwrap();
            lookups.map(|thread| thread.join().unwrap()).to_vec()
        });
        assert_eq!(ids[0], ids[1], "{round}");
    }
}
