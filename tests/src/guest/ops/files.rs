//! Operations on names, attributes and handles.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};

use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, FlockOperation, Mode, OFlags, RenameFlags, SeekFrom, Statx,
    StatxAttributes, StatxFlags, Timespec, Timestamps, XattrFlags,
};
use rustix::io::Errno;

use crate::guest::agent::done;
use crate::guest::{Bytes, Failure, FallocateHow, GuestPath, LockKind, Op, OpenHow, RenameHow, Reply, Stat};
use crate::inode_flags;

/// The operations that need nothing but their paths.
pub fn perform(op: Op) -> Reply {
    match op {
        Op::Stat(path) => done(stat(&path)),
        Op::MkdirAll(path) => done(fs::create_dir_all(&path).map_err(Failure::from)),
        Op::Mkdir(path) => done(fs::create_dir(&path).map_err(Failure::from)),
        Op::Symlink(target, link) => {
            done(std::os::unix::fs::symlink(target.as_path(), &link).map_err(Failure::from))
        }
        Op::ReadLink(path) => {
            done(fs::read_link(&path).map(|to| GuestPath::from(&to)).map_err(Failure::from))
        }
        Op::Link(old, new) => done(fs::hard_link(&old, &new).map_err(Failure::from)),
        Op::Mkfifo(path) => done(mkfifo(&path)),
        Op::Rename(old, new, how) => done(rename(&old, &new, how)),
        Op::Unlink(path) => done(fs::remove_file(&path).map_err(Failure::from)),
        Op::Rmdir(path) => done(fs::remove_dir(&path).map_err(Failure::from)),
        Op::RemoveAll(path) => done(fs::remove_dir_all(&path).map_err(Failure::from)),
        Op::ReadDir(path) => done(read_dir(&path)),
        Op::Truncate(path, len) => done(truncate(&path, len)),
        Op::Fallocate(path, how, offset, len) => done(fallocate(&path, how, offset, len)),
        Op::CopyFileRange(from, to) => done(copy_file_range(&from, &to)),
        Op::DataRuns(path) => done(data_runs(&path)),
        Op::Chmod(path, mode) => {
            done(fs::set_permissions(&path, Permissions::from_mode(mode)).map_err(Failure::from))
        }
        Op::Chown(path, uid, gid) => {
            done(std::os::unix::fs::lchown(&path, Some(uid), Some(gid)).map_err(Failure::from))
        }
        Op::SetMtime(path, seconds, nanoseconds) => done(set_mtime(&path, seconds, nanoseconds)),
        Op::SetXattr(path, name, value) => {
            let set = rustix::fs::lsetxattr(path.as_path(), &name, &value.0, XattrFlags::empty());
            done(set.map_err(Failure::from))
        }
        Op::GetXattr(path, name) => done(get_xattr(&path, &name)),
        Op::ListXattr(path) => done(list_xattr(&path)),
        Op::RemoveXattr(path, name) => {
            done(rustix::fs::lremovexattr(path.as_path(), &name).map_err(Failure::from))
        }
        Op::Flags(path) => done(inode_flags::get(path.as_path()).map_err(Failure::from)),
        Op::SetFlags(path, flags) => done(inode_flags::set(path.as_path(), flags).map_err(Failure::from)),
        Op::Extended(path) => done(inode_flags::get_extended(path.as_path()).map_err(Failure::from)),
        Op::SetExtended(path, attributes) => {
            done(inode_flags::set_extended(path.as_path(), attributes).map_err(Failure::from))
        }
        other => Err(Failure::new(format!("no operation on paths: {other:?}"))),
    }
}

fn from_statx(statx: &Statx) -> Stat {
    let known = statx.stx_attributes_mask & statx.stx_attributes;
    Stat {
        size: statx.stx_size,
        blocks: statx.stx_blocks,
        mode: statx.stx_mode.into(),
        ino: statx.stx_ino,
        nlink: statx.stx_nlink,
        uid: statx.stx_uid,
        gid: statx.stx_gid,
        mtime: (statx.stx_mtime.tv_sec, statx.stx_mtime.tv_nsec),
        dax: known.contains(StatxAttributes::DAX),
    }
}

fn stat(path: &GuestPath) -> Result<Stat, Failure> {
    let flags = AtFlags::SYMLINK_NOFOLLOW;
    Ok(from_statx(&rustix::fs::statx(CWD, path.as_path(), flags, StatxFlags::BASIC_STATS)?))
}

/// What statx says of an open file.
pub fn stat_handle(file: &File) -> Result<Stat, Failure> {
    Ok(from_statx(&rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)?))
}

fn mkfifo(path: &GuestPath) -> Result<(), Failure> {
    Ok(rustix::fs::mknodat(CWD, path.as_path(), FileType::Fifo, Mode::from_raw_mode(0o644), 0)?)
}

fn rename(old: &GuestPath, new: &GuestPath, how: RenameHow) -> Result<(), Failure> {
    let flags = match how {
        RenameHow::Replace => RenameFlags::empty(),
        RenameHow::NoReplace => RenameFlags::NOREPLACE,
        RenameHow::Exchange => RenameFlags::EXCHANGE,
    };
    Ok(rustix::fs::renameat_with(CWD, old.as_path(), CWD, new.as_path(), flags)?)
}

fn read_dir(path: &GuestPath) -> Result<Vec<GuestPath>, Failure> {
    let names = fs::read_dir(path)?.map(|entry| Ok(GuestPath::from(&entry?.file_name())));
    let mut names: Vec<GuestPath> = names.collect::<Result<_, Failure>>()?;
    names.sort();
    Ok(names)
}

fn truncate(path: &GuestPath, len: u64) -> Result<(), Failure> {
    Ok(File::options().write(true).open(path)?.set_len(len)?)
}

fn fallocate(path: &GuestPath, how: FallocateHow, offset: u64, len: u64) -> Result<(), Failure> {
    let flags = match how {
        FallocateHow::Allocate => FallocateFlags::empty(),
        FallocateHow::KeepSize => FallocateFlags::KEEP_SIZE,
        FallocateHow::PunchHole => FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE,
    };
    let file = File::options().write(true).open(path)?;
    Ok(rustix::fs::fallocate(file, flags, offset, len)?)
}

fn copy_file_range(from: &GuestPath, to: &GuestPath) -> Result<u64, Failure> {
    let (from, to) = (File::open(from)?, File::create(to)?);
    let len = from.metadata()?.len();
    let mut copied = 0;
    while copied < len {
        match rustix::fs::copy_file_range(&from, None, &to, None, (len - copied) as usize)? {
            0 => break,
            some => copied += some as u64,
        }
    }
    Ok(copied)
}

fn data_runs(path: &GuestPath) -> Result<Vec<(u64, u64)>, Failure> {
    let file = File::open(path)?;
    let mut runs = Vec::new();
    let mut from = 0;
    loop {
        let start = match rustix::fs::seek(&file, SeekFrom::Data(from)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(runs),
            Err(errno) => return Err(errno.into()),
        };
        from = rustix::fs::seek(&file, SeekFrom::Hole(start))?;
        runs.push((start, from));
    }
}

fn set_mtime(path: &GuestPath, seconds: i64, nanoseconds: u32) -> Result<(), Failure> {
    let mtime = Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() };
    let times = Timestamps { last_access: mtime, last_modification: mtime };
    Ok(rustix::fs::utimensat(CWD, path.as_path(), &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

fn get_xattr(path: &GuestPath, name: &str) -> Result<Bytes, Failure> {
    let mut value = vec![0; rustix::fs::lgetxattr_query(path.as_path(), name)?];
    let len = rustix::fs::lgetxattr(path.as_path(), name, &mut value[..])?;
    value.truncate(len);
    Ok(Bytes(value))
}

fn list_xattr(path: &GuestPath) -> Result<Vec<String>, Failure> {
    let mut list = vec![0; rustix::fs::llistxattr_query(path.as_path())?];
    let len = rustix::fs::llistxattr(path.as_path(), &mut list[..])?;
    let names = list[..len].split(|&byte| byte == 0).filter(|name| !name.is_empty());
    let mut names: Vec<String> = names.map(|name| String::from_utf8_lossy(name).into_owned()).collect();
    names.sort();
    Ok(names)
}

/// Opens a file as asked.
pub fn open(path: &GuestPath, how: OpenHow) -> Result<File, Failure> {
    let mut options = File::options();
    options.read(true).write(how.write && !how.append).append(how.append).truncate(how.truncate);
    if how.create_new {
        options.create_new(true);
    }
    if how.unnamed {
        options.custom_flags(OFlags::TMPFILE.bits() as i32);
    }
    Ok(options.open(path)?)
}

/// Tries to take a lock.
pub fn try_lock(file: &File, kind: LockKind) -> Result<bool, Failure> {
    let operation = FlockOperation::NonBlockingLockExclusive;
    let taken = match kind {
        LockKind::Flock => rustix::fs::flock(file, operation),
        LockKind::Posix => rustix::fs::fcntl_lock(file, operation),
    };
    match taken {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK | Errno::ACCESS) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Gives a lock back.
pub fn unlock(file: &File, kind: LockKind) -> Result<(), Failure> {
    Ok(match kind {
        LockKind::Flock => rustix::fs::flock(file, FlockOperation::Unlock),
        LockKind::Posix => rustix::fs::fcntl_lock(file, FlockOperation::Unlock),
    }?)
}
