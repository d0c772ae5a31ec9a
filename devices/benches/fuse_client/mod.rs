//! A guest with a virtio-fs device and a large file, for the benchmark of the window and for the test that counts
//! allocations. It talks to the device as Linux does: through its queues, one thread of the device behind each.

use std::collections::VecDeque;
use std::fs::File;
use std::ops::Add;
use std::thread;
use std::time::{Duration, Instant};

use devices::virtio::device::VirtioDevice;
use devices::virtio::fs::policy::Policy;
use devices::virtio::fs::window::CHUNK_SIZE;
use devices::virtio::fs::{CacheMode, FileSystemConfig, FileSystemDevice};
use devices::virtio::testing::{BUFFERS, FakeDriver, readable, writable};
use fuse_backend_rs::abi::fuse_abi::{EntryOut, InHeader, InitIn, InitIn2, OutHeader, ROOT_ID};
use fuse_backend_rs::abi::virtio_fs::{RemovemappingOne, SetupmappingIn};
use tempfile::TempDir;
use vm_memory::ByteValued;

/// FUSE operation codes (include/uapi/linux/fuse.h).
const LOOKUP: u32 = 1;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const SETUPMAPPING: u32 = 48;
const REMOVEMAPPING: u32 = 49;

/// INIT_EXT, MAP_ALIGNMENT and HAS_INODE_DAX, and all flags of the first versions.
const PER_FILE: u64 = 1 << 30 | 1 << 26 | 1 << 33 | 0x1fff_ffff;

/// The most requests that are in a queue at once: each takes up to 4 of its 1,024 descriptors.
pub const IN_FLIGHT: usize = 256;

/// The most entries of a REMOVEMAPPING (FUSE_REMOVEMAPPING_MAX_ENTRY).
pub const MOST_ENTRIES: usize = 256;

/// What a request takes of the guest's memory: the header, a count, the most entries, and the reply.
const SLOT: u64 = 0x1400;
const REPLY: u64 = SLOT - 0x100;

/// No request takes this long.
const LIMIT: Duration = Duration::from_secs(20);

/// How a mapping is asked for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Access {
    Read = 2,
    ReadWrite = 3,
}

/// What something took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    /// From its beginning to its end.
    pub time: Duration,
    /// CPU time of those who did it, whatever else the machine did meanwhile.
    pub cpu: Duration,
}

impl Add for Cost {
    type Output = Cost;

    fn add(self, other: Cost) -> Cost {
        Cost { time: self.time + other.time, cpu: self.cpu + other.cpu }
    }
}

/// What `work` costs on this thread.
pub fn cost(work: impl FnOnce()) -> Cost {
    let (start, cpu) = (Instant::now(), cpu_time(libc::CLOCK_THREAD_CPUTIME_ID));
    work();
    Cost { cpu: cpu_time(libc::CLOCK_THREAD_CPUTIME_ID) - cpu, time: start.elapsed() }
}

/// CPU time so far: of this thread, or of all threads.
fn cpu_time(clock: libc::clockid_t) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the structure lives through the call.
    assert_eq!(unsafe { libc::clock_gettime(clock, &mut time) }, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// CPU time so far of all threads but this one.
fn cpu_time_of_others() -> Duration {
    cpu_time(libc::CLOCK_PROCESS_CPUTIME_ID).saturating_sub(cpu_time(libc::CLOCK_THREAD_CPUTIME_ID))
}

/// A mounted share.
pub struct Client {
    driver: FakeDriver,
    /// The device.
    pub device: FileSystemDevice,
    /// The node id of the file.
    pub file: u64,
    sent: Vec<VecDeque<u64>>,
    _directory: TempDir,
}

impl Client {
    /// A share with a window of so many chunks, so many request queues, and a file that is as large as the window.
    pub fn mount(chunks: u64, queues: u16) -> Client {
        let directory = TempDir::new().expect("a temporary directory");
        let file =
            File::options().read(true).write(true).create_new(true).open(directory.path().join("file"));
        let file = file.expect("a file");
        file.set_len(chunks * CHUNK_SIZE).expect("a large file");
        let config = FileSystemConfig {
            tag: "bench".into(),
            path: directory.path().into(),
            read_only: false,
            window_size: chunks * CHUNK_SIZE,
            policy: Policy::Always,
            prefault: Default::default(),
            cache: CacheMode::Auto,
            request_queues: queues,
            descriptors: 1_000_000,
        };
        let mut device = FileSystemDevice::new(config).expect("a device");
        let driver = FakeDriver::new(&mut device, 0);
        let sent = vec![VecDeque::with_capacity(IN_FLIGHT); usize::from(queues) + 1];
        let mut client = Client { driver, device, file: 0, sent, _directory: directory };
        let init = InitIn { major: 7, minor: 45, max_readahead: 1 << 17, flags: PER_FILE as u32 };
        let more = InitIn2 { flags2: (PER_FILE >> 32) as u32, ..InitIn2::default() };
        client.call(INIT, 0, &[init.as_slice(), more.as_slice()]);
        let entry = client.call(LOOKUP, ROOT_ID, &[b"file\0"]);
        client.file = EntryOut::from_slice(&entry).expect("a reply to LOOKUP").nodeid;
        client
    }

    /// Maps the first chunk, so that the file is one that the window knows.
    pub fn stay_mapped(&mut self) {
        self.setup(0, 0, 0, Access::Read);
        self.serve();
        self.check(0);
    }

    /// Puts a request for one chunk in a queue (from 0), without ringing.
    pub fn setup(&mut self, queue: usize, chunk: u64, in_file: u64, access: Access) {
        self.send_setup(queue, chunk, in_file, access as u64);
    }

    /// The same with flags that the device refuses, after it has read all of the request.
    pub fn bad_setup(&mut self, queue: usize) {
        self.send_setup(queue, 0, 0, 0);
    }

    fn send_setup(&mut self, queue: usize, chunk: u64, in_file: u64, flags: u64) {
        let (foffset, moffset) = (in_file * CHUNK_SIZE, chunk * CHUNK_SIZE);
        let ask = SetupmappingIn { fh: u64::MAX, foffset, len: CHUNK_SIZE, flags, moffset };
        self.send(queue, SETUPMAPPING, self.file, &[ask.as_slice()], 0);
    }

    /// Puts a request in a queue that unmaps ranges of chunks, each its first one and their number.
    pub fn remove(&mut self, queue: usize, ranges: &[(u64, u64)]) {
        let mut entries = [RemovemappingOne::default(); MOST_ENTRIES];
        for (entry, (first, count)) in entries.iter_mut().zip(ranges) {
            *entry = RemovemappingOne { moffset: first * CHUNK_SIZE, len: count * CHUNK_SIZE };
        }
        let count = (ranges.len() as u32).to_le_bytes();
        let entries = entries[..ranges.len()].iter().map(ByteValued::as_slice);
        let mut parts = [&[][..]; MOST_ENTRIES + 1];
        parts[0] = &count;
        for (part, entry) in parts[1..].iter_mut().zip(entries) {
            *part = entry;
        }
        self.send(queue, REMOVEMAPPING, self.file, &parts[..ranges.len() + 1], 0);
    }

    /// Puts a request in a queue that the device does nothing about, and that gets no reply.
    pub fn nothing(&mut self, queue: usize) {
        self.send(queue, INTERRUPT, self.file, &[&[0; 8]], 0);
    }

    /// Rings all queues, waits until all requests have been served, and returns what that took of the device. The replies are
    /// still to be looked at.
    pub fn serve(&mut self) -> Cost {
        let (start, cpu) = (Instant::now(), cpu_time_of_others());
        let queues = self.sent.len();
        (1..queues).filter(|queue| !self.sent[*queue].is_empty()).for_each(|queue| self.driver.ring(queue));
        for queue in 1..queues {
            for _ in 0..self.sent[queue].len() {
                while self.driver.used(queue).is_none() {
                    assert!(start.elapsed() < LIMIT, "the device does not answer");
                    // Its threads need the CPU more.
                    thread::sleep(Duration::from_micros(100));
                }
            }
        }
        let time = start.elapsed();
        Cost { time, cpu: cpu_time_of_others().saturating_sub(cpu) }
    }

    /// Checks the replies to what was served, and whether each is a success or this error.
    pub fn check(&mut self, error: i32) {
        for sent in &mut self.sent {
            while let Some(reply) = sent.pop_front() {
                let header: OutHeader =
                    *OutHeader::from_slice(&self.driver.read(reply, 16)).expect("a header");
                assert_eq!(header.error, -error);
            }
        }
    }

    /// The same for requests without a reply.
    pub fn forget(&mut self) {
        self.sent.iter_mut().for_each(VecDeque::clear);
    }

    /// Sends one request and returns the reply.
    fn call(&mut self, code: u32, node: u64, parts: &[&[u8]]) -> Vec<u8> {
        self.send(0, code, node, parts, 0x80);
        self.serve();
        let reply = self.sent[1][0];
        self.check(0);
        let len = u32::from_le_bytes(self.driver.read(reply, 4).try_into().expect("4 bytes"));
        self.driver.read(reply + 16, len as usize - 16)
    }

    /// Puts a request in a queue as Linux does: the header, the arguments, the header of the reply, the rest of it.
    fn send(&mut self, queue: usize, code: u32, node: u64, parts: &[&[u8]], room: u32) {
        let queue = queue + 1;
        let slot = ((queue - 1) * IN_FLIGHT + self.sent[queue].len()) as u64;
        let (request, reply) = (BUFFERS + slot * SLOT, BUFFERS + slot * SLOT + REPLY);
        let arguments: usize = parts.iter().map(|part| part.len()).sum();
        let header = InHeader {
            len: 40 + arguments as u32,
            opcode: code,
            unique: slot + 1,
            nodeid: node,
            ..InHeader::default()
        };
        self.driver.write(request, header.as_slice());
        let mut at = request + 40;
        for part in parts {
            self.driver.write(at, part);
            at += part.len() as u64;
        }
        let chain = [
            readable(request, 40),
            readable(request + 40, arguments as u32),
            writable(reply, 16),
            writable(reply + 16, room),
        ];
        self.driver.add(queue, if room > 0 { &chain } else { &chain[..3] });
        self.sent[queue].push_back(reply);
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.device.reset();
    }
}
