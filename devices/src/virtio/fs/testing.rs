//! A fake guest driver: sends FUSE requests to a device through descriptor chains in a guest memory of its own, with a
//! temporary directory as the share.

#[cfg(test)]
mod file_systems;

use std::mem::size_of;
use std::path::PathBuf;

use fuse_backend_rs::abi::fuse_abi::{
    Attr, AttrOut, CopyFileRangeIn, CreateIn, Dirent, EntryOut, FallocateIn, FsyncIn, GETATTR_FH, GetattrIn,
    GetxattrIn, InHeader, InitIn, InitIn2, InitOut, LinkIn, LseekIn, MkdirIn, MknodIn, OpenIn, OpenOut,
    OutHeader, ROOT_ID, ReadIn, ReleaseIn, Rename2In, SetattrIn, SetxattrIn, WriteIn, WriteOut,
};
use fuse_backend_rs::abi::virtio_fs::SetupmappingIn;
use tempfile::TempDir;
use virtio_bindings::bindings::virtio_ring::VRING_DESC_F_WRITE;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::MockSplitQueue;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

#[cfg(test)]
pub(super) use self::file_systems::{
    directories_with_hints, directory_with_attributes, directory_with_flags,
};
use super::abi::{init, opcode};
use super::cache::CacheMode;
use super::policy::{Policy, Prefault};
use super::window::{CHUNK_SIZE, MIN_WINDOW_SIZE};
use super::{FileSystemConfig, FileSystemCounters, FileSystemDevice};
use crate::virtio::device::VirtioDevice;
use crate::virtio::worker::ChainError;

/// The nodeid of the share's root.
pub(super) const ROOT: u64 = ROOT_ID;

/// What every client since Linux 5.17 offers, with a window and in a per-file mode.
pub(super) const PER_FILE: u64 = init::INIT_EXT | init::MAP_ALIGNMENT | init::HAS_INODE_DAX | 0x1fff_ffff;

/// SETUPMAPPING flags.
pub(super) const READ: u64 = 2;
pub(super) const WRITE: u64 = 1;

const REQUEST: u64 = 0x10_0000;
const REPLY: u64 = 0x30_0000;
/// Room for the largest reply, and the size of the guest's memory.
const REPLY_SIZE: u32 = 0x11_0000;
const MEMORY_SIZE: usize = 0x60_0000;

/// What a request came to: the payload of its reply, or its errno as a positive number.
pub(super) type Outcome<T> = Result<T, i32>;

pub(super) struct FakeGuest {
    pub(super) directory: TempDir,
    pub(super) device: FileSystemDevice,
    pub(super) memory: GuestMemoryMmap,
    unique: u64,
    /// The thread that asks.
    pub(super) thread: u32,
    /// Room that a request leaves for its reply, in bytes; less makes for quicker tests.
    pub(super) reply_room: u32,
}

impl FakeGuest {
    /// A guest with a writable share, a window of the smallest size, and no session yet.
    pub(super) fn new(policy: Policy) -> FakeGuest {
        FakeGuest::with(|config| config.policy = policy)
    }

    /// A guest whose share differs from that of [`FakeGuest::new`].
    pub(super) fn with(change: impl FnOnce(&mut FileSystemConfig)) -> FakeGuest {
        FakeGuest::on(TempDir::new().unwrap(), change)
    }

    pub(super) fn on(directory: TempDir, change: impl FnOnce(&mut FileSystemConfig)) -> FakeGuest {
        let mut config = FileSystemConfig {
            tag: "test".into(),
            path: directory.path().into(),
            read_only: false,
            window_size: MIN_WINDOW_SIZE,
            policy: Policy::Always,
            prefault: Prefault::default(),
            cache: CacheMode::default(),
            request_queues: 1,
            descriptors: 10_000,
        };
        change(&mut config);
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_SIZE)]).unwrap();
        FakeGuest {
            directory,
            device: FileSystemDevice::new(config).unwrap(),
            memory,
            unique: 0,
            thread: 1000,
            reply_room: REPLY_SIZE,
        }
    }

    /// The same, with a session in per-file mode.
    pub(super) fn mounted(policy: Policy) -> FakeGuest {
        let mut guest = FakeGuest::new(policy);
        guest.init(PER_FILE).unwrap();
        guest
    }

    /// A path on the host.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A file of `chunks` chunks on the host, each of which starts with the file's first letter and the chunk's
    /// number.
    pub(super) fn host_file(&self, name: &str, chunks: u64) {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::create(self.path(name)).unwrap();
        file.set_len(chunks * CHUNK_SIZE).unwrap();
        for chunk in 0..chunks {
            file.write_all_at(&[name.as_bytes()[0], chunk as u8], chunk * CHUNK_SIZE).unwrap();
        }
    }

    pub(super) fn counters(&self) -> FileSystemCounters {
        self.device.counters().snapshot()
    }

    /// Two bytes of the window.
    pub(super) fn window(&self, offset: u64) -> [u8; 2] {
        let memory = self.device.shared_memory().unwrap().memory;
        assert!(offset + 2 <= memory.size());
        // SAFETY: the bytes lie in the window, and the tests map no file beyond its end.
        unsafe { memory.host_address().add(offset as usize).cast::<[u8; 2]>().read_volatile() }
    }

    /// Writes two bytes through the window.
    pub(super) fn write_window(&self, offset: u64, bytes: [u8; 2]) {
        let memory = self.device.shared_memory().unwrap().memory;
        assert!(offset + 2 <= memory.size());
        // SAFETY: as above; the tests write to writable mappings alone.
        unsafe { memory.host_address().add(offset as usize).cast::<[u8; 2]>().write_volatile(bytes) }
    }

    /// Sends `message` as it is, cut into readable descriptors of the given lengths (the last takes the rest), with
    /// writable ones of the given lengths; returns the used length and the first bytes of the writable part.
    pub(super) fn send_raw(
        &mut self,
        message: &[u8],
        readable: &[u32],
        writable: &[u32],
    ) -> Result<(u32, Vec<u8>), ChainError> {
        self.memory.write_slice(message, GuestAddress(REQUEST)).unwrap();
        let room = writable.iter().sum::<u32>();
        self.memory.write_slice(&vec![0xa5; room as usize], GuestAddress(REPLY)).unwrap();
        let mut descriptors = Vec::new();
        let mut at = REQUEST;
        for len in readable {
            descriptors.push(Descriptor::new(at, *len, 0, 0));
            at += u64::from(*len);
        }
        descriptors.push(Descriptor::new(at, (REQUEST + message.len() as u64 - at) as u32, 0, 0));
        at = REPLY;
        for len in writable {
            descriptors.push(Descriptor::new(at, *len, VRING_DESC_F_WRITE as u16, 0));
            at += u64::from(*len);
        }
        let used = self.send_descriptors(&descriptors)?;
        let mut reply = vec![0; used as usize];
        self.memory.read_slice(&mut reply, GuestAddress(REPLY)).unwrap();
        Ok((used, reply))
    }

    /// Sends a chain of any descriptors; returns the used length.
    pub(super) fn send_descriptors(&mut self, descriptors: &[Descriptor]) -> Result<u32, ChainError> {
        let descriptors: Vec<_> =
            descriptors.iter().map(|descriptor| RawDescriptor::from(*descriptor)).collect();
        let queue = MockSplitQueue::new(&self.memory, 64);
        let chain = queue.build_desc_chain(&descriptors).unwrap();
        self.device.server.handle(&self.memory, chain)
    }

    /// A well-formed message.
    pub(super) fn message(&mut self, code: u32, nodeid: u64, parts: &[&[u8]]) -> Vec<u8> {
        self.unique += 1;
        let len = parts.iter().fold(size_of::<InHeader>(), |len, part| len + part.len());
        let header = InHeader {
            len: len as u32,
            opcode: code,
            unique: self.unique,
            nodeid,
            pid: self.thread,
            ..InHeader::default()
        };
        [header.as_slice()].iter().chain(parts).flat_map(|part| part.iter().copied()).collect()
    }

    /// Sends a request and checks the form of its reply.
    pub(super) fn call(&mut self, code: u32, nodeid: u64, parts: &[&[u8]]) -> Outcome<Vec<u8>> {
        let message = self.message(code, nodeid, parts);
        let (used, reply) = self.send_raw(&message, &[40], &[16, self.reply_room - 16]).unwrap();
        let header = *OutHeader::from_slice(&reply[..16]).unwrap();
        assert_eq!((header.len, header.unique), (used, self.unique), "opcode {code}");
        match header.error {
            0 => Ok(reply[16..].to_vec()),
            error => {
                assert_eq!(used, 16);
                Err(-error)
            }
        }
    }

    /// Sends a request that gets no reply.
    pub(super) fn post(&mut self, code: u32, nodeid: u64, parts: &[&[u8]]) {
        let message = self.message(code, nodeid, parts);
        assert_eq!(self.send_raw(&message, &[40], &[]).unwrap().0, 0);
    }

    fn call_for<T: ByteValued>(&mut self, code: u32, nodeid: u64, parts: &[&[u8]]) -> Outcome<T> {
        let reply = self.call(code, nodeid, parts)?;
        Ok(*T::from_slice(&reply).expect("the reply has the size of its structure"))
    }

    pub(super) fn init(&mut self, flags: u64) -> Outcome<InitOut> {
        let ask = InitIn { major: 7, minor: 45, max_readahead: 1 << 17, flags: flags as u32 };
        let more = InitIn2 { flags2: (flags >> 32) as u32, ..Default::default() };
        self.call_for(opcode::INIT, 0, &[ask.as_slice(), more.as_slice()])
    }

    pub(super) fn destroy(&mut self) -> Outcome<Vec<u8>> {
        self.call(opcode::DESTROY, ROOT, &[])
    }

    pub(super) fn lookup(&mut self, parent: u64, name: &str) -> Outcome<EntryOut> {
        self.call_for(opcode::LOOKUP, parent, &[&nul(name)])
    }

    pub(super) fn forget(&mut self, nodeid: u64, nlookup: u64) {
        self.post(opcode::FORGET, nodeid, &[&nlookup.to_le_bytes()]);
    }

    pub(super) fn getattr(&mut self, nodeid: u64, fh: Option<u64>) -> Outcome<Attr> {
        let flags = if fh.is_some() { GETATTR_FH } else { 0 };
        let ask = GetattrIn { flags, dummy: 0, fh: fh.unwrap_or_default() };
        self.call_for::<AttrOut>(opcode::GETATTR, nodeid, &[ask.as_slice()]).map(|out| out.attr)
    }

    pub(super) fn setattr(&mut self, nodeid: u64, ask: SetattrIn) -> Outcome<Attr> {
        self.call_for::<AttrOut>(opcode::SETATTR, nodeid, &[ask.as_slice()]).map(|out| out.attr)
    }

    pub(super) fn mknod(&mut self, parent: u64, name: &str, mode: u32) -> Outcome<EntryOut> {
        let ask = MknodIn { mode, ..Default::default() };
        self.call_for(opcode::MKNOD, parent, &[ask.as_slice(), &nul(name)])
    }

    pub(super) fn mkdir(&mut self, parent: u64, name: &str) -> Outcome<EntryOut> {
        let ask = MkdirIn { mode: 0o755, umask: 0o22 };
        self.call_for(opcode::MKDIR, parent, &[ask.as_slice(), &nul(name)])
    }

    pub(super) fn symlink(&mut self, parent: u64, name: &str, target: &str) -> Outcome<EntryOut> {
        self.call_for(opcode::SYMLINK, parent, &[&nul(name), &nul(target)])
    }

    pub(super) fn link(&mut self, nodeid: u64, parent: u64, name: &str) -> Outcome<EntryOut> {
        let ask = LinkIn { oldnodeid: nodeid };
        self.call_for(opcode::LINK, parent, &[ask.as_slice(), &nul(name)])
    }

    pub(super) fn unlink(&mut self, parent: u64, name: &str) -> Outcome<Vec<u8>> {
        self.call(opcode::UNLINK, parent, &[&nul(name)])
    }

    pub(super) fn rmdir(&mut self, parent: u64, name: &str) -> Outcome<Vec<u8>> {
        self.call(opcode::RMDIR, parent, &[&nul(name)])
    }

    pub(super) fn rename(&mut self, parent: u64, old: &str, new: &str, flags: u32) -> Outcome<Vec<u8>> {
        let ask = Rename2In { newdir: parent, flags, padding: 0 };
        self.call(opcode::RENAME2, parent, &[ask.as_slice(), &nul(old), &nul(new)])
    }

    pub(super) fn open(&mut self, nodeid: u64, flags: i32) -> Outcome<OpenOut> {
        // As open(2) does in a 64-bit kernel.
        let flags = flags as u32 | rustix::fs::OFlags::LARGEFILE.bits();
        let ask = OpenIn { flags, fuse_flags: 0 };
        self.call_for(opcode::OPEN, nodeid, &[ask.as_slice()])
    }

    pub(super) fn create(&mut self, parent: u64, name: &str, flags: i32) -> Outcome<(EntryOut, OpenOut)> {
        let ask = CreateIn { flags: (flags | libc::O_CREAT) as u32, mode: 0o644, umask: 0o22, fuse_flags: 0 };
        let reply = self.call(opcode::CREATE, parent, &[ask.as_slice(), &nul(name)])?;
        let (entry, open) = reply.split_at(size_of::<EntryOut>());
        Ok((*EntryOut::from_slice(entry).unwrap(), *OpenOut::from_slice(open).unwrap()))
    }

    pub(super) fn read(&mut self, nodeid: u64, fh: u64, offset: u64, size: u32) -> Outcome<Vec<u8>> {
        let ask = ReadIn { fh, offset, size, ..Default::default() };
        self.call(opcode::READ, nodeid, &[ask.as_slice()])
    }

    pub(super) fn write(&mut self, nodeid: u64, fh: u64, offset: u64, data: &[u8]) -> Outcome<u32> {
        let flags = libc::O_RDWR as u32;
        let ask = WriteIn { fh, offset, size: data.len() as u32, flags, ..Default::default() };
        self.call_for::<WriteOut>(opcode::WRITE, nodeid, &[ask.as_slice(), data]).map(|out| out.size)
    }

    pub(super) fn release(&mut self, nodeid: u64, fh: u64) -> Outcome<Vec<u8>> {
        let ask = ReleaseIn { fh, ..Default::default() };
        self.call(opcode::RELEASE, nodeid, &[ask.as_slice()])
    }

    pub(super) fn fsync(&mut self, nodeid: u64, fh: u64) -> Outcome<Vec<u8>> {
        let ask = FsyncIn { fh, ..Default::default() };
        self.call(opcode::FSYNC, nodeid, &[ask.as_slice()])
    }

    pub(super) fn fallocate(&mut self, nodeid: u64, fh: u64, length: u64) -> Outcome<Vec<u8>> {
        let ask = FallocateIn { fh, length, ..Default::default() };
        self.call(opcode::FALLOCATE, nodeid, &[ask.as_slice()])
    }

    pub(super) fn lseek(&mut self, nodeid: u64, fh: u64, offset: u64, whence: i32) -> Outcome<u64> {
        let ask = LseekIn { fh, offset, whence: whence as u32, padding: 0 };
        self.call_for(opcode::LSEEK, nodeid, &[ask.as_slice()])
    }

    pub(super) fn copy_file_range(&mut self, nodeid: u64, ask: CopyFileRangeIn) -> Outcome<u32> {
        self.call_for::<WriteOut>(opcode::COPY_FILE_RANGE, nodeid, &[ask.as_slice()]).map(|out| out.size)
    }

    pub(super) fn setxattr(&mut self, nodeid: u64, name: &str, value: &[u8]) -> Outcome<Vec<u8>> {
        let ask = SetxattrIn { size: value.len() as u32, flags: 0 };
        self.call(opcode::SETXATTR, nodeid, &[ask.as_slice(), &nul(name), value])
    }

    pub(super) fn getxattr(&mut self, nodeid: u64, name: &str, size: u32) -> Outcome<Vec<u8>> {
        let ask = GetxattrIn { size, padding: 0 };
        self.call(opcode::GETXATTR, nodeid, &[ask.as_slice(), &nul(name)])
    }

    pub(super) fn opendir(&mut self, nodeid: u64) -> Outcome<u64> {
        let ask = OpenIn::default();
        self.call_for::<OpenOut>(opcode::OPENDIR, nodeid, &[ask.as_slice()]).map(|out| out.fh)
    }

    pub(super) fn releasedir(&mut self, nodeid: u64, fh: u64) -> Outcome<Vec<u8>> {
        let ask = ReleaseIn { fh, ..Default::default() };
        self.call(opcode::RELEASEDIR, nodeid, &[ask.as_slice()])
    }

    /// All entries of a directory but the dots, each with its name, read in pieces of `size` bytes.
    pub(super) fn list(
        &mut self,
        nodeid: u64,
        size: u32,
        plus: bool,
    ) -> Outcome<Vec<(String, EntryOut, Dirent)>> {
        let fh = self.opendir(nodeid)?;
        let code = if plus { opcode::READDIRPLUS } else { opcode::READDIR };
        let (mut entries, mut offset) = (Vec::new(), 0);
        loop {
            let ask = ReadIn { fh, offset, size, ..Default::default() };
            let reply = self.call(code, nodeid, &[ask.as_slice()])?;
            assert!(reply.len() <= size as usize);
            let mut rest = &reply[..];
            while !rest.is_empty() {
                let mut entry = EntryOut::default();
                if plus {
                    let (bytes, next) = rest.split_at(size_of::<EntryOut>());
                    (entry, rest) = (*EntryOut::from_slice(bytes).unwrap(), next);
                }
                let (dirent, next) = rest.split_at(size_of::<Dirent>());
                let dirent = *Dirent::from_slice(dirent).unwrap();
                let name = String::from_utf8(next[..dirent.namelen as usize].to_vec()).unwrap();
                rest = &next[(24 + name.len()).next_multiple_of(8) - 24..];
                offset = dirent.off;
                if name != "." && name != ".." {
                    entries.push((name, entry, dirent));
                }
            }
            if reply.is_empty() {
                self.releasedir(nodeid, fh)?;
                return Ok(entries);
            }
        }
    }

    pub(super) fn setupmapping(
        &mut self,
        nodeid: u64,
        foffset: u64,
        moffset: u64,
        flags: u64,
    ) -> Outcome<Vec<u8>> {
        self.setupmapping_len(nodeid, foffset, CHUNK_SIZE, moffset, flags)
    }

    pub(super) fn setupmapping_len(
        &mut self,
        nodeid: u64,
        foffset: u64,
        len: u64,
        moffset: u64,
        flags: u64,
    ) -> Outcome<Vec<u8>> {
        let ask = SetupmappingIn { fh: u64::MAX, foffset, len, flags, moffset };
        self.call(opcode::SETUPMAPPING, nodeid, &[ask.as_slice()])
    }

    /// REMOVEMAPPING with a count that need not be right, and entries of offset and length.
    pub(super) fn removemapping(&mut self, count: u32, entries: &[(u64, u64)]) -> Outcome<Vec<u8>> {
        let entries: Vec<u8> = entries
            .iter()
            .flat_map(|(moffset, len)| [moffset.to_le_bytes(), len.to_le_bytes()].concat())
            .collect();
        self.call(opcode::REMOVEMAPPING, ROOT, &[&count.to_le_bytes(), &entries])
    }
}

/// A string with its NUL.
pub(super) fn nul(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}

/// Open descriptors of the process that lead into `directory`.
pub(super) fn descriptors_into(directory: &TempDir) -> usize {
    let links = std::fs::read_dir("/proc/self/fd").unwrap();
    links
        .filter(|link| {
            let target = std::fs::read_link(link.as_ref().unwrap().path());
            target.is_ok_and(|target| target.starts_with(directory.path()))
        })
        .count()
}
