//! `daxvm run -- CMD`: real jobs, and many of them.

use std::fs;
use std::path::Path;
use std::time::Duration;

use tests::vm::{CommandRun, Kernel, scratch};

use crate::harness::{Outcome, ensure, ensure_eq};
use crate::runner::{RunnerCheck, ensure_end};
use crate::runner_ends::processes;

/// The checks that need one kernel only.
pub fn checks() -> Vec<(&'static str, RunnerCheck)> {
    vec![("cargo-test-of-a-crate", cargo_test)]
}

/// The check that takes as long as its number of boots, which BOOTS changes.
pub const LONG: (&str, RunnerCheck) = ("two-hundred-boots", many_boots);

const LIB: &str = "/// Adds.\npub fn add(a: u32, b: u32) -> u32 {\n    a + b\n}\n";
const TEST: &str = "#[test]\nfn it_adds() {\n    assert_eq!(sums::add(2, 3), 5);\n}\n";

/// The host's toolchain builds and tests a crate in the guest; only the target directory is written to.
fn cargo_test(kernel: &Kernel) -> Outcome {
    let dir = tempfile::tempdir_in(scratch())?;
    let path = |name: &str| dir.path().join(name);
    for name in ["src", "tests", "target"] {
        fs::create_dir(path(name))?;
    }
    fs::write(path("Cargo.toml"), "[package]\nname = \"sums\"\nversion = \"0.1.0\"\nedition = \"2021\"\n")?;
    fs::write(path("src/lib.rs"), LIB)?;
    fs::write(path("tests/adds.rs"), TEST)?;
    let run = CommandRun::new(kernel, &["cargo", "test", "--offline", "--test", "adds"])
        .memory("1536M")
        .options(["--env", "CARGO_HOME", "--env", "RUSTUP_HOME"])
        .option("--rw")
        .option(path("target"))
        // A compiler of 150 MB, read by an emulated host from another machine.
        .deadline(Duration::from_secs(900));
    let mut running = run.start_with(|command| {
        command.current_dir(dir.path());
    })?;
    drop(running.child.stdin.take());
    let ended = running.wait()?;
    ensure_end(&ended, 0, "exited")?;
    let printed = String::from_utf8_lossy(&ended.stdout).into_owned();
    ensure!(printed.contains("test result: ok. 1 passed"), "it printed {printed}\n{}", ended.stderr);
    ensure!(path("target/debug/deps").is_dir(), "the host has nothing of what was built");
    ensure!(!path("Cargo.lock").exists(), "Cargo.lock has come to the host");
    Ok(())
}

/// Each boot ends, and all of them together leave nothing.
fn many_boots(kernel: &Kernel) -> Outcome {
    let boots: u32 = match std::env::var("BOOTS") {
        Ok(text) => text.parse()?,
        Err(_) => 200,
    };
    let temporary = tempfile::tempdir_in(scratch())?;
    let boot = || -> Outcome {
        let mut running = CommandRun::new(kernel, &["true"]).start_with(|command| {
            command.env("TMPDIR", temporary.path());
        })?;
        drop(running.child.stdin.take());
        let ended = running.wait()?;
        ensure_end(&ended, 0, "exited")?;
        ensure_eq!((ended.stdout.len(), ended.stderr.as_str()), (0, ""), "what it printed");
        Ok(())
    };
    // What the host sets up once is no residue.
    boot()?;
    let before = Host::now()?;
    for number in 1..=boots {
        boot().map_err(|error| format!("boot {number} of {boots}: {error}"))?;
    }
    ensure!(processes()?.is_empty(), "left behind: {:?}", processes()?);
    let files = names(temporary.path())?;
    ensure!(files.is_empty(), "left in TMPDIR: {files:?}");
    before.ensure_unchanged()
}

/// What boots could use up.
pub struct Host {
    available_kib: u64,
    open_files: u64,
    shared: Vec<String>,
}

impl Host {
    pub fn now() -> Result<Host, Box<dyn std::error::Error>> {
        // What can be given back is not in use.
        fs::write("/proc/sys/vm/drop_caches", "3")?;
        let meminfo = fs::read_to_string("/proc/meminfo")?;
        let available = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
        let available = available.and_then(|text| text.split_whitespace().next()).ok_or("no MemAvailable")?;
        let files = fs::read_to_string("/proc/sys/fs/file-nr")?;
        let open = files.split_whitespace().next().ok_or("no count of files")?;
        let shared = [names(Path::new("/dev/shm"))?, names(Path::new("/run"))?].concat();
        Ok(Host { available_kib: available.parse()?, open_files: open.parse()?, shared })
    }

    /// Whether nothing has been used up since.
    pub fn ensure_unchanged(&self) -> Outcome {
        let after = Host::now()?;
        ensure_eq!(after.shared, self.shared, "/dev/shm and /run");
        // The kernel's own caches vary; a guest that stayed would be 512 MiB, and a descriptor a boot 200 of them.
        ensure!(
            after.available_kib + (64 << 10) > self.available_kib,
            "{} KiB of memory were available, now {}",
            self.available_kib,
            after.available_kib
        );
        ensure!(
            after.open_files < self.open_files + 50,
            "{} files were open on the host, now {}",
            self.open_files,
            after.open_files
        );
        Ok(())
    }
}

/// The names in a directory, sorted.
pub fn names(dir: &Path) -> std::io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}
