//! Requests that no client sends.

use fuse_backend_rs::abi::fuse_abi::{CreateIn, OpenIn};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use virtio_bindings::bindings::virtio_ring::VRING_DESC_F_WRITE;
use virtio_queue::desc::split::Descriptor;

use crate::virtio::fs::abi::opcode;
use crate::virtio::fs::policy::Policy;
use crate::virtio::fs::testing::{FakeGuest, ROOT, nul};
use crate::virtio::fs::window::CHUNK_SIZE;

const WRITABLE: u16 = VRING_DESC_F_WRITE as u16;

#[test]
fn names_lead_nowhere_else() {
    let mut guest = FakeGuest::mounted(Policy::Always);
    let directory = guest.mkdir(ROOT, "directory").unwrap().nodeid;
    let file = guest.mknod(directory, "file", libc::S_IFREG).unwrap().nodeid;
    let long = "n".repeat(256);
    for (name, error) in [
        ("", libc::EINVAL),
        (".", libc::EINVAL),
        ("..", libc::EINVAL),
        ("/", libc::EINVAL),
        ("/etc/passwd", libc::EINVAL),
        ("../directory", libc::EINVAL),
        ("a/b", libc::EINVAL),
        ("nul\0inside", libc::EINVAL),
        (&long, libc::ENAMETOOLONG),
    ] {
        assert_eq!(guest.lookup(directory, name).unwrap_err(), error, "{name:?}");
        assert_eq!(guest.create(directory, name, libc::O_RDWR).unwrap_err(), error, "{name:?}");
        assert_eq!(guest.mknod(directory, name, libc::S_IFREG).unwrap_err(), error, "{name:?}");
        assert_eq!(guest.mkdir(directory, name).unwrap_err(), error, "{name:?}");
        assert_eq!(guest.link(file, directory, name).unwrap_err(), error, "{name:?}");
        assert_eq!(guest.unlink(directory, name), Err(error), "{name:?}");
        assert_eq!(guest.rmdir(directory, name), Err(error), "{name:?}");
        if !name.contains('\0') {
            assert_eq!(guest.symlink(directory, name, "target").unwrap_err(), error, "{name:?}");
            assert_eq!(guest.rename(directory, name, "new", 0), Err(error), "{name:?}");
            assert_eq!(guest.rename(directory, "file", name, 0), Err(error), "{name:?}");
        }
    }
    let unterminated = guest.call(opcode::LOOKUP, directory, &[b"file"]);
    assert_eq!(unterminated, Err(libc::EINVAL));
    let longest = "n".repeat(255);
    assert!(guest.mknod(directory, &longest, libc::S_IFREG).is_ok());
}

#[test]
fn a_fifo_is_never_opened() {
    let mut guest = FakeGuest::mounted(Policy::Always);
    let fifo = guest.mknod(ROOT, "fifo", libc::S_IFIFO | 0o644).unwrap().nodeid;
    // To open one would wait for a writer; that this test ends is a part of the test.
    for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR] {
        assert_eq!(guest.open(fifo, flags).unwrap_err(), libc::EBADF);
        assert_eq!(guest.create(ROOT, "fifo", flags).unwrap_err(), libc::EBADF);
    }
    assert_eq!(guest.opendir(fifo), Err(libc::EBADF));
}

#[test]
fn symbolic_links_are_not_followed() {
    let mut guest = FakeGuest::mounted(Policy::Always);
    let outside = tempfile::NamedTempFile::new().unwrap();
    std::os::unix::fs::symlink(outside.path(), guest.path("link")).unwrap();
    let link = guest.lookup(ROOT, "link").unwrap();
    assert_eq!(link.attr.mode & libc::S_IFMT, libc::S_IFLNK);
    for flags in [libc::O_RDONLY, libc::O_RDWR, libc::O_PATH, libc::O_PATH | libc::O_RDWR, libc::O_TMPFILE] {
        assert!(guest.open(link.nodeid, flags).is_err(), "{flags:#x}");
        assert!(guest.create(ROOT, "link", flags).is_err(), "{flags:#x}");
    }
    assert_eq!(outside.as_file().metadata().unwrap().len(), 0);
}

#[test]
fn strange_flags_open_nothing_strange() {
    let mut guest = FakeGuest::mounted(Policy::Always);
    let open = |guest: &mut FakeGuest, nodeid, flags: u32| {
        guest.call(opcode::OPEN, nodeid, &[OpenIn { flags, fuse_flags: 0 }.as_slice()])
    };
    assert_eq!(open(&mut guest, ROOT, libc::O_ACCMODE as u32), Err(libc::EINVAL));
    let before = std::fs::read_dir(guest.directory.path()).unwrap().count();
    // Without the filter this would make an unnamed file in the share.
    assert_eq!(open(&mut guest, ROOT, (libc::O_TMPFILE | libc::O_RDWR) as u32), Err(libc::EISDIR));
    assert_eq!(std::fs::read_dir(guest.directory.path()).unwrap().count(), before);
    let file = guest.mknod(ROOT, "file", libc::S_IFREG | 0o600).unwrap().nodeid;
    for bit in (0..32).filter(|bit| *bit > 1) {
        let _ = open(&mut guest, file, 1 << bit);
        let ask = CreateIn { flags: 1 << bit, mode: u32::MAX, umask: u32::MAX, fuse_flags: u32::MAX };
        let _ = guest.call(opcode::CREATE, ROOT, &[ask.as_slice(), &nul(&format!("new-{bit}"))]);
    }
    let kinds = std::fs::read_dir(guest.directory.path()).unwrap();
    assert!(kinds.map(|entry| entry.unwrap().file_type().unwrap()).all(|kind| kind.is_file()));
}

/// Every operation, with every length from nothing to more than it takes, of zeros, of ones and of text.
#[test]
fn truncated_and_overlong_requests_are_answered() {
    let mut guest = FakeGuest::mounted(Policy::Always);
    guest.host_file("file", 1);
    let file = guest.lookup(ROOT, "file").unwrap().nodeid;
    let no_reply = [opcode::FORGET, opcode::INTERRUPT, opcode::NOTIFY_REPLY, opcode::BATCH_FORGET];
    for code in (0..60).chain([1_000, u32::MAX]) {
        for len in (0..130).chain([255, 256, 257, 4096, 70_000]) {
            for fill in [0, 0xff, b'a'] {
                for nodeid in [ROOT, file, 77] {
                    let message = guest.message(code, nodeid, &[&vec![fill; len]]);
                    let (used, reply) = guest.send_raw(&message, &[40], &[4096]).unwrap();
                    if no_reply.contains(&code) {
                        assert_eq!(used, 0);
                    } else {
                        assert!(used >= 16, "opcode {code} length {len}");
                        assert_eq!(reply[..4], used.to_le_bytes(), "opcode {code} length {len}");
                    }
                }
            }
        }
    }
    // It is as alive as before.
    guest.init(!0).unwrap();
    assert!(guest.lookup(ROOT, "file").is_ok());
}

#[test]
fn a_header_that_lies_about_its_length_is_refused() {
    let mut guest = FakeGuest::mounted(Policy::Always);
    guest.host_file("file", 1);
    for len in [0, 1, 39, 46, 4096, 1 << 20, u32::MAX] {
        let mut message = guest.message(opcode::LOOKUP, ROOT, &[&nul("file")]);
        message[..4].copy_from_slice(&u32::to_le_bytes(len));
        let (used, reply) = guest.send_raw(&message, &[], &[256]).unwrap();
        assert_eq!((used, i32::from_le_bytes(reply[4..8].try_into().unwrap())), (16, -libc::EINVAL), "{len}");
    }
}

/// A chain can have the same memory in it again and again, and so be of any length.
#[test]
fn what_is_longer_than_any_request_is_refused_unread() {
    const LIST: u64 = 0x20_0000;
    const LIST_LEN: u32 = 1 << 20;
    let mut guest = FakeGuest::mounted(Policy::Always);
    let entry = [0u64, CHUNK_SIZE];
    let list: Vec<u8> = entry.map(u64::to_le_bytes).as_flattened().repeat(LIST_LEN as usize / 16);
    guest.memory.write_slice(&list, GuestAddress(LIST)).unwrap();
    let mut outcome = |code: u32, entries: u32, body: &[u8]| {
        let mut message = guest.message(code, ROOT, &[body]);
        let len = message.len() as u32 + entries * 16;
        message[..4].copy_from_slice(&len.to_le_bytes());
        guest.memory.write_slice(&message, GuestAddress(0x10_0000)).unwrap();
        let mut chain = vec![Descriptor::new(0x10_0000, message.len() as u32, 0, 0)];
        let mut left = entries * 16;
        while left > 0 {
            let part = left.min(LIST_LEN);
            chain.push(Descriptor::new(LIST, part, 0, 0));
            left -= part;
        }
        chain.push(Descriptor::new(0x30_0000, 4096, WRITABLE, 0));
        let used = guest.send_descriptors(&chain).unwrap();
        let errno: i32 = guest.memory.read_obj(GuestAddress(0x30_0004)).unwrap();
        (used, -errno)
    };
    let mut remove = |entries: u32| outcome(opcode::REMOVEMAPPING, entries, &entries.to_le_bytes());
    // As many as a client whose pages are of 64 KiB may send, as many as fit, and more.
    for entries in [1, 4096, ((1 << 20) + 36) / 16] {
        assert_eq!(remove(entries), (16, 0), "{entries}");
    }
    for entries in [((1 << 20) + 36) / 16 + 1, 1 << 17, 40 << 16] {
        assert_eq!(remove(entries), (16, libc::EINVAL), "{entries}");
    }
    let count = (40_u32 << 16).to_le_bytes();
    assert_eq!(outcome(opcode::BATCH_FORGET, 40 << 16, &[count, [0; 4]].concat()).0, 0);
}

#[test]
fn too_little_room_for_a_header_or_a_reply() {
    let mut guest = FakeGuest::mounted(Policy::Always);
    guest.host_file("file", 1);
    for room in 0..200 {
        let message = guest.message(opcode::LOOKUP, ROOT, &[&nul("file")]);
        let writable: &[u32] = if room == 0 { &[] } else { &[room] };
        let (used, reply) = guest.send_raw(&message, &[], writable).unwrap();
        match room {
            0..16 => assert_eq!(used, 0),
            16..144 => assert_eq!((used, &reply[4..8]), (16, &(-libc::EINVAL).to_le_bytes()[..])),
            _ => assert_eq!((used, &reply[4..8]), (144, &[0; 4][..])),
        }
    }
    let file = guest.lookup(ROOT, "file").unwrap().nodeid;
    let fh = guest.open(file, libc::O_RDONLY).unwrap().fh;
    let ask = fuse_backend_rs::abi::fuse_abi::ReadIn { fh, size: 100, ..Default::default() };
    let message = guest.message(opcode::READ, file, &[ask.as_slice()]);
    for room in [1, 15, 16, 17, 115] {
        let (used, _) = guest.send_raw(&message, &[], &[room]).unwrap();
        assert_eq!(used, if room < 16 { 0 } else { 16 });
    }
    assert_eq!(guest.send_raw(&message, &[], &[116]).unwrap().0, 116);
}

#[test]
fn messages_may_be_cut_anywhere() {
    let mut guest = FakeGuest::mounted(Policy::Always);
    guest.host_file("file", 1);
    for cuts in [&[1u32, 1, 1][..], &[0, 40, 0], &[0, 0, 17, 0, 3, 0], &[39], &[44]] {
        let message = guest.message(opcode::LOOKUP, ROOT, &[&nul("file")]);
        let (used, reply) = guest.send_raw(&message, cuts, &[0, 3, 0, 13, 1, 0, 127, 100]).unwrap();
        assert_eq!((used, &reply[4..8]), (144, &[0; 4][..]), "{cuts:?}");
    }
}

#[test]
fn chains_without_a_request_are_returned_unused() {
    let mut guest = FakeGuest::mounted(Policy::Always);
    for descriptors in [
        &[Descriptor::new(0x30_0000, 4096, WRITABLE, 0)][..],
        &[Descriptor::new(0x10_0000, 0, 0, 0), Descriptor::new(0x30_0000, 4096, WRITABLE, 0)],
        &[Descriptor::new(0x10_0000, 39, 0, 0), Descriptor::new(0x30_0000, 4096, WRITABLE, 0)],
        &[Descriptor::new(0x10_0000, 0, 0, 0)],
    ] {
        assert_eq!(guest.send_descriptors(descriptors).unwrap(), 0);
    }
}

#[test]
fn buffers_outside_of_memory_stop_the_queue() {
    let mut guest = FakeGuest::mounted(Policy::Always);
    for (address, len) in
        [(0x5f_ffff, 2), (0x60_0000, 1), (u64::MAX, 40), (u64::MAX - 39, 40), (1 << 63, u32::MAX)]
    {
        for flags in [0, WRITABLE] {
            let error = guest.send_descriptors(&[Descriptor::new(address, len, flags, 0)]).unwrap_err();
            assert!(error.to_string().contains("not in guest memory"), "{error}");
        }
    }
}

#[test]
fn huge_sizes_allocate_and_read_no_more_than_there_is() {
    let mut guest = FakeGuest::mounted(Policy::Always);
    guest.host_file("file", 1);
    let file = guest.lookup(ROOT, "file").unwrap().nodeid;
    let fh = guest.open(file, libc::O_RDONLY).unwrap().fh;
    assert_eq!(guest.read(file, fh, 0, u32::MAX).unwrap().len(), 1 << 20);
    assert_eq!(guest.read(file, fh, u64::MAX, 100), Err(libc::EINVAL));
    assert!(guest.getxattr(file, "user.none", u32::MAX).is_err());
    assert!(guest.list(ROOT, u32::MAX >> 12, true).unwrap().len() == 1);
    guest.post(opcode::BATCH_FORGET, 0, &[&u32::MAX.to_le_bytes(), &[0; 4]]);
}
