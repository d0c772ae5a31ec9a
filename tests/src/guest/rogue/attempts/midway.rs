//! What is changed while requests are on their way.

use std::thread;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{Opcode, ReadIn};
use vm_memory::ByteValued;

use super::{Act, Attempt};
use crate::guest::Failure;
use crate::guest::rogue::device::{
    Answer, BULK, BULK_SIZE, Descriptor, Device, INDIRECT_TABLE, NEXT, PATIENCE, QUEUE_SIZE, REQUESTS, SHORT,
    WRITE,
};
use crate::guest::rogue::function::{BUS_MASTER, COMMAND, MEMORY_SPACE};
use crate::guest::rogue::fuse::{Asker, ROOT, message};
use crate::guest::rogue::{Expected, Rogue};

pub fn attempts() -> Vec<Attempt> {
    let changes: [(&str, Act); 6] = [
        ("a reset", reset),
        ("a reset, again and again", resets),
        ("no memory space", no_memory_space),
        ("a window that goes", window_goes),
        ("descriptors rewritten", rewritten),
        ("a session that begins", session_begins),
    ];
    changes.map(|(what, run)| Attempt::new("midway", what, run)).into()
}

/// As many requests as the ring holds, each for a MiB of the big file, to be written to a guest-physical address.
fn flood(device: &mut Device, address: u64) -> Result<(), Failure> {
    let big = device.lookup(ROOT, "big")?;
    let fh = device.open(big, libc::O_RDONLY)?;
    let ask = ReadIn { fh, size: BULK_SIZE, ..ReadIn::default() };
    let [request, header] =
        device.put(&message(Asker::default(), Opcode::Read as u32, big, &[ask.as_slice()]));
    let header = Descriptor { len: 16, flags: NEXT | WRITE, next: 2, ..header };
    let data = Descriptor { address, len: BULK_SIZE, flags: WRITE, next: 0 };
    device.write_table(REQUESTS, &[request, header, data]);
    (0..QUEUE_SIZE - 1).for_each(|_| device.offer(REQUESTS, 0));
    device.ring(REQUESTS)
}

/// A device that was reset has stopped: it writes nothing any more.
fn expect_quiet(rogue: &mut Rogue) -> Result<(), Failure> {
    rogue.device.memory.fill(BULK, BULK_SIZE as usize, 0xa5);
    rogue.device.ring(REQUESTS)?;
    thread::sleep(Duration::from_millis(50));
    let has_changed = rogue.device.memory.read(BULK, BULK_SIZE as usize).iter().any(|byte| *byte != 0xa5);
    rogue.expect_value("whether memory has changed", 0, has_changed.into());
    let used = rogue.device.used(REQUESTS);
    rogue.expect_value("the used ring", 0, used.into());
    Ok(())
}

fn reset(rogue: &mut Rogue) -> Result<(), Failure> {
    let place = rogue.device.memory.physical(BULK);
    flood(&mut rogue.device, place)?;
    rogue.device.reset()?;
    expect_quiet(rogue)
}

fn resets(rogue: &mut Rogue) -> Result<(), Failure> {
    let place = rogue.device.memory.physical(BULK);
    for round in 0..8 {
        flood(&mut rogue.device, place)?;
        thread::sleep(Duration::from_micros(300 * round));
        rogue.device.set_status(0)?;
        rogue.device.set_status(0)?;
        rogue.device.start()?;
        rogue.device.init()?;
        rogue.tried.answers += 1;
    }
    Ok(())
}

fn no_memory_space(rogue: &mut Rogue) -> Result<(), Failure> {
    let place = rogue.device.memory.physical(BULK);
    flood(&mut rogue.device, place)?;
    for command in [0, MEMORY_SPACE, BUS_MASTER, 0, MEMORY_SPACE | BUS_MASTER] {
        rogue.device.function.write(COMMAND, 2, command)?;
    }
    for _ in 0..QUEUE_SIZE - 1 {
        let answer = rogue.device.answer(PATIENCE)?;
        rogue.expect("READ", Expected::Done, answer);
    }
    Ok(())
}

/// Requests write to the window, which goes away: the device asks for a reset as soon as it meets what is not there.
fn window_goes(rogue: &mut Rogue) -> Result<(), Failure> {
    let place = rogue.device.window_address;
    for round in 0..4 {
        flood(&mut rogue.device, place)?;
        thread::sleep(Duration::from_micros(500 * round));
        rogue.device.function.move_bar(2, u64::MAX)?;
        // Chains that had begun are carried out.
        let mut answer = rogue.device.answer(PATIENCE)?;
        for _ in 0..QUEUE_SIZE {
            if !matches!(answer, Answer::Done(_)) {
                break;
            }
            answer = rogue.device.answer(SHORT)?;
        }
        rogue.expect("READ into what is gone", Expected::Anything, answer);
        rogue.device.function.move_bar(2, place)?;
        rogue.device.start()?;
        rogue.device.init()?;
    }
    Ok(())
}

/// The descriptors are other ones each time that the device looks.
fn rewritten(rogue: &mut Rogue) -> Result<(), Failure> {
    let place = rogue.device.memory.physical(BULK);
    flood(&mut rogue.device, place)?;
    let nonsense = Descriptor { address: u64::MAX, len: u32::MAX, flags: 0xffff, next: 1 };
    let window = Descriptor { address: rogue.device.window_address, len: BULK_SIZE, flags: WRITE, next: 0 };
    for round in 0..200 {
        let other = [nonsense, window][round % 2];
        rogue.device.write_table(REQUESTS, &[other, window, other]);
    }
    let answer = rogue.device.answer(SHORT)?;
    rogue.expect("descriptors that change", Expected::Anything, answer);
    Ok(())
}

/// The queue of high priority begins sessions while requests are served on the other.
fn session_begins(rogue: &mut Rogue) -> Result<(), Failure> {
    let place = rogue.device.memory.physical(BULK);
    flood(&mut rogue.device, place)?;
    let device = &mut rogue.device;
    let init = Device::init_message(7);
    let [request, reply] = device.chain(init.len());
    // The other queue's request and reply are where they belong.
    device.memory.write(INDIRECT_TABLE, &init);
    let request = Descriptor { address: device.memory.physical(INDIRECT_TABLE), ..request };
    let reply = Descriptor { address: device.memory.physical(INDIRECT_TABLE + 0x1000), len: 4096, ..reply };
    device.write_table(0, &[request, reply]);
    for _ in 0..5 {
        device.offer(0, 0);
        device.ring(0)?;
        thread::sleep(Duration::from_micros(500));
    }
    // A request finds its file, or that its session has ended.
    for _ in 0..QUEUE_SIZE - 1 {
        let answer = rogue.device.answer(PATIENCE)?;
        rogue.expect("READ", Expected::Served, answer);
    }
    Ok(())
}
