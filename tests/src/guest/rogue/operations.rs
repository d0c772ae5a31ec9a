//! Every operation of FUSE that a file server knows, as requests.

use fuse_backend_rs::abi::fuse_abi::{
    CopyFileRangeIn, CreateIn, GetxattrIn, IoctlIn, LinkIn, MkdirIn, MknodIn, Opcode, OpenIn, Rename2In,
    RenameIn, SetattrIn, SetxattrIn,
};
use fuse_backend_rs::abi::virtio_fs::SetupmappingIn;

use super::fuse::{CHUNK, MAP_READ, MAP_WRITE, ROOT, SYNCFS, TMPFILE, bytes, nul};

/// A request on a node.
pub struct Operation {
    pub name: &'static str,
    pub code: u32,
    /// What follows the header.
    pub parts: Vec<Vec<u8>>,
    /// Whether a share that may only be read refuses it.
    pub changes: bool,
}

const fn code(opcode: Opcode) -> u32 {
    opcode as u32
}

fn open(flags: i32) -> Vec<u8> {
    bytes(&OpenIn { flags: flags as u32, fuse_flags: 0 })
}

/// The argument of CREATE.
pub fn create(flags: i32) -> Vec<u8> {
    bytes(&CreateIn { flags: flags as u32, mode: 0o100_644, umask: 0, fuse_flags: 0 })
}

/// The argument of MKNOD; the device, if it is one, is the host's memory.
pub fn mknod(mode: u32) -> Vec<u8> {
    bytes(&MknodIn { mode, rdev: 0x101, ..MknodIn::default() })
}

/// The argument of SETATTR.
pub fn set(valid: u32) -> Vec<u8> {
    bytes(&SetattrIn { valid, mode: 0o777, size: 1, mtime: 1, ..SetattrIn::default() })
}

/// The argument of LINK.
pub fn link(node: u64) -> Vec<u8> {
    bytes(&LinkIn { oldnodeid: node })
}

/// The argument of RENAME within the root.
fn rename() -> Vec<u8> {
    bytes(&RenameIn { newdir: ROOT })
}

/// The argument of RENAME2 within the root.
pub fn rename2(flags: u32) -> Vec<u8> {
    bytes(&Rename2In { newdir: ROOT, flags, padding: 0 })
}

/// The argument of COPY_FILE_RANGE.
pub fn copy(fh_in: u64, nodeid_out: u64, fh_out: u64) -> Vec<u8> {
    bytes(&CopyFileRangeIn { fh_in, nodeid_out, fh_out, len: 5, ..CopyFileRangeIn::default() })
}

fn mapping(flags: u64) -> Vec<u8> {
    bytes(&SetupmappingIn { fh: u64::MAX, foffset: 0, len: CHUNK, flags, moffset: 0 })
}

/// Those that take no handle.
pub fn without_handle() -> Vec<Operation> {
    let (new, secret) = (nul("new"), nul("secret"));
    let get = bytes(&GetxattrIn { size: 99, padding: 0 });
    let set_attribute = bytes(&SetxattrIn { size: 1, flags: 0 });
    let read = |name, code, parts| Operation { name, code, parts, changes: false };
    let write = |name, code, parts| Operation { name, code, parts, changes: true };
    let mkdir = bytes(&MkdirIn { mode: 0o755, umask: 0 });
    vec![
        read("LOOKUP", code(Opcode::Lookup), vec![secret.clone()]),
        read("GETATTR", code(Opcode::Getattr), vec![vec![0; 16]]),
        read("ACCESS", code(Opcode::Access), vec![vec![4, 0, 0, 0, 0, 0, 0, 0]]),
        read("READLINK", code(Opcode::Readlink), vec![]),
        read("OPEN to read", code(Opcode::Open), vec![open(libc::O_RDONLY)]),
        read("OPENDIR", code(Opcode::Opendir), vec![open(0)]),
        read("STATFS", code(Opcode::Statfs), vec![]),
        read("SYNCFS", SYNCFS, vec![vec![0; 8]]),
        read("GETXATTR", code(Opcode::Getxattr), vec![get.clone(), nul("user.secret")]),
        read("LISTXATTR", code(Opcode::Listxattr), vec![get]),
        read("SETUPMAPPING to read", code(Opcode::SetupMapping), vec![mapping(MAP_READ)]),
        write("SETUPMAPPING to write", code(Opcode::SetupMapping), vec![mapping(MAP_READ | MAP_WRITE)]),
        write("SETATTR of the mode", code(Opcode::Setattr), vec![set(1)]),
        write("SETATTR of the owner", code(Opcode::Setattr), vec![set(6)]),
        write("SETATTR of the size", code(Opcode::Setattr), vec![set(8)]),
        write("SETATTR of the times", code(Opcode::Setattr), vec![set(1 << 5)]),
        write("SYMLINK", code(Opcode::Symlink), vec![new.clone(), nul("target")]),
        write("MKNOD", code(Opcode::Mknod), vec![mknod(libc::S_IFREG), new.clone()]),
        write("MKDIR", code(Opcode::Mkdir), vec![mkdir, new.clone()]),
        write("UNLINK", code(Opcode::Unlink), vec![secret.clone()]),
        write("RMDIR", code(Opcode::Rmdir), vec![nul("other")]),
        write("RENAME", code(Opcode::Rename), vec![rename(), secret.clone(), new.clone()]),
        write("RENAME2", code(Opcode::Rename2), vec![rename2(0), secret, new.clone()]),
        write("OPEN to write", code(Opcode::Open), vec![open(libc::O_RDWR)]),
        write("OPEN to truncate", code(Opcode::Open), vec![open(libc::O_RDWR | libc::O_TRUNC)]),
        write("CREATE", code(Opcode::Create), vec![create(libc::O_RDWR), new.clone()]),
        write("TMPFILE", TMPFILE, vec![create(libc::O_RDWR), new]),
        write("SETXATTR", code(Opcode::Setxattr), vec![set_attribute, nul("user.new"), b"x".to_vec()]),
        write("REMOVEXATTR", code(Opcode::Removexattr), vec![nul("user.secret")]),
    ]
}

/// Those that take a handle.
pub fn with_handle(fh: u64) -> Vec<Operation> {
    let handle = fh.to_le_bytes();
    let padded = |len: usize| [&handle[..], &vec![0; len - 8]].concat();
    let sized = |size: u32| {
        let mut argument = padded(40);
        argument[16..20].copy_from_slice(&size.to_le_bytes());
        argument
    };
    let getattr = [&1u64.to_le_bytes()[..], &handle].concat();
    let set = |valid: u32| bytes(&SetattrIn { valid: valid | 1 << 6, fh, size: 1, ..SetattrIn::default() });
    let allocate = [&handle[..], &[0; 8], &4096u64.to_le_bytes(), &[0; 8]].concat();
    let seek = [&handle[..], &[0; 8], &3u32.to_le_bytes(), &[0; 4]].concat();
    let ioctl = |cmd: u32, out_size| bytes(&IoctlIn { fh, cmd, out_size, ..IoctlIn::default() });
    let read = |name, code, parts| Operation { name, code, parts, changes: false };
    let write = |name, code, parts| Operation { name, code, parts, changes: true };
    vec![
        read("READ", code(Opcode::Read), vec![sized(100)]),
        read("FLUSH", code(Opcode::Flush), vec![padded(24)]),
        read("FSYNC", code(Opcode::Fsync), vec![padded(16)]),
        read("GETATTR by handle", code(Opcode::Getattr), vec![getattr]),
        read("LSEEK", code(Opcode::Lseek), vec![seek]),
        read("READDIR", code(Opcode::Readdir), vec![sized(4096)]),
        read("READDIRPLUS", code(Opcode::Readdirplus), vec![sized(4096)]),
        read("FSYNCDIR", code(Opcode::Fsyncdir), vec![padded(16)]),
        read("IOCTL of the flags", code(Opcode::Ioctl), vec![ioctl(0x8008_6601, 4)]),
        read("IOCTL of the attributes", code(Opcode::Ioctl), vec![ioctl(0x801c_581f, 28)]),
        write("WRITE", code(Opcode::Write), vec![sized(4), b"evil".to_vec()]),
        write("SETATTR of the mode by handle", code(Opcode::Setattr), vec![set(1)]),
        write("SETATTR of the size by handle", code(Opcode::Setattr), vec![set(8)]),
        write("FALLOCATE", code(Opcode::Fallocate), vec![allocate]),
        read("RELEASEDIR", code(Opcode::Releasedir), vec![padded(24)]),
        read("RELEASE", code(Opcode::Release), vec![padded(24)]),
    ]
}

/// A way to give a name: `parts` makes what follows the header of the name, and of the node of a file.
pub struct Naming {
    pub name: &'static str,
    pub code: u32,
    pub parts: fn(&[u8], u64) -> Vec<Vec<u8>>,
    /// Whether a second string follows or precedes the name, so that what is no string means something else.
    pub is_pair: bool,
}

/// All of them.
pub fn namings() -> Vec<Naming> {
    const NOREPLACE: u32 = libc::RENAME_NOREPLACE;
    const EXCHANGE: u32 = libc::RENAME_EXCHANGE;
    const WHITEOUT: u32 = libc::RENAME_WHITEOUT;
    const NEW: i32 = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC;
    let one = |name, opcode, parts| Naming { name, code: code(opcode), parts, is_pair: false };
    let two = |name, opcode, parts| Naming { name, code: code(opcode), parts, is_pair: true };
    vec![
        one("LOOKUP", Opcode::Lookup, |name, _| vec![name.to_vec()]),
        one("CREATE", Opcode::Create, |name, _| vec![create(libc::O_RDWR), name.to_vec()]),
        one("CREATE, exclusive", Opcode::Create, |name, _| vec![create(NEW), name.to_vec()]),
        one("MKNOD of a file", Opcode::Mknod, |name, _| vec![mknod(libc::S_IFREG | 0o644), name.to_vec()]),
        one("MKNOD of a fifo", Opcode::Mknod, |name, _| vec![mknod(libc::S_IFIFO | 0o644), name.to_vec()]),
        one("MKNOD of a device", Opcode::Mknod, |name, _| vec![mknod(libc::S_IFCHR | 0o644), name.to_vec()]),
        one("MKDIR", Opcode::Mkdir, |name, _| vec![bytes(&MkdirIn { mode: 0o755, umask: 0 }), name.to_vec()]),
        one("LINK", Opcode::Link, |name, file| vec![link(file), name.to_vec()]),
        one("UNLINK", Opcode::Unlink, |name, _| vec![name.to_vec()]),
        one("RMDIR", Opcode::Rmdir, |name, _| vec![name.to_vec()]),
        two("SYMLINK", Opcode::Symlink, |name, _| vec![name.to_vec(), nul("target")]),
        two("RENAME from", Opcode::Rename, |name, _| vec![rename(), name.to_vec(), nul("new")]),
        two("RENAME to", Opcode::Rename, |name, _| vec![rename(), nul("file"), name.to_vec()]),
        two("RENAME2 from", Opcode::Rename2, |name, _| vec![rename2(0), name.to_vec(), nul("new")]),
        two("RENAME2 to", Opcode::Rename2, |name, _| vec![rename2(0), nul("file"), name.to_vec()]),
        two("RENAME2 to what is free", Opcode::Rename2, |name, _| {
            vec![rename2(NOREPLACE), nul("file"), name.to_vec()]
        }),
        two("RENAME2 in exchange", Opcode::Rename2, |name, _| {
            vec![rename2(EXCHANGE), nul("file"), name.to_vec()]
        }),
        two("RENAME2 with a whiteout", Opcode::Rename2, |name, _| {
            vec![rename2(WHITEOUT), nul("file"), name.to_vec()]
        }),
    ]
}
