//! `scripts/demo`: the main job, shown on a real directory. `daxvm run -- COMMAND` gives a stock guest this project's
//! source tree and a large file as a share with a DAX window; the command, which is this program again, mounts it in the
//! guest and compares every byte that it reads with what the host has.

use std::error::Error;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Instant;

use serde::de::DeserializeOwned;
use tests::guest::data::{Content, Hasher};
use tests::guest::{Access, Agent, Data, Digest, Mount, Op, Sha256, Stat, Write as WriteFile};
use tests::vm::{Kernel, Report, daxvm};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const BIG: &str = "large-file";
const BIG_SIZE: u64 = 64 << 20;
/// What the guest writes to it.
const REWRITTEN: Content = Content { seed: 2, len: BIG_SIZE };
/// What sha256sum would say of the files on the host.
const SUMS: &str = "SHA256SUMS";
const WINDOW: &str = "256M";

fn main() -> ExitCode {
    // What the command in the guest is called with, as below.
    let result = match std::env::args().nth(1).as_deref() {
        Some("guest") => guest(),
        _ => host(),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("demo: the guest and the host do not agree");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("demo: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Tells what is being done, and how long it took.
fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    print!("{what:<60}");
    std::io::stdout().flush()?;
    let start = Instant::now();
    let result = work();
    println!(" {:>6.1} s", start.elapsed().as_secs_f64());
    result
}

fn host() -> Result<bool> {
    let scratch = std::env::var_os("LAB_EXT4").ok_or("there is no scratch directory on ext4 (LAB_EXT4): run scripts/demo, which has one, where the CPU offers KVM as root")?;
    let dir = tempfile::Builder::new().prefix("demo-").tempdir_in(scratch)?;
    let (share, report) = (dir.path().join("source"), dir.path().join("report.json"));
    step("host:  copy the source tree, make a file of 64 MiB", || prepare(&share))?;

    let kernel = Kernel::find("6.12-cloud")?;
    let mut command = Command::new(daxvm());
    command.arg("run").arg("--kernel").arg(kernel.dir()).args(["--cpus", "2", "--memory", "512M"]);
    command.arg("--share").arg(format!("tag=source,path={},window={WINDOW}", share.display()));
    // An emulated host takes its time to unpack a kernel.
    command.arg("--boot-timeout").arg("90s").arg("--report").arg(&report);
    command.arg("--").arg(std::env::current_exe()?).arg("guest");
    println!("\n$ daxvm run --kernel target/kernels/6.12-cloud --cpus 2 --memory 512M --boot-timeout 90s \\");
    println!("      --share tag=source,path=source,window={WINDOW} -- demo guest\n");
    let start = Instant::now();
    let ended = command.status()?;
    let total = start.elapsed().as_secs_f64();

    let report = Report::parse(Some(&fs::read(report)?))?;
    let written = REWRITTEN.differs_from(&File::open(share.join(BIG))?)?.is_none();
    println!("\nWhat the guest wrote is {} the host.", if written { "on" } else { "NOT on" });
    println!("The command ended with status {}.", ended.code().unwrap_or(-1));
    let timing = ["vmm_ms", "ready_ms", "started_ms"].map(|part| report.all["timing"][part].as_f64());
    if let [Some(vmm), Some(ready), Some(started)] = timing {
        println!("Start to command: {:.1} s, of {total:.1} s in all.", (vmm + ready + started) / 1e3);
    }
    if let Some(window) = report.window("source") {
        println!(
            "Window of {WINDOW}: at most {} chunks of 2 MiB mapped at a time, {} SETUPMAPPINGs, {} mapped now.",
            window.peak_mapped_chunks, window.setup_mappings, window.mapped_chunks
        );
    }
    if let Some(kib) = report.all["vmm_memory_kib"].as_f64() {
        println!("Memory of daxvm beside the guest's: {:.1} MiB.", kib / 1024.0);
    }
    Ok(ended.success() && written)
}

/// Copies this project's files, which standard input names, to `share`, makes the large one, and lists their checksums.
fn prepare(share: &Path) -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut names = Vec::new();
    for name in std::io::read_to_string(std::io::stdin())?.split_terminator('\0') {
        let (from, to) = (root.join(name), share.join(name));
        // Deleted in the working tree, or empty: nothing to read.
        if fs::metadata(&from).map_or(0, |metadata| metadata.len()) == 0 {
            continue;
        }
        fs::create_dir_all(to.parent().ok_or("a file at the root")?)?;
        fs::copy(from, to)?;
        names.push(name.to_owned());
    }
    Content { seed: 1, len: BIG_SIZE }.write_to(&share.join(BIG))?;
    names.push(BIG.to_owned());
    let mut sums = String::new();
    for name in names {
        sums += &format!("{}  {name}\n", sha256(&share.join(&name))?);
    }
    Ok(fs::write(share.join(SUMS), sums)?)
}

fn sha256(path: &Path) -> Result<String> {
    let (mut file, mut hash) = (File::open(path)?, Hasher::default());
    let mut block = vec![0; 1 << 20];
    loop {
        match file.read(&mut block)? {
            0 => return Ok(hash.finish()),
            n => hash.update(&block[..n]),
        }
    }
}

/// The command in the guest.
fn guest() -> Result<bool> {
    let mut tools = Tools(Agent::default());
    let path = |name: &str| Path::new("/mnt").join(name);
    println!("guest: Linux {}", fs::read_to_string("/proc/sys/kernel/osrelease")?.trim());
    step("guest: mount -t virtiofs -o dax=inode source /mnt", || {
        let (fstype, source, options) = ("virtiofs".into(), "source".into(), "dax=inode".into());
        tools.perform::<()>(Op::Mount(Mount { fstype, source, target: "/mnt".into(), options }))
    })?;
    println!();
    for name in ["README.md", "Cargo.toml", BIG] {
        let stat = tools.stat(&path(name))?;
        println!("       {name:<20} {:>10} bytes   DAX: {}", stat.size, if stat.dax { "yes" } else { "no" });
    }
    let sums = fs::read_to_string(path(SUMS))?;
    let sums: Vec<_> = sums.lines().filter_map(|line| line.split_once("  ")).collect();
    let (mut same, mut dax) = (0, 0);
    step(&format!("guest: read(2) all {} files, compare SHA-256 with the host", sums.len()), || {
        for (i, (sum, name)) in sums.iter().enumerate() {
            dax += usize::from(tools.stat(&path(name))?.dax);
            same += usize::from(tools.sha256(&path(name), Access::Read(128 << 10))? == *sum);
            if i % 20 == 19 {
                print!(".");
                std::io::stdout().flush()?;
            }
        }
        Ok(())
    })?;
    let mapped =
        step("guest: read the large file again, through mmap", || tools.sha256(&path(BIG), Access::Mmap))?;
    same += usize::from(sums.iter().any(|(sum, name)| *name == BIG && *sum == mapped));
    step("guest: write through a shared mapping, fsync", || tools.rewrite(&path(BIG)))?;
    step("guest: unmount", || tools.perform::<()>(Op::Umount("/mnt".into(), false)))?;
    let checks = sums.len() + 1;
    println!("\n{same} of {checks} checksums agree, {dax} of {} files are DAX.", sums.len());
    Ok(same == checks && dax == sums.len())
}

/// What the guest tests' agent does over a console, done directly.
struct Tools(Agent);

impl Tools {
    fn perform<T: DeserializeOwned>(&mut self, op: Op) -> Result<T> {
        let reply = self.0.perform(op).map_err(|failure| failure.to_string())?;
        Ok(serde_json::from_value(reply)?)
    }

    fn stat(&mut self, path: &Path) -> Result<Stat> {
        self.perform(Op::Stat(path.into()))
    }

    fn sha256(&mut self, path: &Path, how: Access) -> Result<String> {
        let request = Sha256 { path: path.into(), how, readers: 1 };
        let digests: Vec<Digest> = self.perform(Op::Sha256(request))?;
        Ok(digests.into_iter().map(|digest| digest.sha256).collect())
    }

    fn rewrite(&mut self, path: &Path) -> Result<()> {
        let data = Data::Content(REWRITTEN);
        self.perform(Op::Write(WriteFile {
            path: path.into(),
            offset: 0,
            data,
            mmap: true,
            fsync: true,
            writers: 2,
        }))
    }
}
