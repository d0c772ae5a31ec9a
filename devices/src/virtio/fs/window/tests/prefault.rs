//! First touches: what is made present, and what is left alone.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;

use rustix::fs::{Advice, Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
};

use super::*;
use crate::virtio::device::NestedPaging;
use crate::virtio::fs::policy::Prefault;
use crate::virtio::fs::testing::{directory_with_attributes, directory_with_flags};

const PAGE: u64 = 4096;

/// A file in a directory, all of which is in the page cache and written back.
fn cached_file(directory: &tempfile::TempDir, len: u64) -> File {
    let file = tempfile::tempfile_in(directory.path()).unwrap();
    let content: Vec<u8> = (0..len).map(|at| (at / PAGE) as u8 | 1).collect();
    file.write_all_at(&content, 0).unwrap();
    file.sync_all().unwrap();
    file
}

/// Throws a part of a file out of the page cache; what becomes of it says [`in_cache`].
fn evict(file: &File, offset: u64, len: u64) {
    rustix::fs::fadvise(file, offset, NonZeroU64::new(len), Advice::DontNeed).unwrap();
}

/// Which of the pages that are mapped somewhere are in the page cache.
fn in_cache(window: &DaxWindow, moffset: u64, pages: u64) -> Vec<bool> {
    let mut found = vec![0; pages as usize];
    mmap::resident(window.host_address().wrapping_add(moffset as usize), &mut found).unwrap();
    found.iter().map(|page| page & 1 != 0).collect()
}

/// Which pages are in the page tables of this process, from /proc/self/pagemap.
fn present(window: &DaxWindow, moffset: u64, pages: u64) -> Vec<bool> {
    let mut entries = vec![0; pages as usize * 8];
    let at = (window.host_address() as u64 + moffset) / PAGE * 8;
    File::open("/proc/self/pagemap").unwrap().read_exact_at(&mut entries, at).unwrap();
    entries.chunks(8).map(|entry| u64::from_le_bytes(entry.try_into().unwrap()) >> 63 != 0).collect()
}

/// Maps a chunk of a file, and prefaults it.
fn map(window: &DaxWindow, moffset: u64, foffset: u64, file: &File, prefault: Prefault) -> u64 {
    let shown = window.map(moffset, foffset, CHUNK_SIZE, true, file.as_fd()).unwrap();
    let part = MappedPart { fd: file.as_fd(), foffset, moffset, shown, writable: true, is_own: false };
    window.prefault(part, prefault)
}

fn prefaulted(
    window: &DaxWindow,
    moffset: u64,
    foffset: u64,
    len: u64,
    file: &File,
    prefault: Prefault,
) -> u64 {
    let shown = Shown { bytes: len, is_stream: true, file_size: len };
    let part = MappedPart { fd: file.as_fd(), foffset, moffset, shown, writable: true, is_own: false };
    window.prefault(part, prefault)
}

#[test]
fn only_what_is_cached_is_made_present_and_nothing_is_read_for_it() {
    let Some(directory) = directory_with_flags() else { return };
    let window = DaxWindow::new(SIZE).unwrap();
    let file = cached_file(&directory, 3 * CHUNK_SIZE);
    // The first chunk comes back, and the middle one without its second quarter.
    evict(&file, 0, 3 * CHUNK_SIZE);
    rustix::fs::fadvise(&file, 0, None, Advice::Random).unwrap();
    for part in [0..512 + 128, 512 + 256..1024] {
        for page in part {
            file.read_exact_at(&mut [0], page * PAGE).unwrap();
        }
    }
    for chunk in 0..3 {
        window.map(chunk * CHUNK_SIZE, chunk * CHUNK_SIZE, CHUNK_SIZE, true, file.as_fd()).unwrap();
    }
    let before = in_cache(&window, 0, 3 * 512);
    let expected = [vec![true; 512 + 128], vec![false; 128], vec![true; 256], vec![false; 512]].concat();
    assert_eq!(before, expected, "what is cached");
    assert!(present(&window, 0, 3 * 512).iter().all(|page| !page));

    let bytes = [0, 1, 2].map(|chunk| {
        let at = chunk * CHUNK_SIZE;
        prefaulted(&window, at, at, CHUNK_SIZE, &file, Prefault::Cached)
    });
    assert_eq!(bytes, [CHUNK_SIZE, CHUNK_SIZE / 4 * 3, 0]);
    assert_eq!(in_cache(&window, 0, 3 * 512), before, "nothing was read");
    assert_eq!(present(&window, 0, 3 * 512), before, "what is there is at hand");
    let counters = window.counters();
    assert_eq!((counters.prefaults, counters.prefault_bytes), (2, bytes.iter().sum()));
}

#[test]
fn never_leaves_all_to_the_first_touch_and_all_reads_what_is_cold() {
    let Some(directory) = directory_with_flags() else { return };
    let window = DaxWindow::new(SIZE).unwrap();
    let file = cached_file(&directory, CHUNK_SIZE);
    assert_eq!(map(&window, 0, 0, &file, Prefault::Never), 0);
    assert!(present(&window, 0, 512).iter().all(|page| !page));
    assert_eq!(window.counters().prefaults, 0);

    window.unmap(0, CHUNK_SIZE).unwrap();
    evict(&file, 0, CHUNK_SIZE);
    assert_eq!(map(&window, 0, 0, &file, Prefault::Never), 0);
    assert!(in_cache(&window, 0, 512).iter().all(|page| !page), "it was evicted");
    assert_eq!(map(&window, 0, 0, &file, Prefault::All), CHUNK_SIZE);
    assert!(present(&window, 0, 512).iter().all(|page| *page));
}

#[test]
fn pages_behind_the_end_of_a_file_are_left_alone() {
    let Some(directory) = directory_with_flags() else { return };
    let window = DaxWindow::new(SIZE).unwrap();
    for (len, expected) in [(0, 0), (1, 0), (4 * PAGE - 1, 4 * PAGE), (100 * PAGE + 1, 101 * PAGE)] {
        let file = cached_file(&directory, len);
        for prefault in [Prefault::Cached, Prefault::All] {
            // A file of a page or none is no run, but all of it is all.
            let expected = if prefault == Prefault::All { len.next_multiple_of(PAGE) } else { expected };
            assert_eq!(map(&window, 0, 0, &file, prefault), expected, "{len} bytes, {prefault}");
            assert_eq!(map(&window, CHUNK_SIZE, CHUNK_SIZE, &file, prefault), 0, "the chunk behind it");
        }
        assert!(present(&window, 0, 512)[(expected / PAGE) as usize + 1..].iter().all(|page| !page));
    }
    // It becomes shorter between the mapping and the prefault.
    let file = cached_file(&directory, CHUNK_SIZE);
    let len = window.map(0, 0, CHUNK_SIZE, true, file.as_fd()).unwrap().bytes;
    file.set_len(0).unwrap();
    for prefault in [Prefault::Cached, Prefault::All] {
        prefaulted(&window, 0, 0, len, &file, prefault);
    }
    assert_eq!(window.counters().replaced_pages, 0, "nothing was touched that is not there");
}

#[test]
fn what_is_cached_is_made_present_where_the_guest_is_likely_to_touch_it() {
    let Some(directory) = directory_with_attributes() else { return };
    let window = DaxWindow::new(SIZE).unwrap();
    let (small, large) = (cached_file(&directory, 8 * CHUNK_SIZE), cached_file(&directory, 9 * CHUNK_SIZE));
    let chunk = |file: &File, moffset: u64, foffset: u64, prefault| {
        map(&window, moffset * CHUNK_SIZE, foffset * CHUNK_SIZE, file, prefault)
    };
    assert_eq!(chunk(&large, 0, 5, Prefault::Cached), 0, "somewhere in a large file");
    assert_eq!(chunk(&large, 0, 6, Prefault::Cached), CHUNK_SIZE, "the next chunk of it");
    assert_eq!(chunk(&large, 0, 0, Prefault::Cached), CHUNK_SIZE, "its beginning");
    assert_eq!(chunk(&large, 0, 3, Prefault::All), CHUNK_SIZE, "all is all");
    for (moffset, foffset) in (0..11).zip([7, 5, 3].into_iter().cycle()) {
        assert_eq!(chunk(&small, moffset, foffset, Prefault::Cached), CHUNK_SIZE, "there is room");
    }
    // Twelve of sixteen.
    assert_eq!(chunk(&small, 11, 1, Prefault::Cached), 0, "somewhere");
    assert_eq!(chunk(&small, 12, 2, Prefault::Cached), CHUNK_SIZE, "the next one");
    assert_eq!(chunk(&small, 13, 5, Prefault::Cached), 0, "somewhere else");
    assert_eq!(chunk(&small, 14, 0, Prefault::Cached), CHUNK_SIZE, "the beginning");
    assert_eq!(chunk(&small, 15, 7, Prefault::All), CHUNK_SIZE, "all is all");
    window.unmap(0, 8 * CHUNK_SIZE).unwrap();
    assert_eq!(chunk(&small, 0, 5, Prefault::Cached), CHUNK_SIZE, "there is room again");
}

#[test]
fn no_more_than_a_chunk_is_made_present_at_once() {
    let Some(directory) = directory_with_flags() else { return };
    let window = DaxWindow::new(SIZE).unwrap();
    let file = cached_file(&directory, 4 * CHUNK_SIZE);
    window.map(0, 0, 4 * CHUNK_SIZE, true, file.as_fd()).unwrap();
    for prefault in [Prefault::Cached, Prefault::All] {
        assert_eq!(prefaulted(&window, 0, 0, 4 * CHUNK_SIZE, &file, prefault), CHUNK_SIZE);
        assert!(present(&window, CHUNK_SIZE, 3 * 512).iter().all(|page| !page), "{prefault}");
    }
}

#[test]
fn impossible_parts_are_refused() {
    let window = DaxWindow::new(SIZE).unwrap();
    let file = file(1, 1);
    for (moffset, len) in [(SIZE, PAGE), (SIZE - PAGE, 2 * PAGE), (1, PAGE), (u64::MAX - 4095, PAGE)] {
        for prefault in [Prefault::Cached, Prefault::All] {
            assert_eq!(prefaulted(&window, moffset, 0, len, &file, prefault), 0);
        }
    }
}

#[test]
fn a_chunk_that_is_replaced_meanwhile_does_no_harm() {
    let Some(directory) = directory_with_attributes() else { return };
    let window = Arc::new(DaxWindow::new(SIZE).unwrap());
    let (one, other) = (cached_file(&directory, CHUNK_SIZE), cached_file(&directory, 5 * PAGE));
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Relaxed) {
                prefaulted(&window, 0, 0, CHUNK_SIZE, &one, Prefault::Cached);
                prefaulted(&window, 0, 0, CHUNK_SIZE, &one, Prefault::All);
            }
        });
        for _ in 0..300 {
            window.map(0, 0, CHUNK_SIZE, true, one.as_fd()).unwrap();
            assert_eq!(peek(&window, 255 * PAGE), [255, 255]);
            window.map(0, 0, CHUNK_SIZE, false, other.as_fd()).unwrap();
            assert_eq!(peek(&window, 3 * PAGE), [3, 3]);
            window.unmap(0, CHUNK_SIZE).unwrap();
            assert_eq!(peek(&window, 0), [0, 0]);
        }
        stop.store(true, Relaxed);
    });
    // At most the scratch memory that a guest can have of its own accord.
    assert!(window.counters().stray_bytes <= 2 << 20);
    assert_eq!(window.counters().replaced_pages, 0);
    window.map(0, 0, CHUNK_SIZE, true, one.as_fd()).unwrap();
    assert_eq!(peek(&window, 511 * PAGE), [255, 255]);
}

/// Page tables that remember what they were filled with, and can be full.
#[derive(Default)]
struct Recorder {
    asked: Mutex<Vec<(u64, u64)>>,
    errno: i32,
}

impl NestedPaging for Recorder {
    fn prefault(&self, offset: u64, len: u64) -> io::Result<u64> {
        self.asked.lock().unwrap().push((offset, len));
        if self.errno == 0 { Ok(len) } else { Err(io::Error::from_raw_os_error(self.errno)) }
    }
}

#[test]
fn the_hypervisor_is_asked_while_the_guest_sees_the_window() {
    let Some(directory) = directory_with_attributes() else { return };
    let window = DaxWindow::new(SIZE).unwrap();
    let file = cached_file(&directory, CHUNK_SIZE + 5000);
    let recorder = Arc::new(Recorder::default());
    window.set_nested_paging(Some(Arc::clone(&recorder) as _));
    assert_eq!(map(&window, CHUNK_SIZE, 0, &file, Prefault::Cached), CHUNK_SIZE);
    assert_eq!(map(&window, 0, CHUNK_SIZE, &file, Prefault::All), 2 * PAGE);
    assert_eq!(*recorder.asked.lock().unwrap(), [(CHUNK_SIZE, CHUNK_SIZE), (0, 2 * PAGE)]);
    window.set_nested_paging(None);
    assert_eq!(Arc::strong_count(&recorder), 1);
    assert_eq!(map(&window, 0, 0, &file, Prefault::Cached), CHUNK_SIZE, "the host's page tables are filled");

    // A hypervisor that cannot do it, and one for which there is nothing.
    for (errno, expected) in [(libc::EOPNOTSUPP, CHUNK_SIZE), (libc::EFAULT, 0)] {
        window.set_nested_paging(Some(Arc::new(Recorder { errno, ..Recorder::default() })));
        assert_eq!(map(&window, 0, 0, &file, Prefault::Cached), expected);
        assert_eq!(present(&window, 0, 512), [expected > 0; 512]);
    }
}

/// The value of `key` in /proc/self/smaps for the mapping at an address, in KiB.
fn smaps(address: *mut u8, key: &str) -> u64 {
    let mut text = String::new();
    File::open("/proc/self/smaps").unwrap().read_to_string(&mut text).unwrap();
    let start = format!("{:x}-", address as usize);
    let mapping = text.lines().skip_while(|line| !line.starts_with(&start));
    let value = mapping.skip(1).find_map(|line| line.strip_prefix(key)?.strip_prefix(':')).unwrap();
    value.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn huge_pages_of_a_file_are_mapped_as_such() {
    let tmpfs = || -> rustix::io::Result<File> {
        let context = fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(context.as_fd(), c"huge", c"always")?;
        fsconfig_create(context.as_fd())?;
        let root = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
        let flags = OFlags::RDWR | OFlags::TMPFILE;
        Ok(rustix::fs::openat(root, c".", flags, Mode::RUSR | Mode::WUSR)?.into())
    };
    let file = match tmpfs() {
        Ok(file) => file,
        Err(error) => return skipped!("no tmpfs with huge pages can be mounted here: {error}"),
    };
    file.write_all_at(&vec![7; 2 * CHUNK_SIZE as usize], 0).unwrap();
    let window = DaxWindow::new(SIZE).unwrap();
    assert_eq!(map(&window, CHUNK_SIZE, CHUNK_SIZE, &file, Prefault::Cached), CHUNK_SIZE);
    assert_eq!(smaps(window.host_address().wrapping_add(CHUNK_SIZE as usize), "ShmemPmdMapped"), 2048);
    assert_eq!(peek(&window, CHUNK_SIZE), [7, 7]);
}
