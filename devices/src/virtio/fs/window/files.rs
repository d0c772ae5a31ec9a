//! The files that a window shows: one descriptor, one watch and one size for each, however many of its chunks are mapped.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, PoisonError, RwLock};

use super::CHUNK_SIZE;

/// What the host maps and loses at a time, in bytes.
pub(super) const PAGE: u64 = 4096;

/// A file of the host, by its device and inode number. Both are its own as long as a descriptor of it is open, which the
/// window has of every file that it shows.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct FileKey {
    device: u64,
    inode: u64,
}

impl FileKey {
    /// The file that stat(2) has described.
    pub fn of(stat: &libc::stat64) -> FileKey {
        FileKey { device: stat.st_dev, inode: stat.st_ino }
    }
}

/// What fstat(2) says of a descriptor: which file it is, and its size in bytes.
///
/// # Errors
/// What the host says, EIO or ESTALE for a file system that is gone.
pub(super) fn look(fd: BorrowedFd<'_>) -> io::Result<(FileKey, u64)> {
    let stat = rustix::fs::fstat(fd)?;
    let key = FileKey { device: stat.st_dev, inode: stat.st_ino };
    Ok((key, u64::try_from(stat.st_size).unwrap_or(0)))
}

/// A file that shows in the window, or did a moment ago.
#[derive(Clone)]
pub struct KnownFile {
    pub(super) key: FileKey,
    pub(super) number: usize,
    file: Arc<File>,
    is_writable: bool,
}

impl KnownFile {
    /// The window's descriptor of it.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Whether that is open for writing, too.
    pub fn is_writable(&self) -> bool {
        self.is_writable
    }
}

/// The files by what they are. It has a lock of its own, held for no system call, so that nobody who asks for a file waits
/// for one that is being mapped.
#[derive(Clone, Default)]
pub(super) struct Index(Arc<RwLock<HashMap<FileKey, KnownFile>>>);

impl Index {
    /// The file that is named so, if the window has it.
    pub(super) fn get(&self, key: FileKey) -> Option<KnownFile> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(&key).cloned()
    }

    fn number(&self, key: FileKey) -> Option<usize> {
        Some(self.0.read().unwrap_or_else(PoisonError::into_inner).get(&key)?.number)
    }

    fn set(&self, file: &MappedFile, number: usize) {
        let MappedFile { key, ref file, is_writable, .. } = *file;
        let known = KnownFile { key, number, file: Arc::clone(file), is_writable };
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(key, known);
    }

    fn remove(&self, key: FileKey) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(&key);
    }
}

/// A file with chunks in the window.
pub(super) struct MappedFile {
    pub(super) key: FileKey,
    /// To map its pages again; writable if any of its chunks ever was.
    pub(super) file: Arc<File>,
    pub(super) is_writable: bool,
    /// Chunks that show it.
    pub(super) chunks: u64,
    /// The window's chunks among which those are.
    pub(super) within: Range<usize>,
    /// The watch on it, if the host gave one.
    pub(super) watch: Option<i32>,
    /// The largest size that the guest may believe it has, as far as the window has seen, in bytes.
    pub(super) believed: u64,
    /// Where the file ends in the window, in bytes and whole pages. Behind it are holes. `None` as long as it is not
    /// shorter than the guest may believe: then chunks are mapped whole, and the guest touches nothing behind the end.
    pub(super) end: Option<u64>,
    /// Whether pages before its end are not the file's: they were replaced, or could not be mapped.
    pub(super) is_damaged: bool,
    /// Whether there are pages among them that the host could not provide.
    pub(super) has_failed: bool,
    /// Changes of its size under way that the guest itself has asked for.
    pub(super) resizing: u32,
    /// Where those who go through the file from chunk to chunk will go on.
    pub(super) streams: Streams,
}

/// The ends of the parts of a file that were mapped last, the latest first.
pub(super) struct Streams([u64; 8]);

impl Default for Streams {
    fn default() -> Streams {
        Streams([u64::MAX; 8])
    }
}

impl Streams {
    /// Notes that `len` bytes at `offset` are mapped; returns whether the file begins there, or a part ends that was mapped
    /// not long before.
    pub(super) fn goes_on(&mut self, offset: u64, len: u64) -> bool {
        let ends = &mut self.0;
        let known = ends.iter().position(|end| *end == offset);
        ends[..=known.unwrap_or(7)].rotate_right(1);
        ends[0] = offset + len;
        known.is_some() || offset == 0
    }
}

impl MappedFile {
    /// How many bytes of a range that starts at `offset` of the file and is `len` long show it.
    pub(super) fn shown(&self, offset: u64, len: u64) -> u64 {
        shown(self.end, offset, len)
    }
}

/// How many bytes of a range of a file show it, if it ends in the window at `end`.
pub(super) fn shown(end: Option<u64>, offset: u64, len: u64) -> u64 {
    end.map_or(len, |end| end.saturating_sub(offset).min(len))
}

/// Where a file of this size ends in the window: the page with its last byte is shown whole.
pub(super) fn end_of(size: u64) -> u64 {
    size.next_multiple_of(PAGE)
}

/// The files by the number under which the table knows them, and by what they are.
#[derive(Default)]
pub(super) struct Files {
    slots: Vec<Option<MappedFile>>,
    free: Vec<usize>,
    pub(super) index: Index,
}

impl Files {
    /// The number of a file that has chunks in the window.
    pub(super) fn find(&self, key: FileKey) -> Option<usize> {
        self.index.number(key)
    }

    /// Adds a file without chunks; the caller gives it some, or [`Files::release`]s it.
    pub(super) fn add(&mut self, file: MappedFile) -> usize {
        let number = self.free.pop().unwrap_or(self.slots.len());
        self.index.set(&file, number);
        match self.slots.get_mut(number) {
            Some(slot) => *slot = Some(file),
            None => self.slots.push(Some(file)),
        }
        number
    }

    /// Whether this is the number of this file.
    pub(super) fn is_there(&self, number: usize, key: FileKey) -> bool {
        self.slots.get(number).and_then(Option::as_ref).is_some_and(|file| file.key == key)
    }

    /// A file that the table names.
    pub(super) fn get(&mut self, number: usize) -> Option<&mut MappedFile> {
        self.slots.get_mut(number)?.as_mut()
    }

    /// Notes a descriptor of a file that can do more than the one which is there.
    ///
    /// # Errors
    /// EMFILE.
    pub(super) fn make_writable(&mut self, number: usize, fd: BorrowedFd<'_>) -> io::Result<()> {
        let Some(file) = self.slots.get_mut(number).and_then(Option::as_mut) else { return Ok(()) };
        if !file.is_writable {
            file.file = Arc::new(fd.try_clone_to_owned()?.into());
            file.is_writable = true;
            self.index.set(file, number);
        }
        Ok(())
    }

    /// Takes chunks from a file; with the last one it is returned, to be closed and watched no more.
    pub(super) fn release(&mut self, number: usize, chunks: u64) -> Option<MappedFile> {
        let slot = self.slots.get_mut(number)?;
        let file = slot.as_mut()?;
        file.chunks -= chunks;
        if file.chunks > 0 {
            return None;
        }
        let gone = slot.take()?;
        self.index.remove(gone.key);
        self.free.push(number);
        Some(gone)
    }
}

impl MappedFile {
    /// A file of which nothing is shown yet. The descriptor is duplicated.
    ///
    /// # Errors
    /// EMFILE.
    pub(super) fn new(key: FileKey, size: u64, writable: bool, fd: BorrowedFd<'_>) -> io::Result<MappedFile> {
        Ok(MappedFile {
            key,
            file: Arc::new(fd.try_clone_to_owned()?.into()),
            is_writable: writable,
            chunks: 0,
            within: 0..0,
            watch: None,
            believed: size,
            end: None,
            is_damaged: false,
            has_failed: false,
            resizing: 0,
            streams: Streams::default(),
        })
    }

    /// Notes that chunks of the window are about to show it.
    pub(super) fn add_chunks(&mut self, chunks: Range<usize>) {
        self.within = match self.chunks {
            0 => chunks.clone(),
            _ => self.within.start.min(chunks.start)..self.within.end.max(chunks.end),
        };
        self.chunks += chunks.len() as u64;
    }

    /// Whether a part from `offset` on can be mapped without a look at its size: changes are reported and looked at, none
    /// of them has made it shorter, and the part does not lie behind the end that it had last. While the guest itself
    /// changes the size, nobody looks.
    pub(super) fn is_followed(&self, offset: u64) -> bool {
        let is_whole = self.end.is_none() && !self.is_damaged && offset < end_of(self.believed);
        self.resizing > 0 || self.watch.is_some() && is_whole
    }

    /// Notes its size as the host says it now; returns where it ends in the window from now on.
    pub(super) fn resized(&mut self, size: u64) -> Option<u64> {
        if size < self.believed {
            return Some(end_of(size));
        }
        self.believed = size;
        None
    }

    /// Notes that the guest believes that the file reaches into the chunk at `offset`.
    pub(super) fn believed_beyond(&mut self, offset: u64) {
        self.believed = self.believed.max(offset + CHUNK_SIZE);
    }

    /// The descriptor.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapped(size: u64) -> MappedFile {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        let (key, size) = look(file.as_fd()).unwrap();
        MappedFile::new(key, size, true, file.as_fd()).unwrap()
    }

    #[test]
    fn a_file_ends_in_the_window_only_while_it_is_shorter_than_believed() {
        let mut file = mapped(10_000);
        assert_eq!(file.resized(10_000), None);
        assert_eq!(file.resized(20_000), None);
        assert_eq!(file.resized(19_999), Some(5 * PAGE));
        assert_eq!(file.resized(0), Some(0));
        assert_eq!(file.resized(1), Some(PAGE));
        assert_eq!(file.resized(20_000), None);
    }

    #[test]
    fn streams_are_told_from_jumps() {
        let mut streams = Streams::default();
        let mut goes_on = |chunk: u64| streams.goes_on(chunk * CHUNK_SIZE, CHUNK_SIZE);
        // Eight at once, from different places.
        for chunk in 0..10 {
            for start in [0, 100, 200, 300, 400, 500, 600, 700] {
                assert_eq!(goes_on(start + chunk), start == 0 || chunk > 0, "{start} + {chunk}");
            }
        }
        for jump in [805, 17, 901, 33, 950, 52, 61, 70] {
            assert!(!goes_on(jump), "{jump}");
        }
        assert!(!goes_on(110), "it was too long ago");
        assert!(goes_on(71) && goes_on(0));
    }

    #[test]
    fn what_is_shown_ends_at_the_end() {
        assert_eq!(shown(None, 0, CHUNK_SIZE), CHUNK_SIZE);
        assert_eq!(shown(Some(PAGE), 0, CHUNK_SIZE), PAGE);
        assert_eq!(shown(Some(PAGE), PAGE, CHUNK_SIZE), 0);
        assert_eq!(shown(Some(CHUNK_SIZE + PAGE), CHUNK_SIZE, CHUNK_SIZE), PAGE);
        assert_eq!(shown(Some(9 * CHUNK_SIZE), CHUNK_SIZE, CHUNK_SIZE), CHUNK_SIZE);
    }

    #[test]
    fn files_go_with_their_last_chunk() {
        let mut files = Files::default();
        let (first, second) = (mapped(1), mapped(2));
        let keys = [first.key, second.key];
        let (first, second) = (files.add(first), files.add(second));
        files.get(first).unwrap().add_chunks(4..7);
        assert!(files.release(first, 2).is_none());
        assert_eq!(files.find(keys[0]), Some(first));
        assert!(files.release(first, 1).is_some());
        assert_eq!((files.find(keys[0]), files.find(keys[1])), (None, Some(second)));
        assert!(files.get(first).is_none());
        let third = mapped(3);
        assert_eq!(files.add(third), first, "its number is free again");
    }
}
