//! The device as the transport sees it, with real queues and threads.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use fuse_backend_rs::abi::fuse_abi::{InHeader, InitIn, InitOut, OutHeader};
use tempfile::TempDir;
use virtio_queue::Queue;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::MockSplitQueue;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::virtio::device::{Activation, ActiveQueue, DeviceMemory, VirtioDevice};
use crate::virtio::fs::abi::{init, opcode};
use crate::virtio::fs::policy::{Policy, Prefault};
use crate::virtio::fs::testing::FakeGuest;
use crate::virtio::fs::{FileSystemConfig, FileSystemDevice, MAX_REQUEST_QUEUES};
use crate::virtio::testing::{Bell, wait_for};

fn config(path: &Path) -> FileSystemConfig {
    FileSystemConfig {
        tag: "share".into(),
        path: path.into(),
        read_only: false,
        window_size: 64 << 20,
        policy: Policy::Always,
        prefault: Prefault::default(),
        cache: crate::virtio::fs::CacheMode::default(),
        request_queues: 2,
        descriptors: 1_000,
    }
}

/// What the device says of a configuration that cannot be.
fn refusal(change: impl FnOnce(&mut FileSystemConfig)) -> String {
    let directory = TempDir::new().unwrap();
    let mut config = config(directory.path());
    change(&mut config);
    FileSystemDevice::new(config).err().expect("the configuration is refused").to_string()
}

#[test]
fn bad_configurations_are_refused_with_the_fix() {
    assert!(refusal(|config| config.tag = String::new()).contains("1 to 36 bytes"));
    assert!(refusal(|config| config.tag = "t".repeat(37)).contains("1 to 36 bytes"));
    assert!(refusal(|config| config.tag = "nul\0".into()).contains("no NUL"));
    assert!(refusal(|config| config.path = "/does/not/exist".into()).contains("/does/not/exist"));
    assert!(refusal(|config| config.path = "/proc/self/maps".into()).contains("directory that exists"));
    assert!(refusal(|config| config.window_size = 33 << 20).contains("32M or 34M"));
    assert!(refusal(|config| config.request_queues = 0).contains("not 0"));
    assert!(refusal(|config| config.request_queues = MAX_REQUEST_QUEUES + 1).contains("1 to 64"));
}

#[test]
fn the_transport_sees_tag_queues_and_window() {
    let directory = TempDir::new().unwrap();
    let mut config = config(directory.path());
    config.tag = "\u{e9}".repeat(18);
    let device = FileSystemDevice::new(config).unwrap();
    assert_eq!(device.device_type(), 26);
    assert_eq!(device.features(), 0);
    assert_eq!(device.queue_max_sizes(), [128, 1024, 1024]);

    let mut space = [0xff; 64];
    device.read_config(0, &mut space);
    assert_eq!(&space[..36], "\u{e9}".repeat(18).as_bytes());
    assert_eq!(space[36..40], [2, 0, 0, 0]);
    assert_eq!(space[40..], [0; 24]);
    let mut word = [0xff; 4];
    device.read_config(36, &mut word);
    assert_eq!(word, [2, 0, 0, 0]);
    for offset in [40, 41, u64::MAX] {
        device.read_config(offset, &mut word);
        assert_eq!(word, [0; 4]);
    }

    let window = device.shared_memory().unwrap();
    assert_eq!((window.id, window.memory.size()), (0, 64 << 20));
}

#[test]
fn a_share_without_a_window_has_no_shared_memory() {
    let directory = TempDir::new().unwrap();
    let config = FileSystemConfig { window_size: 0, ..config(directory.path()) };
    assert!(FileSystemDevice::new(config).unwrap().shared_memory().is_none());
}

#[test]
fn a_link_to_a_directory_can_be_shared_and_moved() {
    let outer = TempDir::new().unwrap();
    let link = outer.path().join("link");
    let mut guest = FakeGuest::with(|config| {
        std::os::unix::fs::symlink(&config.path, &link).unwrap();
        config.path = link.clone();
    });
    guest.host_file("file", 1);
    std::fs::remove_file(&link).unwrap();
    // The directory is found again in each session without its path.
    for _ in 0..2 {
        guest.init(!0).unwrap();
        assert!(guest.lookup(1, "file").is_ok());
    }
}

/// INIT through a ring, twice, with a reset between; then a chain that stops the queue.
#[test]
fn queues_are_served_by_threads_until_reset() {
    const REQUEST: u64 = 0x1_0000;
    const REPLY: u64 = 0x2_0000;
    let directory = TempDir::new().unwrap();
    let mut device = FileSystemDevice::new(config(directory.path())).unwrap();
    for round in 0..3u64 {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        let queue = MockSplitQueue::new(&memory, 16);
        let doorbell = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let bell = Arc::new(Bell::default());
        let resets = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&resets);
        let active = ActiveQueue {
            index: 1,
            queue: queue.create_queue::<Queue>().unwrap(),
            doorbell: doorbell.try_clone().unwrap(),
            interrupt: bell.clone(),
        };
        let activation = Activation {
            memory: DeviceMemory::new(memory.clone()),
            features: 0,
            queues: vec![active],
            needs_reset: Arc::new(move || {
                counted.fetch_add(1, Ordering::SeqCst);
            }),
        };
        device.activate(activation).unwrap();

        let ask = InitIn { major: 7, minor: 36, max_readahead: 0, flags: init::MAP_ALIGNMENT as u32 };
        let header = InHeader { len: 56, opcode: opcode::INIT, unique: round, ..Default::default() };
        memory.write_slice(&[header.as_slice(), ask.as_slice()].concat(), GuestAddress(REQUEST)).unwrap();
        // In the last round the reply is to go where there is no memory.
        let reply = if round < 2 { REPLY } else { 1 << 40 };
        let descriptors =
            [Descriptor::new(REQUEST, 56, 1, 1), Descriptor::new(reply, 80, 2, 0)].map(RawDescriptor::from);
        queue.add_desc_chains(&descriptors, 0).unwrap();
        doorbell.write(1).unwrap();

        if round < 2 {
            wait_for("the reply", || queue.used().idx().load() == 1);
            wait_for("the interrupt", || bell.count() == 1);
            let header: OutHeader = memory.read_obj(GuestAddress(REPLY)).unwrap();
            assert_eq!((header.len, header.error, header.unique), (80, 0, round));
            let out: InitOut = memory.read_obj(GuestAddress(REPLY + 16)).unwrap();
            assert_eq!(out.map_alignment, 21);
        } else {
            wait_for("the call for a reset", || resets.load(Ordering::SeqCst) == 1);
            assert_eq!(queue.used().idx().load(), 0);
        }
        device.reset();
        assert_eq!(device.counters().snapshot().requests["INIT"], (round + 1).min(2));
    }
}
