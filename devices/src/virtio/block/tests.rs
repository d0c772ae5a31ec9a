//! Requests that a driver sends, and those that none does.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use tempfile::TempDir;
use virtio_queue::desc::split::Descriptor;
use vm_memory::ByteValued;

use super::request::{Header, MAX_DISCARD_RANGES, MAX_RANGE_SECTORS, ZeroRange};
use super::{BlockConfig, BlockDevice, DiskError};
use crate::virtio::device::VirtioDevice;
use crate::virtio::testing::{BUFFERS, FakeDriver, MEMORY_SIZE, readable, wait_for, writable};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const F_FLUSH: u64 = 1 << 9;

const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x100;
const DATA: u64 = BUFFERS + 0x1_0000;

/// Sectors of the test image.
const SECTORS: u64 = 2048;

struct Disk {
    directory: TempDir,
    device: BlockDevice,
    driver: FakeDriver,
}

fn config(path: &Path) -> BlockConfig {
    BlockConfig { path: path.into(), read_only: false, id: "disk0".into(), queues: 1 }
}

impl Disk {
    fn new() -> Disk {
        Disk::with(|_| ())
    }

    /// An image each of whose sectors is full of the lower half of its number.
    fn with(change: impl FnOnce(&mut BlockConfig)) -> Disk {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("image");
        let bytes: Vec<u8> = (0..SECTORS).flat_map(|sector| [sector as u8; 512]).collect();
        std::fs::write(&path, bytes).unwrap();
        let mut config = config(&path);
        change(&mut config);
        let mut device = BlockDevice::new(config).unwrap();
        let driver = FakeDriver::new(&mut device, F_FLUSH);
        Disk { directory, device, driver }
    }

    fn image(&self) -> File {
        let path = self.directory.path().join("image");
        File::options().read(true).write(true).open(path).unwrap()
    }

    fn header(&self, kind: u32, sector: u64) -> Descriptor {
        let header = Header { kind: kind.into(), sector: sector.into(), ..Header::default() };
        self.driver.write(HEADER, header.as_slice());
        readable(HEADER, 16)
    }

    /// Sends a chain whose last byte is the status at [`STATUS`]; returns that and the used length.
    fn send(&mut self, chain: &[Descriptor]) -> (u8, u32) {
        self.driver.write(STATUS, &[0xee]);
        self.driver.send(0, chain);
        let (_, used) = self.driver.wait_used(0);
        (self.driver.read(STATUS, 1)[0], used)
    }

    fn request(&mut self, kind: u32, sector: u64, data: &[Descriptor]) -> (u8, u32) {
        let mut chain = vec![self.header(kind, sector)];
        chain.extend(data);
        chain.push(writable(STATUS, 1));
        self.send(&chain)
    }

    /// Discards or writes zeroes: each range is its first sector, their number, and flags.
    fn zero(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let ranges = ranges.iter().map(|(sector, sectors, flags)| ZeroRange {
            sector: (*sector).into(),
            sectors: (*sectors).into(),
            flags: (*flags).into(),
        });
        let bytes: Vec<u8> = ranges.flat_map(|range| range.as_slice().to_vec()).collect();
        self.driver.write(DATA, &bytes);
        self.request(kind, 0, &[readable(DATA, bytes.len() as u32)]).0
    }

    /// What is in a sector of the image.
    fn sector(&self, sector: u64) -> [u8; 512] {
        let mut bytes = [0; 512];
        self.image().read_exact_at(&mut bytes, sector * 512).unwrap();
        bytes
    }
}

fn refusal(path: &Path, read_only: bool) -> DiskError {
    BlockDevice::new(BlockConfig { read_only, ..config(path) }).err().expect("the image is refused")
}

#[test]
fn files_that_cannot_be_disks_are_refused_with_the_fix() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("image");
    assert!(refusal(&path, false).to_string().contains("raw image or a block device that exists"));
    std::fs::write(&path, [0; 1000]).unwrap();
    let message = refusal(&path, false).to_string();
    assert!(message.contains("1000 bytes") && message.contains("truncate --size=%512 "), "{message}");
    std::fs::write(&path, []).unwrap();
    assert!(refusal(&path, true).to_string().contains("empty: `truncate --size=1G "));
    assert!(matches!(refusal(directory.path(), true), DiskError::Kind(_)));
    assert!(matches!(refusal(Path::new("/dev/null"), false), DiskError::Kind(_)));
    let fifo = directory.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    // To open it would wait for a reader; that this test ends is a part of the test.
    assert!(matches!(refusal(&fifo, false), DiskError::Kind(_)));
}

#[test]
fn an_image_belongs_to_one_writer_or_to_readers() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("image");
    std::fs::write(&path, [0; 512]).unwrap();
    let open = |read_only| BlockDevice::new(BlockConfig { read_only, ..config(&path) });
    let writer = open(false).unwrap();
    assert!(matches!(refusal(&path, false), DiskError::Locked { .. }));
    assert!(refusal(&path, true).to_string().contains("another VM may write to it"));
    drop(writer);
    let readers = [open(true).unwrap(), open(true).unwrap()];
    assert!(refusal(&path, false).to_string().contains("another VM may use it"));
    drop(readers);
    open(false).unwrap();
}

#[test]
fn the_transport_sees_the_disk() {
    let disk = Disk::with(|config| config.queues = 4);
    let word = |at: u64| {
        let mut bytes = [0; 4];
        disk.device.read_config(at, &mut bytes);
        u32::from_le_bytes(bytes)
    };
    assert_eq!((disk.device.device_type(), disk.device.queue_max_sizes()), (2, &[256; 4][..]));
    let bits = [2, 6, 9, 10, 12, 13, 14];
    assert_eq!(disk.device.features(), bits.iter().map(|bit| 1 << bit).sum::<u64>());
    assert_eq!((word(0), word(4), word(12), word(20)), (SECTORS as u32, 0, 254, 512));
    let physical = disk.image().metadata().unwrap().blksize().min(4096) / 512;
    assert_eq!(u64::from(word(24)), u64::from(physical.ilog2()) | physical << 16);
    assert_eq!(word(32) >> 16, 4);
    assert_eq!((word(36), word(40), word(44)), (128 << 10, 32, physical as u32));
    assert_eq!((word(48), word(52), word(56)), (128 << 10, 1, 1));
    assert_eq!((word(60), word(u64::MAX)), (0, 0));
    let disk = Disk::with(|config| config.read_only = true);
    assert_eq!(disk.device.features(), [2, 5, 6, 9, 10, 12].iter().map(|bit| 1 << bit).sum::<u64>());
}

#[test]
fn sectors_are_read_and_written_in_pieces_of_any_size() {
    let mut disk = Disk::new();
    // Sectors 3 to 6, in pieces.
    let lens = [1u32, 0, 511, 700, 836];
    let mut at = DATA;
    let mut pieces = Vec::new();
    for len in lens {
        pieces.push(writable(at, len));
        at += u64::from(len) + 100;
    }
    assert_eq!(disk.request(IN, 3, &pieces), (OK, 2049));
    let mut got = Vec::new();
    let mut at = DATA;
    for len in lens {
        got.extend(disk.driver.read(at, len as usize));
        assert_eq!(disk.driver.read(at + u64::from(len), 100), [0; 100]);
        at += u64::from(len) + 100;
    }
    assert_eq!(got, [[3; 512], [4; 512], [5; 512], [6; 512]].concat());

    disk.driver.write(DATA, &[b'w'; 1024]);
    assert_eq!(disk.request(OUT, 7, &[readable(DATA, 1000), readable(DATA + 1000, 24)]), (OK, 1));
    assert_eq!(disk.sector(6), [6; 512]);
    assert_eq!([disk.sector(7), disk.sector(8)], [[b'w'; 512]; 2]);
    assert_eq!(disk.sector(9), [9; 512]);
    assert_eq!(disk.request(FLUSH, 0, &[]), (OK, 1));
    let counters = disk.device.counters().snapshot();
    assert_eq!((counters.reads, counters.bytes_read), (1, 2048));
    assert_eq!((counters.writes, counters.bytes_written), (1, 1024));
    assert_eq!((counters.flushes, counters.failed), (1, 0));
}

#[test]
fn header_and_status_may_share_buffers_with_data() {
    let mut disk = Disk::new();
    let header = Header { kind: OUT.into(), sector: 1.into(), ..Header::default() };
    disk.driver.write(DATA, &[header.as_slice(), &[b'x'; 512]].concat());
    let chain = [readable(DATA, 5), readable(DATA + 5, 523), writable(STATUS, 1)];
    assert_eq!(disk.send(&chain), (OK, 1));
    assert_eq!(disk.sector(1), [b'x'; 512]);
    // The status is the last byte that the device may write, and not after the data.
    let header = disk.header(IN, 2);
    disk.driver.write(DATA + 512, &[0xee]);
    disk.driver.send(0, &[header, writable(DATA, 513), writable(DATA, 0)]);
    assert_eq!(disk.driver.wait_used(0).1, 513);
    assert_eq!(disk.driver.read(DATA, 513), [&[2; 512][..], &[OK]].concat());
}

#[test]
fn a_request_may_have_more_pieces_than_a_system_call_takes() {
    // An indirect table may be longer than the queue.
    const PIECES: u16 = 2048;
    let mut disk = Disk::new();
    let table = DATA + 0x10_0000;
    let header = disk.header(IN, 0);
    let data = (0..PIECES).map(|i| writable(DATA + u64::from(i) * 256, 256));
    let entries: Vec<_> = [header].into_iter().chain(data).chain([writable(STATUS, 1)]).collect();
    for (i, entry) in (0..).zip(&entries) {
        let flags = entry.flags() | u16::from(usize::from(i) + 1 < entries.len());
        let entry = Descriptor::new(entry.addr().0, entry.len(), flags, i + 1);
        disk.driver
            .write(table + 16 * u64::from(i), virtio_queue::desc::RawDescriptor::from(entry).as_slice());
    }
    let indirect = Descriptor::new(table, 16 * entries.len() as u32, 4, 0);
    assert_eq!(disk.send(&[indirect]), (OK, u32::from(PIECES) * 256 + 1));
    let expected: Vec<u8> = (0..1024u32).flat_map(|sector| [sector as u8; 512]).collect();
    assert!(disk.driver.read(DATA, expected.len()) == expected);
}

#[test]
fn sectors_that_are_not_on_the_disk_are_refused() {
    let mut disk = Disk::new();
    for sector in [SECTORS, SECTORS - 1, u64::MAX, u64::MAX / 512, u64::MAX / 512 + 1, 1 << 55, 1 << 63] {
        assert_eq!(disk.request(IN, sector, &[writable(DATA, 1024)]), (IOERR, 1), "{sector:#x}");
        assert_eq!(disk.request(OUT, sector, &[readable(DATA, 1024)]), (IOERR, 1), "{sector:#x}");
        assert_eq!(disk.zero(DISCARD, &[(0, 1, 0), (sector, 2, 0)]), IOERR, "{sector:#x}");
        assert_eq!(disk.zero(WRITE_ZEROES, &[(sector, 2, 0)]), IOERR, "{sector:#x}");
    }
    // Nothing of them was done.
    assert_eq!(disk.image().metadata().unwrap().len(), SECTORS * 512);
    assert_eq!(disk.driver.read(DATA, 1024)[32..], [0; 992]);
    assert_eq!(disk.sector(SECTORS - 1), [(SECTORS - 1) as u8; 512]);
    assert_eq!(disk.driver.resets(), 0);
}

#[test]
fn a_disk_that_is_read_only_is_not_changed() {
    let mut disk = Disk::with(|config| config.read_only = true);
    assert_eq!(disk.request(IN, 5, &[writable(DATA, 512)]), (OK, 513));
    assert_eq!(disk.request(OUT, 5, &[readable(STATUS + 64, 512)]), (IOERR, 1));
    assert_eq!(disk.zero(DISCARD, &[(5, 1, 0)]), IOERR);
    assert_eq!(disk.zero(WRITE_ZEROES, &[(5, 1, 1)]), IOERR);
    assert_eq!(disk.request(FLUSH, 0, &[]), (OK, 1));
    assert_eq!(disk.sector(5), [5; 512]);
}

#[test]
fn the_id_is_cut_and_padded() {
    for (id, shown) in [("disk0", "disk0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"), (&"x".repeat(30), &"x".repeat(20))]
    {
        let mut disk = Disk::with(|config| config.id = id.to_owned());
        assert_eq!(disk.request(GET_ID, 0, &[writable(DATA, 20)]), (OK, 21));
        assert_eq!(disk.driver.read(DATA, 20), shown.as_bytes());
        assert_eq!(disk.request(GET_ID, 0, &[writable(DATA + 64, 3)]), (OK, 4));
        assert_eq!(disk.driver.read(DATA + 64, 4), [&shown.as_bytes()[..3], &[0]].concat());
    }
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    let mut disk = Disk::new();
    let before = disk.image().metadata().unwrap().blocks();
    assert_eq!(disk.zero(DISCARD, &[(256, 512, 0), (2, 1, 0), (9, 0, 0)]), OK);
    assert!(disk.image().metadata().unwrap().blocks() <= before - 512);
    assert_eq!([disk.sector(256), disk.sector(767), disk.sector(2)], [[0; 512]; 3]);
    assert_eq!([disk.sector(1), disk.sector(3), disk.sector(9)], [[1; 512], [3; 512], [9; 512]]);
    assert_eq!(disk.zero(WRITE_ZEROES, &[(1024, 8, 1)]), OK);
    assert_eq!(disk.zero(WRITE_ZEROES, &[(1040, 8, 0)]), OK);
    assert_eq!([disk.sector(1024), disk.sector(1031), disk.sector(1040)], [[0; 512]; 3]);
    assert_eq!(disk.sector(1032), [8; 512]);
    assert_eq!(disk.image().metadata().unwrap().len(), SECTORS * 512);
    for (kind, flags) in [(DISCARD, 1), (DISCARD, 2), (WRITE_ZEROES, 2), (WRITE_ZEROES, 3)] {
        assert_eq!(disk.zero(kind, &[(4, 1, flags)]), UNSUPP);
    }
    assert_eq!(disk.zero(DISCARD, &[]), IOERR);
    assert_eq!(disk.zero(DISCARD, &vec![(4, 1, 0); MAX_DISCARD_RANGES as usize + 1]), IOERR);
    assert_eq!(disk.request(DISCARD, 0, &[readable(DATA, 17)]), (IOERR, 1));
    assert_eq!(disk.sector(4), [4; 512]);
}

#[test]
fn no_request_zeroes_more_than_takes_a_moment() {
    let mut disk = Disk::with(|config| {
        let image = File::options().write(true).open(&config.path).unwrap();
        image.set_len(512 * (u64::from(MAX_RANGE_SECTORS) + 1)).unwrap();
    });
    for kind in [DISCARD, WRITE_ZEROES] {
        assert_eq!(disk.zero(kind, &[(0, MAX_RANGE_SECTORS + 1, 0)]), IOERR);
        assert_eq!(disk.sector(1), [1; 512]);
    }
    assert_eq!(disk.zero(WRITE_ZEROES, &[(1, 1, 0), (2, 1, 0)]), IOERR);
    assert_eq!([disk.sector(1), disk.sector(2)], [[1; 512], [2; 512]]);
    assert_eq!(disk.zero(WRITE_ZEROES, &[(0, MAX_RANGE_SECTORS, 1)]), OK);
    assert_eq!(disk.sector(1), [0; 512]);
}

#[test]
fn chains_of_no_sense_are_answered_as_far_as_they_can_be() {
    let mut disk = Disk::new();
    for kind in [2, 3, 5, 14, 15, 1000, u32::MAX] {
        assert_eq!(disk.request(kind, 0, &[readable(DATA, 512)]), (UNSUPP, 1));
    }
    // Data in the wrong direction is none; half sectors are none either.
    assert_eq!(disk.request(IN, 0, &[readable(DATA, 512)]), (OK, 1));
    assert_eq!(disk.request(OUT, 0, &[writable(DATA, 512)]).1, 1);
    assert_eq!(disk.request(IN, 0, &[writable(DATA, 511)]), (IOERR, 1));
    assert_eq!(disk.request(OUT, 0, &[readable(DATA, 513)]), (IOERR, 1));
    assert_eq!(disk.sector(0), [0; 512]);
    // No header, half of one, no status, nothing.
    assert_eq!(disk.send(&[writable(STATUS, 1)]), (IOERR, 1));
    assert_eq!(disk.send(&[readable(HEADER, 15), writable(STATUS, 1)]), (IOERR, 1));
    let header = disk.header(OUT, 1);
    assert_eq!(disk.send(&[header, readable(DATA, 512)]), (0xee, 0));
    assert_eq!(disk.send(&[readable(DATA, 0), writable(DATA, 0)]), (0xee, 0));
    assert_eq!(disk.sector(1), [1; 512]);
    assert_eq!(disk.driver.resets(), 0);
}

#[test]
fn buffers_outside_of_memory_need_a_reset() {
    for bad in [writable(MEMORY_SIZE - 1, 512), writable(u64::MAX, 512), readable(MEMORY_SIZE, 512)] {
        let mut disk = Disk::new();
        let header = disk.header(IN, 0);
        disk.driver.send(0, &[header, bad, writable(STATUS, 1)]);
        wait_for("the call for a reset", || disk.driver.resets() == 1);
        disk.device.reset();
        disk.driver = FakeDriver::new(&mut disk.device, F_FLUSH);
        assert_eq!(disk.request(IN, 9, &[writable(DATA, 512)]), (OK, 513));
    }
}

#[test]
fn an_image_that_has_become_shorter_fails_where_it_ends() {
    let mut disk = Disk::new();
    disk.image().set_len(512 * 10 + 100).unwrap();
    assert_eq!(disk.request(IN, 9, &[writable(DATA, 512)]), (OK, 513));
    assert_eq!(disk.request(IN, 9, &[writable(DATA, 1024)]), (IOERR, 1));
    assert_eq!(disk.device.counters().snapshot().failed, 1);
}

#[test]
fn data_in_memory_that_is_not_there_fails_and_ends_nothing() {
    let mut disk = Disk::new();
    let file = tempfile::tempfile().unwrap();
    file.set_len(8192).unwrap();
    // As a window shows a file which the host then truncates.
    let address = disk.driver.host_address(DATA);
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_FIXED);
    // SAFETY: the two pages are part of the driver's memory, into which nobody holds a reference.
    let mapped = unsafe { libc::mmap(address.cast(), 8192, protection, flags, file.as_raw_fd(), 0) };
    assert_ne!(mapped, libc::MAP_FAILED);
    file.set_len(4096).unwrap();
    assert_eq!(disk.request(IN, 0, &[writable(DATA, 8192)]), (IOERR, 1));
    assert_eq!(disk.request(OUT, 0, &[readable(DATA + 4096, 4096)]), (IOERR, 1));
    assert_eq!(disk.request(IN, 0, &[writable(DATA, 4096)]), (OK, 4097));
}

#[test]
fn a_driver_that_cannot_flush_can_still_write() {
    let mut disk = Disk::new();
    disk.device.reset();
    disk.driver = FakeDriver::new(&mut disk.device, 0);
    disk.driver.write(DATA, &[b'w'; 512]);
    assert_eq!(disk.request(OUT, 3, &[readable(DATA, 512)]), (OK, 1));
    assert_eq!(disk.zero(WRITE_ZEROES, &[(4, 1, 1)]), OK);
    assert_eq!([disk.sector(3), disk.sector(4)], [[b'w'; 512], [0; 512]]);
}

#[test]
fn all_queues_are_served() {
    let mut disk = Disk::with(|config| config.queues = 3);
    for queue in 0..3 {
        let header = disk.header(IN, queue as u64 + 1);
        disk.driver.send(queue, &[header, writable(DATA, 512), writable(STATUS, 1)]);
        assert_eq!(disk.driver.wait_used(queue).1, 513);
        assert_eq!(disk.driver.read(DATA, 512), [queue as u8 + 1; 512]);
        wait_for("the interrupt", || disk.driver.interrupts(queue) == 1);
    }
}
