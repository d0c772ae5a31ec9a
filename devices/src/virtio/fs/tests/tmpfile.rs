//! Files without a name: O_TMPFILE in the guest.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use fuse_backend_rs::abi::fuse_abi::{
    CreateIn, EntryOut, FOPEN_IN_KILL_SUIDGID, GetxattrIn, OpenIn, OpenOut, SetattrIn, WRITE_CACHE, WriteIn,
};
use vm_memory::ByteValued;

use crate::virtio::fs::abi::{ATTR_DAX, opcode};
use crate::virtio::fs::hint::HintStore;
use crate::virtio::fs::policy::Policy;
use crate::virtio::fs::testing::{
    FakeGuest, Outcome, PER_FILE, READ, ROOT, WRITE, descriptors_into, directories_with_hints, nul,
};

fn tmpfile(guest: &mut FakeGuest, parent: u64, flags: i32) -> Outcome<(EntryOut, OpenOut)> {
    let ask = CreateIn { flags: flags as u32, mode: 0o100_640, umask: 0, fuse_flags: 0 };
    // The kernel's dentry of such a file has a slash for a name.
    let reply = guest.call(opcode::TMPFILE, parent, &[ask.as_slice(), &nul("/")])?;
    let (entry, open) = reply.split_at(size_of::<EntryOut>());
    Ok((*EntryOut::from_slice(entry).unwrap(), *OpenOut::from_slice(open).unwrap()))
}

#[test]
fn a_file_without_a_name_is_a_file() {
    for share in directories_with_hints() {
        let mut guest = FakeGuest::on(share, |config| config.policy = Policy::Never);
        guest.init(PER_FILE).unwrap();
        let before = descriptors_into(&guest.directory);
        let (entry, open) = tmpfile(&mut guest, ROOT, libc::O_RDWR).unwrap();
        let (file, fh) = (entry.nodeid, open.fh);
        assert_eq!((entry.attr.nlink, entry.attr.mode), (0, libc::S_IFREG | 0o640));
        assert_eq!(std::fs::read_dir(guest.directory.path()).unwrap().count(), 0);

        assert_eq!(guest.write(file, fh, 5, b"there"), Ok(5));
        assert_eq!(guest.write(file, fh, 0, b"hello"), Ok(5));
        assert_eq!(guest.read(file, fh, 3, 100).unwrap(), b"lothere");
        assert_eq!(guest.getattr(file, Some(fh)).unwrap().size, 10);
        assert_eq!(guest.fsync(file, fh), Ok(vec![]));
        let size = SetattrIn { valid: 1 << 3 | 1, size: 4, mode: 0o600, ..Default::default() };
        let attr = guest.setattr(file, size).unwrap();
        assert_eq!((attr.size, attr.mode), (4, libc::S_IFREG | 0o600));
        let times = SetattrIn { valid: 1 << 5, mtime: 1_000_000, mtimensec: 7, ..Default::default() };
        let attr = guest.setattr(file, times).unwrap();
        assert_eq!((attr.mtime, attr.mtimensec), (1_000_000, 7));
        guest.fallocate(file, fh, 8192).unwrap();
        assert_eq!(guest.lseek(file, fh, 8192, libc::SEEK_DATA), Err(libc::ENXIO));
        assert_eq!(guest.lseek(file, fh, 0, libc::SEEK_DATA), Ok(0));
        guest.setxattr(file, "user.test", b"value").unwrap();
        assert_eq!(guest.getxattr(file, "user.test", 100).unwrap(), b"value");
        assert_eq!(guest.getxattr(file, "user.test", 0).unwrap()[..4], [5, 0, 0, 0]);
        let list = GetxattrIn { size: 100, padding: 0 };
        assert!(guest.call(opcode::LISTXATTR, file, &[list.as_slice()]).unwrap().ends_with(b"user.test\0"));
        guest.call(opcode::REMOVEXATTR, file, &[&nul("user.test")]).unwrap();
        assert_eq!(guest.call(opcode::STATFS, file, &[]).unwrap().len(), 80);

        // By /proc/self/fd it is opened once more.
        let again = guest.open(file, libc::O_RDONLY).unwrap().fh;
        assert_eq!(guest.read(file, again, 0, 4).unwrap(), b"hell");
        guest.release(file, fh).unwrap();
        assert_eq!(guest.read(file, fh, 0, 4), Err(libc::EBADF));
        assert_eq!(guest.read(file, again, 0, 4).unwrap(), b"hell");
        guest.release(file, again).unwrap();
        assert_eq!(guest.release(file, again), Err(libc::EBADF));
        guest.forget(file, 1);
        assert_eq!(guest.getattr(file, None).unwrap_err(), libc::EBADF);
        assert_eq!(descriptors_into(&guest.directory), before);
    }
}

#[test]
fn what_is_written_goes_where_it_belongs() {
    for share in directories_with_hints() {
        let mut guest = FakeGuest::on(share, |_| ());
        guest.init(PER_FILE).unwrap();
        let flags = libc::O_RDWR | libc::O_APPEND;
        let (entry, open) = tmpfile(&mut guest, ROOT, flags).unwrap();
        let (file, fh) = (entry.nodeid, open.fh);
        let mut write = |offset, flags: i32, fuse_flags, data: &[u8]| {
            let ask = WriteIn {
                fh,
                offset,
                size: data.len() as u32,
                fuse_flags,
                flags: flags as u32,
                ..Default::default()
            };
            guest.call(opcode::WRITE, file, &[ask.as_slice(), data]).map(drop)
        };
        write(0, flags, 0, b"begin").unwrap();
        // From a mapping, and after fcntl(2) took O_APPEND away.
        write(0, 0, WRITE_CACHE, b"B").unwrap();
        write(1, libc::O_RDWR, 0, b"E").unwrap();
        write(0, flags, 0, b" end").unwrap();
        assert_eq!(guest.read(file, fh, 0, 100).unwrap(), b"BEgin end");
    }
}

#[test]
fn truncating_takes_the_set_id_bits() {
    let mut guest = FakeGuest::mounted(Policy::Never);
    let (entry, _) = tmpfile(&mut guest, ROOT, libc::O_RDWR).unwrap();
    let mode = SetattrIn { valid: 1, mode: 0o4755, ..Default::default() };
    assert_eq!(guest.setattr(entry.nodeid, mode).unwrap().mode & 0o7777, 0o4755);
    let ask = OpenIn { flags: (libc::O_RDWR | libc::O_TRUNC) as u32, fuse_flags: FOPEN_IN_KILL_SUIDGID };
    guest.call(opcode::OPEN, entry.nodeid, &[ask.as_slice()]).unwrap();
    assert_eq!(guest.getattr(entry.nodeid, None).unwrap().mode & 0o7777, 0o755);
}

#[test]
fn it_can_be_given_a_name() {
    for share in directories_with_hints() {
        let mut guest = FakeGuest::on(share, |_| ());
        guest.init(PER_FILE).unwrap();
        std::fs::write(guest.path("taken"), "").unwrap();
        let directory = guest.mkdir(ROOT, "directory").unwrap().nodeid;
        let (entry, open) = tmpfile(&mut guest, directory, libc::O_WRONLY).unwrap();
        guest.write(entry.nodeid, open.fh, 0, b"all of it").unwrap();
        assert_eq!(guest.link(entry.nodeid, ROOT, "taken").unwrap_err(), libc::EEXIST);
        assert_eq!(guest.link(entry.nodeid, ROOT, "../out").unwrap_err(), libc::EINVAL);
        let named = guest.link(entry.nodeid, ROOT, "named").unwrap();
        assert_eq!((named.attr.nlink, named.attr.size, named.attr.ino), (1, 9, entry.attr.ino));
        assert_eq!(std::fs::read(guest.path("named")).unwrap(), b"all of it");
        assert_eq!(guest.lookup(ROOT, "named").unwrap().nodeid, named.nodeid);
        assert_eq!(guest.link(entry.nodeid, directory, "again").unwrap().nodeid, named.nodeid);
        assert_eq!(guest.getattr(entry.nodeid, None).unwrap().nlink, 2);
        // The descriptor that the program has goes on working.
        assert_eq!(guest.write(entry.nodeid, open.fh, 7, b"me"), Ok(2));
        assert_eq!(std::fs::read(guest.path("named")).unwrap(), b"all of me");
        guest.release(entry.nodeid, open.fh).unwrap();
        guest.forget(entry.nodeid, 1);
        assert!(guest.getattr(named.nodeid, None).is_ok());

        let (entry, _) = tmpfile(&mut guest, ROOT, libc::O_RDWR | libc::O_EXCL).unwrap();
        assert_eq!(guest.link(entry.nodeid, ROOT, "never").unwrap_err(), libc::ENOENT);
    }
}

#[test]
fn it_is_dax_like_any_other() {
    for share in directories_with_hints() {
        HintStore::default().write(File::open(share.path()).unwrap().as_fd(), true).unwrap();
        let mut guest = FakeGuest::on(share, |config| config.policy = Policy::Inode);
        guest.init(PER_FILE).unwrap();
        let (entry, open) = tmpfile(&mut guest, ROOT, libc::O_RDWR).unwrap();
        assert_eq!(entry.attr.flags, ATTR_DAX);
        assert_eq!(guest.getattr(entry.nodeid, Some(open.fh)).unwrap().flags, ATTR_DAX);
        guest.write(entry.nodeid, open.fh, 0, &[b'x'; 4096]).unwrap();
        guest.setupmapping(entry.nodeid, 0, 0, READ | WRITE).unwrap();
        assert_eq!(guest.window(0), *b"xx");
        guest.write_window(0, *b"yz");
        assert_eq!(guest.read(entry.nodeid, open.fh, 0, 3).unwrap(), b"yzx");
        assert_eq!(guest.link(entry.nodeid, ROOT, "named").unwrap().attr.flags, ATTR_DAX);
        guest.release(entry.nodeid, open.fh).unwrap();
        guest.forget(entry.nodeid, 1);
        assert_eq!(guest.window(0), *b"yz");
    }
}

#[test]
fn it_belongs_to_who_asked() {
    let mut guest = FakeGuest::mounted(Policy::Always);
    // SAFETY: geteuid(2) has no preconditions and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        skipped!("only root creates files in the name of others");
        return;
    }
    let group = guest.mkdir(ROOT, "group").unwrap().nodeid;
    std::os::unix::fs::chown(guest.path("group"), None, Some(50)).unwrap();
    std::fs::set_permissions(guest.path("group"), PermissionsExt::from_mode(0o2777)).unwrap();
    for (parent, gid) in [(ROOT, 1001), (group, 50)] {
        let ask = CreateIn { flags: libc::O_RDWR as u32, mode: 0o100_640, ..Default::default() };
        let mut message = guest.message(opcode::TMPFILE, parent, &[ask.as_slice(), &nul("/")]);
        message[24..28].copy_from_slice(&1000u32.to_le_bytes());
        message[28..32].copy_from_slice(&1001u32.to_le_bytes());
        let (_, reply) = guest.send_raw(&message, &[40], &[4096]).unwrap();
        let entry = *EntryOut::from_slice(&reply[16..16 + size_of::<EntryOut>()]).unwrap();
        assert_eq!((entry.attr.uid, entry.attr.gid), (1000, gid));
        guest.link(entry.nodeid, ROOT, &format!("of {gid}")).unwrap();
        let metadata = guest.path(&format!("of {gid}")).metadata().unwrap();
        assert_eq!((metadata.uid(), metadata.gid(), metadata.mode() & 0o7777), (1000, gid, 0o640));
    }
}

#[test]
fn a_session_takes_its_unnamed_files_with_it() {
    let mut guest = FakeGuest::mounted(Policy::Always);
    let before = descriptors_into(&guest.directory);
    let (entry, open) = tmpfile(&mut guest, ROOT, libc::O_RDWR).unwrap();
    assert!(descriptors_into(&guest.directory) > before);
    guest.destroy().unwrap();
    assert_eq!(descriptors_into(&guest.directory), before);
    guest.init(PER_FILE).unwrap();
    assert_eq!(guest.read(entry.nodeid, open.fh, 0, 1), Err(libc::EBADF));

    // Not in what is no directory, and not to be read alone.
    let file = guest.mknod(ROOT, "file", libc::S_IFREG | 0o644).unwrap().nodeid;
    assert!(tmpfile(&mut guest, file, libc::O_RDWR).is_err());
    assert_eq!(tmpfile(&mut guest, ROOT, libc::O_RDONLY).unwrap_err(), libc::EINVAL);
}
