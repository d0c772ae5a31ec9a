//! Where suites run: a directory of one of the lab's file systems, used by the host itself or shared with a guest.

use std::env;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;
use tempfile::TempDir;

use super::suite::{Settings, Suite};
use super::{ConformanceError, Outcome, Outcomes};
use crate::vm::{CommandEnded, CommandRun, Kernel, in_target, scratch};

/// The window is small, so that dbench and stress-ng use more chunks than it has.
const WINDOW: &str = "64M";
/// No suite takes longer; one that hangs is ended by daxvm.
const LIMIT: &str = "12h";

/// A file system of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum FileSystem {
    /// ext4
    Ext4,
    /// xfs
    Xfs,
    /// tmpfs
    Tmpfs,
}

impl FileSystem {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            FileSystem::Ext4 => "ext4",
            FileSystem::Xfs => "xfs",
            FileSystem::Tmpfs => "tmpfs",
        }
    }

    /// A directory on it that others may enter, and that goes with the value.
    fn directory(self) -> Result<TempDir, ConformanceError> {
        let variable = match self {
            FileSystem::Ext4 => "LAB_EXT4",
            FileSystem::Xfs => "LAB_XFS",
            FileSystem::Tmpfs => "LAB_TMPFS",
        };
        let at = env::var_os(variable).ok_or(ConformanceError::NoLab(variable))?;
        open_directory(Path::new(&at))
    }
}

impl std::fmt::Display for FileSystem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// The share's `dax=`, and the mount's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// No file
    Never,
    /// The files with the hint, which here the directory has, and so all that is made in it
    Inode,
    /// Every file
    Always,
}

impl Policy {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Policy::Never => "never",
            Policy::Inode => "inode",
            Policy::Always => "always",
        }
    }
}

impl std::fmt::Display for Policy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// The programs of the suites with their libraries and configurations, where they are read quickly.
pub struct Programs(TempDir);

impl Programs {
    /// Copies them from where scripts/fetch-conformance leaves them.
    ///
    /// # Errors
    /// One is not there.
    pub fn install() -> Result<Programs, ConformanceError> {
        let cache =
            env::var_os("DAXVM_CACHE").map_or_else(|| in_target("cache"), PathBuf::from).join("conformance");
        let dir = open_directory(&scratch())?;
        let programs = ["bin/pjdfstest", "bin/fsx", "debian/usr/bin/stress-ng", "debian/usr/bin/dbench"];
        for file in programs.into_iter().chain(["debian/usr/share/dbench/client.txt"]) {
            copy(&cache.join(file), dir.path())?;
        }
        let program =
            env::current_exe().map_err(|source| ConformanceError::System("find this program", source))?;
        copy(&program, dir.path())?;
        let libraries = dir.path().join("lib");
        fs::create_dir(&libraries).map_err(at(&libraries))?;
        let source = cache.join("debian/usr/lib/x86_64-linux-gnu");
        for library in fs::read_dir(&source).map_err(at(&source))? {
            copy(&library.map_err(at(&source))?.path(), &libraries)?;
        }
        for (name, text) in Suite::files() {
            let path = dir.path().join(name);
            fs::write(&path, text).map_err(at(&path))?;
        }
        Ok(Programs(dir))
    }
}

/// What a run came to.
pub struct GuestRun {
    /// Its cases.
    pub outcomes: Outcomes,
    /// How often the guests mapped a chunk of a file in their windows.
    pub setup_mappings: u64,
}

impl GuestRun {
    /// Whether so many cases passed, and none did not.
    pub fn passed_all(&self, cases: usize) -> bool {
        self.outcomes.len() >= cases && self.outcomes.values().all(|outcome| *outcome == Outcome::Passed)
    }
}

/// Runs a suite on the host.
///
/// # Errors
/// It cannot be started.
pub fn on_host(
    suite: Suite,
    file_system: FileSystem,
    programs: &Programs,
    settings: &Settings,
) -> Result<Outcomes, ConformanceError> {
    let dir = file_system.directory()?;
    let mut parties = Vec::new();
    for party in suite.parties() {
        let (log, path) = log(suite, file_system, "host", party)?;
        let mut command = Command::new("sh");
        command.arg("-c").arg(suite.script(None, settings)).stdin(Stdio::null());
        command
            .env("SUITE", programs.0.path())
            .env("DIR", dir.path())
            .env("WHERE", "host")
            .env("PARTY", party);
        command.env("LD_LIBRARY_PATH", programs.0.path().join("lib")).env("RUST_BACKTRACE", "0");
        let error = log.try_clone().map_err(at(&path))?;
        let child = command.stdout(log).stderr(error).spawn();
        parties.push((party, path, child.map_err(|source| ConformanceError::System("run a suite", source))?));
    }
    let mut outcomes = Outcomes::new();
    for (party, path, mut child) in parties {
        child.wait().map_err(|source| ConformanceError::System("wait for a suite", source))?;
        add(&mut outcomes, party, suite.outcomes(&read(&path)?));
    }
    Ok(outcomes)
}

/// A guest that can run suites.
pub struct Guest(Kernel);

impl Guest {
    /// Finds its kernel.
    ///
    /// # Errors
    /// It has not been fetched.
    pub fn find(kernel: &str) -> Result<Guest, ConformanceError> {
        Ok(Guest(Kernel::find(kernel)?))
    }

    /// Runs a suite in as many guests as it needs, all at once.
    ///
    /// # Errors
    /// A guest cannot be started. One that ends otherwise than by its command has failed a case.
    pub fn run(
        &self,
        suite: Suite,
        file_system: FileSystem,
        policy: Policy,
        programs: &Programs,
        settings: &Settings,
    ) -> Result<GuestRun, ConformanceError> {
        let dir = file_system.directory()?;
        let mut parties = Vec::new();
        for party in suite.parties() {
            let (log, path) = log(suite, file_system, policy.name(), party)?;
            let script =
                format!("{}{}{KERNEL_LOG}", prelude(policy, party), suite.script(Some(policy), settings));
            let options = suite.share_options();
            let share =
                format!("tag=share,dax={policy},window={WINDOW}{options},path={}", dir.path().display());
            let run = CommandRun::shell(&self.0, &script)
                .options(["--timeout", LIMIT, "--share", &share, "--share"])
                .option(format!("tag=suite,ro,dax=never,cache=always,path={}", programs.0.path().display()))
                .boot_timeout(Duration::from_secs(600))
                .deadline(Duration::from_secs(24 * 3600));
            let running = run.start_with(|command| {
                command.stdin(Stdio::null()).stdout(log);
            })?;
            parties.push((party, path, running));
        }
        let mut result = GuestRun { outcomes: Outcomes::new(), setup_mappings: 0 };
        for (party, path, mut running) in parties {
            let ended = running.wait()?;
            let output = read(&path)?;
            let mut outcomes = suite.outcomes(&output);
            outcomes.extend(machine_cases(&output, policy, &ended));
            add(&mut result.outcomes, party, outcomes);
            result.setup_mappings += mappings(&ended);
        }
        Ok(result)
    }
}

/// What the guest does first. The hint of a directory is inherited. A file that is read shows whether there is DAX.
fn prelude(policy: Policy, party: &str) -> String {
    let hint = if policy == Policy::Inode { "chattr +x /share" } else { ":" };
    format!(
        "set -e; mkdir /suite /share; mount -t virtiofs -o ro suite /suite; mount -t virtiofs -o dax={policy} share /share\n\
         {hint}; echo probe >/share/probe-{party}; read line </share/probe-{party}; rm /share/probe-{party}; set +e\n\
         export SUITE=/suite DIR=/share WHERE=guest PARTY={party} LD_LIBRARY_PATH=/suite/lib RUST_BACKTRACE=0\n"
    )
}

/// The last thing that it does: says what its kernel complained of.
const KERNEL_LOG: &str =
    "\necho @kernel\ndmesg | grep -E 'WARNING:|BUG:|Oops|blocked for more than|Call Trace'\necho @end\n";

/// How many cases every guest has.
pub const MACHINE_CASES: usize = 3;

/// Cases that every guest has: its end, its kernel, and that DAX was what the policy says.
fn machine_cases(output: &str, policy: Policy, ended: &CommandEnded) -> [(String, Outcome); MACHINE_CASES] {
    let case = |passed: bool, why: String| if passed { Outcome::Passed } else { Outcome::Failed(why) };
    let end = output.contains("\n@end\n") && ended.report.reason == "exited";
    let reason = &ended.report.reason;
    let status = ended.status;
    let complaints = output.split_once("\n@kernel\n").map_or("", |(_, rest)| rest.trim_end_matches("@end\n"));
    let mappings = mappings(ended);
    [
        ("the guest ends".into(), case(end, format!("{reason}, status {status:?}: {}", ended.stderr))),
        ("its kernel is content".into(), case(complaints.trim().is_empty(), complaints.trim().into())),
        (
            "DAX is used".into(),
            case((mappings > 0) == (policy != Policy::Never), format!("{mappings} mappings")),
        ),
    ]
}

fn mappings(ended: &CommandEnded) -> u64 {
    ended.report.window("share").map_or(0, |window| window.setup_mappings)
}

/// Cases of a party have its name before theirs.
fn add(all: &mut Outcomes, party: &str, outcomes: Outcomes) {
    let name = |case: String| if party.is_empty() { case } else { format!("{party}/{case}") };
    all.extend(outcomes.into_iter().map(|(case, outcome)| (name(case), outcome)));
}

/// The file that a run prints to, below target/conformance.
fn log(
    suite: Suite,
    file_system: FileSystem,
    place: &str,
    party: &str,
) -> Result<(File, PathBuf), ConformanceError> {
    let dir = in_target("conformance");
    fs::create_dir_all(&dir).map_err(at(&dir))?;
    let party = if party.is_empty() { String::new() } else { format!("-{party}") };
    let path = dir.join(format!("{suite}-{file_system}-{place}{party}.log"));
    Ok((File::create(&path).map_err(at(&path))?, path))
}

fn read(path: &Path) -> Result<String, ConformanceError> {
    Ok(String::from_utf8_lossy(&fs::read(path).map_err(at(path))?).into_owned())
}

/// A directory that everybody may enter: suites do things as other users.
fn open_directory(parent: &Path) -> Result<TempDir, ConformanceError> {
    let dir = tempfile::Builder::new().prefix("conformance-").tempdir_in(parent).map_err(at(parent))?;
    fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).map_err(at(dir.path()))?;
    Ok(dir)
}

fn copy(file: &Path, dir: &Path) -> Result<(), ConformanceError> {
    fs::copy(file, dir.join(file.file_name().unwrap_or_default())).map(drop).map_err(at(file))
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> ConformanceError {
    let path = path.to_owned();
    move |source| ConformanceError::File(path, source)
}
