//! Rings with anything in them, served by the devices' own handlers.

use std::sync::Arc;

use arbitrary::Unstructured;
use fuse_backend_rs::abi::fuse_abi::InHeader;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::{choose, guest, take};
use crate::interrupt::Interrupt;
use crate::virtio::block::{BlockConfig, BlockDevice};
use crate::virtio::console::fuzzing::serve as console;
use crate::virtio::device::ActiveQueue;
use crate::virtio::fs::abi::opcode;
use crate::virtio::fs::testing::{PER_FILE, ROOT};
use crate::virtio::rng::Entropy;
use crate::virtio::worker::{ChainError, ChainHandler};

/// Bytes of the guest's memory.
const MEMORY: u64 = 0x2_0000;
/// More chains than this are not served, though a driver may make as many available as it likes.
const MOST: usize = 64;

struct Silence;

impl Interrupt for Silence {
    fn trigger(&self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Any rings are served, or stop their queue with an error. What the device writes stays within the chain's buffers.
pub fn rings(data: &[u8]) {
    let mut source = Unstructured::new(data);
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
    let Some(mut queue) = queue(&memory, &mut source) else { return };
    // Refused chains end the queue, as they end its thread.
    let _ = match take::<u8>(&mut source) % 4 {
        0 => {
            let mut guest = guest(|_| ());
            guest.init(PER_FILE).unwrap();
            serve(&mut queue, &memory, |chain| guest.device.server.handle(&memory, chain))
        }
        1 => serve(&mut queue, &memory, |chain| Entropy.handle(&memory, chain)),
        2 => console(take(&mut source), &mut queue, &memory),
        _ => {
            let image = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
            image.as_file().set_len(64 << 10).unwrap();
            let (path, read_only) = (image.path().into(), take(&mut source));
            let config = BlockConfig { path, read_only, id: "fuzz".into(), queues: 1 };
            let mut handler = BlockDevice::new(config).unwrap().handler(u64::MAX);
            let served = serve(&mut queue, &memory, |chain| handler.handle(&memory, chain));
            assert_eq!(image.as_file().metadata().unwrap().len(), 64 << 10);
            served
        }
    };
}

fn serve<'m>(
    queue: &mut ActiveQueue,
    memory: &'m GuestMemoryMmap,
    mut handle: impl FnMut(virtio_queue::DescriptorChain<&'m GuestMemoryMmap>) -> Result<u32, ChainError>,
) -> Result<(), ChainError> {
    queue.ignore_driver(memory)?;
    for _ in 0..MOST {
        let Some(chain) = queue.next_chain(memory)? else { break };
        let (head, room) = (chain.head_index(), chain.clone().writable());
        let room: u64 = room.map(|descriptor| u64::from(descriptor.len())).sum();
        let written = handle(chain)?;
        assert!(u64::from(written) <= room, "{written} of {room}");
        queue.add_used(memory, head, written)?;
        queue.notify_driver(memory)?;
    }
    queue.listen_to_driver(memory).map(drop)
}

/// A queue with rings of any kind at any place, if the transport would start a device with it.
fn queue(memory: &GuestMemoryMmap, source: &mut Unstructured<'_>) -> Option<ActiveQueue> {
    let mut queue = Queue::new(64).unwrap();
    queue.set_size(choose(source, &[1, 2, 4, 16, 64]));
    let size = u64::from(queue.size());
    let (table, avail, used) = match take::<u8>(source) % 8 {
        // Anywhere: over one another, at the end of memory, beyond it.
        0 => (
            u64::from(take::<u16>(source)),
            u64::from(take::<u16>(source)),
            u64::from(take::<u16>(source)) << 2,
        ),
        1 => (take(source), take(source), take(source)),
        _ => (0, 0x1000, 0x2000),
    };
    queue.try_set_desc_table_address(GuestAddress(table)).ok()?;
    queue.try_set_avail_ring_address(GuestAddress(avail)).ok()?;
    queue.try_set_used_ring_address(GuestAddress(used)).ok()?;
    queue.set_event_idx(take(source));
    queue.set_ready(true);
    if !queue.is_valid(memory) {
        return None;
    }
    // Requests first, so that whatever else lies there is over them.
    write_requests(memory, source);
    for index in 0..size {
        write_descriptor(memory, table.wrapping_add(16 * index), source);
    }
    for index in 0..16 {
        // The tables of indirect descriptors.
        write_descriptor(memory, 0x4000 + 16 * index, source);
    }
    let count = take::<u8>(source);
    let available = if count.is_multiple_of(8) { take(source) } else { u16::from(count) % (size as u16 + 1) };
    write(memory, avail.wrapping_add(2), &available.to_le_bytes());
    for index in 0..size {
        let head = if take::<u8>(source).is_multiple_of(16) {
            take(source)
        } else {
            (index as u16 * 3) % size as u16
        };
        write(memory, avail.wrapping_add(4 + 2 * index), &u16::to_le_bytes(head));
    }
    let doorbell = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    Some(ActiveQueue { index: 0, queue, doorbell, interrupt: Arc::new(Silence) })
}

fn write_descriptor(memory: &GuestMemoryMmap, at: u64, source: &mut Unstructured<'_>) {
    let address = match take::<u8>(source) % 8 {
        0 => take(source),
        1 => MEMORY - u64::from(take::<u8>(source)),
        2 => 0x4000,
        _ => 0x8000 + 0x100 * u64::from(take::<u8>(source) % 128),
    };
    let len = match take::<u8>(source) % 8 {
        0 => take(source),
        1 => 0,
        2 => 16 * u32::from(take::<u8>(source) % 17),
        _ => choose(source, &[1, 16, 40, 44, 100, 512, 4096, 0x8000]),
    };
    // NEXT, WRITE, INDIRECT.
    let flags =
        if take::<u8>(source).is_multiple_of(8) { take(source) } else { u16::from(take::<u8>(source) % 8) };
    let next =
        if take::<u8>(source).is_multiple_of(16) { take(source) } else { u16::from(take::<u8>(source) % 64) };
    let raw = RawDescriptor::from(Descriptor::new(address, len, flags, next));
    let _ = memory.write_obj(raw, GuestAddress(at));
}

/// Headers of requests to a file system and to a disk, at every place where a descriptor is likely to point.
fn write_requests(memory: &GuestMemoryMmap, source: &mut Unstructured<'_>) {
    for slot in 0..16 {
        let at = 0x8000 + 0x800 * slot;
        let code = choose(source, &[opcode::LOOKUP, opcode::GETATTR, opcode::READDIRPLUS, opcode::INIT, 60]);
        let len = choose(source, &[40, 44, 56, 100, u32::MAX]);
        let header = InHeader { len, opcode: code, nodeid: ROOT, ..Default::default() };
        write(memory, at, header.as_slice());
        // struct virtio_blk_outhdr: type, reserved, sector.
        let kind = u32::from(take::<u8>(source) % 16);
        write(
            memory,
            at + 0x100,
            &[&kind.to_le_bytes()[..], &[0; 4], &take::<u16>(source).to_le_bytes()].concat(),
        );
    }
}

fn write(memory: &GuestMemoryMmap, at: u64, bytes: &[u8]) {
    let _ = memory.write_slice(bytes, GuestAddress(at));
}
