//! Boots that many checks share.

use std::env;
use std::error::Error;
use std::fmt::Display;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use libtest_mimic::{Completion, Failed, Trial};
use tempfile::TempDir;
use tests::guest::Op;
use tests::guest::data::Content;
use tests::vm::{Ended, Kernel, Share, Vm, VmError};

use crate::ledger::{Expected, Ledger};
use crate::per_file;

/// What a check comes to.
pub type Outcome = Result<(), Box<dyn Error>>;
/// A check on a file system of a guest.
pub type Check = fn(&mut Scene) -> Outcome;
/// Checks by name.
pub type Checks = Vec<(&'static str, Check)>;
/// A check that takes the guest with it.
pub type LastCheck = fn(Vm, &Places, &Ledger) -> Outcome;

/// The file systems shared from, as the lab names them.
pub const PLACES: [&str; 2] = ["ext4", "tmpfs"];

/// Those that only per-file DAX is checked on, as it depends on what a file system stores.
pub const MORE_PLACES: [&str; 1] = ["xfs"];

/// The shares of each file system, by what follows its name in their tags. Nobody but the last check of a boot uses
/// `-counts`.
const SHARES: [&str; 5] = ["", "-small", "-never", "-ro", "-counts"];

/// The file whose content checks compare, in every share.
pub const BIG: Content = Content { seed: 64, len: 64 << 20 };

/// The big file's SHA-256.
pub static BIG_SHA256: LazyLock<String> = LazyLock::new(|| BIG.sha256());

/// How long each test took: hosts that are emulated make the slowest ones matter.
static TIMES: Mutex<Vec<(Duration, String)>> = Mutex::new(Vec::new());

/// Says which tests took longest.
pub fn print_slowest() {
    let mut times = TIMES.lock().unwrap_or_else(PoisonError::into_inner);
    times.sort_by_key(|(time, _)| std::cmp::Reverse(*time));
    for (time, name) in times.iter().take(10).filter(|(time, _)| *time > Duration::from_secs(1)) {
        println!("{:>7.1} s  {name}", time.as_secs_f64());
    }
}

/// Returns an error unless a condition holds.
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err(format!($($message)+).into());
        }
    };
}

/// Returns an error unless two values are equal.
macro_rules! ensure_eq {
    ($left:expr, $right:expr) => {
        crate::harness::ensure_eq!($left, $right, "{}", stringify!($left))
    };
    ($left:expr, $right:expr, $($what:tt)+) => {
        match (&$left, &$right) {
            (left, right) if left == right => {}
            (left, right) => {
                return Err(format!("{}: {left:?}, expected {right:?}", format_args!($($what)+)).into());
            }
        }
    };
}
pub(crate) use {ensure, ensure_eq};

/// How much is checked of a boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Everything.
    Full,
    /// What processors and interrupts have a part in; names and attributes are the same with any number of them.
    Light,
    /// What takes long.
    Long,
    /// Per-file DAX on one file system, with shares of its own.
    PerFile(&'static str),
    /// What is left of that after a reboot.
    PerFileAgain(&'static str),
}

/// The scratch directories, one a file system.
#[derive(Clone)]
pub struct Places(Arc<Vec<(&'static str, TempDir)>>);

impl Places {
    /// Makes them, or says why no test can run here.
    pub fn find() -> Result<Places, String> {
        fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .map_err(|error| format!("/dev/kvm: {error}; run this program with scripts/lab exec"))?;
        let make = |name: &'static str| {
            let variable = format!("LAB_{}", name.to_uppercase());
            let dir = env::var_os(&variable).ok_or(format!(
                "{variable} names no directory; run this program with scripts/lab exec, as root"
            ))?;
            let dir = tempfile::Builder::new().prefix("guest-").tempdir_in(&dir);
            dir.map(|dir| (name, dir)).map_err(|error| format!("{variable}: {error}"))
        };
        Ok(Places(Arc::new(PLACES.into_iter().chain(MORE_PLACES).map(make).collect::<Result<_, String>>()?)))
    }

    /// A file system's directory.
    pub fn dir(&self, name: &str) -> &Path {
        let place = self.0.iter().find(|(place, _)| *place == name);
        place.map_or(Path::new("/nonexistent"), |(_, dir)| dir.path())
    }

    /// Fills them: each share needs the big file.
    fn prepare(&self) -> io::Result<()> {
        static PREPARED: OnceLock<Result<(), String>> = OnceLock::new();
        let prepare = || {
            for (_, dir) in self.0.iter().filter(|(place, _)| PLACES.contains(place)) {
                for share in ["main", "counts"] {
                    fs::create_dir(dir.path().join(share))?;
                    BIG.write_to(&dir.path().join(share).join("big"))?;
                }
            }
            Ok::<_, io::Error>(())
        };
        let prepared = PREPARED.get_or_init(|| prepare().map_err(|error| error.to_string()));
        prepared.clone().map_err(io::Error::other)
    }

    /// Removes them.
    pub fn remove(self) -> io::Result<()> {
        match Arc::into_inner(self.0) {
            Some(dirs) => dirs.into_iter().try_for_each(|(_, dir)| dir.close()),
            None => Err(io::Error::other("a test still has them")),
        }
    }
}

/// A boot that checks share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Boot {
    /// The kernel's name.
    pub kernel: &'static str,
    /// The number of processors.
    pub cpus: u32,
    /// How much is checked.
    pub scope: Scope,
}

/// The guest that runs at the moment. Only one does: hosts may be small.
static CURRENT: Mutex<Option<Running>> = Mutex::new(None);

struct Running {
    boot: Boot,
    vm: Option<Vm>,
    ledger: Ledger,
}

/// Ends the guest that runs at the moment, if any.
pub fn end_current() {
    CURRENT.lock().unwrap_or_else(PoisonError::into_inner).take();
}

impl Boot {
    fn name(&self, check: impl Display) -> String {
        let kernel = self.kernel.trim_end_matches("-cloud");
        match self.scope {
            Scope::Long => format!("{kernel}/long/{check}"),
            _ => format!("{kernel}/{}cpu/{check}", self.cpus),
        }
    }

    /// Adds a test for each check on one file system.
    pub fn trials(
        self,
        places: &Result<Places, String>,
        place: &'static str,
        checks: Checks,
        trials: &mut Vec<Trial>,
    ) {
        for (name, check) in checks {
            let per_file = matches!(self.scope, Scope::PerFile(_) | Scope::PerFileAgain(_));
            let part = if per_file { "per-file/" } else { "" };
            let name = self.name(format_args!("{place}/{part}{name}"));
            let mine = name.clone();
            trials.push(trial(name, places, move |places| {
                self.with_guest(places, |vm, ledger| {
                    let dir = places.dir(place).join(self.dir_of(""));
                    let mut scene = Scene { vm, boot: self, place, dir, mounts: 0, ledger };
                    let outcome = check(&mut scene);
                    // Whatever the next check does should not depend on where this one stopped.
                    outcome.map_err(|error| format!("{mine}: {error}").into())
                })
            }));
        }
    }

    /// Adds tests for the end of the boot.
    pub fn last_trials(
        self,
        places: &Result<Places, String>,
        checks: Vec<(&'static str, LastCheck)>,
        trials: &mut Vec<Trial>,
    ) {
        for (name, check) in checks {
            trials.push(trial(self.name(name), places, move |places| {
                self.with_guest(places, |_, _| Ok(()))?;
                let taken = CURRENT.lock().unwrap_or_else(PoisonError::into_inner).take();
                match taken {
                    Some(Running { vm: Some(vm), ledger, .. }) => check(vm, places, &ledger),
                    _ => Err("the guest is gone".into()),
                }
            }));
        }
    }

    /// Runs something in this boot's guest, which is booted if it does not run yet.
    fn with_guest(self, places: &Places, work: impl FnOnce(&mut Vm, &mut Ledger) -> Outcome) -> Outcome {
        let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        if current.as_ref().is_none_or(|running| running.boot != self) {
            // The old one first: two would not fit everywhere.
            current.take();
            let running = current.insert(Running { boot: self, vm: None, ledger: Ledger::new() });
            running.vm = Some(self.start(places)?);
        }
        let Some(Running { vm: Some(vm), ledger, .. }) = current.as_mut() else {
            return Err("this boot's guest never came up: see the first check that failed".into());
        };
        if vm.is_lost() {
            return Err("this boot's guest is gone: see the check that lost it".into());
        }
        work(vm, ledger)
    }

    /// The directory of a share, relative to that of its file system.
    fn dir_of(self, suffix: &str) -> PathBuf {
        match self.scope {
            Scope::PerFile(_) | Scope::PerFileAgain(_) => {
                Path::new("per-file").join(suffix.trim_start_matches('-'))
            }
            _ if suffix == "-counts" => "counts".into(),
            _ => "main".into(),
        }
    }

    /// The tags of the shares, in the order of their devices.
    pub fn share_tags(self) -> impl Iterator<Item = String> {
        PLACES.into_iter().flat_map(|place| SHARES.map(|suffix| format!("{place}{suffix}")))
    }

    fn start(self, places: &Places) -> Result<Vm, Box<dyn Error>> {
        let kernel = Kernel::find(self.kernel)?;
        match self.scope {
            Scope::PerFile(place) => {
                return per_file::first_boot(kernel, self.cpus, place, places.dir(place));
            }
            Scope::PerFileAgain(place) => {
                return per_file::second_boot(kernel, self.cpus, place, places.dir(place));
            }
            Scope::Full | Scope::Light | Scope::Long => {}
        }
        places.prepare()?;
        let mut builder = Vm::builder(&kernel).cpus(self.cpus).memory("512M");
        for place in PLACES {
            for suffix in SHARES {
                let dir = places.dir(place).join(self.dir_of(suffix));
                let share = Share::new(&format!("{place}{suffix}"), dir);
                builder = builder.share(match suffix {
                    "-small" => share.window("32M").dax("always"),
                    "-never" => share.window("32M").dax("never"),
                    "-ro" => share.window("32M").dax("always").read_only(),
                    _ => share.window("128M").dax("always"),
                });
            }
        }
        let mut vm = builder.boot()?;
        let processors = vm.read_text("/sys/devices/system/cpu/online")?;
        let all = if self.cpus == 1 { "0".to_owned() } else { format!("0-{}", self.cpus - 1) };
        ensure_eq!(processors.trim(), all, "processors online");
        Ok(vm)
    }
}

/// A test that needs a host with KVM and scratch directories. Those that take a quarter of an hour and more have a name with
/// `/long/`, and run when they are asked for: `scripts/test long`.
pub fn trial(
    name: String,
    places: &Result<Places, String>,
    run: impl FnOnce(&Places) -> Outcome + Send + 'static,
) -> Trial {
    let places = places.clone();
    let is_long = name.contains("/long/");
    let trial = Trial::ignorable_test(name.clone(), move || match places {
        Err(why) => Ok(Completion::ignored_with(why)),
        Ok(places) => {
            let start = Instant::now();
            let outcome = run(&places);
            TIMES.lock().unwrap_or_else(PoisonError::into_inner).push((start.elapsed(), name));
            outcome.map(|()| Completion::Completed).map_err(|error| Failed::from(error.to_string()))
        }
    });
    trial.with_ignored_flag(is_long)
}

/// A test that boots machines of its own, so the one that serves other checks is ended before. `name` follows the kernel's.
pub fn own_trial(
    kernel: &'static str,
    name: &str,
    places: &Result<Places, String>,
    run: impl FnOnce(&Kernel, &Places) -> Outcome + Send + 'static,
) -> Trial {
    trial(format!("{}/{name}", kernel.trim_end_matches("-cloud")), places, move |places| {
        end_current();
        run(&Kernel::find(kernel)?, places)
    })
}

/// Where a check plays: a guest, and one file system that the host shares with it.
pub struct Scene<'a> {
    /// The guest.
    pub vm: &'a mut Vm,
    /// The boot it came from.
    pub boot: Boot,
    /// The file system: also the tag of its share. The others have `-small`, `-never`, `-ro`, `-counts` at the end.
    pub place: &'static str,
    /// The shared directory on the host.
    pub dir: PathBuf,
    mounts: u32,
    ledger: &'a mut Ledger,
}

impl Scene<'_> {
    /// Mounts a share of this file system, does something there and unmounts it; `suffix` says which share.
    pub fn mounted(
        &mut self,
        suffix: &str,
        options: &str,
        work: impl FnOnce(&mut Self, &str) -> Outcome,
    ) -> Outcome {
        let (tag, target) =
            (format!("{}{suffix}", self.place), format!("/mnt/{}{suffix}-{}", self.place, self.mounts));
        self.mounts += 1;
        self.vm.mount(&tag, &target, options)?;
        match work(self, &target) {
            Ok(()) => Ok(self.vm.umount(&target)?),
            Err(error) => {
                // What went wrong is the news; what is still open must not keep the next check from mounting.
                let _ = self.vm.run(Op::Umount(target.into(), true));
                Err(error)
            }
        }
    }

    /// The directory of a share on the host.
    pub fn share_dir(&self, suffix: &str) -> PathBuf {
        self.dir.join(suffix.trim_start_matches('-'))
    }

    /// What the device should have counted about a share in the end; checks add what they expect.
    pub fn expect(&mut self, suffix: &str) -> &mut Expected {
        self.ledger.entry(format!("{}{suffix}", self.place)).or_default()
    }

    /// A directory for one check, in the share: its name, empty on the host.
    pub fn fresh_dir(&self, name: &str) -> io::Result<PathBuf> {
        let dir = self.dir.join(name);
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        fs::create_dir(&dir)?;
        Ok(dir)
    }
}

/// A file's difference from its content, on the host.
pub fn ensure_content(path: &Path, content: Content) -> Outcome {
    let differs = content.differs_from(&fs::File::open(path)?)?;
    ensure_eq!(differs, None, "the first difference of {} on the host", path.display());
    Ok(())
}

/// An operation that must fail, and with what.
pub fn ensure_errno<T>(result: Result<T, VmError>, errnos: &[i32], what: &str) -> Outcome {
    match result {
        Ok(_) => Err(format!("{what}: it was possible").into()),
        Err(error) if error.errno().is_some_and(|errno| errnos.contains(&errno)) => Ok(()),
        Err(error) => Err(format!("{what}: {error}, expected one of {errnos:?}").into()),
    }
}

/// The status and the reason of an end.
pub fn ensure_ended(ended: &Ended, status: i32, reason: &str) -> Outcome {
    ensure_eq!(ended.status, Some(status), "the exit status\n{}", ended.console);
    ensure_eq!(ended.report.reason, reason, "the reason in the report {}", ended.report.all);
    Ok(())
}
