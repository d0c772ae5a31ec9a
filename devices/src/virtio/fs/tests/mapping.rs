//! SETUPMAPPING and REMOVEMAPPING.

use std::os::unix::fs::{FileExt, PermissionsExt};
use std::process::Command;
use std::sync::{Arc, Barrier};

use fuse_backend_rs::abi::fuse_abi::{ReadIn, SetattrIn};
use fuse_backend_rs::abi::virtio_fs::SetupmappingIn;
use fuse_backend_rs::api::filesystem::SetattrValid;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::MockSplitQueue;
use vm_memory::mmap::MmapRegion;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::virtio::device::VirtioDevice;
use crate::virtio::fs::abi::{ATTR_DAX, init, opcode};
use crate::virtio::fs::policy::{Policy, Prefault};
use crate::virtio::fs::testing::{FakeGuest, PER_FILE, READ, ROOT, WRITE, descriptors_into};
use crate::virtio::fs::window::{CHUNK_SIZE, MIN_WINDOW_SIZE};

fn guest_with_file(policy: Policy, chunks: u64) -> (FakeGuest, u64) {
    let mut guest = FakeGuest::mounted(policy);
    guest.host_file("f", chunks);
    let nodeid = guest.lookup(ROOT, "f").unwrap().nodeid;
    (guest, nodeid)
}

/// What /proc/self/maps says of the files mapped from a share.
fn mapped_permissions(guest: &FakeGuest) -> Vec<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let directory = guest.directory.path().to_str().unwrap();
    let lines = maps.lines().filter(|line| line.contains(directory));
    lines.map(|line| line.split(' ').nth(1).unwrap().to_string()).collect()
}

#[test]
fn mapped_chunks_are_the_file() {
    let (mut guest, file) = guest_with_file(Policy::Always, 3);
    let descriptors = descriptors_into(&guest.directory);
    guest.setupmapping(file, 2 * CHUNK_SIZE, 0, READ).unwrap();
    guest.setupmapping(file, 0, MIN_WINDOW_SIZE - CHUNK_SIZE, READ | WRITE).unwrap();
    assert_eq!(guest.window(0), [b'f', 2]);
    assert_eq!(guest.window(MIN_WINDOW_SIZE - CHUNK_SIZE), [b'f', 0]);
    assert_eq!(descriptors_into(&guest.directory), descriptors + 1, "one for the file, to map it again");

    guest.write_window(MIN_WINDOW_SIZE - CHUNK_SIZE + 4096, *b"hi");
    assert_eq!(&std::fs::read(guest.path("f")).unwrap()[4096..4098], b"hi");

    guest.removemapping(2, &[(0, CHUNK_SIZE), (MIN_WINDOW_SIZE - CHUNK_SIZE, CHUNK_SIZE)]).unwrap();
    assert_eq!((guest.window(0), guest.window(MIN_WINDOW_SIZE - CHUNK_SIZE)), ([0; 2], [0; 2]));
    assert_eq!(descriptors_into(&guest.directory), descriptors);
    let window = guest.counters().window.unwrap();
    assert_eq!((window.setup_mappings, window.remove_mappings, window.mapped_chunks), (2, 2, 0));
}

#[test]
fn mappings_outlive_handles_and_inodes() {
    let (mut guest, file) = guest_with_file(Policy::Always, 1);
    let handle = guest.open(file, libc::O_RDONLY).unwrap().fh;
    guest.setupmapping(file, 0, 0, READ).unwrap();
    guest.release(file, handle).unwrap();
    guest.forget(file, 1);
    assert_eq!(guest.getattr(file, None).unwrap_err(), libc::EBADF);
    guest.unlink(ROOT, "f").unwrap();
    assert_eq!(guest.window(0), [b'f', 0]);
}

#[test]
fn a_chunk_is_upgraded_and_overlaid_in_place() {
    let (mut guest, file) = guest_with_file(Policy::Always, 2);
    std::fs::set_permissions(guest.path("f"), PermissionsExt::from_mode(0o755)).unwrap();
    guest.setupmapping(file, 0, 0, READ).unwrap();
    guest.setupmapping(file, 0, 0, READ | WRITE).unwrap();
    guest.write_window(0, *b"up");
    guest.setupmapping(file, CHUNK_SIZE, 0, READ).unwrap();
    assert_eq!(guest.window(0), [b'f', 1]);
    let window = guest.counters().window.unwrap();
    assert_eq!((window.setup_mappings, window.mapped_chunks), (3, 1));
    assert_eq!((window.upgraded_chunks, window.overlaid_chunks), (1, 1));
}

#[test]
fn data_is_mapped_writable_at_once_and_programs_are_not() {
    let (mut guest, file) = guest_with_file(Policy::Always, 1);
    guest.setupmapping(file, 0, 0, READ).unwrap();
    assert_eq!(mapped_permissions(&guest), ["rw-s"]);
    guest.removemapping(1, &[(0, CHUNK_SIZE)]).unwrap();

    std::fs::copy("/bin/true", guest.path("true")).unwrap();
    let program = guest.lookup(ROOT, "true").unwrap().nodeid;
    guest.setupmapping(program, 0, 0, READ).unwrap();
    assert_eq!(mapped_permissions(&guest), ["r--s"]);
    assert!(Command::new(guest.path("true")).status().unwrap().success());
}

#[test]
fn what_cannot_be_written_is_mapped_read_only() {
    // A program that runs cannot be opened for writing, not even by root, whatever its mode.
    let mut guest = FakeGuest::mounted(Policy::Always);
    std::fs::copy("/bin/sleep", guest.path("sleep")).unwrap();
    let mut child = Command::new(guest.path("sleep")).arg("60").spawn().unwrap();
    std::fs::set_permissions(guest.path("sleep"), PermissionsExt::from_mode(0o644)).unwrap();
    let file = guest.lookup(ROOT, "sleep").unwrap().nodeid;
    let read = guest.setupmapping(file, 0, 0, READ);
    let write = guest.setupmapping(file, 0, CHUNK_SIZE, READ | WRITE);
    let permissions = mapped_permissions(&guest);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!((read, write), (Ok(vec![]), Err(libc::ETXTBSY)));
    assert_eq!(permissions, ["r--s"]);
}

#[test]
fn a_writable_mapping_takes_the_set_id_bits() {
    let (mut guest, file) = guest_with_file(Policy::Always, 1);
    let mode = |guest: &FakeGuest| guest.path("f").metadata().unwrap().permissions().mode() & 0o7777;
    std::fs::set_permissions(guest.path("f"), PermissionsExt::from_mode(0o6755)).unwrap();
    guest.setupmapping(file, 0, 0, READ).unwrap();
    assert_eq!(mode(&guest), 0o6755);
    guest.setupmapping(file, 0, 0, READ | WRITE).unwrap();
    assert_eq!(mode(&guest), 0o755);
}

/// The window keeps a descriptor of the file, and no file is opened for its further chunks; but nothing else is left out.
#[test]
fn further_mappings_are_like_the_first() {
    // Capabilities, revision 2: CAP_CHOWN, permitted.
    const CHOWN: [u8; 20] = [0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    const NAME: &str = "security.capability";
    let (mut guest, file) = guest_with_file(Policy::Always, 4);
    let path = guest.path("f");
    guest.setupmapping(file, 0, 0, READ).unwrap();
    let descriptors = descriptors_into(&guest.directory);
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o4644)).unwrap();
    let has_capabilities = rustix::fs::setxattr(&path, NAME, &CHOWN, rustix::fs::XattrFlags::empty()).is_ok();
    if !has_capabilities {
        skipped!("in part: files cannot be given capabilities here");
    }
    let kept = |path: &std::path::Path| rustix::fs::getxattr(path, NAME, &mut [0; 32]).is_ok();
    guest.setupmapping(file, CHUNK_SIZE, CHUNK_SIZE, READ).unwrap();
    assert_eq!(
        (path.metadata().unwrap().permissions().mode() & 0o7777, kept(&path)),
        (0o4644, has_capabilities)
    );
    guest.setupmapping(file, 2 * CHUNK_SIZE, 2 * CHUNK_SIZE, READ | WRITE).unwrap();
    assert_eq!((path.metadata().unwrap().permissions().mode() & 0o7777, kept(&path)), (0o644, false));

    // It becomes a program: further chunks are read-only, until the client asks to write.
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    guest.setupmapping(file, 3 * CHUNK_SIZE, 5 * CHUNK_SIZE, READ).unwrap();
    assert_eq!(mapped_permissions(&guest), ["rw-s", "r--s"]);
    guest.setupmapping(file, 3 * CHUNK_SIZE, 5 * CHUNK_SIZE, READ | WRITE).unwrap();
    assert_eq!(mapped_permissions(&guest), ["rw-s", "rw-s"]);
    for chunk in [0, 1, 2] {
        assert_eq!(guest.window(chunk * CHUNK_SIZE), [b'f', chunk as u8]);
    }
    assert_eq!(guest.window(5 * CHUNK_SIZE), [b'f', 3]);
    assert_eq!(descriptors_into(&guest.directory), descriptors);
    let counters = guest.counters();
    assert_eq!(counters.window.unwrap().upgraded_chunks, 1);
    guest.removemapping(1, &[(0, MIN_WINDOW_SIZE)]).unwrap();
    assert_eq!(descriptors_into(&guest.directory), descriptors - 1);
}

#[test]
fn the_policy_is_asked_again() {
    let always_client = PER_FILE & !init::HAS_INODE_DAX;
    for (policy, offer, expected) in [
        (Policy::Always, PER_FILE, Ok(vec![])),
        (Policy::Always, always_client, Ok(vec![])),
        (Policy::Never, PER_FILE, Err(libc::EPERM)),
        (Policy::Never, always_client, Err(libc::EPERM)),
        // A client that did not negotiate a window has none to map into.
        (Policy::Always, 0, Err(libc::EPERM)),
    ] {
        let mut guest = FakeGuest::new(policy.clone());
        guest.init(offer).unwrap();
        guest.host_file("f", 1);
        let file = guest.lookup(ROOT, "f").unwrap().nodeid;
        assert_eq!(guest.setupmapping(file, 0, 0, READ), expected, "{policy} {offer:#x}");
        assert_eq!(guest.counters().window.unwrap().mapped_chunks, u64::from(expected.is_ok()));
    }
}

#[test]
fn bad_requests_to_map_are_refused() {
    let (mut guest, file) = guest_with_file(Policy::Always, 1);
    let top = u64::MAX - CHUNK_SIZE + 1;
    for (foffset, len, moffset) in [
        (0, 0, 0),
        (0, 4096, 0),
        (0, CHUNK_SIZE + 1, 0),
        (4096, CHUNK_SIZE, 0),
        (0, CHUNK_SIZE, 4096),
        (0, CHUNK_SIZE, MIN_WINDOW_SIZE),
        (0, 2 * CHUNK_SIZE, MIN_WINDOW_SIZE - CHUNK_SIZE),
        (0, CHUNK_SIZE, top),
        (0, top, CHUNK_SIZE),
        (0, u64::MAX, u64::MAX),
        (top, CHUNK_SIZE, 0),
        (1 << 63, CHUNK_SIZE, 0),
    ] {
        let outcome = guest.setupmapping_len(file, foffset, len, moffset, READ);
        assert_eq!(outcome, Err(libc::EINVAL), "{foffset:#x} {len:#x} {moffset:#x}");
    }
    for flags in [0, 4, READ | 8, u64::MAX] {
        assert_eq!(guest.setupmapping(file, 0, 0, flags), Err(libc::EINVAL));
    }
    for nodeid in [0, 12345, u64::MAX] {
        assert_eq!(guest.setupmapping(nodeid, 0, 0, READ), Err(libc::EBADF));
    }
    let short = SetupmappingIn::default();
    assert_eq!(guest.call(opcode::SETUPMAPPING, file, &[&short.as_slice()[..39]]), Err(libc::EINVAL));
    let window = guest.counters().window.unwrap();
    assert_eq!((window.setup_mappings, window.mapped_chunks), (0, 0));
}

#[test]
fn only_regular_files_are_mapped() {
    let mut guest = FakeGuest::mounted(Policy::Always);
    let directory = guest.mkdir(ROOT, "directory").unwrap().nodeid;
    let symlink = guest.symlink(ROOT, "symlink", "/etc/passwd").unwrap().nodeid;
    let fifo = guest.mknod(ROOT, "fifo", libc::S_IFIFO | 0o644).unwrap().nodeid;
    for nodeid in [ROOT, directory, symlink, fifo] {
        for flags in [READ, READ | WRITE] {
            assert_eq!(guest.setupmapping(nodeid, 0, 0, flags), Err(libc::EPERM));
        }
    }
}

#[test]
fn a_share_without_a_window_maps_nothing() {
    let mut guest = FakeGuest::with(|config| config.window_size = 0);
    guest.init(PER_FILE).unwrap();
    guest.host_file("f", 1);
    let file = guest.lookup(ROOT, "f").unwrap().nodeid;
    assert_eq!(guest.setupmapping(file, 0, 0, READ), Err(libc::ENODEV));
    assert_eq!(guest.removemapping(1, &[(0, CHUNK_SIZE)]), Err(libc::ENODEV));
}

#[test]
fn as_many_as_a_page_holds_are_removed_at_once() {
    let (mut guest, file) = guest_with_file(Policy::Always, 16);
    for chunk in 0..16 {
        guest.setupmapping(file, chunk * CHUNK_SIZE, chunk * CHUNK_SIZE, READ).unwrap();
    }
    assert_eq!(guest.counters().window.unwrap().mapped_chunks, 16);
    let entries: Vec<_> = (0..256).map(|entry| (entry % 16 * CHUNK_SIZE, CHUNK_SIZE)).collect();
    guest.removemapping(256, &entries).unwrap();
    let window = guest.counters().window.unwrap();
    assert_eq!((window.mapped_chunks, window.peak_mapped_chunks, window.remove_mappings), (0, 16, 256));
}

#[test]
fn bad_requests_to_remove_are_refused() {
    let (mut guest, file) = guest_with_file(Policy::Always, 1);
    guest.setupmapping(file, 0, 0, READ).unwrap();
    let entry = (0, CHUNK_SIZE);
    for count in [0, 2, 256, u32::MAX] {
        assert_eq!(guest.removemapping(count, &[entry]), Err(libc::EINVAL), "{count}");
    }
    assert_eq!(guest.removemapping(1, &[]), Err(libc::EINVAL));
    assert_eq!(guest.removemapping(0, &[]), Ok(vec![]));
    assert_eq!(guest.call(opcode::REMOVEMAPPING, ROOT, &[&[1, 0]]), Err(libc::EINVAL));
    assert_eq!(guest.window(0), [b'f', 0]);

    // What is right among the wrong is carried out.
    let beyond = (MIN_WINDOW_SIZE, CHUNK_SIZE);
    assert_eq!(guest.removemapping(3, &[beyond, entry, (0, u64::MAX)]), Err(libc::EINVAL));
    assert_eq!(guest.window(0), [0; 2]);
    assert_eq!(guest.counters().window.unwrap().remove_mappings, 1);
}

/// Guest memory that the window is a part of, at [`WINDOW`].
fn memory_with_window(guest: &FakeGuest) -> GuestMemoryMmap {
    let window = guest.device.shared_memory().unwrap().memory;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
    // SAFETY: the window has this address and size, and `guest` outlives the memory in each test.
    let region = unsafe {
        MmapRegion::build_raw(window.host_address(), window.size() as usize, protection, flags).unwrap()
    };
    let region = Arc::new(GuestRegionMmap::new(region, GuestAddress(WINDOW)).unwrap());
    guest.memory.insert_region(region).unwrap()
}

const WINDOW: u64 = 1 << 32;

#[test]
fn descriptors_may_point_into_the_window() {
    let (mut guest, file) = guest_with_file(Policy::Always, 2);
    guest.setupmapping(file, CHUNK_SIZE, 3 * CHUNK_SIZE, READ | WRITE).unwrap();
    let (entry, open) = guest.create(ROOT, "source", libc::O_RDWR).unwrap();
    guest.write(entry.nodeid, open.fh, 0, &[b's'; 4096]).unwrap();
    let memory = memory_with_window(&guest);
    let path = guest.path("f");

    // From one file into a chunk of another.
    let mut read_into = |address| {
        let ask = ReadIn { fh: open.fh, size: 4096, flags: libc::O_RDWR as u32, ..Default::default() };
        let message = guest.message(opcode::READ, entry.nodeid, &[ask.as_slice()]);
        memory.write_slice(&message, GuestAddress(0x10_0000)).unwrap();
        let descriptors = [
            Descriptor::new(0x10_0000, message.len() as u32, 0, 0),
            Descriptor::new(0x20_0000, 16, 2, 0),
            Descriptor::new(address, 4096, 2, 0),
        ];
        let queue = MockSplitQueue::new(&memory, 16);
        let chain = queue.build_desc_chain(&descriptors.map(RawDescriptor::from)).unwrap();
        assert_eq!(guest.device.server.handle(&memory, chain).unwrap(), 16 + 4096);
        memory.read_obj::<i32>(GuestAddress(0x20_0004)).unwrap()
    };
    assert_eq!(read_into(WINDOW + 3 * CHUNK_SIZE + 8192), 0);
    // A hole takes it, and nobody sees it.
    assert_eq!(read_into(WINDOW), 0);
    assert_eq!(&std::fs::read(&path).unwrap()[CHUNK_SIZE as usize + 8192..][..4096], [b's'; 4096]);
    // So does a file that the host has cut off, known or not known to be so.
    let host = std::fs::File::options().write(true).open(&path).unwrap();
    host.set_len(0).unwrap();
    for _ in 0..20 {
        assert_eq!(read_into(WINDOW + 3 * CHUNK_SIZE + 8192), 0);
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert_eq!(std::fs::read(&path).unwrap(), b"");
}

#[test]
fn queues_map_at_the_same_time() {
    let (mut guest, file) = guest_with_file(Policy::Always, 4);
    let messages: Vec<_> = (0..4u64)
        .map(|queue| {
            let (foffset, moffset) = (queue * CHUNK_SIZE, queue * CHUNK_SIZE);
            let ask = SetupmappingIn { fh: u64::MAX, foffset, len: CHUNK_SIZE, flags: READ, moffset };
            guest.message(opcode::SETUPMAPPING, file, &[ask.as_slice()])
        })
        .collect();
    let barrier = Barrier::new(messages.len());
    std::thread::scope(|scope| {
        for message in &messages {
            let (server, barrier) = (&guest.device.server, &barrier);
            scope.spawn(move || {
                let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
                memory.write_slice(message, GuestAddress(0x8000)).unwrap();
                let descriptors = [
                    RawDescriptor::from(Descriptor::new(0x8000, message.len() as u32, 0, 0)),
                    RawDescriptor::from(Descriptor::new(0x9000, 16, 2, 0)),
                ];
                barrier.wait();
                for _ in 0..200 {
                    let queue = MockSplitQueue::new(&memory, 16);
                    let chain = queue.build_desc_chain(&descriptors).unwrap();
                    assert_eq!(server.handle(&memory, chain).unwrap(), 16);
                    assert_eq!(memory.read_obj::<i32>(GuestAddress(0x9004)).unwrap(), 0);
                }
            });
        }
    });
    for chunk in 0..4 {
        assert_eq!(guest.window(chunk * CHUNK_SIZE), [b'f', chunk as u8]);
    }
    let window = guest.counters().window.unwrap();
    assert_eq!((window.mapped_chunks, window.setup_mappings), (4, 800));
}

/// The size that a reply tells is there when the reply is, though the host has shortened the file in between.
#[test]
fn growth_that_the_guest_makes_or_hears_of_is_there_at_once() {
    let (mut guest, file) = guest_with_file(Policy::Always, 1);
    let open = guest.open(file, libc::O_RDWR).unwrap();
    guest.setupmapping(file, 0, 0, READ | WRITE).unwrap();
    let host = std::fs::File::options().write(true).open(guest.path("f")).unwrap();
    let shorten = |guest: &FakeGuest| {
        let before = guest.counters().window.unwrap();
        host.set_len(100).unwrap();
        while guest.counters().window.unwrap().lost_pages == before.lost_pages {
            std::thread::yield_now();
        }
        assert_eq!(guest.window(8192), [0; 2]);
    };
    shorten(&guest);
    guest.write(file, open.fh, 8192, b"by WRITE").unwrap();
    assert_eq!(&guest.window(8192), b"by");

    host.set_len(CHUNK_SIZE).unwrap();
    guest.getattr(file, None).unwrap();
    shorten(&guest);
    host.write_at(b"on the host", 8192).unwrap();
    assert_eq!(guest.getattr(file, None).unwrap().size, 8192 + 11);
    assert_eq!(&guest.window(8192), b"on");

    host.set_len(CHUNK_SIZE).unwrap();
    guest.getattr(file, None).unwrap();
    shorten(&guest);
    host.write_at(b"LOOKUP", 8192).unwrap();
    guest.lookup(ROOT, "f").unwrap();
    assert_eq!(&guest.window(8192), b"LO");

    host.set_len(CHUNK_SIZE).unwrap();
    guest.getattr(file, None).unwrap();
    shorten(&guest);
    guest.fallocate(file, open.fh, 3 * 4096).unwrap();
    host.set_len(2 * 4096).unwrap();
    host.write_at(b"!", 8192).unwrap();
    guest.fallocate(file, open.fh, 3 * 4096).unwrap();
    assert_eq!(guest.window(8192), [b'!', 0]);
    let counters = guest.counters();
    assert_eq!((counters.window.unwrap().lost_files, counters.lost_paths.len()), (1, 1));
}

#[test]
fn what_the_guest_truncates_is_not_lost() {
    let (mut guest, file) = guest_with_file(Policy::Always, 2);
    guest.setupmapping(file, 0, 0, READ | WRITE).unwrap();
    for size in [4096, 0, CHUNK_SIZE] {
        guest
            .setattr(file, SetattrIn { valid: SetattrValid::SIZE.bits(), size, ..Default::default() })
            .unwrap();
    }
    guest.open(file, libc::O_RDWR | libc::O_TRUNC).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    let window = guest.counters().window.unwrap();
    assert_eq!((window.lost_files, window.lost_pages), (0, 0));
}

#[test]
fn each_file_has_an_account_of_its_chunks() {
    let (mut guest, file) = guest_with_file(Policy::Always, 3);
    guest.host_file("g", 1);
    let other = guest.lookup(ROOT, "g").unwrap().nodeid;
    for chunk in 0..3 {
        guest.setupmapping(file, chunk * CHUNK_SIZE, chunk * CHUNK_SIZE, READ).unwrap();
    }
    guest.removemapping(1, &[(CHUNK_SIZE, CHUNK_SIZE)]).unwrap();
    guest.setupmapping(other, 0, CHUNK_SIZE, READ).unwrap();
    guest.setupmapping(other, 0, 1, READ).unwrap_err();
    guest.removemapping(1, &[(1, CHUNK_SIZE)]).unwrap_err();

    let handle = guest.device.counters();
    assert_eq!(handle.chunk_owners()[..4], [1, 2, 1, 0]);
    let counters = guest.counters();
    let table = counters.files.unwrap();
    let brief: Vec<_> = table.files.iter().map(|file| (file.path.as_deref(), file.mapped_chunks)).collect();
    assert_eq!(brief, [(Some("f"), 2), (Some("g"), 1)]);
    assert_eq!((table.files[0].removed_chunks, table.churned_chunks), (1, 1));
    let requests = |name: &str| counters.requests[name];
    assert_eq!(counters.setup_latency.count, requests("SETUPMAPPING"), "those that failed too");
    assert_eq!(counters.remove_latency.count, requests("REMOVEMAPPING"));
    assert!(counters.setup_latency.sum_ns > 0);

    guest.destroy().unwrap();
    assert!(handle.chunk_owners().iter().all(|owner| *owner == 0));
    assert_eq!(handle.files(1).files[0].setup_mappings, 3);
}

/// A window of 16 chunks whose guest reads 32 files of a chunk by turns, until they are let go as DAX.
#[test]
fn a_window_that_thrashes_is_left_to_those_who_profit() {
    let mut guest = FakeGuest::mounted(Policy::Size(1));
    let nodes: Vec<_> = (0..32)
        .map(|n| {
            let name = format!("file {n}");
            guest.host_file(&name, 1);
            guest.lookup(ROOT, &name).unwrap().nodeid
        })
        .collect();
    std::fs::write(guest.path("small"), [0; 1000]).unwrap();
    let chunks = guest.counters().window.unwrap().size / CHUNK_SIZE;
    for (n, node) in nodes.iter().chain(&nodes).chain(&nodes).chain(&nodes).enumerate() {
        let at = n as u64 % chunks * CHUNK_SIZE;
        if n as u64 >= chunks {
            guest.removemapping(1, &[(at, CHUNK_SIZE)]).unwrap();
        }
        guest.setupmapping(*node, 0, at, READ).unwrap();
    }
    let thrash = guest.counters().thrash.unwrap();
    assert_eq!((thrash.level, thrash.peak_level, thrash.refaulted_chunks), (1, 1, 96));
    assert_eq!(thrash.sufficient_window, 40 * CHUNK_SIZE, "32 chunks, and a fifth that is free");
    let small = guest.lookup(ROOT, "small").unwrap();
    assert_eq!(small.attr.flags & ATTR_DAX, 0, "it would fill too little of its chunk");
    guest.host_file("large", 1);
    assert_eq!(guest.lookup(ROOT, "large").unwrap().attr.flags & ATTR_DAX, ATTR_DAX);
    let decided = guest.counters().decisions;
    assert!(decided.iter().any(|by| by.reason == "thrash" && !by.dax && by.count == 1), "{decided:?}");

    guest.destroy().unwrap();
    assert_eq!(guest.counters().thrash.unwrap().level, 0, "another session may do other things");
}

#[test]
fn mappings_that_the_policy_forbids_are_counted() {
    let (mut guest, file) = guest_with_file(Policy::Never, 1);
    assert_eq!(guest.setupmapping(file, 0, 0, READ).unwrap_err(), libc::EPERM);
    let counters = guest.counters();
    assert_eq!((counters.denied_mappings, counters.setup_latency.count), (1, 1));
    assert_eq!(counters.files.unwrap().files, []);
}

/// A file of a chunk that is in the page cache.
fn warm_file(guest: &FakeGuest, name: &str) {
    std::fs::write(guest.path(name), vec![1; CHUNK_SIZE as usize]).unwrap();
}

/// Bytes that were prefaulted, of each file in the order of its name.
fn prefault_bytes(guest: &FakeGuest) -> Vec<u64> {
    let mut files = guest.counters().files.unwrap().files;
    files.sort_by_key(|file| file.path.clone());
    files.iter().map(|file| file.prefault_bytes).collect()
}

#[test]
fn warm_pages_are_prefaulted_as_the_share_says() {
    for (prefault, expected) in
        [(Prefault::Never, 0), (Prefault::Cached, CHUNK_SIZE), (Prefault::All, CHUNK_SIZE)]
    {
        // With a client that asks what is DAX, and one that does not.
        for flags in [PER_FILE, PER_FILE & !init::HAS_INODE_DAX] {
            let mut guest = FakeGuest::with(|config| config.prefault = prefault);
            warm_file(&guest, "f");
            guest.init(flags).unwrap();
            let file = guest.lookup(ROOT, "f").unwrap().nodeid;
            guest.setupmapping(file, 0, 0, READ).unwrap();
            let window = guest.counters().window.unwrap();
            let times = u64::from(expected > 0);
            assert_eq!((window.prefaults, window.prefault_bytes), (times, expected), "{prefault}");
            assert_eq!(prefault_bytes(&guest), [expected], "{prefault}");
        }
    }
}

#[test]
fn warm_pages_are_prefaulted_as_a_rule_says() {
    let rules = "version = 1\ndefault = \"auto\"\n[[rule]]\npath = \"*.cold\"\ndax = \"allow\"\nprefault = \"never\"\n";
    let mut guest = FakeGuest::mounted(Policy::from_rules("r.toml", rules).unwrap());
    for (chunk, name) in ["a.warm", "b.cold"].into_iter().enumerate() {
        warm_file(&guest, name);
        let file = guest.lookup(ROOT, name).unwrap().nodeid;
        guest.setupmapping(file, 0, chunk as u64 * CHUNK_SIZE, READ).unwrap();
    }
    assert_eq!(prefault_bytes(&guest), [CHUNK_SIZE, 0]);
    // The file is another one for the rules when it is opened the next time.
    guest.rename(ROOT, "b.cold", "b.warm", 0).unwrap();
    let file = guest.lookup(ROOT, "b.warm").unwrap().nodeid;
    let handle = guest.open(file, libc::O_RDONLY).unwrap().fh;
    guest.setupmapping(file, 0, 2 * CHUNK_SIZE, READ).unwrap();
    guest.release(file, handle).unwrap();
    assert_eq!(prefault_bytes(&guest), [CHUNK_SIZE, CHUNK_SIZE]);
}
