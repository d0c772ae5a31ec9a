//! Messages that lie about themselves, operations that are none, and sessions that begin and end in the middle.

use fuse_backend_rs::abi::fuse_abi::{IoctlIn, Opcode};

use super::{Act, Attempt};
use crate::guest::data::fill;
use crate::guest::rogue::device::Device;
use crate::guest::rogue::fuse::{Asker, MAP_READ, ROOT, bytes, message, nul};
use crate::guest::rogue::operations::with_handle;
use crate::guest::rogue::{Expected, Rogue};
use crate::guest::{Failure, SHARED_FILE};

pub fn attempts() -> Vec<Attempt> {
    let attempts: [(&str, Act); 8] = [
        ("lengths that are not the message's", lengths),
        ("messages cut short", cut_short),
        ("operations that are none", no_operations),
        ("IOCTL of anything", ioctls),
        ("versions of another protocol", versions),
        ("INIT again", init_again),
        ("DESTROY, and on", destroy),
        ("sizes of all ones", sizes),
    ];
    attempts.map(|(what, run)| Attempt::new("messages", what, run)).into()
}

fn lengths(rogue: &mut Rogue) -> Result<(), Failure> {
    for len in [0, 1, 39, 46, 4096, 1 << 20, u32::MAX] {
        let asker = Asker { len: Some(len), ..Asker::default() };
        let answer = rogue.device.send(&message(asker, Opcode::Lookup as u32, ROOT, &[&nul("file")]))?;
        rogue.expect(format!("a length of {len}"), Expected::Errno(libc::EINVAL), answer);
    }
    Ok(())
}

/// Every operation with too little behind its header. What it can do with that much need only be harmless; that it is a bad
/// message is no reason to answer none.
fn cut_short(rogue: &mut Rogue) -> Result<(), Failure> {
    let (file, directory) = rogue.nodes()?;
    for code in (0..60).filter(|code| *code != Opcode::Destroy as u32) {
        for len in [0, 1, 7, 39] {
            for node in [file, directory] {
                let answer = rogue.device.call(code, node, &[&vec![0xff; len]])?;
                rogue.expect(format!("operation {code}"), Expected::Served, answer);
            }
        }
    }
    Ok(())
}

fn no_operations(rogue: &mut Rogue) -> Result<(), Failure> {
    for code in [0, 7, 19, 31, 32, 33, 37, 40, 52, 53, 100, 4096, 1_048_576, 436_207_616, u32::MAX] {
        let parts = [vec![0; 64]];
        rogue.try_call(format!("operation {code}"), Expected::Errno(libc::ENOSYS), code, ROOT, &parts)?;
    }
    for code in [Opcode::Interrupt, Opcode::NotifyReply] {
        let parts = [vec![0xff; 64]];
        rogue.try_call(format!("{code:?}"), Expected::Unused, code as u32, ROOT, &parts)?;
    }
    Ok(())
}

fn ioctls(rogue: &mut Rogue) -> Result<(), Failure> {
    let (file, _) = rogue.nodes()?;
    let fh = rogue.device.open(file, libc::O_RDWR)?;
    for cmd in [0, 1, 0x5401, 0x4020_9409, 0x9409, 0xc020_660b, 0x1268, u32::MAX] {
        for size in [0, 4, 28, u32::MAX] {
            let ask = bytes(&IoctlIn { fh, cmd, in_size: size, out_size: size, ..IoctlIn::default() });
            let what = format!("IOCTL {cmd:#x} of {size} bytes");
            let expected = Expected::Errno(libc::ENOTTY);
            rogue.try_call(what, expected, Opcode::Ioctl as u32, file, &[ask, vec![0; 28]])?;
        }
    }
    Ok(())
}

fn versions(rogue: &mut Rogue) -> Result<(), Failure> {
    for (major, expected) in
        [(0, Expected::Errno(libc::EPROTO)), (6, Expected::Errno(libc::EPROTO)), (u32::MAX, Expected::Done)]
    {
        let answer = rogue.device.send(&Device::init_message(major))?;
        rogue.expect(format!("INIT of version {major}"), expected, answer);
    }
    // The session is the one that it was.
    rogue.device.read_file()
}

/// All that was known, open and mapped in the session before is gone.
fn init_again(rogue: &mut Rogue) -> Result<(), Failure> {
    let (file, directory) = rogue.nodes()?;
    let fh = rogue.device.open(file, libc::O_RDWR)?;
    rogue.device.map(file, 0, 0, MAP_READ)?;
    rogue.device.init()?;
    expect_gone(rogue, file, directory, fh)
}

fn destroy(rogue: &mut Rogue) -> Result<(), Failure> {
    let (file, directory) = rogue.nodes()?;
    let fh = rogue.device.open(file, libc::O_RDWR)?;
    rogue.device.map(file, 0, 0, MAP_READ)?;
    for _ in 0..3 {
        rogue.try_call("DESTROY", Expected::Done, Opcode::Destroy as u32, ROOT, &[])?;
        expect_gone(rogue, file, directory, fh)?;
    }
    let file = rogue.device.lookup(ROOT, "file")?;
    let answer = rogue.device.map(file, 0, 0, MAP_READ)?;
    rogue.expect("SETUPMAPPING without a session", Expected::Errno(libc::EPERM), answer);
    Ok(())
}

fn expect_gone(rogue: &mut Rogue, file: u64, directory: u64, fh: u64) -> Result<(), Failure> {
    let bad = Expected::Errno(libc::EBADF);
    for operation in with_handle(fh) {
        rogue.try_call(operation.name, bad, operation.code, file, &operation.parts)?;
    }
    rogue.try_call("LOOKUP", bad, Opcode::Lookup as u32, directory, &[nul("inner")])?;
    let mut content = [0; 8];
    fill(SHARED_FILE.seed, 0, &mut content);
    let is_shown = rogue.device.window.read(0, 8)? == u64::from_le_bytes(content);
    rogue.expect_value("whether the window shows the file", 0, is_shown.into());
    Ok(())
}

/// Nothing is allocated, read or written beyond what there is room for.
fn sizes(rogue: &mut Rogue) -> Result<(), Failure> {
    let (file, directory) = rogue.nodes()?;
    let device = &mut rogue.device;
    let (fh, dir_fh) = (device.open(file, libc::O_RDWR)?, device.open_directory(directory)?);
    let argument = |fh: u64, offset: u64| {
        [&fh.to_le_bytes()[..], &offset.to_le_bytes(), &u32::MAX.to_le_bytes(), &[0; 20]].concat()
    };
    for (opcode, node, expected, parts) in [
        (Opcode::Read, file, Expected::Errno(libc::EINVAL), vec![argument(fh, 0)]),
        (Opcode::Read, file, Expected::Errno(libc::EINVAL), vec![argument(fh, u64::MAX)]),
        (Opcode::Write, file, Expected::Errno(libc::EINVAL), vec![argument(fh, 0), b"evil".to_vec()]),
        (Opcode::Readdir, directory, Expected::Served, vec![argument(dir_fh, 0)]),
        (Opcode::Readdirplus, directory, Expected::Served, vec![argument(dir_fh, 0)]),
        (Opcode::Getxattr, file, Expected::Served, vec![vec![0xff; 8], nul("user.none")]),
        (Opcode::Listxattr, file, Expected::Served, vec![vec![0xff; 8]]),
        (Opcode::BatchForget, 0, Expected::Unused, vec![vec![0xff; 8], vec![0xff; 64]]),
    ] {
        rogue.try_call(format!("{opcode:?}"), expected, opcode as u32, node, &parts)?;
    }
    Ok(())
}
