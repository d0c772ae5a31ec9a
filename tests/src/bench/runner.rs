//! `scripts/bench runner`: from the start of `daxvm run -- true` to its exit, against virtme-ng and QEMU's microvm with
//! the same kernel and memory; and what goes through standard output and standard input, against QEMU's virtio-serial.
//!
//! QEMU's guest has a small init and the programs in an initramfs (`bench-init`); the others have the host's root.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::peers::{Qemu, copy};
use super::process::Watched;
use super::virtme_ng::VirtmeNg;
use super::{BenchError, Table};
use crate::vm::{Kernel, beside, daxvm, scratch};
use vmm::initramfs::Archive;

/// RAM of each guest.
pub(super) const MEMORY: &str = "512M";
/// No run takes this long; one that hangs is ended.
const LIMIT: Duration = Duration::from_secs(120);
/// Bytes that go through a stream.
const STREAM: u64 = 64 << 20;

/// Runs everything `n` times, by turns.
///
/// # Errors
/// See [`BenchError`]. That virtme-ng does not work here is none: the table says so.
pub fn run(kernel: &str, n: usize) -> Result<Table, BenchError> {
    let peers = Runners::new(&Kernel::find(kernel)?)?;
    let mut table = Table::default();
    boots(&peers, n, &mut table)?;
    for (row, direction) in [("64 MiB by stdout", Direction::Out), ("64 MiB by stdin", Direction::In)] {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for i in 0..n {
            eprintln!("{row}: {} of {n}", i + 1);
            ours.push(rate("daxvm", peers.daxvm(&["sh", "-c", direction.script()]), direction)?);
            theirs.push(rate("QEMU", peers.qemu_with_port(direction)?, direction)?);
        }
        table.add(row, "daxvm", "MB/s", ours);
        table.add(row, "virtio-serial", "MB/s", theirs);
    }
    Ok(table)
}

/// Boot to exit of `true`.
fn boots(runners: &Runners, n: usize, table: &mut Table) -> Result<(), BenchError> {
    const ROW: &str = "boot to exit of true";
    eprintln!("{ROW}: trying virtme-ng");
    let virtme_ng = VirtmeNg::find(&runners.qemu, &runners.kernel).and_then(|virtme_ng| {
        // It makes files for later runs; and whether it runs anything at all should be known.
        let printed = output("virtme-ng", virtme_ng.command(&["--verbose"], "true"))?;
        match virtme_ng.status() {
            Some(0) => Ok(virtme_ng),
            _ => Err(ended_badly("virtme-ng", "the end of its command", &printed)),
        }
    });
    let (mut ours, mut microvm, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
    for i in 0..n {
        eprintln!("{ROW}: {} of {n}", i + 1);
        ours.push(timed("daxvm", runners.daxvm(&["true"]))?);
        microvm.push(runners.qemu_runs_true()?);
        if let Ok(virtme_ng) = &virtme_ng {
            theirs.push(virtme_ng_runs_true(virtme_ng)?);
        }
    }
    table.add(ROW, "daxvm", "ms", ours);
    table.add(ROW, "QEMU microvm", "ms", microvm);
    table.add(ROW, "virtme-ng", "ms", theirs);
    if let Err(error) = virtme_ng {
        table.add_missing(ROW, "virtme-ng", &error.to_string());
    }
    Ok(())
}

/// What daxvm and QEMU run, where it is read quickly.
struct Runners {
    qemu: Qemu,
    daxvm: PathBuf,
    /// A directory with the image, `vmlinuz`, and its modules, `lib/modules`.
    kernel: PathBuf,
    initrd: PathBuf,
}

impl Runners {
    fn new(kernel: &Kernel) -> Result<Runners, BenchError> {
        let files = scratch().join("bench-runner");
        if files.exists() {
            fs::remove_dir_all(&files).map_err(|source| BenchError::File(files.clone(), source))?;
        }
        let runners = Runners {
            qemu: Qemu::find()?,
            daxvm: files.join("daxvm"),
            kernel: files.join("kernel"),
            initrd: files.join("initrd"),
        };
        copy(&daxvm(), &runners.daxvm)?;
        copy(&kernel.image(), &runners.kernel.join("vmlinuz"))?;
        copy(&kernel.dir().join("modules/lib"), &runners.kernel.join("lib"))?;
        let initrd = initrd().map_err(|error| BenchError::Unexpected(format!("The initramfs: {error}")))?;
        fs::write(&runners.initrd, initrd)
            .map_err(|source| BenchError::File(runners.initrd.clone(), source))?;
        Ok(runners)
    }

    fn daxvm(&self, argv: &[&str]) -> Command {
        let mut command = Command::new(&self.daxvm);
        command.arg("run").arg("--kernel").arg(&self.kernel);
        command.args([
            "--cpus",
            "1",
            "--memory",
            MEMORY,
            "--cmdline",
            "quiet",
            "--boot-timeout",
            "90s",
            "--",
        ]);
        command.args(argv);
        command
    }

    /// A microvm whose init runs `program`; its console is a file.
    fn microvm(&self, console: &Path, program: &str) -> Command {
        let mut command = self.qemu.microvm(MEMORY, 1);
        command.arg("-serial").arg(format!("file:{}", console.display()));
        command.arg("-kernel").arg(self.kernel.join("vmlinuz")).arg("-initrd").arg(&self.initrd);
        command.arg("-append").arg(format!("console=ttyS0 panic=-1 reboot=t quiet -- {program}"));
        command
    }

    /// Boot to exit, in milliseconds.
    fn qemu_runs_true(&self) -> Result<f64, BenchError> {
        let console = self.initrd.with_file_name("console");
        let time = timed("QEMU microvm", self.microvm(&console, "/bin/true"))?;
        let text = fs::read_to_string(&console).map_err(|source| BenchError::File(console, source))?;
        match text.contains(INIT_DONE) {
            true => Ok(time),
            false => Err(ended_badly("QEMU microvm", INIT_DONE, &text)),
        }
    }

    /// A microvm with a virtio-serial port on standard input and output, to which a script is attached.
    fn qemu_with_port(&self, direction: Direction) -> Result<Command, BenchError> {
        let console = self.initrd.with_file_name("console");
        let mut command = self.microvm(&console, &format!("port /bin/sh /{}", direction.name()));
        command.args(["-machine", "pcie=on", "-chardev", "stdio,id=port,signal=off"]);
        command.args(["-device", "virtio-serial-pci", "-device", "virtserialport,chardev=port,name=port"]);
        Ok(command)
    }
}

/// What `bench-init` says when its program has ended with status 0.
const INIT_DONE: &str = "bench-init: Ok(0)";

/// `bench-init`, the scripts, and the programs that they need, with their libraries.
fn initrd() -> Result<Vec<u8>, Box<dyn std::error::Error>> {
    let mut archive = Archive::new();
    archive.host_file("init", 0o755, &beside("bench-init")?)?;
    archive.device("dev/console", 0o600, 5, 1)?;
    archive.device("dev/null", 0o666, 1, 3)?;
    let mut libraries = std::collections::BTreeSet::new();
    for program in ["bin/sh", "bin/true", "bin/cat", "usr/bin/head"] {
        let path = Path::new("/").join(program);
        archive.host_file(program, 0o755, &path)?;
        let output = Command::new("ldd").arg(&path).output()?;
        let text = String::from_utf8(output.stdout)?;
        libraries.extend(text.split_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned));
    }
    for library in libraries {
        archive.host_file(library.trim_start_matches('/'), 0o755, Path::new(&library))?;
    }
    for direction in [Direction::Out, Direction::In] {
        archive.file(
            direction.name(),
            0o644,
            format!("PATH=/bin:/usr/bin\n{}", direction.script()).as_bytes(),
        )?;
    }
    Ok(archive.finish()?)
}

/// Where the bytes go, seen from the guest.
#[derive(Clone, Copy)]
enum Direction {
    Out,
    In,
}

impl Direction {
    fn name(self) -> &'static str {
        match self {
            Direction::Out => "out",
            Direction::In => "in",
        }
    }

    /// What the guest runs: it says when it begins, and with input also when it has it all. Programs that are read for
    /// the first time are no part of the time.
    fn script(self) -> &'static str {
        match self {
            Direction::Out => {
                "head -c 1 /dev/zero | cat >/dev/null; echo ready; head -c 67108864 /dev/zero | cat"
            }
            Direction::In => {
                "head -c 1 /dev/zero | cat >/dev/null; echo ready; head -c 67108864 | cat >/dev/null; echo done"
            }
        }
    }
}

/// Megabytes a second from the line `ready` on.
fn rate(subject: &str, mut command: Command, direction: Direction) -> Result<f64, BenchError> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    let mut monitor = Watched::start(&mut command, LIMIT)?;
    let (Some(stdin), Some(mut stdout)) = (monitor.child.stdin.take(), monitor.child.stdout.take()) else {
        return Err(BenchError::NoLab);
    };
    let read_failed = |source| BenchError::System("read what a guest wrote", source);
    expect(subject, &mut stdout, "ready\n")?;
    let start = Instant::now();
    let time = match direction {
        Direction::Out => {
            let read = io::copy(&mut (&mut stdout).take(STREAM), &mut io::sink()).map_err(read_failed)?;
            let time = start.elapsed();
            if read != STREAM {
                return Err(ended_badly(subject, "64 MiB", &format!("({read} bytes)")));
            }
            // The port stays open until the guest has ended, as input that ends would be the end of QEMU's.
            drop(stdin);
            time
        }
        Direction::In => {
            let feeder = thread::spawn(move || feed(stdin));
            expect(subject, &mut stdout, "done\n")?;
            let time = start.elapsed();
            let fed = feeder.join().map_err(|_| BenchError::Unexpected("The feeder panicked".into()))?;
            drop(fed.map_err(|source| BenchError::System("write to a guest", source))?);
            time
        }
    };
    monitor.wait()?;
    Ok(STREAM as f64 / 1e6 / time.as_secs_f64())
}

fn feed(mut stdin: ChildStdin) -> io::Result<ChildStdin> {
    let block = vec![0x5a; 1 << 20];
    for _ in 0..STREAM / block.len() as u64 {
        stdin.write_all(&block)?;
    }
    Ok(stdin)
}

/// Reads `line`, and nothing else.
fn expect(subject: &str, stdout: &mut ChildStdout, line: &'static str) -> Result<(), BenchError> {
    let mut read = vec![0; line.len()];
    match stdout.read_exact(&mut read) {
        Ok(()) if read == line.as_bytes() => Ok(()),
        _ => Err(ended_badly(subject, line.trim_end(), &String::from_utf8_lossy(&read))),
    }
}

/// Milliseconds from the start of a program to its end, with status 0.
fn timed(subject: &str, command: Command) -> Result<f64, BenchError> {
    match time(command)? {
        (time, status) if status.success() => Ok(time),
        (_, status) => Err(ended_badly(subject, "exit status 0", &status.to_string())),
    }
}

/// The same for virtme-ng, whose own status may say nothing.
fn virtme_ng_runs_true(virtme_ng: &VirtmeNg) -> Result<f64, BenchError> {
    let (time, status) = time(virtme_ng.command(&[], "true"))?;
    match virtme_ng.status() {
        Some(0) => Ok(time),
        _ => Err(ended_badly("virtme-ng", "the end of its command", &status.to_string())),
    }
}

/// Milliseconds from the start of a program to its end, and how it ended.
fn time(mut command: Command) -> Result<(f64, ExitStatus), BenchError> {
    let start = Instant::now();
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit());
    let status = Watched::start(&mut command, LIMIT)?.wait()?;
    Ok((start.elapsed().as_secs_f64() * 1e3, status))
}

/// What a program writes until it ends, errors too; its status counts for nothing.
fn output(subject: &str, mut command: Command) -> Result<String, BenchError> {
    let (mut reader, writer) = io::pipe().map_err(|source| BenchError::System("make a pipe", source))?;
    let error = writer.try_clone().map_err(|source| BenchError::System("make a pipe", source))?;
    command.stdin(Stdio::null()).stdout(writer).stderr(error);
    let mut monitor = Watched::start(&mut command, LIMIT)?;
    // It has the writing ends.
    drop(command);
    let mut text = Vec::new();
    reader.read_to_end(&mut text).map_err(|source| BenchError::System("read an output", source))?;
    let status = monitor.wait()?;
    Ok(format!("{}({subject}: {status})", String::from_utf8_lossy(&text)))
}

fn ended_badly(subject: &str, expected: &'static str, output: &str) -> BenchError {
    let tail: Vec<_> = output.lines().rev().take(60).collect();
    let output = tail.into_iter().rev().collect::<Vec<_>>().join("\n");
    BenchError::Subject { subject: subject.to_owned(), expected, output }
}
