//! What each file has of the window, and had: who is in which chunk, how often it was mapped, who takes chunks from whom.
//!
//! The window itself knows no files by name, and need not: the server tells the accounts what it has mapped. They are
//! for people to look at, and nothing is decided by them. A request costs one short lock and two look-ups and allocates
//! nothing, but for the first mapping of a file, whose name is read then. However many files a guest maps,
//! [`MAX_FILES`] are remembered for each share; the one that was mapped or unmapped least recently is forgotten for a
//! new one.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lru::LruCache;
use serde::{Deserialize, Serialize};

use super::window::CHUNK_SIZE;

/// Files of one share that are remembered.
pub const MAX_FILES: usize = 4096;

/// A chunk that a file gets sooner than this after another one had it is churn. A window with room has its free chunks
/// wait longer: the guest takes the one that is free for longest.
pub const CHURN_TIME: Duration = Duration::from_secs(1);

/// What one file has and had of a window. Chunks are of 2 MiB.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
pub struct FileCounters {
    /// The number by which the chunk map names it, from 1 in the order of the first mappings; never given to two files.
    pub number: u32,
    /// Where the guest found it, relative to the share, when it was mapped first; a file that is renamed later keeps it.
    /// None for a file without a name.
    pub path: Option<String>,
    /// Chunks that show it now.
    pub mapped_chunks: u64,
    /// The most that ever did at once.
    pub peak_mapped_chunks: u64,
    /// SETUPMAPPING requests for it that were carried out.
    pub setup_mappings: u64,
    /// Bytes that were mapped for it, all requests together.
    pub setup_bytes: u64,
    /// Bytes of pages that were put in the guest's reach as they were mapped.
    pub prefault_bytes: u64,
    /// Chunks that were taken from it, by REMOVEMAPPING or by mapping another file in their place.
    pub removed_chunks: u64,
    /// Its chunks that were read-only and became writable in place.
    pub upgraded_chunks: u64,
    /// Chunks that it got while another file had them, or less than [`CHURN_TIME`] after.
    pub churned_chunks: u64,
}

/// All files of a share.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
pub struct FileTable {
    /// Chunks that a file got while another one had them, or less than [`CHURN_TIME`] after, over all files.
    pub churned_chunks: u64,
    /// Files that were forgotten for others; the counters of a file that comes back start anew.
    pub forgotten_files: u64,
    /// The files: those with the most chunks first, then those that were mapped most often.
    pub files: Vec<FileCounters>,
}

/// A chunk as the accounts see it.
#[derive(Clone, Copy, Default)]
struct Chunk {
    /// The file that shows in it, or did last.
    node: u64,
    /// That file's number; 0 if nothing shows.
    number: u32,
    /// When it was freed, in milliseconds since the accounts were opened; wraps around.
    freed_at: u32,
    writable: bool,
}

/// A file's account. The path is shared with the snapshots, so that taking one copies no text.
struct Account {
    path: Option<Arc<str>>,
    counters: FileCounters,
}

/// The accounts of a share with a window.
pub(super) struct Accounts {
    opened: Instant,
    books: Mutex<Books>,
}

struct Books {
    chunks: Vec<Chunk>,
    files: LruCache<u64, Account>,
    last_number: u32,
    churned: u64,
    forgotten: u64,
}

/// What was mapped: the chunks of the window, and whether the guest can write to them.
#[derive(Clone)]
pub(super) struct Mapped {
    pub(super) chunks: Range<usize>,
    pub(super) writable: bool,
    /// Bytes of pages that were put in the guest's reach with it.
    pub(super) prefaulted: u64,
}

impl Accounts {
    /// For a window of `size` bytes.
    pub(super) fn new(size: u64) -> Accounts {
        let books = Books {
            chunks: vec![Chunk::default(); (size / CHUNK_SIZE) as usize],
            // It grows with the files that there are.
            files: LruCache::unbounded(),
            last_number: 0,
            churned: 0,
            forgotten: 0,
        };
        Accounts { opened: Instant::now(), books: Mutex::new(books) }
    }

    fn lock(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn milliseconds(&self, at: Instant) -> u32 {
        at.saturating_duration_since(self.opened).as_millis() as u32
    }

    /// Notes that a file was mapped. `path` tells where it is, relative to the share, and is asked for a file that is not
    /// known.
    pub(super) fn mapped(&self, node: u64, mapped: Mapped, at: Instant, path: impl FnOnce() -> Vec<u8>) {
        let now = self.milliseconds(at);
        let mut books = self.lock();
        if books.files.peek(&node).is_none() {
            drop(books);
            let path = path();
            books = self.lock();
            books.open(node, path);
        }
        books.map(node, mapped, now);
    }

    /// Notes that a range of chunks shows nothing any more.
    pub(super) fn unmapped(&self, chunks: Range<usize>, at: Instant) {
        let now = self.milliseconds(at);
        let mut books = self.lock();
        for index in chunks {
            books.free(index, now);
        }
    }

    /// Notes that nothing is mapped any more: a session has ended.
    pub(super) fn cleared(&self) {
        let mut books = self.lock();
        books.chunks.fill(Chunk::default());
        for (_, account) in books.files.iter_mut() {
            account.counters.mapped_chunks = 0;
        }
    }

    /// The number of the file that each chunk shows; 0 for none.
    pub(super) fn owners(&self) -> Vec<u32> {
        self.lock().chunks.iter().map(|chunk| chunk.number).collect()
    }

    /// The files, no more than `limit`.
    pub(super) fn files(&self, limit: usize) -> FileTable {
        let (mut files, churned_chunks, forgotten_files) = {
            let books = self.lock();
            let files =
                books.files.iter().map(|(_, account)| (account.path.clone(), account.counters.clone()));
            (files.collect::<Vec<_>>(), books.churned, books.forgotten)
        };
        files.sort_by_key(|(_, file)| {
            (u64::MAX - file.mapped_chunks, u64::MAX - file.setup_mappings, file.number)
        });
        files.truncate(limit);
        let named = |(path, file): (Option<Arc<str>>, FileCounters)| FileCounters {
            path: path.map(|path| path.to_string()),
            ..file
        };
        FileTable { churned_chunks, forgotten_files, files: files.into_iter().map(named).collect() }
    }
}

impl Books {
    /// Opens an account, unless another request has done so meanwhile.
    fn open(&mut self, node: u64, path: Vec<u8>) {
        if self.files.contains(&node) {
            return;
        }
        if self.files.len() >= MAX_FILES {
            self.files.pop_lru();
            self.forgotten += 1;
        }
        // A guest that comes to the end of the numbers has mapped 2^32 files that were then forgotten.
        self.last_number = self.last_number.checked_add(1).unwrap_or(1);
        let path = (!path.is_empty()).then(|| String::from_utf8_lossy(&path).into());
        let counters = FileCounters { number: self.last_number, ..FileCounters::default() };
        self.files.put(node, Account { path, counters });
    }

    fn map(&mut self, node: u64, Mapped { chunks, writable, prefaulted }: Mapped, now: u32) {
        let (mut filled, mut upgraded, mut churned) = (0, 0, 0);
        let count = chunks.len() as u64;
        if chunks.end > self.chunks.len() {
            return;
        }
        // It is there, but for the case that others have opened as many accounts since as are remembered.
        let Some(number) = self.files.get(&node).map(|account| account.counters.number) else { return };
        for index in chunks {
            let before = self.chunks[index];
            let is_same = before.number == number;
            if !is_same {
                let since = Duration::from_millis(now.wrapping_sub(before.freed_at).into());
                let is_taken = before.number != 0 || before.node != 0 && since < CHURN_TIME;
                churned += u64::from(is_taken && before.node != node);
                self.free(index, now);
                filled += 1;
            }
            upgraded += u64::from(is_same && writable && !before.writable);
            self.chunks[index] = Chunk { node, number, freed_at: 0, writable };
        }
        self.churned += churned;
        if let Some(Account { counters, .. }) = self.files.peek_mut(&node) {
            counters.mapped_chunks += filled;
            counters.peak_mapped_chunks = counters.peak_mapped_chunks.max(counters.mapped_chunks);
            counters.setup_mappings += 1;
            counters.setup_bytes += count * CHUNK_SIZE;
            counters.prefault_bytes += prefaulted;
            counters.upgraded_chunks += upgraded;
            counters.churned_chunks += churned;
        }
    }

    /// Takes a chunk from whatever file has it.
    fn free(&mut self, index: usize, now: u32) {
        let Some(chunk) = self.chunks.get_mut(index).filter(|chunk| chunk.number != 0) else { return };
        let Chunk { node, number, .. } = *chunk;
        (chunk.number, chunk.freed_at) = (0, now);
        // A file that was forgotten and came back has another number, and never had this chunk.
        if let Some(account) = self.files.get_mut(&node).filter(|account| account.counters.number == number) {
            account.counters.mapped_chunks -= 1;
            account.counters.removed_chunks += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNKS: u64 = 16;

    struct Test {
        accounts: Accounts,
        now: Instant,
    }

    impl Test {
        fn new() -> Test {
            Test { accounts: Accounts::new(CHUNKS * CHUNK_SIZE), now: Instant::now() }
        }

        fn map(&self, node: u64, chunks: Range<usize>, writable: bool) {
            let path = || format!("file-{node}").into_bytes();
            let mapped = Mapped { chunks, writable, prefaulted: 4096 };
            self.accounts.mapped(node, mapped, self.now, path);
        }

        fn later(&mut self, time: Duration) {
            self.now += time;
        }

        fn file(&self, node: u64) -> FileCounters {
            let path = Some(format!("file-{node}"));
            let files = self.accounts.files(usize::MAX).files;
            files.into_iter().find(|file| file.path == path).unwrap_or_default()
        }
    }

    #[test]
    fn a_file_is_told_what_it_has_and_had() {
        let test = Test::new();
        test.map(7, 0..3, false);
        test.map(8, 3..4, true);
        test.map(7, 1..2, true);
        test.accounts.unmapped(0..1, test.now);
        assert_eq!(test.accounts.owners()[..5], [0, 1, 1, 2, 0]);
        let seven = FileCounters {
            number: 1,
            path: Some("file-7".into()),
            mapped_chunks: 2,
            peak_mapped_chunks: 3,
            setup_mappings: 2,
            setup_bytes: 4 * CHUNK_SIZE,
            prefault_bytes: 2 * 4096,
            removed_chunks: 1,
            upgraded_chunks: 1,
            churned_chunks: 0,
        };
        assert_eq!(test.file(7), seven);
        assert_eq!(test.accounts.files(1).files, [seven], "the one with the most chunks");
        test.accounts.unmapped(0..CHUNKS as usize, test.now);
        test.accounts.unmapped(0..CHUNKS as usize, test.now);
        assert_eq!((test.file(7).mapped_chunks, test.file(8).removed_chunks), (0, 1));
    }

    #[test]
    fn a_chunk_that_changes_hands_at_once_is_churn() {
        let mut test = Test::new();
        test.map(1, 0..4, true);
        test.accounts.unmapped(0..3, test.now);
        test.later(CHURN_TIME / 2);
        test.map(1, 0..1, true);
        test.map(2, 1..2, true);
        test.later(CHURN_TIME / 2);
        test.map(2, 2..3, true);
        test.map(2, 3..4, true);
        test.map(2, 4..5, true);
        // The second within the time, the fourth in its place; the third too late, the fifth from nobody.
        assert_eq!((test.file(1).churned_chunks, test.file(2).churned_chunks), (0, 2));
        assert_eq!(test.accounts.files(0).churned_chunks, 2);
        assert_eq!((test.file(1).mapped_chunks, test.file(2).mapped_chunks), (1, 4));
    }

    #[test]
    fn the_end_of_a_session_leaves_the_totals() {
        let test = Test::new();
        test.map(1, 0..4, true);
        test.accounts.cleared();
        assert_eq!(test.accounts.owners(), [0; CHUNKS as usize]);
        let file = test.file(1);
        assert_eq!((file.mapped_chunks, file.peak_mapped_chunks, file.setup_mappings), (0, 4, 1));
        test.map(2, 0..4, true);
        assert_eq!(test.file(2).churned_chunks, 0, "nobody wants the chunks back");
    }

    #[test]
    fn a_guest_cannot_fill_the_memory() {
        let test = Test::new();
        test.map(1, 0..1, true);
        test.map(2, 1..2, true);
        for node in 3..MAX_FILES as u64 + 3 {
            test.map(node, 2..3, true);
            if node % 1000 == 0 {
                test.map(2, 1..2, true);
            }
        }
        let table = test.accounts.files(usize::MAX);
        assert_eq!((table.files.len(), table.forgotten_files), (MAX_FILES, 2));
        assert_eq!(test.file(1), FileCounters::default(), "it was used least recently");
        assert_eq!(test.file(2).mapped_chunks, 1);
        // It comes back as another one, and its chunk of before is not taken for one of it.
        test.map(1, 5..6, true);
        test.accounts.unmapped(0..1, test.now);
        assert_eq!((test.file(1).mapped_chunks, test.file(1).removed_chunks), (1, 0));
    }

    #[test]
    fn what_lies_outside_of_the_window_is_left_out() {
        let test = Test::new();
        test.map(1, 15..17, true);
        test.accounts.unmapped(15..40, test.now);
        assert_eq!(test.accounts.owners(), [0; CHUNKS as usize]);
    }
}
