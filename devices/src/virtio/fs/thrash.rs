//! Notices that a window is too small for what the guest does with it, and how large would have been enough.
//!
//! A chunk that the guest takes from a file while the window is nearly full leaves a shadow: the number of chunks that were
//! taken so until then. If the same part of the file is mapped again, the difference of the numbers is its refault
//! distance: with so many chunks more it would have stayed. Linux looks at its page cache the same way
//! (mm/workingset.c). When most mappings are such refaults, the window thrashes: its *level* rises, and with each level
//! policies that may choose grant DAX to fewer files (`policy/cost.rs`). It falls again, later each time that the
//! thrashing came back.
//!
//! What a request costs is one short lock and one look-up; nothing is allocated.

use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::ops::Range;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::policy::MAX_THRASH_LEVEL;
use super::window::{CHUNK_SHIFT, CHUNK_SIZE};

/// Shadows that are kept, at least and at most; between them four for each chunk of the window.
const SHADOWS: (usize, usize) = (4096, 1 << 17);
/// Shadows among which a part's can be.
const WAYS: usize = 4;
/// Mappings after which it is looked whether the window thrashes, at least and at most; between them one for each chunk.
const PERIOD: (u32, u32) = (32, 1024);
/// Mappings a second below which a window does not thrash, however many are refaults: nobody waits for them.
const BUSY: u32 = 20;
/// Time between two rises of the level: files that are open stay as they are, so that a rise needs time to show.
const RISE: Duration = Duration::from_secs(1);
/// Time without thrashing after which the level falls by one, at first and at most; it doubles each time that the window
/// thrashes again after a fall.
const CALM: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(320));
/// What the guest's reclaim frees at once (fs/fuse/dax.c, FUSE_DAX_RECLAIM_CHUNK).
const RECLAIM_BATCH: u64 = 10;

/// How a share's window suffices for its guest.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
pub struct ThrashCounters {
    /// How much DAX is held back now: 0 as long as the window does, to 5, nothing is granted that can be denied.
    pub level: u8,
    /// The highest level there was.
    pub peak_level: u8,
    /// Chunks that were mapped again after they had been taken away for want of room.
    pub refaulted_chunks: u64,
    /// The size of a window, in bytes, in which they would have stayed; 0 as long as the window does not thrash.
    pub sufficient_window: u64,
}

/// What to tell the user: so many bytes of window would have been enough.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct TooSmall {
    pub(super) sufficient: u64,
    /// Refaults among the last `of` mappings.
    pub(super) refaults: u32,
    pub(super) of: u32,
}

/// What a share knows of the use of its window.
pub(super) struct Thrash {
    chunks: u64,
    books: Mutex<Books>,
    /// Written under the lock, read without it.
    level: AtomicU8,
    peak: AtomicU8,
    refaults: AtomicU64,
    sufficient: AtomicU64,
}

/// A part of a file, of the size of a chunk, by a hash that is never 0.
type Part = u64;

#[derive(Clone, Copy, Default)]
struct Shadow {
    part: Part,
    taken: u64,
}

struct Books {
    /// What each chunk shows; 0 for nothing.
    shown: Vec<Part>,
    /// By the low bits of the part; a new one takes the place of the oldest.
    shadows: Vec<[Shadow; WAYS]>,
    /// Chunks taken away for want of room so far.
    taken: u64,
    period: Period,
    /// The sufficient size that the user was told last, in bytes.
    told: u64,
    raised: Option<Instant>,
    thrashed: Option<Instant>,
    fell: Option<Instant>,
    calm: Duration,
}

/// The mappings since it was looked last whether the window thrashes.
#[derive(Default)]
struct Period {
    began: Option<Instant>,
    mappings: u32,
    refaults: u32,
    /// The sum of the refaults' distances.
    distances: u64,
}

impl Thrash {
    /// For a window of `size` bytes.
    pub(super) fn new(size: u64) -> Thrash {
        let chunks = size / CHUNK_SIZE;
        let shadows = (4 * chunks as usize).clamp(SHADOWS.0, SHADOWS.1).next_power_of_two() / WAYS;
        let books = Books {
            shown: vec![0; chunks as usize],
            shadows: vec![Default::default(); shadows],
            taken: 0,
            period: Period::default(),
            told: 0,
            raised: None,
            thrashed: None,
            fell: None,
            calm: CALM.0,
        };
        Thrash {
            chunks,
            books: Mutex::new(books),
            level: AtomicU8::new(0),
            peak: AtomicU8::new(0),
            refaults: AtomicU64::new(0),
            sufficient: AtomicU64::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a part of a file from `foffset` on, in bytes, is shown in chunks. Tells when the user should hear of it.
    pub(super) fn mapped(
        &self,
        node: u64,
        foffset: u64,
        chunks: Range<usize>,
        at: Instant,
    ) -> Option<TooSmall> {
        let mut books = self.lock();
        let first = foffset >> CHUNK_SHIFT;
        for (number, chunk) in chunks.enumerate() {
            let part = part(node, first + number as u64);
            let Some(shown) = books.shown.get_mut(chunk) else { break };
            let before = std::mem::replace(shown, part);
            if before == part {
                // The mapping becomes writable, and nothing has moved.
                continue;
            }
            if before != 0 {
                books.take(before);
            }
            let distance = books.refault(part);
            let period = &mut books.period;
            period.mappings += 1;
            if let Some(distance) = distance {
                period.refaults += 1;
                period.distances += distance;
                self.refaults.fetch_add(1, Relaxed);
            }
        }
        let began = *books.period.began.get_or_insert(at);
        if books.period.mappings < (self.chunks as u32).clamp(PERIOD.0, PERIOD.1) {
            return None;
        }
        let period = std::mem::take(&mut books.period);
        books.period.began = Some(at);
        let is_busy = at.saturating_duration_since(began) * BUSY <= Duration::from_secs(1) * period.mappings;
        if period.refaults < period.mappings.div_ceil(2) || !is_busy {
            return None;
        }
        self.thrashes(&mut books, &period, at)
    }

    /// Notes that chunks show nothing any more; `mapped` chunks of the window did before.
    pub(super) fn unmapped(&self, chunks: Range<usize>, mapped: u64) {
        let free = self.chunks.saturating_sub(mapped);
        // With more room than this the guest takes none from anybody: the file was closed, cut off or forgotten.
        let for_room = free <= (self.chunks / 5 + RECLAIM_BATCH).min(self.chunks / 2);
        let mut books = self.lock();
        for chunk in chunks {
            let Some(shown) = books.shown.get_mut(chunk) else { break };
            let part = std::mem::take(shown);
            if for_room && part != 0 {
                books.take(part);
            }
        }
    }

    /// Notes that a session has ended, and that another one may do other things.
    pub(super) fn cleared(&self) {
        let mut books = self.lock();
        books.shown.fill(0);
        books.shadows.fill(Default::default());
        books.period = Period::default();
        (books.raised, books.thrashed, books.fell, books.calm) = (None, None, None, CALM.0);
        self.level.store(0, Relaxed);
    }

    /// The level at this moment, from 0 to [`MAX_THRASH_LEVEL`]. Costs one load while nothing thrashes.
    pub(super) fn level(&self, at: Instant) -> u8 {
        let level = self.level.load(Relaxed);
        if level == 0 {
            return 0;
        }
        let mut books = self.lock();
        let level = self.level.load(Relaxed);
        let since = books.thrashed.max(books.fell);
        let is_calm = since.is_some_and(|since| at.saturating_duration_since(since) >= books.calm);
        if level > 0 && is_calm {
            books.fell = Some(at);
            self.level.store(level - 1, Relaxed);
            return level - 1;
        }
        level
    }

    /// The counters; takes no lock.
    pub(super) fn counters(&self) -> ThrashCounters {
        ThrashCounters {
            level: self.level.load(Relaxed),
            peak_level: self.peak.load(Relaxed),
            refaulted_chunks: self.refaults.load(Relaxed),
            sufficient_window: self.sufficient.load(Relaxed),
        }
    }

    fn thrashes(&self, books: &mut Books, period: &Period, at: Instant) -> Option<TooSmall> {
        if let Some(fell) = books.fell.take() {
            let is_back = at.saturating_duration_since(fell) < 2 * books.calm;
            books.calm = if is_back { (2 * books.calm).min(CALM.1) } else { CALM.0 };
        }
        books.thrashed = Some(at);
        let level = self.level.load(Relaxed);
        let may_rise = books.raised.is_none_or(|raised| at.saturating_duration_since(raised) >= RISE);
        if may_rise && level < MAX_THRASH_LEVEL {
            books.raised = Some(at);
            self.level.store(level + 1, Relaxed);
            self.peak.fetch_max(level + 1, Relaxed);
        }
        // Of what is touched in any order, the mean distance is what there was no room for. What is mapped at once must also
        // leave the fifth free at which the guest begins to take chunks away.
        let needed = self.chunks + period.distances.div_ceil(period.refaults.max(1).into());
        let sufficient = (needed + needed.div_ceil(4)) * CHUNK_SIZE;
        let sufficient = self.sufficient.fetch_max(sufficient, Relaxed).max(sufficient);
        if sufficient < 2 * books.told || books.told >= sufficient {
            return None;
        }
        books.told = sufficient;
        Some(TooSmall { sufficient, refaults: period.refaults, of: period.mappings })
    }
}

impl Books {
    /// Leaves a shadow.
    fn take(&mut self, part: Part) {
        self.taken += 1;
        let taken = self.taken;
        if let Some(oldest) = self.shadows_near(part).iter_mut().min_by_key(|shadow| shadow.taken) {
            *oldest = Shadow { part, taken };
        }
    }

    /// The refault distance of a part that left a shadow, which goes.
    fn refault(&mut self, part: Part) -> Option<u64> {
        let taken = self.taken;
        let shadow = self.shadows_near(part).iter_mut().find(|shadow| shadow.part == part)?;
        Some(taken - std::mem::take(shadow).taken)
    }

    /// The places where a part's shadow can be.
    fn shadows_near(&mut self, part: Part) -> &mut [Shadow] {
        let sets = self.shadows.len();
        &mut self.shadows[part as usize & (sets - 1)]
    }
}

fn part(node: u64, chunk: u64) -> Part {
    BuildHasherDefault::<DefaultHasher>::default().hash_one((node, chunk)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNKS: u64 = 16;

    /// A guest that maps parts of files into a window, as it would: where it is free, else where it was mapped first.
    struct Guest {
        thrash: Thrash,
        window: Vec<(usize, (u64, u64))>,
        now: Instant,
        told: Vec<TooSmall>,
    }

    impl Guest {
        fn new() -> Guest {
            let thrash = Thrash::new(CHUNKS * CHUNK_SIZE);
            Guest { thrash, window: Vec::new(), now: Instant::now(), told: Vec::new() }
        }

        /// Touches a chunk of a file; a millisecond goes by.
        fn touch(&mut self, node: u64, chunk: u64) {
            self.now += Duration::from_millis(1);
            if self.window.iter().any(|(_, shown)| *shown == (node, chunk)) {
                return;
            }
            let slot = match self.window.len() {
                full if full == CHUNKS as usize => {
                    let (slot, _) = self.window.remove(0);
                    self.thrash.unmapped(slot..slot + 1, CHUNKS);
                    slot
                }
                next => next,
            };
            self.window.push((slot, (node, chunk)));
            self.told.extend(self.thrash.mapped(node, chunk << CHUNK_SHIFT, slot..slot + 1, self.now));
        }

        fn later(&mut self, time: Duration) -> u8 {
            self.now += time;
            self.thrash.level(self.now)
        }
    }

    #[test]
    fn what_fits_does_not_thrash() {
        let mut guest = Guest::new();
        for n in 0..10_000 {
            guest.touch(n % 4, n / 4 % 4);
        }
        assert_eq!(guest.thrash.counters(), ThrashCounters::default());
    }

    #[test]
    fn a_stream_is_not_thrashing() {
        let mut guest = Guest::new();
        for n in 0..10_000 {
            guest.touch(1, n);
        }
        assert_eq!(guest.thrash.counters(), ThrashCounters::default(), "nothing comes back");
    }

    #[test]
    fn what_comes_back_tells_how_much_room_it_needs() {
        let mut guest = Guest::new();
        for n in 0..2_000 {
            guest.touch(1, n % 24);
        }
        let counters = guest.thrash.counters();
        // 24 chunks, and a fifth of 30 free. The guest here takes none before the window is full, so each distance is 8.
        assert_eq!(counters.sufficient_window, 30 * CHUNK_SIZE);
        assert_eq!((counters.level, counters.refaulted_chunks), (2, 2_000 - 24));
        let [told] = guest.told[..] else { panic!("{:?}", guest.told) };
        assert_eq!(told.sufficient, 30 * CHUNK_SIZE);
        assert!(told.refaults * 2 >= told.of);
        for n in 0..2_000 {
            guest.touch(2, n % 100);
        }
        assert_eq!(guest.thrash.counters().sufficient_window, 125 * CHUNK_SIZE);
        assert_eq!(guest.told.len(), 2, "twice as much is worth another word");
    }

    #[test]
    fn the_level_rises_once_a_second_and_falls_when_it_is_calm() {
        let mut guest = Guest::new();
        for n in 0..8_000 {
            guest.touch(1, n % 24);
        }
        assert_eq!(guest.thrash.counters().level, MAX_THRASH_LEVEL);
        assert_eq!(guest.later(Duration::from_millis(4_900)), MAX_THRASH_LEVEL);
        for level in (0..MAX_THRASH_LEVEL).rev() {
            assert_eq!(guest.later(CALM.0), level);
        }
        assert_eq!(guest.later(CALM.0), 0);
        assert_eq!(guest.thrash.counters().peak_level, MAX_THRASH_LEVEL);
    }

    #[test]
    fn each_relapse_doubles_the_time_to_the_next_fall() {
        let mut guest = Guest::new();
        let thrash = |guest: &mut Guest| (0..200).for_each(|n| guest.touch(1, n % 24));
        thrash(&mut guest);
        assert_eq!(guest.later(CALM.0), 0);
        thrash(&mut guest);
        assert_eq!((guest.later(CALM.0), guest.later(CALM.0)), (1, 0));
        // It was calm for long, and all is forgiven.
        guest.later(5 * CALM.0);
        thrash(&mut guest);
        assert_eq!(guest.later(CALM.0), 0);
    }

    #[test]
    fn a_slow_guest_does_not_thrash() {
        let mut guest = Guest::new();
        for n in 0..2_000 {
            guest.touch(1, n % 24);
            guest.later(Duration::from_millis(60));
        }
        let counters = guest.thrash.counters();
        assert_eq!((counters.level, counters.sufficient_window), (0, 0));
        assert_eq!(counters.refaulted_chunks, 2_000 - 24);
    }

    #[test]
    fn what_is_given_back_with_room_left_leaves_no_shadow() {
        let guest = Guest::new();
        for n in 0..1_000 {
            let at = guest.now + Duration::from_millis(n);
            assert_eq!(guest.thrash.mapped(1, 0, 0..1, at), None);
            guest.thrash.unmapped(0..1, 7);
        }
        assert_eq!(guest.thrash.counters(), ThrashCounters::default());
    }

    #[test]
    fn what_is_mapped_over_counts_as_taken_but_for_an_upgrade() {
        let guest = Guest::new();
        for n in 0..1_000 {
            let at = guest.now + Duration::from_millis(n);
            guest.thrash.mapped(n % 2, 0, 0..1, at);
            guest.thrash.mapped(n % 2, 0, 0..1, at);
        }
        assert_eq!(guest.thrash.counters().refaulted_chunks, 998);
        assert_eq!(guest.thrash.counters().sufficient_window, 22 * CHUNK_SIZE);
    }

    #[test]
    fn a_new_session_starts_anew() {
        let mut guest = Guest::new();
        for n in 0..200 {
            guest.touch(1, n % 24);
        }
        guest.thrash.cleared();
        guest.window.clear();
        assert_eq!(guest.thrash.level(guest.now), 0);
        let before = guest.thrash.counters().refaulted_chunks;
        for n in 0..24 {
            guest.touch(1, n);
        }
        assert_eq!(guest.thrash.counters().refaulted_chunks, before);
    }

    #[test]
    fn what_lies_outside_of_the_window_is_left_out() {
        let guest = Guest::new();
        assert_eq!(guest.thrash.mapped(1, 0, 15..40, guest.now), None);
        guest.thrash.unmapped(0..40, CHUNKS);
        assert_eq!(guest.thrash.lock().taken, 1);
    }
}
