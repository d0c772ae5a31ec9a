//! What the host has for guests: memory and CPUs, also where a container or a service manager limits them.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::available_parallelism;

use super::Resources;

/// What the host can give all guests together now: nine tenths of the memory that is available, and its CPUs.
pub(super) fn resources() -> Resources {
    let cpus = available_parallelism().map_or(1, |cpus| u32::try_from(cpus.get()).unwrap_or(u32::MAX));
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let cgroup = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits = cgroup_directory(&cgroup)
        .and_then(|directory| left_in_cgroups(Path::new("/sys/fs/cgroup"), &directory));
    // Where nothing can be found out, what the smallest CI machines have.
    let available = available(&meminfo).unwrap_or(2 << 30);
    let memory = limits.map_or(available, |limit| limit.min(available));
    Resources { cpus, memory: memory / 10 * 9 }
}

/// `MemAvailable` of /proc/meminfo, in bytes.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// The directory of the process below the root of cgroups, version 2 (cgroups(7)).
fn cgroup_directory(cgroup: &str) -> Option<PathBuf> {
    let path = cgroup.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(path.into())
}

/// What is left of the strictest limit of a cgroup and those above it, in bytes; none if there is no limit. Pages of
/// files count as left, as the kernel takes them back.
fn left_in_cgroups(root: &Path, directory: &Path) -> Option<u64> {
    let left = |directory: &Path| -> Option<u64> {
        let number = |name: &str| -> Option<u64> {
            fs::read_to_string(root.join(directory).join(name)).ok()?.trim().parse().ok()
        };
        let limit = number("memory.max")?;
        let stat = fs::read_to_string(root.join(directory).join("memory.stat")).unwrap_or_default();
        let pages = stat.lines().find_map(|line| line.strip_prefix("inactive_file "));
        let reclaimable = pages.and_then(|bytes| bytes.parse().ok()).unwrap_or(0);
        let used = number("memory.current").unwrap_or(0).saturating_sub(reclaimable);
        Some(limit.saturating_sub(used))
    };
    directory.ancestors().filter_map(left).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_has_something_to_give() {
        let resources = resources();
        assert!(resources.cpus >= 1 && resources.memory > 16 << 20, "{resources:?}");
    }

    #[test]
    fn what_is_available_is_in_kib() {
        assert_eq!(available("MemTotal: 9 kB\nMemAvailable:    2048 kB\n"), Some(2 << 20));
        assert_eq!(available("MemTotal: 9 kB\n"), None);
    }

    #[test]
    fn the_strictest_cgroup_counts() {
        let root = tempfile::tempdir().unwrap();
        let inner = root.path().join("outer/inner");
        fs::create_dir_all(&inner).unwrap();
        let write = |directory: &Path, name, text: &str| fs::write(directory.join(name), text).unwrap();
        write(&inner, "memory.max", "max\n");
        assert_eq!(left_in_cgroups(root.path(), Path::new("outer/inner")), None);
        let outer = root.path().join("outer");
        write(&outer, "memory.max", "1000\n");
        write(&outer, "memory.current", "700\n");
        write(&outer, "memory.stat", "anon 100\ninactive_file 200\n");
        assert_eq!(left_in_cgroups(root.path(), Path::new("outer/inner")), Some(500));
        write(&inner, "memory.max", "300\n");
        assert_eq!(left_in_cgroups(root.path(), Path::new("outer/inner")), Some(300));
        assert_eq!(cgroup_directory("0::/a/b\n"), Some("a/b".into()));
        assert_eq!(cgroup_directory("4:memory:/a\n"), None);
    }
}
