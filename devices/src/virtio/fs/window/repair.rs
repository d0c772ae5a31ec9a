//! What the host takes away, and what the window does about it; docs/window.md says when and why.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::time::{Duration, Instant};

use rustix::fs::Mode;

use super::files::{FileKey, PAGE, end_of, look};
use super::mmap::{Backing, is_there, replace};
use super::spare;
use super::state::{Shared, State};
use super::table::Mapped;
use super::{CHUNK_SHIFT, CHUNK_SIZE};
use crate::virtio::device::Repair;

/// Pages that only the guest has, in a window: it wrote behind a file's end, or to a file that may only be read.
const MOST_COPIES: usize = 1024;

/// How long pages behind one that failed are tried, so that a disk that takes its time over each error does not hold up
/// the window.
const TRY_ON: Duration = Duration::from_millis(50);

impl Shared {
    /// Looks at a file that was reported to have changed.
    pub(super) fn look_at(&self, key: FileKey) {
        let mut state = self.lock();
        let Some(number) = state.files.find(key) else { return };
        self.look_again(&mut state, number);
    }

    /// Looks at all files of which pages were replaced (`guard.rs`): the copy that needed it is done.
    pub(super) fn mend(&self) {
        let pages = self.guard.take_pages();
        let mut numbers = BTreeSet::new();
        let mut state = self.lock();
        for page in pages {
            let chunk = (page - self.base as usize) >> CHUNK_SHIFT;
            let Some(at) = state.table.get(chunk) else { continue };
            if let Some(file) = state.files.get(at.file).filter(|_| numbers.insert(at.file)) {
                file.is_damaged = true;
            }
        }
        drop(state);
        for number in numbers {
            let mut state = self.lock();
            // Another file may have the number by now, with which nothing is wrong.
            if state.files.get(number).is_some_and(|file| file.is_damaged) {
                self.look_again(&mut state, number);
            }
        }
    }

    fn look_again(&self, state: &mut State, number: usize) {
        let _looking = self.looking();
        let Some(file) = state.files.get(number) else { return };
        file.is_damaged |= std::mem::take(&mut file.has_failed);
        // A file system that does not answer any more leaves the file as it was last.
        if let Ok((_, size)) = look(file.fd()) {
            self.follow(state, number, size);
        }
    }

    /// Has the window show a file up to `size` bytes, if it has that many: the guest is about to be told so.
    pub(super) fn tell(&self, key: FileKey, size: u64) {
        // Only a file that was short has anything to show again. Whoever finds one to be short has counted before he
        // looked at the size; if he saw another than this one, he is seen here.
        if self.short_files.load(SeqCst) == 0 {
            return;
        }
        let mut state = self.lock();
        let Some(number) = state.files.find(key) else { return };
        if state.files.get(number).is_some_and(|file| file.end.is_some_and(|end| end < size)) {
            self.look_again(&mut state, number);
        }
    }

    /// Notes that the guest itself is about to change a file's size: what is lost by that is meant to be.
    pub(super) fn begin_resize(&self, key: FileKey) {
        let mut state = self.lock();
        if let Some(number) = state.files.find(key)
            && let Some(file) = state.files.get(number)
        {
            file.resizing += 1;
        }
    }

    /// Ends what [`Shared::begin_resize`] began: the guest knows the size.
    pub(super) fn end_resize(&self, key: FileKey) {
        let mut state = self.lock();
        let Some(number) = state.files.find(key) else { return };
        let Some(file) = state.files.get(number) else { return };
        // One that was mapped only since has none.
        file.resizing = file.resizing.saturating_sub(1);
        let _looking = self.looking();
        if file.resizing == 0
            && let Ok((_, size)) = look(file.fd())
        {
            file.believed = size;
            self.follow(&mut state, number, size);
        }
    }

    /// Makes a page accessible that the host could not provide; see [`crate::virtio::device::HostMemory::repair`].
    pub(super) fn repair(&self, offset: u64, write: bool) -> Repair {
        let (page, chunk) = (offset & !(PAGE - 1), (offset >> CHUNK_SHIFT) as usize);
        let is_missing = || is_there(self.address(page), PAGE as usize, write) == Some(false);
        let at = {
            let _looking = self.looking();
            let mut state = self.lock();
            let Some(at) = state.table.get(chunk) else { return Repair::Unneeded };
            let Some(file) = state.files.get(at.file) else { return Repair::Unneeded };
            let size = look(file.fd()).map(|(_, size)| size);
            if size.is_ok_and(|size| self.follow(&mut state, at.file, size).is_any) {
                return Repair::Done;
            }
            let start = (chunk as u64) << CHUNK_SHIFT;
            let shown = state.files.get(at.file).map_or(CHUNK_SIZE, |file| file.shown(at.offset, CHUNK_SIZE));
            if page - start >= shown {
                return if write {
                    self.let_write_behind(&mut state, start..start + CHUNK_SIZE, page)
                } else {
                    Repair::Unneeded
                };
            }
            at
        };
        // A page that is read from the disk takes a while, and others need the lock.
        if (!write || at.writable) && !is_missing() {
            return Repair::Unneeded;
        }
        let _looking = self.looking();
        let mut state = self.lock();
        if state.table.get(chunk) != Some(at) {
            return Repair::Unneeded;
        }
        if write && !at.writable {
            return self.let_write(&mut state, chunk, at, page);
        }
        if !is_missing() {
            return Repair::Unneeded;
        }
        let Some(file) = state.files.get(at.file) else { return Repair::Unneeded };
        if file.resizing > 0 {
            return Repair::Unneeded;
        }
        let start = (chunk as u64) << CHUNK_SHIFT;
        let size = look(file.fd()).map_or(u64::MAX - PAGE, |(_, size)| size);
        if at.offset + (page - start) >= end_of(size) {
            // It was longer before it was mapped first, and the guest has not heard of the change.
            file.believed_beyond(at.offset);
            self.follow(&mut state, at.file, size);
            return Repair::Done;
        }
        // What fails here fails behind it as well, as a rule.
        let (until, mut end) = (Instant::now() + TRY_ON, page + PAGE);
        while end < start + file.shown(at.offset, CHUNK_SIZE)
            && is_there(self.address(end), PAGE as usize, write) == Some(false)
            && Instant::now() < until
        {
            end += PAGE;
        }
        if let Err(error) = self.scratch_over(page, end - page) {
            return Repair::Impossible(format!("the window cannot be mapped: {error}"));
        }
        file.has_failed = true;
        self.counts.failed((end - page) / PAGE);
        self.lost.note_failed(file, write);
        Repair::Done
    }

    /// Lets the guest write to a chunk that is mapped to be read: its kernel may reuse a mapping without looking at the
    /// mode. Where the file may not be written the guest gets a copy of the page, which nobody else sees.
    fn let_write(&self, state: &mut State, chunk: usize, at: Mapped, page: u64) -> Repair {
        let State { table, files, copies } = state;
        let Some(file) = files.get(at.file) else { return Repair::Unneeded };
        let start = (chunk as u64) << CHUNK_SHIFT;
        let writable = if self.is_read_only.load(Relaxed) { None } else { open_to_write(&file.file).ok() };
        let is_kept = writable.is_some_and(|writable| files.make_writable(at.file, writable.as_fd()).is_ok());
        let Some(file) = files.get(at.file) else { return Repair::Unneeded };
        if is_kept && self.lay(file, start, at.offset, file.shown(at.offset, CHUNK_SIZE), true).is_ok() {
            let what = Mapped { writable: true, ..at };
            self.counts.upgraded(table.map(chunk, 1, what, |_| ()));
            return Repair::Done;
        }
        // What could be upgraded and was not may be gone.
        file.is_damaged |= is_kept;
        if copies.contains(&page) {
            return Repair::Unneeded;
        }
        if copies.len() >= MOST_COPIES {
            return Repair::Impossible(
                "the guest writes to too many pages of files that it may only read".into(),
            );
        }
        let offset = (at.offset + (page - start)) as i64;
        let copy = Backing::Copy { fd: file.file.as_raw_fd(), offset };
        match self.place(page, PAGE, copy) {
            Ok(()) => {
                copies.insert(page);
                self.counts.copied();
                Repair::Done
            }
            Err(error) => {
                file.is_damaged = true;
                Repair::Impossible(format!("the window cannot be mapped: {}", error.error))
            }
        }
    }

    /// Gives the guest a page of its own where it writes behind a file's end, or, when it has many or the host has no mapping
    /// left, scratch memory to the end of the chunk.
    fn let_write_behind(&self, state: &mut State, chunk: Range<u64>, page: u64) -> Repair {
        if state.copies.contains(&page) {
            return Repair::Unneeded;
        }
        let is_room = state.copies.len() < MOST_COPIES;
        if is_room && replace(self.address(page), PAGE as usize, Backing::Blank).is_ok() {
            state.copies.insert(page);
        } else if let Err(error) = self.scratch_over(page, chunk.end - page) {
            return Repair::Impossible(format!("the window cannot be mapped: {error}"));
        } else {
            state.copies.retain(|copy| !(page..chunk.end).contains(copy));
        }
        self.counts.copied();
        Repair::Done
    }

    /// Whether the host has no mappings left for more files (vm.max_map_count), until a quarter of the chunks is free.
    pub(super) fn is_full(&self) -> bool {
        match self.full_at.load(Relaxed) {
            0 => false,
            full_at if self.counts.mapped_chunks() >= full_at - full_at / 4 => true,
            _ => {
                self.full_at.store(0, Relaxed);
                spare::take_again();
                false
            }
        }
    }

    /// Notes that the host refuses a mapping for want of them, and says so once.
    pub(super) fn note_full(&self) {
        let mapped = self.counts.mapped_chunks();
        if self.full_at.swap(mapped.max(1), Relaxed) == 0 {
            spare::give_up_some();
        }
        self.lost.note_full(mapped);
    }
}

/// Opens a file anew to write to it, and takes from it what a write takes.
fn open_to_write(file: &File) -> io::Result<File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let writable = File::options().read(true).write(true).open(path)?;
    let mode = rustix::fs::fstat(&writable)?.st_mode;
    let killed = crate::virtio::fs::policy::without_set_id(mode);
    if killed != mode {
        rustix::fs::fchmod(&writable, Mode::from_raw_mode(killed & 0o7777))?;
    }
    match rustix::fs::fremovexattr(&writable, "security.capability") {
        Ok(()) | Err(rustix::io::Errno::NODATA | rustix::io::Errno::OPNOTSUPP) => Ok(writable),
        Err(error) => Err(error.into()),
    }
}
