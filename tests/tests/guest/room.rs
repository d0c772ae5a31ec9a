//! Windows that are too small: what readers of a hundred files find in sixteen chunks, how thrashing is noticed and held
//! back, and whom a stream leaves a chunk.
//!
//! Each check has a machine of its own.

use std::error::Error;
use std::path::Path;
use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use tests::guest::data::Content;
use tests::guest::{Contest, Crowd, Fared, GuestPath, Op, OpenHow, ReadOrder, Stat};
use tests::vm::{Ended, Kernel, Share, Vm};

use crate::harness::{Outcome, Places, ensure, ensure_ended, ensure_eq, own_trial};

const MIB: u64 = 1 << 20;
/// How long crowds read.
const MILLIS: u64 = 10_000;

type RoomCheck = fn(&Kernel, u32, &Path) -> Outcome;

/// The checks by kernel and number of processors.
pub fn trials(places: &Result<Places, String>, kernel: &'static str, trials: &mut Vec<Trial>) {
    let checks: &[(&str, RoomCheck)] = &[
        ("eight-readers-of-a-hundred-files", hundred_files),
        ("thrashing-is-held-back-and-forgiven", held_back),
        ("a-stream-leaves-room-for-others", stream),
    ];
    for cpus in [1, 4] {
        for &(name, check) in checks {
            let name = format!("{cpus}cpu/tmpfs/room/{name}");
            trials.push(own_trial(kernel, &name, places, move |kernel, places| {
                let dir = tempfile::tempdir_in(places.dir("tmpfs"))?;
                check(kernel, cpus, dir.path())
            }));
        }
    }
}

/// Makes files of one size on the host; returns where the guest has them.
fn make(
    dir: &Path,
    mnt: &str,
    name: &str,
    count: u64,
    len: u64,
) -> Result<Vec<(GuestPath, Content)>, Box<dyn Error>> {
    let make = |n| {
        let content = Content { seed: len + n, len };
        content.write_to(&dir.join(format!("{name}{n}")))?;
        Ok((format!("{mnt}/{name}{n}").as_str().into(), content))
    };
    (0..count).map(make).collect()
}

fn contest(vm: &mut Vm, crowds: Vec<Crowd>) -> Result<Vec<Fared>, Box<dyn Error>> {
    let all: Vec<Fared> = vm.call(&Op::Contest(Contest { crowds, millis: MILLIS }))?;
    println!("{all:?}");
    for fared in &all {
        ensure_eq!(fared.wrong, None, "a block that is not the file's: {fared:?}");
    }
    Ok(all)
}

/// Nobody waited for a chunk much longer than all did: docs/window.md, "How long a program waits".
fn ensure_patience(fared: &Fared, readers: u64) -> Outcome {
    ensure!(fared.fewest > 0, "a reader never had its turn: {fared:?}");
    let mean = MILLIS * 1000 * readers / fared.blocks;
    let bound = (100 * mean).max(2_000_000);
    ensure!(fared.longest_micros <= bound, "a wait of more than {bound} us: {fared:?}");
    Ok(())
}

fn thrash(ended: &Ended, tag: &str) -> Result<serde_json::Value, Box<dyn Error>> {
    ensure_ended(ended, 0, "power-off")?;
    let shares = ended.report.all["shares"].as_array().into_iter().flatten();
    let share = shares.into_iter().find(|share| share["tag"] == tag).ok_or("no such share in the report")?;
    Ok(share["thrash"].clone())
}

fn hundred_files(kernel: &Kernel, cpus: u32, dir: &Path) -> Outcome {
    let files = make(dir, "/mnt", "f", 100, 2 * MIB)?;
    let mut vm =
        Vm::builder(kernel).cpus(cpus).share(Share::new("t", dir).window("32M").dax("always")).boot()?;
    vm.mount("t", "/mnt", "dax=always")?;
    for mmap in [true, false] {
        let crowd = Crowd { files: files.clone(), readers: 8, order: ReadOrder::Random, mmap };
        let fared = contest(&mut vm, vec![crowd])?;
        ensure_patience(&fared[0], 8)?;
    }
    vm.umount("/mnt")?;
    let ended = vm.power_off()?;
    let thrash = thrash(&ended, "t")?;
    ensure!(thrash["refaulted_chunks"].as_u64() > Some(100), "{thrash}");
    // A hundred chunks, and a fifth free: 125. It is known from the mean of some dozen mappings.
    let chunks = thrash["sufficient_window"].as_u64().unwrap_or(0) / (2 * MIB);
    ensure!((60..=400).contains(&chunks), "{chunks} chunks would do: {thrash}");
    ensure!(ended.console.contains("window is too small"), "it is not said:\n{}", ended.console);
    Ok(())
}

fn opens_as(vm: &mut Vm, path: &GuestPath) -> Result<bool, Box<dyn Error>> {
    let handle = vm.open(path.clone(), OpenHow::default())?;
    let stat: Stat = vm.call(&Op::StatHandle(handle))?;
    vm.run(Op::Close(handle))?;
    Ok(stat.dax)
}

/// What fills little of its chunks is not DAX while the window thrashes, and is again when it has been calm.
fn held_back(kernel: &Kernel, cpus: u32, dir: &Path) -> Outcome {
    let small = make(dir, "/mnt", "small", 100, 256 * 1024 - 4096)?;
    let large = make(dir, "/mnt", "large", 1, 4 * MIB)?;
    let share = Share::new("t", dir).window("32M").dax("size:4K").cache("always");
    let mut vm = Vm::builder(kernel).cpus(cpus).share(share).boot()?;
    vm.mount("t", "/mnt", "dax=inode")?;
    ensure!(opens_as(&mut vm, &small[0].0)? && opens_as(&mut vm, &large[0].0)?, "before");
    let crowd = Crowd { files: small.clone(), readers: 2, order: ReadOrder::Random, mmap: true };
    contest(&mut vm, vec![crowd])?;
    ensure!(!opens_as(&mut vm, &small[1].0)?, "a small file is DAX while the window thrashes");
    // All that is left of the thrashing has to be levels that fall, each after five seconds.
    let calm = Instant::now();
    while !opens_as(&mut vm, &small[2].0)? {
        ensure!(calm.elapsed() < Duration::from_secs(60), "never DAX again");
        std::thread::sleep(Duration::from_secs(1));
    }
    ensure!(calm.elapsed() > Duration::from_secs(3), "DAX again after {:?}", calm.elapsed());
    ensure!(opens_as(&mut vm, &large[0].0)?, "a large file, afterwards");
    vm.umount("/mnt")?;
    let thrash = thrash(&vm.power_off()?, "t")?;
    ensure!(thrash["peak_level"].as_u64() >= Some(1), "{thrash}");
    Ok(())
}

/// Readers of a few small files, beside one that streams eight times the window; and readers in another window.
fn stream(kernel: &Kernel, cpus: u32, dir: &Path) -> Outcome {
    let (here, there) = (dir.join("here"), dir.join("there"));
    std::fs::create_dir(&here)?;
    std::fs::create_dir(&there)?;
    let huge = make(&here, "/here", "huge", 1, 256 * MIB)?;
    let few = make(&here, "/here", "few", 4, 2 * MIB)?;
    let other = make(&there, "/there", "other", 4, 2 * MIB)?;
    let share = |tag, dir: &Path| Share::new(tag, dir).window("32M").dax("always");
    let mut vm =
        Vm::builder(kernel).cpus(cpus).share(share("here", &here)).share(share("there", &there)).boot()?;
    vm.mount("here", "/here", "dax=always")?;
    vm.mount("there", "/there", "dax=always")?;
    for mmap in [true, false] {
        let crowd = |files: &[_], readers, order| Crowd { files: files.to_vec(), readers, order, mmap };
        let fared = contest(
            &mut vm,
            vec![
                crowd(&huge, 1, ReadOrder::Stream),
                crowd(&few, 2, ReadOrder::Random),
                crowd(&other, 1, ReadOrder::Random),
            ],
        )?;
        let [streamed, beside, elsewhere] = &fared[..] else { return Err("three crowds".into()) };
        ensure_patience(streamed, 1)?;
        ensure_patience(beside, 2)?;
        ensure_patience(elsewhere, 1)?;
        ensure!(streamed.blocks > 2 * 256, "the stream has not filled the window twice: {streamed:?}");
    }
    vm.umount("/here")?;
    vm.umount("/there")?;
    let ended = vm.power_off()?;
    let elsewhere = thrash(&ended, "there")?;
    ensure_eq!(elsewhere["refaulted_chunks"], 0, "what one share does takes no chunk of another");
    Ok(())
}
