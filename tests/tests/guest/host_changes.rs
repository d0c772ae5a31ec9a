//! The host takes pages away that the guest has mapped: files shrink and are replaced. The guest goes on, and sees its data again when the host has it again.
//!
//! Each check has a machine of its own, and the last of its words is what the report says.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use libtest_mimic::Trial;
use rustix::fs::{FallocateFlags, fallocate};
use tests::guest::data::Content;
use tests::guest::{Changing, DirectRead, Met, Op};
use tests::vm::{Ended, Kernel, Share, Vm, WindowCounts};

use crate::harness::{Outcome, PLACES, Places, ensure, ensure_ended, ensure_eq, own_trial};

/// How long the guest may take to open a file.
const OPENED: Duration = Duration::from_secs(3);

type HostCheck = fn(&Kernel, u32, &Path) -> Outcome;
/// A check for which it does not matter where the share is.
pub type PlainCheck = fn(&Kernel, &Path) -> Outcome;

/// The checks by kernel, number of processors and file system.
pub fn trials(places: &Result<Places, String>, kernel: &'static str, trials: &mut Vec<Trial>) {
    let checks: &[(&str, HostCheck)] = &[
        ("mapped-files-shrink-and-grow", shrink_and_grow),
        ("truncations-under-readers-and-writers", truncations),
        ("holes-are-punched", punched),
        ("files-go-while-they-are-mapped", gone),
        ("a-gather-behind-the-end", gathered),
    ];
    for cpus in [1, 4] {
        for place in PLACES {
            for &(name, check) in checks {
                let name = format!("{cpus}cpu/{place}/host/{name}");
                trials.push(own_trial(kernel, &name, places, move |kernel, places| {
                    let dir = tempfile::tempdir_in(places.dir(place))?;
                    check(kernel, cpus, dir.path())
                }));
            }
        }
    }
    let of_the_host: &[(&str, PlainCheck)] = &[("no-mappings-left", no_mappings_left)];
    for &(name, check) in of_the_host.iter().chain(crate::host_file_systems::CHECKS) {
        trials.push(own_trial(kernel, &format!("host/{name}"), places, move |kernel, places| {
            let dir = tempfile::tempdir_in(places.dir("tmpfs"))?;
            check(kernel, dir.path())
        }));
    }
}

pub fn boot(kernel: &Kernel, cpus: u32, dir: &Path) -> Result<Vm, Box<dyn std::error::Error>> {
    // The guest must not hear of the new sizes, or it would not touch what is gone.
    let share = |tag| Share::new(tag, dir).window("64M").dax("always").cache("always");
    let mut vm = Vm::builder(kernel).cpus(cpus).share(share("t")).share(share("other")).boot()?;
    vm.mount("t", "/mnt", "dax=always")?;
    Ok(vm)
}

/// Powers the guest off and returns what the first share's window counted.
pub fn finish(mut vm: Vm) -> Result<(WindowCounts, Ended), Box<dyn std::error::Error>> {
    vm.umount("/mnt")?;
    let ended = vm.power_off()?;
    ensure_ended(&ended, 0, "power-off")?;
    // With RUST_LOG=debug it is said how each page was found.
    let repairs: Vec<_> = ended.console.lines().filter(|line| line.contains("repaired memory")).collect();
    if !repairs.is_empty() {
        let after_exits = repairs.iter().filter(|line| line.contains("true")).count();
        println!("{} repairs, {after_exits} of them after exits", repairs.len());
    }
    let counts = ended.report.window("t").ok_or("no window in the report")?;
    Ok((counts, ended))
}

/// What a mapping shows at some offsets, touched by a program and not by the kernel.
pub fn block(vm: &mut Vm, map: u32, offset: u64) -> Result<Vec<u8>, Box<dyn std::error::Error>> {
    Ok(vm.map_read(map, offset, 16)?)
}

pub fn expected(content: Content, offset: u64) -> Vec<u8> {
    let mut bytes = vec![0; 16];
    tests::guest::data::fill(content.seed, offset, &mut bytes);
    bytes
}

/// By hand, step by step: read, written, by mapping, read(2) and O_DIRECT, before and after.
fn shrink_and_grow(kernel: &Kernel, cpus: u32, dir: &Path) -> Outcome {
    let content = Content { seed: 70, len: 8 << 20 };
    let host = dir.join("file");
    content.write_to(&host)?;
    let other = Content { seed: 71, len: 1 << 20 };
    other.write_to(&dir.join("other"))?;
    let mut vm = boot(kernel, cpus, dir)?;
    let map = vm.map("/mnt/file", 0, content.len as usize, true)?;
    ensure_eq!(vm.call::<Option<u64>>(&Op::MapVerify(map, content.seed))?, None, "before");

    let file = File::options().write(true).open(&host)?;
    file.set_len(3 << 20)?;
    let (inside, outside) = ((3 << 20) - 16, 5 << 20);
    ensure_eq!(block(&mut vm, map, inside)?, expected(content, inside), "before the new end");
    ensure_eq!(block(&mut vm, map, outside)?, vec![0; 16], "behind the new end");
    ensure_eq!(
        vm.call::<Option<u64>>(&Op::MapVerify(map, content.seed))?,
        Some(3 << 20),
        "all of it, by a program"
    );
    vm.map_write(map, outside, b"nowhere")?;
    ensure_eq!(vm.read_bytes("/mnt/file", inside, 8)?, expected(content, inside)[..8], "read(2)");
    // Another share's file by O_DIRECT into what is not there.
    vm.mount("other", "/mnt-other", "dax=never")?;
    let read = DirectRead { path: "/mnt-other/other".into(), offset: 0, len: 1 << 20, map, at: 6 << 20 };
    ensure_eq!(vm.call::<usize>(&Op::DirectReadIntoMap(read))?, 1 << 20, "O_DIRECT into what is not there");
    vm.umount("/mnt-other")?;

    file.set_len(content.len)?;
    let mut grown = Vec::new();
    for _ in 0..100 {
        grown = block(&mut vm, map, outside)?;
        if grown == [0; 16] {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    ensure_eq!(grown, vec![0; 16], "a hole that came back; what was written in between is lost");
    content.write_to(&host)?;
    ensure_eq!(fs::metadata(&host)?.len(), content.len);
    let is_back = |vm: &mut Vm| vm.call::<Option<u64>>(&Op::MapVerify(map, content.seed));
    for _ in 0..100 {
        if is_back(&mut vm)?.is_none() {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    ensure_eq!(is_back(&mut vm)?, None, "grown again");
    vm.map_write(map, outside, b"anywhere")?;
    vm.run(Op::MapSync(map))?;
    vm.run(Op::Unmap(map))?;
    let mut found = [0; 8];
    File::open(&host)?.read_exact_at(&mut found, outside)?;
    ensure_eq!(&found, b"anywhere");

    let (counts, ended) = finish(vm)?;
    ensure_eq!(counts.lost_files, 1, "lost files");
    ensure!(counts.lost_pages >= 1280, "{} lost pages", counts.lost_pages);
    ensure!(counts.restored_pages >= 1280, "{} restored pages", counts.restored_pages);
    ensure_eq!(
        ended.console.matches("has become shorter").count(),
        1,
        "how often it was said\n{}",
        ended.console
    );
    let path = host.to_str().ok_or("a path that is no text")?;
    ensure!(ended.console.contains(path), "the message does not name {path}");
    Ok(())
}

/// A hole is no loss: the guest reads zeros, as everybody does, and fills it by writing.
fn punched(kernel: &Kernel, cpus: u32, dir: &Path) -> Outcome {
    let content = Content { seed: 73, len: 8 << 20 };
    let host = dir.join("file");
    content.write_to(&host)?;
    let mut vm = boot(kernel, cpus, dir)?;
    let map = vm.map("/mnt/file", 0, content.len as usize, true)?;
    ensure_eq!(vm.call::<Option<u64>>(&Op::MapVerify(map, content.seed))?, None, "before");
    let file = File::options().read(true).write(true).open(&host)?;
    let (start, len) = (3 << 20, 2 << 20);
    fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, start, len)?;
    ensure_eq!(
        vm.call::<Option<u64>>(&Op::MapVerify(map, content.seed))?,
        Some(start),
        "the hole's first byte"
    );
    for inside in [start, start + len - 16] {
        ensure_eq!(block(&mut vm, map, inside)?, vec![0; 16], "in the hole");
    }
    for outside in [start - 16, start + len] {
        ensure_eq!(block(&mut vm, map, outside)?, expected(content, outside), "beside the hole");
    }
    vm.map_write(map, start + 4096, b"filled")?;
    let read = DirectRead { path: "/mnt/file".into(), offset: 0, len: 1 << 20, map, at: start + (1 << 20) };
    ensure_eq!(vm.call::<usize>(&Op::DirectReadIntoMap(read))?, 1 << 20, "O_DIRECT into the hole");
    vm.run(Op::MapSync(map))?;
    let mut found = [0; 6];
    file.read_exact_at(&mut found, start + 4096)?;
    ensure_eq!(&found, b"filled", "on the host");
    let mut found = vec![0; 1 << 20];
    file.read_exact_at(&mut found, start + (1 << 20))?;
    ensure_eq!(tests::guest::data::first_difference(content.seed, 0, &found), None, "what O_DIRECT brought");
    vm.run(Op::Unmap(map))?;
    let (counts, _) = finish(vm)?;
    ensure_eq!((counts.lost_files, counts.lost_pages), (0, 0), "no page was lost");
    Ok(())
}

/// Ten thousand times, while the guest reads and writes what it may.
fn truncations(kernel: &Kernel, cpus: u32, dir: &Path) -> Outcome {
    let content = Content { seed: 72, len: 8 << 20 };
    let stable = 1 << 20;
    let host = dir.join("file");
    content.write_to(&host)?;
    let mut vm = boot(kernel, cpus, dir)?;
    vm.set_deadline(Duration::from_secs(240));
    let mut total = Met::default();
    let mut rounds = 0;
    for (mmap, writers) in [(true, 0), (false, 0), (true, 1), (false, 1)] {
        let file = File::options().write(true).open(&host)?;
        let is_done = AtomicBool::new(false);
        let met = std::thread::scope(|scope| {
            let truncate = || -> std::io::Result<u64> {
                // The guest opens the file while it is whole.
                std::thread::sleep(OPENED);
                let mut done = 0;
                while done < 2_500 || !is_done.load(Relaxed) {
                    file.set_len(stable + done * 4096 * 7 % (content.len - stable))?;
                    file.set_len(content.len)?;
                    done += 1;
                    if done % 50 == 0 {
                        std::thread::sleep(Duration::from_millis(5));
                    }
                }
                Ok(done)
            };
            let truncating = scope.spawn(truncate);
            let readers = cpus as usize;
            let path = "/mnt/file".into();
            let ask = Changing { path, content, stable, readers, writers, mmap, millis: 10_000 };
            let met = vm.call::<Met>(&Op::Changing(ask));
            is_done.store(true, Relaxed);
            rounds += truncating.join().map_err(|_| "the truncating thread panicked")??;
            Ok::<_, Box<dyn std::error::Error>>(met?)
        })?;
        ensure_eq!(met.wrong, None, "wrong bytes with mmap {mmap} and {writers} writers, {met:?}");
        ensure!(met.right > 0, "nothing was read with mmap {mmap}: {met:?}");
        total.right += met.right;
        total.zeros += met.zeros;
        content.write_to(&host)?;
    }
    ensure!(rounds >= 10_000, "{rounds} rounds");
    let path = "/mnt/file".to_owned();
    let mut differs = Vec::new();
    for _ in 0..50 {
        differs = vm.verify(&[(&path, content)], 1, true)?.differs;
        if differs.is_empty() {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    ensure_eq!(differs, vec![], "in the end");
    let (counts, _) = finish(vm)?;
    println!("{rounds} truncations, {} blocks right, {} cut off: {counts:?}", total.right, total.zeros);
    ensure_eq!(counts.lost_files, 1, "lost files");
    ensure_eq!(counts.failed_pages, 0, "failed pages");
    Ok(())
}

/// Names do not matter to what is mapped; a file that takes another's place is another file.
fn gone(kernel: &Kernel, cpus: u32, dir: &Path) -> Outcome {
    let (old, new) = (Content { seed: 73, len: 4 << 20 }, Content { seed: 74, len: 4 << 20 });
    let host = dir.join("file");
    old.write_to(&host)?;
    let mut vm = boot(kernel, cpus, dir)?;
    let map = vm.map("/mnt/file", 0, old.len as usize, false)?;
    ensure_eq!(vm.call::<Option<u64>>(&Op::MapVerify(map, old.seed))?, None, "before");
    fs::rename(&host, dir.join("renamed"))?;
    ensure_eq!(vm.call::<Option<u64>>(&Op::MapVerify(map, old.seed))?, None, "renamed");
    new.write_to(&host)?;
    ensure_eq!(vm.call::<Option<u64>>(&Op::MapVerify(map, old.seed))?, None, "replaced");
    let renamed = File::options().write(true).open(dir.join("renamed"))?;
    fs::remove_file(dir.join("renamed"))?;
    ensure_eq!(vm.call::<Option<u64>>(&Op::MapVerify(map, old.seed))?, None, "removed");
    // Replaced in place, as an editor or a compiler does it.
    renamed.set_len(0)?;
    ensure_eq!(vm.call::<Option<u64>>(&Op::MapVerify(map, old.seed))?, Some(0), "cut off without a name");
    // A hole that is punched takes nothing away: the pages come back as zeros.
    drop(renamed);
    vm.run(Op::Unmap(map))?;
    let (counts, _) = finish(vm)?;
    ensure_eq!((counts.lost_files, counts.lost_pages), (1, 1024), "what was lost");
    Ok(())
}

/// The guest believes in an old size, and reads behind the end by one instruction, at addresses that are in a vector.
fn gathered(kernel: &Kernel, cpus: u32, dir: &Path) -> Outcome {
    const END: u32 = 10 << 12;
    let content = Content { seed: 81, len: 1 << 20 };
    let host = dir.join("file");
    content.write_to(&host)?;
    let mut vm = boot(kernel, cpus, dir)?;
    ensure_eq!(vm.stat("/mnt/file")?.size, content.len, "the old size");
    File::options().write(true).open(&host)?.set_len(END.into())?;
    let map = vm.map("/mnt/file", 0, content.len as usize, false)?;
    let offsets = [0, 4, END - 4, END, END + 4096, 100 << 12, 4096, 255 << 12];
    let found: [u32; 8] = vm.call(&Op::MapGather(map, offsets))?;
    let bytes = fs::read(&host)?;
    let there = offsets.map(|offset| match bytes.get(offset as usize..offset as usize + 4) {
        Some(bytes) => u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        None => 0,
    });
    ensure_eq!(found, there);
    vm.run(Op::Unmap(map))?;
    let (counts, _) = finish(vm)?;
    ensure_eq!((counts.lost_files, counts.lost_pages, counts.failed_pages), (1, 502, 0), "what was lost");
    Ok(())
}

/// The limit of mappings of a process is met: errors for who has the file as DAX already, and no more DAX for others.
fn no_mappings_left(kernel: &Kernel, dir: &Path) -> Outcome {
    const LIMIT: &str = "/proc/sys/vm/max_map_count";
    struct Restore(String);
    impl Drop for Restore {
        fn drop(&mut self) {
            let _ = fs::write(LIMIT, &self.0);
        }
    }
    let content = Content { seed: 78, len: 8 << 10 };
    let names: Vec<_> = (0..200).map(|number| format!("file-{number}")).collect();
    for name in &names {
        content.write_to(&dir.join(name))?;
    }
    let share = Share::new("t", dir).window("1G").dax("always");
    let mut vm = Vm::builder(kernel).share(share).boot()?;
    vm.mount("t", "/mnt", "dax=inode")?;
    let before = fs::read_to_string(format!("/proc/{}/maps", vm.host().pid()))?.lines().count();
    let _restore = Restore(fs::read_to_string(LIMIT)?);
    fs::write(LIMIT, (before + 40).to_string())?;
    let (mut refused, mut not_dax) = (0, 0);
    for name in &names {
        let path = format!("/mnt/{name}");
        match vm.read_bytes(path.as_str(), 0, 16) {
            Ok(bytes) => ensure_eq!(bytes, expected(content, 0), "{name}"),
            Err(_) => refused += 1,
        }
        not_dax += u64::from(!vm.stat(path.as_str())?.dax);
    }
    ensure!(refused > 0 && not_dax > 100, "{refused} refused, {not_dax} of 200 are not DAX");
    // What is mapped can be taken away all the same, and then there is room again.
    vm.umount("/mnt")?;
    vm.mount("t", "/mnt", "dax=inode")?;
    ensure_eq!(vm.read_bytes("/mnt/file-0", 0, 16)?, expected(content, 0), "a file after all that");
    ensure!(vm.stat("/mnt/file-0")?.dax, "a file is DAX again");
    let (counts, ended) = finish(vm)?;
    ensure!(counts.failed_setup_mappings > 0, "{counts:?}");
    ensure_eq!(counts.mapped_chunks, 0, "chunks in the end");
    ensure_eq!(
        ended.console.matches("vm.max_map_count").count(),
        1,
        "how often it was said\n{}",
        ended.console
    );
    Ok(())
}
