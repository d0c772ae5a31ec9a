//! Symbolic links, devices, fifos and sockets: given out, and never followed or opened.

use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::os::unix::net::UnixListener;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, OpenIn, ReadIn, Rename2In, SetattrIn};
use rustix::fs::{CWD, FileType, Mode};
use vm_memory::ByteValued;

use super::{Yard, bytes, copy_to, is_root, link_to, parts, with_handle, without_handle};
use crate::virtio::fs::abi::opcode;
use crate::virtio::fs::testing::{ROOT, descriptors_into, nul};

#[test]
fn a_link_to_the_secret_is_a_link_and_nothing_else() {
    for target in ["secret", "other", "/", "..", "../secret", "../other", "/etc/passwd", "/proc/self/mem"] {
        let mut yard = Yard::new();
        let target = if ["secret", "other"].contains(&target) {
            yard.guest.path(target).to_str().unwrap().to_owned()
        } else {
            target.to_owned()
        };
        symlink(&target, yard.share("link")).unwrap();
        let link = yard.guest.lookup(ROOT, "link").unwrap();
        assert_eq!(link.attr.mode & libc::S_IFMT, libc::S_IFLNK);
        let node = link.nodeid;
        assert_eq!(yard.guest.call(opcode::READLINK, node, &[]).unwrap(), target.as_bytes());
        for (what, code, ask) in without_handle() {
            let outcome = yard.guest.call(code, node, &parts(&ask));
            let refused = match code {
                // These are the link's own.
                opcode::GETATTR | opcode::ACCESS | opcode::READLINK | opcode::STATFS | opcode::LISTXATTR => {
                    None
                }
                opcode::SETATTR if !what.contains("size") && !what.contains("mode") => None,
                opcode::SETATTR if what.contains("mode") => Some(libc::EOPNOTSUPP),
                opcode::GETXATTR | opcode::SETXATTR | opcode::REMOVEXATTR => {
                    assert!(outcome.is_err(), "{what}");
                    None
                }
                opcode::SETUPMAPPING => Some(libc::EPERM),
                opcode::SETATTR | opcode::OPEN | opcode::OPENDIR | opcode::SYNCFS | opcode::TMPFILE => {
                    Some(libc::EBADF)
                }
                _ => Some(libc::ENOTDIR),
            };
            if let Some(errno) = refused {
                assert_eq!(outcome.clone().map(drop), Err(errno), "{what} {target}");
            }
            yard.check(what);
        }
        for flags in [
            libc::O_PATH,
            libc::O_PATH | libc::O_NOFOLLOW,
            libc::O_CREAT,
            libc::O_TMPFILE | libc::O_RDWR,
            libc::O_DIRECTORY,
            libc::O_NONBLOCK,
        ] {
            let ask = bytes(&OpenIn { flags: flags as u32, fuse_flags: 0 });
            yard.attempt("OPEN with flags", libc::EBADF, opcode::OPEN, node, &[&ask]);
            let ask = bytes(&CreateIn { flags: flags as u32, mode: 0o644, ..Default::default() });
            yard.attempt("CREATE on it", libc::EBADF, opcode::CREATE, ROOT, &[&ask, &nul("link")]);
            let ask =
                bytes(&CreateIn { flags: (flags | libc::O_EXCL) as u32, mode: 0o644, ..Default::default() });
            yard.attempt("CREATE, exclusive", libc::EEXIST, opcode::CREATE, ROOT, &[&ask, &nul("link")]);
        }
        // A name for the link, not for what it means.
        yard.attempt("LINK", 0, opcode::LINK, ROOT, &[&link_to(node), &nul("second")]);
        assert!(yard.share("second").symlink_metadata().unwrap().is_symlink());
        yard.attempt(
            "RENAME2",
            0,
            opcode::RENAME2,
            ROOT,
            &[
                &bytes(&Rename2In { newdir: yard.directory, ..Default::default() }),
                &nul("link"),
                &nul("moved"),
            ],
        );
        yard.attempt("UNLINK", 0, opcode::UNLINK, yard.directory, &[&nul("moved")]);
    }
}

/// CVE-2020-10717 in another way: what could not be opened was known to the library from then on, and to nobody else.
#[test]
fn what_cannot_be_opened_is_not_kept() {
    let mut yard = Yard::new();
    let create = bytes(&CreateIn { flags: libc::O_RDWR as u32, mode: 0o644, ..Default::default() });
    for number in 0..50 {
        symlink("nowhere", yard.share(&format!("link{number}"))).unwrap();
    }
    let before = descriptors_into(&yard.guest.directory);
    for number in 0..50 {
        let name = nul(&format!("link{number}"));
        yard.attempt("CREATE on a link", libc::EBADF, opcode::CREATE, ROOT, &[&create, &name]);
    }
    assert_eq!(descriptors_into(&yard.guest.directory), before);
}

#[test]
fn a_link_to_nothing_makes_nothing_where_it_points() {
    let mut yard = Yard::new();
    let wanted = yard.guest.path("made-by-the-guest");
    symlink(&wanted, yard.share("dangling")).unwrap();
    let create = bytes(&CreateIn { flags: libc::O_RDWR as u32, mode: 0o644, ..Default::default() });
    let name = nul("dangling");
    yard.attempt("CREATE", libc::EBADF, opcode::CREATE, ROOT, &[&create, &name]);
    let mknod = [(libc::S_IFREG | 0o644).to_le_bytes(), [0; 4], [0; 4], [0; 4]].concat();
    yard.attempt("MKNOD", libc::EEXIST, opcode::MKNOD, ROOT, &[&mknod, &name]);
    yard.attempt("MKDIR", libc::EEXIST, opcode::MKDIR, ROOT, &[&[0xed, 1, 0, 0, 0, 0, 0, 0], &name]);
    yard.attempt("SYMLINK", libc::EEXIST, opcode::SYMLINK, ROOT, &[&name, &nul("target")]);
    yard.attempt("LINK", libc::EEXIST, opcode::LINK, ROOT, &[&link_to(yard.file), &name]);
    assert!(!wanted.exists());
    // The guest makes links itself, to anywhere; it follows them in its own world.
    let outside = nul(wanted.to_str().unwrap());
    yard.attempt("SYMLINK", 0, opcode::SYMLINK, ROOT, &[&nul("own"), &outside]);
    let node = yard.guest.lookup(ROOT, "own").unwrap().nodeid;
    yard.attempt("LOOKUP through it", libc::ENOTDIR, opcode::LOOKUP, node, &[&nul("secret")]);
    yard.attempt("CREATE through it", libc::ENOTDIR, opcode::CREATE, node, &[&create, &nul("x")]);
}

/// To open one of these would block, or reach a driver or another process; that this test ends is a part of it.
#[test]
fn what_is_neither_file_nor_directory_is_never_opened() {
    let mut yard = Yard::new();
    let special = |kind, name| {
        let made = rustix::fs::mknodat(CWD, yard.share(name), kind, Mode::from(0o666), 0x103);
        made.map_or_else(|error| skipped!("cannot make {name}: {error}"), drop);
    };
    special(FileType::Fifo, "fifo");
    special(FileType::CharacterDevice, "character");
    special(FileType::BlockDevice, "block");
    let listener = UnixListener::bind(yard.share("socket")).unwrap();
    listener.set_nonblocking(true).unwrap();
    if is_root() {
        // As the guest's root makes them.
        for (name, kind) in [("own-character", libc::S_IFCHR), ("own-block", libc::S_IFBLK)] {
            let ask = [(kind | 0o666).to_le_bytes(), 0x103u32.to_le_bytes(), [0; 4], [0; 4]].concat();
            yard.attempt("MKNOD", 0, opcode::MKNOD, ROOT, &[&ask, &nul(name)]);
        }
    }
    yard.guest.mknod(ROOT, "own-fifo", libc::S_IFIFO | 0o666).unwrap();
    yard.guest.mknod(ROOT, "own-socket", libc::S_IFSOCK | 0o666).unwrap();
    let fh = yard.guest.open(yard.file, libc::O_RDWR).unwrap().fh;
    let file = yard.file;
    let mut tried = 0;
    for entry in std::fs::read_dir(yard.share("")).unwrap() {
        let kind = entry.as_ref().unwrap().file_type().unwrap();
        if kind.is_file() || kind.is_dir() {
            continue;
        }
        assert!(kind.is_fifo() || kind.is_socket() || kind.is_char_device() || kind.is_block_device());
        let name = entry.unwrap().file_name().into_string().unwrap();
        let node = yard.guest.lookup(ROOT, &name).unwrap().nodeid;
        tried += 1;
        for flags in 0..32 {
            let access = [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR][flags % 3];
            let flags = 1u32.wrapping_shl(flags as u32) & !3 | access as u32;
            let ask = bytes(&OpenIn { flags, fuse_flags: 0 });
            yard.attempt(&format!("OPEN {name}"), libc::EBADF, opcode::OPEN, node, &[&ask]);
            if flags as i32 & libc::O_EXCL == 0 {
                let ask = bytes(&CreateIn { flags, mode: 0o644, ..Default::default() });
                yard.attempt(
                    &format!("CREATE {name}"),
                    libc::EBADF,
                    opcode::CREATE,
                    ROOT,
                    &[&ask, &nul(&name)],
                );
            }
        }
        let size = bytes(&SetattrIn { valid: 8, size: 1, ..Default::default() });
        yard.attempt("SETATTR of the size", libc::EBADF, opcode::SETATTR, node, &[&size]);
        yard.attempt("OPENDIR", libc::EBADF, opcode::OPENDIR, node, &[&[0; 8]]);
        yard.attempt("SYNCFS", libc::EBADF, opcode::SYNCFS, node, &[&[0; 8]]);
        for (what, code, ask) in without_handle() {
            if code == opcode::SETUPMAPPING {
                yard.attempt(what, libc::EPERM, code, node, &parts(&ask));
            }
        }
        for (what, code, ask) in with_handle(fh) {
            yard.attempt(what, libc::EBADF, code, node, &parts(&ask));
        }
        let copy = copy_to(fh, node, fh);
        yard.attempt("COPY_FILE_RANGE", libc::EBADF, opcode::COPY_FILE_RANGE, file, &[&copy]);
        yard.guest.forget(node, 1);
    }
    assert!(tried >= 4);
    assert!(listener.accept().is_err(), "nobody has connected to the socket");
}

/// READ and WRITE carry the flags of the guest's descriptor, which the library sets on the host's.
#[test]
fn flags_of_reads_and_writes_change_nothing_on_the_host() {
    let mut yard = Yard::new();
    let file = yard.file;
    let fh = yard.guest.open(file, libc::O_RDWR).unwrap().fh;
    for bit in (0..32).filter(|bit| 1 << bit != libc::O_NOATIME) {
        let ask = ReadIn { fh, size: 5, flags: libc::O_RDWR as u32 | 1 << bit, ..Default::default() };
        assert_eq!(yard.guest.call(opcode::READ, file, &[ask.as_slice()]).unwrap(), b"hello");
        assert_eq!(status_flags(&yard) & (libc::O_ASYNC | libc::O_DIRECT | libc::O_NONBLOCK), 0, "{bit}");
    }
    // Nor does a descriptor that may only read become one that writes.
    let reader = yard.guest.open(file, libc::O_RDONLY).unwrap().fh;
    assert_eq!(yard.guest.write(file, reader, 0, b"evil"), Err(libc::EBADF));
    let metadata = yard.share("file").metadata().unwrap();
    assert_eq!(metadata.size(), 5);
    yard.check("flags");
}

/// The flags of all descriptors of the file that are more than a path.
fn status_flags(yard: &Yard) -> i32 {
    let path = yard.share("file");
    let mut flags = 0;
    for link in std::fs::read_dir("/proc/self/fd").unwrap() {
        let link = link.unwrap();
        if std::fs::read_link(link.path()).is_ok_and(|target| target == path) {
            let info = format!("/proc/self/fdinfo/{}", link.file_name().to_str().unwrap());
            let info = std::fs::read_to_string(info).unwrap();
            let text = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
            flags |= i32::from_str_radix(text.trim(), 8).unwrap();
        }
    }
    assert_ne!(flags & libc::O_ACCMODE, 0, "the file is open");
    flags
}

#[test]
fn unknown_operations_and_ioctls_do_nothing() {
    let mut yard = Yard::new();
    let file = yard.file;
    let fh = yard.guest.open(file, libc::O_RDWR).unwrap().fh;
    for cmd in
        [0, 1, 0x5401, 0x8008_6601 ^ 1, 0x4008_6602 ^ 4, 0x4020_9409, 0x9409, 0xc020_660b, 0x1268, u32::MAX]
    {
        for (input, output) in [(0u32, 0u32), (4, 4), (28, 28), (u32::MAX, u32::MAX)] {
            let ask = [
                &fh.to_le_bytes()[..],
                &[0; 4],
                &cmd.to_le_bytes(),
                &[0; 8],
                &input.to_le_bytes(),
                &output.to_le_bytes(),
            ]
            .concat();
            yard.attempt(&format!("IOCTL {cmd:#x}"), libc::ENOTTY, opcode::IOCTL, file, &[&ask, &[0; 28]]);
        }
    }
    for code in [0, 7, 19, 31, 32, 33, 37, 40, 52, 53, 100, 4096, u32::MAX] {
        yard.attempt("an operation", libc::ENOSYS, code, file, &[&[0; 64]]);
    }
}
