//! Files that change on the host while the window shows them.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;

use super::*;
use crate::virtio::device::Repair;

const PAGE: u64 = 4096;

/// A file system of its own each: what is tried must hold on both.
fn places() -> Vec<tempfile::TempDir> {
    let tmpfs = Path::new("/dev/shm");
    let mut places = vec![tempfile::tempdir().unwrap()];
    if tmpfs.is_dir() {
        places.push(tempfile::tempdir_in(tmpfs).unwrap());
    }
    places
}

/// What a page begins with: one byte, since two are not written at once for who reads at the same time.
fn mark(page: u64) -> u64 {
    page % 251 + 1
}

/// A file each page of which begins with its mark.
fn numbered(place: &tempfile::TempDir, pages: u64) -> NamedTempFile {
    let file = NamedTempFile::new_in(place).unwrap();
    file.as_file().set_len(pages * PAGE).unwrap();
    number(file.as_file(), 0, pages);
    file
}

fn number(file: &File, from: u64, to: u64) {
    for page in from..to {
        file.write_all_at(&[mark(page) as u8], page * PAGE).unwrap();
    }
}

fn page(window: &DaxWindow, number: u64) -> u64 {
    peek(window, number * PAGE)[0].into()
}

/// Waits for what the watcher does at its own pace.
pub(super) fn wait_for(what: &str, is_so: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_file_that_shrinks_shows_zeros_and_its_data_again_when_it_grows() {
    for place in places() {
        let window = DaxWindow::new(SIZE).unwrap();
        let file = numbered(&place, 1024);
        window.map(0, 0, 2 * CHUNK_SIZE, true, file.as_file().as_fd()).unwrap();
        assert_eq!((page(&window, 0), page(&window, 1023)), (mark(0), mark(1023)));

        file.as_file().set_len(700 * PAGE + 1).unwrap();
        wait_for("lost pages", || window.counters().lost_pages == 323);
        assert_eq!((page(&window, 699), page(&window, 701), page(&window, 1023)), (mark(699), 0, 0));
        // As a vCPU does it: it is stopped, and goes on.
        assert_eq!(window.repair(900 * PAGE, false), Repair::Unneeded);
        assert_eq!(window.repair(900 * PAGE + 5, true), Repair::Done);
        assert_eq!(window.repair(900 * PAGE + 5, true), Repair::Unneeded);
        poke(&window, 900 * PAGE, [1, 2]);
        assert_eq!((peek(&window, 900 * PAGE), page(&window, 901)), ([1, 2], 0));
        file.as_file().set_len(0).unwrap();
        wait_for("all lost", || window.counters().lost_pages == 1024);
        assert_eq!((page(&window, 0), page(&window, 699)), (0, 0));

        file.as_file().set_len(800 * PAGE).unwrap();
        number(file.as_file(), 0, 800);
        wait_for("restored", || window.counters().restored_pages == 800);
        assert_eq!((page(&window, 0), page(&window, 799), page(&window, 1023)), (mark(0), mark(799), 0));
        file.as_file().set_len(1024 * PAGE).unwrap();
        number(file.as_file(), 800, 1024);
        wait_for("restored", || window.counters().restored_pages == 1024);
        for number in 0..1024 {
            assert_eq!(page(&window, number), mark(number));
        }
        poke(&window, 1000 * PAGE, [7, 7]);
        let mut bytes = [0; 2];
        file.as_file().read_exact_at(&mut bytes, 1000 * PAGE).unwrap();
        assert_eq!(bytes, [7, 7], "it is the file");

        let counters = window.counters();
        assert_eq!((counters.lost_files, counters.replaced_pages, counters.failed_pages), (1, 0, 0));
        assert_eq!(window.lost_paths(), [file.path().to_str().unwrap()]);
        assert!(!window.has_short_files());
    }
}

/// Nobody looks at the size of a file that is watched before more of it is mapped.
#[test]
fn files_that_are_known_change_like_others() {
    for place in places() {
        let window = DaxWindow::new(SIZE).unwrap();
        let file = numbered(&place, 512);
        window.map(0, 0, CHUNK_SIZE, true, file.as_file().as_fd()).unwrap();
        let known = window.known(&stat(file.as_file())).unwrap();
        let map = |chunk| window.map_known(chunk * CHUNK_SIZE, CHUNK_SIZE, CHUNK_SIZE, true, &known).unwrap();
        let second = |chunk: u64, number: u64| page(&window, chunk * 512 + number - 512);

        file.as_file().set_len(1024 * PAGE).unwrap();
        number(file.as_file(), 512, 1024);
        map(1);
        assert_eq!((second(1, 512), second(1, 1023)), (mark(512), mark(1023)), "behind the end that it had");
        assert_eq!(window.counters().lost_pages, 0);

        // At once, before or after anybody has heard of the change; and when it is known.
        file.as_file().set_len(600 * PAGE).unwrap();
        map(2);
        wait_for("lost", || [424, 2 * 424].contains(&window.counters().lost_pages));
        map(3);
        for chunk in [1, 2, 3] {
            assert_eq!((second(chunk, 599), second(chunk, 600), second(chunk, 1023)), (mark(599), 0, 0));
        }
        assert_eq!(window.repair(3 * CHUNK_SIZE + 200 * PAGE, false), Repair::Unneeded);

        file.as_file().set_len(1024 * PAGE).unwrap();
        number(file.as_file(), 600, 1024);
        map(4);
        assert_eq!(second(4, 1023), mark(1023), "a file that is short is looked at");
        wait_for("whole", || !window.has_short_files());
        assert_eq!([1, 2, 3, 4].map(|chunk| second(chunk, 700)), [mark(700); 4]);
        assert_eq!((window.counters().replaced_pages, window.counters().failed_pages), (0, 0));
    }
}

/// A guest that writes behind the end of everything takes little of the host.
#[test]
fn pages_that_only_the_guest_has_are_few() {
    let place = tempfile::tempdir().unwrap();
    let window = DaxWindow::new(SIZE).unwrap();
    let file = numbered(&place, 4096);
    window.map(0, 0, 8 * CHUNK_SIZE, true, file.as_file().as_fd()).unwrap();
    file.as_file().set_len(0).unwrap();
    wait_for("lost", || window.counters().lost_pages == 4096);
    for page in 0..4096 {
        if page < 1024 || page % 512 == 0 {
            assert_eq!(window.repair(page * PAGE, true), Repair::Done, "{page}");
        }
        poke(&window, page * PAGE, [5, 5]);
    }
    assert_eq!(window.counters().copied_pages, 1024 + 6);
    assert!(window.counters().stray_bytes <= CHUNK_SIZE, "{}", window.counters().stray_bytes);
    file.as_file().set_len(4096 * PAGE).unwrap();
    wait_for("whole", || !window.has_short_files());
    assert_eq!((page(&window, 5), page(&window, 4095)), (0, 0));
    file.as_file().set_len(0).unwrap();
    wait_for("lost again", || window.has_short_files());
    window.repair(5 * PAGE, true);
    assert_eq!(page(&window, 5), 0, "there is room for new ones");
}

#[test]
fn what_the_guest_shortens_itself_is_not_lost() {
    for place in places() {
        let window = DaxWindow::new(SIZE).unwrap();
        let file = numbered(&place, 512);
        window.map(0, 0, CHUNK_SIZE, true, file.as_file().as_fd()).unwrap();
        for size in [100, 3, 0, 400, 512] {
            window.resize(&stat(file.as_file()), || file.as_file().set_len(size * PAGE)).unwrap();
            number(file.as_file(), 0, size);
            window.tell(&stat(file.as_file()));
            if size > 0 {
                assert_eq!((page(&window, 0), page(&window, size - 1)), (mark(0), mark(size - 1)));
            }
        }
        std::thread::sleep(Duration::from_millis(20));
        let counters = window.counters();
        assert_eq!((counters.lost_pages, counters.lost_files, counters.replaced_pages), (0, 0, 0));
    }
}

#[test]
fn a_size_that_the_guest_is_told_is_there_at_once() {
    for place in places() {
        let window = DaxWindow::new(SIZE).unwrap();
        let file = numbered(&place, 512);
        window.map(0, 0, CHUNK_SIZE, true, file.as_file().as_fd()).unwrap();
        for round in 0..200 {
            file.as_file().set_len(PAGE).unwrap();
            let lost = || window.counters().lost_pages;
            wait_for("lost", || lost() - window.counters().restored_pages == 511);
            let size = 2 + round;
            file.as_file().set_len(size * PAGE).unwrap();
            number(file.as_file(), 1, size);
            window.tell(&stat(file.as_file()));
            assert_eq!(page(&window, size - 1), mark(size - 1));
            // The guest believes more: the file is as large as ever again.
            file.as_file().set_len(512 * PAGE).unwrap();
            wait_for("restored", || lost() == window.counters().restored_pages);
        }
    }
}

#[test]
fn chunks_that_are_mapped_while_the_file_is_short_end_where_it_does() {
    for place in places() {
        let window = DaxWindow::new(SIZE).unwrap();
        let file = numbered(&place, 2048);
        window.map(0, 0, CHUNK_SIZE, true, file.as_file().as_fd()).unwrap();
        file.as_file().set_len(600 * PAGE).unwrap();
        // Before or after the watcher, and over what another file has left there.
        let other = numbered(&place, 512);
        window.map(CHUNK_SIZE, 0, CHUNK_SIZE, true, other.as_file().as_fd()).unwrap();
        window.map(CHUNK_SIZE, CHUNK_SIZE, CHUNK_SIZE, false, file.as_file().as_fd()).unwrap();
        window.map(2 * CHUNK_SIZE, 3 * CHUNK_SIZE, CHUNK_SIZE, true, file.as_file().as_fd()).unwrap();
        assert_eq!((page(&window, 599), page(&window, 600), page(&window, 1100)), (mark(599), 0, 0));
        assert_eq!(window.counters().replaced_pages, 0, "nothing was touched that is not there");
        // An upgrade is no way out.
        window.map(CHUNK_SIZE, CHUNK_SIZE, CHUNK_SIZE, true, file.as_file().as_fd()).unwrap();
        assert_eq!((page(&window, 599), page(&window, 600)), (mark(599), 0));
        file.as_file().set_len(2048 * PAGE).unwrap();
        number(file.as_file(), 600, 2048);
        wait_for("restored", || !window.has_short_files());
        let shown = [600, 1023, 1024].map(|number| page(&window, number));
        assert_eq!(shown, [mark(600), mark(1023), mark(1536)]);
        assert_eq!(permissions(window.host_address().wrapping_add(CHUNK)), "rw-s");
    }
}

/// It was shortened before anybody watched it: the guest has an old size, and may ask for what is not there any more.
#[test]
fn a_chunk_behind_the_end_is_a_hole_from_the_start() {
    for place in places() {
        let window = DaxWindow::new(SIZE).unwrap();
        let file = numbered(&place, 10);
        window.map(0, CHUNK_SIZE, CHUNK_SIZE, true, file.as_file().as_fd()).unwrap();
        assert_eq!(page(&window, 3), 0);
        window.map(CHUNK_SIZE, 0, CHUNK_SIZE, true, file.as_file().as_fd()).unwrap();
        assert_eq!((page(&window, 512 + 9), page(&window, 512 + 10)), (mark(9), 0));
        let counters = window.counters();
        assert_eq!((counters.lost_files, counters.lost_pages, counters.replaced_pages), (1, 512, 0));
        file.as_file().set_len(1024 * PAGE).unwrap();
        number(file.as_file(), 10, 1024);
        wait_for("grown", || !window.has_short_files());
        assert_eq!((page(&window, 0), page(&window, 1023)), (mark(512), mark(511)));
    }
}

#[test]
fn a_page_behind_an_end_that_nobody_saw_move_is_repaired_when_it_is_touched() {
    for place in places() {
        let window = DaxWindow::new(SIZE).unwrap();
        let file = numbered(&place, 10);
        window.map(0, 0, CHUNK_SIZE, true, file.as_file().as_fd()).unwrap();
        assert_eq!(window.repair(9 * PAGE, true), Repair::Unneeded);
        assert_eq!(window.repair(CHUNK_SIZE, true), Repair::Unneeded);
        assert_eq!(window.repair(u64::MAX, true), Repair::Unneeded);
        assert_eq!(window.repair(20 * PAGE + 8, false), Repair::Done);
        assert_eq!((page(&window, 9), page(&window, 20), page(&window, 500)), (mark(9), 0, 0));
        let counters = window.counters();
        assert_eq!((counters.lost_pages, counters.replaced_pages, counters.failed_pages), (502, 0, 0));
    }
}

#[test]
fn two_windows_that_show_a_file_both_follow_it() {
    for place in places() {
        let windows = [DaxWindow::new(SIZE).unwrap(), DaxWindow::new(SIZE).unwrap()];
        let file = numbered(&place, 512);
        for window in &windows {
            window.map(0, 0, CHUNK_SIZE, true, file.as_file().as_fd()).unwrap();
        }
        file.as_file().set_len(PAGE).unwrap();
        for window in &windows {
            wait_for("lost", || window.counters().lost_pages == 511);
        }
        let [gone, stays] = windows;
        drop(gone);
        file.as_file().set_len(512 * PAGE).unwrap();
        wait_for("restored", || stays.counters().restored_pages == 511);
    }
}

/// What one share's guest shortens, another's has lost.
#[test]
fn the_other_windows_guest_does_not_know() {
    let place = tempfile::tempdir().unwrap();
    let (mine, others) = (DaxWindow::new(SIZE).unwrap(), DaxWindow::new(SIZE).unwrap());
    let file = numbered(&place, 512);
    for window in [&mine, &others] {
        window.map(0, 0, CHUNK_SIZE, true, file.as_file().as_fd()).unwrap();
    }
    mine.resize(&stat(file.as_file()), || file.as_file().set_len(PAGE)).unwrap();
    wait_for("lost", || others.counters().lost_pages == 511);
    assert_eq!(mine.counters().lost_pages, 0);
}

#[test]
fn names_do_not_matter() {
    for place in places() {
        let window = DaxWindow::new(SIZE).unwrap();
        let file = numbered(&place, 512);
        window.map(0, 0, CHUNK_SIZE, true, file.as_file().as_fd()).unwrap();
        let (file, path) = file.into_parts();
        let other = numbered(&place, 512);
        std::fs::rename(other.path(), &path).unwrap();
        assert_eq!(page(&window, 100), mark(100), "the old file, which has no name any more");
        file.set_len(50 * PAGE).unwrap();
        wait_for("lost", || window.counters().lost_pages == 462);
        assert!(window.lost_paths()[0].ends_with("(deleted)"), "{:?}", window.lost_paths());
        other.as_file().set_len(0).unwrap();
        assert_eq!(page(&window, 49), mark(49));
        drop(other.into_temp_path().keep());
        window.unmap(0, CHUNK_SIZE).unwrap();
        drop(file);
    }
}

#[test]
fn descriptors_and_watches_go_with_the_last_chunk() {
    let place = tempfile::tempdir().unwrap();
    let window = DaxWindow::new(SIZE).unwrap();
    let file = numbered(&place, 1024);
    let open = || {
        let links = std::fs::read_dir("/proc/self/fd").unwrap();
        let targets = links.filter_map(|link| std::fs::read_link(link.unwrap().path()).ok());
        targets.filter(|target| target == file.path()).count()
    };
    let watches = || {
        let infos = std::fs::read_dir("/proc/self/fdinfo").unwrap();
        let inode = format!("ino:{:x} ", stat(file.as_file()).st_ino);
        let infos = infos.filter_map(|info| std::fs::read_to_string(info.unwrap().path()).ok());
        infos.map(|info| info.lines().filter(|line| line.contains(&inode)).count()).sum::<usize>()
    };
    assert_eq!((open(), watches()), (1, 0));
    window.map(0, 0, CHUNK_SIZE, false, file.as_file().as_fd()).unwrap();
    window.map(CHUNK_SIZE, CHUNK_SIZE, CHUNK_SIZE, true, file.as_file().as_fd()).unwrap();
    window.map(CHUNK_SIZE, 0, CHUNK_SIZE, true, file.as_file().as_fd()).unwrap();
    assert_eq!((open(), watches()), (2, 1));
    window.unmap(0, CHUNK_SIZE).unwrap();
    assert_eq!((open(), watches()), (2, 1));
    window.clear().unwrap();
    assert_eq!((open(), watches()), (1, 0));
    let directory = File::open("/").unwrap();
    window.map(0, 0, CHUNK_SIZE, false, directory.as_fd()).unwrap_err();
    window.map(0, 0, CHUNK_SIZE, false, file.as_file().as_fd()).unwrap();
    drop(window);
    assert_eq!((open(), watches()), (1, 0));
}

/// The guest's kernel may write to a mapping that it asked for to read.
#[test]
fn a_guest_that_writes_where_it_may_only_read_gets_the_right_or_a_copy() {
    let place = tempfile::tempdir().unwrap();
    let window = DaxWindow::new(SIZE).unwrap();
    let file = numbered(&place, 1024);
    window.map(0, 0, CHUNK_SIZE, false, File::open(file.path()).unwrap().as_fd()).unwrap();
    assert_eq!(window.repair(5 * PAGE, false), Repair::Unneeded);
    assert_eq!(window.repair(5 * PAGE, true), Repair::Done);
    poke(&window, 5 * PAGE, [8, 8]);
    let mut bytes = [0; 2];
    file.as_file().read_exact_at(&mut bytes, 5 * PAGE).unwrap();
    assert_eq!((bytes, window.counters().upgraded_chunks), ([8, 8], 1));

    let window = DaxWindow::new(SIZE).unwrap();
    window.set_read_only();
    window.map(0, 0, 2 * CHUNK_SIZE, false, File::open(file.path()).unwrap().as_fd()).unwrap();
    assert_eq!(window.repair(6 * PAGE, true), Repair::Done);
    assert_eq!(page(&window, 6), mark(6), "what it would have read");
    poke(&window, 6 * PAGE, [9, 9]);
    assert_eq!(peek(&window, 6 * PAGE), [9, 9]);
    file.as_file().read_exact_at(&mut bytes, 6 * PAGE).unwrap();
    assert_eq!((bytes, window.counters().copied_pages), ([7, 0], 1));
    assert_eq!(window.repair(6 * PAGE, true), Repair::Unneeded, "it has it");
    window.map(2 * CHUNK_SIZE, 0, 2 * CHUNK_SIZE, false, File::open(file.path()).unwrap().as_fd()).unwrap();
    let repairs: Vec<_> = (0..2048).map(|page| window.repair(page * PAGE, true)).collect();
    assert_eq!(repairs.iter().filter(|repair| **repair == Repair::Done).count(), 1023);
    assert!(matches!(repairs.last(), Some(Repair::Impossible(_))), "it is bounded: {:?}", repairs.last());
}

/// As the device copies (`guard.rs`), while a file is cut off and made whole again; where the file is all the time, no byte
/// may ever be wrong, and in the end none at all.
#[test]
fn ten_thousand_truncations_under_a_reader_show_no_wrong_byte() {
    for place in places() {
        let window = DaxWindow::new(SIZE).unwrap();
        let file = numbered(&place, 1024);
        window.map(0, 0, 2 * CHUNK_SIZE, true, file.as_file().as_fd()).unwrap();
        let is_done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for thread in 0..2 {
                let (window, is_done) = (&window, &is_done);
                scope.spawn(move || {
                    let mut number = thread * 511;
                    while !is_done.load(Relaxed) {
                        number = (number + 37) % 1024;
                        let found = page(window, number);
                        let is_right = found == mark(number) || number >= 100 && found == 0;
                        assert!(is_right, "page {number}: {found}");
                    }
                });
            }
            for round in 0..10_000 {
                let size = 100 + round * 13 % 924;
                file.as_file().set_len(size * PAGE).unwrap();
                file.as_file().set_len(1024 * PAGE).unwrap();
                if round % 64 == 0 {
                    number(file.as_file(), 100, 1024);
                }
            }
            number(file.as_file(), 100, 1024);
            is_done.store(true, Relaxed);
        });
        let is_right = || (0..1024).all(|number| page(&window, number) == mark(number));
        wait_for("everything to be right again", is_right);
        // They are counted after they are back.
        wait_for("all pages to be counted", || {
            let counters = window.counters();
            counters.lost_pages == counters.restored_pages
        });
        let counters = window.counters();
        eprintln!("lost {} pages, replaced {}", counters.lost_pages, counters.replaced_pages);
    }
}

/// Chunks come and go while their files change: what a chunk shows is its own file, or nothing.
#[test]
fn mapping_unmapping_and_upgrading_while_files_change_never_show_another_file() {
    let place = tempfile::tempdir().unwrap();
    let window = DaxWindow::new(SIZE).unwrap();
    let files: Vec<_> = (0..3).map(|mark| file_in(&place, mark + 1)).collect();
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (window, files, is_done) = (&window, &files, &is_done);
        scope.spawn(move || {
            for round in 0..3_000 {
                let file = files[round % 3].as_file();
                file.set_len((round as u64 % 1000) * PAGE).unwrap();
                file.set_len(2 * CHUNK_SIZE).unwrap();
            }
            is_done.store(true, Relaxed);
        });
        for thread in 0..2u64 {
            scope.spawn(move || {
                let mut round = thread;
                while !is_done.load(Relaxed) {
                    round += 1;
                    let file = (round % 3) as usize;
                    let at = (thread * 4 + round % 4) * CHUNK_SIZE;
                    let chunk = round % 2 * CHUNK_SIZE;
                    window.map(at, chunk, CHUNK_SIZE, round % 5 > 1, files[file].as_file().as_fd()).unwrap();
                    let found = peek(window, at + 5 * PAGE)[0];
                    assert!([0, file as u8 + 1].contains(&found), "{found} of {}", file + 1);
                    if round % 7 == 0 {
                        window.unmap(at, CHUNK_SIZE).unwrap();
                        // A hole shows what was written to it before, which is nothing.
                        assert_eq!(peek(window, at + 5 * PAGE)[0], 0);
                    }
                }
            });
        }
    });
    window.unmap(0, SIZE).unwrap();
    assert_eq!(window.counters().mapped_chunks, 0);
    assert!(!window.has_short_files());
}

/// A file of two chunks that is nothing but its mark.
fn file_in(place: &tempfile::TempDir, mark: u8) -> NamedTempFile {
    let file = NamedTempFile::new_in(place).unwrap();
    file.as_file().write_all_at(&vec![mark; 2 * CHUNK], 0).unwrap();
    file
}
