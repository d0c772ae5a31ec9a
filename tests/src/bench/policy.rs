//! `scripts/bench policy`: what each policy makes of many small files beside some large ones and a small window. Under
//! `always` every small file takes a chunk of 2 MiB, and the large files lose theirs; that is what deciding file by
//! file is for.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{BenchError, Table, plot};
use crate::guest::data::Content;
use crate::guest::{GuestPath, Op, SmallFiles, SmallFilesPhase};
use crate::vm::{Kernel, Share, Vm, scratch};

const POLICIES: [&str; 5] = ["never", "always", "inode", "size", "auto"];
/// Small files, in bytes: from 4 KiB to 16 KiB.
const SMALL: (u64, u64) = (4 << 10, (16 << 10) + 1);
/// Large files: 4 of 4 MiB, which take 8 of the 16 chunks.
const LARGE: u64 = 4 << 20;
const LARGE_FILES: u64 = 4;
const LARGE_CHUNKS: u64 = LARGE_FILES * LARGE / (2 << 20);
const WINDOW: &str = "32M";
/// Small files between two looks at a large one.
const BATCH: u32 = 250;
/// The attribute that marks the large files for `inode`, on a file system without the flag (docs/persistent-hint.md).
const HINT: &str = "user.daxvm.dax";

/// Reads the same files under each policy.
///
/// # Errors
/// See [`BenchError`]; among them that `auto` maps more than the large files, or is slower than `always`.
pub fn run(kernel: &str, files: u32) -> Result<Table, BenchError> {
    let kernel = Kernel::find(kernel)?;
    let share = Tree::new(files)?;
    let mut table = Table::default();
    let mut results = Vec::new();
    for policy in POLICIES {
        eprintln!("policy {policy}");
        let result = share.read_under(&kernel, policy)?;
        eprintln!("  {result:?}");
        results.push((policy, result));
    }
    for (policy, result) in &results {
        table.add("time to read all", policy, "s", vec![result.time.as_secs_f64()]);
    }
    for (policy, result) in &results {
        table.add("SETUPMAPPINGs", policy, "", vec![result.setups as f64]);
    }
    for (policy, result) in &results {
        table.add("REMOVEMAPPINGs", policy, "", vec![result.removes as f64]);
    }
    for (policy, result) in &results {
        table.add("guest memory used", policy, "MiB", vec![result.memory_kib as f64 / 1024.0]);
    }
    let svg = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench/policy.svg");
    plot::bars(
        &svg,
        &format!("{files} files of 4 to 16 KiB beside 4 of 4 MiB, window of 32 MiB"),
        table.rows(),
    )
    .map_err(|error| BenchError::Unexpected(format!("Cannot draw {}: {error}", svg.display())))?;
    check(&results)?;
    Ok(table)
}

/// What the policies promise.
fn check(results: &[(&str, Outcome)]) -> Result<(), BenchError> {
    let of = |policy| results.iter().find(|(name, _)| *name == policy).map(|(_, result)| result);
    let (Some(auto), Some(always)) = (of("auto"), of("always")) else { return Ok(()) };
    if auto.setups > LARGE_CHUNKS {
        let setups = auto.setups;
        return Err(BenchError::Unexpected(format!(
            "auto mapped {setups} chunks, and the large files explain {LARGE_CHUNKS}"
        )));
    }
    if auto.time >= always.time {
        return Err(BenchError::Unexpected(format!("auto took {:?}, always {:?}", auto.time, always.time)));
    }
    Ok(())
}

/// What one policy made of it.
#[derive(Debug)]
struct Outcome {
    time: Duration,
    setups: u64,
    removes: u64,
    memory_kib: u64,
}

/// The shared directory.
struct Tree {
    dir: PathBuf,
    small: SmallFiles,
}

impl Tree {
    fn new(count: u32) -> Result<Tree, BenchError> {
        let failed = |what| move |source| BenchError::System(what, source);
        let dir = scratch().join("bench-policy");
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(dir.join("small")).map_err(failed("make the share"))?;
        let small = SmallFiles {
            dir: GuestPath::from(dir.join("small").as_path()),
            first: 0,
            count,
            sizes: SMALL,
            phase: SmallFilesPhase::Create,
        };
        for number in 0..count {
            let path = dir.join(format!("small/file-{number:06}"));
            small.content(number).write_to(&path).map_err(failed("write a small file"))?;
        }
        for number in 0..LARGE_FILES {
            let path = dir.join(format!("large-{number}"));
            large(number).write_to(&path).map_err(failed("write a large file"))?;
            rustix::fs::setxattr(&path, HINT, b"1", rustix::fs::XattrFlags::empty())
                .map_err(|errno| BenchError::System("mark a large file", errno.into()))?;
        }
        Ok(Tree { dir, small })
    }

    /// Boots a guest and has it read all small files, and a large one after each batch of them.
    fn read_under(&self, kernel: &Kernel, policy: &str) -> Result<Outcome, BenchError> {
        let share = Share::new("bench", &self.dir).window(WINDOW).dax(policy);
        let mut vm = Vm::builder(kernel).share(share).deadline(Duration::from_secs(600)).boot()?;
        vm.mount("bench", "/mnt", "dax=inode")?;
        let start = Instant::now();
        for (batch, first) in (0..).zip((0..self.small.count).step_by(BATCH as usize)) {
            let count = BATCH.min(self.small.count - first);
            let work = SmallFiles {
                dir: "/mnt/small".into(),
                first,
                count,
                phase: SmallFilesPhase::Read,
                ..self.small.clone()
            };
            vm.call::<u64>(&Op::SmallFiles(work))?;
            let number = batch % LARGE_FILES;
            let found = vm.verify(&[(&format!("/mnt/large-{number}"), large(number))], 1, false)?;
            if !found.differs.is_empty() {
                return Err(BenchError::Unexpected(format!("{policy}: a large file was read wrongly")));
            }
        }
        let time = start.elapsed();
        // What the guest gets back when it forgets all of the share.
        let free = vm.meminfo_kib("MemFree")?;
        vm.umount("/mnt")?;
        vm.drop_caches()?;
        let memory_kib = vm.meminfo_kib("MemFree")?.saturating_sub(free);
        let ended = vm.power_off()?;
        let window = ended.report.window("bench");
        let window = window.ok_or(BenchError::Unexpected("the report has no window".into()))?;
        Ok(Outcome { time, setups: window.setup_mappings, removes: window.remove_mappings, memory_kib })
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        // Scratch files: the lab forgets them at its end.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn large(number: u64) -> Content {
    Content { seed: 1_000_000 + number, len: LARGE }
}
