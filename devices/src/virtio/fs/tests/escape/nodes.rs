//! Nodes that were never given out, and handles of other nodes.

use std::os::unix::fs::MetadataExt;

use super::{Yard, copy_to, link_to, parts, with_handle, without_handle};
use crate::virtio::fs::abi::opcode;
use crate::virtio::fs::testing::{ROOT, nul};

const DAX_BIT: u64 = 1 << 56;
const UNNAMED: u64 = 1 << 57;

/// Node ids that the guest has made up: anything, and what would be right for files outside.
fn forged(yard: &mut Yard) -> Vec<u64> {
    let outer = yard.guest.directory.path().to_owned();
    let ino = |name: &str| outer.join(name).metadata().unwrap().ino();
    // The number of the mount is in the upper bits; the file in the share has the right one.
    let mount = (yard.file & !DAX_BIT) >> 47 << 47;
    let forgotten = yard.guest.lookup(yard.directory, "inner").unwrap().nodeid;
    yard.guest.forget(forgotten, 1);
    let made_up = [
        0,
        2,
        77,
        mount,
        mount | 0x7fff_ffff_ffff,
        mount | ino("secret"),
        mount | ino("other"),
        mount | ino("."),
        1 << 55,
        UNNAMED,
        UNNAMED + 1,
        UNNAMED + 2,
        1 << 62,
        1 << 63,
        i64::MAX as u64 & !DAX_BIT,
        u64::MAX,
    ];
    let mut forged: Vec<u64> = made_up.iter().flat_map(|node| [*node & !DAX_BIT, *node | DAX_BIT]).collect();
    forged.extend([forgotten, forgotten ^ DAX_BIT]);
    forged
}

#[test]
fn what_was_not_given_out_is_not_there() {
    let mut yard = Yard::new();
    let (file, directory) = (yard.file, yard.directory);
    let fh = yard.guest.open(file, libc::O_RDWR).unwrap().fh;
    let dir_fh = yard.guest.opendir(directory).unwrap();
    for node in forged(&mut yard) {
        for (what, code, ask) in without_handle() {
            yard.attempt(what, libc::EBADF, code, node, &parts(&ask));
        }
        for (what, code, ask) in with_handle(fh).into_iter().chain(with_handle(dir_fh)) {
            yard.attempt(what, libc::EBADF, code, node, &parts(&ask));
        }
        yard.attempt("LINK", libc::EBADF, opcode::LINK, ROOT, &[&link_to(node), &nul("new")]);
        let newdir = node.to_le_bytes();
        yard.attempt("RENAME into", libc::EBADF, opcode::RENAME, ROOT, &[&newdir, &nul("file"), &nul("new")]);
        let copy = copy_to(fh, node, fh);
        yard.attempt("COPY_FILE_RANGE to", libc::EBADF, opcode::COPY_FILE_RANGE, file, &[&copy]);
        let copy = copy_to(fh, file, fh);
        yard.attempt("COPY_FILE_RANGE from", libc::EBADF, opcode::COPY_FILE_RANGE, node, &[&copy]);
        // What was never given out cannot be given back, either.
        yard.guest.forget(node, u64::MAX);
        yard.check("FORGET");
    }
    assert_eq!(yard.guest.read(file, fh, 0, 5).unwrap(), b"hello");
    assert!(!yard.share("new").exists());
}

#[test]
fn a_handle_is_good_for_its_own_node_only() {
    let mut yard = Yard::new();
    let (file, directory) = (yard.file, yard.directory);
    let inner = yard.guest.lookup(directory, "inner").unwrap().nodeid;
    // Handles of files and of directories are counted separately, so some are left out to tell them apart.
    let first = yard.guest.open(inner, libc::O_RDWR).unwrap().fh;
    let released = yard.guest.open(file, libc::O_RDWR).unwrap().fh;
    let fh = yard.guest.open(file, libc::O_RDWR).unwrap().fh;
    yard.guest.release(file, released).unwrap();
    let closed_dir = (0..10).map(|_| yard.guest.opendir(ROOT).unwrap()).last().unwrap();
    yard.guest.releasedir(ROOT, closed_dir).unwrap();
    let dir_fh = yard.guest.opendir(directory).unwrap();
    for forged in [first, released, dir_fh, closed_dir, 0, fh ^ 1 << 63, u64::MAX, UNNAMED + 2] {
        for (what, code, ask) in with_handle(forged) {
            yard.attempt(&format!("{what} {forged:#x}"), libc::EBADF, code, file, &parts(&ask));
        }
        for (from, to) in [(forged, fh), (fh, forged)] {
            let copy = copy_to(from, file, to);
            yard.attempt("COPY_FILE_RANGE", libc::EBADF, opcode::COPY_FILE_RANGE, file, &[&copy]);
        }
    }
    for (what, code, ask) in with_handle(fh) {
        yard.attempt(&format!("{what} on the directory"), libc::EBADF, code, directory, &parts(&ask));
    }
    assert_eq!(yard.guest.read(file, fh, 0, 5).unwrap(), b"hello");
    assert_eq!(yard.guest.read(inner, first, 0, 5).unwrap(), b"inner");
}

#[test]
fn kinds_of_nodes_are_not_mixed_up() {
    let mut yard = Yard::new();
    let (file, directory) = (yard.file, yard.directory);
    let fh = yard.guest.open(file, libc::O_RDWR).unwrap().fh;
    // A directory can be opened like a file, but then it can only be read like one.
    let as_file = yard.guest.open(directory, libc::O_RDONLY).unwrap().fh;
    for (what, code, ask) in with_handle(as_file) {
        let errno = match code {
            opcode::READ => libc::EISDIR,
            opcode::WRITE | opcode::FALLOCATE => libc::EBADF,
            opcode::READDIR | opcode::READDIRPLUS | opcode::RELEASEDIR | opcode::FSYNCDIR => libc::EBADF,
            opcode::SETATTR if what.contains("size") => libc::EINVAL,
            opcode::IOCTL if what.contains("directory") => libc::EBADF,
            opcode::LSEEK => continue, // Some file systems seek in directories.
            opcode::IOCTL => continue, // As the file system likes.
            opcode::SETATTR => continue,
            _ => 0,
        };
        yard.attempt(what, errno, code, directory, &parts(&ask));
    }
    let open = |flags: i32| [flags.to_le_bytes(), [0; 4]].concat();
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDWR | libc::O_TRUNC, libc::O_RDWR | libc::O_CREAT] {
        yard.attempt("OPEN to write", libc::EISDIR, opcode::OPEN, directory, &[&open(flags)]);
    }
    yard.attempt("OPENDIR of a file", libc::ENOTDIR, opcode::OPENDIR, file, &[&open(0)]);
    yard.attempt("LOOKUP in a file", libc::ENOTDIR, opcode::LOOKUP, file, &[&nul("secret")]);
    yard.attempt("UNLINK of a directory", libc::EISDIR, opcode::UNLINK, ROOT, &[&nul("directory")]);
    yard.attempt("RMDIR of a file", libc::ENOTDIR, opcode::RMDIR, ROOT, &[&nul("file")]);
    yard.attempt("LINK of a directory", libc::EPERM, opcode::LINK, ROOT, &[&link_to(directory), &nul("new")]);
    let as_file = yard.guest.open(directory, libc::O_RDONLY).unwrap().fh;
    // What cannot be opened for writing is left to the client, which cannot write to it either.
    let copy = copy_to(fh, directory, as_file);
    yard.attempt("COPY_FILE_RANGE to", libc::EOPNOTSUPP, opcode::COPY_FILE_RANGE, file, &[&copy]);
    let copy = copy_to(as_file, file, fh);
    yard.attempt("COPY_FILE_RANGE", libc::EISDIR, opcode::COPY_FILE_RANGE, directory, &[&copy]);
    // The root can be had with the DAX bit, which stands for nothing there; its parent cannot.
    yard.attempt("GETATTR", 0, opcode::GETATTR, ROOT | DAX_BIT, &[&[0; 16]]);
    yard.attempt("LOOKUP", libc::EINVAL, opcode::LOOKUP, ROOT | DAX_BIT, &[&nul("..")]);
}

#[test]
fn another_share_is_another_world() {
    let mut yard = Yard::new();
    let mut other = Yard::new();
    // More is known there than here, so that its numbers mean nothing here.
    let extra = other.guest.lookup(other.directory, "inner").unwrap().nodeid;
    let fh = (0..5).map(|_| other.guest.open(extra, libc::O_RDWR).unwrap().fh).last().unwrap();
    let (file, own) = (yard.file, yard.guest.open(yard.file, libc::O_RDWR).unwrap().fh);
    let copy = copy_to(own, extra, fh);
    yard.attempt("COPY_FILE_RANGE", libc::EBADF, opcode::COPY_FILE_RANGE, file, &[&copy]);
    yard.attempt("LINK", libc::EBADF, opcode::LINK, ROOT, &[&link_to(extra), &nul("new")]);
    other.check("the other one");
}
