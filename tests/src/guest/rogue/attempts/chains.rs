//! Chains of descriptors that break the rules, or lead where no memory is.

use std::fs;

use fuse_backend_rs::abi::fuse_abi::Opcode;

use super::Attempt;
use crate::guest::Failure;
use crate::guest::rogue::device::{
    Descriptor, Device, INDIRECT, INDIRECT_TABLE, NEXT, PATIENCE, QUEUE_SIZE, REPLY, REPLY_ROOM, REQUEST,
    WRITE,
};
use crate::guest::rogue::fuse::{Asker, MAP_READ, ROOT, message, nul};
use crate::guest::rogue::{Expected, Rogue};

/// Guest-physical addresses of places, and the length of the request.
#[derive(Clone, Copy)]
pub struct Places {
    pub request: u64,
    pub len: u32,
    pub reply: u64,
    /// A table of indirect descriptors, and the length of one with two.
    table: u64,
    table_len: u32,
    pub window: u64,
    /// The first address behind RAM.
    pub end: u64,
    pub registers: u64,
}

impl Places {
    pub fn of(device: &Device, len: usize) -> Result<Places, Failure> {
        Ok(Places {
            request: device.memory.physical(REQUEST),
            len: len as u32,
            reply: device.memory.physical(REPLY),
            table: device.memory.physical(INDIRECT_TABLE),
            table_len: 32,
            window: device.window_address,
            end: end_of_ram()?,
            registers: device.function.bar(device.common.bar),
        })
    }
}

/// The first address behind RAM: a line of /proc/iomem is `START-END : WHAT`.
fn end_of_ram() -> Result<u64, Failure> {
    let map = fs::read_to_string("/proc/iomem")?;
    let ends = map.lines().filter_map(|line| {
        let (range, what) = line.split_once(" : ")?;
        let (_, end) = range.split_once('-').filter(|_| what == "System RAM")?;
        u64::from_str_radix(end, 16).ok()
    });
    ends.max().map(|end| end + 1).ok_or_else(|| Failure::new("/proc/iomem has no RAM"))
}

/// Descriptors as address, length, flags and next.
type Table = Vec<(u64, u32, u16, u16)>;

/// A chain, the table of indirect descriptors beside it, and what comes of it.
type Case = (&'static str, Expected, fn(Places) -> (Table, Table));

/// A chain as it should be.
fn good(p: Places) -> Table {
    vec![(p.request, p.len, NEXT, 1), (p.reply, REPLY_ROOM, WRITE, 0)]
}

/// The same by a table of indirect descriptors of such a length at such a place.
fn indirect(p: Places, table: u64, len: u32) -> (Table, Table) {
    (vec![(table, len, INDIRECT, 0)], good(p))
}

fn reply_to(p: Places, address: u64, len: u32) -> (Table, Table) {
    (vec![(p.request, p.len, NEXT, 1), (address, len, WRITE, 0)], vec![])
}

fn request_from(p: Places, address: u64, len: u32) -> (Table, Table) {
    (vec![(address, len, NEXT, 1), (p.reply, REPLY_ROOM, WRITE, 0)], vec![])
}

const CASES: [Case; 37] = {
    use Expected::{Done, NeedsReset, Unused};
    [
        ("a chain that ends in itself", Unused, |p| (vec![(p.request, p.len, NEXT, 0)], vec![])),
        ("a circle of two", Done, |p| {
            (vec![(p.request, p.len, NEXT, 1), (p.reply, REPLY_ROOM, NEXT | WRITE, 0)], vec![])
        }),
        ("a next that does not exist", Unused, |p| (vec![(p.request, p.len, NEXT, QUEUE_SIZE)], vec![])),
        ("a next beyond all", Unused, |p| (vec![(p.request, p.len, NEXT, u16::MAX)], vec![])),
        ("an indirect table in an indirect table", Unused, |p| {
            let again = (p.table, p.table_len, INDIRECT, 0);
            (vec![again], vec![again, (p.reply, REPLY_ROOM, WRITE, 0)])
        }),
        ("a circle in an indirect table", Done, |p| {
            let circle = vec![(p.request, p.len, NEXT, 1), (p.reply, REPLY_ROOM, NEXT | WRITE, 0)];
            (vec![(p.table, p.table_len, INDIRECT, 0)], circle)
        }),
        ("a next behind an indirect table's end", Unused, |p| {
            (vec![(p.table, p.table_len, INDIRECT, 0)], vec![(p.request, p.len, NEXT, 7)])
        }),
        ("an indirect table of nothing", Unused, |p| indirect(p, p.table, 0)),
        ("an indirect table of one and a half", Unused, |p| indirect(p, p.table, 24)),
        ("an indirect table of 4 GiB", Unused, |p| indirect(p, p.table, !15)),
        ("an indirect table of 1 MiB", Unused, |p| indirect(p, p.table, 1 << 20)),
        ("an indirect table across the end of RAM", Unused, |p| indirect(p, p.end - 1, p.table_len)),
        ("an indirect table beyond RAM", Unused, |p| indirect(p, p.end, p.table_len)),
        ("an indirect table at no address", Unused, |p| indirect(p, u64::MAX - 15, p.table_len)),
        ("an indirect table in registers", Unused, |p| indirect(p, p.registers, p.table_len)),
        ("an indirect descriptor with a next", Done, |p| {
            (vec![(p.table, p.table_len, INDIRECT | NEXT, 1)], good(p))
        }),
        ("an indirect descriptor to write", Done, |p| {
            (vec![(p.table, p.table_len, INDIRECT | WRITE, 0)], good(p))
        }),
        ("a request beyond RAM", NeedsReset, |p| request_from(p, p.end, p.len)),
        ("a request across the end of RAM", NeedsReset, |p| request_from(p, p.end - 8, p.len)),
        ("a request at no address", NeedsReset, |p| request_from(p, u64::MAX - 10, p.len)),
        ("a request from registers", NeedsReset, |p| request_from(p, p.registers, p.len)),
        ("a request of 4 GiB", NeedsReset, |p| request_from(p, p.request, u32::MAX)),
        ("a reply in a hole", NeedsReset, |p| reply_to(p, 1 << 45, 4096)),
        ("a reply at the end of all addresses", NeedsReset, |p| reply_to(p, !4095, 8192)),
        ("a reply across the end of RAM", NeedsReset, |p| reply_to(p, p.end - 100, 4096)),
        ("a reply into registers", NeedsReset, |p| reply_to(p, p.registers, 4096)),
        ("a reply into the local APIC", NeedsReset, |p| reply_to(p, 0xfee0_0000, 4096)),
        ("a reply of nearly 4 GiB", NeedsReset, |p| reply_to(p, p.reply, u32::MAX - p.len)),
        ("a chain of more than 4 GiB", Unused, |p| reply_to(p, p.reply, u32::MAX)),
        ("nothing to read", Unused, |p| (vec![(p.reply, REPLY_ROOM, WRITE, 0)], vec![])),
        ("nothing to write", Unused, |p| (vec![(p.request, p.len, 0, 0)], vec![])),
        ("lengths of nothing", Unused, |p| (vec![(p.request, 0, NEXT, 1), (p.reply, 0, WRITE, 0)], vec![])),
        ("lengths of nothing at no address", Unused, |_| {
            (vec![(u64::MAX, 0, NEXT, 1), (1 << 45, 0, WRITE, 0)], vec![])
        }),
        ("what is written before what is read", Done, |p| {
            (vec![(p.reply, REPLY_ROOM, WRITE | NEXT, 1), (p.request, p.len, 0, 0)], vec![])
        }),
        ("room for less than a header", Unused, |p| reply_to(p, p.reply, 15)),
        ("room for no more than a header", Expected::Errno(libc::EINVAL), |p| reply_to(p, p.reply, 16)),
        ("flags that do not exist", Done, |p| {
            (vec![(p.request, p.len, NEXT | 0xfff0, 1), (p.reply, REPLY_ROOM, WRITE | 0xfff0, 0)], vec![])
        }),
    ]
};

pub fn attempts() -> Vec<Attempt> {
    let cases = CASES.map(|(what, expected, case)| {
        Attempt::new("chains", what, move |rogue| make(rogue, what, expected, case))
    });
    let every_byte = Attempt::new("chains", "a descriptor for every byte", every_byte);
    let over_itself = Attempt::new("chains", "a reply over its own request", over_itself);
    let from_window = Attempt::new("chains", "requests from the window", from_window);
    cases.into_iter().chain([every_byte, over_itself, from_window]).collect()
}

fn request() -> Vec<u8> {
    message(Asker::default(), Opcode::Lookup as u32, ROOT, &[&nul("file")])
}

fn table(of: Table) -> Vec<Descriptor> {
    of.into_iter().map(|(address, len, flags, next)| Descriptor { address, len, flags, next }).collect()
}

fn make(
    rogue: &mut Rogue,
    what: &str,
    expected: Expected,
    case: fn(Places) -> (Table, Table),
) -> Result<(), Failure> {
    let request = request();
    let device = &mut rogue.device;
    device.put(&request);
    let (chain, beside) = case(Places::of(device, request.len())?);
    device.memory.write(INDIRECT_TABLE, &Descriptor::bytes(&table(beside)));
    let answer = device.exchange(&table(chain))?;
    rogue.expect(what, expected, answer);
    Ok(())
}

/// The request is where its reply goes, too: all of it has been read before the first byte of that is written.
fn over_itself(rogue: &mut Rogue) -> Result<(), Failure> {
    let request = request();
    let device = &mut rogue.device;
    device.memory.write(REPLY, &request);
    let [first, reply] = device.chain(request.len());
    device.post(&[Descriptor { address: reply.address, ..first }, reply])?;
    let answer = device.answer(PATIENCE)?;
    rogue.expect("a reply over its own request", Expected::Done, answer);
    Ok(())
}

fn every_byte(rogue: &mut Rogue) -> Result<(), Failure> {
    let request = request();
    let device = &mut rogue.device;
    let [first, reply] = device.put(&request);
    let len = request.len() as u16;
    let one =
        |at: u16| Descriptor { address: first.address + u64::from(at), len: 1, flags: NEXT, next: at + 1 };
    let mut chain: Vec<_> = (0..len).map(one).collect();
    chain.push(reply);
    let answer = device.exchange(&chain)?;
    rogue.expect("a descriptor for every byte", Expected::Done, answer);
    Ok(())
}

/// The window is memory for the device, too, whether it shows a file or a hole.
fn from_window(rogue: &mut Rogue) -> Result<(), Failure> {
    let request = request();
    let device = &mut rogue.device;
    device.window.write_bytes(4096, &request)?;
    let [first, reply] = device.chain(request.len());
    let first = Descriptor { address: device.window_address + 4096, ..first };
    let answer = device.exchange(&[first, reply])?;
    rogue.expect("a request from a hole", Expected::Done, answer);
    // What a file has there is no message.
    let big = rogue.device.lookup(ROOT, "big")?;
    rogue.device.map(big, 0, 0, MAP_READ)?;
    let answer = rogue.device.exchange(&[first, reply])?;
    rogue.expect("a request from a file", Expected::Errno(libc::EINVAL), answer);
    Ok(())
}
