//! What the guest is told that it may keep.

use crate::virtio::fs::CacheMode;
use crate::virtio::fs::abi::{FOPEN_CACHE_DIR, FOPEN_DIRECT_IO, FOPEN_KEEP_CACHE, init, opcode};
use crate::virtio::fs::policy::Policy;
use crate::virtio::fs::testing::{FakeGuest, PER_FILE, ROOT};

use fuse_backend_rs::abi::fuse_abi::{AttrOut, GetattrIn, OpenIn, OpenOut};
use vm_memory::ByteValued;

#[test]
fn timeouts_and_flags_are_the_modes() {
    const CACHED: u32 = FOPEN_CACHE_DIR | FOPEN_KEEP_CACHE;
    for (cache, seconds, file, directory) in [
        (CacheMode::Never, 0, FOPEN_DIRECT_IO, 0),
        (CacheMode::Auto, 1, 0, 0),
        (CacheMode::Metadata, 86_400, FOPEN_DIRECT_IO, CACHED),
        (CacheMode::Always, 86_400, FOPEN_KEEP_CACHE, CACHED),
    ] {
        for policy in [Policy::Never, Policy::Always] {
            let file = if policy == Policy::Always { FOPEN_KEEP_CACHE } else { file };
            let mut guest = FakeGuest::with(|config| (config.cache, config.policy) = (cache, policy));
            let reply = guest.init(PER_FILE | init::DIRECT_IO_ALLOW_MMAP).unwrap();
            let allows_mmap = u64::from(reply.flags2) << 32 & init::DIRECT_IO_ALLOW_MMAP != 0;
            assert_eq!(allows_mmap, matches!(cache, CacheMode::Never | CacheMode::Metadata));

            let (created, open) = guest.create(ROOT, "file", libc::O_RDWR).unwrap();
            let made = guest.mkdir(ROOT, "directory").unwrap();
            for entry in [created, made, guest.lookup(ROOT, "file").unwrap()] {
                let timeouts = (entry.entry_valid, entry.attr_valid, entry.entry_valid_nsec);
                assert_eq!(timeouts, (seconds, seconds, 0), "{cache}");
            }
            let ask = GetattrIn::default();
            let reply = guest.call(opcode::GETATTR, ROOT, &[ask.as_slice()]).unwrap();
            assert_eq!(AttrOut::from_slice(&reply).unwrap().attr_valid, seconds);

            let opened = guest.open(created.nodeid, libc::O_RDWR).unwrap();
            assert_eq!((open.open_flags, opened.open_flags), (file, file), "{cache}");
            let reply = guest.call(opcode::OPENDIR, ROOT, &[OpenIn::default().as_slice()]).unwrap();
            assert_eq!(OpenOut::from_slice(&reply).unwrap().open_flags, directory, "{cache}");
        }
    }
}
