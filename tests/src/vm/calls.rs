//! The guest's operations as plain calls. What is not here goes through [`Vm::call`].

use serde_json::Value;

use super::{Vm, VmError};
use crate::guest::data::Content;
use crate::guest::{
    Access, Bytes, CommandOutput, Data, Digest, GuestPath, Map, Mount, Op, OpenHow, Pass, Passes, PciDevice,
    Random, RenameHow, Sha256, SmallFiles, SmallFilesPhase, Stat, Verified, Verify, Write,
};

type Result<T> = std::result::Result<T, VmError>;

impl Vm {
    /// An operation whose only answer is that it was done.
    pub fn run(&mut self, op: Op) -> Result<()> {
        self.call::<Value>(&op).map(drop)
    }

    /// Mounts a share.
    pub fn mount(&mut self, tag: &str, target: &str, options: &str) -> Result<()> {
        let (fstype, source, options) = ("virtiofs".into(), tag.into(), options.into());
        self.run(Op::Mount(Mount { fstype, source, target: target.into(), options }))
    }

    /// Unmounts.
    pub fn umount(&mut self, target: &str) -> Result<()> {
        self.run(Op::Umount(target.into(), false))
    }

    /// The text of a file such as those below /proc and /sys.
    pub fn read_text(&mut self, path: &str) -> Result<String> {
        self.call(&Op::ReadText(path.into()))
    }

    /// A line of /proc/meminfo, in KiB.
    pub fn meminfo_kib(&mut self, key: &str) -> Result<u64> {
        let text = self.read_text("/proc/meminfo")?;
        let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        let kib = value.and_then(|value| value.trim().trim_end_matches(" kB").parse().ok());
        kib.ok_or_else(|| VmError::Guest(crate::guest::Failure::new(format!("no {key} in /proc/meminfo"))))
    }

    /// Drops every cache of the guest.
    pub fn drop_caches(&mut self) -> Result<()> {
        self.run(Op::DropCaches)
    }

    /// The PCI devices.
    pub fn pci(&mut self) -> Result<Vec<PciDevice>> {
        self.call(&Op::Pci)
    }

    /// The virtio-fs devices, in the order of the shares.
    pub fn virtio_fs_devices(&mut self) -> Result<Vec<PciDevice>> {
        Ok(self.pci()?.into_iter().filter(|pci| (pci.vendor, pci.device) == (0x1af4, 0x105a)).collect())
    }

    /// Takes a PCI device from its driver.
    pub fn unbind(&mut self, device: &PciDevice) -> Result<()> {
        let unbind = format!("/sys/bus/pci/devices/{}/driver/unbind", device.address);
        self.run(Op::WriteText(unbind.into(), device.address.clone()))
    }

    /// Gives a PCI device to the virtio driver.
    pub fn bind(&mut self, device: &PciDevice) -> Result<()> {
        self.run(Op::WriteText("/sys/bus/pci/drivers/virtio-pci/bind".into(), device.address.clone()))
    }

    /// What statx says.
    pub fn stat(&mut self, path: impl Into<GuestPath>) -> Result<Stat> {
        self.call(&Op::Stat(path.into()))
    }

    /// The names in a directory.
    pub fn read_dir(&mut self, path: impl Into<GuestPath>) -> Result<Vec<GuestPath>> {
        self.call(&Op::ReadDir(path.into()))
    }

    /// Renames, replacing what is there.
    pub fn rename(&mut self, from: impl Into<GuestPath>, to: impl Into<GuestPath>) -> Result<()> {
        self.run(Op::Rename(from.into(), to.into(), RenameHow::Replace))
    }

    /// Creates an empty file.
    pub fn create(&mut self, path: impl Into<GuestPath>) -> Result<()> {
        let handle = self.open(path, OpenHow { write: true, create_new: true, ..OpenHow::default() })?;
        self.run(Op::Close(handle))
    }

    /// Opens a file and keeps it open.
    pub fn open(&mut self, path: impl Into<GuestPath>, how: OpenHow) -> Result<u32> {
        self.call(&Op::Open(path.into(), how))
    }

    /// Bytes of a file.
    pub fn read_bytes(&mut self, path: impl Into<GuestPath>, offset: u64, len: usize) -> Result<Vec<u8>> {
        Ok(self.call::<Bytes>(&Op::ReadBytes(path.into(), offset, len))?.0)
    }

    /// Writes bytes by pwrite(2), and has them on the host.
    pub fn pwrite(&mut self, path: impl Into<GuestPath>, offset: u64, bytes: &[u8]) -> Result<()> {
        let data = Data::Bytes(Bytes(bytes.to_vec()));
        self.run(Op::Write(Write { path: path.into(), offset, data, mmap: false, fsync: true, writers: 1 }))
    }

    /// Writes a seed's content over a range by some threads, through mappings or by pwrite(2), and has it on the host.
    pub fn write_content(
        &mut self,
        path: &str,
        offset: u64,
        content: Content,
        mmap: bool,
        writers: usize,
    ) -> Result<()> {
        let data = Data::Content(content);
        self.run(Op::Write(Write { path: path.into(), offset, data, mmap, fsync: true, writers }))
    }

    /// The digest of a file, read in some way.
    pub fn sha256(&mut self, path: &str, how: Access) -> Result<Digest> {
        Ok(self.sha256_at_once(path, how, 1)?.remove(0))
    }

    /// The digests that some readers at once make of a file.
    pub fn sha256_at_once(&mut self, path: &str, how: Access, readers: usize) -> Result<Vec<Digest>> {
        self.call(&Op::Sha256(Sha256 { path: path.into(), how, readers }))
    }

    /// Goes over a file some times.
    pub fn passes(
        &mut self,
        path: &str,
        mmap: bool,
        random: Option<Random>,
        passes: usize,
    ) -> Result<Vec<Pass>> {
        self.call(&Op::Passes(Passes { path: path.into(), mmap, random, passes }))
    }

    /// Compares files with their contents, by some readers each.
    pub fn verify(&mut self, files: &[(&str, Content)], readers: usize, mmap: bool) -> Result<Verified> {
        let files = files.iter().map(|&(path, content)| (path.into(), content)).collect();
        self.call(&Op::Verify(Verify { files, readers, mmap }))
    }

    /// One phase of work on many small files, in batches, each of which may take as long as any other step.
    pub fn small_files(&mut self, dir: &str, count: u32, phase: SmallFilesPhase) -> Result<()> {
        const BATCH: u32 = 500;
        for first in (0..count).step_by(BATCH as usize) {
            let count = BATCH.min(count - first);
            let sizes = (0, 6000);
            self.call::<u64>(&Op::SmallFiles(SmallFiles { dir: dir.into(), first, count, sizes, phase }))?;
        }
        Ok(())
    }

    /// Maps a file and keeps it mapped.
    pub fn map(
        &mut self,
        path: impl Into<GuestPath>,
        offset: u64,
        len: usize,
        writable: bool,
    ) -> Result<u32> {
        self.call(&Op::Map(Map { path: path.into(), offset, len, writable }))
    }

    /// Bytes of a mapping.
    pub fn map_read(&mut self, map: u32, offset: u64, len: usize) -> Result<Vec<u8>> {
        Ok(self.call::<Bytes>(&Op::MapRead(map, offset, len))?.0)
    }

    /// Writes to a mapping.
    pub fn map_write(&mut self, map: u32, offset: u64, bytes: &[u8]) -> Result<()> {
        self.run(Op::MapWrite(map, offset, Bytes(bytes.to_vec())))
    }

    /// Runs a program in the guest.
    pub fn command(&mut self, argv: &[&str], stdin: &str) -> Result<CommandOutput> {
        self.call(&Op::Command(argv.iter().map(|&word| word.into()).collect(), stdin.into()))
    }
}
