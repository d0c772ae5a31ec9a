//! What a virtual machine holds of its host.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::VmError;

/// A process, seen from outside.
#[derive(Clone, Debug)]
pub struct HostProcess {
    proc: PathBuf,
}

/// What a process holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holdings {
    /// Open descriptors, those of no file with a name counted by kind.
    pub descriptors: BTreeMap<String, usize>,
    /// Mappings of files below a share.
    pub share_mappings: usize,
    /// Resident memory of mappings of files below a share, in KiB.
    pub share_resident: u64,
    /// Resident memory of everything but guest memory and shares, in KiB.
    pub own_resident: u64,
}

/// Anonymous mappings from this size on are taken for the guest's memory, in KiB.
const GUEST_MEMORY: u64 = 32 << 10;

impl HostProcess {
    pub(super) fn new(pid: u32) -> HostProcess {
        HostProcess { proc: Path::new("/proc").join(pid.to_string()) }
    }

    /// The process's id.
    pub fn pid(&self) -> u32 {
        self.proc.file_name().and_then(|name| name.to_str()?.parse().ok()).unwrap_or(0)
    }

    pub(super) fn proc(&self) -> &Path {
        &self.proc
    }

    /// The id of the thread of this name.
    ///
    /// # Errors
    /// There is none.
    pub fn thread(&self, name: &str) -> Result<i32, VmError> {
        let what = || format!("a thread {name} of daxvm");
        let tasks = fs::read_dir(self.proc.join("task")).map_err(VmError::system(what()))?;
        let is_it =
            |task: &Path| fs::read_to_string(task.join("comm")).is_ok_and(|found| found.trim_end() == name);
        let task = tasks.map_while(Result::ok).map(|task| task.path()).find(|task| is_it(task));
        let id = task.and_then(|task| task.file_name()?.to_str()?.parse().ok());
        id.ok_or_else(|| {
            VmError::system(what())(io::Error::other(format!("it has only\n{}", self.threads())))
        })
    }

    /// A value of /proc/PID/status that is given in KiB: `VmRSS`, `RssAnon`, ...
    pub fn status_kib(&self, key: &str) -> Result<u64, VmError> {
        let status = self.read("status")?;
        let value = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        let number = value.and_then(|value| value.trim().trim_end_matches(" kB").parse().ok());
        number.ok_or_else(|| VmError::system(key)(io::Error::other("not in /proc/PID/status")))
    }

    /// A line for each of its threads: name, state, what it waits for in the kernel, and processor time used. For whoever
    /// has to find out why nothing happens any more; what cannot be read is left out.
    pub fn threads(&self) -> String {
        let tasks = fs::read_dir(self.proc.join("task")).into_iter().flatten().flatten();
        let lines = tasks.map(|task| {
            let read = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default();
            let (stat, stack) = (read("stat"), read("stack"));
            let fields: Vec<_> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
            let field = |number: usize| fields.get(number).copied().unwrap_or("?");
            let calls: Vec<_> = stack.lines().filter_map(|line| line.split_whitespace().nth(1)).collect();
            let name = read("comm");
            format!("{} {} {}+{} {}\n", name.trim(), field(0), field(11), field(12), calls.join(" < "))
        });
        lines.collect()
    }

    /// Everything the process holds, files below `shared` told apart.
    pub fn holdings(&self, shared: &Path) -> Result<Holdings, VmError> {
        let mut holdings = parse_smaps(&self.read("smaps")?, shared);
        let fds = self.proc.join("fd");
        let entries = fs::read_dir(&fds).map_err(VmError::system("the process's descriptors"))?;
        for entry in entries.map_while(Result::ok) {
            // A descriptor that was closed meanwhile is none.
            let Ok(target) = fs::read_link(entry.path()) else { continue };
            let name = target.to_string_lossy().into_owned();
            let kind = name.split_once(":[").map_or(name.as_str(), |(kind, _)| kind);
            *holdings.descriptors.entry(kind.to_owned()).or_default() += 1;
        }
        Ok(holdings)
    }

    fn read(&self, file: &str) -> Result<String, VmError> {
        fs::read_to_string(self.proc.join(file)).map_err(VmError::system(format!("/proc/PID/{file}")))
    }
}

impl Holdings {
    /// How many descriptors in all.
    pub fn descriptor_count(&self) -> usize {
        self.descriptors.values().sum()
    }
}

fn parse_smaps(smaps: &str, shared: &Path) -> Holdings {
    let mut holdings =
        Holdings { descriptors: BTreeMap::new(), share_mappings: 0, share_resident: 0, own_resident: 0 };
    let (mut is_shared, mut is_guest) = (false, false);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let key = words.next().unwrap_or_default();
        let Some(key) = key.strip_suffix(':') else {
            // start-end perms offset device inode [path]
            let (device, inode) = (words.nth(2).unwrap_or_default(), words.next().unwrap_or_default());
            let path = words.next().map(|first| Path::new(&line[line.rfind(first).unwrap_or(0)..]));
            is_shared =
                path.is_some_and(|path| path.starts_with(shared) || is_in(shared, path, device, inode));
            is_guest = false;
            holdings.share_mappings += usize::from(is_shared);
            continue;
        };
        let kib = words.next().and_then(|number| number.parse().ok()).unwrap_or(0);
        match key {
            "Size" => is_guest = kib >= GUEST_MEMORY,
            "Rss" if is_shared => holdings.share_resident += kib,
            "Rss" if !is_guest => holdings.own_resident += kib,
            _ => {}
        }
    }
    holdings
}

/// Whether a file of this device (MAJOR:MINOR, hexadecimal) and inode is the one at `path` of a share whose paths begin at
/// its root, as they do when it is a tree of its own.
fn is_in(shared: &Path, path: &Path, device: &str, inode: &str) -> bool {
    let Ok(found) = fs::symlink_metadata(shared.join(path.strip_prefix("/").unwrap_or(path))) else {
        return false;
    };
    let (major, minor) = (rustix::fs::major(found.dev()), rustix::fs::minor(found.dev()));
    format!("{major:02x}:{minor:02x}") == device && found.ino().to_string() == inode
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_guest_memory_and_the_rest_are_told_apart() {
        let smaps = "\
7f0000000000-7f0020000000 rw-p 00000000 00:00 0 \nSize:             524288 kB\nRss:              100000 kB\n\
7f1000000000-7f1000200000 rw-s 00000000 08:01 42                         /srv/share/a file\n\
Size:               2048 kB\nRss:                1024 kB\n\
7f2000000000-7f2000010000 r-xp 00000000 08:01 43                         /usr/bin/daxvm\n\
Size:                 64 kB\nRss:                  60 kB\nVmFlags: rd ex\n";
        let holdings = parse_smaps(smaps, Path::new("/srv/share"));
        assert_eq!((holdings.share_mappings, holdings.share_resident), (1, 1024));
        assert_eq!(holdings.own_resident, 60);
    }

    #[test]
    fn a_file_in_a_tree_of_its_own_is_known_by_its_inode() {
        let shared = tempfile::tempdir().unwrap();
        fs::write(shared.path().join("file"), "").unwrap();
        let found = fs::metadata(shared.path().join("file")).unwrap();
        let device = format!("{:02x}:{:02x}", rustix::fs::major(found.dev()), rustix::fs::minor(found.dev()));
        let smaps = |inode: u64| {
            let line = format!("7f1000000000-7f1000200000 rw-s 00000000 {device} {inode}      /file");
            parse_smaps(&format!("{line}\nRss:                1024 kB\n"), shared.path())
        };
        assert_eq!((smaps(found.ino()).share_mappings, smaps(found.ino() + 1).share_mappings), (1, 0));
    }

    #[test]
    fn this_process_holds_its_standard_streams() -> Result<(), VmError> {
        let process = HostProcess::new(std::process::id());
        assert!(process.holdings(Path::new("/nowhere"))?.descriptor_count() >= 3);
        assert!(process.status_kib("VmRSS")? > 0);
        assert!(process.status_kib("NoSuchKey").is_err());
        Ok(())
    }
}
