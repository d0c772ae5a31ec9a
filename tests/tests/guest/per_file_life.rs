//! The life of files with per-file DAX: mappings that stay, files that grow, several names, another file system on top,
//! and changes while many threads open them.

use std::error::Error;
use std::fs;
use std::time::Duration;

use rustix::io::Errno;
use tests::guest::data::Content;
use tests::guest::{Bytes, Mount, Op, OpenHow, OpenLoop, Opened, Stat};

use crate::harness::{Checks, Outcome, Scene, ensure, ensure_eq, ensure_errno};
use crate::per_file::{has_flag, mark};

const FILE: Content = Content { seed: 8, len: 8 << 20 };
const WRITE: OpenHow =
    OpenHow { write: true, create_new: false, append: false, truncate: false, unnamed: false };

pub fn checks() -> Checks {
    vec![
        ("mappings-stay-after-the-last-close", mappings_stay),
        ("mappings-go-with-cache-never", mappings_go),
        ("growth-with-cache-always", growth),
        ("appending-flips-once", appending),
        ("hard-links", hard_links),
        ("overlay", overlay),
    ]
}

pub fn checks_with_processors() -> Checks {
    vec![("hints-change-while-threads-open", race)]
}

fn opens_as(scene: &mut Scene, path: &str) -> Result<bool, Box<dyn Error>> {
    let handle = scene.vm.open(path, OpenHow::default())?;
    let stat: Stat = scene.vm.call(&Op::StatHandle(handle))?;
    scene.vm.run(Op::Close(handle))?;
    Ok(stat.dax)
}

/// Neither attributes that are asked for again nor names that are looked up again make the guest drop a DAX file.
fn mappings_stay(scene: &mut Scene) -> Outcome {
    let counts = scene.expect("-stay");
    // One for each chunk, however often the file is read.
    (counts.setups, counts.removes) = (Some(4), Some(0));
    counts.granted = Some(1);
    read_again_and_again(scene, "-stay")
}

/// With cache=never Linux drops every file at its last close, as its name is good for no time at all.
fn mappings_go(scene: &mut Scene) -> Outcome {
    let counts = scene.expect("-stay-never");
    (counts.setups, counts.removes) = (Some(4 * ROUNDS), Some(4 * ROUNDS));
    (counts.granted, counts.hint_queries) = (None, None);
    read_again_and_again(scene, "-stay-never")
}

const ROUNDS: u64 = 3;

fn read_again_and_again(scene: &mut Scene, share: &str) -> Outcome {
    let host = scene.share_dir(share).join("file");
    FILE.write_to(&host)?;
    mark(scene.place, &host, true)?;
    scene.mounted(share, "dax=inode", |scene, mnt| {
        let path = format!("{mnt}/file");
        for round in 0..ROUNDS {
            let found = scene.vm.verify(&[(&path, FILE)], 1, round % 2 == 1)?;
            ensure_eq!((found.differs, found.bytes), (vec![], FILE.len), "round {round}");
            // Closed now. What follows asks for attributes in every way there is.
            ensure!(scene.vm.stat(path.as_str())?.dax, "round {round}: not DAX");
            ensure_eq!(scene.vm.read_dir(mnt)?.len(), 1);
            ensure!(scene.vm.stat(path.as_str())?.dax, "round {round}: not DAX after ls");
            std::thread::sleep(Duration::from_millis(1300));
            ensure_eq!(scene.vm.read_dir(mnt)?.len(), 1);
            ensure!(scene.vm.stat(path.as_str())?.dax, "round {round}: not DAX after the time-out");
            scene.vm.run(Op::Chmod(path.as_str().into(), 0o600 + round as u32))?;
            ensure!(opens_as(scene, &path)?, "round {round}: opened as not DAX");
        }
        let held = scene.vm.host().holdings(&scene.share_dir(share))?;
        ensure_eq!(held.share_mappings > 0, share == "-stay", "whether the host has it mapped: {held:?}");
        Ok(())
    })
}

/// A file that qualifies is DAX at the next open, though names and attributes are good for a day.
fn growth(scene: &mut Scene) -> Outcome {
    const LIMIT: u64 = 32 << 10;
    let asked = u64::from(!has_flag(scene.place));
    let counts = scene.expect("-grow");
    let add = |count: &mut Option<u64>, more: u64| *count = count.map(|count| count + more);
    // The directory's hint, for the new file.
    add(&mut counts.hint_queries, asked);
    add(&mut counts.denied, 2);
    add(&mut counts.granted, 2);
    add(&mut counts.reincarnations, 3);
    add(&mut counts.setups, 2);
    add(&mut counts.removes, 1);
    scene.mounted("-grow", "dax=inode", |scene, mnt| {
        let path = format!("{mnt}/grown");
        let is_dax = |scene: &mut Scene, handle| -> Result<bool, Box<dyn Error>> {
            Ok(scene.vm.call::<Stat>(&Op::StatHandle(handle))?.dax)
        };
        let handle = scene.vm.open(path.as_str(), OpenHow { create_new: true, ..WRITE })?;
        ensure!(!is_dax(scene, handle)?, "an empty file is DAX");
        scene.vm.run(Op::WriteAt(handle, 0, Bytes(vec![1; LIMIT as usize - 1])))?;
        scene.vm.run(Op::Close(handle))?;

        let handle = scene.vm.open(path.as_str(), WRITE)?;
        ensure!(!is_dax(scene, handle)?, "a file below the limit is DAX");
        scene.vm.run(Op::WriteAt(handle, LIMIT - 1, Bytes(vec![2])))?;
        ensure!(!is_dax(scene, handle)?, "an open file has changed");
        ensure!(!opens_as(scene, &path)?, "opened as another while it is open");
        scene.vm.run(Op::Close(handle))?;
        ensure!(!scene.vm.stat(path.as_str())?.dax, "changed without being opened");
        ensure!(opens_as(scene, &path)?, "the first open after it qualified is not DAX");
        let read = scene.vm.read_bytes(path.as_str(), LIMIT - 2, 2)?;
        ensure_eq!(read, vec![1, 2], "its end, through the window");

        // It keeps its state until it has lost a quarter.
        let mut seen = Vec::new();
        for size in [LIMIT / 4 * 3, LIMIT / 4 * 3 - 1, LIMIT - 1, LIMIT] {
            scene.vm.run(Op::Truncate(path.as_str().into(), size))?;
            seen.push(opens_as(scene, &path)?);
        }
        ensure_eq!(seen, vec![true, false, false, true], "cut to 24K, 24K - 1; grown to 32K - 1, 32K");
        ensure_eq!(scene.vm.read_bytes(path.as_str(), 0, 1)?, vec![1]);
        ensure_eq!(scene.vm.read_bytes(path.as_str(), LIMIT - 1, 1)?, vec![0], "what was cut away");
        Ok(())
    })
}

fn appending(scene: &mut Scene) -> Outcome {
    let asked = u64::from(!has_flag(scene.place));
    let counts = scene.expect("-grow");
    let add = |count: &mut Option<u64>, more: u64| *count = count.map(|count| count + more);
    add(&mut counts.hint_queries, asked);
    add(&mut counts.denied, 1);
    add(&mut counts.granted, 1);
    add(&mut counts.reincarnations, 1);
    scene.mounted("-grow", "dax=inode", |scene, mnt| {
        let path = format!("{mnt}/appended");
        scene.vm.create(path.as_str())?;
        let mut seen = Vec::new();
        for _ in 0..5 {
            let more: Vec<(u64, bool)> = scene.vm.call(&Op::AppendSteps(path.as_str().into(), 64, 200))?;
            seen.extend(more);
        }
        // Each call begins with what it finds.
        seen.dedup_by_key(|(_, dax)| *dax);
        ensure_eq!(seen, vec![(0, false), (32 << 10, true)], "the changes of a file appended to 1,000 times");
        ensure_eq!(scene.vm.stat(path.as_str())?.size, 64_000);
        Ok(())
    })
}

/// Two names are one file: it changes once, and under both.
fn hard_links(scene: &mut Scene) -> Outcome {
    let dir = scene.share_dir("-names");
    FILE.write_to(&dir.join("a"))?;
    fs::hard_link(dir.join("a"), dir.join("b"))?;
    let counts = scene.expect("-names");
    (counts.granted, counts.denied, counts.reincarnations) = (Some(2), Some(2), Some(3));
    (counts.setups, counts.removes, counts.hint_queries) = (None, None, None);
    scene.mounted("-names", "dax=inode", |scene, mnt| {
        let (a, b) = (format!("{mnt}/a"), format!("{mnt}/b"));
        let both = |scene: &mut Scene| -> Result<(bool, bool), Box<dyn Error>> {
            Ok((scene.vm.stat(a.as_str())?.dax, scene.vm.stat(b.as_str())?.dax))
        };
        ensure_eq!(both(scene)?, (false, false), "before");
        mark(scene.place, &dir.join("a"), true)?;
        ensure!(opens_as(scene, &a)?, "the first name is not DAX");
        ensure!(opens_as(scene, &b)?, "the second name is not DAX");
        ensure_eq!(both(scene)?, (true, true), "after both were opened");
        let (stat_a, stat_b) = (scene.vm.stat(a.as_str())?, scene.vm.stat(b.as_str())?);
        ensure_eq!((stat_a.ino, stat_a.nlink), (stat_b.ino, 2), "they are one file");
        ensure_eq!(scene.vm.verify(&[(&a, FILE), (&b, FILE)], 1, true)?.differs, vec![]);

        // Open by one name is open by the other.
        let handle = scene.vm.open(a.as_str(), WRITE)?;
        mark(scene.place, &dir.join("b"), false)?;
        ensure!(opens_as(scene, &b)?, "the second name changed while the first was open");
        scene.vm.run(Op::WriteAt(handle, 5 << 20, Bytes(b"by the window".to_vec())))?;
        scene.vm.run(Op::Close(handle))?;
        ensure!(!opens_as(scene, &b)?, "the second name is still DAX");
        ensure!(!opens_as(scene, &a)?, "the first name is still DAX");
        ensure_eq!(scene.vm.read_bytes(a.as_str(), 5 << 20, 13)?, b"by the window".to_vec());
        scene.vm.pwrite(b.as_str(), 5 << 20, b"by a request ")?;

        // What goes on with one name left.
        mark(scene.place, &dir.join("a"), true)?;
        scene.vm.run(Op::Unlink(a.as_str().into()))?;
        ensure!(opens_as(scene, &b)?, "the name that is left is not DAX");
        ensure_eq!(scene.vm.read_bytes(b.as_str(), 5 << 20, 13)?, b"by a request ".to_vec());
        ensure_eq!(scene.vm.stat(b.as_str())?.nlink, 1);
        Ok(())
    })
}

/// An overlay file system on top opens what it has found once, and can look nothing up again.
fn overlay(scene: &mut Scene) -> Outcome {
    let dir = scene.share_dir("-over");
    for name in ["read", "written"] {
        FILE.write_to(&dir.join(name))?;
    }
    let counts = scene.expect("-over");
    (counts.granted, counts.denied, counts.hint_queries) = (None, None, None);
    (counts.setups, counts.removes, counts.reincarnations) = (None, None, None);
    scene.mounted("-over", "dax=inode", |scene, mnt| {
        let top = format!("/tmp/overlay-{}", scene.place);
        for dir in ["upper", "work"] {
            scene.vm.run(Op::MkdirAll(format!("{top}/{dir}").into()))?;
        }
        let merged = format!("{top}/merged");
        let options = format!("lowerdir={mnt},upperdir={top}/upper,workdir={top}/work");
        scene.vm.run(Op::Mount(Mount {
            fstype: "overlay".into(),
            source: "overlay".into(),
            target: merged.as_str().into(),
            options,
        }))?;
        let outcome = on_overlay(scene, mnt, &merged);
        let umount = scene.vm.umount(&merged);
        outcome?;
        Ok(umount?)
    })?;
    crate::harness::ensure_content(&dir.join("written"), FILE)
}

fn on_overlay(scene: &mut Scene, mnt: &str, merged: &str) -> Outcome {
    let dir = scene.share_dir("-over");
    let (read, written) = (format!("{merged}/read"), format!("{merged}/written"));
    ensure_eq!(scene.vm.verify(&[(&read, FILE)], 1, false)?.differs, vec![], "through the overlay");
    for hint in [true, false, true] {
        mark(scene.place, &dir.join("read"), hint)?;
        for round in 0..4 {
            let found = scene.vm.verify(&[(&read, FILE)], 1, round % 2 == 1);
            let found = found.map_err(|error| format!("hint {hint}, read {round}: {error}"))?;
            ensure_eq!(found.differs, vec![], "through the overlay, hint {hint}");
        }
    }
    // Files of the share that are opened without the overlay change, and the overlay goes on with what it has found
    // before, which it is told is stale; until it finds it anew.
    let lower = format!("{mnt}/read");
    ensure!(opens_as(scene, &lower)?, "without the overlay it does not change");
    ensure_eq!(scene.vm.verify(&[(&lower, FILE)], 1, true)?.differs, vec![], "without the overlay");
    std::thread::sleep(Duration::from_millis(1300));
    let stale = scene.vm.verify(&[(&read, FILE)], 1, true);
    if stale.is_err() {
        ensure_errno(stale, &[Errno::STALE.raw_os_error()], "through the overlay after an open without it")?;
    }
    scene.vm.drop_caches()?;
    let found = scene.vm.verify(&[(&read, FILE)], 1, true);
    let found = found.map_err(|error| format!("when the caches were dropped: {error}"))?;
    ensure_eq!(found.differs, vec![], "through the overlay when the caches were dropped");
    // A write copies the file up.
    scene.vm.pwrite(written.as_str(), 0, b"above").map_err(|error| format!("copying up: {error}"))?;
    ensure_eq!(scene.vm.read_bytes(written.as_str(), 0, 5)?, b"above".to_vec());
    // It may meet ESTALE once if the file has changed since it was closed.
    mark(scene.place, &dir.join("read"), false)?;
    match scene.vm.pwrite(read.as_str(), 0, b"above") {
        Err(error) if error.errno() == Some(Errno::STALE.raw_os_error()) => {
            let again = scene.vm.pwrite(read.as_str(), 0, b"above");
            again.map_err(|error| format!("copying up again after ESTALE: {error}"))?;
        }
        other => other?,
    }
    ensure_eq!(scene.vm.read_bytes(read.as_str(), 0, 5)?, b"above".to_vec());
    Ok(())
}

/// Threads open, read, compare and close as fast as they can while the host changes the hints.
fn race(scene: &mut Scene) -> Outcome {
    const CHANGES: u32 = 50;
    let dir = scene.share_dir("-race");
    let small = Content { seed: 9, len: 100_000 };
    let names = ["a", "b", "c"];
    for name in names {
        small.write_to(&dir.join(name))?;
    }
    let counts = scene.expect("-race");
    (counts.granted, counts.denied, counts.hint_queries) = (None, None, None);
    (counts.setups, counts.removes, counts.reincarnations) = (None, None, None);
    let place = scene.place;
    scene.mounted("-race", "dax=inode", |scene, mnt| {
        let files: Vec<_> = names.iter().map(|name| (format!("{mnt}/{name}").into(), small)).collect();
        let ask = OpenLoop { files, threads: 4, millis: 10_000 };
        let opened = std::thread::scope(|scope| {
            let changes = scope.spawn(|| {
                for round in 1..=CHANGES {
                    for name in names {
                        mark(place, &dir.join(name), round % 2 == 1)?;
                    }
                    std::thread::sleep(Duration::from_millis(150));
                }
                Ok::<_, std::io::Error>(())
            });
            let opened: Result<Opened, _> = scene.vm.call(&Op::OpenLoop(ask));
            changes.join().map_err(|_| "the thread that changes hints panicked")??;
            Ok::<_, Box<dyn Error>>(opened?)
        })?;
        ensure!(opened.opens > 100, "only so many opens: {opened:?}");
        ensure!(opened.dax > 0 && opened.dax < opened.opens, "all opens saw the same: {opened:?}");
        ensure!(opened.changes > 0, "no thread saw a change: {opened:?}");
        for (name, hint) in names.into_iter().zip([true, false, true]) {
            mark(place, &dir.join(name), hint)?;
            ensure_eq!(opens_as(scene, &format!("{mnt}/{name}"))?, hint, "{name} in the end");
        }
        Ok(())
    })
}
