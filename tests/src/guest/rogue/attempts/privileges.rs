//! Set-id bits that must not outlive a write, and owners that are none.

use fuse_backend_rs::abi::fuse_abi::{
    CreateIn, FOPEN_IN_KILL_SUIDGID, MkdirIn, Opcode, OpenIn, SetattrIn, WRITE_KILL_PRIV, WriteIn,
};

use super::Attempt;
use crate::guest::Failure;
use crate::guest::rogue::fuse::{Asker, CHUNK, MAP_READ, MAP_WRITE, ROOT, TMPFILE, bytes, message, nul};
use crate::guest::rogue::operations::{copy, create, mknod, with_handle};
use crate::guest::rogue::{Expected, PROGRAMS, Rogue};

/// SETATTR: the client's word that the bits are to go.
const KILL_SUIDGID: u32 = 1 << 11;
const SIZE: u32 = 1 << 3;
const MODE: u32 = 1;
const OWNER: u32 = 1 << 1;

/// A way to write to a program: its node and a handle, a file to copy from and its handle.
type Way = fn(&mut Rogue, (u64, u64), (u64, u64)) -> Result<(), Failure>;

pub fn attempts() -> Vec<Attempt> {
    let ways: [Way; 8] = [write, truncate, create_again, resize, chown, allocate, copy_into, map];
    let mut attempts: Vec<_> = PROGRAMS
        .iter()
        .zip(ways)
        .map(|(name, way)| Attempt::new("set-id", name, move |rogue| write_to_program(rogue, name, way)))
        .collect();
    attempts.push(Attempt::new("owners", "nobody", nobody));
    attempts
}

fn write_to_program(rogue: &mut Rogue, name: &str, way: Way) -> Result<(), Failure> {
    let device = &mut rogue.device;
    let (source, program) = (device.lookup(ROOT, "file")?, device.lookup(ROOT, name)?);
    let (from, fh) = (device.open(source, libc::O_RDONLY)?, device.open(program, libc::O_RDWR)?);
    let before = rogue.device.mode(program)?;
    rogue.expect_value("the mode before", 0o6755, (before & 0o7777).into());
    way(rogue, (program, fh), (source, from))?;
    let after = rogue.device.mode(program)?;
    rogue.expect_value("set-id bits afterwards", 0, (after & 0o6000).into());
    Ok(())
}

fn write(rogue: &mut Rogue, (node, fh): (u64, u64), _: (u64, u64)) -> Result<(), Failure> {
    let (flags, fuse_flags) = (libc::O_RDWR as u32, WRITE_KILL_PRIV);
    let ask = bytes(&WriteIn { fh, size: 1, flags, fuse_flags, ..WriteIn::default() });
    rogue.try_call("WRITE", Expected::Done, Opcode::Write as u32, node, &[ask, b"x".to_vec()])
}

fn truncate(rogue: &mut Rogue, (node, _): (u64, u64), _: (u64, u64)) -> Result<(), Failure> {
    let flags = (libc::O_RDWR | libc::O_TRUNC) as u32;
    let ask = bytes(&OpenIn { flags, fuse_flags: FOPEN_IN_KILL_SUIDGID });
    rogue.try_call("OPEN", Expected::Done, Opcode::Open as u32, node, &[ask])
}

fn create_again(rogue: &mut Rogue, _: (u64, u64), _: (u64, u64)) -> Result<(), Failure> {
    let flags = (libc::O_RDWR | libc::O_TRUNC) as u32;
    let ask = bytes(&CreateIn { flags, mode: 0o644, umask: 0, fuse_flags: FOPEN_IN_KILL_SUIDGID });
    let parts = [ask, nul("program-create")];
    rogue.try_call("CREATE", Expected::Done, Opcode::Create as u32, ROOT, &parts)
}

fn resize(rogue: &mut Rogue, (node, fh): (u64, u64), _: (u64, u64)) -> Result<(), Failure> {
    let valid = SIZE | KILL_SUIDGID | 1 << 6;
    let ask = bytes(&SetattrIn { valid, fh, size: 1, ..SetattrIn::default() });
    rogue.try_call("SETATTR", Expected::Done, Opcode::Setattr as u32, node, &[ask])
}

fn chown(rogue: &mut Rogue, (node, _): (u64, u64), _: (u64, u64)) -> Result<(), Failure> {
    let ask = bytes(&SetattrIn { valid: OWNER, uid: 1000, ..SetattrIn::default() });
    rogue.try_call("SETATTR", Expected::Done, Opcode::Setattr as u32, node, &[ask])
}

fn allocate(rogue: &mut Rogue, (node, fh): (u64, u64), _: (u64, u64)) -> Result<(), Failure> {
    let operation = with_handle(fh).into_iter().find(|operation| operation.name == "FALLOCATE");
    let operation = operation.ok_or_else(|| Failure::new("there is no FALLOCATE"))?;
    rogue.try_call("FALLOCATE", Expected::Done, operation.code, node, &operation.parts)
}

fn copy_into(rogue: &mut Rogue, (node, fh): (u64, u64), (source, from): (u64, u64)) -> Result<(), Failure> {
    let parts = [copy(from, node, fh)];
    rogue.try_call("COPY_FILE_RANGE", Expected::Done, Opcode::CopyFileRange as u32, source, &parts)
}

/// A set-id file is not DAX. One that became set-id when the client knew it as DAX loses the bits when it is mapped.
fn map(rogue: &mut Rogue, (node, _): (u64, u64), (source, _): (u64, u64)) -> Result<(), Failure> {
    for flags in [MAP_READ, MAP_READ | MAP_WRITE] {
        let answer = rogue.device.map(node, 0, 0, flags)?;
        rogue.expect("SETUPMAPPING", Expected::Errno(libc::EPERM), answer);
    }
    // With the bit that lets the group execute it: without, set-group-id means something else, and stays.
    let chmod = |mode| bytes(&SetattrIn { valid: MODE, mode, ..SetattrIn::default() });
    let set_id = chmod(0o106_755);
    rogue.try_call("SETATTR", Expected::Done, Opcode::Setattr as u32, source, &[set_id])?;
    let answer = rogue.device.map(source, CHUNK, CHUNK, MAP_READ | MAP_WRITE)?;
    rogue.expect("SETUPMAPPING of the file", Expected::Done, answer);
    let mode = rogue.device.mode(source)?;
    rogue.expect_value("the file's set-id bits", 0, (mode & 0o6000).into());
    // What could not be mapped has lost nothing, so that it is not said to have been written to.
    let mode = rogue.device.mode(node)?;
    rogue.expect_value("the program's mode", 0o6755, (mode & 0o7777).into());
    let plain = chmod(0o100_755);
    rogue.try_call("SETATTR", Expected::Done, Opcode::Setattr as u32, node, &[plain])
}

/// -1 means "as it is" to the host, and would be the server's own.
fn nobody(rogue: &mut Rogue) -> Result<(), Failure> {
    let (new, mkdir) = (nul("new"), bytes(&MkdirIn { mode: 0o755, umask: 0 }));
    let requests = [
        (Opcode::Create as u32, vec![create(libc::O_RDWR), new.clone()]),
        (TMPFILE, vec![create(libc::O_RDWR), new.clone()]),
        (Opcode::Mkdir as u32, vec![mkdir, new.clone()]),
        (Opcode::Mknod as u32, vec![mknod(libc::S_IFREG | 0o644), new.clone()]),
        (Opcode::Symlink as u32, vec![new.clone(), nul("target")]),
    ];
    for (uid, gid) in [(u32::MAX, 0), (0, u32::MAX), (u32::MAX, u32::MAX)] {
        for (code, parts) in &requests {
            let parts: Vec<_> = parts.iter().map(Vec::as_slice).collect();
            let answer = rogue.device.send(&message(Asker { uid, gid, len: None }, *code, ROOT, &parts))?;
            rogue.expect(format!("operation {code}"), Expected::Errno(libc::EINVAL), answer);
        }
    }
    let (file, directory) = rogue.nodes()?;
    for (node, valid) in [(file, 2), (file, 4), (directory, 6)] {
        let ask = bytes(&SetattrIn { valid, uid: u32::MAX, gid: u32::MAX, ..SetattrIn::default() });
        let invalid = Expected::Errno(libc::EINVAL);
        rogue.try_call("SETATTR", invalid, Opcode::Setattr as u32, node, &[ask])?;
    }
    Ok(())
}
