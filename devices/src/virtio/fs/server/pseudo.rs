//! The host's pseudo file systems, /proc and the like, as far as they happen to be mounted in a share.
//!
//! Who shares a whole root shares its mount points, too. Files below them are no files but doors into the host's kernel
//! and its processes: /proc/PID/mem is the memory of the VMM itself, /proc/kcore the kernel's, and to read /proc/kmsg may
//! take for ever. A guest mounts its own there, and needs no more than a directory to mount it on: of the host's it gets
//! that directory's attributes, and nothing below it.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use crate::virtio::fs::abi::opcode;

/// The types of file systems that hold none of anybody's files.
const TYPES: [&str; 18] = [
    "binfmt_misc",
    "bpf",
    "cgroup",
    "cgroup2",
    "configfs",
    "debugfs",
    "efivarfs",
    "fusectl",
    "mqueue",
    "nsfs",
    "proc",
    "pstore",
    "resctrl",
    "rpc_pipefs",
    "securityfs",
    "selinuxfs",
    "sysfs",
    "tracefs",
];

const UNKNOWN: u8 = 0;
const ORDINARY: u8 = 1;
const PSEUDO: u8 = 2;

/// What the mounts are that a guest has seen. The library numbers them, and a node id has its mount's number in it.
pub(super) struct PseudoFileSystems {
    /// Where the host's kernel lists the mounts, opened when the server was made: later it may be out of reach.
    mounts: Mutex<File>,
    /// The device of the share's root, which is shared whatever it is.
    root: u64,
    known: [AtomicU8; 256],
}

impl PseudoFileSystems {
    /// For the share with this root.
    ///
    /// # Errors
    /// What the host says of the root, or of /proc.
    pub(super) fn new(root: &File) -> io::Result<PseudoFileSystems> {
        Ok(PseudoFileSystems {
            mounts: Mutex::new(File::open("/proc/self/mountinfo")?),
            root: root.metadata()?.dev(),
            known: std::array::from_fn(|_| AtomicU8::new(UNKNOWN)),
        })
    }

    /// Takes note of a node that is about to be given out, on this device.
    ///
    /// # Errors
    /// What the host says of its list of mounts.
    pub(super) fn note(&self, node: u64, device: u64) -> io::Result<()> {
        let known = self.of(node);
        if known.load(Relaxed) == UNKNOWN {
            known.store(if self.is_pseudo(device)? { PSEUDO } else { ORDINARY }, Relaxed);
        }
        Ok(())
    }

    /// Whether an operation on this node must not be carried out.
    pub(super) fn refuses(&self, code: u32, node: u64) -> bool {
        const ATTRIBUTES: [u32; 7] = [
            opcode::GETATTR,
            opcode::ACCESS,
            opcode::STATFS,
            opcode::GETXATTR,
            opcode::LISTXATTR,
            opcode::FORGET,
            opcode::BATCH_FORGET,
        ];
        self.of(node).load(Relaxed) == PSEUDO && !ATTRIBUTES.contains(&code)
    }

    /// What is known of a node's mount: bits 47 to 54 of a node id are its number (fuse-backend-rs,
    /// `UniqueInodeGenerator`), 0 for the root.
    fn of(&self, node: u64) -> &AtomicU8 {
        &self.known[(node >> 47) as usize & 0xff]
    }

    fn is_pseudo(&self, device: u64) -> io::Result<bool> {
        if device == self.root {
            return Ok(false);
        }
        let mut table = String::new();
        {
            let mut mounts = self.mounts.lock().unwrap_or_else(PoisonError::into_inner);
            mounts.rewind()?;
            mounts.read_to_string(&mut table)?;
        }
        let device = format!("{}:{}", libc::major(device), libc::minor(device));
        Ok(table.lines().any(|line| is_pseudo_mount(line, &device)))
    }
}

/// Whether a line of /proc/self/mountinfo (proc_pid_mountinfo(5)) is about this device, and that holds no files.
fn is_pseudo_mount(line: &str, device: &str) -> bool {
    let Some((mount, kind)) = line.split_once(" - ") else { return false };
    let kind = kind.split(' ').next().unwrap_or_default();
    mount.split(' ').nth(2) == Some(device) && TYPES.contains(&kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_told_by_device_and_type() {
        let proc = "23 1 0:21 / /proc rw,nosuid shared:12 - proc proc rw";
        let tmpfs = "25 1 0:23 / /run rw,nosuid shared:5 - tmpfs tmpfs rw,size=400k";
        let trace = "30 1 0:12 / /sys/kernel/tracing rw - tracefs tracefs rw";
        assert!(is_pseudo_mount(proc, "0:21") && is_pseudo_mount(trace, "0:12"));
        assert!(!is_pseudo_mount(proc, "0:2") && !is_pseudo_mount(tmpfs, "0:23"));
        for broken in ["", "a - b", "- proc", "23 1"] {
            assert!(!is_pseudo_mount(broken, "0:21"));
        }
    }

    #[test]
    fn the_hosts_own_are_known() {
        let open = |path| File::open(path).unwrap();
        let (root, proc) = (open("/"), open("/proc").metadata().unwrap().dev());
        let systems = PseudoFileSystems::new(&root).unwrap();
        assert!(systems.is_pseudo(proc).unwrap());
        assert!(!systems.is_pseudo(root.metadata().unwrap().dev()).unwrap());
        // Who shares /proc itself wants it so.
        assert!(!PseudoFileSystems::new(&open("/proc")).unwrap().is_pseudo(proc).unwrap());
    }

    #[test]
    fn only_attributes_are_given_of_them() {
        let systems = PseudoFileSystems::new(&File::open("/").unwrap()).unwrap();
        let proc = File::open("/proc").unwrap().metadata().unwrap().dev();
        let node = 3 << 47 | 1;
        systems.note(node, proc).unwrap();
        systems.note(4 << 47, systems.root).unwrap();
        for code in 0..60 {
            let given = [2, 3, 17, 22, 23, 34, 42].contains(&code);
            assert_eq!(systems.refuses(code, node), !given, "{code}");
            assert!(!systems.refuses(code, 4 << 47) && !systems.refuses(code, 1), "{code}");
        }
    }
}
