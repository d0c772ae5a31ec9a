//! Files, directories and names, on writable and on read-only shares.

use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt};

use fuse_backend_rs::abi::fuse_abi::{
    CopyFileRangeIn, CreateIn, EntryOut, FOPEN_IN_KILL_SUIDGID, GetxattrIn, SetattrIn, WRITE_CACHE,
    WRITE_KILL_PRIV, WriteIn,
};
use vm_memory::ByteValued;

use crate::virtio::fs::abi::{init, opcode};
use crate::virtio::fs::policy::Policy;
use crate::virtio::fs::testing::{FakeGuest, PER_FILE, READ, ROOT, WRITE, directory_with_flags, nul};
use crate::virtio::fs::window::CHUNK_SIZE;

#[test]
fn a_file_is_created_written_read_and_removed() {
    let mut guest = FakeGuest::mounted(Policy::Always);
    let (entry, open) = guest.create(ROOT, "file", libc::O_RDWR | libc::O_EXCL).unwrap();
    assert_eq!(guest.write(entry.nodeid, open.fh, 0, b"hello world"), Ok(11));
    assert_eq!(guest.write(entry.nodeid, open.fh, 6, b"there"), Ok(5));
    assert_eq!(guest.read(entry.nodeid, open.fh, 0, 4096).unwrap(), b"hello there");
    assert_eq!(guest.read(entry.nodeid, open.fh, 6, 3).unwrap(), b"the");
    assert_eq!(guest.read(entry.nodeid, open.fh, 100, 3).unwrap(), b"");
    assert_eq!(guest.fsync(entry.nodeid, open.fh), Ok(vec![]));
    assert_eq!(std::fs::read(guest.path("file")).unwrap(), b"hello there");
    assert_eq!(guest.getattr(entry.nodeid, Some(open.fh)).unwrap().size, 11);
    assert_eq!(guest.path("file").metadata().unwrap().permissions().mode() & 0o777, 0o644);

    assert_eq!(guest.create(ROOT, "file", libc::O_RDWR | libc::O_EXCL).unwrap_err(), libc::EEXIST);
    let (again, truncated) = guest.create(ROOT, "file", libc::O_RDWR | libc::O_TRUNC).unwrap();
    assert_eq!(again.nodeid, entry.nodeid);
    assert_eq!(guest.read(entry.nodeid, open.fh, 0, 4096).unwrap(), b"");
    guest.release(entry.nodeid, open.fh).unwrap();
    assert_eq!(guest.read(entry.nodeid, open.fh, 0, 1), Err(libc::EBADF));
    guest.release(entry.nodeid, truncated.fh).unwrap();

    guest.unlink(ROOT, "file").unwrap();
    assert_eq!(guest.lookup(ROOT, "file").unwrap_err(), libc::ENOENT);
    assert!(!guest.path("file").exists());
}

/// The client knows of no file of this name, and the host has one meanwhile.
#[test]
fn what_create_truncates_is_told_as_it_is_then() {
    let mut guest = FakeGuest::new(Policy::Always);
    guest.init(PER_FILE | init::HANDLE_KILLPRIV_V2).unwrap();
    let path = guest.path("file");
    std::fs::write(&path, vec![1; 100_000]).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o6755)).unwrap();
    let (flags, fuse_flags) = ((libc::O_CREAT | libc::O_RDWR) as u32, FOPEN_IN_KILL_SUIDGID);
    let ask = CreateIn { flags, mode: 0o644, umask: 0o22, fuse_flags };
    let mut create = |flags: i32| {
        let ask = CreateIn { flags: ask.flags | flags as u32, ..ask };
        let reply = guest.call(opcode::CREATE, ROOT, &[ask.as_slice(), &nul("file")]).unwrap();
        EntryOut::from_slice(&reply[..size_of::<EntryOut>()]).unwrap().attr
    };
    let kept = create(0);
    assert_eq!((kept.size, kept.mode & 0o7777), (100_000, 0o6755));
    let truncated = create(libc::O_TRUNC);
    assert_eq!((truncated.size, truncated.mode & 0o7777), (0, 0o755));
    assert_eq!(path.metadata().unwrap().len(), 0);
}

/// The client itself truncates, and so what it had mapped is not lost to it.
#[test]
fn what_create_truncates_is_no_loss() {
    let mut guest = FakeGuest::mounted(Policy::Always);
    guest.host_file("file", 2);
    let file = guest.lookup(ROOT, "file").unwrap().nodeid;
    guest.setupmapping(file, CHUNK_SIZE, 0, READ | WRITE).unwrap();
    let (entry, open) = guest.create(ROOT, "file", libc::O_RDWR | libc::O_TRUNC).unwrap();
    assert_eq!((entry.nodeid, entry.attr.size), (file, 0));
    assert_eq!(guest.write(file, open.fh, CHUNK_SIZE, b"new"), Ok(3));
    assert_eq!(guest.window(0), *b"ne");
    assert_eq!(guest.counters().window.unwrap().lost_files, 0);
}

#[test]
fn a_megabyte_goes_through_in_one_request() {
    let mut guest = FakeGuest::mounted(Policy::Never);
    let data: Vec<u8> = (0..1 << 20).map(|at: u32| (at / 7) as u8).collect();
    let (entry, open) = guest.create(ROOT, "file", libc::O_RDWR).unwrap();
    assert_eq!(guest.write(entry.nodeid, open.fh, 4096, &data), Ok(1 << 20));
    assert!(guest.read(entry.nodeid, open.fh, 4096, 1 << 20).unwrap() == data);
}

#[test]
fn appending_goes_to_the_end() {
    let mut guest = FakeGuest::mounted(Policy::Never);
    std::fs::write(guest.path("log"), "one ").unwrap();
    let file = guest.lookup(ROOT, "log").unwrap().nodeid;
    let open = guest.open(file, libc::O_WRONLY | libc::O_APPEND).unwrap();
    let flags = (libc::O_WRONLY | libc::O_APPEND) as u32;
    let ask = WriteIn { fh: open.fh, size: 3, flags, ..Default::default() };
    guest.call(opcode::WRITE, file, &[ask.as_slice(), b"two"]).unwrap();
    assert_eq!(std::fs::read(guest.path("log")).unwrap(), b"one two");
}

#[test]
fn sizes_modes_and_times_are_set() {
    let mut guest = FakeGuest::mounted(Policy::Always);
    std::fs::write(guest.path("file"), "0123456789").unwrap();
    let file = guest.lookup(ROOT, "file").unwrap().nodeid;
    let size = SetattrIn { valid: 1 << 3, size: 4, ..Default::default() };
    assert_eq!(guest.setattr(file, size).unwrap().size, 4);
    let mode = SetattrIn { valid: 1, mode: 0o640, ..Default::default() };
    assert_eq!(guest.setattr(file, mode).unwrap().mode & 0o7777, 0o640);
    let mtime = SetattrIn { valid: 1 << 5, mtime: 1_000_000, ..Default::default() };
    assert_eq!(guest.setattr(file, mtime).unwrap().mtime, 1_000_000);
    let metadata = guest.path("file").metadata().unwrap();
    assert_eq!((metadata.len(), metadata.mode() & 0o777, metadata.mtime()), (4, 0o640, 1_000_000));
    let negative = SetattrIn { valid: 1 << 3, size: u64::MAX, ..Default::default() };
    assert_eq!(guest.setattr(file, negative).unwrap_err(), libc::EINVAL);
}

#[test]
fn names_are_moved_and_linked() {
    let mut guest = FakeGuest::mounted(Policy::Always);
    std::fs::write(guest.path("a"), "a").unwrap();
    std::fs::write(guest.path("b"), "b").unwrap();
    assert_eq!(guest.rename(ROOT, "a", "b", libc::RENAME_NOREPLACE), Err(libc::EEXIST));
    assert_eq!(guest.rename(ROOT, "a", "b", 1 << 20), Err(libc::EINVAL));
    guest.rename(ROOT, "a", "b", libc::RENAME_EXCHANGE).unwrap();
    assert_eq!(std::fs::read(guest.path("a")).unwrap(), b"b");
    guest.rename(ROOT, "a", "c", 0).unwrap();
    let file = guest.lookup(ROOT, "c").unwrap();
    let linked = guest.link(file.nodeid, ROOT, "d").unwrap();
    assert_eq!((linked.nodeid, linked.attr.nlink), (file.nodeid, 2));
    let symlink = guest.symlink(ROOT, "s", "../anything\u{e9}").unwrap();
    assert_eq!(guest.call(opcode::READLINK, symlink.nodeid, &[]).unwrap(), "../anything\u{e9}".as_bytes());
    guest.mkdir(ROOT, "e").unwrap();
    assert_eq!(guest.rmdir(ROOT, "d"), Err(libc::ENOTDIR));
    guest.rmdir(ROOT, "e").unwrap();
    let fifo = guest.mknod(ROOT, "fifo", libc::S_IFIFO | 0o600).unwrap();
    assert_eq!(fifo.attr.mode, libc::S_IFIFO | 0o600);
    assert!(guest.path("fifo").metadata().unwrap().file_type().is_fifo());
}

#[test]
fn directories_are_listed_in_pieces() {
    let mut guest = FakeGuest::mounted(Policy::Always);
    let long = "l".repeat(255);
    let mut names: Vec<String> = (0..500).map(|number| format!("file-{number}")).collect();
    names.push(long);
    for name in &names {
        std::fs::write(guest.path(name), "").unwrap();
    }
    names.sort();
    for plus in [false, true] {
        for size in [1024, 4096, 1 << 16] {
            let mut listed = guest.list(ROOT, size, plus).unwrap();
            listed.sort_by(|a, b| a.0.cmp(&b.0));
            assert!(listed.iter().map(|(name, ..)| name).eq(&names), "{size} {plus}");
            for (name, entry, dirent) in listed {
                let ino = guest.path(&name).metadata().unwrap().ino();
                assert_eq!((dirent.ino, dirent.type_), (ino, u32::from(libc::DT_REG)));
                assert_eq!(entry.attr.ino, if plus { ino } else { 0 });
            }
        }
    }
    let file = guest.lookup(ROOT, "file-1").unwrap().nodeid;
    assert_eq!(guest.opendir(file), Err(libc::ENOTDIR));
    let fh = guest.opendir(ROOT).unwrap();
    assert_eq!(guest.releasedir(file, fh), Err(libc::EBADF));
    guest.releasedir(ROOT, fh).unwrap();
    assert_eq!(guest.releasedir(ROOT, fh), Err(libc::EBADF));
}

#[test]
fn names_need_not_be_utf8() {
    let mut guest = FakeGuest::mounted(Policy::Always);
    let name = std::ffi::OsStr::from_bytes(b"\xff\xfe\x01 \n");
    std::fs::write(guest.directory.path().join(name), "x").unwrap();
    assert!(guest.call(opcode::LOOKUP, ROOT, &[name.as_bytes(), &[0]]).is_ok());
    guest.call(opcode::UNLINK, ROOT, &[name.as_bytes(), &[0]]).unwrap();
    assert_eq!(std::fs::read_dir(guest.directory.path()).unwrap().count(), 0);
}

#[test]
fn ranges_are_copied_on_the_host() {
    let mut guest = FakeGuest::mounted(Policy::Always);
    std::fs::write(guest.path("from"), "0123456789").unwrap();
    let from = guest.lookup(ROOT, "from").unwrap().nodeid;
    let fh_in = guest.open(from, libc::O_RDONLY).unwrap().fh;
    let (to, open) = guest.create(ROOT, "to", libc::O_WRONLY).unwrap();
    let ask = CopyFileRangeIn {
        fh_in,
        offset_in: 2,
        nodeid_out: to.nodeid,
        fh_out: open.fh,
        offset_out: 1,
        len: 5,
        flags: 0,
    };
    match guest.copy_file_range(from, ask) {
        Ok(copied) => {
            assert_eq!(copied, 5);
            assert_eq!(std::fs::read(guest.path("to")).unwrap(), b"\x0023456");
        }
        // File systems that cannot copy say so, and the guest copies by itself.
        Err(error) => assert!(error == libc::EXDEV || error == libc::EOPNOTSUPP, "{error}"),
    }
    let closed = CopyFileRangeIn { fh_out: open.fh + 100, ..ask };
    assert_eq!(guest.copy_file_range(from, closed), Err(libc::EBADF));
    assert_eq!(guest.copy_file_range(from, CopyFileRangeIn { flags: 1, ..ask }), Err(libc::EINVAL));
    let negative = CopyFileRangeIn { offset_in: u64::MAX, ..ask };
    assert_eq!(guest.copy_file_range(from, negative), Err(libc::EINVAL));
}

#[test]
fn holes_are_found_and_space_is_allocated() {
    let mut guest = FakeGuest::mounted(Policy::Always);
    let (entry, open) = guest.create(ROOT, "file", libc::O_RDWR).unwrap();
    guest.fallocate(entry.nodeid, open.fh, 1 << 20).unwrap();
    assert_eq!(guest.path("file").metadata().unwrap().len(), 1 << 20);
    assert_eq!(guest.lseek(entry.nodeid, open.fh, 0, libc::SEEK_HOLE).map(|hole| hole <= 1 << 20), Ok(true));
    assert_eq!(guest.lseek(entry.nodeid, open.fh, 1 << 20, libc::SEEK_DATA), Err(libc::ENXIO));
    assert_eq!(guest.lseek(entry.nodeid, open.fh, 0, libc::SEEK_SET), Err(libc::EINVAL));
}

#[test]
fn allocating_takes_the_set_id_bits() {
    let mut guest = FakeGuest::mounted(Policy::Always);
    let (entry, open) = guest.create(ROOT, "file", libc::O_RDWR).unwrap();
    std::fs::set_permissions(guest.path("file"), PermissionsExt::from_mode(0o6755)).unwrap();
    guest.fallocate(entry.nodeid, open.fh, 4096).unwrap();
    assert_eq!(guest.path("file").metadata().unwrap().mode() & 0o7777, 0o755);
}

#[test]
fn writing_takes_the_set_id_bits_when_the_client_says_so() {
    let mut guest = FakeGuest::mounted(Policy::Always);
    let (entry, open) = guest.create(ROOT, "file", libc::O_RDWR).unwrap();
    std::fs::set_permissions(guest.path("file"), PermissionsExt::from_mode(0o6755)).unwrap();
    let (flags, fuse_flags) = (libc::O_RDWR as u32, WRITE_KILL_PRIV);
    let ask = WriteIn { fh: open.fh, size: 1, flags, fuse_flags, ..Default::default() };
    guest.call(opcode::WRITE, entry.nodeid, &[ask.as_slice(), b"x"]).unwrap();
    assert_eq!(guest.path("file").metadata().unwrap().mode() & 0o7777, 0o755);
}

#[test]
fn extended_attributes_pass_and_acls_do_not() {
    let mut guest = FakeGuest::mounted(Policy::Always);
    std::fs::write(guest.path("file"), "").unwrap();
    let file = guest.lookup(ROOT, "file").unwrap().nodeid;
    for name in ["system.posix_acl_access", "system.posix_acl_default"] {
        assert_eq!(guest.setxattr(file, name, b"acl"), Err(libc::EOPNOTSUPP));
        assert_eq!(guest.getxattr(file, name, 100), Err(libc::EOPNOTSUPP));
        assert_eq!(guest.call(opcode::REMOVEXATTR, file, &[&nul(name)]), Err(libc::EOPNOTSUPP));
    }
    match guest.setxattr(file, "user.test", b"value") {
        Err(libc::EOPNOTSUPP) => return, // The host's file system has none.
        outcome => assert_eq!(outcome, Ok(vec![])),
    }
    assert_eq!(guest.getxattr(file, "user.test", 100).unwrap(), b"value");
    assert_eq!(guest.getxattr(file, "user.test", 0).unwrap(), [5, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(guest.getxattr(file, "user.test", 2), Err(libc::ERANGE));
    assert_eq!(guest.getxattr(file, "user.test", u32::MAX).unwrap(), b"value");
    let list = GetxattrIn { size: 100, padding: 0 };
    assert!(guest.call(opcode::LISTXATTR, file, &[list.as_slice()]).unwrap().ends_with(b"user.test\0"));
    guest.call(opcode::REMOVEXATTR, file, &[&nul("user.test")]).unwrap();
    assert_eq!(guest.getxattr(file, "user.test", 100), Err(libc::ENODATA));
}

/// The client looks at nothing but the error of what it writes back.
#[test]
fn what_is_written_back_is_written_whole_or_fails() {
    let Some(share) = directory_with_flags() else { return };
    let mut guest = FakeGuest::on(share, |_| ());
    guest.init(PER_FILE).unwrap();
    let (entry, open) = guest.create(ROOT, "file", libc::O_RDWR | libc::O_APPEND).unwrap();
    let path = guest.path("file");
    let mut write = |offset, fuse_flags, len: usize| {
        let ask = WriteIn { fh: open.fh, offset, size: len as u32, fuse_flags, ..Default::default() };
        guest.call(opcode::WRITE, entry.nodeid, &[ask.as_slice(), &vec![7; len]]).map(|reply| reply[0])
    };
    let set_id = || std::fs::set_permissions(&path, PermissionsExt::from_mode(0o4755)).unwrap();
    let mode = || path.metadata().unwrap().permissions().mode() & 0o7777;
    set_id();
    assert_eq!(write(4096, WRITE_CACHE, 8), Ok(8));
    assert_eq!(mode(), 0o4755, "stores are no writes, on no file system");
    assert_eq!(write(4096, WRITE_CACHE | WRITE_KILL_PRIV, 8), Ok(8));
    assert_eq!(mode(), 0o755);
    // A file of ext4 ends behind the first half of it; elsewhere it may be longer.
    let near = (u64::from(u32::MAX) << 12) - 8192;
    let written = write(near, WRITE_CACHE, 16384);
    assert_eq!(write(0, WRITE_CACHE, (1 << 20) + 1), Err(libc::EINVAL), "more than max_write");
    assert_eq!(write(0, 0, (1 << 20) + 1), Err(libc::EINVAL));
    let bytes = File::open(guest.path("file")).unwrap();
    let is_whole = bytes.metadata().unwrap().len() == near + 16384;
    assert_eq!(written, if is_whole { Ok(0) } else { Err(libc::EFBIG) });
    let mut start = [1; 5000];
    bytes.read_exact_at(&mut start, 0).unwrap();
    assert!(start[..4096].iter().all(|byte| *byte == 0) && start[4096..4104] == [7; 8]);
}

#[test]
fn the_file_system_is_described_and_synced() {
    let mut guest = FakeGuest::mounted(Policy::Always);
    assert_eq!(guest.call(opcode::STATFS, ROOT, &[]).unwrap().len(), 80);
    assert_eq!(guest.call(opcode::SYNCFS, ROOT, &[&[0; 8]]), Ok(vec![]));
}

#[test]
fn forgotten_inodes_are_unknown_and_cost_nothing() {
    use crate::virtio::fs::testing::descriptors_into;
    let mut guest = FakeGuest::mounted(Policy::Always);
    for number in 0..50 {
        std::fs::write(guest.path(&number.to_string()), "").unwrap();
    }
    let before = descriptors_into(&guest.directory);
    let nodes: Vec<_> =
        (0..50).map(|number| guest.lookup(ROOT, &number.to_string()).unwrap().nodeid).collect();
    guest.lookup(ROOT, "0").unwrap();
    assert_eq!(descriptors_into(&guest.directory), before + 50);
    guest.forget(nodes[0], 1);
    assert!(guest.getattr(nodes[0], None).is_ok());
    let batch: Vec<u8> =
        nodes.iter().flat_map(|node| [node.to_le_bytes(), 1u64.to_le_bytes()].concat()).collect();
    guest.post(opcode::BATCH_FORGET, 0, &[&50u32.to_le_bytes(), &[0; 4], &batch]);
    assert_eq!(descriptors_into(&guest.directory), before);
    assert_eq!(guest.getattr(nodes[0], None).unwrap_err(), libc::EBADF);
    // The root stays known whatever the guest says.
    guest.forget(ROOT, u64::MAX);
    assert!(guest.getattr(ROOT, None).is_ok());
}

#[test]
fn a_read_only_share_is_read_only() {
    let mut guest = FakeGuest::with(|config| config.read_only = true);
    guest.host_file("file", 1);
    std::fs::create_dir(guest.path("directory")).unwrap();
    let before = guest.path("file").metadata().unwrap();
    guest.init(PER_FILE).unwrap();
    let file = guest.lookup(ROOT, "file").unwrap().nodeid;

    for flags in
        [libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_TRUNC, libc::O_WRONLY | libc::O_APPEND]
    {
        assert_eq!(guest.open(file, flags).unwrap_err(), libc::EROFS);
    }
    let fh = guest.open(file, libc::O_RDONLY).unwrap().fh;
    assert_eq!(guest.read(file, fh, 0, 2).unwrap(), b"f\0");
    guest.setupmapping(file, 0, 0, READ).unwrap();
    assert_eq!(guest.window(0), [b'f', 0]);

    let erofs = Err(libc::EROFS);
    assert_eq!(guest.setupmapping(file, 0, 0, READ | WRITE), erofs);
    assert_eq!(guest.write(file, fh, 0, b"x"), Err(libc::EROFS));
    assert_eq!(guest.create(ROOT, "new", libc::O_RDWR).unwrap_err(), libc::EROFS);
    assert_eq!(guest.create(ROOT, "file", libc::O_RDONLY).unwrap_err(), libc::EROFS);
    assert_eq!(guest.mknod(ROOT, "new", libc::S_IFREG).unwrap_err(), libc::EROFS);
    assert_eq!(guest.mkdir(ROOT, "new").unwrap_err(), libc::EROFS);
    assert_eq!(guest.symlink(ROOT, "new", "file").unwrap_err(), libc::EROFS);
    assert_eq!(guest.link(file, ROOT, "new").unwrap_err(), libc::EROFS);
    assert_eq!(guest.unlink(ROOT, "file"), erofs);
    assert_eq!(guest.rmdir(ROOT, "directory"), erofs);
    assert_eq!(guest.rename(ROOT, "file", "new", 0), erofs);
    assert_eq!(guest.call(opcode::RENAME, ROOT, &[&ROOT.to_le_bytes(), &nul("file"), &nul("new")]), erofs);
    for valid in [0, 1] {
        let ask = SetattrIn { valid, ..Default::default() };
        assert_eq!(guest.setattr(file, ask).unwrap_err(), libc::EROFS);
    }
    assert_eq!(guest.fallocate(file, fh, 1), erofs);
    assert_eq!(guest.setxattr(file, "user.test", b"x"), erofs);
    assert_eq!(guest.call(opcode::REMOVEXATTR, file, &[&nul("user.test")]), erofs);
    assert_eq!(guest.copy_file_range(file, CopyFileRangeIn::default()), Err(libc::EROFS));
    assert_eq!(guest.call(opcode::TMPFILE, ROOT, &[&[0; 16], &nul("")]), erofs);
    assert_eq!(guest.call(opcode::ACCESS, file, &[&[2, 0, 0, 0, 0, 0, 0, 0]]), erofs);
    assert_eq!(guest.call(opcode::ACCESS, file, &[&[4, 0, 0, 0, 0, 0, 0, 0]]), Ok(vec![]));
    assert_eq!(guest.call(opcode::SYNCFS, ROOT, &[&[0; 8]]), Ok(vec![]));
    assert_eq!(guest.list(ROOT, 4096, true).unwrap().len(), 2);

    let after = guest.path("file").metadata().unwrap();
    assert_eq!(
        (after.len(), after.mode(), after.mtime_nsec()),
        (before.len(), before.mode(), before.mtime_nsec())
    );
    assert_eq!(guest.counters().window.unwrap().mapped_chunks, 1);
}
