//! Nodes that were never given out, handles of others, and what a read-only share refuses.

use fuse_backend_rs::abi::fuse_abi::Opcode;

use super::Attempt;
use crate::guest::Failure;
use crate::guest::rogue::fuse::{ROOT, nul};
use crate::guest::rogue::operations::{Operation, copy, link, with_handle, without_handle};
use crate::guest::rogue::{Expected, Rogue};

/// The bit that tells the DAX inode of a file from the other, and the one that files without a name have.
const DAX_BIT: u64 = 1 << 56;
const UNNAMED: u64 = 1 << 57;

const BAD: Expected = Expected::Errno(libc::EBADF);

pub fn attempts() -> Vec<Attempt> {
    let of_nodes = without_handle()
        .into_iter()
        .map(|operation| Attempt::new("nodes", operation.name, move |rogue| forged_nodes(rogue, &operation)));
    let of_handles = with_handle(0).into_iter().enumerate().map(|(number, operation)| {
        Attempt::new("handles", operation.name, move |rogue| forged_handles(rogue, number))
    });
    let changes = without_handle()
        .into_iter()
        .filter(|operation| operation.changes)
        .map(|operation| Attempt::new("read-only", operation.name, move |rogue| refused(rogue, &operation)));
    of_nodes
        .chain(of_handles)
        .chain(changes)
        .chain([
            Attempt::new("nodes", "as an argument", arguments),
            Attempt::new("nodes", "FORGET", forget),
            Attempt::new("handles", "of a directory for a file", of_other_kind),
            Attempt::new("read-only", "by handle", refused_by_handle),
            Attempt::new("read-only", "OPEN with any flag", refused_flags),
        ])
        .collect()
}

/// Node ids that were made up.
fn forged(rogue: &mut Rogue) -> Result<Vec<u64>, Failure> {
    let (file, directory) = rogue.nodes()?;
    let forgotten = rogue.device.lookup(directory, "inner")?;
    rogue.device.forget(forgotten, 1)?;
    // The number of the mount is in the upper bits: that of the share's own files is the right one.
    let mount = (file & !DAX_BIT) >> 47 << 47;
    let made_up =
        [0, 2, mount, mount | 0x7fff_ffff_ffff, 1 << 55, UNNAMED, UNNAMED + 1, 1 << 62, 1 << 63, u64::MAX];
    let with_both = made_up.iter().flat_map(|node| [*node & !DAX_BIT, *node | DAX_BIT]);
    Ok(with_both.chain([forgotten, forgotten ^ DAX_BIT]).collect())
}

/// One operation on nodes that are none.
fn forged_nodes(rogue: &mut Rogue, operation: &Operation) -> Result<(), Failure> {
    for node in forged(rogue)? {
        let what = format!("{} of {node:#x}", operation.name);
        rogue.try_call(what, BAD, operation.code, node, &operation.parts)?;
    }
    Ok(())
}

/// One operation with handles that are none, or not of that file.
fn forged_handles(rogue: &mut Rogue, number: usize) -> Result<(), Failure> {
    let (file, directory) = rogue.nodes()?;
    let device = &mut rogue.device;
    let inner = device.lookup(directory, "inner")?;
    // Handles of files and of directories are counted separately: of the latter there are more, to tell them apart.
    let of_other = device.open(inner, libc::O_RDWR)?;
    let released = device.open(file, libc::O_RDWR)?;
    let fh = device.open(file, libc::O_RDWR)?;
    device.call(Opcode::Release as u32, file, &[&released.to_le_bytes(), &[0; 16]])?;
    let mut of_directory = 0;
    for _ in 0..10 {
        of_directory = device.open_directory(directory)?;
    }
    for forged in [of_other, released, of_directory, 0, fh ^ 1 << 63, u64::MAX, UNNAMED + 2] {
        let operation = with_handle(forged).swap_remove(number);
        let what = format!("{} with {forged:#x}", operation.name);
        rogue.try_call(what, BAD, operation.code, file, &operation.parts)?;
    }
    for node in forged(rogue)? {
        let operation = with_handle(fh).swap_remove(number);
        let what = format!("{} of {node:#x}", operation.name);
        rogue.try_call(what, BAD, operation.code, node, &operation.parts)?;
    }
    Ok(())
}

/// Nodes that do not stand in the header.
fn arguments(rogue: &mut Rogue) -> Result<(), Failure> {
    let (file, _) = rogue.nodes()?;
    let fh = rogue.device.open(file, libc::O_RDWR)?;
    for node in forged(rogue)? {
        let parts = [link(node), nul("new")];
        rogue.try_call(format!("LINK of {node:#x}"), BAD, Opcode::Link as u32, ROOT, &parts)?;
        let parts = [link(node), nul("file"), nul("new")];
        rogue.try_call(format!("RENAME to {node:#x}"), BAD, Opcode::Rename as u32, ROOT, &parts)?;
        let parts = [copy(fh, node, fh)];
        rogue.try_call(format!("COPY to {node:#x}"), BAD, Opcode::CopyFileRange as u32, file, &parts)?;
    }
    Ok(())
}

/// What was never given out, or not so often, is given back; the root, too.
fn forget(rogue: &mut Rogue) -> Result<(), Failure> {
    for node in forged(rogue)?.into_iter().chain([ROOT, ROOT]) {
        let parts = [u64::MAX.to_le_bytes().to_vec()];
        rogue.try_call("FORGET", Expected::Unused, Opcode::Forget as u32, node, &parts)?;
        let entry = [node.to_le_bytes(), u64::MAX.to_le_bytes()].concat();
        for count in [0u32, 1, 2, u32::MAX] {
            let parts = [count.to_le_bytes().to_vec(), vec![0; 4], entry.clone()];
            rogue.try_call("BATCH_FORGET", Expected::Unused, Opcode::BatchForget as u32, 0, &parts)?;
        }
    }
    rogue.device.read_file()
}

fn of_other_kind(rogue: &mut Rogue) -> Result<(), Failure> {
    let (file, directory) = rogue.nodes()?;
    let fh = rogue.device.open(file, libc::O_RDWR)?;
    for operation in with_handle(fh) {
        let what = format!("{} of the directory", operation.name);
        rogue.try_call(what, BAD, operation.code, directory, &operation.parts)?;
    }
    Ok(())
}

/// One operation on the read-only share, which refuses it on every node.
fn refused(rogue: &mut Rogue, operation: &Operation) -> Result<(), Failure> {
    let file = rogue.read_only.lookup(ROOT, "file")?;
    let directory = rogue.read_only.lookup(ROOT, "directory")?;
    [ROOT, file, directory].into_iter().try_for_each(|node| try_refused(rogue, operation, node))
}

fn try_refused(rogue: &mut Rogue, operation: &Operation, node: u64) -> Result<(), Failure> {
    let parts: Vec<_> = operation.parts.iter().map(Vec::as_slice).collect();
    let answer = rogue.read_only.call(operation.code, node, &parts)?;
    rogue.expect(format!("{} of {node:#x}", operation.name), Expected::Errno(libc::EROFS), answer);
    Ok(())
}

fn refused_by_handle(rogue: &mut Rogue) -> Result<(), Failure> {
    let file = rogue.read_only.lookup(ROOT, "file")?;
    let fh = rogue.read_only.open(file, libc::O_RDONLY)?;
    for operation in with_handle(fh).iter().filter(|operation| operation.changes) {
        try_refused(rogue, operation, file)?;
    }
    let more = [
        ("LINK", Opcode::Link, ROOT, vec![link(file), nul("new")]),
        ("COPY_FILE_RANGE", Opcode::CopyFileRange, file, vec![copy(fh, file, fh)]),
    ];
    for (name, opcode, node, parts) in more {
        try_refused(rogue, &Operation { name, code: opcode as u32, parts, changes: true }, node)?;
    }
    Ok(())
}

fn refused_flags(rogue: &mut Rogue) -> Result<(), Failure> {
    let file = rogue.read_only.lookup(ROOT, "file")?;
    for bit in 0..32 {
        let flags = 1u32 << bit;
        let writes = flags & (libc::O_ACCMODE | libc::O_TRUNC) as u32 != 0;
        let expected = if writes { Expected::Errno(libc::EROFS) } else { Expected::Done };
        let ask = [flags.to_le_bytes(), [0xff; 4]].concat();
        let answer = rogue.read_only.call(Opcode::Open as u32, file, &[&ask])?;
        rogue.expect(format!("OPEN with {flags:#x}"), expected, answer);
    }
    Ok(())
}
