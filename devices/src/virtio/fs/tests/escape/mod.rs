//! Attempts to get out of a share, as a guest makes them that writes its own requests.
//!
//! The share is a directory beside a secret. After each attempt the secret and all else outside is as it was, and the
//! device answers as before.

mod kinds;
mod names;
mod nodes;
mod privileges;
mod pseudo;
mod races;
mod read_only;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use fuse_backend_rs::abi::fuse_abi::{
    CopyFileRangeIn, CreateIn, GetxattrIn, IoctlIn, LinkIn, MkdirIn, MknodIn, OpenIn, Rename2In, RenameIn,
    SetattrIn, SetxattrIn,
};
use fuse_backend_rs::abi::virtio_fs::SetupmappingIn;
use tempfile::TempDir;
use vm_memory::ByteValued;

use crate::virtio::fs::abi::opcode;
use crate::virtio::fs::policy::Policy;
use crate::virtio::fs::testing::{FakeGuest, PER_FILE, READ, ROOT, WRITE, nul};
use crate::virtio::fs::window::CHUNK_SIZE;

/// What the secret file has in it.
const SECRET: &[u8] = b"a secret of the host";

/// A share with a little in it, and what is around it.
struct Yard {
    guest: FakeGuest,
    /// What is outside, as it has to stay.
    outside: BTreeMap<OsString, String>,
    /// The node ids of `file` and `directory` in the share.
    file: u64,
    directory: u64,
}

impl Yard {
    fn new() -> Yard {
        Yard::with(TempDir::new().unwrap(), false)
    }

    fn with(outer: TempDir, read_only: bool) -> Yard {
        let share = outer.path().join("share");
        fs::create_dir_all(share.join("directory/below")).unwrap();
        fs::write(share.join("file"), "hello").unwrap();
        fs::write(share.join("directory/inner"), "inner").unwrap();
        fs::write(outer.path().join("secret"), SECRET).unwrap();
        fs::set_permissions(outer.path().join("secret"), PermissionsExt::from_mode(0o640)).unwrap();
        fs::create_dir(outer.path().join("other")).unwrap();
        fs::write(outer.path().join("other/secret"), SECRET).unwrap();
        let outside = list_outside(outer.path());
        let mut guest = FakeGuest::on(outer, |config| {
            config.path = share;
            config.read_only = read_only;
            config.policy = Policy::Always;
        });
        guest.init(PER_FILE).unwrap();
        let file = guest.lookup(ROOT, "file").unwrap().nodeid;
        let directory = guest.lookup(ROOT, "directory").unwrap().nodeid;
        Yard { guest, outside, file, directory }
    }

    /// A path in the share.
    fn share(&self, name: &str) -> PathBuf {
        self.guest.path("share").join(name)
    }

    /// The path of the secret.
    fn secret(&self) -> String {
        self.guest.path("secret").to_str().unwrap().to_owned()
    }

    /// Sends a request, whose outcome must be this errno (0 for success); all must be well afterwards.
    fn attempt(&mut self, what: &str, expected: i32, code: u32, node: u64, parts: &[&[u8]]) {
        let outcome = self.guest.call(code, node, parts);
        let got = outcome.as_ref().map_or_else(|error| *error, |_| 0);
        assert_eq!(got, expected, "{what} (opcode {code}, node {node:#x})");
        if let Ok(reply) = outcome {
            assert!(!contains_secret(&reply), "{what} reveals the secret");
        }
        self.check(what);
    }

    /// Outside nothing has changed, and inside a file is found.
    fn check(&mut self, what: &str) {
        assert_eq!(list_outside(self.guest.directory.path()), self.outside, "{what}");
        let found = self.guest.lookup(ROOT, "file").unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(found.nodeid, self.file, "{what}");
        self.guest.forget(self.file, 1);
    }
}

fn contains_secret(bytes: &[u8]) -> bool {
    bytes.windows(SECRET.len()).any(|window| window == SECRET)
}

/// All that there is outside of the share, with all that one could change of it.
fn list_outside(outer: &Path) -> BTreeMap<OsString, String> {
    let mut list = BTreeMap::new();
    for directory in [outer.to_owned(), outer.join("other")] {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let stat = path.symlink_metadata().unwrap();
            let kept = match path.ends_with("share") {
                true => "the share".to_owned(),
                false => {
                    let mut names = [0; 256];
                    let names_len = rustix::fs::llistxattr(&path, &mut names).unwrap_or(0);
                    format!(
                        "{:o} {} {} {} {} {:?} {:?} {:?}",
                        stat.mode(),
                        stat.uid(),
                        stat.gid(),
                        stat.nlink(),
                        stat.mtime_nsec(),
                        stat.modified().unwrap(),
                        fs::read(&path).ok(),
                        &names[..names_len],
                    )
                }
            };
            list.insert(path.into_os_string(), kept);
        }
    }
    list
}

/// A request that needs a node: its name, its code, and what follows the header for a given handle.
type OnNode = (&'static str, u32, Vec<Vec<u8>>);

fn bytes(object: &impl ByteValued) -> Vec<u8> {
    object.as_slice().to_vec()
}

/// Every operation on a node that takes no handle.
fn without_handle() -> Vec<OnNode> {
    let create = CreateIn { flags: libc::O_RDWR as u32, mode: 0o644, ..Default::default() };
    let mapping = |flags| SetupmappingIn { fh: u64::MAX, foffset: 0, len: CHUNK_SIZE, flags, moffset: 0 };
    let open = |flags: i32| OpenIn { flags: flags as u32, fuse_flags: 0 };
    let set = |valid| SetattrIn { valid, mode: 0o777, size: 1, mtime: 1, ..Default::default() };
    let new = nul("new");
    vec![
        ("LOOKUP", opcode::LOOKUP, vec![nul("secret")]),
        ("GETATTR", opcode::GETATTR, vec![vec![0; 16]]),
        ("SETATTR of the mode", opcode::SETATTR, vec![bytes(&set(1))]),
        ("SETATTR of the owner", opcode::SETATTR, vec![bytes(&set(6))]),
        ("SETATTR of the size", opcode::SETATTR, vec![bytes(&set(8))]),
        ("SETATTR of the times", opcode::SETATTR, vec![bytes(&set(1 << 5))]),
        ("ACCESS", opcode::ACCESS, vec![vec![4, 0, 0, 0, 0, 0, 0, 0]]),
        ("READLINK", opcode::READLINK, vec![]),
        ("SYMLINK", opcode::SYMLINK, vec![new.clone(), nul("target")]),
        (
            "MKNOD",
            opcode::MKNOD,
            vec![bytes(&MknodIn { mode: libc::S_IFREG, ..Default::default() }), new.clone()],
        ),
        ("MKDIR", opcode::MKDIR, vec![bytes(&MkdirIn { mode: 0o755, umask: 0 }), new.clone()]),
        ("UNLINK", opcode::UNLINK, vec![nul("secret")]),
        ("RMDIR", opcode::RMDIR, vec![nul("other")]),
        ("RENAME", opcode::RENAME, vec![bytes(&RenameIn { newdir: ROOT }), nul("secret"), new.clone()]),
        (
            "RENAME2",
            opcode::RENAME2,
            vec![bytes(&Rename2In { newdir: ROOT, ..Default::default() }), nul("secret"), new.clone()],
        ),
        ("OPEN to read", opcode::OPEN, vec![bytes(&open(libc::O_RDONLY))]),
        ("OPEN to write", opcode::OPEN, vec![bytes(&open(libc::O_RDWR))]),
        ("OPEN to truncate", opcode::OPEN, vec![bytes(&open(libc::O_RDWR | libc::O_TRUNC))]),
        ("CREATE", opcode::CREATE, vec![bytes(&create), new.clone()]),
        ("TMPFILE", opcode::TMPFILE, vec![bytes(&create), new.clone()]),
        ("OPENDIR", opcode::OPENDIR, vec![bytes(&open(0))]),
        ("STATFS", opcode::STATFS, vec![]),
        ("SYNCFS", opcode::SYNCFS, vec![vec![0; 8]]),
        ("GETXATTR", opcode::GETXATTR, vec![bytes(&GetxattrIn { size: 99, padding: 0 }), nul("user.secret")]),
        ("LISTXATTR", opcode::LISTXATTR, vec![bytes(&GetxattrIn { size: 99, padding: 0 })]),
        (
            "SETXATTR",
            opcode::SETXATTR,
            vec![bytes(&SetxattrIn { size: 1, flags: 0 }), nul("user.new"), b"x".to_vec()],
        ),
        ("REMOVEXATTR", opcode::REMOVEXATTR, vec![nul("user.secret")]),
        ("SETUPMAPPING to read", opcode::SETUPMAPPING, vec![bytes(&mapping(READ))]),
        ("SETUPMAPPING to write", opcode::SETUPMAPPING, vec![bytes(&mapping(READ | WRITE))]),
    ]
}

/// Every operation on a node that takes a handle.
fn with_handle(fh: u64) -> Vec<OnNode> {
    let handle = fh.to_le_bytes();
    let padded = |len: usize| {
        let mut argument = vec![0; len];
        argument[..8].copy_from_slice(&handle);
        argument
    };
    let sized = |size: u32| {
        let mut argument = padded(40);
        argument[16..20].copy_from_slice(&size.to_le_bytes());
        argument
    };
    let getattr = [&1u64.to_le_bytes()[..], &handle].concat();
    let set = |valid: u32, size| bytes(&SetattrIn { valid: valid | 1 << 6, fh, size, ..Default::default() });
    let allocate = [&handle[..], &[0; 8], &4096u64.to_le_bytes(), &[0; 8]].concat();
    let seek = [&handle[..], &[0; 8], &3u32.to_le_bytes(), &[0; 4]].concat();
    let ioctl = |cmd, flags| {
        bytes(&IoctlIn {
            fh,
            flags,
            cmd,
            arg: 0,
            in_size: 0,
            out_size: if cmd >> 16 == 0x8008 { 4 } else { 28 },
        })
    };
    vec![
        ("READ", opcode::READ, vec![sized(100)]),
        ("WRITE", opcode::WRITE, vec![sized(4), b"evil".to_vec()]),
        ("FLUSH", opcode::FLUSH, vec![padded(24)]),
        ("FSYNC", opcode::FSYNC, vec![padded(16)]),
        ("GETATTR by handle", opcode::GETATTR, vec![getattr]),
        ("SETATTR of the mode by handle", opcode::SETATTR, vec![set(1, 0)]),
        ("SETATTR of the size by handle", opcode::SETATTR, vec![set(8, 1)]),
        ("FALLOCATE", opcode::FALLOCATE, vec![allocate]),
        ("LSEEK", opcode::LSEEK, vec![seek]),
        ("READDIR", opcode::READDIR, vec![sized(4096)]),
        ("READDIRPLUS", opcode::READDIRPLUS, vec![sized(4096)]),
        ("FSYNCDIR", opcode::FSYNCDIR, vec![padded(16)]),
        ("IOCTL of the flags", opcode::IOCTL, vec![ioctl(0x8008_6601, 0)]),
        ("IOCTL of a directory's flags", opcode::IOCTL, vec![ioctl(0x8008_6601, 1 << 4)]),
        ("IOCTL of the attributes", opcode::IOCTL, vec![ioctl(0x801c_581f, 0)]),
        ("RELEASEDIR", opcode::RELEASEDIR, vec![padded(24)]),
        ("RELEASE", opcode::RELEASE, vec![padded(24)]),
    ]
}

fn link_to(node: u64) -> Vec<u8> {
    bytes(&LinkIn { oldnodeid: node })
}

fn copy_to(fh_in: u64, nodeid_out: u64, fh_out: u64) -> Vec<u8> {
    bytes(&CopyFileRangeIn { fh_in, nodeid_out, fh_out, len: 5, ..Default::default() })
}

fn parts(parts: &[Vec<u8>]) -> Vec<&[u8]> {
    parts.iter().map(Vec::as_slice).collect()
}

/// Whether this process is root; says if not.
fn is_root() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        skipped!("only root can do what is tried here");
    }
    is_root
}
