//! What the host has, and what a guest gets of it when the user does not say.

use std::path::Path;

use super::{DEFAULT_MEMORY, RunConfig};

/// The most vCPUs that a guest gets by itself. Each costs boot time and a kernel thread of everything, and what runs
/// best on more is worth a `--cpus`.
const MOST_CPUS: usize = 8;
/// The part of the host's available memory that a guest gets by itself: one fourth, so that several guests can be
/// started at once, and the host's page cache, from which DAX maps, keeps its share.
const MEMORY_PART: u64 = 4;
/// The most memory that a guest gets by itself, in bytes. Its kernel keeps 1.6 % of it for page descriptors and
/// initialises them at boot.
const MOST_MEMORY: u64 = 4 << 30;
/// Sizes are rounded down to this, in bytes, for the eye.
const MEMORY_STEP: u64 = 64 << 20;

/// Facts of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Host {
    /// CPUs that this process may use.
    pub cpus: usize,
    /// Bytes of memory that can be had without swapping, within the limit of the process's control group.
    pub memory: u64,
}

impl Host {
    /// Asks the system. What it does not tell counts as little.
    pub fn read() -> Host {
        let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let limit = memory_limit(&text("/proc/self/cgroup"), Path::new("/sys/fs/cgroup"));
        Host {
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory: available(&text("/proc/meminfo")).min(limit),
        }
    }

    /// vCPUs of a guest that runs a command: as many as the host has, but no more than 8.
    pub fn default_cpus(&self) -> u8 {
        self.cpus.clamp(1, MOST_CPUS) as u8
    }

    /// Bytes of RAM of a guest that runs a command: a fourth of the memory that is available, but no less than 512 MiB,
    /// which is only taken as the guest touches it, and no more than 4 GiB.
    pub fn default_memory(&self) -> u64 {
        let part = self.memory / MEMORY_PART;
        (part - part % MEMORY_STEP).clamp(DEFAULT_MEMORY, MOST_MEMORY)
    }
}

impl RunConfig {
    /// With what the user left out: vCPUs and memory that suit the host for a guest with a command, 1 and 512 MiB for
    /// another one, which knows itself what it needs; a source of randomness; and `directory`, an absolute path, for
    /// the command to run in.
    #[must_use]
    pub fn with_defaults(mut self, host: &Host, directory: &Path) -> RunConfig {
        let has_command = !self.command.is_empty();
        self.cpus.get_or_insert(if has_command { host.default_cpus() } else { 1 });
        self.memory.get_or_insert(if has_command { host.default_memory() } else { DEFAULT_MEMORY });
        self.rng.get_or_insert(true);
        if has_command {
            self.directory.get_or_insert_with(|| directory.to_owned());
        }
        self
    }
}

/// `MemAvailable` of `/proc/meminfo` (proc(5)), in bytes.
fn available(meminfo: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

/// The lowest `memory.max` of the process's control group (version 2) and those around it, in bytes: what a CI job in a
/// container has, however large the machine is.
fn memory_limit(cgroup: &str, mount: &Path) -> u64 {
    let group = cgroup.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let directory = mount.join(group);
    let around = directory.ancestors().take_while(|directory| directory.starts_with(mount));
    let limits = around.filter_map(|directory| {
        std::fs::read_to_string(directory.join("memory.max")).ok()?.trim().parse().ok()
    });
    limits.min().unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_gets_what_suits_the_host() {
        const G: u64 = 1 << 30;
        for (cpus, memory, guest_cpus, guest_memory) in [
            (1, 0, 1, 512 << 20),
            (2, G, 2, 512 << 20),
            (4, 8 * G, 4, 2 * G),
            (8, 7 * G + 12345, 8, 1792 << 20),
            (128, 512 * G, 8, 4 * G),
        ] {
            let host = Host { cpus, memory };
            assert_eq!((host.default_cpus(), host.default_memory()), (guest_cpus, guest_memory));
            let config = RunConfig { command: vec!["ls".into()], ..RunConfig::default() };
            let config = config.with_defaults(&host, Path::new("/home"));
            assert_eq!((config.cpus, config.memory), (Some(guest_cpus), Some(guest_memory)));
            assert_eq!((config.rng, config.directory), (Some(true), Some("/home".into())));
        }
    }

    #[test]
    fn what_the_user_says_stays_and_a_guest_without_a_command_is_small() {
        let host = Host { cpus: 16, memory: 64 << 30 };
        let config = RunConfig::default().with_defaults(&host, Path::new("/home"));
        assert_eq!((config.cpus, config.memory, config.directory), (Some(1), Some(DEFAULT_MEMORY), None));
        let given = RunConfig {
            command: vec!["ls".into()],
            cpus: Some(3),
            memory: Some(64 << 20),
            rng: Some(false),
            directory: Some("/".into()),
            ..RunConfig::default()
        };
        assert_eq!(given.clone().with_defaults(&host, Path::new("/home")), given);
    }

    #[test]
    fn facts_are_read_from_the_system() {
        let meminfo = "MemTotal:       8000000 kB\nMemAvailable:    2048 kB\n";
        assert_eq!((available(meminfo), available("")), (2 << 20, 0));
        let mount = tempfile::TempDir::new().unwrap();
        let job = mount.path().join("ci/job");
        std::fs::create_dir_all(&job).unwrap();
        assert_eq!(memory_limit("0::/ci/job\n", mount.path()), u64::MAX);
        std::fs::write(job.join("memory.max"), "max\n").unwrap();
        std::fs::write(mount.path().join("ci/memory.max"), "1073741824\n").unwrap();
        assert_eq!(memory_limit("0::/ci/job\n", mount.path()), 1 << 30);
        std::fs::write(job.join("memory.max"), "4096\n").unwrap();
        assert_eq!(memory_limit("1:name=systemd:/x\n0::/ci/job\n", mount.path()), 4096);
        let host = Host::read();
        assert!(host.cpus > 0 && host.memory > 0, "{host:?}");
    }
}
