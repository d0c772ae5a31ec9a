//! The persistent hint through the guest's ioctls, and the attribute that may hold it.

use std::fs::File;
use std::os::fd::AsFd;

use fuse_backend_rs::abi::fuse_abi::{GetxattrIn, IoctlIn, IoctlOut};
use tempfile::TempDir;
use vm_memory::ByteValued;

use crate::virtio::fs::abi::opcode;
use crate::virtio::fs::hint::{self, FLAG, FsXattr, HintStore, XFLAG};
use crate::virtio::fs::policy::Policy;
use crate::virtio::fs::testing::{FakeGuest, Outcome, PER_FILE, ROOT, directories_with_hints, nul};

const GET: u32 = 0x8008_6601;
const SET: u32 = 0x4008_6602;
const FSGET: u32 = 0x801c_581f;
const FSSET: u32 = 0x401c_5820;

/// IOCTL as the client sends it, in an OPEN of its own; the data after the reply's structure.
fn ioctl(guest: &mut FakeGuest, nodeid: u64, cmd: u32, input: &[u8], out_size: u32) -> Outcome<Vec<u8>> {
    let is_directory = guest.getattr(nodeid, None)?.mode & libc::S_IFMT == libc::S_IFDIR;
    let fh = if is_directory { guest.opendir(nodeid)? } else { guest.open(nodeid, libc::O_RDONLY)?.fh };
    let flags = if is_directory { 1 << 4 } else { 0 };
    let ask = IoctlIn { fh, flags, cmd, arg: 0x7ffc_0000, in_size: input.len() as u32, out_size };
    let outcome = guest.call(opcode::IOCTL, nodeid, &[ask.as_slice(), input]);
    if is_directory {
        guest.releasedir(nodeid, fh)?
    } else {
        guest.release(nodeid, fh)?
    };
    outcome.map(|reply| {
        let (out, data) = reply.split_at(size_of::<IoctlOut>());
        assert_eq!((out, data.len()), (IoctlOut::default().as_slice(), out_size as usize));
        data.to_vec()
    })
}

fn flags(guest: &mut FakeGuest, nodeid: u64) -> Outcome<u32> {
    ioctl(guest, nodeid, GET, &[], 4).map(|data| u32::from_le_bytes(data.try_into().unwrap()))
}

fn set_flags(guest: &mut FakeGuest, nodeid: u64, flags: u32) -> Outcome<Vec<u8>> {
    // The client's kernel asks for the attributes first, whatever is set.
    attributes(guest, nodeid)?;
    ioctl(guest, nodeid, SET, &flags.to_le_bytes(), 0)
}

fn attributes(guest: &mut FakeGuest, nodeid: u64) -> Outcome<FsXattr> {
    ioctl(guest, nodeid, FSGET, &[], 28).map(|data| *FsXattr::from_slice(&data).unwrap())
}

fn set_attributes(guest: &mut FakeGuest, nodeid: u64, wanted: FsXattr) -> Outcome<Vec<u8>> {
    attributes(guest, nodeid)?;
    ioctl(guest, nodeid, FSSET, wanted.as_slice(), 0)
}

fn host_hint(guest: &FakeGuest, name: &str) -> bool {
    hint::read(&guest.path(name)).unwrap()
}

#[test]
fn the_hint_is_set_and_cleared_and_nothing_else() {
    for share in directories_with_hints() {
        let mut guest = FakeGuest::on(share, |_| ());
        guest.init(PER_FILE).unwrap();
        let directory = guest.mkdir(ROOT, "directory").unwrap().nodeid;
        let file = guest.mknod(ROOT, "file", libc::S_IFREG | 0o644).unwrap().nodeid;
        for (nodeid, name) in [(directory, "directory"), (file, "file")] {
            let (before, attributes_before) =
                (flags(&mut guest, nodeid).unwrap(), attributes(&mut guest, nodeid).unwrap());
            assert_eq!((before & FLAG, attributes_before.xflags & XFLAG), (0, 0));

            set_flags(&mut guest, nodeid, before | FLAG).unwrap();
            assert!(host_hint(&guest, name));
            assert_eq!(flags(&mut guest, nodeid), Ok(before | FLAG));
            let with_hint = FsXattr { xflags: attributes_before.xflags | XFLAG, ..attributes_before };
            assert_eq!(attributes(&mut guest, nodeid), Ok(with_hint));

            set_attributes(&mut guest, nodeid, attributes_before).unwrap();
            assert!(!host_hint(&guest, name));
            set_attributes(&mut guest, nodeid, FsXattr { nextents: 77, ..with_hint }).unwrap();
            assert!(host_hint(&guest, name));

            // FS_IMMUTABLE_FL, FS_APPEND_FL, FS_NOATIME_FL, and the hint together with another one.
            for other in [0x10, 0x20, 0x80, 0x80 | FLAG, 1 << 31] {
                let outcome = set_flags(&mut guest, nodeid, (before | FLAG) ^ other);
                assert_eq!(outcome, Err(libc::EOPNOTSUPP), "{other:#x}");
            }
            for wanted in [
                FsXattr { projid: 5, ..with_hint },
                FsXattr { extsize: 1 << 20, ..with_hint },
                FsXattr { cowextsize: 1 << 20, ..with_hint },
                FsXattr { xflags: with_hint.xflags ^ 0x40, ..with_hint },
                FsXattr { xflags: with_hint.xflags ^ (0x40 | XFLAG), ..with_hint },
            ] {
                assert_eq!(set_attributes(&mut guest, nodeid, wanted), Err(libc::EOPNOTSUPP), "{wanted:?}");
            }
            assert_eq!(flags(&mut guest, nodeid), Ok(before | FLAG));
            set_flags(&mut guest, nodeid, before).unwrap();
            assert_eq!(
                (host_hint(&guest, name), attributes(&mut guest, nodeid)),
                (false, Ok(attributes_before))
            );
        }
    }
}

#[test]
fn a_hint_outlives_the_session_and_the_device() {
    for share in directories_with_hints() {
        let mut guest = FakeGuest::on(share, |_| ());
        guest.init(PER_FILE).unwrap();
        let file = guest.mknod(ROOT, "file", libc::S_IFREG | 0o644).unwrap().nodeid;
        let before = flags(&mut guest, file).unwrap();
        set_flags(&mut guest, file, before | FLAG).unwrap();
        let FakeGuest { directory, device, .. } = guest;
        drop(device);
        let mut guest = FakeGuest::on(directory, |_| ());
        guest.init(PER_FILE).unwrap();
        let file = guest.lookup(ROOT, "file").unwrap().nodeid;
        assert_eq!(flags(&mut guest, file), Ok(before | FLAG));
    }
}

#[test]
fn a_read_only_share_shows_hints_and_keeps_them() {
    for share in directories_with_hints() {
        let file = File::create(share.path().join("file")).unwrap();
        HintStore::default().write(file.as_fd(), true).unwrap();
        let mut guest = FakeGuest::on(share, |config| config.read_only = true);
        guest.init(PER_FILE).unwrap();
        let file = guest.lookup(ROOT, "file").unwrap().nodeid;
        let now = flags(&mut guest, file).unwrap();
        let attributes_now = attributes(&mut guest, file).unwrap();
        assert_eq!((now & FLAG, attributes_now.xflags & XFLAG), (FLAG, XFLAG));
        assert_eq!(set_flags(&mut guest, file, now & !FLAG), Err(libc::EROFS));
        assert_eq!(set_attributes(&mut guest, file, FsXattr::default()), Err(libc::EROFS));
        assert!(host_hint(&guest, "file"));
    }
}

#[test]
fn other_commands_and_sizes_are_refused() {
    let mut guest = FakeGuest::mounted(Policy::Always);
    let file = guest.mknod(ROOT, "file", libc::S_IFREG | 0o644).unwrap().nodeid;
    for nodeid in [file, ROOT] {
        // TCGETS, FIGETBSZ, FS_IOC_GETVERSION, EXT4_IOC_MIGRATE.
        for cmd in [0, 0x5401, 2, 0x8008_7601, 0x6609, u32::MAX] {
            assert_eq!(ioctl(&mut guest, nodeid, cmd, &[], 8), Err(libc::ENOTTY), "{cmd:#x}");
        }
        for (cmd, input, output) in [
            (GET, 0, 8),
            (GET, 4, 4),
            (GET, 0, 0),
            (FSGET, 0, 27),
            (FSGET, 28, 28),
            (SET, 8, 0),
            (SET, 0, 0),
            (SET, 4, 4),
            (FSSET, 29, 0),
            (FSSET, 0, 0),
            (FSSET, 28, 28),
        ] {
            let outcome = ioctl(&mut guest, nodeid, cmd, &vec![0; input], output);
            assert_eq!(outcome, Err(libc::EINVAL), "{cmd:#x} {input} {output}");
        }
    }
    // Handles are those of the node, and of its kind.
    let fh = guest.open(file, libc::O_RDONLY).unwrap().fh;
    let directory = guest.opendir(ROOT).unwrap();
    for (nodeid, fh, flags) in
        [(file, fh + 100, 0), (ROOT, fh, 0), (ROOT, directory + 100, 1 << 4), (file, directory, 1 << 4)]
    {
        let ask = IoctlIn { fh, flags, cmd: GET, out_size: 4, ..Default::default() };
        assert_eq!(guest.call(opcode::IOCTL, nodeid, &[ask.as_slice()]), Err(libc::EBADF));
    }
}

#[test]
fn the_attribute_is_out_of_the_guests_reach() {
    let mut guest = FakeGuest::mounted(Policy::Always);
    let file = guest.mknod(ROOT, "file", libc::S_IFREG | 0o644).unwrap().nodeid;
    let name = hint::ATTRIBUTE.to_str().unwrap();
    let host = File::open(guest.path("file")).unwrap();
    rustix::fs::fsetxattr(&host, hint::ATTRIBUTE, b"1", rustix::fs::XattrFlags::empty()).unwrap();
    assert_eq!(guest.setxattr(file, name, b"0"), Err(libc::EPERM));
    assert_eq!(guest.getxattr(file, name, 100), Err(libc::ENODATA));
    assert_eq!(guest.call(opcode::REMOVEXATTR, file, &[&nul(name)]), Err(libc::EPERM));
    let list = GetxattrIn { size: 1000, padding: 0 };
    let names = guest.call(opcode::LISTXATTR, file, &[list.as_slice()]).unwrap();
    assert!(!String::from_utf8(names).unwrap().contains("daxvm"));
    assert_eq!(rustix::fs::fgetxattr(&host, hint::ATTRIBUTE, &mut [0; 8]), Ok(1));
}

#[test]
fn a_file_system_without_hints_says_so() {
    let directory = TempDir::new_in("/dev/shm").unwrap();
    // Neither flags nor attributes: a file of /proc, which no share has but by a symbolic link to its directory.
    let proc = directory.path().join("proc");
    std::os::unix::fs::symlink(format!("/proc/{}", std::process::id()), &proc).unwrap();
    let mut guest = FakeGuest::on(directory, |config| {
        config.path = proc;
        config.policy = Policy::Inode;
    });
    guest.init(PER_FILE).unwrap();
    let entry = guest.lookup(ROOT, "comm").unwrap();
    assert_eq!((entry.attr.flags, flags(&mut guest, entry.nodeid)), (0, Ok(0)));
    assert_eq!(attributes(&mut guest, entry.nodeid), Ok(FsXattr::default()));
    assert_eq!(set_flags(&mut guest, entry.nodeid, FLAG), Err(libc::EOPNOTSUPP));
    let wanted = FsXattr { xflags: XFLAG, ..Default::default() };
    assert_eq!(set_attributes(&mut guest, entry.nodeid, wanted), Err(libc::EOPNOTSUPP));
}
