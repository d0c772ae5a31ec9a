//! The host runs short of something, or stands still: what it has to give and what it says, and that the guest goes on.

use std::error::Error;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use tests::guest::data::Content;
use tests::guest::{Access, Contest, Crowd, Fared, Op, OpenHow, ReadOrder, Stat};
use tests::inode_flags;
use tests::vm::{Kernel, Share, Vm, daxvm};

use crate::faults::FaultCheck;
use crate::harness::{Outcome, Places, ensure, ensure_ended, ensure_eq, ensure_errno};
use crate::host_file_systems::{Disk, ext4};

/// Checks by name.
pub fn checks() -> Vec<(String, FaultCheck)> {
    let checks: [(&str, FaultCheck); 10] = [
        ("faults/stopped-and-continued", |kernel, places| stopped(kernel, places, 10)),
        ("faults/clock-jumps", clock_jumps),
        ("faults/slow-disk", slow_disk),
        ("faults/full-tmpfs", |kernel, places| {
            let parent = tempfile::tempdir_in(places.dir("tmpfs"))?;
            full(kernel, &Disk::mount(parent.path(), "tmpfs", "tmpfs", "size=4m")?)
        }),
        ("faults/full-ext4", |kernel, places| {
            let parent = tempfile::tempdir_in(places.dir("tmpfs"))?;
            full(kernel, &ext4(parent.path(), "daxvm-filled")?)
        }),
        ("faults/no-room-for-report-and-metrics", no_room_for_outputs),
        ("faults/too-few-descriptors", too_few_descriptors),
        ("faults/few-descriptors", few_descriptors),
        ("faults/memory-cgroup", memory_cgroup),
        ("faults/stopped-for-a-minute", |kernel, places| stopped(kernel, places, 60)),
    ];
    checks.into_iter().map(|(name, check)| (name.to_owned(), check)).collect()
}

/// Readers of a file.
fn crowd(path: &str, content: Content, readers: usize, mmap: bool) -> Crowd {
    Crowd { files: vec![(path.into(), content)], readers, order: ReadOrder::Random, mmap }
}

fn signal(vm: &Vm, signal: Signal) -> Outcome {
    let pid = Pid::from_raw(vm.host().pid() as i32).ok_or("no process")?;
    Ok(kill_process(pid, signal)?)
}

/// Seconds since the guest's start, by its own clock.
fn uptime(vm: &mut Vm) -> Result<f64, Box<dyn Error>> {
    let text = vm.read_text("/proc/uptime")?;
    Ok(text.split_whitespace().next().ok_or("an empty /proc/uptime")?.parse()?)
}

/// Whether as many seconds have gone for the guest as for the host, about.
fn ensure_passed(guest: f64, host: Duration) -> Outcome {
    let apart = Duration::from_secs_f64((guest - host.as_secs_f64()).abs());
    ensure!(apart < Duration::from_secs(5), "{guest} s have gone for the guest, {host:?} for the host");
    Ok(())
}

/// Processor time that each vCPU has used, in hundredths of a second.
fn vcpus_ticks(vm: &Vm) -> Vec<u64> {
    let threads = vm.host().threads();
    let times = threads.lines().filter_map(|line| {
        // The patrol's thread has such a name, too.
        line.strip_prefix("vcpu-")?.starts_with(|first: char| first.is_ascii_digit()).then_some(())?;
        let (user, system) = line.split(' ').nth(2)?.split_once('+')?;
        Some(user.parse::<u64>().ok()? + system.parse::<u64>().ok()?)
    });
    times.collect()
}

/// daxvm is stopped while all CPUs of its guest are busy. The guest's clock goes on meanwhile, and it must not take its CPUs
/// for ones that hang.
fn stopped(kernel: &Kernel, places: &Places, seconds: u64) -> Outcome {
    let dir = tempfile::tempdir_in(places.dir("tmpfs"))?;
    let content = Content { seed: 81, len: 8 << 20 };
    content.write_to(&dir.path().join("file"))?;
    let share = Share::new("t", dir.path()).window("32M").dax("always");
    let mut vm = Vm::builder(kernel).cpus(2).share(share).boot()?;
    vm.mount("t", "/mnt", "dax=always")?;
    let (start, before) = (Instant::now(), uptime(&mut vm)?);
    let crowds = [true, false].map(|mmap| crowd("/mnt/file", content, 2, mmap)).to_vec();
    let op = Op::Contest(Contest { crowds, millis: 1000 * seconds + 8000 });
    vm.begin(&op)?;
    let (idle, limit) = (vcpus_ticks(&vm), Instant::now() + Duration::from_secs(60));
    ensure_eq!(idle.len(), 2, "vCPUs");
    while vcpus_ticks(&vm).iter().zip(&idle).any(|(now, idle)| now < &(idle + 50)) {
        ensure!(Instant::now() < limit, "the vCPUs are not busy:\n{}", vm.host().threads());
        thread::sleep(Duration::from_millis(50));
    }
    signal(&vm, Signal::STOP)?;
    thread::sleep(Duration::from_secs(seconds));
    let threads = vm.host().threads();
    let mut vcpus = threads.lines().filter(|line| line.starts_with("vcpu-"));
    ensure!(vcpus.all(|line| line.contains(" T ")), "not stopped:\n{threads}");
    signal(&vm, Signal::CONT)?;
    let resumed = Instant::now();
    let fared: Vec<Fared> = vm.finish(&op)?;
    ensure!(
        resumed.elapsed() > Duration::from_secs(1),
        "the readers had ended before the stop did: {fared:?}"
    );
    ensure!(fared.iter().all(|crowd| crowd.wrong.is_none() && crowd.blocks > 0), "{fared:?}");
    ensure_passed(uptime(&mut vm)? - before, start.elapsed())?;
    for complaint in ["lockup", "LOCKUP", "stall", "Marking clocksource", "hung"] {
        let lines: Vec<String> = vm.call(&Op::KernelLog(complaint.into()))?;
        ensure_eq!(lines, Vec::<String>::new(), "what the guest complains of");
    }
    vm.umount("/mnt")?;
    ensure_ended(&vm.power_off()?, 0, "power-off")
}

/// The host's clock, put forward or back. Dropping it puts it right again.
struct Clock(i64);

impl Clock {
    fn moved(seconds: i64) -> Result<Clock, Box<dyn Error>> {
        let clock = Clock(seconds);
        Clock::shift(seconds)?;
        Ok(clock)
    }

    fn shift(seconds: i64) -> Outcome {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
        let wanted = i64::try_from(now.as_secs())? + seconds;
        Disk::run(&["date", "--set", &format!("@{wanted}.{:09}", now.subsec_nanos())]).map(drop)
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        if let Err(error) = Clock::shift(-self.0) {
            eprintln!("the host's clock is {} s ahead: {error}", self.0);
        }
    }
}

/// The host's clock goes forward and back by an hour: no limit of time has to do with it, and what the guest has cached is
/// kept for as long as before.
fn clock_jumps(kernel: &Kernel, places: &Places) -> Outcome {
    let dir = tempfile::tempdir_in(places.dir("ext4"))?;
    let host = dir.path().join("file");
    fs::write(&host, "0")?;
    let share = Share::new("t", dir.path()).window("32M").dax("inode").cache("auto");
    let mut vm = Vm::builder(kernel).share(share).argument("--timeout").argument("30m").boot()?;
    vm.mount("t", "/mnt", "dax=inode")?;
    let start = Instant::now();
    let mut length = 1;
    for seconds in [3600, -3600] {
        let before = uptime(&mut vm)?;
        let clock = Clock::moved(seconds)?;
        let moved = Instant::now();
        // A change on the host is seen when the time of what the guest has cached is up, one second.
        length += 1;
        fs::write(&host, "0".repeat(length))?;
        let mut seen = 0;
        while seen != length && moved.elapsed() < Duration::from_secs(30) {
            seen = vm.stat("/mnt/file")?.size as usize;
            thread::sleep(Duration::from_millis(100));
        }
        ensure_eq!(seen, length, "the size that the guest sees {seconds} s away");
        // A hint is trusted only when it was read some time after the file was changed last.
        for hint in [true, false] {
            let flags = inode_flags::get(&host)?;
            inode_flags::set(&host, if hint { flags | inode_flags::DAX } else { flags & !inode_flags::DAX })?;
            let open = vm.open("/mnt/file", OpenHow::default())?;
            let is_dax = vm.call::<Stat>(&Op::StatHandle(open))?.dax;
            vm.run(Op::Close(open))?;
            ensure_eq!(is_dax, hint, "DAX {seconds} s away");
        }
        vm.write_content("/mnt/file", 0, Content { seed: 5, len: length as u64 }, false, 1)?;
        let (gone, passed) = (uptime(&mut vm)? - before, moved.elapsed());
        drop(clock);
        ensure_passed(gone, passed)?;
    }
    vm.umount("/mnt")?;
    let ended = vm.power_off()?;
    ensure_ended(&ended, 0, "power-off")?;
    let total = ended.report.all["timing"]["total_ms"].as_f64().ok_or("no time in the report")?;
    ensure!(total >= 1e3 * start.elapsed().as_secs_f64() && total < 1.8e6, "{total} ms in the report");
    Ok(())
}

/// What does not answer for ten seconds holds up who asked for it, and nobody else.
fn slow_disk(kernel: &Kernel, places: &Places) -> Outcome {
    const NAME: &str = "daxvm-slow";
    const SLOW: Duration = Duration::from_secs(10);
    let parent = tempfile::tempdir_in(places.dir("tmpfs"))?;
    let disk = ext4(parent.path(), NAME)?;
    let other = tempfile::tempdir_in(places.dir("tmpfs"))?;
    let content = Content { seed: 82, len: 4 << 20 };
    content.write_to(&disk.dir.join("file"))?;
    content.write_to(&other.path().join("file"))?;
    Disk::run(&["sync"])?;
    let socket = other.path().join("api");
    let mut vm = Vm::builder(kernel)
        .cpus(4)
        .share(Share::new("slow-dax", &disk.dir).window("32M").dax("always"))
        .share(Share::new("slow-plain", &disk.dir).window("0").dax("never"))
        .share(Share::new("other", other.path()).window("0").dax("never"))
        .argument("--api-socket")
        .argument(&socket)
        .boot()?;
    let tags = ["slow-dax", "slow-plain", "other"];
    for tag in tags {
        vm.mount(tag, &format!("/mnt/{tag}"), if tag == "slow-dax" { "dax=always" } else { "" })?;
        // Known, so that only its pages have to be read.
        vm.stat(format!("/mnt/{tag}/file"))?;
    }
    for by_mapping in [false, true] {
        fs::write("/proc/sys/vm/drop_caches", "1")?;
        let slow = if by_mapping { "/mnt/slow-dax/file" } else { "/mnt/slow-plain/file" };
        let crowds = vec![crowd(slow, content, 1, by_mapping), crowd("/mnt/other/file", content, 1, false)];
        Disk::run(&["dmsetup", "--noudevsync", "suspend", "--nolockfs", NAME])?;
        let resume = Resume(NAME);
        let suspended = Instant::now();
        let op = Op::Contest(Contest { crowds, millis: SLOW.as_millis() as u64 + 2000 });
        vm.begin(&op)?;
        thread::sleep(Duration::from_secs(2));
        let asked = Instant::now();
        let answer = Command::new(daxvm()).arg("ctl").arg(&socket).arg("status").output()?;
        ensure!(answer.status.success(), "the API: {}", String::from_utf8_lossy(&answer.stderr));
        ensure!(asked.elapsed() < Duration::from_secs(5), "the API took {:?}", asked.elapsed());
        thread::sleep(SLOW.saturating_sub(suspended.elapsed()));
        drop(resume);
        let fared: Vec<Fared> = vm.finish(&op)?;
        let [slow, other] = &fared[..] else { return Err(format!("{} crowds", fared.len()).into()) };
        ensure!(slow.wrong.is_none() && other.wrong.is_none(), "wrong bytes: {fared:?}");
        ensure!(
            slow.longest_micros > 6_000_000,
            "the disk was not slow (by mapping: {by_mapping}): {fared:?}"
        );
        // A fault of one CPU on a page that the host reads may hold up who waits for that CPU, too.
        ensure!(other.blocks > 100, "the other share was held up (by mapping: {by_mapping}): {fared:?}");
        let is_apart = by_mapping || other.longest_micros < slow.longest_micros / 2;
        ensure!(is_apart, "the other share was held up: {fared:?}");
        println!("by mapping: {by_mapping}: {fared:?}");
    }
    for tag in tags {
        vm.umount(&format!("/mnt/{tag}"))?;
    }
    ensure_ended(&vm.power_off()?, 0, "power-off")
}

/// Resumes a device of device mapper when it is dropped.
struct Resume(&'static str);

impl Drop for Resume {
    fn drop(&mut self) {
        if let Err(error) = Disk::run(&["dmsetup", "--noudevsync", "resume", self.0]) {
            eprintln!("left behind: {error}");
        }
    }
}

/// Fills what is left of a file system.
fn fill(dir: &Path) -> Result<PathBuf, Box<dyn Error>> {
    let path = dir.join("filler");
    let filler = File::options().write(true).create(true).truncate(false).open(&path)?;
    let mut at = filler.metadata()?.len();
    for step in [1 << 20, 4096, 1] {
        let bytes = vec![1; step];
        while let Ok(written @ 1..) = filler.write_at(&bytes, at) {
            at += written as u64;
        }
    }
    Ok(path)
}

/// The guest is told that there is no room, by write(2) and by its fsync(2), and writes when there is some again.
fn full(kernel: &Kernel, disk: &Disk) -> Outcome {
    let content = Content { seed: 83, len: 256 << 10 };
    let mut vm = Vm::builder(kernel)
        .share(Share::new("dax", &disk.dir).window("32M").dax("always"))
        .share(Share::new("plain", &disk.dir).window("0").dax("never"))
        .boot()?;
    for (tag, options) in [("dax", "dax=always"), ("plain", "")] {
        let mnt = format!("/mnt/{tag}");
        vm.mount(tag, &mnt, options)?;
        let create = OpenHow { write: true, create_new: true, ..OpenHow::default() };
        let path = format!("{mnt}/{tag}");
        let open = vm.open(path.as_str(), create)?;
        vm.run(Op::Close(open))?;
        content.write_to(&disk.dir.join(format!("{tag}-before")))?;
        let filler = fill(&disk.dir)?;
        let no_room = [Errno::NOSPC.raw_os_error()];
        ensure_errno(
            vm.write_content(path.as_str(), 0, content, false, 1),
            &no_room,
            "write(2) without room",
        )?;
        // What is there can be read, and written where it is.
        let before = format!("{mnt}/{tag}-before");
        ensure_eq!(vm.verify(&[(&before, content)], 1, false)?.differs, vec![], "{tag}: what was there");
        vm.write_content(before.as_str(), 0, content, false, 1)?;
        fs::remove_file(filler)?;
        vm.write_content(path.as_str(), 0, content, false, 1)?;
        ensure_eq!(content.differs_from(&File::open(disk.dir.join(tag))?)?, None, "{tag}: on the host");
        vm.umount(&mnt)?;
    }
    ensure_ended(&vm.power_off()?, 0, "power-off")
}

/// The guest does not feel that its report and metrics cannot be written; the caller is told of both.
fn no_room_for_outputs(kernel: &Kernel, places: &Places) -> Outcome {
    let parent = tempfile::tempdir_in(places.dir("tmpfs"))?;
    let disk = Disk::mount(parent.path(), "tmpfs", "tmpfs", "size=64k")?;
    let metrics = disk.dir.join("metrics");
    let vm = Vm::builder(kernel)
        .report(&disk.dir.join("report"))
        .argument("--metrics-file")
        .argument(&metrics)
        .argument("--metrics-interval")
        .argument("100ms");
    let mut vm = vm.boot()?;
    // The file that takes the place of another gives that one's room back.
    for _ in 0..5 {
        fill(&disk.dir)?;
        thread::sleep(Duration::from_millis(250));
    }
    let filler = fill(&disk.dir)?;
    let _: String = vm.call(&Op::Echo("the guest goes on".into()))?;
    let whole = fs::read_to_string(&metrics)?;
    ensure!(whole.ends_with("# EOF\n"), "the metrics are cut off: {whole}");
    let ended = vm.power_off()?;
    ensure_eq!(ended.status, Some(125), "the exit status\n{}", ended.console);
    for said in ["Cannot write the report", "No space left on device", "Cannot write the last metrics"] {
        ensure!(ended.console.contains(said), "not said: {said}\n{}", ended.console);
    }
    ensure_eq!(ended.console.matches("Cannot write the metrics").count(), 1, "how often it was said");
    // Half a report would be worse than none.
    ensure_eq!(fs::metadata(disk.dir.join("report"))?.len(), 0, "the length of the report");
    ensure!(fs::read_to_string(&metrics)?.ends_with("# EOF\n"), "the metrics are cut off");
    fs::remove_file(filler)?;
    let mut left = crate::runner_jobs::names(&disk.dir)?;
    left.retain(|name| name != "metrics" && name != "report");
    ensure_eq!(left, Vec::<String>::new(), "left behind");
    Ok(())
}

/// Has a program run without the capability to raise its limits, and with this one for open files.
fn limited(files: u32) -> [String; 6] {
    let files = format!("--nofile={files}:{files}");
    ["setpriv", "--bounding-set", "-sys_resource", "--", "prlimit", &files].map(str::to_owned)
}

/// A start that cannot be is refused in one sentence that names the limit.
fn too_few_descriptors(kernel: &Kernel, places: &Places) -> Outcome {
    for files in [10, 20, 40, 80, 160, 320, 600] {
        let share = Share::new("t", places.dir("tmpfs")).window("32M");
        let ended = Vm::builder(kernel).share(share).under(&limited(files)).start()?.wait()?;
        ensure_eq!(ended.status, Some(125), "the exit status with {files} descriptors\n{}", ended.console);
        ensure!(
            ended.console.contains("ulimit -Hn"),
            "the message with {files} descriptors does not say what to do:\n{}",
            ended.console
        );
    }
    Ok(())
}

/// With few descriptors the guest knows few files at a time, and the machine lives.
fn few_descriptors(kernel: &Kernel, places: &Places) -> Outcome {
    let dir = tempfile::tempdir_in(places.dir("tmpfs"))?;
    let content = Content { seed: 84, len: 100 };
    let names: Vec<_> = (0..1500).map(|number| format!("file-{number}")).collect();
    for name in &names {
        content.write_to(&dir.path().join(name))?;
    }
    let share = Share::new("t", dir.path()).window("32M").dax("always");
    let mut vm = Vm::builder(kernel).share(share).under(&limited(1024)).boot()?;
    vm.mount("t", "/mnt", "dax=always")?;
    let no_more = Errno::NFILE.raw_os_error();
    let mut refused = 0;
    for name in &names {
        match vm.stat(format!("/mnt/{name}")) {
            Ok(stat) => ensure_eq!(stat.size, content.len, "{name}"),
            Err(error) if error.errno() == Some(no_more) => refused += 1,
            Err(error) => return Err(error.into()),
        }
    }
    ensure!(refused > 500, "{refused} of {} were refused", names.len());
    let held = vm.host().holdings(dir.path())?.descriptor_count();
    ensure!(held < 1000, "daxvm has {held} descriptors of 1024");
    // What the guest forgets makes room.
    vm.drop_caches()?;
    let late = format!("/mnt/{}", names[names.len() - 1]);
    ensure_eq!(
        vm.verify(&[(&late, content)], 1, true)?.differs,
        vec![],
        "a file after the caches were dropped"
    );
    vm.umount("/mnt")?;
    let ended = vm.power_off()?;
    ensure_ended(&ended, 0, "power-off")?;
    ensure_eq!(ended.console.matches("gets ENFILE").count(), 1, "how often it was said\n{}", ended.console);
    Ok(())
}

/// A control group of the host, removed when it is dropped.
struct Group(PathBuf);

impl Group {
    fn new(name: &str, memory_max: u64) -> Result<Group, Box<dyn Error>> {
        let root = Path::new("/sys/fs/cgroup");
        let controllers = fs::read_to_string(root.join("cgroup.controllers"))?;
        ensure!(controllers.contains("memory"), "the host has no control groups for memory: {controllers}");
        fs::write(root.join("cgroup.subtree_control"), "+memory")?;
        let group = Group(root.join(name));
        fs::create_dir(&group.0)?;
        fs::write(group.0.join("memory.max"), memory_max.to_string())?;
        Ok(group)
    }

    /// Words that have a program run in the group.
    fn words(&self) -> [String; 3] {
        let script = format!("echo $$ >{}/cgroup.procs; exec \"$0\" \"$@\"", self.0.display());
        ["sh".into(), "-c".into(), script]
    }

    /// An event of the group: how often it has been.
    fn events(&self, name: &str) -> Result<u64, Box<dyn Error>> {
        let events = fs::read_to_string(self.0.join("memory.events"))?;
        let value = events.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(value.ok_or("no such event")?.parse()?)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Processes leave it a moment after they have ended.
        for _ in 0..50 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(100));
        }
        eprintln!("left behind: {}", self.0.display());
    }
}

/// Pages of shared files count for the group and make room for others; RAM that the guest uses stays, and if there is not
/// enough for it the kernel kills daxvm, as SIGKILL does, and nobody else.
fn memory_cgroup(kernel: &Kernel, places: &Places) -> Outcome {
    let dir = tempfile::tempdir_in(places.dir("ext4"))?;
    let content = Content { seed: 85, len: 96 << 20 };
    content.write_to(&dir.path().join("file"))?;
    Disk::run(&["sync"])?;
    fs::write("/proc/sys/vm/drop_caches", "1")?;
    let group = Group::new("daxvm-tight", 144 << 20)?;
    let share = || Share::new("t", dir.path()).window("256M").dax("always");
    let mut vm = Vm::builder(kernel).memory("96M").share(share()).under(&group.words()).boot()?;
    vm.mount("t", "/mnt", "dax=always")?;
    let digest = vm.sha256("/mnt/file", Access::Mmap)?;
    ensure_eq!(digest.sha256, content.sha256(), "a file that is larger than what is left of the group");
    ensure!(group.events("max")? > 0, "the limit was not met: {} events", group.events("max")?);
    ensure_eq!(group.events("oom_kill")?, 0, "killed");
    vm.umount("/mnt")?;
    ensure_ended(&vm.power_off()?, 0, "power-off")?;
    drop(group);

    let group = Group::new("daxvm-too-tight", 48 << 20)?;
    let ended = Vm::builder(kernel).memory("256M").share(share()).under(&group.words()).start()?.wait()?;
    ensure_eq!(ended.status, None, "the exit status of what the kernel kills\n{}", ended.console);
    ensure!(group.events("oom_kill")? >= 1, "the kernel has killed nothing");
    ensure_eq!(content.differs_from(&File::open(dir.path().join("file"))?)?, None, "the shared file");
    let left = crate::runner_ends::processes()?;
    ensure!(left.is_empty(), "processes are left: {left:?}");
    Ok(())
}
