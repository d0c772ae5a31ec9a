//! First touches of mapped files: what the guest finds at hand, what that saves, and that nothing is read for it.
//!
//! Each check has a machine of its own, whose shares show one directory and prefault it in different ways.

use std::fs::{self, File};
use std::os::linux::fs::MetadataExt;
use std::path::Path;

use libtest_mimic::Trial;
use tests::guest::data::Content;
use tests::guest::{Access, Op, Random};
use tests::vm::{Kernel, Report, Share, Vm};

use crate::harness::{Outcome, PLACES, Places, ensure, ensure_eq, own_trial};
use crate::host_file_systems::Disk;

/// The file, which is in the host's page cache unless a check throws it out.
const FILE: Content = Content { seed: 90, len: 64 << 20 };

/// Passes over a file of which the middle one counts.
const PASSES: usize = 3;

type PrefaultCheck = fn(&Kernel, &Path) -> Outcome;

/// The checks by kernel and file system.
pub fn trials(places: &Result<Places, String>, kernel: &'static str, trials: &mut Vec<Trial>) {
    let on_all: &[(&str, PrefaultCheck)] = &[("first-touch", first_touch), ("by-rule", by_rule)];
    let on_disk: &[(&str, PrefaultCheck)] = &[("cold-file", cold_file)];
    let on_memory: &[(&str, PrefaultCheck)] = &[("huge-pages", huge_pages)];
    let mut add = |place: &'static str, checks: &[(&str, PrefaultCheck)]| {
        for &(name, check) in checks {
            let name = format!("1cpu/{place}/prefault/{name}");
            trials.push(own_trial(kernel, &name, places, move |kernel, places| {
                let dir = tempfile::tempdir_in(places.dir(place))?;
                check(kernel, dir.path())
            }));
        }
    };
    for place in PLACES {
        add(place, on_all);
    }
    add("ext4", on_disk);
    add("tmpfs", on_memory);
}

/// A guest with a share for each way to prefault, under its name.
fn boot(kernel: &Kernel, dir: &Path, ways: &[&str]) -> Result<Vm, Box<dyn std::error::Error>> {
    let shares = ways.iter().map(|way| Share::new(way, dir).window("128M").dax("always").prefault(way));
    Ok(shares.fold(Vm::builder(kernel), |builder, share| builder.share(share)).boot()?)
}

fn finish(vm: Vm) -> Result<Report, Box<dyn std::error::Error>> {
    let ended = vm.power_off()?;
    crate::harness::ensure_ended(&ended, 0, "power-off")?;
    Ok(ended.report)
}

/// Mounts a share, has the file read in some way, and unmounts it; returns how long the reading took, in microseconds.
fn pass(
    vm: &mut Vm,
    tag: &str,
    how: Access,
    sha256: Option<&str>,
) -> Result<u64, Box<dyn std::error::Error>> {
    vm.mount(tag, "/mnt", "dax=always")?;
    let digest = vm.sha256("/mnt/file", how)?;
    if let Some(sha256) = sha256 {
        ensure_eq!(digest.sha256, sha256, "{tag}, {how:?}");
    }
    vm.umount("/mnt")?;
    Ok(digest.micros)
}

/// A warm file: the same bytes whichever way, and less time.
fn first_touch(kernel: &Kernel, dir: &Path) -> Outcome {
    let ways = ["never", "cached", "all"];
    FILE.write_to(&dir.join("file"))?;
    File::open(dir.join("file"))?.sync_all()?;
    let mut vm = boot(kernel, dir, &ways)?;
    let sha256 = FILE.sha256();
    for way in ways {
        pass(&mut vm, way, Access::Mmap, Some(&sha256))?;
    }
    let mut times = ways.map(|_| Vec::new());
    for _ in 0..PASSES {
        for (way, times) in ways.into_iter().zip(&mut times) {
            times.push(pass(&mut vm, way, Access::Touch, None)?);
        }
    }
    let medians = times.map(|mut times| {
        times.sort_unstable();
        times[PASSES / 2]
    });
    for (way, median) in ways.into_iter().zip(medians) {
        let ratio = medians[0] as f64 / median as f64;
        println!(
            "first touch of {} MiB, prefault={way}: {median} us, {ratio:.2} times as fast",
            FILE.len >> 20
        );
    }
    let report = finish(vm)?;
    let passes = 1 + PASSES as u64;
    for (way, expected) in ways.into_iter().zip([0, passes, passes]) {
        let counts = report.window(way).ok_or("no window")?;
        ensure_eq!(counts.prefault_bytes, expected * FILE.len, "bytes, {way}");
        ensure_eq!(counts.prefaults, expected * (FILE.len >> 21), "times, {way}");
    }
    // Where the hypervisor takes part, that saves most of the time; here is only what any host must show.
    ensure!(medians[1] < medians[0], "it takes longer: {medians:?}");
    Ok(())
}

/// A rule file says it file by file, and the share for the others.
fn by_rule(kernel: &Kernel, dir: &Path) -> Outcome {
    let content = Content { seed: 91, len: 4 << 20 };
    for name in ["one.never", "two.all", "other"] {
        content.write_to(&dir.join(name))?;
    }
    let rules = dir.join("rules.toml");
    let rule = |glob: &str, way: &str| {
        format!("[[rule]]\npath = \"{glob}\"\ndax = \"allow\"\nprefault = \"{way}\"\n")
    };
    let text =
        format!("version = 1\ndefault = \"size\"\n{}{}", rule("*.never", "never"), rule("*.all", "all"));
    fs::write(&rules, text)?;
    let share = Share::new("t", dir).window("64M").dax(rules.to_str().ok_or("a path that is no text")?);
    let mut vm = Vm::builder(kernel).share(share.prefault("cached")).boot()?;
    vm.mount("t", "/mnt", "dax=inode")?;
    for name in ["one.never", "two.all", "other"] {
        ensure_eq!(vm.sha256(&format!("/mnt/{name}"), Access::Mmap)?.sha256, content.sha256(), "{name}");
    }
    vm.umount("/mnt")?;
    let report = finish(vm)?;
    let files = report.all["shares"][0]["files"]["files"].as_array().ok_or("no files in the report")?;
    for (name, expected) in [("one.never", 0), ("two.all", content.len), ("other", content.len)] {
        let file = files.iter().find(|file| file["path"] == name).ok_or(name)?;
        ensure_eq!(file["prefault_bytes"], expected, "{name}");
    }
    Ok(())
}

/// Sectors that were read from the disk on which a file is.
fn sectors_read(path: &Path) -> Result<u64, Box<dyn std::error::Error>> {
    let device = fs::metadata(path)?.st_dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let stat = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat"))?;
    Ok(stat.split_whitespace().nth(2).ok_or("no third number in the disk's stat")?.parse()?)
}

/// Random access to a cold file: the default reads no more than the guest asks for.
fn cold_file(kernel: &Kernel, dir: &Path) -> Outcome {
    let path = dir.join("file");
    FILE.write_to(&path)?;
    let mut vm = boot(kernel, dir, &["never", "cached"])?;
    let how = |seed| Access::RandomMmap(Random { seed, count: 64 });
    let mut read = [0; 2];
    // Each reads the same pages.
    for seed in [901, 902, 903] {
        for (way, sectors) in ["never", "cached"].into_iter().zip(&mut read) {
            rustix::fs::sync();
            fs::write("/proc/sys/vm/drop_caches", "3")?;
            let before = sectors_read(&path)?;
            pass(&mut vm, way, how(seed), Some(&FILE.random_sha256(seed, 64)))?;
            *sectors += sectors_read(&path)? - before;
        }
    }
    println!("64 random pages of a cold file, three times: sectors read {read:?} with never, cached");
    ensure!(read[0] > 64 * 8, "the file was not cold: {read:?}");
    // A few blocks of the file system's own come and go.
    ensure!(read[1] <= read[0] + read[0] / 20, "more is read: {read:?}");
    finish(vm)?;
    Ok(())
}

/// Huge pages of the file system are mapped as such, by the host and by KVM.
fn huge_pages(kernel: &Kernel, dir: &Path) -> Outcome {
    const LEN: u64 = 16 << 20;
    let disk = Disk::mount(dir, "tmpfs", "tmpfs", "huge=always,size=32m")?;
    let content = Content { seed: 92, len: LEN };
    content.write_to(&disk.dir.join("file"))?;
    let mut vm = boot(kernel, &disk.dir, &["cached"])?;
    let huge = |vm: &Vm| -> Result<u64, Box<dyn std::error::Error>> {
        let pid = vm.host().pid();
        let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
        let kib = smaps.lines().filter_map(|line| line.strip_prefix("ShmemPmdMapped:"));
        Ok(kib.filter_map(|kib| kib.trim().trim_end_matches(" kB").parse::<u64>().ok()).sum())
    };
    vm.mount("cached", "/mnt", "dax=always")?;
    let map = vm.map("/mnt/file", 0, LEN as usize, false)?;
    ensure_eq!(vm.call::<Option<u64>>(&Op::MapVerify(map, content.seed))?, None, "the content");
    ensure_eq!(huge(&vm)?, LEN >> 10, "KiB of huge pages in the window");
    vm.run(Op::Unmap(map))?;
    vm.umount("/mnt")?;
    let counts = finish(vm)?.window("cached").ok_or("no window")?;
    ensure_eq!(counts.prefault_bytes, LEN, "bytes");
    Ok(())
}
