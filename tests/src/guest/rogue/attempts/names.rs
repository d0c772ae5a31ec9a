//! Names that are none, or that would lead elsewhere.

use fuse_backend_rs::abi::fuse_abi::{EntryOut, GetxattrIn, Opcode, SetxattrIn};

use super::Attempt;
use crate::guest::Failure;
use crate::guest::rogue::fuse::{ROOT, TMPFILE, bytes, nul, object};
use crate::guest::rogue::operations::{Naming, create, link, namings, rename2};
use crate::guest::rogue::{Expected, Rogue};

pub fn attempts() -> Vec<Attempt> {
    let mut attempts: Vec<_> = namings()
        .into_iter()
        .map(|naming| Attempt::new("names", naming.name, move |rogue| give(rogue, &naming)))
        .collect();
    attempts.push(Attempt::new("names", "pairs that are none", pairs));
    attempts.push(Attempt::new("names", "TMPFILE", unnamed));
    attempts.push(Attempt::new("names", "attributes", attributes));
    attempts
}

/// Names as they are sent, most with their NUL, and what each must get.
fn bad_names() -> Vec<(Vec<u8>, i32)> {
    vec![
        (nul(""), libc::EINVAL),
        (nul("."), libc::EINVAL),
        (nul(".."), libc::EINVAL),
        (nul("/"), libc::EINVAL),
        (nul("../secret"), libc::EINVAL),
        (nul("directory/../../secret"), libc::EINVAL),
        (nul("./file"), libc::EINVAL),
        (nul("file/"), libc::EINVAL),
        (nul("/etc/passwd"), libc::EINVAL),
        (nul("nul\0inside"), libc::EINVAL),
        (b"unterminated".to_vec(), libc::EINVAL),
        (vec![], libc::EINVAL),
        (nul("n".repeat(256)), libc::ENAMETOOLONG),
    ]
}

/// Gives all of them in one way, in two directories.
fn give(rogue: &mut Rogue, naming: &Naming) -> Result<(), Failure> {
    let (file, directory) = rogue.nodes()?;
    for parent in [ROOT, directory] {
        for (name, errno) in bad_names() {
            let is_string = name.iter().position(|byte| *byte == 0).is_some_and(|at| at + 1 == name.len());
            if is_string || !naming.is_pair {
                let what = format!("{} {:?}", naming.name, String::from_utf8_lossy(&name));
                let parts = (naming.parts)(&name, file);
                rogue.try_call(what, Expected::Errno(errno), naming.code, parent, &parts)?;
            }
        }
        let new = [nul("new")];
        rogue.try_call("new", Expected::Errno(libc::ENOENT), Opcode::Lookup as u32, parent, &new)?;
    }
    Ok(())
}

fn pairs(rogue: &mut Rogue) -> Result<(), Failure> {
    for (opcode, ask) in [
        (Opcode::Rename, ROOT.to_le_bytes().to_vec()),
        (Opcode::Rename2, rename2(0)),
        (Opcode::Symlink, vec![]),
    ] {
        for text in [&b""[..], b"\0", b"file", b"file\0", b"file\0new", b"file\0new\0more\0", b"\0\0\0"] {
            let parts = [ask.clone(), text.to_vec()];
            let what = format!("{opcode:?} {text:?}");
            rogue.try_call(what, Expected::Errno(libc::EINVAL), opcode as u32, ROOT, &parts)?;
        }
        let parts = [ask, nul("file"), nul("n".repeat(8000))];
        rogue.try_call("a long one", Expected::Errno(libc::ENAMETOOLONG), opcode as u32, ROOT, &parts)?;
    }
    Ok(())
}

/// A file without a name is not named by the request, and can be named only as others can.
fn unnamed(rogue: &mut Rogue) -> Result<(), Failure> {
    let ask = create(libc::O_RDWR);
    for (name, _) in bad_names() {
        rogue.try_call("TMPFILE", Expected::Done, TMPFILE, ROOT, &[ask.clone(), name])?;
    }
    let made = rogue.device.call(TMPFILE, ROOT, &[&ask, &nul("/")])?;
    let node = object::<EntryOut>(made)?.nodeid;
    for (name, errno) in bad_names() {
        let what = format!("LINK {:?}", String::from_utf8_lossy(&name));
        rogue.try_call(what, Expected::Errno(errno), Opcode::Link as u32, ROOT, &[link(node), name])?;
    }
    Ok(())
}

fn attributes(rogue: &mut Rogue) -> Result<(), Failure> {
    let (file, _) = rogue.nodes()?;
    let get = bytes(&GetxattrIn { size: 100, padding: 0 });
    let set = |size| bytes(&SetxattrIn { size, flags: 0 });
    let long = nul(format!("user.{}", "n".repeat(251)));
    for (name, errno) in [
        (nul(""), libc::ERANGE),
        (long, libc::ERANGE),
        (nul("../secret"), libc::EOPNOTSUPP),
        (b"user.unterminated".to_vec(), libc::EINVAL),
        (vec![], libc::EINVAL),
    ] {
        let requests = [
            (Opcode::Getxattr, vec![get.clone(), name.clone()]),
            (Opcode::Setxattr, vec![set(1), name.clone(), b"x".to_vec()]),
            (Opcode::Removexattr, vec![name.clone()]),
        ];
        for (opcode, parts) in requests {
            let what = format!("{opcode:?} {:?}", String::from_utf8_lossy(&name));
            rogue.try_call(what, Expected::Errno(errno), opcode as u32, file, &parts)?;
        }
    }
    for size in [0, 2, u32::MAX] {
        let parts = [set(size), nul("user.test"), b"x".to_vec()];
        let what = format!("SETXATTR of {size} bytes");
        rogue.try_call(what, Expected::Errno(libc::EINVAL), Opcode::Setxattr as u32, file, &parts)?;
    }
    Ok(())
}
