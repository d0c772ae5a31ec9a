//! Links, devices, fifos and sockets: given out, never followed or opened.

use fuse_backend_rs::abi::fuse_abi::{MkdirIn, Opcode};

use super::Attempt;
use crate::guest::Failure;
use crate::guest::rogue::fuse::{ROOT, SYNCFS, bytes, nul};
use crate::guest::rogue::operations::{create, link, mknod, set, with_handle, without_handle};
use crate::guest::rogue::{Expected, Rogue};

/// What the host has put into the share: links to the secret, its directory and the root, and things that are no files.
const OF_THE_HOST: [&str; 8] =
    ["link", "link-up", "link-out", "link-to-nothing", "fifo", "character", "block", "socket"];

/// What the guest makes itself.
const OWN: [(&str, u32); 4] = [
    ("own-fifo", libc::S_IFIFO),
    ("own-character", libc::S_IFCHR),
    ("own-block", libc::S_IFBLK),
    ("own-socket", libc::S_IFSOCK),
];

pub fn attempts() -> Vec<Attempt> {
    let of_the_host =
        OF_THE_HOST.map(|name| Attempt::new("kinds", name, move |rogue| open_in_every_way(rogue, name)));
    let own = OWN.map(|(name, kind)| {
        Attempt::new("kinds", name, move |rogue| {
            let parts = [mknod(kind | 0o666), nul(name)];
            rogue.try_call("MKNOD", Expected::Done, Opcode::Mknod as u32, ROOT, &parts)?;
            open_in_every_way(rogue, name)
        })
    });
    let links = Attempt::new("kinds", "own-link", |rogue| {
        for (name, target) in [("own-link", "../secret"), ("own-root", "/"), ("own-memory", "/proc/self/mem")]
        {
            let parts = [nul(name), nul(target)];
            rogue.try_call("SYMLINK", Expected::Done, Opcode::Symlink as u32, ROOT, &parts)?;
            open_in_every_way(rogue, name)?;
        }
        Ok(())
    });
    of_the_host.into_iter().chain(own).chain([links]).collect()
}

/// To open such a thing would lead out of the share, wait for a writer, or reach a driver of the host.
fn open_in_every_way(rogue: &mut Rogue, name: &str) -> Result<(), Failure> {
    let bad = Expected::Errno(libc::EBADF);
    let (file, _) = rogue.nodes()?;
    let fh = rogue.device.open(file, libc::O_RDWR)?;
    let node = rogue.device.lookup(ROOT, name)?;
    for flags in [
        libc::O_RDONLY,
        libc::O_WRONLY,
        libc::O_RDWR,
        libc::O_RDWR | libc::O_TRUNC,
        libc::O_PATH,
        libc::O_PATH | libc::O_NOFOLLOW,
        libc::O_CREAT | libc::O_RDWR,
        libc::O_TMPFILE | libc::O_RDWR,
        libc::O_DIRECTORY,
        libc::O_NONBLOCK,
    ] {
        let ask = [flags.to_le_bytes(), [0; 4]].concat();
        rogue.try_call(format!("OPEN {flags:#x}"), bad, Opcode::Open as u32, node, &[ask])?;
        let parts = [create(flags), nul(name)];
        rogue.try_call(format!("CREATE {flags:#x}"), bad, Opcode::Create as u32, ROOT, &parts)?;
        let parts = [create(flags | libc::O_EXCL), nul(name)];
        let exists = Expected::Errno(libc::EEXIST);
        rogue.try_call(format!("CREATE, new, {flags:#x}"), exists, Opcode::Create as u32, ROOT, &parts)?;
    }
    rogue.try_call("OPENDIR", bad, Opcode::Opendir as u32, node, &[vec![0; 8]])?;
    rogue.try_call("SYNCFS", bad, SYNCFS, node, &[vec![0; 8]])?;
    rogue.try_call("SETATTR of the size", bad, Opcode::Setattr as u32, node, &[set(8)])?;
    for operation in without_handle() {
        if operation.code == Opcode::SetupMapping as u32 {
            let denied = Expected::Errno(libc::EPERM);
            rogue.try_call(operation.name, denied, operation.code, node, &operation.parts)?;
        }
    }
    for operation in with_handle(fh) {
        rogue.try_call(operation.name, bad, operation.code, node, &operation.parts)?;
    }
    // Nor is there anything behind it.
    let through = Expected::Errno(libc::ENOTDIR);
    let mkdir = bytes(&MkdirIn { mode: 0o755, umask: 0 });
    for (what, opcode, parts) in [
        ("LOOKUP through it", Opcode::Lookup, vec![nul("secret")]),
        ("CREATE through it", Opcode::Create, vec![create(libc::O_RDWR), nul("new")]),
        ("MKDIR through it", Opcode::Mkdir, vec![mkdir, nul("new")]),
        ("LINK through it", Opcode::Link, vec![link(file), nul("new")]),
        ("UNLINK through it", Opcode::Unlink, vec![nul("secret")]),
    ] {
        rogue.try_call(what, through, opcode as u32, node, &parts)?;
    }
    Ok(())
}
