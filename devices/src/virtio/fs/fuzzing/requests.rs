//! Requests of any kind against a real directory.

use arbitrary::Unstructured;
use fuse_backend_rs::abi::fuse_abi::{EntryOut, OutHeader};
use vm_memory::ByteValued;

use super::{choose, guest, is_untouched, take};
use crate::virtio::fs::abi::{init, opcode};
use crate::virtio::fs::testing::{FakeGuest, PER_FILE, ROOT, descriptors_into};
use crate::virtio::fs::window::CHUNK_SIZE;

/// The most requests of one input.
const MOST: usize = 48;

/// A part of a request's body.
#[derive(Clone, Copy)]
enum Part {
    Node,
    Handle,
    /// 8 bytes of any magnitude.
    Number,
    /// 8 bytes: a length or a place of which the host may have to keep the contents.
    Length,
    /// 8 bytes: a place in the window or a multiple of its chunks, mostly.
    Chunk,
    /// 4 bytes.
    Small,
    /// 4 bytes, flags of open(2) and others.
    Flags,
    /// 4 bytes, a file's mode.
    Mode,
    /// 4 bytes, a command of ioctl(2).
    Command,
    /// 4 bytes: the length of what follows as [`Part::Data`].
    DataLength,
    Zero(usize),
    Name,
    Attribute,
    Data,
}

use Part::{
    Attribute, Chunk, Command, Data, DataLength, Flags, Handle, Length, Mode, Name, Node, Number, Small, Zero,
};

/// The form of each operation's body.
const FORMS: [(u32, &[Part]); 44] = [
    (opcode::LOOKUP, &[Name]),
    (opcode::FORGET, &[Number]),
    (opcode::GETATTR, &[Small, Zero(4), Handle]),
    (
        opcode::SETATTR,
        &[
            Flags,
            Zero(4),
            Handle,
            Number,
            Number,
            Number,
            Number,
            Number,
            Small,
            Small,
            Small,
            Mode,
            Small,
            Small,
            Small,
            Zero(4),
        ],
    ),
    (opcode::READLINK, &[]),
    (opcode::SYMLINK, &[Name, Name]),
    (opcode::MKNOD, &[Mode, Small, Small, Zero(4), Name]),
    (opcode::MKDIR, &[Mode, Small, Name]),
    (opcode::UNLINK, &[Name]),
    (opcode::RMDIR, &[Name]),
    (opcode::RENAME, &[Node, Name, Name]),
    (opcode::RENAME2, &[Node, Small, Zero(4), Name, Name]),
    (opcode::LINK, &[Node, Name]),
    (opcode::OPEN, &[Flags, Small]),
    (opcode::READ, &[Handle, Number, Small, Flags, Number, Flags, Zero(4)]),
    (opcode::WRITE, &[Handle, Number, DataLength, Small, Number, Flags, Zero(4), Data]),
    (opcode::STATFS, &[]),
    (opcode::RELEASE, &[Handle, Flags, Small, Number]),
    (opcode::FSYNC, &[Handle, Small, Zero(4)]),
    (opcode::SETXATTR, &[DataLength, Small, Attribute, Data]),
    (opcode::GETXATTR, &[Small, Zero(4), Attribute]),
    (opcode::LISTXATTR, &[Small, Zero(4)]),
    (opcode::REMOVEXATTR, &[Attribute]),
    (opcode::FLUSH, &[Handle, Zero(8), Number]),
    (opcode::INIT, &[Small, Small, Small, Small, Flags, Small, Zero(40)]),
    (opcode::OPENDIR, &[Flags, Zero(4)]),
    (opcode::READDIR, &[Handle, Number, Small, Flags, Number, Flags, Zero(4)]),
    (opcode::READDIRPLUS, &[Handle, Number, Small, Flags, Number, Flags, Zero(4)]),
    (opcode::RELEASEDIR, &[Handle, Flags, Small, Number]),
    (opcode::FSYNCDIR, &[Handle, Small, Zero(4)]),
    (opcode::ACCESS, &[Small, Zero(4)]),
    (opcode::CREATE, &[Flags, Mode, Small, Small, Name]),
    (opcode::TMPFILE, &[Flags, Mode, Small, Small, Name]),
    (opcode::DESTROY, &[]),
    (opcode::INTERRUPT, &[Number]),
    (opcode::IOCTL, &[Handle, Small, Command, Number, DataLength, Small, Data]),
    (opcode::BATCH_FORGET, &[Small, Zero(4), Node, Number, Node, Number]),
    (opcode::FALLOCATE, &[Handle, Length, Length, Small, Zero(4)]),
    (opcode::LSEEK, &[Handle, Number, Small, Zero(4)]),
    (opcode::COPY_FILE_RANGE, &[Handle, Length, Node, Handle, Length, Length, Zero(8)]),
    (opcode::SETUPMAPPING, &[Handle, Chunk, Chunk, Number, Chunk]),
    (opcode::REMOVEMAPPING, &[Small, Chunk, Chunk, Chunk, Chunk]),
    (opcode::SYNCFS, &[Zero(8)]),
    (opcode::NOTIFY_REPLY, &[Data]),
];

/// What a guest knows from the replies that it got.
struct Player {
    guest: FakeGuest,
    nodes: Vec<u64>,
    handles: Vec<u64>,
}

/// Any requests are answered in the right form, lead to nothing outside of the share, and end with the session.
pub fn requests(data: &[u8]) {
    let mut source = Unstructured::new(data);
    let (read_only, per_file): (bool, bool) = (take(&mut source), take(&mut source));
    let mut guest = guest(|config| config.read_only = read_only);
    let share = guest.path("share");
    std::fs::write(share.join("file"), "hello").unwrap();
    std::fs::create_dir(share.join("dir")).unwrap();
    std::fs::write(share.join("dir/a"), "inner").unwrap();
    std::os::unix::fs::symlink("../../secret", share.join("link")).unwrap();
    let before = descriptors_into(&guest.directory);
    guest.init(if per_file { PER_FILE } else { PER_FILE & !init::HAS_INODE_DAX }).unwrap();
    let mut player = Player { guest, nodes: vec![ROOT], handles: Vec::new() };
    for _ in 0..MOST {
        if source.is_empty() {
            break;
        }
        player.request(&mut source);
    }
    let mut guest = player.guest;
    assert!(is_untouched(&guest));
    guest.init(PER_FILE).unwrap();
    assert_eq!(guest.getattr(ROOT, None).unwrap().mode & libc::S_IFMT, libc::S_IFDIR);
    guest.destroy().unwrap();
    assert_eq!(guest.device.server.descriptors_used(), 0);
    assert_eq!(descriptors_into(&guest.directory), before);
}

impl Player {
    fn request(&mut self, source: &mut Unstructured<'_>) {
        let how: u8 = take(source);
        let (code, parts) = FORMS[usize::from(take::<u8>(source)) % FORMS.len()];
        let node = self.node(source);
        let (code, mut body) = match how % 16 {
            // What these two are asked to keep must be bounded.
            0 if ![opcode::FALLOCATE, opcode::COPY_FILE_RANGE].contains(&code) => {
                let code = if how >= 128 { code } else { take::<u8>(source).into() };
                let len = usize::from(take::<u8>(source)).min(source.len());
                let raw = source.bytes(len).unwrap_or_default().to_vec();
                let is_unbounded = [opcode::FALLOCATE, opcode::COPY_FILE_RANGE].contains(&code);
                (code, if is_unbounded { Vec::new() } else { raw })
            }
            _ => (code, self.body(parts, source)),
        };
        match how % 16 {
            1 => body.truncate(usize::from(take::<u8>(source)) % (body.len() + 1)),
            2 => body.resize(body.len() + usize::from(take::<u8>(source)), 0),
            4 => {
                let group = [
                    choose(source, &[16, 16, 8, 24, u32::MAX]),
                    choose(source, &[32, 32, 31, 0]),
                    choose(source, &[1, 1, 0, 2, u32::MAX]),
                    choose(source, &[0, 1000, u32::MAX]),
                ];
                group.iter().for_each(|word| body.extend(word.to_le_bytes()));
            }
            _ => {}
        }
        let mut message = self.guest.message(code, node, &[&body]);
        message[24..28].copy_from_slice(&choose(source, &[0, 0, 0, 1000, u32::MAX]).to_le_bytes());
        message[28..32].copy_from_slice(&choose(source, &[0, 0, 0, 1000, u32::MAX]).to_le_bytes());
        if how % 16 == 4 {
            // How much of it is extensions, in units of 8 bytes.
            message[36..38].copy_from_slice(&choose(source, &[2_u16, 2, 0, 1, 3, u16::MAX]).to_le_bytes());
        }
        if how % 16 == 3 {
            message[..4].copy_from_slice(&take::<u32>(source).to_le_bytes());
        }
        let cuts: &[u32] = choose(source, &[&[40], &[40], &[], &[1, 39], &[0, 17, 23, 0]]);
        let room: &[u32] =
            choose(source, &[&[16, 8000], &[16, 8000], &[144], &[15], &[16], &[], &[3, 0, 13, 200]]);
        let (used, reply) = self.guest.send_raw(&message, cuts, room).unwrap();
        self.check(code, &message, room.iter().sum(), used, &reply);
        self.learn(code, &reply);
    }

    fn check(&self, code: u32, message: &[u8], room: u32, used: u32, reply: &[u8]) {
        assert!(used <= room);
        let is_silent = [opcode::FORGET, opcode::BATCH_FORGET, opcode::INTERRUPT, opcode::NOTIFY_REPLY];
        if is_silent.contains(&code) || room < 16 {
            return assert_eq!(used, 0, "opcode {code}");
        }
        let header = *OutHeader::from_slice(&reply[..16]).unwrap();
        assert_eq!((header.len, &message[8..16]), (used, &header.unique.to_le_bytes()[..]));
        assert!((-4095..=0).contains(&header.error), "{}", header.error);
        assert!(header.error == 0 || used == 16);
    }

    fn learn(&mut self, code: u32, reply: &[u8]) {
        let is_error = reply.get(4..8).is_none_or(|error| error != [0; 4]);
        let number = |at: usize| Some(u64::from_le_bytes(reply.get(at..at + 8)?.try_into().ok()?));
        if is_error {
            return;
        }
        match code {
            opcode::LOOKUP | opcode::MKNOD | opcode::MKDIR | opcode::SYMLINK | opcode::LINK => {
                self.nodes.extend(number(16));
            }
            opcode::CREATE | opcode::TMPFILE => {
                self.nodes.extend(number(16));
                self.handles.extend(number(16 + size_of::<EntryOut>()));
            }
            opcode::OPEN | opcode::OPENDIR => self.handles.extend(number(16)),
            _ => {}
        }
    }

    fn node(&self, source: &mut Unstructured<'_>) -> u64 {
        let known = choose(source, &self.nodes);
        match take::<u8>(source) % 16 {
            0 => known ^ 1 << 56,
            1 => choose(source, &[0, 2, 1 << 47 | 1, 1 << 57, (1 << 57) + 1, u64::MAX]),
            2 => take(source),
            _ => known,
        }
    }

    fn handle(&self, source: &mut Unstructured<'_>) -> u64 {
        match take::<u8>(source) % 8 {
            0 => take(source),
            _ if self.handles.is_empty() => 1,
            _ => choose(source, &self.handles),
        }
    }

    fn body(&self, parts: &[Part], source: &mut Unstructured<'_>) -> Vec<u8> {
        let mut body = Vec::new();
        let data = vec![take::<u8>(source); choose(source, &[0, 1, 4, 28, 100, 5000])];
        for part in parts {
            match part {
                Node => body.extend(self.node(source).to_le_bytes()),
                Handle => body.extend(self.handle(source).to_le_bytes()),
                Number => body.extend(number(source).to_le_bytes()),
                Length => {
                    let most = [0, 1, 4095, 4096, 100_000, 1 << 20, i64::MAX as u64, 1 << 63, u64::MAX];
                    body.extend(choose(source, &most).to_le_bytes());
                }
                Chunk => {
                    let chunks = u64::from(take::<u8>(source) % 24) * CHUNK_SIZE;
                    let odd = choose(source, &[0, 0, 0, 0, 0, 1, 4096, 1 << 63, u64::MAX]);
                    body.extend(chunks.wrapping_add(odd).to_le_bytes());
                }
                Small => body.extend(small(source).to_le_bytes()),
                Flags => body.extend(flags(source).to_le_bytes()),
                Mode => {
                    let kinds =
                        [libc::S_IFREG, libc::S_IFREG, libc::S_IFIFO, libc::S_IFSOCK, libc::S_IFCHR, 0];
                    let mode = choose(source, &kinds) | u32::from(take::<u16>(source)) & 0o7777;
                    body.extend(mode.to_le_bytes());
                }
                Command => {
                    let commands = [0x8008_6601, 0x4008_6602, 0x801c_581f, 0x401c_5820, 0x5401u32];
                    body.extend(choose(source, &commands).to_le_bytes());
                }
                DataLength => body.extend((data.len() as u32).to_le_bytes()),
                Zero(len) => body.resize(body.len() + len, 0),
                Name => body.extend(name(source)),
                Attribute => {
                    let names = ["user.a", "user.b", "security.capability", "trusted.x", "user.daxvm.dax"];
                    let odd = ["", "user.", "system.posix_acl_access", "nul\0inside", "x"];
                    let name = if take(source) { choose(source, &names) } else { choose(source, &odd) };
                    body.extend(name.bytes().chain([0]));
                }
                Data => body.extend(&data),
            }
        }
        body
    }
}

fn number(source: &mut Unstructured<'_>) -> u64 {
    match take::<u8>(source) % 4 {
        0 => choose(source, &[0, 1, 2, 3, 4096, 1 << 20, 1 << 32, i64::MAX as u64, 1 << 63, u64::MAX]),
        1 => take(source),
        _ => take::<u8>(source).into(),
    }
}

fn small(source: &mut Unstructured<'_>) -> u32 {
    match take::<u8>(source) % 4 {
        0 => choose(source, &[7, 4, 28, 45, 4096, 65536, 1 << 20, 1 << 31, u32::MAX]),
        1 => take(source),
        _ => (take::<u8>(source) % 32).into(),
    }
}

fn flags(source: &mut Unstructured<'_>) -> u32 {
    let access = choose(source, &[libc::O_RDONLY, libc::O_RDWR, libc::O_WRONLY, libc::O_RDWR]);
    match take::<u8>(source) % 4 {
        0 => take(source),
        1 => access as u32 | 1 << (take::<u8>(source) % 32),
        _ => access as u32,
    }
}

fn name(source: &mut Unstructured<'_>) -> Vec<u8> {
    let good = ["file", "dir", "link", "a", "b", "c", "d", "e"];
    let bad = ["", ".", "..", "/", "../secret", "/etc/passwd", "a/b", "nul\0inside", "file/", "\u{e9}"];
    let mut name = match take::<u8>(source) % 8 {
        0 => choose(source, &bad).as_bytes().to_vec(),
        1 => vec![b'n'; choose(source, &[1, 254, 255, 256, 5000])],
        2 => {
            let len = usize::from(take::<u8>(source) % 20).min(source.len());
            // Ends as it likes.
            return source.bytes(len).unwrap_or_default().to_vec();
        }
        _ => choose(source, &good).as_bytes().to_vec(),
    };
    name.push(0);
    name
}
