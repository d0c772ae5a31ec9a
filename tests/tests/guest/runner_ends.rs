//! `daxvm run -- CMD`: every other way to end than the command's own, and how soon it is noticed.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use tests::vm::{CommandRun, Kernel, scratch};

use crate::harness::{Outcome, ensure, ensure_eq};
use crate::runner::{RunnerCheck, ensure_end};

/// The checks that need one kernel only.
pub fn checks() -> Vec<(&'static str, RunnerCheck)> {
    vec![
        ("a-timeout-is-124-whatever-the-guest-does", timeout),
        ("an-early-hang-is-noticed", early_hang),
        ("an-early-triple-fault-is-noticed", early_triple_fault),
        ("a-kernel-without-drivers-is-explained", no_drivers),
        ("a-guest-that-switches-itself-off-has-failed", switched_off),
        ("an-interrupt-is-the-commands", interrupted),
        ("a-second-interrupt-ends-the-guest", interrupted_twice),
        ("a-sigterm-leaves-nothing-behind", terminated),
        ("a-slow-reader-gets-everything", slow_reader),
        ("a-reader-that-hangs-is-left-behind", hanging_reader),
    ]
}

/// A kernel panic is noticed when it happens, and its message is shown.
pub fn panic(kernel: &Kernel) -> Outcome {
    let mut running =
        CommandRun::shell(kernel, "echo here; sleep 0.2; echo c >/proc/sysrq-trigger; sleep 1000").start()?;
    ensure_eq!(running.wait_for_line()?, "here");
    let before = std::time::Instant::now();
    let ended = running.wait()?;
    ensure_end(&ended, 34, "panic")?;
    ensure!(before.elapsed() < Duration::from_secs(30), "it took {:?}", before.elapsed());
    ensure!(ended.stderr.contains("sysrq triggered crash"), "the console is not shown:\n{}", ended.stderr);
    Ok(())
}

fn timeout(kernel: &Kernel) -> Outcome {
    let deaf = "trap '' TERM INT HUP QUIT; echo deaf; while :; do :; done";
    let ended = CommandRun::shell(kernel, deaf).options(["--timeout", "45s"]).run()?;
    ensure_end(&ended, 124, "timeout")?;
    ensure_eq!(ended.stdout, b"deaf\n", "it should have come so far in that time");
    ensure!((44..60).contains(&ended.time.as_secs()), "45 s took {:?}", ended.time);
    ensure!(ended.stderr.contains("--timeout"), "the message does not say why: {}", ended.stderr);
    let ended = CommandRun::new(kernel, &["true"]).options(["--timeout", "1s"]).run()?;
    ensure_end(&ended, 124, "timeout")?;
    ensure!(ended.time < Duration::from_secs(15), "1 s took {:?}", ended.time);
    Ok(())
}

/// A bzImage of which nothing is a kernel: `code` is where the 64-bit boot protocol enters it.
fn image(path: &Path, code: &[u8]) -> std::io::Result<()> {
    let mut image = vec![0; 2 * 512 + 0x200 + 4096];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x66]);
    put(0x202, b"HdrS");
    put(0x206, &0x20f_u16.to_le_bytes());
    // LOADED_HIGH; XLF_KERNEL_64.
    put(0x211, &[1]);
    put(0x214, &0x10_0000_u32.to_le_bytes());
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x230, &0x20_0000_u32.to_le_bytes());
    put(0x234, &[1]);
    put(0x236, &1_u16.to_le_bytes());
    put(0x238, &2047_u32.to_le_bytes());
    put(0x258, &0x10_0000_u64.to_le_bytes());
    put(0x260, &0x10_0000_u32.to_le_bytes());
    put(2 * 512 + 0x200, code);
    fs::write(path, image)
}

fn early_hang(_: &Kernel) -> Outcome {
    let dir = tempfile::tempdir_in(scratch())?;
    // jmp to itself; hlt with interrupts disabled.
    for code in [&[0xeb, 0xfe][..], &[0xfa, 0xf4, 0xeb, 0xfc]] {
        image(&dir.path().join("vmlinuz"), code)?;
        let run = CommandRun::with_kernel_at(dir.path(), &["true"]).boot_timeout(Duration::from_secs(3));
        let ended = run.run()?;
        ensure_end(&ended, 125, "boot-failed")?;
        ensure!((3..15).contains(&ended.time.as_secs()), "it took {:?}", ended.time);
        for said in ["no sign of life", "--boot-timeout", "--modules", "--console stderr"] {
            ensure!(ended.stderr.contains(said), "the message lacks {said:?}: {}", ended.stderr);
        }
    }
    Ok(())
}

fn early_triple_fault(_: &Kernel) -> Outcome {
    let dir = tempfile::tempdir_in(scratch())?;
    // ud2, and there is no interrupt table.
    image(&dir.path().join("vmlinuz"), &[0x0f, 0x0b])?;
    let ended = CommandRun::with_kernel_at(dir.path(), &["true"]).run()?;
    ensure_end(&ended, 33, "crash")?;
    ensure!(ended.time < Duration::from_secs(15), "it took {:?}", ended.time);
    ensure!(ended.stderr.contains("triple fault"), "the message does not say why: {}", ended.stderr);
    Ok(())
}

/// A kernel whose drivers are modules, without its modules: its init says what is missing, and daxvm what to do.
fn no_drivers(_: &Kernel) -> Outcome {
    let kernel = Kernel::find("6.1-cloud")?;
    let dir = tempfile::tempdir_in(scratch())?;
    fs::copy(kernel.image(), dir.path().join("vmlinuz"))?;
    let ended = CommandRun::with_kernel_at(dir.path(), &["true"]).run()?;
    ensure_end(&ended, 125, "boot-failed")?;
    ensure!(ended.stderr.contains("--modules DIR"), "the message does not say what to do: {}", ended.stderr);
    ensure!(ended.stderr.contains("console"), "the console is not shown: {}", ended.stderr);
    Ok(())
}

fn switched_off(kernel: &Kernel) -> Outcome {
    let ended = CommandRun::shell(kernel, "echo o >/proc/sysrq-trigger; sleep 1000").run()?;
    ensure_end(&ended, 125, "power-off")?;
    ensure!(ended.stderr.contains("switched itself off"), "the message does not say so: {}", ended.stderr);
    Ok(())
}

/// A script that says where it is, and what it does when it is interrupted.
const PATIENT: &str = "trap 'echo asked; exit 7' INT; echo ready; while :; do sleep 0.1; done";
const DEAF: &str = "trap 'echo asked' INT; trap '' TERM; echo ready; while :; do sleep 0.1; done";

fn interrupted(kernel: &Kernel) -> Outcome {
    let mut running = CommandRun::shell(kernel, PATIENT).start()?;
    ensure_eq!(running.wait_for_line()?, "ready");
    running.signal(Signal::INT)?;
    let ended = running.wait()?;
    ensure_end(&ended, 7, "exited")?;
    ensure_eq!(ended.stdout, b"asked\n");
    // Without a trap it dies of it.
    let mut running = CommandRun::shell(kernel, "echo ready; sleep 1000").start()?;
    ensure_eq!(running.wait_for_line()?, "ready");
    running.signal(Signal::INT)?;
    let ended = running.wait()?;
    ensure_end(&ended, 130, "signaled")
}

fn interrupted_twice(kernel: &Kernel) -> Outcome {
    let mut running = CommandRun::shell(kernel, DEAF).start()?;
    ensure_eq!(running.wait_for_line()?, "ready");
    running.signal(Signal::INT)?;
    ensure_eq!(running.wait_for_line()?, "asked");
    let before = std::time::Instant::now();
    running.signal(Signal::INT)?;
    let ended = running.wait()?;
    ensure_end(&ended, 130, "stopped")?;
    ensure!(before.elapsed() < Duration::from_secs(10), "it took {:?}", before.elapsed());
    // Before there is a command, once is enough.
    let mut running = CommandRun::shell(kernel, DEAF).start()?;
    thread::sleep(Duration::from_secs(2));
    running.signal(Signal::INT)?;
    let ended = running.wait()?;
    ensure_end(&ended, 130, "stopped")?;
    ensure!(ended.time < Duration::from_secs(12), "it took {:?}", ended.time);
    Ok(())
}

/// The processes of the program, apart from zombies.
pub fn processes() -> std::io::Result<BTreeSet<String>> {
    let program = tests::vm::daxvm().canonicalize()?;
    let entries = fs::read_dir("/proc")?.flatten();
    let ours =
        entries.filter(|entry| fs::read_link(entry.path().join("exe")).is_ok_and(|exe| exe == program));
    Ok(ours.map(|entry| format!("process {}", entry.path().display())).collect())
}

/// The processes of this program, and what is in the directories where it may leave things. In an emulated lab /tmp is the
/// machine's, which goes on meanwhile, so TMPDIR leads daxvm elsewhere.
pub fn traces() -> std::io::Result<BTreeSet<String>> {
    let mut traces = processes()?;
    for dir in [scratch().as_path(), Path::new("/run"), Path::new("/dev/shm"), Path::new("/var/tmp")] {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            traces.insert(entry.path().display().to_string());
        }
    }
    Ok(traces)
}

fn terminated(kernel: &Kernel) -> Outcome {
    let before = traces()?;
    for signal in [Signal::TERM, Signal::HUP] {
        let mut running = CommandRun::shell(kernel, DEAF).start()?;
        ensure_eq!(running.wait_for_line()?, "ready");
        let sent = std::time::Instant::now();
        running.signal(signal)?;
        let ended = running.wait()?;
        ensure_end(&ended, 128 + signal.as_raw(), "stopped")?;
        ensure!(sent.elapsed() < Duration::from_secs(10), "it took {:?}", sent.elapsed());
        ensure_eq!(ended.stderr, "", "standard error");
    }
    let after = traces()?;
    let left: Vec<_> = after.difference(&before).collect();
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(())
}

/// The command has ended long before its output has been read.
fn slow_reader(kernel: &Kernel) -> Outcome {
    let mut running = CommandRun::shell(kernel, "echo begin; head -c 1000000 /dev/zero; exit 4").start()?;
    ensure_eq!(running.wait_for_line()?, "begin");
    thread::sleep(Duration::from_secs(10));
    let ended = running.wait()?;
    ensure_end(&ended, 4, "exited")?;
    ensure!(ended.stdout == vec![0; 1_000_000], "{} bytes came", ended.stdout.len());
    Ok(())
}

/// Nobody reads, and nobody closes the pipe either: a signal and a time limit end it all the same.
fn hanging_reader(kernel: &Kernel) -> Outcome {
    let mut running = CommandRun::new(kernel, &["yes"]).start()?;
    ensure_eq!(running.wait_for_line()?, "y");
    let pipe = running.child.stdout.take();
    thread::sleep(Duration::from_secs(5));
    let sent = std::time::Instant::now();
    running.signal(Signal::TERM)?;
    let ended = running.wait()?;
    drop(pipe);
    ensure_end(&ended, 143, "stopped")?;
    ensure!(sent.elapsed() < Duration::from_secs(10), "it took {:?}", sent.elapsed());
    // All that is left to do is to write, and nobody reads.
    let script = "echo begin; head -c 1000000 /dev/zero";
    let mut running = CommandRun::shell(kernel, script).options(["--timeout", "60s"]).start()?;
    ensure_eq!(running.wait_for_line()?, "begin");
    let pipe = running.child.stdout.take();
    let ended = running.wait()?;
    drop(pipe);
    ensure_end(&ended, 124, "timeout")?;
    ensure!(ended.time < Duration::from_secs(80), "60 s took {:?}", ended.time);
    Ok(())
}
