//! The window against a model, with real files seen through its pointer.

mod host_changes;
mod prefault;

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::ptr;

use proptest::prelude::*;

use super::*;

const CHUNK: usize = CHUNK_SIZE as usize;
const SIZE: u64 = 32 << 20;
const CHUNKS: u64 = SIZE / CHUNK_SIZE;

/// A file of some chunks, each starting with its own mark.
fn file(mark: u8, chunks: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(chunks * CHUNK_SIZE).unwrap();
    for chunk in 0..chunks {
        file.write_at(&[mark, chunk as u8 + 1], chunk * CHUNK_SIZE).unwrap();
    }
    file
}

fn stat(file: &File) -> libc::stat64 {
    // SAFETY: an all-zero structure is valid, and fstat64(2) fills it.
    unsafe {
        let mut stat = std::mem::zeroed();
        assert_eq!(libc::fstat64(file.as_raw_fd(), &mut stat), 0);
        stat
    }
}

fn peek(window: &DaxWindow, offset: u64) -> [u8; 2] {
    assert!(offset + 2 <= window.size());
    // SAFETY: the bytes lie in the window, and every file that the tests map is long enough.
    unsafe { window.host_address().add(offset as usize).cast::<[u8; 2]>().read_volatile() }
}

fn poke(window: &DaxWindow, offset: u64, bytes: [u8; 2]) {
    assert!(offset + 2 <= window.size());
    // SAFETY: as above; the tests write to writable mappings alone.
    unsafe { window.host_address().add(offset as usize).cast::<[u8; 2]>().write_volatile(bytes) }
}

/// The permissions of the mapping at an address, from /proc/self/maps.
fn permissions(address: *mut u8) -> String {
    let mut maps = String::new();
    File::open("/proc/self/maps").unwrap().read_to_string(&mut maps).unwrap();
    let found = maps.lines().find_map(|line| {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let parse = |hex| usize::from_str_radix(hex, 16).unwrap();
        (parse(start)..parse(end)).contains(&(address as usize)).then(|| rest[..4].to_string())
    });
    found.unwrap_or_else(|| "none".into())
}

#[test]
fn it_is_aligned_and_reads_zeros() {
    let window = DaxWindow::new(SIZE).unwrap();
    assert_eq!(window.host_address() as usize % CHUNK, 0);
    assert_eq!(window.size(), SIZE);
    assert_eq!(peek(&window, 0), [0, 0]);
    assert_eq!(peek(&window, SIZE - 2), [0, 0]);
    assert_eq!(window.counters(), WindowCounters { size: SIZE, stray_bytes: 8192, ..Default::default() });
}

#[test]
fn pages_that_are_not_there_are_replaced_while_they_are_touched() {
    let window = DaxWindow::new(SIZE).unwrap();
    let file = file(9, 1);
    file.set_len(5000).unwrap();
    window.map(0, 0, CHUNK_SIZE, true, file.as_fd()).unwrap();
    window.map(CHUNK_SIZE, 0, CHUNK_SIZE, false, file.as_fd()).unwrap();
    // The second page has the file's end, the third is behind it.
    assert_eq!(peek(&window, 4096), [0, 0]);
    assert_eq!(window.counters().replaced_pages, 0);
    assert_eq!(peek(&window, 8192), [0, 0]);
    poke(&window, 3 * 4096, [1, 1]);
    // A read-only mapping.
    poke(&window, CHUNK_SIZE, [2, 2]);
    assert!(window.counters().replaced_pages >= 3);
    let mut start = [0; 2];
    file.read_exact_at(&mut start, 0).unwrap();
    assert_eq!(start, [9, 1], "nothing of it reached the file");
    // The watcher sees to it that the file is there again.
    host_changes::wait_for("the file", || peek(&window, CHUNK_SIZE) == [9, 1]);

    file.set_len(CHUNK_SIZE).unwrap();
    file.write_at(&[3, 4], 8192).unwrap();
    host_changes::wait_for("the file", || peek(&window, 8192) == [3, 4] && peek(&window, 3 * 4096) == [0, 0]);
}

#[test]
fn what_is_written_to_holes_stays_there_and_is_forgotten() {
    let window = DaxWindow::new(4 * SIZE).unwrap();
    let file = file(6, 1);
    for chunk in 0..4 * CHUNKS {
        poke(&window, chunk * CHUNK_SIZE + 64, [1, 2]);
    }
    assert_eq!(window.counters().stray_bytes, CHUNKS * 4096, "holes share their memory");
    window.map(0, 0, CHUNK_SIZE, true, file.as_fd()).unwrap();
    assert_eq!((peek(&window, 0), peek(&window, 64)), ([6, 1], [0, 0]));
    window.clear().unwrap();
    assert_eq!((peek(&window, 64), peek(&window, CHUNK_SIZE + 64)), ([0, 0], [0, 0]));
    let mut bytes = [0; 2];
    file.read_exact_at(&mut bytes, 64).unwrap();
    assert_eq!(bytes, [0, 0], "nothing of it reached the file");
}

#[test]
fn sizes_that_no_window_has_are_refused() {
    for size in [0, CHUNK_SIZE, SIZE + 4096, MAX_WINDOW_SIZE + CHUNK_SIZE, u64::MAX] {
        assert_eq!(DaxWindow::new(size).err().unwrap().raw_os_error(), Some(libc::EINVAL));
    }
}

#[test]
fn the_largest_window_commits_nothing() {
    let window = DaxWindow::new(MAX_WINDOW_SIZE).unwrap();
    let file = file(7, 1);
    let last = MAX_WINDOW_SIZE - CHUNK_SIZE;
    window.map(last, 0, CHUNK_SIZE, false, file.as_fd()).unwrap();
    assert_eq!(peek(&window, last), [7, 1]);
    assert_eq!(peek(&window, 0), [0, 0]);
}

#[test]
fn a_writable_mapping_is_the_file() {
    let window = DaxWindow::new(SIZE).unwrap();
    let file = file(3, 2);
    window.map(4 * CHUNK_SIZE, CHUNK_SIZE, CHUNK_SIZE, true, file.as_fd()).unwrap();
    assert_eq!(peek(&window, 4 * CHUNK_SIZE), [3, 2]);

    poke(&window, 4 * CHUNK_SIZE + 100, [8, 9]);
    let mut bytes = [0; 2];
    file.read_exact_at(&mut bytes, CHUNK_SIZE + 100).unwrap();
    assert_eq!(bytes, [8, 9]);

    file.write_at(&[5, 6], CHUNK_SIZE + 200).unwrap();
    assert_eq!(peek(&window, 4 * CHUNK_SIZE + 200), [5, 6]);
}

#[test]
fn a_read_only_mapping_is_read_only_and_is_upgraded_in_place() {
    let window = DaxWindow::new(SIZE).unwrap();
    let file = file(1, 4);
    window.map(0, 0, 4 * CHUNK_SIZE, false, file.as_fd()).unwrap();
    assert_eq!(permissions(window.host_address()), "r--s");

    window.map(CHUNK_SIZE, CHUNK_SIZE, CHUNK_SIZE, true, file.as_fd()).unwrap();
    assert_eq!(permissions(window.host_address().wrapping_add(CHUNK)), "rw-s");
    for chunk in [0, 2, 3] {
        assert_eq!(permissions(window.host_address().wrapping_add(chunk * CHUNK)), "r--s");
        assert_eq!(peek(&window, chunk as u64 * CHUNK_SIZE), [1, chunk as u8 + 1]);
    }
    assert_eq!(peek(&window, CHUNK_SIZE), [1, 2]);

    let counters = window.counters();
    assert_eq!((counters.mapped_chunks, counters.upgraded_chunks, counters.overlaid_chunks), (4, 1, 0));
    assert_eq!(counters.setup_mappings, 2);
}

#[test]
fn a_failed_map_leaves_what_was_there() {
    let window = DaxWindow::new(SIZE).unwrap();
    let file = file(2, 1);
    let read_only = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
    let directory = File::open("/").unwrap();
    window.map(0, 0, CHUNK_SIZE, false, file.as_fd()).unwrap();
    assert_eq!((peek(&window, 0), peek(&window, CHUNK_SIZE)), ([2, 1], [0, 0]));
    let before = window.counters();

    let denied = window.map(0, 0, CHUNK_SIZE, true, read_only.as_fd()).unwrap_err();
    assert_eq!(denied.errno(), libc::EACCES);
    let no_file = window.map(CHUNK_SIZE, 0, CHUNK_SIZE, false, directory.as_fd()).unwrap_err();
    assert_eq!(no_file.errno(), libc::ENODEV);

    assert_eq!(peek(&window, 0), [2, 1]);
    assert_eq!(peek(&window, CHUNK_SIZE), [0, 0]);
    assert_eq!(window.counters(), WindowCounters { failed_setup_mappings: 2, ..before });
}

/// What others map while a window has a gap must not be what the guest gets to see.
#[test]
fn a_gap_is_no_place_for_other_memory() {
    let window = DaxWindow::new(SIZE).unwrap();
    let places = window.host_address() as usize..window.host_address() as usize + SIZE as usize;
    // SAFETY: the range lies in the window, and no reference into it exists.
    assert_eq!(unsafe { libc::munmap(window.host_address().cast(), CHUNK) }, 0);
    let (size, flags) = (CHUNK / 2, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: new memory, wherever it is free.
    let others = [(); 256]
        .map(|()| unsafe { libc::mmap(ptr::null_mut(), size, libc::PROT_NONE, flags, -1, 0) as usize });
    for other in others {
        assert!(!places.contains(&other), "{other:#x} is in the window");
        // SAFETY: it was mapped above, and nobody uses it.
        assert_eq!(unsafe { libc::munmap(other as *mut libc::c_void, size) }, 0);
    }
    window.unmap(0, SIZE).unwrap();
}

/// Older kernels have removed the old mapping when a new one fails late.
#[test]
fn a_gap_left_by_a_failed_map_is_closed() {
    let window = DaxWindow::new(SIZE).unwrap();
    let file = file(2, 2);
    let directory = File::open("/").unwrap();
    window.map(0, 0, 2 * CHUNK_SIZE, false, file.as_fd()).unwrap();
    // SAFETY: the range lies in the window, and no reference into it exists.
    assert_eq!(unsafe { libc::munmap(window.host_address().cast(), CHUNK) }, 0);
    window.map(0, 0, CHUNK_SIZE, false, directory.as_fd()).unwrap_err();
    assert_eq!(permissions(window.host_address()), "rw-s");
    assert_eq!((peek(&window, 0), peek(&window, CHUNK_SIZE)), ([0, 0], [2, 2]));
    assert_eq!(window.counters().mapped_chunks, 1);
}

/// The same of a file that has become shorter: the gap is only where the file would be.
#[test]
fn a_gap_left_by_a_short_file_is_closed() {
    let window = DaxWindow::new(SIZE).unwrap();
    let (old, short) = (file(2, 2), tempfile::NamedTempFile::new().unwrap());
    short.as_file().set_len(CHUNK_SIZE).unwrap();
    let write_only = File::options().write(true).open(short.path()).unwrap();
    window.map(0, 0, 2 * CHUNK_SIZE, false, old.as_fd()).unwrap();
    window.map(2 * CHUNK_SIZE, 0, CHUNK_SIZE, false, short.as_file().as_fd()).unwrap();
    short.as_file().set_len(8192).unwrap();
    // SAFETY: the range lies in the window, and no reference into it exists.
    assert_eq!(unsafe { libc::munmap(window.host_address().cast(), 8192) }, 0);
    window.map(0, 0, CHUNK_SIZE, false, write_only.as_fd()).unwrap_err();
    for page in [0, 8192, CHUNK - 4096] {
        assert_eq!(permissions(window.host_address().wrapping_add(page)), "rw-s", "{page:#x}");
    }
    assert_eq!((peek(&window, 0), peek(&window, CHUNK_SIZE)), ([0, 0], [2, 2]));
    assert_eq!(window.counters().mapped_chunks, 2);
}

#[test]
fn unmapped_chunks_read_zeros_and_others_stay() {
    let window = DaxWindow::new(SIZE).unwrap();
    let file = file(4, 3);
    window.map(0, 0, 3 * CHUNK_SIZE, true, file.as_fd()).unwrap();
    window.unmap(CHUNK_SIZE, CHUNK_SIZE).unwrap();
    assert_eq!([0, 1, 2].map(|chunk| peek(&window, chunk * CHUNK_SIZE)), [[4, 1], [0, 0], [4, 3]]);
    window.unmap(0, SIZE).unwrap();
    window.unmap(0, SIZE).unwrap();
    assert_eq!(peek(&window, 2 * CHUNK_SIZE), [0, 0]);
    let counters = window.counters();
    assert_eq!((counters.mapped_chunks, counters.peak_mapped_chunks, counters.remove_mappings), (0, 3, 3));
}

#[test]
fn ranges_outside_or_unaligned_are_refused() {
    let window = DaxWindow::new(SIZE).unwrap();
    let file = file(1, 1);
    let top = u64::MAX - CHUNK_SIZE + 1;
    for (moffset, len) in [
        (0, 0),
        (1, CHUNK_SIZE),
        (4096, CHUNK_SIZE),
        (0, 4096),
        (0, CHUNK_SIZE + 1),
        (SIZE, CHUNK_SIZE),
        (SIZE - CHUNK_SIZE, 2 * CHUNK_SIZE),
        (0, SIZE + CHUNK_SIZE),
        (top, CHUNK_SIZE),
        (CHUNK_SIZE, top),
        (0, u64::MAX),
    ] {
        let map = window.map(moffset, 0, len, false, file.as_fd());
        assert_eq!(map.unwrap_err().errno(), libc::EINVAL, "{moffset:#x} {len:#x}");
        assert_eq!(window.unmap(moffset, len).unwrap_err().errno(), libc::EINVAL, "{moffset:#x} {len:#x}");
    }
    for foffset in [1, 4096, i64::MAX as u64 - CHUNK_SIZE, 1 << 63, top, u64::MAX] {
        let map = window.map(0, foffset, CHUNK_SIZE, false, file.as_fd());
        assert_eq!(map.unwrap_err().errno(), libc::EINVAL, "{foffset:#x}");
    }
    let last = SIZE - CHUNK_SIZE;
    window.map(last, 0, CHUNK_SIZE, false, file.as_fd()).unwrap();
    assert_eq!(peek(&window, last), [1, 1]);
    assert_eq!(window.counters().mapped_chunks, 1);
}

/// Numbers that guests could think of: near the ends of all that is a limit to something, in bytes or whole chunks.
fn odd_number() -> impl Strategy<Value = u64> {
    let limits = [0, CHUNK_SIZE, SIZE, i64::MAX as u64, 1 << 63, u64::MAX - CHUNK_SIZE + 1, u64::MAX];
    let near =
        (prop::sample::select(limits.to_vec()), -3i64..4, prop::sample::select(vec![1, CHUNK_SIZE as i64]))
            .prop_map(|(limit, steps, step)| limit.wrapping_add_signed(steps * step));
    prop_oneof![3 => near, 1 => (0..=CHUNKS).prop_map(|chunks| chunks * CHUNK_SIZE), 1 => any::<u64>()]
}

proptest! {
    #[test]
    fn a_range_is_taken_if_it_is_whole_chunks_of_window_and_file(
        (moffset, foffset, len) in (odd_number(), odd_number(), odd_number())
    ) {
        let window = DaxWindow::new(SIZE).unwrap();
        let is_whole = |value: u64| value.is_multiple_of(CHUNK_SIZE);
        // By numbers that no sum of these can overflow.
        let end = |start: u64| u128::from(start) + u128::from(len);
        let in_window = len > 0 && is_whole(moffset) && is_whole(len) && end(moffset) <= SIZE.into();
        let in_file = is_whole(foffset) && end(foffset) <= i64::MAX as u128;
        let file = file(1, 1);
        let mapped = window.map(moffset, foffset, len, false, file.as_fd());
        prop_assert_eq!(mapped.is_ok(), in_window && in_file);
        let chunks = if mapped.is_ok() { len / CHUNK_SIZE } else { 0 };
        prop_assert_eq!(window.counters().mapped_chunks, chunks);
        prop_assert_eq!(window.unmap(moffset, len).is_ok(), in_window);
        prop_assert_eq!(window.counters().mapped_chunks, 0);
    }
}

#[test]
fn clear_and_drop_let_go_of_the_files() {
    let window = DaxWindow::new(SIZE).unwrap();
    let base = window.host_address();
    window.map(0, 0, 2 * CHUNK_SIZE, false, file(1, 2).as_fd()).unwrap();
    assert_eq!(permissions(base), "r--s");
    window.clear().unwrap();
    window.clear().unwrap();
    assert_eq!(permissions(base), "rw-s");
    assert_eq!(peek(&window, 0), [0, 0]);
    assert_eq!((window.counters().mapped_chunks, window.counters().cleared_chunks), (0, 2));
}

#[test]
fn a_known_file_is_mapped_by_the_windows_descriptor() {
    let window = DaxWindow::new(SIZE).unwrap();
    let file = file(5, 4);
    let stat = stat(&file);
    assert!(window.known(&stat).is_none());
    window.map(0, 0, CHUNK_SIZE, true, file.as_fd()).unwrap();
    let known = window.known(&stat).unwrap();
    drop(file);
    window.map_known(CHUNK_SIZE, CHUNK_SIZE, 2 * CHUNK_SIZE, known.is_writable(), &known).unwrap();
    assert_eq!([0, 1, 2].map(|chunk| peek(&window, chunk * CHUNK_SIZE)), [[5, 1], [5, 2], [5, 3]]);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let start =
        format!("{:x}-{:x} rw-s", window.host_address() as usize, window.host_address() as usize + 3 * CHUNK);
    assert!(maps.contains(&start), "one mapping of the process holds them all");
    // It may have gone meanwhile, and its number may be another file's.
    window.unmap(0, SIZE).unwrap();
    assert!(window.known(&stat).is_none());
    let other = self::file(6, 1);
    window.map(0, 0, CHUNK_SIZE, true, other.as_fd()).unwrap();
    window.map_known(CHUNK_SIZE, 3 * CHUNK_SIZE, CHUNK_SIZE, false, &known).unwrap();
    assert_eq!((peek(&window, 0), peek(&window, CHUNK_SIZE)), ([6, 1], [5, 4]));
    assert_eq!(permissions(window.host_address().wrapping_add(CHUNK)), "r--s");
}

/// Random requests, good and bad, against a model that keeps a mark for each chunk.
#[test]
fn it_agrees_with_a_model() {
    let window = DaxWindow::new(SIZE).unwrap();
    let files = [file(1, 8), file(2, 8), file(3, 8)];
    let mut model = vec![[0u8; 2]; CHUNKS as usize];
    let (mut setups, mut removes) = (0, 0);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    for _ in 0..2_000 {
        let (first, count) = (random(CHUNKS + 2), random(5));
        let (moffset, len) = (first * CHUNK_SIZE, count * CHUNK_SIZE);
        let valid = count > 0 && first + count <= CHUNKS;
        let range = first as usize..(first + count) as usize;
        if random(3) == 0 {
            // Others with it, some of which are bad, overlap, or are the same.
            let mut ranges = vec![(moffset, len)];
            ranges.extend(
                (0..random(5)).map(|_| (random(2 * CHUNKS + 2) * CHUNK_SIZE / 2, random(3) * CHUNK_SIZE)),
            );
            let is_valid = |&(moffset, len): &(u64, u64)| {
                len > 0 && moffset.is_multiple_of(CHUNK_SIZE) && moffset + len <= SIZE
            };
            let mut holes = vec![];
            let done = window.unmap_all(&mut ranges, |hole| holes.push(hole));
            assert_eq!(done.is_ok(), ranges.iter().all(is_valid));
            assert!(holes.is_sorted_by(|a, b| a.end < b.start), "what touches is one hole: {holes:?}");
            for (moffset, len) in ranges.iter().copied().filter(is_valid) {
                let range = (moffset / CHUNK_SIZE) as usize..((moffset + len) / CHUNK_SIZE) as usize;
                assert!(holes.iter().any(|hole| hole.start <= range.start && range.end <= hole.end));
                model[range].fill([0, 0]);
            }
            removes += ranges.iter().filter(|range| is_valid(range)).count() as u64;
        } else {
            let (file, start) = (random(3), random(4));
            let writable = random(2) == 0;
            let (source, foffset) = (&files[file as usize], start * CHUNK_SIZE);
            let known = window.known(&stat(source));
            assert_eq!(known.is_some(), model.iter().any(|chunk| chunk[0] == file as u8 + 1));
            let map = match known.filter(|known| known.is_writable() || !writable) {
                Some(known) => window.map_known(moffset, foffset, len, writable, &known),
                None => window.map(moffset, foffset, len, writable, source.as_fd()),
            };
            assert_eq!(map.is_ok(), valid);
            if valid {
                setups += 1;
                for (chunk, shown) in model[range].iter_mut().zip(start as u8 + 1..) {
                    *chunk = [file as u8 + 1, shown];
                }
            }
        }
        let mapped = model.iter().filter(|chunk| **chunk != [0, 0]).count() as u64;
        assert_eq!(window.counters().mapped_chunks, mapped);
    }
    for (chunk, expected) in model.iter().enumerate() {
        assert_eq!(peek(&window, chunk as u64 * CHUNK_SIZE), *expected, "chunk {chunk}");
    }
    let counters = window.counters();
    assert_eq!((counters.setup_mappings, counters.remove_mappings), (setups, removes));
    assert!(
        counters.upgraded_chunks > 0 && counters.overlaid_chunks > 0 && counters.failed_setup_mappings > 0
    );
}

#[test]
fn threads_that_share_it_do_not_disturb_each_other() {
    let window = DaxWindow::new(SIZE).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u8 {
            let window = &window;
            scope.spawn(move || {
                let file = file(thread + 1, 2);
                for round in 0..500u64 {
                    let moffset = (u64::from(thread) + 4 * (round % 4)) * CHUNK_SIZE;
                    window.map(moffset, CHUNK_SIZE, CHUNK_SIZE, round % 2 == 0, file.as_fd()).unwrap();
                    assert_eq!(peek(window, moffset), [thread + 1, 2]);
                    window.unmap(moffset, CHUNK_SIZE).unwrap();
                    assert_eq!(peek(window, moffset), [0, 0]);
                }
            });
        }
    });
    let counters = window.counters();
    assert_eq!(
        (counters.mapped_chunks, counters.setup_mappings, counters.remove_mappings),
        (0, 2_000, 2_000)
    );
}
