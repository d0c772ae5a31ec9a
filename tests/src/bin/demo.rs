//! `scripts/demo`: the main job, shown on a real directory. A stock guest mounts this project's source tree and a large
//! file through the DAX window, and every byte that it reads is compared with the host's.

use std::error::Error;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use tests::guest::Access;
use tests::guest::data::{Content, Hasher};
use tests::vm::{Kernel, Share, Vm};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const BIG: &str = "large-file";
const BIG_SIZE: u64 = 64 << 20;
const WINDOW: &str = "256M";

fn main() -> ExitCode {
    match run() {
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

fn run() -> Result<bool> {
    let scratch = std::env::var_os("LAB_EXT4").ok_or("LAB_EXT4 is not set: run scripts/demo")?;
    let share = tempfile::Builder::new().prefix("demo-").tempdir_in(scratch)?;
    let mut files = step("host:  copy the source tree, make a file of 64 MiB", || prepare(share.path()))?;
    files.push(PathBuf::from(BIG));

    let kernel = Kernel::find("6.12-cloud")?;
    let mut vm = step(&format!("guest: boot {} (stock Debian kernel, 2 vCPUs)", kernel.name()), || {
        let source = Share::new("source", share.path()).window(WINDOW);
        Ok(Vm::builder(&kernel).cpus(2).share(source).boot()?)
    })?;
    step("guest: mount -t virtiofs -o dax=inode source /mnt", || {
        Ok(vm.mount("source", "/mnt", "dax=inode")?)
    })?;

    println!();
    let mut dax = 0;
    for name in ["README.md", "Cargo.toml", BIG] {
        let stat = vm.stat(&*format!("/mnt/{name}"))?;
        println!("       {name:<20} {:>10} bytes   DAX: {}", stat.size, if stat.dax { "yes" } else { "no" });
    }
    let mut same = 0;
    step(&format!("guest: read(2) all {} files, compare SHA-256 with the host", files.len()), || {
        for (i, file) in files.iter().enumerate() {
            let name = file.to_str().ok_or("a file name that is no UTF-8")?;
            let path = format!("/mnt/{name}");
            dax += usize::from(vm.stat(&*path)?.dax);
            same += usize::from(
                vm.sha256(&path, Access::Read(128 << 10))?.sha256 == sha256(&share.path().join(file))?,
            );
            if i % 20 == 19 {
                print!(".");
                std::io::stdout().flush()?;
            }
        }
        Ok(())
    })?;
    let mapped = step("guest: read the large file again, through mmap", || {
        Ok(vm.sha256(&format!("/mnt/{BIG}"), Access::Mmap)?.sha256)
    })?;
    same += usize::from(mapped == sha256(&share.path().join(BIG))?);
    let written = step("guest: write through a shared mapping, fsync", || {
        let content = Content { seed: 2, len: BIG_SIZE };
        vm.write_content(&format!("/mnt/{BIG}"), 0, content, true, 2)?;
        Ok(content.differs_from(&File::open(share.path().join(BIG))?)?.is_none())
    })?;
    let ended = step("guest: unmount, power off", || {
        vm.umount("/mnt")?;
        Ok(vm.power_off()?)
    })?;

    let checks = files.len() + 1;
    println!("\n{same} of {checks} checksums agree, {dax} of {} files are DAX,", files.len());
    println!("what the guest wrote is {} the host.", if written { "on" } else { "NOT on" });
    if let Some(window) = ended.report.window("source") {
        println!(
            "Window of {WINDOW}: at most {} chunks of 2 MiB mapped at a time, {} SETUPMAPPINGs, {} mapped now.",
            window.peak_mapped_chunks, window.setup_mappings, window.mapped_chunks
        );
    }
    if let Some(kib) = ended.report.all["vmm_memory_kib"].as_f64() {
        println!("Memory of daxvm beside the guest's: {:.1} MiB.", kib / 1024.0);
    }
    Ok(same == checks && dax == files.len() && written && ended.status == Some(0))
}

/// Copies this project's files, which standard input names, to `share`, makes the large one, and returns the names of the
/// former.
fn prepare(share: &Path) -> Result<Vec<PathBuf>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut files = Vec::new();
    for name in std::io::read_to_string(std::io::stdin())?.split_terminator('\0') {
        let (from, to) = (root.join(name), share.join(name));
        // Deleted in the working tree, or empty: nothing to read.
        if fs::metadata(&from).map_or(0, |metadata| metadata.len()) == 0 {
            continue;
        }
        fs::create_dir_all(to.parent().ok_or("a file at the root")?)?;
        fs::copy(from, to)?;
        files.push(PathBuf::from(name));
    }
    Content { seed: 1, len: BIG_SIZE }.write_to(&share.join(BIG))?;
    Ok(files)
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
