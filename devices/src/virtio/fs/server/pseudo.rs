//! The host's pseudo file systems, /proc and the like, as far as they happen to be mounted in a share.
//!
//! Who shares a whole root shares its mount points, too. Files below them are no files but doors into the host's kernel
//! and its processes: /proc/PID/mem is the memory of the VMM itself, /proc/kcore the kernel's, and to read /proc/kmsg may
//! take for ever. A guest mounts its own there, and needs no more than a directory to mount it on: of the host's it gets
//! that directory's attributes, and nothing below it.

use std::collections::HashSet;
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
    /// The devices that were pseudo file systems when the server was made, for should the host unmount one: a tree of the
    /// share's own keeps it.
    first: HashSet<String>,
    known: [AtomicU8; 256],
    /// A descriptor on each of the others, by which they are written out.
    ordinary: Mutex<Vec<File>>,
}

impl PseudoFileSystems {
    /// For the share with this root.
    ///
    /// # Errors
    /// What the host says of the root, or of /proc.
    pub(super) fn new(root: &File) -> io::Result<PseudoFileSystems> {
        let mut mounts = File::open("/proc/self/mountinfo")?;
        let mut table = String::new();
        mounts.read_to_string(&mut table)?;
        Ok(PseudoFileSystems {
            mounts: Mutex::new(mounts),
            root: root.metadata()?.dev(),
            first: table.lines().filter_map(pseudo_device).map(str::to_owned).collect(),
            known: std::array::from_fn(|_| AtomicU8::new(UNKNOWN)),
            ordinary: Mutex::default(),
        })
    }

    /// Takes note of a node that is about to be given out, on this device. `open` opens it.
    ///
    /// # Errors
    /// What the host says of its list of mounts.
    pub(super) fn note(
        &self,
        node: u64,
        device: u64,
        open: impl FnOnce() -> io::Result<File>,
    ) -> io::Result<()> {
        let known = self.of(node);
        if known.load(Relaxed) == UNKNOWN {
            let kind = if self.is_pseudo(device)? { PSEUDO } else { ORDINARY };
            let is_first = known.swap(kind, Relaxed) == UNKNOWN;
            // What cannot be opened is a socket or the like that is mounted on its own.
            if is_first
                && kind == ORDINARY
                && device != self.root
                && let Ok(file) = open()
            {
                self.ordinary.lock().unwrap_or_else(PoisonError::into_inner).push(file);
            }
        }
        Ok(())
    }

    /// Does something with each other file system of which the guest has seen a file.
    ///
    /// # Errors
    /// The first that `work` returns; the others are done all the same.
    pub(super) fn for_each_mount(&self, work: impl Fn(&File) -> io::Result<()>) -> io::Result<()> {
        let mounts = self.ordinary.lock().unwrap_or_else(PoisonError::into_inner);
        let mut result = Ok(());
        for mount in mounts.iter() {
            result = result.and(work(mount));
        }
        result
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
        Ok(self.first.contains(&device)
            || table.lines().filter_map(pseudo_device).any(|other| other == device))
    }
}

/// The device that a line of /proc/self/mountinfo (proc_pid_mountinfo(5)) is about, if it holds no files.
fn pseudo_device(line: &str) -> Option<&str> {
    let (mount, kind) = line.split_once(" - ")?;
    let kind = kind.split(' ').next().unwrap_or_default();
    mount.split(' ').nth(2).filter(|_| TYPES.contains(&kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_told_by_device_and_type() {
        let proc = "23 1 0:21 / /proc rw,nosuid shared:12 - proc proc rw";
        let tmpfs = "25 1 0:23 / /run rw,nosuid shared:5 - tmpfs tmpfs rw,size=400k";
        let trace = "30 1 0:12 / /sys/kernel/tracing rw - tracefs tracefs rw";
        assert_eq!((pseudo_device(proc), pseudo_device(trace)), (Some("0:21"), Some("0:12")));
        for line in [tmpfs, "", "a - b", "- proc", "23 1"] {
            assert_eq!(pseudo_device(line), None);
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
        systems.note(node, proc, || panic!("a pseudo file system is not opened")).unwrap();
        systems.note(4 << 47, systems.root, || panic!("the root is open")).unwrap();
        let shm = File::open("/dev/shm").unwrap();
        let device = shm.metadata().unwrap().dev();
        for _ in 0..2 {
            systems.note(5 << 47, device, || shm.try_clone()).unwrap();
        }
        let synced = std::cell::Cell::new(0);
        let failed = systems.for_each_mount(|mount| {
            assert_eq!(mount.metadata()?.dev(), device);
            synced.set(synced.get() + 1);
            Err(io::ErrorKind::StorageFull.into())
        });
        assert_eq!((synced.get(), failed.unwrap_err().kind()), (1, io::ErrorKind::StorageFull));
        for code in 0..60 {
            let given = [2, 3, 17, 22, 23, 34, 42].contains(&code);
            assert_eq!(systems.refuses(code, node), !given, "{code}");
            assert!(!systems.refuses(code, 4 << 47) && !systems.refuses(code, 1), "{code}");
        }
    }
}
