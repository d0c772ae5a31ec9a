//! What a policy may know of a file, and what of it a policy asks for.

use std::ffi::CString;
use std::time::Duration;

/// What a policy may know of a file. What costs a system call of its own is filled in only where [`Needs`] asks for it.
#[derive(Clone, Copy, Debug, Default)]
pub struct FileFacts<'a> {
    /// Type and permissions, as in `st_mode`.
    pub mode: u32,
    /// Length in bytes.
    pub size: u64,
    /// Owner, as the host has it.
    pub uid: u32,
    /// Group, as the host has it.
    pub gid: u32,
    /// Time since the contents changed last; zero for a time in the future.
    pub age: Duration,
    /// Whether the share is read-only.
    pub read_only: bool,
    /// How full the window is.
    pub window: WindowFacts,
    /// Where the guest found the file, relative to the share's root and without a leading slash; bytes as the host has
    /// them. Empty unless [`Needs::path`].
    pub path: &'a [u8],
    /// The persistent per-inode flag (FS_XFLAG_DAX). False unless [`Needs::hint`].
    pub hint: bool,
    /// Whether the file has capabilities (`security.capability`). False unless [`Needs::capabilities`].
    pub capabilities: bool,
    /// The values of the extended attributes that [`Needs::xattrs`] names, in that order; `None` where a file has none.
    pub xattrs: &'a [Option<Vec<u8>>],
}

/// How full a window is, in chunks of 2 MiB.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct WindowFacts {
    /// What the window has.
    pub chunks: u64,
    /// What is mapped now.
    pub mapped: u64,
    /// What the files need that the guest has open as DAX, the one in question left out.
    pub promised: u64,
    /// How much DAX is held back because the window thrashes, from 0 to [`MAX_THRASH_LEVEL`](super::MAX_THRASH_LEVEL).
    pub thrash: u8,
}

/// The facts that a policy asks for because they cost system calls.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Needs {
    /// [`FileFacts::path`].
    pub path: bool,
    /// [`FileFacts::hint`].
    pub hint: bool,
    /// [`FileFacts::capabilities`].
    pub capabilities: bool,
    /// [`FileFacts::xattrs`]: their names.
    pub xattrs: Vec<CString>,
}

impl From<&libc::stat64> for FileFacts<'_> {
    fn from(stat: &libc::stat64) -> Self {
        FileFacts {
            mode: stat.st_mode,
            size: u64::try_from(stat.st_size).unwrap_or(0),
            uid: stat.st_uid,
            gid: stat.st_gid,
            ..FileFacts::default()
        }
    }
}
