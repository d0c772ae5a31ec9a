//! The inside of a window: its address space, its table and its files, behind one lock.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, TryLockError, Weak};

use super::counters::Counts;
use super::files::{Files, Index, MappedFile, end_of, look, shown};
use super::guard::Guard;
use super::lost::LostFiles;
use super::mmap::{Backing, give_back, replace};
use super::scratch::{Piece, Scratch};
use super::spare::with_spare;
use super::table::{ChunkTable, Mapped};
use super::watch::Watcher;
use super::{CHUNK_SHIFT, CHUNK_SIZE, Chunks, KnownFile, Shown, WindowError};
use crate::virtio::device::NestedPaging;

/// What the window and the watcher share. The table, the files and the address space agree whenever the lock is free.
pub(super) struct Shared {
    /// The first byte; aligned to 2 MiB, and `size` bytes from it belong to this object alone until it is dropped.
    pub(super) base: *mut u8,
    /// In bytes, a valid window size.
    pub(super) size: u64,
    pub(super) guard: Guard,
    pub(super) scratch: Scratch,
    pub(super) state: Mutex<State>,
    /// The files that are in `state`, for those who ask while that is locked.
    pub(super) index: Index,
    /// While the guest sees the window, if its hypervisor can put pages in its reach.
    pub(super) nested_paging: RwLock<Option<Arc<dyn NestedPaging>>>,
    pub(super) counts: Counts,
    pub(super) lost: LostFiles,
    /// Files that are shorter than the guest may believe, and threads that are about to find out whether one is.
    pub(super) short_files: AtomicU64,
    /// Whether no file may be changed through this window, whatever is mapped.
    pub(super) is_read_only: AtomicBool,
    /// Chunks that were mapped when the host had no more mappings to give; 0 if it has.
    pub(super) full_at: AtomicU64,
    /// For the watcher, which must not keep a window alive.
    pub(super) me: Weak<Shared>,
}

/// How often a thread looks whether the lock is free before it sleeps, some 10 to 20 microseconds. Who has it is in an
/// mmap(2) as a rule, which takes a third of that, and less than to sleep and be woken.
const LOOKS: u32 = 500;

/// What is mapped.
pub(super) struct State {
    pub(super) table: ChunkTable,
    pub(super) files: Files,
    /// Where pages are that only the guest has, by their offset in the window.
    pub(super) copies: BTreeSet<u64>,
}

// SAFETY: `base` is never dereferenced here and never changes; what it points at is only replaced under the lock.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

/// What a look at a file came to.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Change {
    /// Pages that were the file's and are holes now.
    pub(super) lost: u64,
    /// Pages that were holes and are the file's again.
    pub(super) restored: u64,
    /// Whether any page was mapped anew.
    pub(super) is_any: bool,
}

/// A range where something was not mapped.
pub(super) struct NotPlaced {
    pub(super) error: io::Error,
    /// Whether what was there before is gone.
    pub(super) is_gone: bool,
}

impl Shared {
    /// Shows a part of a file; see [`super::DaxWindow::map`].
    pub(super) fn map(
        &self,
        chunks: Chunks,
        offset: u64,
        writable: bool,
        fd: BorrowedFd<'_>,
        known: Option<&KnownFile>,
    ) -> Result<Shown, WindowError> {
        let len = chunks.bytes();
        {
            let mut state = self.lock();
            let known = known.filter(|known| state.files.is_there(known.number, known.key));
            if let Some(number) = known.map(|known| known.number)
                && state.files.get(number).is_some_and(|file| file.is_followed(offset))
            {
                return self.show(&mut state, chunks, Mapped { file: number, offset, writable }, fd);
            }
        }
        let _looking = self.looking();
        let mut state = self.lock();
        let (number, size) = self.adopt(&mut state, writable, fd).map_err(WindowError::Map)?;
        let beyond = state.files.get(number).filter(|file| file.resizing == 0 && offset >= end_of(size));
        if let Some(file) = beyond {
            // The guest maps nothing behind what it believes to be the end: the file was longer when it asked last.
            file.believed_beyond(offset + len - CHUNK_SIZE);
            if file.end.is_none() {
                self.note_lost(file, len / super::files::PAGE);
            }
        }
        self.follow(&mut state, number, size);
        self.show(&mut state, chunks, Mapped { file: number, offset, writable }, fd)
    }

    /// Maps a part of a file that the window has, as much of it as the file has.
    fn show(
        &self,
        state: &mut State,
        chunks: Chunks,
        what: Mapped,
        fd: BorrowedFd<'_>,
    ) -> Result<Shown, WindowError> {
        let (Mapped { file: number, offset, writable }, len) = (what, chunks.bytes());
        let part = state.files.get(number).map_or(len, |file| file.shown(offset, len));
        if part > 0 {
            let backing = Backing::File { fd: fd.as_raw_fd(), offset: offset as i64, writable };
            if let Err(NotPlaced { error, is_gone }) = self.place(chunks.start(), part, backing) {
                if is_gone && self.punch(chunks.start(), len, libc::MAP_FIXED).is_ok() {
                    self.counts.gone(self.forget_chunks(state, chunks));
                }
                self.close_if_unused(state, number);
                if error.raw_os_error() == Some(libc::ENOMEM) {
                    self.note_full();
                }
                return Err(WindowError::Map(error));
            }
        }
        let mut is_whole = true;
        if part < len {
            is_whole = self.blank(chunks.start() + part, len - part).is_ok();
        }
        state.forget_copies(chunks.start(), len);
        self.note_mapped(state, chunks, what, fd);
        let mut shown = Shown { bytes: 0, is_stream: false, file_size: 0 };
        if let Some(file) = state.files.get(number) {
            file.is_damaged |= !is_whole;
            shown.bytes = part.min(end_of(file.believed).saturating_sub(offset));
            shown.is_stream = file.streams.goes_on(offset, len);
            shown.file_size = file.believed;
        }
        Ok(shown)
    }

    /// The number of a file, which is watched from now on, and its size in bytes.
    fn adopt(&self, state: &mut State, writable: bool, fd: BorrowedFd<'_>) -> io::Result<(usize, u64)> {
        let (key, size) = look(fd)?;
        if let Some(number) = state.files.find(key) {
            return Ok((number, size));
        }
        let mut file = MappedFile::new(key, size, writable, fd)?;
        if let Some(watcher) = Watcher::get() {
            match watcher.watch(fd, self.me.clone(), key) {
                Ok(watch) => file.watch = Some(watch),
                Err(error) => self.lost.note_unwatched(&error),
            }
        }
        // Only now is no change missed.
        let (_, size) = look(fd)?;
        file.believed = size;
        Ok((state.files.add(file), size))
    }

    fn note_mapped(&self, state: &mut State, chunks: Chunks, what: Mapped, fd: BorrowedFd<'_>) {
        let State { table, files, .. } = state;
        if let Some(file) = files.get(what.file) {
            file.add_chunks(chunks.range());
        }
        // Without it the file could not be shown writable again after it was short. There is one, as a rule.
        if what.writable
            && let Err(error) = files.make_writable(what.file, fd)
        {
            tracing::warn!(%error, "Cannot keep a descriptor of a shared file: raise the limit of open files");
        }
        let change = table.map(chunks.first, chunks.count, what, |old| self.release(files, old));
        self.counts.mapped(change);
    }

    /// Makes a hole of chunks; see [`super::DaxWindow::unmap`].
    pub(super) fn unmap(&self, chunks: Chunks) -> io::Result<()> {
        let (gone, result) = self.empty(&mut self.lock(), chunks);
        self.counts.gone(gone);
        result
    }

    /// Makes everything a hole; see [`super::DaxWindow::clear`].
    pub(super) fn clear(&self) -> io::Result<()> {
        let mut state = self.lock();
        let mut result = Ok(());
        if self.counts.mapped_chunks() > 0 {
            let gone;
            (gone, result) = self.empty(&mut state, self.all());
            self.counts.cleared(gone);
        }
        result.and(self.scratch.clear())
    }

    /// Makes a hole of chunks, of as many as the host allows; returns how many of them were mapped.
    fn empty(&self, state: &mut State, chunks: Chunks) -> (u64, io::Result<()>) {
        let (mut gone, mut result) = (0, Ok(()));
        for piece in self.scratch.pieces(chunks.start(), chunks.bytes()) {
            let punched = self.punch_piece(piece, libc::MAP_FIXED);
            if punched.is_ok() {
                let (start, _, len) = piece;
                state.forget_copies(start, len);
                gone += self.forget_chunks(state, Chunks::of(start, len));
            }
            result = result.and(punched);
        }
        (gone, result)
    }

    fn forget_chunks(&self, state: &mut State, chunks: Chunks) -> u64 {
        let State { table, files, .. } = state;
        table.unmap(chunks.first, chunks.count, |old| self.release(files, old))
    }

    /// Takes a chunk from a file.
    fn release(&self, files: &mut Files, number: usize) {
        if let Some(gone) = files.release(number, 1) {
            self.forget(gone);
        }
    }

    /// Closes a file of which nothing could be mapped.
    fn close_if_unused(&self, state: &mut State, number: usize) {
        if state.files.get(number).is_some_and(|file| file.chunks == 0)
            && let Some(gone) = state.files.release(number, 0)
        {
            self.forget(gone);
        }
    }

    fn forget(&self, gone: MappedFile) {
        if gone.end.is_some() {
            self.short_files.fetch_sub(1, SeqCst);
        }
        if let (Some(watcher), Some(watch)) = (Watcher::get(), gone.watch) {
            watcher.unwatch(watch, &self.me);
        }
    }

    /// To be held from before a file's size is looked at until the window shows the file so.
    pub(super) fn looking(&self) -> impl Drop + '_ {
        struct Looking<'a>(&'a AtomicU64);
        impl Drop for Looking<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, SeqCst);
            }
        }
        self.short_files.fetch_add(1, SeqCst);
        Looking(&self.short_files)
    }

    /// Has the window show a file as it is at this size: zeros behind its end if it has become shorter, and the file
    /// where it has grown again.
    pub(super) fn follow(&self, state: &mut State, number: usize, size: u64) -> Change {
        let State { table, files, copies } = state;
        let Some(file) = files.get(number).filter(|file| file.resizing == 0) else {
            return Change::default();
        };
        let (old, new) = (file.end, file.resized(size));
        let is_damaged = std::mem::take(&mut file.is_damaged);
        let mut change = Change::default();
        if old == new && !is_damaged {
            return change;
        }
        for (chunk, at) in table.of_file(number, file.within.clone(), file.chunks) {
            let start = (chunk as u64) << CHUNK_SHIFT;
            let (before, after) = (shown(old, at.offset, CHUNK_SIZE), shown(new, at.offset, CHUNK_SIZE));
            change.lost += before.saturating_sub(after) / super::files::PAGE;
            change.restored += after.saturating_sub(before) / super::files::PAGE;
            // Of a damaged file it is not known which pages are right.
            let (from, to) =
                if is_damaged { (0, CHUNK_SIZE) } else { (before.min(after), before.max(after)) };
            let mut result = Ok(());
            if from < after {
                result = self.lay(file, start + from, at.offset + from, after - from, at.writable);
            }
            if after < to {
                result = result.and(self.blank(start + after, to - after));
            }
            forget_within(copies, start + from, to - from);
            match result {
                Ok(()) => change.is_any = true,
                Err(error) => {
                    // The next look at the file tries again.
                    tracing::error!(%error, "Cannot map a shared file again that has changed its size");
                    file.is_damaged = true;
                }
            }
        }
        file.end = new;
        match (old.is_some(), new.is_some()) {
            (false, true) => drop(self.short_files.fetch_add(1, SeqCst)),
            (true, false) => drop(self.short_files.fetch_sub(1, SeqCst)),
            _ => {}
        }
        self.counts.restored(change.restored);
        if change.lost > 0 {
            self.note_lost(file, change.lost);
        }
        change
    }

    /// Puts a part of a file that the window has into a range of it.
    pub(super) fn lay(
        &self,
        file: &MappedFile,
        at: u64,
        offset: u64,
        len: u64,
        writable: bool,
    ) -> io::Result<()> {
        let backing = Backing::File { fd: file.file.as_raw_fd(), offset: offset as i64, writable };
        self.place(at, len, backing).map_err(|failed| failed.error)
    }

    /// Puts a file, or a copy of it, where something else is mapped. A mapping that fails late, in the file system, has
    /// removed the old one already (`vms_abort_munmap_vmas` of mm/vma.c, and before Linux 6.12 mmap_region of mm/mmap.c). The gap
    /// is closed at once; until then nothing else of the process comes to lie in it (`mmap::PLACES`).
    pub(super) fn place(&self, at: u64, len: u64, backing: Backing) -> Result<(), NotPlaced> {
        replace(self.address(at), len as usize, backing).map(drop).map_err(|error| {
            // Where the old mapping is whole this says EEXIST, and does nothing.
            let is_gone = replace(self.address(at), len as usize, Backing::Gap).is_ok();
            NotPlaced { error, is_gone }
        })
    }

    /// Puts zeros in a range behind a file's end. A vCPU that writes there has it repaired.
    fn blank(&self, at: u64, len: u64) -> io::Result<()> {
        replace(self.address(at), len as usize, Backing::Zeros).map(drop)
    }

    /// Makes a hole of whole chunks; `placement` is MAP_FIXED or MAP_FIXED_NOREPLACE, as in mmap(2).
    pub(super) fn punch(&self, at: u64, len: u64, placement: i32) -> io::Result<()> {
        self.scratch.pieces(at, len).try_for_each(|piece| self.punch_piece(piece, placement))
    }

    /// Puts scratch memory in a part of a chunk, whole pages: the same 2 MiB in all chunks.
    pub(super) fn scratch_over(&self, at: u64, len: u64) -> io::Result<()> {
        self.punch_piece((at, at % CHUNK_SIZE, len), libc::MAP_FIXED)
    }

    fn punch_piece(&self, (at, offset, len): Piece, placement: i32) -> io::Result<()> {
        let backing = Backing::Hole { fd: self.scratch.fd(), offset: offset as i64, placement };
        with_spare(|| replace(self.address(at), len as usize, backing)).map(drop)
    }

    fn note_lost(&self, file: &MappedFile, pages: u64) {
        self.counts.lost(pages);
        self.lost.note_short(file);
    }

    pub(super) fn all(&self) -> Chunks {
        Chunks { first: 0, count: (self.size / CHUNK_SIZE) as usize }
    }

    pub(super) fn address(&self, offset: u64) -> *mut u8 {
        self.base.wrapping_add(offset as usize)
    }

    /// What is locked stays right through a panic: it is changed after all that can fail.
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        for _ in 0..LOOKS {
            match self.state.try_lock() {
                Ok(state) => return state,
                Err(TryLockError::Poisoned(poisoned)) => return poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => std::hint::spin_loop(),
            }
        }
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn forget_copies(&mut self, at: u64, len: u64) {
        forget_within(&mut self.copies, at, len);
    }
}

/// Forgets the copies in a range that was mapped anew.
fn forget_within(copies: &mut BTreeSet<u64>, at: u64, len: u64) {
    if !copies.is_empty() {
        copies.retain(|page| !(at..at + len).contains(page));
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        give_back(self.base, self.size as usize);
    }
}
