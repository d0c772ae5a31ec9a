//! A guest that drives the devices of two shares itself and lies to them. What it tries is in the guest's agent; here is
//! what must stay as it was: all that is beside the share, and the guest's own kernel with its own driver.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs::{self, File, FileTimes, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use libtest_mimic::Trial;
use rustix::fs::{CWD, FileType, Mode};
use tests::guest::{Op, PROGRAMS, SECRET, SHARED_BIG, SHARED_FILE, Tried};
use tests::vm::{Kernel, Share, Vm};

use crate::harness::{Outcome, Places, ensure, ensure_content, ensure_ended, ensure_eq, own_trial};

/// The groups of attempts that docs/security.md lists, and how many are made at least in each: somewhat fewer than there are.
const GROUPS: [(&str, usize); 16] = [
    ("names", 20),
    ("nodes", 30),
    ("handles", 16),
    ("read-only", 18),
    ("kinds", 12),
    ("set-id", 8),
    ("owners", 1),
    ("mappings", 20),
    ("messages", 8),
    ("chains", 36),
    ("rings", 25),
    ("registers", 20),
    ("configuration", 7),
    ("msi-x", 8),
    ("bars", 20),
    ("midway", 6),
];

/// An ordinary user of the host.
const USER: u32 = 1000;

/// What is answered otherwise where daxvm is not root: it can make no device.
const WITHOUT_ROOT: [&str; 4] = [
    "kinds/own-character: MKNOD: Errno(1), not Done",
    "kinds/own-character: Lookup of 0x1: Errno(2)",
    "kinds/own-block: MKNOD: Errno(1), not Done",
    "kinds/own-block: Lookup of 0x1: Errno(2)",
];

/// Files from this size on are compared once, at the end; until then their times must do.
const LARGE: u64 = 1 << 20;

/// The checks that boot a machine of their own.
pub fn trials(places: &Result<Places, String>, kernel: &'static str, trials: &mut Vec<Trial>) {
    trials.push(own_trial(kernel, "hostile/a-driver-of-the-guests-own", places, |kernel, places| {
        own_driver(kernel, places, None)
    }));
    trials.push(own_trial(kernel, "hostile/under-an-ordinary-user", places, |kernel, places| {
        own_driver(kernel, places, Some(USER))
    }));
}

/// Two shares beside a secret.
struct Yard {
    outer: PathBuf,
    /// Whether it belongs to an ordinary user, who has no mount that keeps the times of reads as they are.
    is_of_user: bool,
    /// What is not in the writable share, as it has to stay.
    outside: BTreeMap<PathBuf, String>,
}

impl Yard {
    /// All of it belongs to `user`, if there is one: permissions do not keep that user from the secret.
    fn new(outer: PathBuf, user: Option<u32>) -> Result<Yard, Box<dyn Error>> {
        match fs::remove_dir_all(&outer) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            _ => fs::create_dir_all(outer.join("other"))?,
        }
        for secret in ["secret", "other/secret"] {
            let path = outer.join(secret);
            fs::write(&path, SECRET)?;
            fs::set_permissions(&path, Permissions::from_mode(0o640))?;
            // Whoever reads it now changes the time at which it was read last, even where that is noted seldom.
            let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(1);
            File::options().write(true).open(&path)?.set_times(FileTimes::new().set_accessed(long_ago))?;
        }
        for share in ["writable", "read-only"] {
            fill_share(&outer, &outer.join(share))?;
        }
        for program in PROGRAMS {
            fs::write(outer.join("writable").join(program), "a program that runs as another user")?;
        }
        if let Some(user) = user {
            for path in paths(&outer)?.iter().chain([&outer]) {
                lchown(path, Some(user), Some(user))?;
            }
        }
        for program in PROGRAMS {
            let path = outer.join("writable").join(program);
            // After the change of the owner, which takes the bits.
            fs::set_permissions(&path, Permissions::from_mode(0o6755))?;
        }
        let mut yard = Yard { outer, is_of_user: user.is_some(), outside: BTreeMap::new() };
        yard.outside = yard.list()?;
        Ok(yard)
    }

    /// All that is not in the writable share, with all that one could change of it.
    fn list(&self) -> io::Result<BTreeMap<PathBuf, String>> {
        let [writable, read_only] = ["writable", "read-only"].map(|share| self.outer.join(share));
        let outside = paths(&self.outer)?.into_iter().filter(|path| !path.starts_with(&writable));
        let may_be_read = |path: &Path| self.is_of_user && path.starts_with(&read_only);
        outside.map(|path| describe(&path, !may_be_read(&path)).map(|text| (path, text))).collect()
    }

    /// What has changed since the last call.
    fn changes(&mut self) -> io::Result<Vec<String>> {
        let now = self.list()?;
        let before = std::mem::replace(&mut self.outside, now);
        let paths = before.keys().chain(self.outside.keys().filter(|path| !before.contains_key(*path)));
        let changed = paths.filter(|path| before.get(*path) != self.outside.get(*path));
        let show = |text: Option<&String>| text.cloned().unwrap_or_else(|| "nothing".into());
        let line = |path: &PathBuf| {
            let (was, is) = (show(before.get(path)), show(self.outside.get(path)));
            format!("{} was {was} and is {is}", path.display())
        };
        Ok(changed.map(line).collect())
    }
}

/// Puts into a share what attempts look for.
fn fill_share(outer: &Path, share: &Path) -> Result<(), Box<dyn Error>> {
    fs::create_dir_all(share.join("directory/below"))?;
    SHARED_FILE.write_to(&share.join("file"))?;
    SHARED_BIG.write_to(&share.join("big"))?;
    fs::write(share.join("directory/inner"), "inner")?;
    symlink(outer.join("secret"), share.join("link"))?;
    symlink("../secret", share.join("link-up"))?;
    symlink("..", share.join("link-out"))?;
    symlink(outer.join("made-by-the-guest"), share.join("link-to-nothing"))?;
    for (name, kind) in [
        ("fifo", FileType::Fifo),
        ("socket", FileType::Socket),
        ("character", FileType::CharacterDevice),
        ("block", FileType::BlockDevice),
    ] {
        rustix::fs::mknodat(CWD, share.join(name), kind, Mode::from(0o666), 0x103)?;
    }
    Ok(())
}

/// All that is below a directory.
fn paths(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.symlink_metadata()?.is_dir() {
            found.extend(paths(&path)?);
        }
        found.push(path);
    }
    Ok(found)
}

/// All of a file that could change; `with_reads` also when it was read last.
fn describe(path: &Path, with_reads: bool) -> io::Result<String> {
    let stat = path.symlink_metadata()?;
    let (mut content, mut names, mut accessed) = (Vec::new(), [0; 256], None);
    if stat.is_file() {
        accessed = with_reads.then(|| (stat.atime(), stat.atime_nsec()));
        let mut file = File::options().read(true).custom_flags(libc::O_NOATIME).open(path)?;
        if stat.len() < LARGE {
            file.read_to_end(&mut content)?;
        } else {
            content.resize(4096, 0);
            file.read_exact_at(&mut content, 0)?;
        }
    }
    let names_len = rustix::fs::llistxattr(path, &mut names).unwrap_or(0);
    Ok(format!(
        "{:o} {} {} {} {} {} {} {:?} {:?} {accessed:?} {:x} {:?}",
        stat.mode(),
        stat.ino(),
        stat.uid(),
        stat.gid(),
        stat.nlink(),
        stat.size(),
        stat.rdev(),
        (stat.mtime(), stat.mtime_nsec()),
        (stat.ctime(), stat.ctime_nsec()),
        digest(&content),
        &names[..names_len],
    ))
}

/// A number that differs for contents that differ.
fn digest(content: &[u8]) -> u64 {
    content
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

fn own_driver(kernel: &Kernel, places: &Places, user: Option<u32>) -> Outcome {
    let mut yard = Yard::new(places.dir("ext4").join("hostile"), user)?;
    let share = |name: &str| Share::new(name, yard.outer.join(name)).window("32M").dax("always");
    let builder = match user {
        Some(user) => {
            fs::set_permissions("/dev/kvm", Permissions::from_mode(0o666))?;
            Vm::builder(kernel).user(user)
        }
        None => Vm::builder(kernel),
    };
    let mut vm = builder
        // Else the kernel lets nobody write to configuration space by memory.
        .cmdline_extra("iomem=relaxed")
        .share(share("writable"))
        .share(share("read-only").read_only())
        .boot()?;
    let devices = vm.virtio_fs_devices()?;
    let [writable, read_only] = &devices[..] else {
        return Err(format!("not two devices: {devices:?}").into());
    };
    for device in &devices {
        vm.unbind(device)?;
    }
    let names: Vec<String> =
        vm.call(&Op::TakeDevices(writable.address.clone(), read_only.address.clone()))?;
    for (group, least) in GROUPS {
        let of_group =
            names.iter().filter(|name| name.split_once('/').is_some_and(|(found, _)| found == group));
        let count = of_group.count();
        ensure!(count >= least, "{count} attempts in {group}, not {least}");
    }

    let (mut wrong, mut answers, mut held) = (yard.changes()?, 0, 0);
    for (number, name) in names.iter().enumerate() {
        match vm.call::<Tried>(&Op::Attempt(name.clone())) {
            Ok(tried) => {
                answers += tried.answers;
                wrong.extend(tried.wrong.into_iter().map(|what| format!("{name}: {what}")));
            }
            Err(error) => {
                wrong.push(format!("{name}: {error}"));
                if vm.is_lost() {
                    break;
                }
            }
        }
        wrong.extend(yard.changes()?.into_iter().map(|change| format!("{name}: on the host {change}")));
        if number == names.len() / 2 {
            // By now everything has been opened that is once.
            held = vm.host().holdings(&yard.outer)?.descriptor_count();
        }
    }
    println!("{} attempts, {answers} answers", names.len());
    if user.is_some() {
        for expected in WITHOUT_ROOT {
            let position = wrong.iter().position(|line| line == expected);
            wrong.remove(position.ok_or(format!("an ordinary user's guest was not answered {expected}"))?);
        }
    }
    ensure!(wrong.is_empty(), "{} of {answers} answers:\n{}", wrong.len(), wrong.join("\n"));
    let still_held = vm.host().holdings(&yard.outer)?.descriptor_count();
    ensure!(still_held <= held, "daxvm has {still_held} descriptors open, and had {held}");

    vm.run(Op::LeaveDevices)?;
    for (device, tag) in devices.iter().zip(["writable", "read-only"]) {
        vm.bind(device)?;
        let target = format!("/mnt/{tag}");
        vm.mount(tag, &target, "dax=always")?;
        for (file, content) in [("file", SHARED_FILE), ("big", SHARED_BIG)] {
            let found = vm.verify(&[(&format!("{target}/{file}"), content)], 1, true)?;
            ensure_eq!(found.differs, vec![], "{tag}");
        }
        vm.umount(&target)?;
    }
    for text in ["BUG:", "WARNING:", "Oops"] {
        let complaints: Vec<String> = vm.call(&Op::KernelLog(text.into()))?;
        ensure_eq!(complaints, Vec::<String>::new(), "the guest's kernel complained");
    }
    ensure_ended(&vm.power_off()?, 0, "power-off")?;
    ensure_eq!(yard.changes()?, Vec::<String>::new(), "changes on the host");
    for share in ["writable", "read-only"] {
        ensure_content(&yard.outer.join(share).join("big"), SHARED_BIG)?;
    }
    Ok(())
}
