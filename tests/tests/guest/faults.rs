//! daxvm is killed, or its host's disk loses power, while the guest writes: what the guest made durable is there, and nothing
//! else is another than before or left behind.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use tempfile::TempDir;
use tests::guest::data::word;
use tests::guest::journal::{RECORD, SLOTS, Way, record};
use tests::guest::{Journal, Op};
use tests::vm::{Kernel, Share, Vm, VmBuilder, scratch};

use crate::faults_of_host;
use crate::harness::{Outcome, PLACES, Places, ensure, ensure_ended, ensure_eq, own_trial};
use crate::host_file_systems::{Disk, ext4};
use crate::runner_ends::{processes, traces};
use crate::runner_jobs::{Host, names};

/// A check with a kernel.
pub type FaultCheck = fn(&Kernel, &Places) -> Outcome;

/// The shares of the checks here, by tag: what is written through the window, and what by requests.
const TAGS: [&str; 2] = ["dax", "plain"];

/// How long the guest may take to get on with its work, before `DEADLINE_SCALE`.
const PATIENCE: Duration = Duration::from_secs(60);

/// The checks of one kernel; how often daxvm is killed in the long one `KILLS` in the environment changes, and `KILL_SEED`
/// repeats the moments of a run.
pub fn trials(places: &Result<Places, String>, kernel: &'static str, trials: &mut Vec<Trial>) {
    let mut checks: Vec<(String, FaultCheck)> = vec![
        ("faults/killed-while-writing".into(), |kernel, places| killed(kernel, places, 10)),
        ("faults/power-cut-while-writing".into(), |kernel, places| power_cuts(kernel, places, 3)),
        ("long/faults/killed-two-hundred-times".into(), |kernel, places| {
            let times = std::env::var("KILLS").map_or(Ok(200), |text| text.parse())?;
            killed(kernel, places, times)
        }),
    ];
    checks.extend(faults_of_host::checks());
    for (name, check) in checks {
        trials.push(own_trial(kernel, &name, places, check));
    }
}

/// A directory of the host in which two shares are, and other files beside them.
struct Site {
    dir: TempDir,
    beside: BTreeMap<PathBuf, String>,
}

impl Site {
    fn new(place: &Path) -> Result<Site, Box<dyn Error>> {
        let dir = tempfile::tempdir_in(place)?;
        for name in TAGS.into_iter().chain(["beside"]) {
            fs::create_dir(dir.path().join(name))?;
        }
        fs::write(dir.path().join("beside/file"), record(1))?;
        fs::hard_link(dir.path().join("beside/file"), dir.path().join("beside/link"))?;
        std::os::unix::fs::symlink("../beside/file", dir.path().join("beside/symlink"))?;
        let beside = Site::look(dir.path())?;
        Ok(Site { dir, beside })
    }

    /// Everything but what is in the shares: names, and whatever of a file could be changed.
    fn look(dir: &Path) -> Result<BTreeMap<PathBuf, String>, Box<dyn Error>> {
        let mut found = BTreeMap::new();
        for dir in [dir.to_owned(), dir.join("beside")] {
            for name in names(&dir)? {
                let path = dir.join(&name);
                let data = fs::symlink_metadata(&path)?;
                let content = if data.is_file() {
                    tests::guest::data::first_difference(1, 8, &fs::read(&path)?[8..])
                } else {
                    None
                };
                let (ctime, is_share) = ((data.ctime(), data.ctime_nsec()), TAGS.contains(&name.as_str()));
                let times = if is_share { None } else { Some((ctime, data.mtime(), data.nlink())) };
                let what = (data.mode(), data.uid(), data.gid(), data.ino(), times, content);
                found.insert(path, format!("{what:?}"));
            }
        }
        Ok(found)
    }

    fn ensure_unchanged(&self) -> Outcome {
        ensure_eq!(Site::look(self.dir.path())?, self.beside, "what is beside the shares");
        Ok(())
    }

    /// A machine with both shares.
    fn builder(&self, kernel: &Kernel) -> VmBuilder {
        builder(kernel, self.dir.path())
    }
}

fn builder(kernel: &Kernel, dir: &Path) -> VmBuilder {
    let share = |tag: &str| Share::new(tag, dir.join(tag)).window("32M");
    Vm::builder(kernel)
        .cpus(2)
        .share(share("dax").dax("always"))
        .share(Share::new("plain", dir.join("plain")).window("0").dax("never"))
}

/// Makes a directory in both shares, in which `records` of each journal are to be written.
fn journals(vm: &mut Vm, dir: &Path, name: &str, records: u64) -> Result<Op, Box<dyn Error>> {
    let mut dirs = Vec::new();
    for tag in TAGS {
        fs::create_dir(dir.join(tag).join(name))?;
        let (target, options) = (format!("/mnt/{tag}"), if tag == "dax" { "dax=always" } else { "" });
        vm.mount(tag, &target, options)?;
        dirs.push(format!("{target}/{name}").into());
    }
    Ok(Op::Journal(Journal { dirs, records }))
}

/// How many records of each journal the guest has said to be durable, by the path in it.
fn synced(console: &str) -> BTreeMap<String, u64> {
    let mut synced = BTreeMap::new();
    for line in console.lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        let Some([path, number]) =
            words.iter().position(|word| *word == "synced").and_then(|at| words.get(at + 1..at + 3))
        else {
            continue;
        };
        // The last line may be cut off, and the number with it: a smaller one is true as well.
        if let Ok(number) = number.parse::<u64>() {
            let newest = synced.entry((*path).to_owned()).or_default();
            *newest = number.max(*newest);
        }
    }
    synced
}

/// The paths of all journals in a directory of both shares, as the guest says them.
fn journal_paths(name: &str) -> impl Iterator<Item = (&'static str, Way, String)> {
    let paths = move |tag| Way::ALL.map(|way| (tag, way, format!("/mnt/{tag}/{name}/{}", way.file_name())));
    TAGS.into_iter().flat_map(paths)
}

/// Waits until so many records are durable, over all journals, and so many in each.
fn wait_for_records(vm: &Vm, name: &str, wanted: u64, of_each: u64) -> Outcome {
    let scale: f64 = std::env::var("DEADLINE_SCALE").ok().and_then(|text| text.parse().ok()).unwrap_or(1.0);
    let end = Instant::now() + PATIENCE.mul_f64(scale);
    loop {
        let synced = synced(&vm.console());
        let found = synced.values().sum::<u64>();
        let least = journal_paths(name)
            .map(|(_, _, path)| synced.get(&path).copied().unwrap_or(0))
            .min()
            .unwrap_or(0);
        if found >= wanted && least >= of_each {
            return Ok(());
        }
        ensure!(
            Instant::now() < end,
            "{found} of {wanted} records are durable: {synced:?}\n{}",
            vm.console()
        );
        thread::sleep(Duration::from_millis(20));
    }
}

/// Compares all journals below `dir` with what the guest has said of them; returns how many records are there in all. A
/// journal of which it has said nothing is not looked at, as its file may not be there.
fn ensure_durable(dir: &Path, name: &str, synced: &BTreeMap<String, u64>) -> Result<u64, Box<dyn Error>> {
    let mut all = 0;
    for (tag, way, path) in journal_paths(name) {
        if let Some(&synced) = synced.get(&path) {
            all += way.check(&dir.join(tag).join(name), synced)?;
        }
    }
    Ok(all)
}

/// Kills daxvm so many times at moments that a seed chooses, one machine after another on the same files.
fn killed(kernel: &Kernel, places: &Places, times: u64) -> Outcome {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
    let seed = std::env::var("KILL_SEED").map_or(Ok(now), |text| text.parse())?;
    println!("{times} kills, KILL_SEED={seed}");
    let sites = [Site::new(places.dir(PLACES[0]))?, Site::new(places.dir(PLACES[1]))?];
    let outputs = TempDir::new_in(scratch())?;
    // What the host sets up once is no residue, so a machine has run before it is looked at.
    with_outputs(sites[0].builder(kernel), outputs.path()).boot()?.kill()?;
    let before = (traces()?, Host::now()?);
    let mut records = (0, 0);
    for turn in 0..times {
        let site = &sites[(turn % 2) as usize];
        let mut moment = Moment::of(seed, turn);
        // Early kills may come before a journal's first record; on each site one comes after it, in each journal.
        moment.of_each = u64::from(turn + sites.len() as u64 >= times);
        let (durable, found) = kill(kernel, site, outputs.path(), turn, moment)
            .map_err(|error| format!("kill {turn} of {times} with KILL_SEED={seed}, {moment:?}: {error}"))?;
        records = (records.0 + durable, records.1 + found);
        sites.iter().try_for_each(Site::ensure_unchanged)?;
        ensure_eq!(traces()?, before.0, "processes and temporary files after kill {turn}");
    }
    let (durable, found) = records;
    println!("{durable} records were durable, {found} were there");
    before.1.ensure_unchanged()?;
    sites.iter().try_for_each(|site| lives_after(kernel, site, outputs.path()))
}

/// When daxvm is killed: so many records are durable, and so many in each journal, and some time has gone since.
#[derive(Clone, Copy, Debug)]
struct Moment {
    records: u64,
    of_each: u64,
    later: Duration,
}

impl Moment {
    fn of(seed: u64, turn: u64) -> Moment {
        // Mostly early, as each record is an fsync; every eighth time there is time for slots to be written again.
        let most = if word(seed, 3 * turn + 2).is_multiple_of(8) { 8 * SLOTS } else { SLOTS };
        let records = word(seed, 3 * turn) % most;
        Moment { records, of_each: 0, later: Duration::from_micros(word(seed, 3 * turn + 1) % 50_000) }
    }
}

/// Kills daxvm once. Returns how many records were durable, and how many were there.
fn kill(
    kernel: &Kernel,
    site: &Site,
    outputs: &Path,
    turn: u64,
    moment: Moment,
) -> Result<(u64, u64), Box<dyn Error>> {
    let mut vm = with_outputs(site.builder(kernel), outputs).boot()?;
    let name = format!("turn-{turn}");
    let dir = site.dir.path();
    let op = journals(&mut vm, dir, &name, u64::MAX)?;
    vm.begin(&op)?;
    wait_for_records(&vm, &name, moment.records, moment.of_each)?;
    thread::sleep(moment.later);
    let ended = vm.kill()?;
    ensure_eq!(ended.status, None, "daxvm ended by itself\n{}", ended.console);
    ensure_eq!(ended.report.reason, "", "a report of a machine that was killed");
    ensure!(processes()?.is_empty(), "processes: {:?}", processes()?);
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let root = dir.to_str().ok_or("a path that is no text")?;
    ensure!(!mounts.contains(root), "mounts are left:\n{mounts}");
    let synced = synced(&ended.console);
    let found = ensure_durable(dir, &name, &synced)?;
    // What is there is what the journals are made of.
    for tag in TAGS {
        let known: BTreeSet<_> =
            Way::ALL.iter().flat_map(|way| way.file_names()).map(|name| (*name).to_owned()).collect();
        let found = names(&dir.join(tag).join(&name))?;
        ensure!(found.iter().all(|name| known.contains(name)), "{tag} has {found:?}");
        for file in found {
            let len = dir.join(tag).join(&name).join(&file).metadata()?.len();
            ensure!(len <= SLOTS * RECORD as u64, "{tag}/{file} has {len} bytes");
        }
        fs::remove_dir_all(dir.join(tag).join(&name))?;
    }
    // The socket is dead, the metrics are whole; beside them at most what was to take their place.
    ensure!(UnixStream::connect(outputs.join("api")).is_err(), "somebody answers on the socket");
    let left = names(outputs)?;
    ensure!(
        left.iter().all(|name| ["api", "metrics", ".metrics.new"].contains(&name.as_str())),
        "left: {left:?}"
    );
    let metrics = fs::read_to_string(outputs.join("metrics"))?;
    ensure!(metrics.ends_with("# EOF\n"), "the metrics are cut off: {metrics}");
    Ok((synced.values().sum(), found))
}

fn with_outputs(builder: VmBuilder, outputs: &Path) -> VmBuilder {
    let builder = builder.argument("--api-socket").argument(outputs.join("api"));
    builder
        .argument("--metrics-file")
        .argument(outputs.join("metrics"))
        .argument("--metrics-interval")
        .argument("100ms")
}

/// What was left is no hindrance: a machine with the same shares, socket and metrics works, and clears up.
fn lives_after(kernel: &Kernel, site: &Site, outputs: &Path) -> Outcome {
    let mut vm = with_outputs(site.builder(kernel), outputs).boot()?;
    UnixStream::connect(outputs.join("api"))?;
    let op = journals(&mut vm, site.dir.path(), "after", 3 * SLOTS + 1)?;
    vm.begin(&op)?;
    vm.finish::<()>(&op)?;
    let synced = synced(&vm.console());
    ensure_eq!(synced.len(), TAGS.len() * Way::ALL.len(), "journals");
    ensure_durable(site.dir.path(), "after", &synced)?;
    for tag in TAGS {
        vm.umount(&format!("/mnt/{tag}"))?;
    }
    ensure_ended(&vm.power_off()?, 0, "power-off")?;
    ensure_eq!(names(outputs)?, ["metrics"], "what is left of a machine that ended by itself");
    site.ensure_unchanged()
}

/// The disk takes nothing any more, in the middle of the writing: what the guest was told is durable had got there.
fn power_cuts(kernel: &Kernel, places: &Places, times: u64) -> Outcome {
    const NAME: &str = "daxvm-power";
    let parent = tempfile::tempdir_in(places.dir("tmpfs"))?;
    let disk = ext4(parent.path(), NAME)?;
    let (device, target) =
        (format!("/dev/mapper/{NAME}"), disk.dir.to_str().ok_or("a path that is no text")?);
    TAGS.iter().try_for_each(|tag| fs::create_dir(disk.dir.join(tag)))?;
    Disk::run(&["sync"])?;
    let table = Disk::run(&["dmsetup", "table", NAME])?;
    let switch_to = |table: &str| -> Outcome {
        Disk::run(&["dmsetup", "--noudevsync", "suspend", "--nolockfs", NAME])?;
        Disk::run(&["dmsetup", "load", NAME, "--table", table])?;
        Disk::run(&["dmsetup", "--noudevsync", "resume", NAME]).map(drop)
    };
    for turn in 0..times {
        let mut vm = builder(kernel, &disk.dir).boot()?;
        let name = format!("turn-{turn}");
        let op = journals(&mut vm, &disk.dir, &name, u64::MAX)?;
        vm.begin(&op)?;
        let wanted = 40 + 60 * turn;
        wait_for_records(&vm, &name, wanted, 1)?;
        // What is said later may have been said of what the disk has refused.
        let synced = synced(&vm.console());
        switch_to("0 65536 error")?;
        // Nobody is told that all is well when it is not: the guest's fsync fails, or the process of it does not come back.
        thread::sleep(Duration::from_millis(200));
        vm.kill()?;
        Disk::run(&["umount", target])?;
        // The mounts of a process that has ended go a moment later, and with them what the file system has in memory.
        while Disk::run(&["dmsetup", "info", "--columns", "--noheadings", "-o", "open", NAME])? != "0" {
            thread::sleep(Duration::from_millis(20));
        }
        switch_to(&table)?;
        Disk::run(&["mount", "-t", "ext4", &device, target])?;
        let found = ensure_durable(&disk.dir, &name, &synced)
            .map_err(|error| format!("power cut {turn}, after {wanted} records: {error}"))?;
        println!("{} records were durable, {found} were there", synced.values().sum::<u64>());
    }
    Ok(())
}
