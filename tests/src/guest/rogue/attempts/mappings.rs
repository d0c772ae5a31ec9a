//! The DAX window: mappings that cannot be, and what is done with those that can.

use fuse_backend_rs::abi::fuse_abi::Opcode;
use fuse_backend_rs::abi::virtio_fs::SetupmappingIn;

use super::{Act, Attempt};
use crate::guest::data::fill;
use crate::guest::rogue::device::{Answer, Device};
use crate::guest::rogue::fuse::{CHUNK, MAP_READ, MAP_WRITE, ROOT, bytes};
use crate::guest::rogue::io::signal_of_child;
use crate::guest::rogue::{Expected, Rogue};
use crate::guest::{Failure, SHARED_BIG};

/// Part of a file, length, place in the window; what about it is wrong is said by its name. `END` is the window's.
type Range = fn(end: u64) -> (u64, u64, u64);

/// The last multiple of a chunk.
const TOP: u64 = u64::MAX - CHUNK + 1;

const BAD_RANGES: [(&str, Range); 12] = [
    ("nothing", |_| (0, 0, 0)),
    ("a page", |_| (0, 4096, 0)),
    ("a chunk and a byte", |_| (0, CHUNK + 1, 0)),
    ("an offset in the file that is unaligned", |_| (4096, CHUNK, 0)),
    ("a place that is unaligned", |_| (0, CHUNK, 4096)),
    ("a place beyond the window", |end| (0, CHUNK, end)),
    ("across the end of the window", |end| (0, 2 * CHUNK, end - CHUNK)),
    ("a place at the end of all addresses", |_| (0, CHUNK, TOP)),
    ("a length that wraps around", |_| (0, TOP, CHUNK)),
    ("all ones", |_| (0, u64::MAX, u64::MAX)),
    ("a part beyond any file", |_| (TOP, CHUNK, 0)),
    ("a negative offset", |_| (1 << 63, CHUNK, 0)),
];

pub fn attempts() -> Vec<Attempt> {
    let ranges = BAD_RANGES.map(|(what, range)| {
        Attempt::new("mappings", what, move |rogue| {
            let (file, _) = rogue.nodes()?;
            let (foffset, len, moffset) = range(rogue.device.window.len());
            for flags in [MAP_READ, MAP_READ | MAP_WRITE] {
                let ask = bytes(&SetupmappingIn { fh: u64::MAX, foffset, len, flags, moffset });
                let invalid = Expected::Errno(libc::EINVAL);
                rogue.try_call(what, invalid, Opcode::SetupMapping as u32, file, &[ask])?;
            }
            Ok(())
        })
    });
    let more: [(&str, Act); 10] = [
        ("flags", flags),
        ("over others", over_others),
        ("after the file is forgotten", after_forget),
        ("beyond the end of a file", beyond_the_end),
        ("REMOVEMAPPING of what is none", remove_nonsense),
        ("REMOVEMAPPING among others", remove_among_others),
        ("stores to a read-only share", store_read_only),
        ("more stores than there are copies", store_too_often),
        ("replies into a read-only share", reply_into_read_only),
        ("holes", holes),
    ];
    ranges.into_iter().chain(more.map(|(what, run)| Attempt::new("mappings", what, run))).collect()
}

/// What the window shows at an offset, and what the big file has at another.
fn expect_big(rogue: &mut Rogue, moffset: u64, foffset: u64) -> Result<(), Failure> {
    let mut expected = [0; 8];
    fill(SHARED_BIG.seed, foffset, &mut expected);
    let found = rogue.device.window.read(moffset, 8)?;
    rogue.expect_value(format!("the window at {moffset:#x}"), u64::from_le_bytes(expected), found);
    Ok(())
}

fn must_map(device: &mut Device, node: u64, foffset: u64, moffset: u64, flags: u64) -> Result<(), Failure> {
    match device.map(node, foffset, moffset, flags)? {
        Answer::Done(_) => Ok(()),
        answer => Err(Failure::new(format!("SETUPMAPPING: {answer:?}"))),
    }
}

fn flags(rogue: &mut Rogue) -> Result<(), Failure> {
    let (file, _) = rogue.nodes()?;
    for flags in [0, 4, 8, MAP_READ | 4, MAP_WRITE | 1 << 63, u64::MAX] {
        for of_read_only in [false, true] {
            let device = if of_read_only { &mut rogue.read_only } else { &mut rogue.device };
            let answer = device.map(file, 0, 0, flags)?;
            rogue.expect(format!("flags {flags:#x}"), Expected::Errno(libc::EINVAL), answer);
        }
    }
    let file = rogue.read_only.lookup(ROOT, "file")?;
    for flags in [MAP_WRITE, MAP_READ | MAP_WRITE] {
        let answer = rogue.read_only.map(file, 0, 0, flags)?;
        rogue.expect("to write to a read-only share", Expected::Errno(libc::EROFS), answer);
    }
    Ok(())
}

/// A range is used again without having been given back: it shows the new part, whole and at once.
fn over_others(rogue: &mut Rogue) -> Result<(), Failure> {
    let big = rogue.device.lookup(ROOT, "big")?;
    for (foffset, moffset, flags) in [
        (0, 0, MAP_READ),
        (CHUNK, CHUNK, MAP_READ),
        (3 * CHUNK, CHUNK, MAP_READ | MAP_WRITE),
        (CHUNK, 0, MAP_READ),
    ] {
        must_map(&mut rogue.device, big, foffset, moffset, flags)?;
        expect_big(rogue, moffset + 4096, foffset + 4096)?;
    }
    let ask = SetupmappingIn { fh: 0, foffset: 0, len: 4 * CHUNK, flags: MAP_READ, moffset: 0 };
    rogue.try_call("four chunks", Expected::Done, Opcode::SetupMapping as u32, big, &[bytes(&ask)])?;
    (0..4).try_for_each(|chunk| expect_big(rogue, chunk * CHUNK, chunk * CHUNK))
}

/// A mapping stays when the file is forgotten, and no new one can be had.
fn after_forget(rogue: &mut Rogue) -> Result<(), Failure> {
    let big = rogue.device.lookup(ROOT, "big")?;
    must_map(&mut rogue.device, big, 0, 0, MAP_READ)?;
    rogue.device.forget(big, 1)?;
    let answer = rogue.device.map(big, CHUNK, CHUNK, MAP_READ)?;
    rogue.expect("a forgotten file", Expected::Errno(libc::EBADF), answer);
    expect_big(rogue, 8, 8)
}

/// A file is shorter than a chunk, so that its mapping has pages without a file. They must not end anything.
fn beyond_the_end(rogue: &mut Rogue) -> Result<(), Failure> {
    let (file, _) = rogue.nodes()?;
    must_map(&mut rogue.device, file, 0, 0, MAP_READ)?;
    must_map(&mut rogue.device, file, 8 * CHUNK, CHUNK, MAP_READ)?;
    let window = &rogue.device.window;
    let found = window.read(16 << 10, 8)?;
    window.write(64 << 10, 8, u64::MAX)?;
    window.write(CHUNK, 8, u64::MAX)?;
    rogue.expect_value("behind the end of the file", 0, found);
    rogue.device.read_file()
}

fn removal(count: u32, entries: &[(u64, u64)]) -> Vec<Vec<u8>> {
    let entry = |(moffset, len): &(u64, u64)| [moffset.to_le_bytes(), len.to_le_bytes()].concat();
    vec![count.to_le_bytes().to_vec(), entries.iter().flat_map(entry).collect()]
}

fn remove_nonsense(rogue: &mut Rogue) -> Result<(), Failure> {
    let end = rogue.device.window.len();
    let code = Opcode::RemoveMapping as u32;
    for (what, expected, parts) in [
        ("a count without entries", libc::EINVAL, removal(1, &[])),
        ("too small a count", libc::EINVAL, removal(0, &[(0, CHUNK)])),
        ("too large a count", libc::EINVAL, removal(2, &[(0, CHUNK)])),
        ("a count of all ones", libc::EINVAL, removal(u32::MAX, &[(0, CHUNK)])),
        ("a count that wraps around", libc::EINVAL, removal(1 << 28, &[])),
        ("half a count", libc::EINVAL, vec![vec![1, 0]]),
        ("an unaligned place", libc::EINVAL, removal(1, &[(4096, CHUNK)])),
        ("an unaligned length", libc::EINVAL, removal(1, &[(0, 4096)])),
        ("nothing at a place", libc::EINVAL, removal(1, &[(0, 0)])),
        ("a place beyond", libc::EINVAL, removal(1, &[(end, CHUNK)])),
        ("a length beyond", libc::EINVAL, removal(1, &[(0, end + CHUNK)])),
        ("all ones", libc::EINVAL, removal(1, &[(u64::MAX, u64::MAX)])),
        ("the end of all addresses", libc::EINVAL, removal(1, &[(TOP, CHUNK)])),
        ("what is not mapped", 0, removal(1, &[(0, CHUNK)])),
        ("all of the window", 0, removal(1, &[(0, end)])),
        ("no entries", 0, removal(0, &[])),
        ("the same a hundred times", 0, removal(100, &[(CHUNK, CHUNK); 100])),
    ] {
        let expected = if expected == 0 { Expected::Done } else { Expected::Errno(expected) };
        rogue.try_call(what, expected, code, ROOT, &parts)?;
    }
    Ok(())
}

/// What is right among the wrong is carried out, and nothing else.
fn remove_among_others(rogue: &mut Rogue) -> Result<(), Failure> {
    let big = rogue.device.lookup(ROOT, "big")?;
    for chunk in 0..3 {
        must_map(&mut rogue.device, big, chunk * CHUNK, chunk * CHUNK, MAP_READ)?;
    }
    let end = rogue.device.window.len();
    let parts = removal(3, &[(end, CHUNK), (CHUNK, CHUNK), (0, u64::MAX)]);
    let invalid = Expected::Errno(libc::EINVAL);
    rogue.try_call("REMOVEMAPPING", invalid, Opcode::RemoveMapping as u32, ROOT, &parts)?;
    expect_big(rogue, 0, 0)?;
    expect_big(rogue, 2 * CHUNK, 2 * CHUNK)?;
    expect_hole(rogue, CHUNK, CHUNK)
}

/// That the window does not show what the big file has.
fn expect_hole(rogue: &mut Rogue, moffset: u64, foffset: u64) -> Result<(), Failure> {
    let mut content = [0; 8];
    fill(SHARED_BIG.seed, foffset, &mut content);
    let found = rogue.device.window.read(moffset, 8)?;
    let is_shown = found == u64::from_le_bytes(content);
    rogue.expect_value(format!("whether the window shows the file at {moffset:#x}"), 0, is_shown.into());
    Ok(())
}

/// The processor writes where the device has mapped a file to be read. The host looks whether the file has changed.
fn store_read_only(rogue: &mut Rogue) -> Result<(), Failure> {
    let file = rogue.read_only.lookup(ROOT, "file")?;
    must_map(&mut rogue.read_only, file, 0, 0, MAP_READ)?;
    for offset in [0, 4096, 8192] {
        rogue.read_only.window.write(offset, 8, u64::MAX)?;
    }
    rogue.read_only.read_file()
}

/// A page that is stored to becomes a copy of the guest's own, and there are 1,024 of them. A program that wants more is
/// killed, and nothing else.
fn store_too_often(rogue: &mut Rogue) -> Result<(), Failure> {
    let big = rogue.read_only.lookup(ROOT, "big")?;
    for chunk in 0..4 {
        must_map(&mut rogue.read_only, big, chunk * CHUNK, chunk * CHUNK, MAP_READ)?;
    }
    let window = &rogue.read_only.window;
    let signal =
        signal_of_child(|| (0..4 * CHUNK).step_by(4096).all(|offset| window.write(offset, 8, 1).is_ok()))?;
    rogue.expect_value("the signal that ended the program", libc::SIGSEGV as u64, signal);
    rogue.read_only.read_file()
}

/// The device itself writes there: data of another share's file, by a descriptor.
fn reply_into_read_only(rogue: &mut Rogue) -> Result<(), Failure> {
    let file = rogue.read_only.lookup(ROOT, "file")?;
    must_map(&mut rogue.read_only, file, 0, 0, MAP_READ)?;
    let place = rogue.read_only.window_address;
    rogue.device.read_into(place, 4096)?;
    rogue.read_only.read_file()
}

/// What shows no file takes writes of the processor and of the device, and neither file nor secret comes of it.
fn holes(rogue: &mut Rogue) -> Result<(), Failure> {
    let end = rogue.device.window.len();
    for offset in [0, CHUNK - 8, end / 2, end - 8] {
        expect_hole(rogue, offset, offset)?;
        rogue.device.window.write(offset, 8, u64::MAX)?;
    }
    let place = rogue.device.window_address;
    rogue.device.read_into(place + end - 4096, 4096)?;
    // Across the end of this window, where the next one or nothing is.
    rogue.device.read_into(place + CHUNK - 100, 4096)
}
