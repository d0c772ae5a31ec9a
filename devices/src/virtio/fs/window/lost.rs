//! What is said about files that the host takes away: each message once for a file, and a few paths for the report.

use std::collections::HashSet;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::files::{FileKey, MappedFile};

/// Paths that are kept for the report.
const MOST_PATHS: usize = 16;
/// Files that are remembered, so that each is spoken of once; a guest can make the host lose any number of them.
const MOST_FILES: usize = 4096;

/// Files whose pages were lost.
#[derive(Default)]
pub(super) struct LostFiles {
    known: Mutex<Known>,
    short: AtomicU64,
    unwatched: AtomicU64,
    has_said_unwatched: AtomicBool,
    has_said_full: AtomicBool,
    /// Where the share is, when it is a tree of its own, in which paths begin at its root.
    origin: OnceLock<PathBuf>,
}

#[derive(Default)]
struct Known {
    short: HashSet<FileKey>,
    failed: HashSet<FileKey>,
    paths: Vec<String>,
}

impl LostFiles {
    /// Has files named by their place below `origin`: they are in a tree of its own, which is mounted nowhere.
    pub(super) fn begin_at(&self, origin: &Path) {
        let _ = self.origin.set(origin.to_owned());
    }

    /// Where the host has a file now; ` (deleted)` follows if it has no name any more.
    fn path_of(&self, file: &MappedFile) -> String {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", file.file.as_raw_fd()));
        let whole = |path: PathBuf| match self.origin.get() {
            Some(origin) => origin.join(path.strip_prefix("/").unwrap_or(&path)),
            None => path,
        };
        link.map_or_else(|_| "unknown".into(), |path| whole(path).to_string_lossy().into_owned())
    }

    /// Says that a file has become shorter, unless that was said.
    pub(super) fn note_short(&self, file: &MappedFile) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.short.len() >= MOST_FILES || !known.short.insert(file.key) {
            return;
        }
        self.short.fetch_add(1, Relaxed);
        let path = self.path_of(file);
        tracing::warn!(
            path,
            "A shared file has become shorter on the host while the guest has it mapped: the guest sees zeros behind its \
             end until it grows again"
        );
        known.keep(path);
    }

    /// Says that the host could not read or write pages of a file, unless that was said.
    pub(super) fn note_failed(&self, file: &MappedFile, write: bool) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.failed.len() >= MOST_FILES || !known.failed.insert(file.key) {
            return;
        }
        let path = self.path_of(file);
        tracing::error!(
            path,
            write,
            "The host cannot provide pages of a shared file that the guest has mapped: its disk is full or has failed. The \
             guest sees zeros there, and what it writes there is lost"
        );
        known.keep(path);
    }

    /// Says that files are not watched.
    pub(super) fn note_unwatched(&self, error: &io::Error) {
        self.unwatched.fetch_add(1, Relaxed);
        if !self.has_said_unwatched.swap(true, Relaxed) {
            tracing::warn!(
                %error,
                "Cannot watch a shared file: a guest waits longer when it shrinks. Raise fs.inotify.max_user_watches"
            );
        }
    }

    /// Says that the host has no mappings left.
    pub(super) fn note_full(&self, chunks: u64) {
        if !self.has_said_full.swap(true, Relaxed) {
            let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap_or_default();
            tracing::error!(
                chunks,
                limit = limit.trim(),
                "The host has no more mappings for this process, and so no more files can be DAX: raise vm.max_map_count, \
                 or give the shares smaller windows"
            );
        }
    }

    /// Files that have become shorter, as far as they are remembered.
    pub(super) fn short(&self) -> u64 {
        self.short.load(Relaxed)
    }

    /// Times that a file was mapped without a watch.
    pub(super) fn unwatched(&self) -> u64 {
        self.unwatched.load(Relaxed)
    }

    /// The first of the paths of all of them.
    pub(super) fn paths(&self) -> Vec<String> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).paths.clone()
    }
}

impl Known {
    fn keep(&mut self, path: String) {
        if self.paths.len() < MOST_PATHS && !self.paths.contains(&path) {
            self.paths.push(path);
        }
    }
}
