//! INIT and DESTROY.

use fuse_backend_rs::abi::fuse_abi::{InitIn, InitOut};
use vm_memory::ByteValued;

use crate::virtio::fs::abi::{init, opcode};
use crate::virtio::fs::policy::Policy;
use crate::virtio::fs::testing::{FakeGuest, PER_FILE, READ, ROOT, WRITE, descriptors_into};
use crate::virtio::fs::window::CHUNK_SIZE;

const BASE: u64 = init::INIT_EXT | 0x3fff & !init::MAP_ALIGNMENT;

fn flags(out: &InitOut) -> u64 {
    u64::from(out.flags2) << 32 | u64::from(out.flags)
}

#[test]
fn dax_is_negotiated_by_both_bits_and_the_window() {
    let (align, inode) = (init::MAP_ALIGNMENT, init::HAS_INODE_DAX);
    for (window_size, offer, expected, alignment) in [
        (32 << 20, 0, 0, 0),
        (32 << 20, inode, 0, 0),
        (32 << 20, align, align, 21),
        (32 << 20, align | inode, align | inode, 21),
        (0, align, 0, 0),
        (0, align | inode, 0, 0),
    ] {
        let mut guest = FakeGuest::with(|config| config.window_size = window_size);
        let out = guest.init(BASE | offer).unwrap();
        assert_eq!(flags(&out) & (align | inode), expected, "{offer:#x}");
        assert_eq!(out.map_alignment, alignment);
    }
}

#[test]
fn only_what_was_offered_is_used() {
    let mut guest = FakeGuest::new(Policy::Always);
    for offer in [0, init::INIT_EXT, init::ASYNC_READ, PER_FILE, !0, !init::HANDLE_KILLPRIV_V2] {
        let out = guest.init(offer).unwrap();
        assert_eq!(flags(&out) & !offer, 0);
        assert_eq!((out.major, out.minor, out.max_write, out.max_pages), (7, 36, 1 << 20, 256));
        assert_eq!(out.max_readahead, 1 << 17);
    }
    let out = guest.init(!0).unwrap();
    let writeback_locks_acl = 1 << 16 | 1 << 1 | 1 << 10 | 1 << 20;
    assert_eq!(flags(&out) & writeback_locks_acl, 0);
    let readdirplus = init::DO_READDIRPLUS | init::READDIRPLUS_AUTO;
    assert_eq!(flags(&out) & readdirplus, readdirplus);
}

#[test]
fn without_the_extension_flags2_is_not_read() {
    let mut guest = FakeGuest::new(Policy::Always);
    let ask = InitIn { major: 7, minor: 31, max_readahead: 0, flags: init::MAP_ALIGNMENT as u32 };
    let reply = guest.call(opcode::INIT, 0, &[ask.as_slice()]).unwrap();
    let out = InitOut::from_slice(&reply).unwrap();
    assert_eq!((out.flags, out.flags2, out.map_alignment), (init::MAP_ALIGNMENT as u32, 0, 21));
}

#[test]
fn other_versions_of_the_protocol() {
    let mut guest = FakeGuest::new(Policy::Always);
    let mut init = |major, minor| {
        let ask = InitIn { major, minor, max_readahead: 0, flags: 0 };
        let reply = guest.call(opcode::INIT, 0, &[ask.as_slice()])?;
        let out = InitOut::from_slice(&reply).unwrap();
        Ok((out.major, out.max_write))
    };
    assert_eq!(init(8, 0), Ok((7, 0)));
    assert_eq!(init(6, 40), Err(libc::EPROTO));
    assert_eq!(init(7, 30), Err(libc::EPROTO));
    assert_eq!(init(7, 31), Ok((7, 1 << 20)));
}

/// A session with mappings, open files and known inodes is started and ended; all of it is gone afterwards.
fn session_leaves_nothing(end: impl Fn(&mut FakeGuest)) {
    let mut guest = FakeGuest::new(Policy::Always);
    guest.host_file("a", 4);
    let before = descriptors_into(&guest.directory);
    for _ in 0..3 {
        guest.init(PER_FILE).unwrap();
        let file = guest.lookup(ROOT, "a").unwrap().nodeid;
        let handle = guest.open(file, libc::O_RDWR).unwrap().fh;
        let directory = guest.opendir(ROOT).unwrap();
        guest.setupmapping(file, 0, 0, READ).unwrap();
        guest.setupmapping(file, CHUNK_SIZE, 5 * CHUNK_SIZE, READ | WRITE).unwrap();
        assert_eq!(guest.window(5 * CHUNK_SIZE), [b'a', 1]);
        assert!(descriptors_into(&guest.directory) > before);

        end(&mut guest);
        assert_eq!((guest.window(0), guest.window(5 * CHUNK_SIZE)), ([0; 2], [0; 2]));
        assert_eq!(descriptors_into(&guest.directory), before);
        assert_eq!(guest.getattr(file, None).unwrap_err(), libc::EBADF);
        assert_eq!(guest.read(file, handle, 0, 10), Err(libc::EBADF));
        assert_eq!(guest.releasedir(ROOT, directory), Err(libc::EBADF));
    }
    let window = guest.counters().window.unwrap();
    assert_eq!((window.mapped_chunks, window.peak_mapped_chunks), (0, 2));
    assert_eq!((window.setup_mappings, window.remove_mappings, window.cleared_chunks), (6, 0, 6));
}

#[test]
fn destroy_ends_the_session() {
    session_leaves_nothing(|guest| assert_eq!(guest.destroy(), Ok(vec![])));
}

#[test]
fn a_second_init_ends_the_session() {
    session_leaves_nothing(|guest| assert!(guest.init(PER_FILE).is_ok()));
}

#[test]
fn reset_ends_the_session() {
    use crate::virtio::device::VirtioDevice;
    session_leaves_nothing(|guest| guest.device.reset());
}
