//! `scripts/bench dax`: a large file, by mmap and by read(2), in order and at random, for the first time and again, under
//! each policy, with a window that is larger than the file and with one that is smaller; against QEMU with virtiofsd, which
//! has no DAX, with the same kernel, initramfs and memory. The host has the file in memory throughout.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use super::peers::{Qemu, Virtiofsd};
use super::process::Watched;
use super::{BenchError, Table, plot};
use crate::guest::data::{BLOCK, Content, random_offsets};
use crate::guest::{Pass, Random};
use crate::vm::{Kernel, Share, Vm, scratch};

/// Who is measured, and under what name. The first of them is what a change to the window is compared with.
const SUBJECTS: [(&str, Monitor); 7] = [
    ("always", Monitor::Daxvm("dax=always", Window::Large)),
    // Mappings alone, as the peers' windows have them: each page is a fault.
    ("always plain", Monitor::Daxvm("dax=always,prefault=never", Window::Large)),
    ("auto", Monitor::Daxvm("dax=auto", Window::Large)),
    ("never", Monitor::Daxvm("dax=never", Window::Large)),
    ("always small", Monitor::Daxvm("dax=always", Window::Small)),
    ("auto small", Monitor::Daxvm("dax=auto", Window::Small)),
    ("virtiofsd", Monitor::Qemu),
];

/// Who serves the guest.
#[derive(Clone, Copy)]
enum Monitor {
    /// daxvm, with these options for the share.
    Daxvm(&'static str, Window),
    /// QEMU with virtiofsd.
    Qemu,
}

/// The DAX window.
#[derive(Clone, Copy)]
enum Window {
    /// Twice the file.
    Large,
    /// A quarter of it, or the smallest there is.
    Small,
}

impl Window {
    fn mib(self, file_mib: u64) -> u64 {
        match self {
            Window::Large => (2 * file_mib).max(SMALLEST_MIB),
            Window::Small => (file_mib / 4 / 2 * 2).max(SMALLEST_MIB),
        }
    }
}

/// The smallest window.
const SMALLEST_MIB: u64 = 32;

/// What is done with the file.
struct Way {
    name: &'static str,
    mmap: bool,
    random: Option<Random>,
}

/// Pages that are read at random: so few that it ends where each takes a chunk of its own, too.
const RANDOM: Random = Random { seed: 5, count: 4096 };

const WAYS: [Way; 4] = [
    Way { name: "mmap in order", mmap: true, random: None },
    Way { name: "mmap at random", mmap: true, random: Some(RANDOM) },
    Way { name: "read in order", mmap: false, random: None },
    Way { name: "read at random", mmap: false, random: Some(RANDOM) },
];

/// The times that the file is gone over. What the guest has kept from the first counts in the second.
const PASSES: [&str; 2] = ["first", "again"];

const TAG: &str = "bench";
const TARGET: &str = "/mnt";
/// No step takes longer.
const LIMIT: Duration = Duration::from_secs(900);

/// Goes over a file of `mib` MiB `runs` times with each subject, by turns.
///
/// # Errors
/// See [`BenchError`]; among them that a guest has read something else than what is in the file.
pub fn run(kernel: &str, mib: u64, runs: usize) -> Result<Table, BenchError> {
    let bench = Bench::new(kernel, mib)?;
    // By subject, then by way and pass.
    let mut samples = vec![vec![vec![Vec::new(); PASSES.len()]; WAYS.len()]; SUBJECTS.len()];
    for run in 0..runs {
        for ((name, monitor), samples) in SUBJECTS.iter().zip(&mut samples) {
            eprintln!("run {} of {runs}: {name}", run + 1);
            let (mut vm, _server) = bench.boot(*monitor)?;
            for (way, samples) in WAYS.iter().zip(samples) {
                let passes = bench.go(&mut vm, name, way)?;
                eprintln!(
                    "  {}: {:?} ms",
                    way.name,
                    passes.iter().map(|pass| pass.micros / 1000).collect::<Vec<_>>()
                );
                for (pass, samples) in passes.iter().zip(samples) {
                    samples.push(pass.micros as f64 / 1000.0);
                }
            }
        }
    }
    let mut table = Table::default();
    for (number, way) in WAYS.iter().enumerate() {
        for (pass, time) in PASSES.iter().enumerate() {
            for ((name, _), samples) in SUBJECTS.iter().zip(&samples) {
                table.add(&format!("{}, {time}", way.name), name, "ms", samples[number][pass].clone());
            }
        }
    }
    let svg = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench/dax.svg");
    let windows = [Window::Large, Window::Small].map(|window| window.mib(mib));
    let title = format!("A file of {mib} MiB, windows of {} and (small) {} MiB", windows[0], windows[1]);
    plot::bars(&svg, &title, table.rows())
        .map_err(|error| BenchError::Unexpected(format!("Cannot draw {}: {error}", svg.display())))?;
    Ok(table)
}

/// What is there for all subjects.
struct Bench {
    kernel: Kernel,
    qemu: Qemu,
    virtiofsd: Virtiofsd,
    dir: PathBuf,
    file: Content,
}

impl Bench {
    fn new(kernel: &str, mib: u64) -> Result<Bench, BenchError> {
        let failed = |what| move |source| BenchError::System(what, source);
        let dir = scratch().join("bench-dax");
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(dir.join("share")).map_err(failed("make the share"))?;
        let bench = Bench {
            kernel: Kernel::find(kernel)?,
            qemu: Qemu::find()?,
            virtiofsd: Virtiofsd::find()?,
            dir,
            file: Content { seed: 11, len: mib << 20 },
        };
        bench.file.write_to(&bench.share().join("file")).map_err(failed("write the file"))?;
        Ok(bench)
    }

    fn share(&self) -> PathBuf {
        self.dir.join("share")
    }

    fn file_mib(&self) -> u64 {
        self.file.len >> 20
    }

    /// Boots a guest that has room for the whole file in its page cache; with what must live as long.
    fn boot(&self, monitor: Monitor) -> Result<(Vm, Option<Watched>), BenchError> {
        let memory = format!("{}M", self.file_mib() + 512);
        let Monitor::Daxvm(options, window) = monitor else {
            let server = self.serve()?;
            return Ok((self.boot_qemu(&memory)?, Some(server)));
        };
        let window = format!("{}M", window.mib(self.file_mib()));
        let share = Share::new(TAG, self.share()).window(&window).with(options);
        let vm = Vm::builder(&self.kernel).memory(&memory).share(share);
        Ok((vm.deadline(LIMIT).boot()?, None))
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("socket")
    }

    /// Starts virtiofsd, which is there when its socket is.
    fn serve(&self) -> Result<Watched, BenchError> {
        let socket = self.socket();
        let _ = fs::remove_file(&socket);
        let mut command = self.virtiofsd.command(&self.qemu, &socket, &self.share());
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let server = Watched::start(&mut command, 4 * LIMIT)?;
        let end = Instant::now() + Duration::from_secs(30);
        while !socket.exists() {
            if Instant::now() > end {
                return Err(BenchError::Unexpected("virtiofsd has not made its socket".into()));
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(server)
    }

    fn boot_qemu(&self, memory: &str) -> Result<Vm, BenchError> {
        let mut command = self.qemu.microvm(memory, 1);
        // What is shared with another process must be a file.
        command.args(["-object", &format!("memory-backend-memfd,id=ram,size={memory},share=on")]);
        command.args(["-machine", "memory-backend=ram,pcie=on", "-serial", "stdio"]);
        command.arg("-chardev").arg(format!("socket,id=fs,path={}", self.socket().display()));
        command.args(["-device", &format!("vhost-user-fs-pci,chardev=fs,tag={TAG}")]);
        command.arg("-kernel").arg(self.kernel.image()).arg("-initrd").arg(self.kernel.initrd()?);
        command.args(["-append", "console=ttyS0 quiet panic=-1 reboot=t"]);
        Ok(Vm::of_peer(command, LIMIT)?)
    }

    /// Goes one way, with a guest that has nothing of the file.
    fn go(&self, vm: &mut Vm, name: &str, way: &Way) -> Result<Vec<Pass>, BenchError> {
        vm.mount(TAG, TARGET, "")?;
        let passes = vm.passes(&format!("{TARGET}/file"), way.mmap, way.random, PASSES.len())?;
        vm.umount(TARGET)?;
        let expected = match way.random {
            Some(random) => self.file.sum_of_words(random_offsets(random.seed, random.count, self.file.len)),
            None => self.file.sum_of_words((0..self.file.len).step_by(BLOCK)),
        };
        match passes.iter().all(|pass| pass.sum == expected) {
            true => Ok(passes),
            false => Err(BenchError::Unexpected(format!("{name}, {}: the file was read wrongly", way.name))),
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // Scratch files: the lab forgets them at its end.
        let _ = fs::remove_dir_all(&self.dir);
    }
}
