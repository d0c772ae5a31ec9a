//! `scripts/bench boot`: from the start of the monitor to the first line of the guest's init, against QEMU's microvm
//! with the same kernel, initramfs and memory; and where daxvm's part of it goes.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::peers::Qemu;
use super::process::Watched;
use super::{BenchError, Table};
use crate::guest::{INIT, READY};
use crate::vm::{Kernel, daxvm, scratch};

const MEMORY: &str = "512M";
/// No boot takes this long; one that hangs is ended.
const LIMIT: Duration = Duration::from_secs(90);

/// One boot, in milliseconds since the monitor was started.
struct Boot {
    init: f64,
    ready: f64,
}

/// Boots `kernel` `n` times with each monitor, by turns.
///
/// # Errors
/// See [`BenchError`].
pub fn run(kernel: &str, n: usize) -> Result<Table, BenchError> {
    let kernel = Kernel::find(kernel)?;
    let files = Files::new(&kernel)?;
    let qemu = Qemu::find()?;
    let report = scratch().join("bench-boot.json");
    let (mut ours, mut theirs, mut vmm, mut memory) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for i in 0..n {
        eprintln!("boot {} of {n}", i + 1);
        let mut command = Command::new(&files.daxvm);
        command.arg("run").arg("--kernel").arg(&files.kernel).arg("--initrd").arg(&files.initrd);
        command.args(["--memory", MEMORY, "--cmdline", "quiet", "--report"]).arg(&report);
        ours.push(boot("daxvm", command)?);
        let read = || Ok(serde_json::from_reader::<_, serde_json::Value>(File::open(&report)?)?);
        let report = read().map_err(|source| BenchError::File(report.clone(), source))?;
        vmm.extend(report["timing"]["vmm_ms"].as_f64());
        memory.extend(report["vmm_memory_kib"].as_f64().map(|kib| kib / 1024.0));
        let mut command = qemu.microvm(MEMORY, 1);
        command.args(["-serial", "stdio"]);
        command.arg("-kernel").arg(&files.kernel).arg("-initrd").arg(&files.initrd);
        command.args(["-append", "console=ttyS0 panic=-1 quiet"]);
        theirs.push(boot("QEMU microvm", command)?);
    }
    let mut table = Table::default();
    let all = |boots: &[Boot], time: fn(&Boot) -> f64| boots.iter().map(time).collect::<Vec<_>>();
    table.add("start to init", "daxvm", "ms", all(&ours, |boot| boot.init));
    table.add("start to init", "QEMU microvm", "ms", all(&theirs, |boot| boot.init));
    table.add("of it: the monitor", "daxvm", "ms", vmm.clone());
    let kernel = ours.iter().zip(&vmm).map(|(boot, vmm)| boot.init - vmm);
    table.add("of it: the kernel", "daxvm", "ms", kernel.collect());
    table.add("init to its agent", "daxvm", "ms", all(&ours, |boot| boot.ready - boot.init));
    table.add("init to its agent", "QEMU microvm", "ms", all(&theirs, |boot| boot.ready - boot.init));
    table.add("memory of the monitor", "daxvm", "MiB", memory);
    Ok(table)
}

/// What is booted, where it is read quickly.
struct Files {
    daxvm: PathBuf,
    kernel: PathBuf,
    initrd: PathBuf,
}

impl Files {
    fn new(kernel: &Kernel) -> Result<Files, BenchError> {
        let copy = |from: &Path, name: &str| {
            let to = scratch().join(name);
            fs::copy(from, &to).map_err(|source| BenchError::File(from.to_owned(), source))?;
            Ok::<_, BenchError>(to)
        };
        Ok(Files {
            daxvm: copy(&daxvm(), "bench-daxvm")?,
            kernel: copy(&kernel.image(), "bench-kernel")?,
            initrd: kernel.initrd()?,
        })
    }
}

/// Runs one monitor until the guest's agent is there, then ends it.
fn boot(subject: &str, mut command: Command) -> Result<Boot, BenchError> {
    let start = Instant::now();
    // Its own end of the pipe stays open, so that the console is not read as closed.
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    let mut monitor = Watched::start(&mut command, LIMIT)?;
    let mut output = monitor.child.stdout.take().ok_or(BenchError::NoLab)?;
    let (mut text, mut init) = (String::new(), None);
    let mut buffer = [0; 4096];
    loop {
        let read = output.read(&mut buffer).map_err(|source| BenchError::System("read a console", source))?;
        let now = start.elapsed().as_secs_f64() * 1e3;
        text.push_str(&String::from_utf8_lossy(&buffer[..read]));
        let has = |word: &str| text.lines().any(|line| line.trim_end() == word);
        if init.is_none() && has(INIT) {
            init = Some(now);
        }
        if has(READY) {
            let Some(init) = init else { break };
            return Ok(Boot { init, ready: now });
        }
        if read == 0 {
            break;
        }
    }
    let tail: Vec<_> = text.lines().rev().take(20).collect();
    let output = tail.into_iter().rev().collect::<Vec<_>>().join("\n");
    Err(BenchError::Subject { subject: subject.to_owned(), expected: READY, output })
}
