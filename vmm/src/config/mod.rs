//! What a VM is to be: [`VmConfig`], plain data as a user writes it, and [`ValidConfig`], which cannot be wrong in
//! itself. Only the system can still refuse it.

mod check;
mod document;
mod file;
mod host;
mod run;
mod values;
mod windows;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use devices::virtio::fs::CacheMode;
use devices::virtio::fs::policy::{Policy, Prefault, RuleFileError, UnknownPolicy};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub(crate) use check::WHERE_KERNELS_ARE;
pub use check::{InvalidRun, Problem};
pub use document::Mistake;
pub use file::{ConfigFileError, schema};
pub use host::Host;
pub use run::{RootConfig, RunConfig};
pub use values::{
    parse_cpus, parse_interval, parse_limit, parse_memory, parse_tag, parse_variable, parse_window,
    split_options,
};
pub use windows::{ShareWindow, WindowsError};

use crate::arch::x86_64::MAX_VCPUS;
pub use crate::sandbox::SandboxMode;

/// The least memory that a guest can have, in bytes.
pub const MIN_MEMORY: u64 = 64 << 20;
/// The most memory that a guest can have, in bytes: what the smallest physical address space of a supported CPU holds
/// beside windows.
pub const MAX_MEMORY: u64 = 512 << 30;
/// What a guest gets when the user gives no memory, in bytes.
pub const DEFAULT_MEMORY: u64 = 512 << 20;
/// Shares that a guest can have.
pub const MAX_SHARES: usize = 24;
/// Devices that fit on the PCI bus beside the host bridge.
pub const MAX_DEVICES: usize = 31;
/// What the command line begins with; what the user gives comes after it, and so wins.
/// `reboot=a`: with hardware-reduced ACPI and no EFI, Linux would otherwise reset by way of a BIOS that is not there.
pub const DEFAULT_COMMAND_LINE: &str = "console=ttyS0 panic=-1 reboot=a";

/// A VM as a user describes it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// The kernel: a bzImage or an ELF vmlinux.
    pub kernel: PathBuf,
    /// The initramfs.
    #[serde(default)]
    pub initrd: Option<PathBuf>,
    /// Kernel parameters beside [`DEFAULT_COMMAND_LINE`].
    #[serde(default)]
    pub cmdline: String,
    /// vCPUs, 1 to 32.
    #[serde(default = "default_cpus")]
    pub cpus: u8,
    /// Bytes of RAM, at least 64 MiB, a multiple of 2 MiB.
    #[serde(default = "default_memory")]
    pub memory: u64,
    /// Shared directories.
    #[serde(default)]
    pub shares: Vec<ShareConfig>,
    /// Disks.
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// Whether the guest has a virtio-rng device.
    #[serde(default)]
    pub rng: bool,
    /// Whether the guest has VMX or SVM, where the host's KVM can nest: it can have guests of its own then.
    #[serde(default)]
    pub nested: bool,
    /// Whether DAX windows may take more than an eighth of the guest's RAM for page descriptors.
    #[serde(default)]
    pub large_windows: bool,
    /// How long the VM may run.
    #[serde(default)]
    pub timeout: Option<Duration>,
    /// Whether the process is confined ([`Vm::confine`](crate::Vm::confine)); off, unless whoever owns the process says
    /// so.
    #[serde(default)]
    pub sandbox: SandboxMode,
}

impl Default for VmConfig {
    /// A machine without a kernel, for which there is no default.
    fn default() -> VmConfig {
        VmConfig {
            kernel: PathBuf::new(),
            initrd: None,
            cmdline: String::new(),
            cpus: default_cpus(),
            memory: default_memory(),
            shares: Vec::new(),
            disks: Vec::new(),
            rng: false,
            nested: false,
            large_windows: false,
            timeout: None,
            sandbox: SandboxMode::Off,
        }
    }
}

/// A virtio-blk device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct DiskConfig {
    /// A raw image or a block device.
    pub path: PathBuf,
    /// The guest may not write to it.
    #[serde(default)]
    pub read_only: bool,
}

/// A shared directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ShareConfig {
    /// The name by which the guest mounts it, 1 to 36 bytes.
    #[serde(deserialize_with = "values::tag")]
    #[schemars(schema_with = "values::tag_schema")]
    pub tag: String,
    /// The directory.
    pub path: PathBuf,
    /// The guest may not change anything.
    #[serde(default)]
    pub read_only: bool,
    /// Bytes of the DAX window, 0 for none; by default what costs the guest about 2 % of its RAM.
    #[serde(default, with = "values::window", skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "values::size_schema")]
    pub window: Option<u64>,
    /// Which files are DAX.
    #[serde(default)]
    pub dax: DaxConfig,
    /// Which pages of DAX files the guest finds at hand once it has mapped them, where no rule says it.
    #[serde(default)]
    #[schemars(schema_with = "values::prefault_schema")]
    pub prefault: Prefault,
    /// What the guest may keep of what it has seen.
    #[serde(default)]
    #[schemars(schema_with = "values::cache_schema")]
    pub cache: CacheMode,
}

impl ShareConfig {
    /// A directory that the guest may change, with the defaults of the command line.
    pub fn new(tag: &str, path: impl Into<PathBuf>) -> ShareConfig {
        ShareConfig {
            tag: tag.into(),
            path: path.into(),
            read_only: false,
            window: None,
            dax: DaxConfig::default(),
            prefault: Prefault::default(),
            cache: CacheMode::default(),
        }
    }
}

/// Which files of a share are DAX: the name of a policy (never, always, inode, size, size:BYTES, auto), or a rule file.
/// As text, a rule file is what ends in `.toml` or has a slash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub enum DaxConfig {
    /// A policy that has a name.
    Named(Policy),
    /// A rule file, which is read when the share is made.
    File(PathBuf),
}

impl DaxConfig {
    /// The policy; reads the rule file if it is one.
    ///
    /// # Errors
    /// The rule file cannot be read, or has mistakes.
    pub fn load(&self) -> Result<Policy, RuleFileError> {
        match self {
            DaxConfig::Named(policy) => Ok(policy.clone()),
            DaxConfig::File(path) => Policy::load(path),
        }
    }
}

impl Default for DaxConfig {
    fn default() -> DaxConfig {
        DaxConfig::Named(Policy::default())
    }
}

impl FromStr for DaxConfig {
    type Err = UnknownPolicy;

    fn from_str(text: &str) -> Result<DaxConfig, UnknownPolicy> {
        if text.ends_with(".toml") || text.contains('/') {
            return Ok(DaxConfig::File(text.into()));
        }
        text.parse().map(DaxConfig::Named)
    }
}

impl TryFrom<String> for DaxConfig {
    type Error = UnknownPolicy;

    fn try_from(text: String) -> Result<DaxConfig, UnknownPolicy> {
        text.parse()
    }
}

impl fmt::Display for DaxConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DaxConfig::Named(policy) => policy.fmt(f),
            DaxConfig::File(path) => path.display().fmt(f),
        }
    }
}

impl From<DaxConfig> for String {
    fn from(config: DaxConfig) -> String {
        config.to_string()
    }
}

fn default_cpus() -> u8 {
    1
}

fn default_memory() -> u64 {
    DEFAULT_MEMORY
}

/// Why a configuration is wrong. The message names what to change.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// Number of vCPUs.
    #[error("--cpus {0}: a guest has 1 to {MAX_VCPUS} vCPUs")]
    Cpus(u8),
    /// Size of RAM.
    #[error("--memory {given}: {limits}")]
    Memory {
        /// Bytes given.
        given: u64,
        /// What can be given.
        limits: String,
    },
    /// Too many shares.
    #[error("{0} shares: at most {MAX_SHARES} fit on the PCI bus")]
    Shares(usize),
    /// Too many devices.
    #[error(
        "{0} devices (shares, disks, the entropy source, the console): at most {MAX_DEVICES} fit on the PCI bus; \
         leave out a share or a disk"
    )]
    Devices(usize),
    /// Two shares of one name.
    #[error("Two shares have the tag `{0}`: the guest could not tell them apart")]
    DuplicateTag(String),
    /// The timeout.
    #[error("--timeout 0s: the guest needs time to run; leave --timeout out for no limit")]
    Timeout,
}

/// A configuration that has been checked.
#[derive(Debug, Clone)]
pub struct ValidConfig(VmConfig);

impl ValidConfig {
    /// Checks `config`; nothing is opened.
    ///
    /// # Errors
    /// The first thing that is wrong. What only the device can judge (tags, window sizes) it checks when it is built.
    pub fn new(config: VmConfig) -> Result<ValidConfig, ConfigError> {
        if !(1..=MAX_VCPUS).contains(&config.cpus) {
            return Err(ConfigError::Cpus(config.cpus));
        }
        values::check_memory(config.memory)
            .map_err(|limits| ConfigError::Memory { given: config.memory, limits })?;
        if config.shares.len() > MAX_SHARES {
            return Err(ConfigError::Shares(config.shares.len()));
        }
        // The ports' device is counted always, so that no configuration depends on what the guest is wired to.
        let devices = config.shares.len() + config.disks.len() + usize::from(config.rng) + 1;
        if devices > MAX_DEVICES {
            return Err(ConfigError::Devices(devices));
        }
        for (i, share) in config.shares.iter().enumerate() {
            if config.shares[..i].iter().any(|other| other.tag == share.tag) {
                return Err(ConfigError::DuplicateTag(share.tag.clone()));
            }
        }
        if config.timeout.is_some_and(|timeout| timeout.is_zero()) {
            return Err(ConfigError::Timeout);
        }
        Ok(ValidConfig(config))
    }

    /// The kernel command line.
    pub fn command_line(&self) -> String {
        format!("{DEFAULT_COMMAND_LINE} {}", self.cmdline).trim_end().to_owned()
    }
}

impl std::ops::Deref for ValidConfig {
    type Target = VmConfig;
    fn deref(&self) -> &VmConfig {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VmConfig {
        VmConfig { kernel: "k".into(), ..VmConfig::default() }
    }

    fn share(tag: &str) -> ShareConfig {
        ShareConfig::new(tag, "/")
    }

    #[test]
    fn limits_are_enforced_and_named() {
        assert!(ValidConfig::new(config()).is_ok());
        assert_eq!(ValidConfig::new(VmConfig { cpus: 0, ..config() }).unwrap_err(), ConfigError::Cpus(0));
        assert!(ValidConfig::new(VmConfig { cpus: 33, ..config() }).is_err());
        for (memory, nearest) in [(1, 64), ((512 << 20) + 1, 514), (u64::MAX, 512 << 10)] {
            let error = ValidConfig::new(VmConfig { memory, ..config() }).unwrap_err().to_string();
            assert!(error.starts_with(&format!("--memory {memory}: a guest has")), "{error}");
            assert!(error.ends_with(&format!("the nearest is {nearest}M")), "{error}");
        }
        let twins = VmConfig { shares: vec![share("a"), share("b"), share("a")], ..config() };
        assert_eq!(ValidConfig::new(twins).unwrap_err(), ConfigError::DuplicateTag("a".into()));
        let many = VmConfig { shares: (0..25).map(|i| share(&i.to_string())).collect(), ..config() };
        assert_eq!(ValidConfig::new(many).unwrap_err(), ConfigError::Shares(25));
        let disk = DiskConfig { path: "d".into(), read_only: true };
        let disks = |count, rng| {
            let shares = (0..24).map(|i| share(&i.to_string())).collect();
            ValidConfig::new(VmConfig { shares, disks: vec![disk.clone(); count], rng, ..config() }).err()
        };
        assert_eq!(disks(6, false), None);
        assert_eq!(disks(6, true), Some(ConfigError::Devices(32)));
        assert_eq!(disks(7, false), Some(ConfigError::Devices(32)));
    }

    #[test]
    fn policies_are_names_or_files() {
        for (text, config) in [
            ("never", DaxConfig::Named(Policy::Never)),
            ("size:2M", DaxConfig::Named(Policy::Size(2 << 20))),
            ("rules.toml", DaxConfig::File("rules.toml".into())),
            ("./auto", DaxConfig::File("./auto".into())),
        ] {
            assert_eq!(text.parse(), Ok(config.clone()));
            let json = serde_json::to_string(&config).unwrap();
            assert_eq!(json, format!("{text:?}"));
            assert_eq!(serde_json::from_str::<DaxConfig>(&json).unwrap(), config);
        }
        let error = serde_json::from_str::<DaxConfig>("\"inod\"").unwrap_err().to_string();
        assert!(error.contains("did you mean `inode`"), "{error}");
        assert!(DaxConfig::File("/nonexistent/p.toml".into()).load().is_err());
    }

    #[test]
    fn the_users_parameters_come_last() {
        let config = ValidConfig::new(VmConfig { cmdline: "panic=5 quiet".into(), ..config() }).unwrap();
        assert_eq!(config.command_line(), "console=ttyS0 panic=-1 reboot=a panic=5 quiet");
    }
}
