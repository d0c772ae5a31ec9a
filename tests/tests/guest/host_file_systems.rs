//! What is below a share: file systems that fill up, disks that fail, what is unmounted, servers that are gone. The guest goes
//! on, with what there still is.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::linux::fs::MetadataExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use rustix::io::Errno;
use tests::guest::Op;
use tests::guest::data::{Content, fill};
use tests::vm::Kernel;

use crate::harness::{Outcome, ensure, ensure_eq};
use crate::host_changes::{PlainCheck, block, boot, expected, finish};

/// The checks.
pub const CHECKS: &[(&str, PlainCheck)] = &[
    ("full-tmpfs", full_tmpfs),
    ("full-ext4", full_ext4),
    ("disk-that-fails", failing_disk),
    ("blocks-of-other-sizes", block_sizes),
    ("unmounted-below", unmounted),
    ("server-that-is-gone", server_gone),
];

/// A file system of the host that is mounted for one check.
pub struct Disk {
    /// Where it is mounted.
    pub dir: PathBuf,
    undo: Vec<Vec<String>>,
}

impl Disk {
    /// Runs a program; returns what it says.
    pub fn run(words: &[&str]) -> Result<String, Box<dyn std::error::Error>> {
        let output = Command::new(words[0]).args(&words[1..]).output();
        let output = output.map_err(|error| format!("{}: {error}", words[0]))?;
        ensure!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    }

    fn undo(&mut self, words: &[&str]) {
        self.undo.push(words.iter().map(|word| (*word).to_owned()).collect());
    }

    /// Mounts a file system in `dir`.
    pub fn mount(
        dir: &Path,
        kind: &str,
        source: &str,
        options: &str,
    ) -> Result<Disk, Box<dyn std::error::Error>> {
        let dir = dir.join("disk");
        fs::create_dir(&dir)?;
        let target = dir.to_str().ok_or("a path that is no text")?.to_owned();
        Disk::run(&["mount", "-t", kind, "-o", options, source, &target])?;
        let mut disk = Disk { dir, undo: Vec::new() };
        disk.undo(&["umount", &target]);
        Ok(disk)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        while let Some(words) = self.undo.pop() {
            let words: Vec<_> = words.iter().map(String::as_str).collect();
            if let Err(error) = Disk::run(&words) {
                eprintln!("left behind: {error}");
            }
        }
    }
}

/// An ext4 of 32 MiB with blocks of 1 KiB in a file of `dir`, by way of device mapper: the second is the name of the device.
pub fn ext4(dir: &Path, name: &str) -> Result<Disk, Box<dyn std::error::Error>> {
    let image = dir.join("image");
    File::create(&image)?.set_len(32 << 20)?;
    let image = image.to_str().ok_or("a path that is no text")?;
    let device = Disk::run(&["losetup", "--find", "--show", image])?;
    let table = format!("0 65536 linear {device} 0");
    Disk::run(&["dmsetup", "--noudevsync", "create", name, "--table", &table])?;
    let mapped = format!("/dev/mapper/{name}");
    Disk::run(&["dmsetup", "mknodes", name])?;
    Disk::run(&["mkfs.ext4", "-q", "-b", "1024", &mapped])?;
    let mut disk = Disk::mount(dir, "ext4", &mapped, "errors=continue")?;
    let unmount = disk.undo.pop().unwrap_or_default();
    disk.undo(&["losetup", "--detach", &device]);
    disk.undo(&["dmsetup", "--noudevsync", "remove", "--retry", name]);
    disk.undo.push(unmount);
    Ok(disk)
}

/// Writes to a hole for which there is no room, and to a page that is there.
fn full(kernel: &Kernel, disk: &Disk) -> Outcome {
    let content = Content { seed: 75, len: 64 << 10 };
    let host = disk.dir.join("file");
    content.write_to(&host)?;
    File::options().write(true).open(&host)?.set_len(6 << 20)?;
    let filler = File::create(disk.dir.join("filler"))?;
    let mut at = 0;
    while filler.write_at(&[1; 4096], at).is_ok_and(|written| written == 4096) {
        at += 4096;
    }
    let mut vm = boot(kernel, 1, &disk.dir)?;
    let map = vm.map("/mnt/file", 0, 6 << 20, true)?;
    ensure_eq!(block(&mut vm, map, 5 << 20)?, vec![0; 16], "a hole");
    // From the kernel, and by a program.
    vm.map_write(map, 5 << 20, b"no room")?;
    match vm.write_content("/mnt/file", 2 << 20, Content { seed: 76, len: 1 << 20 }, true, 1) {
        // Its fsync may say what has happened.
        Err(error) if [Errno::IO, Errno::NOSPC].iter().any(|at| error.errno() == Some(at.raw_os_error())) => {
        }
        written => written?,
    }
    vm.map_write(map, 16, b"room")?;
    ensure_eq!(block(&mut vm, map, 32)?, expected(content, 32), "what was there");
    vm.run(Op::Unmap(map))?;
    let mut found = [0; 4];
    File::open(&host)?.read_exact_at(&mut found, 16)?;
    ensure_eq!(&found, b"room");
    fs::remove_file(disk.dir.join("filler"))?;
    let (counts, ended) = finish(vm)?;
    ensure!(counts.failed_pages > 0, "{counts:?}");
    ensure_eq!(counts.lost_pages, 0, "lost pages");
    ensure_eq!(ended.console.matches("cannot provide pages").count(), 1, "how often it was said");
    Ok(())
}

fn full_tmpfs(kernel: &Kernel, dir: &Path) -> Outcome {
    full(kernel, &Disk::mount(dir, "tmpfs", "tmpfs", "size=4m")?)
}

fn full_ext4(kernel: &Kernel, dir: &Path) -> Outcome {
    full(kernel, &ext4(dir, "daxvm-full")?)
}

/// All reads of a disk fail from some moment on.
fn failing_disk(kernel: &Kernel, dir: &Path) -> Outcome {
    let content = Content { seed: 77, len: 8 << 20 };
    let disk = ext4(dir, "daxvm-fails")?;
    content.write_to(&disk.dir.join("file"))?;
    Disk::run(&["sync"])?;
    let mut vm = boot(kernel, 1, &disk.dir)?;
    let map = vm.map("/mnt/file", 0, content.len as usize, false)?;
    ensure_eq!(block(&mut vm, map, 0)?, expected(content, 0), "before");
    fs::write("/proc/sys/vm/drop_caches", "1")?;
    Disk::run(&["dmsetup", "--noudevsync", "suspend", "--nolockfs", "daxvm-fails"])?;
    Disk::run(&["dmsetup", "load", "daxvm-fails", "--table", "0 65536 error"])?;
    Disk::run(&["dmsetup", "--noudevsync", "resume", "daxvm-fails"])?;
    ensure_eq!(block(&mut vm, map, 5 << 20)?, vec![0; 16], "what cannot be read");
    ensure!(vm.call::<Option<u64>>(&Op::MapVerify(map, content.seed))?.is_some(), "all of it was there");
    vm.run(Op::Unmap(map))?;
    let (counts, ended) = finish(vm)?;
    ensure!(counts.failed_pages > 0, "{counts:?}");
    ensure_eq!(ended.console.matches("cannot provide pages").count(), 1, "how often it was said");
    Ok(())
}

/// File systems whose blocks are smaller and larger than a page: what a mapping has stored can be made durable.
fn block_sizes(kernel: &Kernel, dir: &Path) -> Outcome {
    fs::create_dir(dir.join("huge"))?;
    let (small, huge) =
        (ext4(dir, "daxvm-blocks")?, Disk::mount(&dir.join("huge"), "tmpfs", "tmpfs", "huge=always")?);
    let content = Content { seed: 80, len: 4 << 20 };
    for (disk, block_size) in [(&small, 1 << 10), (&huge, 2 << 20)] {
        let host = disk.dir.join("file");
        content.write_to(&host)?;
        ensure_eq!(fs::metadata(&host)?.st_blksize(), block_size, "the host's block size");
        let mut vm = boot(kernel, 1, &disk.dir)?;
        let map = vm.map("/mnt/file", 0, content.len as usize, true)?;
        for at in [64, 3 << 20] {
            vm.map_write(map, at, b"kept")?;
        }
        vm.run(Op::MapSync(map))?;
        vm.run(Op::Unmap(map))?;
        ensure_eq!(vm.call::<Vec<String>>(&Op::KernelLog("WARNING".into()))?, Vec::<String>::new());
        finish(vm)?;
        for at in [64, 3 << 20] {
            let mut found = [0; 4];
            File::open(&host)?.read_exact_at(&mut found, at)?;
            ensure_eq!(&found, b"kept", "at {at}");
        }
    }
    Ok(())
}

/// The host unmounts what a share is on: the guest keeps it.
fn unmounted(kernel: &Kernel, dir: &Path) -> Outcome {
    let content = Content { seed: 79, len: 4 << 20 };
    let disk = ext4(dir, "daxvm-unmounted")?;
    content.write_to(&disk.dir.join("file"))?;
    let mut vm = boot(kernel, 1, &disk.dir)?;
    let map = vm.map("/mnt/file", 0, content.len as usize, true)?;
    ensure_eq!(block(&mut vm, map, 0)?, expected(content, 0), "before");
    let target = disk.dir.to_str().ok_or("a path that is no text")?;
    Disk::run(&["umount", "--lazy", target])?;
    ensure_eq!(fs::read_dir(&disk.dir)?.count(), 0, "files where it was mounted");
    ensure_eq!(vm.call::<Option<u64>>(&Op::MapVerify(map, content.seed))?, None, "unmounted");
    vm.map_write(map, 64, b"kept")?;
    vm.create("/mnt/new")?;
    vm.write_content("/mnt/new", 0, content, false, 1)?;
    vm.run(Op::Unmap(map))?;
    let (counts, _) = finish(vm)?;
    ensure_eq!((counts.lost_files, counts.failed_pages), (0, 0), "what was lost");
    // With the guest the file system goes, and not before.
    Disk::run(&["mount", "-t", "ext4", "/dev/mapper/daxvm-unmounted", target])?;
    let mut found = [0; 4];
    File::open(disk.dir.join("file"))?.read_exact_at(&mut found, 64)?;
    ensure_eq!(&found, b"kept");
    ensure_eq!(fs::metadata(disk.dir.join("new"))?.st_size(), content.len, "the size of what was made");
    Ok(())
}

/// A file system whose server is a process: it has one file.
struct Served(Content);

impl Served {
    const FILE: fuser::INodeNo = fuser::INodeNo(2);
    const NAME: &str = "file";
    const VALID: Duration = Duration::from_secs(3600);

    fn attributes(&self, node: fuser::INodeNo) -> Option<fuser::FileAttr> {
        let (kind, perm, size) = match node {
            fuser::INodeNo::ROOT => (fuser::FileType::Directory, 0o755, 0),
            Served::FILE => (fuser::FileType::RegularFile, 0o644, self.0.len),
            _ => return None,
        };
        let time = SystemTime::UNIX_EPOCH;
        Some(fuser::FileAttr {
            ino: node,
            size,
            blocks: size / 512,
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }
}

impl fuser::Filesystem for Served {
    fn lookup(&self, _: &fuser::Request, _: fuser::INodeNo, name: &OsStr, reply: fuser::ReplyEntry) {
        match self.attributes(Served::FILE).filter(|_| name == Served::NAME) {
            Some(attributes) => reply.entry(&Served::VALID, &attributes, fuser::Generation(0)),
            None => reply.error(fuser::Errno::ENOENT),
        }
    }

    fn getattr(
        &self,
        _: &fuser::Request,
        node: fuser::INodeNo,
        _: Option<fuser::FileHandle>,
        reply: fuser::ReplyAttr,
    ) {
        match self.attributes(node) {
            Some(attributes) => reply.attr(&Served::VALID, &attributes),
            None => reply.error(fuser::Errno::ENOENT),
        }
    }

    fn read(
        &self,
        _: &fuser::Request,
        _: fuser::INodeNo,
        _: fuser::FileHandle,
        offset: u64,
        size: u32,
        _: fuser::OpenFlags,
        _: Option<fuser::LockOwner>,
        reply: fuser::ReplyData,
    ) {
        let mut data = vec![0; self.0.len.saturating_sub(offset).min(size.into()) as usize];
        fill(self.0.seed, offset, &mut data);
        reply.data(&data);
    }
}

/// The connection to the server of the file system below breaks: what the host has in memory stays, the rest is zeros where it
/// is mapped and an error where it is asked for.
fn server_gone(kernel: &Kernel, dir: &Path) -> Outcome {
    let content = Content { seed: 80, len: 8 << 20 };
    let mount = dir.join("served");
    fs::create_dir(&mount)?;
    let mut config = fuser::Config::default();
    config.mount_options = vec![fuser::MountOption::FSName("daxvm-test".into())];
    config.acl = fuser::SessionACL::All;
    let server = fuser::spawn_mount(Served(content), &mount, &config)?;
    let mut vm = boot(kernel, 1, &mount)?;
    let map = vm.map("/mnt/file", 0, content.len as usize, false)?;
    ensure_eq!(block(&mut vm, map, 0)?, expected(content, 0), "before");
    // As the end of the server does it.
    let connections = Disk::mount(dir, "fusectl", "none", "rw")?;
    let device = rustix::fs::minor(fs::metadata(&mount)?.st_dev());
    fs::write(connections.dir.join(device.to_string()).join("abort"), "1")?;
    let error = fs::metadata(mount.join("other")).map(drop).map_err(|error| error.raw_os_error());
    ensure_eq!(error, Err(Some(Errno::NOTCONN.raw_os_error())), "on the host");
    ensure_eq!(block(&mut vm, map, 0)?, expected(content, 0), "what the host has in memory");
    // A chunk that is mapped now. Reading has made the host's attributes of the file old, and it may have asked for new ones
    // since; if not, nobody knows the file any more, and the mapping is refused.
    let is_refused = match vm.map_read(map, 6 << 20, 16) {
        Ok(found) => {
            ensure_eq!(found, vec![0; 16], "what nobody can provide");
            false
        }
        Err(error) => {
            ensure_eq!(error.errno(), Some(Errno::FAULT.raw_os_error()), "{error}");
            true
        }
    };
    let missing = vm.read_bytes("/mnt/other", 0, 16).err().map(|error| error.errno());
    ensure_eq!(missing, Some(Some(Errno::NOTCONN.raw_os_error())), "what the guest is told");
    vm.run(Op::Unmap(map))?;
    let (counts, ended) = finish(vm)?;
    ensure_eq!(counts.failed_pages == 0, is_refused, "{counts:?}");
    let said = ended.console.matches("cannot provide pages").count();
    ensure_eq!(said, usize::from(!is_refused), "how often it was said");
    drop(server);
    Ok(())
}
