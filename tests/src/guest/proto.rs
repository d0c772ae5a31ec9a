//! What the driver can ask of the guest, and what it gets back.

use std::{fmt, io};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::data::{Content, word};
use super::{Bytes, Changing, Contest, GuestPath, Journal, MakeKnown, OpenLoop};
use crate::inode_flags::Extended;

/// A reply: the op's own type in JSON, or why there is none.
pub type Reply = Result<Value, Failure>;

/// A request. The type it answers with stands behind the arrow; without one it is `()`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Op {
    /// The same text again: tries the line itself. -> `String`
    Echo(String),
    /// Leaves the guest. No reply: what the virtual machine does is the answer.
    End(End),

    /// The text of a file, such as those below /proc and /sys. -> `String`
    ReadText(GuestPath),
    /// Writes text to an existing file, such as those below /proc and /sys.
    WriteText(GuestPath, String),
    /// Runs a program with this standard input. -> [`CommandOutput`]
    Command(Vec<GuestPath>, String),
    /// The kernel's messages that contain a text. -> `Vec<String>`
    KernelLog(String),
    /// Writes back everything (sync) and drops page cache, dentries and inodes.
    DropCaches,
    /// Every PCI device, by address. -> `Vec<PciDevice>`
    Pci,

    /// Mounts a file system; the target is made if it is missing.
    Mount(Mount),
    /// Unmounts; lazily, which waits for no one, if asked to.
    Umount(GuestPath, bool),

    /// What statx says, of the link itself if it is one. -> [`Stat`]
    Stat(GuestPath),
    /// Makes a directory and what is missing above it.
    MkdirAll(GuestPath),
    /// Makes a directory.
    Mkdir(GuestPath),
    /// Makes the second path a symbolic link to the first.
    Symlink(GuestPath, GuestPath),
    /// Where a symbolic link points. -> [`GuestPath`]
    ReadLink(GuestPath),
    /// Makes the second path a hard link to the first.
    Link(GuestPath, GuestPath),
    /// Makes a fifo.
    Mkfifo(GuestPath),
    /// Moves the first path to the second.
    Rename(GuestPath, GuestPath, RenameHow),
    /// Removes a name that is no directory.
    Unlink(GuestPath),
    /// Removes an empty directory.
    Rmdir(GuestPath),
    /// Removes a tree.
    RemoveAll(GuestPath),
    /// The names in a directory, sorted. -> `Vec<GuestPath>`
    ReadDir(GuestPath),
    /// Sets a file's length.
    Truncate(GuestPath, u64),
    /// fallocate(2): path, how, offset, length.
    Fallocate(GuestPath, FallocateHow, u64, u64),
    /// copy_file_range(2) of a whole file into a new one. -> `u64`, bytes copied
    CopyFileRange(GuestPath, GuestPath),
    /// Every run of data, as offset and end, as SEEK_DATA and SEEK_HOLE see it. -> `Vec<(u64, u64)>`
    DataRuns(GuestPath),
    /// Permission bits.
    Chmod(GuestPath, u32),
    /// Owner and group.
    Chown(GuestPath, u32, u32),
    /// Sets the time of modification: seconds and nanoseconds.
    SetMtime(GuestPath, i64, u32),
    /// Sets an extended attribute.
    SetXattr(GuestPath, String, Bytes),
    /// An extended attribute. -> [`Bytes`]
    GetXattr(GuestPath, String),
    /// The names of all extended attributes, sorted. -> `Vec<String>`
    ListXattr(GuestPath),
    /// Removes an extended attribute.
    RemoveXattr(GuestPath, String),
    /// The flags of a file or directory (FS_IOC_GETFLAGS). -> `u32`
    Flags(GuestPath),
    /// Sets the flags (FS_IOC_SETFLAGS).
    SetFlags(GuestPath, u32),
    /// The extended attributes (FS_IOC_FSGETXATTR). -> [`Extended`]
    Extended(GuestPath),
    /// Sets the extended attributes (FS_IOC_FSSETXATTR).
    SetExtended(GuestPath, Extended),
    /// Has the kernel get to know files. -> `Vec<Known>`
    MakeKnown(MakeKnown),
    /// Opens a file and appends so many bytes, so many times. -> `Vec<(u64, bool)>`: sizes at which STATX_ATTR_DAX changed
    /// and what it was from then on, the first open being the first
    AppendSteps(GuestPath, usize, u32),
    /// Opens, reads and closes files for some time. -> [`super::Opened`]
    OpenLoop(OpenLoop),
    /// One phase of work on many small files. -> `u64`, microseconds
    SmallFiles(SmallFiles),

    /// Digests of files, each by each of some readers at once. -> `Vec<Digest>`, reader by reader
    Sha256(Sha256),
    /// Compares files with what they must contain, each with each of some readers at once. -> [`Verified`]
    Verify(Verify),
    /// Goes over a file some times, and says how long each time took. -> `Vec<Pass>`
    Passes(Passes),
    /// Bytes of a file by pread(2): path, offset, length; fewer at its end. -> [`Bytes`]
    ReadBytes(GuestPath, u64, usize),
    /// Writes a file; it must exist.
    Write(Write),
    /// Reads and writes a file that the host changes meanwhile. -> [`super::Met`]
    Changing(Changing),
    /// Writes records that are durable one by one, and prints a line for each.
    Journal(Journal),
    /// Has groups of readers read for some time. -> [`Vec<super::Fared>`](super::Fared), crowd by crowd
    Contest(Contest),

    /// Opens a file and keeps it open. -> `u32`, a handle
    Open(GuestPath, OpenHow),
    /// pread(2) on a handle: offset, length. -> [`Bytes`]
    ReadAt(u32, u64, usize),
    /// pwrite(2) on a handle.
    WriteAt(u32, u64, Bytes),
    /// What statx says of a handle. -> [`Stat`]
    StatHandle(u32),
    /// Gives a name to what a handle stands for: linkat(2) by /proc.
    LinkHandle(u32, GuestPath),
    /// Tries to lock a whole file. -> `bool`, false if someone else has it
    TryLock(u32, LockKind),
    /// Gives the lock back.
    Unlock(u32, LockKind),
    /// Closes a handle.
    Close(u32),

    /// Maps a file shared and keeps it mapped. -> `u32`, the mapping
    Map(Map),
    /// Copies from a mapping, through the kernel: a page that is not there is EFAULT, no signal. -> [`Bytes`]
    MapRead(u32, u64, usize),
    /// Reads four bytes at each of eight offsets of a mapping by one instruction, which takes AVX2. -> `[u32; 8]`
    MapGather(u32, [u32; 8]),
    /// Copies into a mapping, through the kernel.
    MapWrite(u32, u64, Bytes),
    /// Compares a mapping with a seed's content, as far as the mapping goes. -> `Option<u64>`, what differs first
    MapVerify(u32, u64),
    /// msync(2) of a whole mapping.
    MapSync(u32),
    /// Unmaps.
    Unmap(u32),
    /// Reads a file with O_DIRECT into a mapping. -> `usize`, bytes read
    DirectReadIntoMap(DirectRead),

    /// Takes two virtio-fs devices that have no driver, by their PCI addresses, to drive them by hand: that of a writable
    /// share, and that of a read-only share. -> `Vec<String>`, the names of the attempts that can be made
    TakeDevices(String, String),
    /// Makes an attempt with them, and has them recover. -> [`Tried`]
    Attempt(String),
    /// Leaves them as they were.
    LeaveDevices,
}

/// The ways out of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// ACPI power-off.
    PowerOff,
    /// A reset, the way the kernel's command line says.
    Reboot,
    /// A kernel panic.
    Panic,
}

/// What came of an attempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tried {
    /// Answers of the devices that were looked at.
    pub answers: u64,
    /// Those that were not as they must be, and what did not recover.
    pub wrong: Vec<String>,
}

/// Why an operation failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The system's error number, if it was the system that refused.
    pub errno: Option<i32>,
    /// The same for people.
    pub text: String,
}

impl Failure {
    /// A failure that is not the system's.
    pub fn new(text: impl Into<String>) -> Failure {
        Failure { errno: None, text: text.into() }
    }

    /// Says what was being done.
    pub fn within(self, what: impl fmt::Display) -> Failure {
        Failure { text: format!("{what}: {}", self.text), ..self }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Failure {}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        Failure { errno: error.raw_os_error(), text: error.to_string() }
    }
}

impl From<rustix::io::Errno> for Failure {
    fn from(errno: rustix::io::Errno) -> Failure {
        io::Error::from(errno).into()
    }
}

/// Arguments of mount(2).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Mount {
    /// The file system: `virtiofs`, `tmpfs`, ...
    pub fstype: String,
    /// A share's tag, a device, or anything.
    pub source: String,
    /// Where to.
    pub target: GuestPath,
    /// The file system's own options.
    pub options: String,
}

/// The part of statx(2) that tests look at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stat {
    /// Length in bytes.
    pub size: u64,
    /// Blocks of 512 bytes that are allocated.
    pub blocks: u64,
    /// Type and permissions.
    pub mode: u32,
    /// Inode number.
    pub ino: u64,
    /// Names of the inode.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of modification: seconds and nanoseconds.
    pub mtime: (i64, u32),
    /// STATX_ATTR_DAX, where the file system knows of it.
    pub dax: bool,
}

/// A rename's manner.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum RenameHow {
    /// What is at the new name is replaced.
    Replace,
    /// The new name must be free (RENAME_NOREPLACE).
    NoReplace,
    /// Both names change places (RENAME_EXCHANGE).
    Exchange,
}

/// A mode of fallocate(2).
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum FallocateHow {
    /// Allocates, and grows the file.
    Allocate,
    /// Allocates beyond the end, too, and leaves the length.
    KeepSize,
    /// Makes a hole.
    PunchHole,
}

/// A kind of whole-file lock.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum LockKind {
    /// flock(2), exclusive: belongs to the open file.
    Flock,
    /// fcntl(2), exclusive: belongs to the process.
    Posix,
}

/// How to open a file; by default for reading.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct OpenHow {
    /// For writing as well.
    pub write: bool,
    /// Create it; it must be new.
    pub create_new: bool,
    /// Every write goes to the end.
    pub append: bool,
    /// Cut it to nothing.
    pub truncate: bool,
    /// A file without a name in this directory (O_TMPFILE).
    pub unnamed: bool,
}

/// A phase of work on many small files. Their contents follow from their numbers; each phase checks what it finds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SmallFiles {
    /// The directory, which must be there.
    pub dir: GuestPath,
    /// The number of the first file.
    pub first: u32,
    /// How many files.
    pub count: u32,
    /// The least size of a file in bytes, and the first that none has.
    pub sizes: (u64, u64),
    /// What to do with each of them.
    pub phase: SmallFilesPhase,
}

impl SmallFiles {
    /// The path of the file with a number.
    pub fn path(&self, number: u32) -> GuestPath {
        self.dir.join(format!("file-{number:06}"))
    }

    /// What the file with a number contains.
    pub fn content(&self, number: u32) -> Content {
        let (least, end) = self.sizes;
        let len = least + word(u64::MAX, number.into()) % (end - least).max(1);
        Content { seed: number.into(), len }
    }
}

/// What to do with each of many small files; in this order.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum SmallFilesPhase {
    /// Creates and writes them.
    Create,
    /// Reads them back and compares every byte.
    Read,
    /// Renames them all.
    Rename,
    /// Removes them under their new names.
    Remove,
}

/// How a file's content is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Access {
    /// read(2) from the start, so many bytes at a time.
    Read(usize),
    /// A shared mapping, from the start.
    Mmap,
    /// The first byte of each page of a shared mapping, in order. The digest is of these bytes.
    Touch,
    /// pread(2) of whole blocks at random offsets.
    RandomRead(Random),
    /// Blocks at random offsets of a shared mapping.
    RandomMmap(Random),
}

/// Random offsets: see [`super::data::random_offsets`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Random {
    /// The stream of offsets; of several readers at once, each takes the next.
    pub seed: u64,
    /// How many.
    pub count: u64,
}

impl Random {
    /// The offsets of one of several readers.
    pub fn nth(self, reader: u64) -> Random {
        Random { seed: self.seed + reader, ..self }
    }
}

/// Which digests are asked for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Sha256 {
    /// The file.
    pub path: GuestPath,
    /// How it is read.
    pub how: Access,
    /// How many threads do the same at once.
    pub readers: usize,
}

/// What one reader found.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Digest {
    /// SHA-256 in hexadecimal; for random accesses over offsets and blocks.
    pub sha256: String,
    /// Bytes read.
    pub bytes: u64,
    /// How long it took, in microseconds.
    pub micros: u64,
}

/// A comparison of files with what they must contain. Reader `r` of `n` starts at `r / n` of each file and goes around, so
/// that readers are at different places.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Verify {
    /// The files.
    pub files: Vec<(GuestPath, Content)>,
    /// How many threads read each of them.
    pub readers: usize,
    /// By a shared mapping; else by pread(2).
    pub mmap: bool,
}

/// What a comparison found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// Bytes compared, over all readers.
    pub bytes: u64,
    /// Where something else was found: which file, which offset.
    pub differs: Vec<(GuestPath, u64)>,
    /// How long it took, in microseconds.
    pub micros: u64,
}

/// The same way over a file, some times. Of each page the first word is looked at.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Passes {
    /// The file.
    pub path: GuestPath,
    /// By a shared mapping, which stays from one time to the next; else by pread(2).
    pub mmap: bool,
    /// Pages at random offsets; else all of them in order.
    pub random: Option<Random>,
    /// How many times.
    pub passes: usize,
}

/// One time over a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pass {
    /// How long it took, in microseconds.
    pub micros: u64,
    /// The sum of the words that were looked at, modulo 2^64.
    pub sum: u64,
}

/// A write to a file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Write {
    /// The file.
    pub path: GuestPath,
    /// Where.
    pub offset: u64,
    /// What.
    pub data: Data,
    /// Through a shared mapping and msync(2); else by pwrite(2). A mapping does not make a file longer.
    pub mmap: bool,
    /// fsync(2) afterwards.
    pub fsync: bool,
    /// How many threads write a part each.
    pub writers: usize,
}

/// What to write.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Data {
    /// These bytes.
    Bytes(Bytes),
    /// So many bytes of a seed's stream, those that belong at the file's offset.
    Content(Content),
}

/// A mapping to make.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Map {
    /// The file.
    pub path: GuestPath,
    /// From here on; a multiple of the page size.
    pub offset: u64,
    /// So many bytes.
    pub len: usize,
    /// For writing as well.
    pub writable: bool,
}

/// A read(2) with O_DIRECT into a mapping. Everything in it must be a multiple of the block size.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DirectRead {
    /// The file to read.
    pub path: GuestPath,
    /// From where.
    pub offset: u64,
    /// How much.
    pub len: usize,
    /// The mapping to read into.
    pub map: u32,
    /// Where in it.
    pub at: u64,
}

/// What a program did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandOutput {
    /// Its exit status, if it exited.
    pub status: Option<i32>,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

/// A PCI device as the guest's kernel sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciDevice {
    /// Its address: `0000:00:01.0`.
    pub address: String,
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// The driver that has it.
    pub driver: Option<String>,
    /// Its address ranges that are set: start, end (inclusive), flags.
    pub resources: Vec<(u64, u64, u64)>,
}
