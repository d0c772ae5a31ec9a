//! BARs where they must not answer, and away from where they did, of a device that lives.

use super::{Act, Attempt};
use crate::guest::data::fill;
use crate::guest::rogue::device::{BULK, Device, PATIENCE, REQUESTS, common, status};
use crate::guest::rogue::function::{BUS_MASTER, COMMAND, FIRST_BAR};
use crate::guest::rogue::fuse::{CHUNK, MAP_READ, ROOT};
use crate::guest::rogue::io::Io;
use crate::guest::rogue::{Expected, Rogue};
use crate::guest::{Failure, SHARED_BIG};

/// Status of a device that lives.
const ALIVE: u64 = 0xf;

/// Where a BAR is put.
type Place = fn(&Rogue) -> u64;

/// Places for BAR 0 at which nothing must answer.
const FOR_REGISTERS: [(&str, Place); 10] = [
    ("registers over RAM", |rogue| rogue.device.memory.physical(BULK)),
    ("registers at zero", |_| 0),
    ("registers over the local APIC", |_| 0xfee0_0000),
    ("registers over the I/O APIC", |_| 0xfec0_0000),
    ("registers over configuration space", |_| 0xe000_0000),
    ("registers over those of another device", |rogue| rogue.read_only.function.bar(0)),
    ("registers over their own window", |rogue| rogue.device.window_address),
    ("registers over another's window", |rogue| rogue.read_only.window_address),
    ("registers beyond all addresses", |_| 1 << 52),
    ("registers at the last address", |_| u64::MAX),
];

/// Places for the window.
const FOR_WINDOW: [(&str, Place); 8] = [
    ("a window over RAM", |_| 32 << 20),
    ("a window at zero", |_| 0),
    ("a window over the local APIC", |_| 0xfe00_0000),
    ("a window over configuration space", |_| 0xe000_0000),
    ("a window over the registers of all devices", |rogue| rogue.device.function.bar(0)),
    ("a window over another's", |rogue| rogue.read_only.window_address),
    ("a window beyond all addresses", |_| 1 << 52),
    ("a window at the last address", |_| u64::MAX),
];

pub fn attempts() -> Vec<Attempt> {
    let registers = FOR_REGISTERS
        .map(|(what, place)| Attempt::new("bars", what, move |rogue| move_registers(rogue, place(rogue))));
    let window = FOR_WINDOW
        .map(|(what, place)| Attempt::new("bars", what, move |rogue| move_window(rogue, place(rogue))));
    let more: [(&str, Act); 5] = [
        ("registers elsewhere and back", registers_elsewhere),
        ("a window elsewhere and back", window_elsewhere),
        ("sizes asked for while it lives", sizing),
        ("no memory space", no_memory_space),
        ("halves of addresses", halves),
    ];
    registers
        .into_iter()
        .chain(window)
        .chain(more.map(|(what, run)| Attempt::new("bars", what, run)))
        .collect()
}

/// Where a window is looked at, and what the big file has there.
const SHOWN: u64 = CHUNK + 64;
const IN_FILE: u64 = 64;

/// Shows the big file in a window.
fn show(device: &mut Device) -> Result<(), Failure> {
    let big = device.lookup(ROOT, "big")?;
    device.map(big, 0, CHUNK, MAP_READ).map(drop)
}

/// Notes a word of a window if it is not the file's.
fn expect_shown(rogue: &mut Rogue, what: &str, found: u64) {
    let mut expected = [0; 8];
    fill(SHARED_BIG.seed, IN_FILE, &mut expected);
    rogue.expect_value(what, u64::from_le_bytes(expected), found);
}

/// What must be as it was, wherever a BAR of the one device went: memory, and the other device.
fn expect_others(rogue: &mut Rogue) -> Result<(), Failure> {
    let memory = rogue.device.memory.read(BULK, 0x8000);
    let has_changed = memory.iter().any(|byte| *byte != 0x5a);
    rogue.expect_value("whether RAM has changed", 0, has_changed.into());
    let found = rogue.read_only.window.read(SHOWN, 8)?;
    expect_shown(rogue, "the other window", found);
    rogue.read_only.read_file()
}

fn move_registers(rogue: &mut Rogue, place: u64) -> Result<(), Failure> {
    rogue.device.memory.fill(BULK, 0x8000, 0x5a);
    show(&mut rogue.read_only)?;
    rogue.device.function.move_bar(rogue.device.common.bar, place)?;
    let status = rogue.device.status()?;
    rogue.expect_value("the status where the registers were", status::NOBODY, status);
    rogue.device.set(common::STATUS, 1, 0)?;
    expect_others(rogue)?;
    let (bar, back) = (rogue.device.common.bar, rogue.device.function.bar(rogue.device.common.bar));
    rogue.device.function.move_bar(bar, back)?;
    let status = rogue.device.status()?;
    rogue.expect_value("the status when they are back", ALIVE, status);
    rogue.device.read_file()
}

fn move_window(rogue: &mut Rogue, place: u64) -> Result<(), Failure> {
    rogue.device.memory.fill(BULK, 0x8000, 0x5a);
    show(&mut rogue.read_only)?;
    show(&mut rogue.device)?;
    rogue.device.function.move_bar(2, place)?;
    let found = rogue.device.window.read(SHOWN, 8)?;
    rogue.expect_value("where the window was", u64::MAX, found);
    let status = rogue.device.status()?;
    rogue.expect_value("the status", ALIVE, status);
    expect_others(rogue)?;
    rogue.device.function.move_bar(2, rogue.device.window_address)?;
    expect_own(rogue, "the window when it is back")?;
    rogue.device.read_file()
}

fn expect_own(rogue: &mut Rogue, what: &str) -> Result<(), Failure> {
    let found = rogue.device.window.read(SHOWN, 8)?;
    expect_shown(rogue, what, found);
    Ok(())
}

/// A free place is as good as the first one.
fn registers_elsewhere(rogue: &mut Rogue) -> Result<(), Failure> {
    let (bar, back) = (rogue.device.common.bar, rogue.device.function.bar(rogue.device.common.bar));
    let place = 0xd000_0000;
    rogue.device.function.move_bar(bar, place)?;
    let there = Io::physical(place, 0x1000)?;
    let status = there.read(rogue.device.common.offset + common::STATUS, 1)?;
    rogue.expect_value("the status elsewhere", ALIVE, status);
    // Its doorbells have gone with it.
    let chain = rogue.device.put(&Device::init_message(7));
    rogue.device.write_table(REQUESTS, &chain);
    rogue.device.offer(REQUESTS, 0);
    let doorbells = Io::physical(place + rogue.device.notify.offset, 0x1000)?;
    doorbells.write(4, 2, 1)?;
    let answer = rogue.device.answer(PATIENCE)?;
    rogue.expect("INIT", Expected::Done, answer);
    rogue.device.function.move_bar(bar, back)?;
    rogue.device.read_file()
}

fn window_elsewhere(rogue: &mut Rogue) -> Result<(), Failure> {
    show(&mut rogue.device)?;
    // Behind all other windows.
    let place = rogue.device.window_address + (4 << 30);
    rogue.device.function.move_bar(2, place)?;
    let there = Io::physical(place, 2 * CHUNK as usize)?;
    expect_shown(rogue, "the window elsewhere", there.read(SHOWN, 8)?);
    rogue.device.read_into(place, 4096)?;
    rogue.device.function.move_bar(2, rogue.device.window_address)?;
    expect_own(rogue, "the window when it is back")
}

fn sizing(rogue: &mut Rogue) -> Result<(), Failure> {
    show(&mut rogue.device)?;
    let device = &rogue.device;
    for bar in 0..6 {
        let register = FIRST_BAR + 4 * bar;
        let kept = device.function.read(register, 4)?;
        device.function.write(register, 4, 0xffff_ffff)?;
        device.function.read(register, 4)?;
        device.function.write(register, 4, kept)?;
    }
    let status = device.status()?;
    rogue.expect_value("the status", ALIVE, status);
    expect_own(rogue, "the window")?;
    rogue.device.read_file()
}

fn no_memory_space(rogue: &mut Rogue) -> Result<(), Failure> {
    show(&mut rogue.device)?;
    rogue.device.function.write(COMMAND, 2, BUS_MASTER)?;
    let (status, shown) = (rogue.device.status()?, rogue.device.window.read(SHOWN, 8)?);
    rogue.expect_value("the status", status::NOBODY, status);
    rogue.expect_value("the window", u64::MAX, shown);
    rogue.device.ring(REQUESTS)?;
    rogue.device.function.write(COMMAND, 2, 0xffff)?;
    expect_own(rogue, "the window when it is back")?;
    rogue.device.read_file()
}

/// Moved in two writes, a BAR passes places that nobody meant, in either order.
fn halves(rogue: &mut Rogue) -> Result<(), Failure> {
    show(&mut rogue.device)?;
    let at = FIRST_BAR + 8;
    let back = rogue.device.window_address;
    for (low, high) in [(0, 0), (back & 0xffff_ffff, 0xffff_ffff), (0xfe00_0000, 0), (0, back >> 32)] {
        let function = &rogue.device.function;
        function.write(at + 4, 4, high)?;
        function.write(at, 4, low)?;
        function.write(at, 4, back & 0xffff_ffff)?;
        function.write(at + 4, 4, back >> 32)?;
        expect_own(rogue, "the window when it is back")?;
    }
    rogue.device.read_file()
}
