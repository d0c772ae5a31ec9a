//! Rings that break the rules, before the device's own threads: the queue ends and asks for a reset, or gives the chain
//! back; and after a reset all is as before.

use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{InHeader, InitIn};
use tempfile::TempDir;
use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use vm_memory::ByteValued;

use crate::virtio::device::VirtioDevice;
use crate::virtio::fs::abi::{init, opcode};
use crate::virtio::fs::policy::Policy;
use crate::virtio::fs::{FileSystemConfig, FileSystemDevice};
use crate::virtio::testing::{BUFFERS, FakeDriver, MEMORY_SIZE, readable, wait_for, writable};

const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// A table of indirect descriptors, a request, and where its reply goes.
const INDIRECT_TABLE: u64 = BUFFERS + 0x1_0000;
const REQUEST: u64 = BUFFERS;
const REPLY: u64 = BUFFERS + 0x2000;

fn device(share: &TempDir) -> FileSystemDevice {
    FileSystemDevice::new(FileSystemConfig {
        tag: "rings".into(),
        path: share.path().into(),
        read_only: false,
        window_size: 32 << 20,
        policy: Policy::Always,
        prefault: Default::default(),
        cache: Default::default(),
        request_queues: 1,
        descriptors: 100,
    })
    .unwrap()
}

fn init_request() -> Vec<u8> {
    let ask = InitIn { major: 7, minor: 36, max_readahead: 0, flags: init::MAP_ALIGNMENT as u32 };
    let header = InHeader { len: 56, opcode: opcode::INIT, unique: 1, ..Default::default() };
    [header.as_slice(), ask.as_slice()].concat()
}

fn put(driver: &FakeDriver, table: u64, descriptors: &[(u64, u32, u16, u16)]) {
    for (index, (address, len, flags, next)) in (0..).zip(descriptors) {
        let raw = RawDescriptor::from(Descriptor::new(*address, *len, *flags, *next));
        driver.write(table + 16 * index, raw.as_slice());
    }
}

/// What becomes of chain 0 of such descriptors, with such an indirect table: whether the queue has asked for a reset, or
/// how many bytes the reply had.
fn outcome(
    device: &mut FileSystemDevice,
    chain: &[(u64, u32, u16, u16)],
    indirect: &[(u64, u32, u16, u16)],
) -> Result<u32, &'static str> {
    let mut driver = FakeDriver::new(device, 0);
    driver.write(REQUEST, &init_request());
    put(&driver, driver.table(1), chain);
    put(&driver, INDIRECT_TABLE, indirect);
    driver.write(driver.available_ring(1) + 4, &[0, 0]);
    driver.write(driver.available_ring(1) + 2, &[1, 0]);
    driver.ring(1);
    let mut used = None;
    wait_for("the queue", || {
        used = used.or_else(|| driver.used(1));
        used.is_some() || driver.resets() > 0
    });
    device.reset();
    used.map(|(head, len)| (head == 0).then_some(len).unwrap()).ok_or("reset")
}

/// A chain as a driver makes it, which must work whatever was before.
fn is_alive(device: &mut FileSystemDevice) {
    let good = [(REQUEST, 56, NEXT, 1), (REPLY, 80, WRITE, 0)];
    assert_eq!(outcome(device, &good, &[]), Ok(80));
}

#[test]
fn chains_that_break_the_rules_end_their_queue_or_come_back() {
    let share = TempDir::new().unwrap();
    let mut device = device(&share);
    is_alive(&mut device);
    let table_len = 2 * 16;
    type Chain<'a> = &'a [(u64, u32, u16, u16)];
    let good: Chain = &[(REQUEST, 56, NEXT, 1), (REPLY, 80, WRITE, 0)];
    let loops: [(&str, Chain, Chain); 13] = [
        ("a chain that ends in itself", &[(REQUEST, 56, NEXT, 0)], &[]),
        ("a circle of two", &[(REQUEST, 56, NEXT, 1), (REPLY, 80, NEXT | WRITE, 0)], &[]),
        ("a next that does not exist", &[(REQUEST, 56, NEXT, 1024)], &[]),
        ("a next beyond all", &[(REQUEST, 56, NEXT, u16::MAX)], &[]),
        (
            "an indirect table in an indirect table",
            &[(INDIRECT_TABLE, table_len, INDIRECT, 0)],
            &[(INDIRECT_TABLE, table_len, INDIRECT, 0), (REPLY, 80, WRITE, 0)],
        ),
        (
            "a circle in an indirect table",
            &[(INDIRECT_TABLE, table_len, INDIRECT, 0)],
            &[(REQUEST, 56, NEXT, 1), (REPLY, 80, NEXT | WRITE, 0)],
        ),
        (
            "a next behind an indirect table's end",
            &[(INDIRECT_TABLE, table_len, INDIRECT, 0)],
            &[(REQUEST, 56, NEXT, 7)],
        ),
        ("an indirect table of no descriptors", &[(INDIRECT_TABLE, 0, INDIRECT, 0)], good),
        ("an indirect table of one and a half", &[(INDIRECT_TABLE, 24, INDIRECT, 0)], good),
        ("an indirect table of 4 GiB", &[(INDIRECT_TABLE, !15, INDIRECT, 0)], good),
        ("an indirect table beyond memory", &[(MEMORY_SIZE - 16, table_len, INDIRECT, 0)], good),
        ("an indirect table at no address", &[(u64::MAX - 15, table_len, INDIRECT, 0)], good),
        ("an indirect descriptor with a next", &[(INDIRECT_TABLE, table_len, INDIRECT | NEXT, 1)], good),
    ];
    for (what, chain, indirect) in loops {
        let outcome = outcome(&mut device, chain, indirect);
        assert!(matches!(outcome, Err("reset") | Ok(0..=80)), "{what}: {outcome:?}");
        is_alive(&mut device);
    }
    // A good one comes from an indirect table, too.
    assert_eq!(outcome(&mut device, &[(INDIRECT_TABLE, table_len, INDIRECT, 0)], good), Ok(80));
    for (what, chain) in [
        ("a buffer beyond memory", [(MEMORY_SIZE, 56, NEXT, 1), (REPLY, 80, WRITE, 0)]),
        ("a buffer across the end", [(MEMORY_SIZE - 8, 56, NEXT, 1), (REPLY, 80, WRITE, 0)]),
        ("a buffer at no address", [(u64::MAX - 10, 56, NEXT, 1), (REPLY, 80, WRITE, 0)]),
        ("a reply in a hole", [(REQUEST, 56, NEXT, 1), (1 << 40, 80, WRITE, 0)]),
        ("a reply of 4 GiB", [(REQUEST, 56, NEXT, 1), (REPLY, u32::MAX, WRITE, 0)]),
        ("a request of 4 GiB", [(REQUEST, u32::MAX, NEXT, 1), (REPLY, 80, WRITE, 0)]),
    ] {
        // virtio-queue ends a chain where it becomes longer than 4 GiB; then there is no room for a reply.
        let outcome = outcome(&mut device, &chain, &[]);
        assert!(matches!(outcome, Err("reset") | Ok(0)), "{what}: {outcome:?}");
        is_alive(&mut device);
    }
    for (what, chain) in [
        ("nothing to read", &[(REPLY, 80, WRITE, 0)][..]),
        ("lengths of nothing", &[(REQUEST, 0, NEXT, 1), (REPLY, 0, WRITE, 0)]),
        ("nothing to write", &[(REQUEST, 56, 0, 0)]),
        ("what is written before what is read", &[(REPLY, 80, WRITE | NEXT, 1), (REQUEST, 56, 0, 0)]),
    ] {
        let outcome = outcome(&mut device, chain, &[]);
        assert!(matches!(outcome, Err("reset") | Ok(0 | 80)), "{what}: {outcome:?}");
        is_alive(&mut device);
    }
}

#[test]
fn an_available_index_beyond_the_ring_ends_the_queue() {
    let share = TempDir::new().unwrap();
    let mut device = device(&share);
    for index in [1025u16, 0x8000, u16::MAX] {
        let driver = FakeDriver::new(&mut device, 0);
        driver.write(driver.available_ring(1) + 2, &index.to_le_bytes());
        driver.ring(1);
        wait_for("the call for a reset", || driver.resets() == 1);
        device.reset();
        is_alive(&mut device);
    }
    // A head that is no descriptor of the table.
    let driver = FakeDriver::new(&mut device, 0);
    driver.write(driver.available_ring(1) + 4, &5000u16.to_le_bytes());
    driver.write(driver.available_ring(1) + 2, &[1, 0]);
    driver.ring(1);
    wait_for("the call for a reset", || driver.resets() == 1);
    device.reset();
    is_alive(&mut device);
}

#[test]
fn a_reset_in_the_middle_of_requests_ends_them_and_starts_afresh() {
    let share = TempDir::new().unwrap();
    let mut device = device(&share);
    let mut in_the_middle = 0;
    // How long the first chains take, and so when the middle is, depends on the machine: delays grow from round to round.
    for round in 0..60u32 {
        let mut driver = FakeDriver::new(&mut device, 0);
        driver.write(REQUEST, &init_request());
        for chain in 0..400 {
            driver.add(1, &[readable(REQUEST, 56), writable(REPLY + 0x100 * (chain % 16), 80)]);
        }
        driver.ring(1);
        match round {
            // As soon as the device has begun.
            0..30 => wait_for("the first chain", || driver.used(1).is_some()),
            _ => std::thread::sleep(Duration::from_micros(1 << (round % 15))),
        }
        device.reset();
        // Nothing is served any more, and no interrupt comes.
        let mut served = u32::from(round < 30);
        while driver.used(1).is_some() {
            served += 1;
        }
        let interrupts = driver.interrupts(1);
        driver.ring(1);
        std::thread::sleep(Duration::from_millis(2));
        assert!(served <= 400 && driver.used(1).is_none());
        assert_eq!((driver.interrupts(1), driver.resets()), (interrupts, 0));
        in_the_middle += u32::from((1..400).contains(&served));
    }
    assert!(in_the_middle > 0, "no reset came in the middle of the requests");
    is_alive(&mut device);
}
