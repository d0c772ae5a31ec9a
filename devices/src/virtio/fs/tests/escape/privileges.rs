//! What makes a program run as somebody else goes when the file is written to, and cannot be had by a trick.

use std::ffi::CStr;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use fuse_backend_rs::abi::fuse_abi::{
    CreateIn, EntryOut, FOPEN_IN_KILL_SUIDGID, InHeader, MkdirIn, MknodIn, OpenIn, SetattrIn,
    WRITE_KILL_PRIV, WriteIn,
};
use tempfile::TempDir;
use vm_memory::ByteValued;

use super::{Yard, bytes, copy_to, is_root};
use crate::virtio::fs::abi::{EXT_GROUPS, init, opcode};
use crate::virtio::fs::policy::Policy;
use crate::virtio::fs::testing::{FakeGuest, PER_FILE, READ, ROOT, WRITE, directories_with_hints, nul};
use crate::virtio::fs::{FileSystemConfig, FileSystemDevice};
use crate::virtio::testing::{BUFFERS, FakeDriver, readable, writable};

const CAPABILITIES: &CStr = c"security.capability";

/// cap_net_raw, permitted and effective (vfs_cap_data, revision 2).
const NET_RAW: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// SETATTR: the size, by handle, with the owner of a lock, and the client's word that the bits are to go.
const SIZE: u32 = 1 << 3;
const FH: u32 = 1 << 6;
const LOCK_OWNER: u32 = 1 << 9;
const KILL_SUIDGID: u32 = 1 << 11;

fn has_capabilities(path: &Path) -> bool {
    rustix::fs::getxattr(path, CAPABILITIES, &mut [0; 64]).is_ok()
}

#[test]
fn every_way_to_write_takes_set_id_bits_and_capabilities() {
    if !is_root() {
        return;
    }
    for outer in directories_with_hints().chain([TempDir::new().unwrap()]) {
        // DAX or not, the policy lets set-id files be mapped only when it has them all.
        let share = outer.path().join("share");
        std::fs::create_dir(&share).unwrap();
        std::fs::write(share.join("source"), "hello").unwrap();
        let mut guest = FakeGuest::on(outer, |config| {
            config.path = share.clone();
            config.policy = rules_that_map_everything();
        });
        guest.init(PER_FILE | init::HANDLE_KILLPRIV_V2).unwrap();
        let source = guest.lookup(ROOT, "source").unwrap().nodeid;
        let from = guest.open(source, libc::O_RDONLY).unwrap().fh;

        type Way = (&'static str, fn(&mut FakeGuest, u64, u64, (u64, u64)));
        let ways: [Way; 11] = [
            ("WRITE", |guest, node, fh, _| {
                let (flags, fuse_flags) = (libc::O_RDWR as u32, WRITE_KILL_PRIV);
                let ask = WriteIn { fh, size: 1, flags, fuse_flags, ..Default::default() };
                guest.call(opcode::WRITE, node, &[ask.as_slice(), b"x"]).unwrap();
            }),
            ("OPEN to truncate", |guest, node, _, _| {
                let flags = (libc::O_RDWR | libc::O_TRUNC) as u32;
                let ask = OpenIn { flags, fuse_flags: FOPEN_IN_KILL_SUIDGID };
                guest.call(opcode::OPEN, node, &[ask.as_slice()]).unwrap();
            }),
            ("CREATE to truncate", |guest, _, _, _| {
                let flags = (libc::O_RDWR | libc::O_TRUNC) as u32;
                let fuse_flags = FOPEN_IN_KILL_SUIDGID;
                let ask = CreateIn { flags, mode: 0o644, umask: 0, fuse_flags };
                guest.call(opcode::CREATE, ROOT, &[ask.as_slice(), &nul("program")]).unwrap();
            }),
            ("SETATTR of the size", |guest, node, _, _| {
                let ask = SetattrIn { valid: SIZE | KILL_SUIDGID, size: 1, ..Default::default() };
                guest.setattr(node, ask).unwrap();
            }),
            ("SETATTR of the size by handle", |guest, node, fh, _| {
                let valid = SIZE | KILL_SUIDGID | FH;
                guest.setattr(node, SetattrIn { valid, fh, size: 1, ..Default::default() }).unwrap();
            }),
            ("SETATTR of the owner", |guest, node, _, _| {
                guest.setattr(node, SetattrIn { valid: 1 << 1, uid: 1000, ..Default::default() }).unwrap();
            }),
            ("SETATTR of nothing", |guest, node, _, _| {
                // Before a write(2) to a DAX file, which goes by a mapping.
                let attr = guest.setattr(node, SetattrIn::default()).unwrap();
                assert_eq!(attr.mode & 0o6000, 0);
            }),
            ("SETATTR of nothing by handle", |guest, node, fh, _| {
                let valid = FH | LOCK_OWNER | KILL_SUIDGID;
                let attr = guest.setattr(node, SetattrIn { valid, fh, ..Default::default() }).unwrap();
                assert_eq!(attr.mode & 0o6000, 0);
            }),
            ("FALLOCATE", |guest, node, fh, _| {
                guest.fallocate(node, fh, 8192).unwrap();
            }),
            ("COPY_FILE_RANGE", |guest, node, fh, (source, from)| {
                guest.call(opcode::COPY_FILE_RANGE, source, &[&copy_to(from, node, fh)]).unwrap();
            }),
            ("SETUPMAPPING", |guest, node, _, _| {
                guest.setupmapping(node, 0, 0, READ | WRITE).unwrap();
                guest.write_window(0, *b"xy");
            }),
        ];
        for (what, way) in ways {
            for (mode, capabilities) in [(0o6755, false), (0o755, true), (0o4711, true), (0o2777, false)] {
                let path = share.join("program");
                let _ = std::fs::remove_file(&path);
                std::fs::write(&path, "program").unwrap();
                std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
                let set = rustix::fs::XattrFlags::empty();
                if capabilities && rustix::fs::setxattr(&path, CAPABILITIES, &NET_RAW, set).is_err() {
                    skipped!("no file capabilities on {}", path.display());
                    continue;
                }
                let node = guest.lookup(ROOT, "program").unwrap().nodeid;
                let fh = guest.open(node, libc::O_RDWR).unwrap().fh;
                way(&mut guest, node, fh, (source, from));
                let left = path.metadata().unwrap().mode() & 0o6000;
                assert_eq!(left, 0, "{what} leaves {left:o} of {mode:o} on {}", path.display());
                assert!(!has_capabilities(&path), "{what} leaves capabilities on {}", path.display());
                guest.release(node, fh).unwrap();
                guest.forget(node, u64::MAX);
            }
        }
    }
}

/// What an empty SETATTR leaves alone.
#[test]
fn what_is_no_program_keeps_its_bits() {
    let mut guest = FakeGuest::mounted(Policy::Always);
    for (name, mode) in [("directory", 0o2775), ("locked", 0o2664), ("program", 0o755)] {
        match name {
            "directory" => std::fs::create_dir(guest.path(name)).unwrap(),
            _ => std::fs::write(guest.path(name), "").unwrap(),
        }
        std::fs::set_permissions(guest.path(name), PermissionsExt::from_mode(mode)).unwrap();
        let node = guest.lookup(ROOT, name).unwrap().nodeid;
        assert_eq!(guest.setattr(node, SetattrIn::default()).unwrap().mode & 0o7777, mode);
    }
    let file = guest.lookup(ROOT, "program").unwrap().nodeid;
    let ask = SetattrIn { valid: FH, fh: 77, ..Default::default() };
    assert_eq!(guest.setattr(file, ask).unwrap_err(), libc::EBADF);
}

/// The built-in policies let no set-id file be mapped.
fn rules_that_map_everything() -> Policy {
    let rules = "version = 1\ndefault = \"allow\"\n[[rule]]\nset_id = true\ndax = \"allow\"\n";
    Policy::from_rules("rules.toml", rules).unwrap()
}

/// A request in a user's name.
fn ask_as(
    guest: &mut FakeGuest,
    uid: u32,
    gid: u32,
    code: u32,
    node: u64,
    parts: &[&[u8]],
) -> (i32, Vec<u8>) {
    let mut message = guest.message(code, node, parts);
    message[24..28].copy_from_slice(&uid.to_le_bytes());
    message[28..32].copy_from_slice(&gid.to_le_bytes());
    let (used, reply) = guest.send_raw(&message, &[40], &[4096]).unwrap();
    assert!(used >= 16);
    (-i32::from_le_bytes(reply[4..8].try_into().unwrap()), reply[16..].to_vec())
}

#[test]
fn nobody_owns_nothing() {
    let mut yard = Yard::new();
    let create = bytes(&CreateIn { flags: libc::O_RDWR as u32, mode: 0o100_644, ..Default::default() });
    let mkdir = bytes(&MkdirIn { mode: 0o755, umask: 0 });
    let mknod = bytes(&MknodIn { mode: libc::S_IFREG | 0o644, ..Default::default() });
    let (new, target) = (nul("new"), nul("target"));
    for (uid, gid) in [(u32::MAX, 0), (0, u32::MAX), (u32::MAX, u32::MAX)] {
        let requests: [(u32, &[&[u8]]); 5] = [
            (opcode::CREATE, &[&create, &new]),
            (opcode::TMPFILE, &[&create, &new]),
            (opcode::MKDIR, &[&mkdir, &new]),
            (opcode::MKNOD, &[&mknod, &new]),
            (opcode::SYMLINK, &[&new, &target]),
        ];
        for (code, parts) in requests {
            let (errno, _) = ask_as(&mut yard.guest, uid, gid, code, ROOT, parts);
            assert_eq!(errno, libc::EINVAL, "opcode {code}");
            yard.check("a request of nobody");
        }
    }
    let reply = yard.guest.call(opcode::TMPFILE, ROOT, &[&create, &new]).unwrap();
    let unnamed = u64::from_le_bytes(reply[..8].try_into().unwrap());
    for node in [yard.file, yard.directory, unnamed] {
        for valid in [2, 4, 6] {
            let ask = bytes(&SetattrIn { valid, uid: u32::MAX, gid: u32::MAX, ..Default::default() });
            yard.attempt("SETATTR of the owner", libc::EINVAL, opcode::SETATTR, node, &[&ask]);
        }
    }
    assert!(!yard.share("new").exists());
}

/// The guest's kernel has checked whether the user may: by groups, capabilities and user namespaces, of which requests say
/// nothing. What is made belongs to the user, and gets no right that the user has not.
#[test]
fn files_are_made_in_the_name_of_users() {
    if !is_root() {
        return;
    }
    let mut yard = Yard::new();
    std::fs::set_permissions(yard.share("directory"), PermissionsExt::from_mode(0o755)).unwrap();
    std::fs::set_permissions(yard.share("file"), PermissionsExt::from_mode(0o600)).unwrap();
    let directory = yard.directory;
    let create = bytes(&CreateIn { flags: libc::O_RDWR as u32, mode: 0o100_644, ..Default::default() });
    let mkdir = bytes(&MkdirIn { mode: 0o755, umask: 0 });
    let mknod = |mode| bytes(&MknodIn { mode, rdev: 0x103, ..Default::default() });
    let requests: [(u32, &[u8]); 5] = [
        (opcode::CREATE, &create),
        (opcode::MKDIR, &mkdir),
        (opcode::MKNOD, &mknod(libc::S_IFREG)),
        (opcode::MKNOD, &mknod(libc::S_IFIFO)),
        (opcode::SYMLINK, &[]),
    ];
    for (number, (code, body)) in requests.into_iter().enumerate() {
        let (name, target) = (number.to_string(), nul("target"));
        let name_and_target = [nul(&name), target].concat();
        let names = if code == opcode::SYMLINK { name_and_target } else { nul(&name) };
        let (errno, _) = ask_as(&mut yard.guest, 1000, 1001, code, directory, &[body, &names]);
        assert_eq!(errno, 0, "opcode {code}");
        let made = yard.share("directory").join(name).symlink_metadata().unwrap();
        assert_eq!((made.uid(), made.gid()), (1000, 1001), "opcode {code}");
    }
    let new = nul("new");
    let (errno, _) =
        ask_as(&mut yard.guest, 1000, 1000, opcode::MKNOD, directory, &[&mknod(libc::S_IFCHR), &new]);
    assert_eq!(errno, libc::EPERM, "a device node takes CAP_MKNOD");
    for flags in [libc::O_RDWR, libc::O_RDWR | libc::O_TRUNC] {
        let create = bytes(&CreateIn { flags: flags as u32, mode: 0o100_644, ..Default::default() });
        let (errno, _) = ask_as(&mut yard.guest, 1000, 1000, opcode::CREATE, ROOT, &[&create, &nul("file")]);
        assert_eq!(errno, libc::EACCES, "CREATE on a file that is there opens it as the user");
        yard.check("a request of a user");
    }
    // The thread has its own rights back.
    assert!(yard.guest.create(directory, "of-root", libc::O_RDWR).is_ok());
    assert_eq!(yard.share("directory/of-root").metadata().unwrap().uid(), 0);
}

/// CVE-2022-0358: in a set-group-id directory a new file gets the directory's group, and would keep the set-group-id bit
/// if the server's own supplementary groups counted. Those of the user count, of which the guest's kernel says one.
#[test]
fn supplementary_groups_are_those_of_the_user() {
    if !is_root() {
        return;
    }
    const GROUP: u32 = 54_321;
    let share = TempDir::new().unwrap();
    let path = share.path().to_owned();
    chown(&path, None, Some(GROUP)).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o2777)).unwrap();
    // Groups belong to a thread and those that it starts, which are the device's here.
    std::thread::spawn(move || {
        // SAFETY: setgroups(2) reads the one group, which lives through the call.
        assert_eq!(unsafe { libc::syscall(libc::SYS_setgroups, 1, &GROUP) }, 0);
        // SAFETY: setresgid(2) takes three numbers.
        assert_eq!(unsafe { libc::syscall(libc::SYS_setresgid, GROUP, GROUP, GROUP) }, 0);
        let config = FileSystemConfig {
            tag: "groups".into(),
            path: share.path().into(),
            read_only: false,
            window_size: 0,
            policy: Policy::Never,
            prefault: Default::default(),
            cache: Default::default(),
            request_queues: 1,
            descriptors: 100,
        };
        let mut device = FileSystemDevice::new(config).unwrap();
        let mut driver = FakeDriver::new(&mut device, 0);
        let mut try_with = |code: u32, uid: u32, name: &str, extensions: &[u32]| {
            let create = CreateIn { flags: libc::O_RDWR as u32, mode: 0o102_777, umask: 0, fuse_flags: 0 };
            let mknod = MknodIn { mode: 0o102_777, ..Default::default() };
            let body = if code == opcode::MKNOD { bytes(&mknod) } else { bytes(&create) };
            let extensions: Vec<u8> = extensions.iter().flat_map(|word| word.to_le_bytes()).collect();
            let len = (size_of::<InHeader>() + body.len() + name.len() + 1 + extensions.len()) as u32;
            let padding = extensions.len() as u32 / 8;
            let header = InHeader {
                len,
                opcode: code,
                nodeid: ROOT,
                uid,
                gid: uid,
                unique: 1,
                padding,
                ..Default::default()
            };
            driver.write(BUFFERS, &[header.as_slice(), &body, &nul(name), &extensions].concat());
            driver.send(1, &[readable(BUFFERS, len), writable(BUFFERS + 4096, 4096)]);
            let (_, used) = driver.wait_used(1);
            let reply = driver.read(BUFFERS + 4096, used as usize);
            match -i32::from_le_bytes(reply[4..8].try_into().unwrap()) {
                0 => Ok(EntryOut::from_slice(&reply[16..16 + size_of::<EntryOut>()]).unwrap().attr),
                errno => Err(errno),
            }
        };
        // struct fuse_ext_header, struct fuse_supp_groups
        let member = [16, EXT_GROUPS, 1, GROUP];
        for extensions in [
            &[16, EXT_GROUPS, 1, u32::MAX][..],
            &[16, EXT_GROUPS, 0, 0],
            &[16, EXT_GROUPS, u32::MAX, GROUP],
            &[24, EXT_GROUPS, 1, GROUP],
            &[24, EXT_GROUPS, 2, GROUP, 1, 0],
            &[16, EXT_GROUPS + 1, 1, GROUP],
            &[0, EXT_GROUPS, 1, GROUP],
            &[u32::MAX, EXT_GROUPS, 1, GROUP],
            &[8, EXT_GROUPS],
            &[member, member].concat(),
        ] {
            let answer = try_with(opcode::CREATE, 1000, "bad", extensions).err();
            assert_eq!(answer, Some(libc::EINVAL), "{extensions:?}");
        }
        for (code, name) in
            [(opcode::CREATE, "by one"), (opcode::MKNOD, "node by one"), (opcode::TMPFILE, "unnamed by one")]
        {
            let attr = try_with(code, 1000, name, &member).unwrap();
            assert_eq!((attr.uid, attr.gid, attr.mode & 0o7777), (1000, GROUP, 0o2777), "{name}");
        }
        let mut ask = |code: u32, uid: u32, name: &str| try_with(code, uid, name, &[]).unwrap();
        for (code, name) in
            [(opcode::CREATE, "created"), (opcode::MKNOD, "node"), (opcode::TMPFILE, "unnamed")]
        {
            let attr = ask(code, 1000, name);
            assert_eq!((attr.uid, attr.gid, attr.mode & 0o7777), (1000, GROUP, 0o777), "{name}");
            // The group's own members may.
            let attr = ask(code, GROUP, &format!("{name} of a member"));
            assert_eq!((attr.gid, attr.mode & 0o7777), (GROUP, 0o2777), "{name}");
        }
        // Nor does the group that the process was started with, and none of a request before.
        std::fs::set_permissions(share.path(), PermissionsExt::from_mode(0o777)).unwrap();
        for uid in [0, 1000, 0] {
            let attr = ask(
                opcode::CREATE,
                uid,
                &format!("of {uid} {}", u8::from(share.path().join("of 0 0").exists())),
            );
            assert_eq!((attr.uid, attr.gid), (uid, uid));
        }
        drop(device);
    })
    .join()
    .unwrap();
    drop(path);
}
