//! Raw FUSE requests, and the few that every attempt begins and ends with.

use std::mem::size_of;

use fuse_backend_rs::abi::fuse_abi::{
    AttrOut, EntryOut, InHeader, InitIn, InitIn2, Opcode, OpenIn, OpenOut, ROOT_ID, ReadIn, ReleaseIn,
};
use fuse_backend_rs::abi::virtio_fs::SetupmappingIn;
use vm_memory::ByteValued;

use super::device::{Answer, Descriptor, Device, NEXT, REPLY, REPLY_ROOM, REQUEST, WRITE};
use crate::guest::data::Content;
use crate::guest::{Failure, SHARED_FILE};

/// Operations that the library has no name for.
pub const SYNCFS: u32 = 50;
pub const TMPFILE: u32 = 51;

/// The nodeid of a share's root.
pub const ROOT: u64 = ROOT_ID;

/// Bytes in which a window is mapped.
pub const CHUNK: u64 = 2 << 20;
/// SETUPMAPPING's flags.
pub const MAP_WRITE: u64 = 1;
pub const MAP_READ: u64 = 2;

/// INIT_EXT, MAP_ALIGNMENT, HAS_INODE_DAX and all that came before: what a client of Linux 5.17 offers.
const OFFER: u64 = 1 << 33 | 1 << 30 | 0x1fff_ffff;

/// Who asks, and what a message says of itself.
#[derive(Clone, Copy, Default)]
pub struct Asker {
    pub uid: u32,
    pub gid: u32,
    /// The length in the header, if it is to be a lie.
    pub len: Option<u32>,
}

/// A message of header and parts.
pub fn message(asker: Asker, code: u32, node: u64, parts: &[&[u8]]) -> Vec<u8> {
    let len = parts.iter().fold(size_of::<InHeader>(), |len, part| len + part.len()) as u32;
    let header = InHeader {
        len: asker.len.unwrap_or(len),
        opcode: code,
        unique: 1,
        nodeid: node,
        uid: asker.uid,
        gid: asker.gid,
        pid: 1,
        padding: 0,
    };
    [header.as_slice()].iter().chain(parts).flat_map(|part| part.iter().copied()).collect()
}

/// A string with its NUL.
pub fn nul(text: impl AsRef<[u8]>) -> Vec<u8> {
    [text.as_ref(), &[0]].concat()
}

/// A structure's bytes.
pub fn bytes(object: &impl ByteValued) -> Vec<u8> {
    object.as_slice().to_vec()
}

/// A structure at the start of a reply.
pub fn object<T: ByteValued>(answer: Answer) -> Result<T, Failure> {
    let Answer::Done(reply) = answer else { return Err(Failure::new(format!("{answer:?}"))) };
    let bytes = reply.get(..size_of::<T>()).and_then(T::from_slice);
    bytes.copied().ok_or_else(|| Failure::new(format!("a reply of {} bytes", reply.len())))
}

impl Device {
    /// The chain of a message that is in its place.
    pub fn chain(&self, len: usize) -> [Descriptor; 2] {
        let (request, reply) = (self.memory.physical(REQUEST), self.memory.physical(REPLY));
        [
            Descriptor { address: request, len: len as u32, flags: NEXT, next: 1 },
            Descriptor { address: reply, len: REPLY_ROOM, flags: WRITE, next: 0 },
        ]
    }

    /// Puts a message in its place; returns the chain for it.
    pub fn put(&self, message: &[u8]) -> [Descriptor; 2] {
        self.memory.write(REQUEST, message);
        self.chain(message.len())
    }

    /// Sends a message.
    pub fn send(&mut self, message: &[u8]) -> Result<Answer, Failure> {
        let chain = self.put(message);
        self.exchange(&chain)
    }

    /// Sends a request of root.
    pub fn call(&mut self, code: u32, node: u64, parts: &[&[u8]]) -> Result<Answer, Failure> {
        self.send(&message(Asker::default(), code, node, parts))
    }

    fn ask<T: ByteValued>(&mut self, code: Opcode, node: u64, parts: &[&[u8]]) -> Result<T, Failure> {
        let answer = self.call(code as u32, node, parts)?;
        object(answer).map_err(|failure| failure.within(format_args!("{code:?} of {node:#x}")))
    }

    /// The message that begins a session.
    pub fn init_message(major: u32) -> Vec<u8> {
        let ask = InitIn { major, minor: 36, max_readahead: 0, flags: OFFER as u32 };
        let more = InitIn2 { flags2: (OFFER >> 32) as u32, ..InitIn2::default() };
        message(Asker::default(), Opcode::Init as u32, 0, &[ask.as_slice(), more.as_slice()])
    }

    /// Begins a session.
    pub fn init(&mut self) -> Result<(), Failure> {
        match self.send(&Device::init_message(7))? {
            Answer::Done(_) => Ok(()),
            answer => Err(Failure::new(format!("INIT: {answer:?}"))),
        }
    }

    /// The nodeid of a name.
    pub fn lookup(&mut self, parent: u64, name: &str) -> Result<u64, Failure> {
        Ok(self.ask::<EntryOut>(Opcode::Lookup, parent, &[&nul(name)])?.nodeid)
    }

    /// Opens a file; returns the handle.
    pub fn open(&mut self, node: u64, flags: i32) -> Result<u64, Failure> {
        let ask = OpenIn { flags: flags as u32, fuse_flags: 0 };
        Ok(self.ask::<OpenOut>(Opcode::Open, node, &[ask.as_slice()])?.fh)
    }

    /// Opens a directory; returns the handle.
    pub fn open_directory(&mut self, node: u64) -> Result<u64, Failure> {
        Ok(self.ask::<OpenOut>(Opcode::Opendir, node, &[&[0; 8]])?.fh)
    }

    /// The mode of a node.
    pub fn mode(&mut self, node: u64) -> Result<u32, Failure> {
        Ok(self.ask::<AttrOut>(Opcode::Getattr, node, &[&[0; 16]])?.attr.mode)
    }

    /// Shows a chunk of a file in the window.
    pub fn map(&mut self, node: u64, foffset: u64, moffset: u64, flags: u64) -> Result<Answer, Failure> {
        let ask = SetupmappingIn { fh: u64::MAX, foffset, len: CHUNK, flags, moffset };
        self.call(Opcode::SetupMapping as u32, node, &[ask.as_slice()])
    }

    /// Forgets a node, for which there is no reply.
    pub fn forget(&mut self, node: u64, count: u64) -> Result<(), Failure> {
        self.call(Opcode::Forget as u32, node, &[&count.to_le_bytes()]).map(drop)
    }

    /// Looks the shared file up and reads it. What it contains must be right.
    pub fn read_file(&mut self) -> Result<(), Failure> {
        let Content { seed, len } = SHARED_FILE;
        let node = self.lookup(ROOT, "file")?;
        let fh = self.open(node, libc::O_RDONLY)?;
        let ask = ReadIn { fh, size: len as u32, ..ReadIn::default() };
        match self.call(Opcode::Read as u32, node, &[ask.as_slice()])? {
            Answer::Done(read) if read.len() as u64 == len => {
                if let Some(at) = crate::guest::data::first_difference(seed, 0, &read) {
                    return Err(Failure::new(format!("the file differs at {at}")));
                }
            }
            Answer::Done(read) => return Err(Failure::new(format!("the file has {} bytes", read.len()))),
            answer => return Err(Failure::new(format!("READ: {answer:?}"))),
        }
        let ask = ReleaseIn { fh, ..ReleaseIn::default() };
        match self.call(Opcode::Release as u32, node, &[ask.as_slice()])? {
            Answer::Done(_) => self.forget(node, 1),
            answer => Err(Failure::new(format!("RELEASE: {answer:?}"))),
        }
    }

    /// Has the device write the first bytes of the big file to any guest-physical address, as a part of a reply whose header
    /// goes where it belongs.
    pub fn read_into(&mut self, address: u64, len: u32) -> Result<(), Failure> {
        let node = self.lookup(ROOT, "big")?;
        let fh = self.open(node, libc::O_RDONLY)?;
        let ask = ReadIn { fh, size: len, ..ReadIn::default() };
        let message = message(Asker::default(), Opcode::Read as u32, node, &[ask.as_slice()]);
        let [request, header] = self.put(&message);
        let header = Descriptor { len: 16, flags: NEXT | WRITE, next: 2, ..header };
        let data = Descriptor { address, len, flags: WRITE, next: 0 };
        match self.exchange(&[request, header, data])? {
            Answer::Done(_) => Ok(()),
            answer => Err(Failure::new(format!("READ into {address:#x}: {answer:?}"))),
        }
    }
}
