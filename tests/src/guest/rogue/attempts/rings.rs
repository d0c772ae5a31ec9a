//! Rings where none can be, indices that jump, and registers of queues that are written at the wrong time.

use super::chains::Places;
use super::{Act, Attempt};
use crate::guest::Failure;
use crate::guest::rogue::device::{
    Answer, Descriptor, Device, FEATURES, PATIENCE, QUEUE_SIZE, REPLY, REQUESTS, Rings, SHORT, common,
};
use crate::guest::rogue::fuse::{MAP_READ, ROOT};
use crate::guest::rogue::{Expected, Rogue};

/// Where the rings of the queue for requests are put, and what comes of the first request.
type Case = (&'static str, Expected, fn(Places, Rings) -> Rings);

const CASES: [Case; 13] = {
    use Expected::{NeedsReset, Unused};
    [
        ("a table beyond RAM", NeedsReset, |p, rings| Rings { table: p.end, ..rings }),
        ("a table across the end of RAM", NeedsReset, |p, rings| Rings { table: p.end - 64, ..rings }),
        ("a table at the end of all addresses", NeedsReset, |_, rings| Rings { table: !15, ..rings }),
        ("a table in registers", NeedsReset, |p, rings| Rings { table: p.registers, ..rings }),
        ("a table from a hole into the window", Unused, |p, rings| Rings { table: p.window - 64, ..rings }),
        ("an available ring beyond RAM", NeedsReset, |p, rings| Rings { available: p.end, ..rings }),
        ("an available ring at no address", NeedsReset, |_, rings| Rings { available: !15, ..rings }),
        ("an available ring in registers", NeedsReset, |p, rings| Rings { available: p.registers, ..rings }),
        ("an available ring from a hole", NeedsReset, |p, rings| Rings { available: p.window - 64, ..rings }),
        ("an available ring at an odd address", NeedsReset, |_, rings| Rings {
            available: rings.available + 1,
            ..rings
        }),
        ("a used ring beyond RAM", NeedsReset, |p, rings| Rings { used: p.end, ..rings }),
        ("a used ring in registers", NeedsReset, |p, rings| Rings { used: p.registers, ..rings }),
        ("a used ring from a hole", NeedsReset, |p, rings| Rings { used: p.window - 64, ..rings }),
    ]
};

pub fn attempts() -> Vec<Attempt> {
    let cases = CASES.map(|(what, expected, rings)| {
        Attempt::new("rings", what, move |rogue| {
            let device = &mut rogue.device;
            let rings = rings(Places::of(device, 0)?, device.rings(REQUESTS));
            device.start_with(FEATURES, rings)?;
            let answer = device.send(&Device::init_message(7))?;
            rogue.expect(what, expected, answer);
            Ok(())
        })
    });
    let jumps = [QUEUE_SIZE + 1, 0x8000, u16::MAX].map(|index| {
        Attempt::new("rings", &format!("an available index of {index}"), move |rogue| {
            // The requests so far have brought it to somewhere else.
            rogue.device.start()?;
            rogue.device.set_available(REQUESTS, index);
            rogue.device.ring(REQUESTS)?;
            let answer = rogue.device.answer(PATIENCE)?;
            rogue.expect(format!("index {index}"), Expected::NeedsReset, answer);
            Ok(())
        })
    });
    let heads = [QUEUE_SIZE, 5000, u16::MAX].map(|head| {
        Attempt::new("rings", &format!("a head of {head}"), move |rogue| {
            rogue.device.offer(REQUESTS, head);
            rogue.device.ring(REQUESTS)?;
            let answer = rogue.device.answer(PATIENCE)?;
            rogue.expect(format!("head {head}"), Expected::NeedsReset, answer);
            Ok(())
        })
    });
    let more: [(&str, Act); 9] = [
        ("an index that goes back", goes_back),
        ("the same chain in all of the ring", same_chain),
        ("all rings at one place", one_place),
        ("a table in the window", table_in_window),
        ("a used ring in a read-only file", used_in_file),
        ("sizes that cannot be", sizes),
        ("registers of queues written to a device that lives", rewritten),
        ("queues that do not exist", no_queue),
        ("no queues at all", none_enabled),
    ];
    let more = more.map(|(what, run)| Attempt::new("rings", what, run));
    cases.into_iter().chain(jumps).chain(heads).chain(more).collect()
}

fn goes_back(rogue: &mut Rogue) -> Result<(), Failure> {
    let used = rogue.device.used(REQUESTS);
    rogue.device.set_available(REQUESTS, used.wrapping_sub(1));
    rogue.device.ring(REQUESTS)?;
    let answer = rogue.device.answer(PATIENCE)?;
    rogue.expect("an index that goes back", Expected::NeedsReset, answer);
    Ok(())
}

/// As many as the ring holds, all the same chain: each is carried out.
fn same_chain(rogue: &mut Rogue) -> Result<(), Failure> {
    let device = &mut rogue.device;
    device.start()?;
    let chain = device.put(&Device::init_message(7));
    device.write_table(REQUESTS, &chain);
    (0..QUEUE_SIZE).for_each(|_| device.offer(REQUESTS, 0));
    device.ring(REQUESTS)?;
    for _ in 0..QUEUE_SIZE {
        let answer = rogue.device.answer(PATIENCE)?;
        rogue.expect("one of many", Expected::Done, answer);
    }
    Ok(())
}

/// The device reads as a table and as an available ring what it has written as a used ring.
fn one_place(rogue: &mut Rogue) -> Result<(), Failure> {
    let device = &mut rogue.device;
    let table = device.rings(REQUESTS).table;
    device.start_with(FEATURES, Rings { table, available: table, used: table })?;
    let chain = device.put(&Device::init_message(7));
    device.write_table(REQUESTS, &chain);
    device.ring(REQUESTS)?;
    let answer = device.answer(SHORT)?;
    rogue.expect("all rings at one place", Expected::Anything, answer);
    Ok(())
}

fn table_in_window(rogue: &mut Rogue) -> Result<(), Failure> {
    let device = &mut rogue.device;
    let rings = device.rings(REQUESTS);
    device.start_with(FEATURES, Rings { table: device.window_address + 4096, ..rings })?;
    let chain = device.put(&Device::init_message(7));
    device.window.write_bytes(4096, &Descriptor::bytes(&chain))?;
    let answer = device.exchange(&chain)?;
    rogue.expect("a table in the window", Expected::Done, answer);
    // A session that begins makes the table a hole again, or leaves what was there; and so does a file over it.
    let big = rogue.device.lookup(ROOT, "big");
    let shown = big.and_then(|big| rogue.device.map(big, 0, 0, MAP_READ));
    rogue.expect("a file over the table", Expected::Anything, shown.unwrap_or(Answer::Silence));
    Ok(())
}

/// The device writes its used ring over a file of another share, which may only be read. The host looks whether it changed.
fn used_in_file(rogue: &mut Rogue) -> Result<(), Failure> {
    let file = rogue.read_only.lookup(ROOT, "file")?;
    let answer = rogue.read_only.map(file, 0, 0, MAP_READ)?;
    rogue.expect("SETUPMAPPING", Expected::Done, answer);
    let used = rogue.read_only.window_address;
    let device = &mut rogue.device;
    let rings = device.rings(REQUESTS);
    device.start_with(FEATURES, Rings { used, ..rings })?;
    let chain = device.put(&Device::init_message(7));
    device.memory.fill(REPLY, 16, 0);
    device.post(&chain)?;
    let answer = device.await_reply()?;
    rogue.expect("the reply", Expected::Done, answer);
    rogue.read_only.read_file()
}

fn sizes(rogue: &mut Rogue) -> Result<(), Failure> {
    let device = &mut rogue.device;
    device.reset()?;
    device.negotiate(FEATURES)?;
    device.set(common::QUEUE_SELECT, 2, REQUESTS.into())?;
    let most = device.get(common::QUEUE_SIZE, 2)?;
    for size in [0, 3, 129, most * 2, 0x8000, 0xffff] {
        rogue.device.set(common::QUEUE_SIZE, 2, size)?;
        let found = rogue.device.get(common::QUEUE_SIZE, 2)?;
        rogue.expect_value(format!("the size after {size} was written"), most, found);
    }
    rogue.device.set(common::QUEUE_ENABLE, 2, 2)?;
    let enabled = rogue.device.get(common::QUEUE_ENABLE, 2)?;
    rogue.expect_value("enabled by 2", 0, enabled);
    Ok(())
}

/// What the registers of a queue that lives are, and stay.
fn rewritten(rogue: &mut Rogue) -> Result<(), Failure> {
    let registers = [
        (common::QUEUE_SIZE, 2),
        (common::QUEUE_VECTOR, 2),
        (common::QUEUE_ENABLE, 2),
        (common::QUEUE_DESC, 8),
        (common::QUEUE_DRIVER, 8),
        (common::QUEUE_DEVICE, 8),
        (common::QUEUE_DESC + 4, 4),
        (common::QUEUE_DRIVER, 4),
        (common::QUEUE_DEVICE, 4),
    ];
    for queue in 0..=REQUESTS {
        rogue.device.set(common::QUEUE_SELECT, 2, queue.into())?;
        for (register, width) in registers {
            let before = rogue.device.get(register, width)?;
            for value in [0, 2, 64, 0x1000, u64::MAX] {
                rogue.device.set(register, width, value)?;
                let after = rogue.device.get(register, width)?;
                rogue.expect_value(format!("register {register} after {value:#x}"), before, after);
            }
        }
    }
    rogue.device.read_file()
}

fn no_queue(rogue: &mut Rogue) -> Result<(), Failure> {
    let queues = rogue.device.get(common::NUM_QUEUES, 2)?;
    for queue in [queues, 64, 0x8000, 0xffff] {
        rogue.device.set(common::QUEUE_SELECT, 2, queue)?;
        for register in [common::QUEUE_SIZE, common::QUEUE_ENABLE] {
            rogue.device.set(register, 2, 1)?;
            let found = rogue.device.get(register, 2)?;
            rogue.expect_value(format!("register {register} of queue {queue}"), 0, found);
        }
        for register in [common::QUEUE_DESC, common::QUEUE_DRIVER, common::QUEUE_DEVICE] {
            rogue.device.set(register, 8, 0x1000)?;
        }
    }
    // Doorbells of all that there could be.
    let (start, len) = (rogue.device.notify.offset, rogue.device.notify.len);
    for at in (0..len).step_by(64).chain([len - 4, len - 2]) {
        rogue.device.registers.write(start + at, 2, 0xffff)?;
    }
    rogue.device.read_file()
}

fn none_enabled(rogue: &mut Rogue) -> Result<(), Failure> {
    let device = &mut rogue.device;
    device.reset()?;
    device.negotiate(FEATURES)?;
    device.go()?;
    let chain = device.put(&Device::init_message(7));
    device.post(&chain)?;
    let answer = device.answer(SHORT)?;
    rogue.expect("a queue that is not enabled", Expected::Silence, answer);
    Ok(())
}
