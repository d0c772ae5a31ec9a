//! A share of the whole root, with /proc and /sys in it.

use crate::virtio::fs::abi::opcode;
use crate::virtio::fs::policy::Policy;
use crate::virtio::fs::testing::{FakeGuest, PER_FILE, ROOT, nul};

#[test]
fn a_shared_root_has_no_way_into_the_hosts_kernel() {
    let mut guest = FakeGuest::with(|config| {
        config.path = "/".into();
        config.policy = Policy::Always;
        config.read_only = true;
    });
    guest.init(PER_FILE).unwrap();
    for (mount, below) in [
        ("proc", &["self", "1", "kcore", "kmsg", "sysrq-trigger", "mounts"][..]),
        ("sys", &["kernel", "class", "firmware"]),
    ] {
        let entry = guest.lookup(ROOT, mount).unwrap();
        let is_mounted = std::fs::read_dir(format!("/{mount}")).unwrap().next().is_some();
        assert!(is_mounted && entry.attr.mode & libc::S_IFMT == libc::S_IFDIR);
        let node = entry.nodeid;
        // A directory to mount on, which an overlay may ask for its attributes.
        guest.getattr(node, None).unwrap();
        assert_ne!(guest.getxattr(node, "trusted.overlay.opaque", 10), Err(libc::EACCES));
        for name in below {
            assert_eq!(guest.lookup(node, name).unwrap_err(), libc::EACCES, "{name}");
        }
        assert_eq!(guest.opendir(node), Err(libc::EACCES));
        assert_eq!(guest.open(node, libc::O_RDONLY).unwrap_err(), libc::EACCES);
        assert_eq!(guest.call(opcode::SYNCFS, node, &[&[0; 8]]), Err(libc::EACCES));
        guest.forget(node, 1);
        assert_eq!(guest.getattr(node, None).unwrap_err(), libc::EBADF);
    }
    // It is what it is after another session, too, and found by a listing.
    guest.init(PER_FILE).unwrap();
    let list = guest.list(ROOT, 4096, true).unwrap();
    let proc = list.iter().find(|(name, ..)| name == "proc").unwrap().1.nodeid;
    assert_eq!(guest.lookup(proc, "self").unwrap_err(), libc::EACCES);
    assert_eq!(guest.call(opcode::LOOKUP, proc, &[&nul("..")]), Err(libc::EACCES));
    // The rest of it is there.
    let etc = guest.lookup(ROOT, "etc").unwrap().nodeid;
    let passwd = guest.lookup(etc, "passwd").unwrap().nodeid;
    let fh = guest.open(passwd, libc::O_RDONLY).unwrap().fh;
    assert!(!guest.read(passwd, fh, 0, 100).unwrap().is_empty());
}
