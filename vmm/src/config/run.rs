//! What a user asks of `daxvm run`: [`RunConfig`], from the command line and a configuration file. The machine that
//! comes of it is a [`VmConfig`](super::VmConfig).

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{DaxConfig, DiskConfig, ShareConfig};
use crate::guest::protocol::RootMode;

/// A guest to run, and what to run in it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct RunConfig {
    /// A bzImage, an ELF vmlinux, or a directory with an unpacked kernel package; the running kernel when it is missing.
    pub kernel: Option<PathBuf>,
    /// Where the kernel's modules are: a directory that holds `lib/modules/VERSION`, or is one; looked for when missing.
    pub modules: Option<PathBuf>,
    /// The initramfs, for a guest without a command.
    pub initrd: Option<PathBuf>,
    /// Kernel parameters beside daxvm's own.
    pub cmdline: String,
    /// vCPUs; by default what suits the host.
    pub cpus: Option<u8>,
    /// Bytes of RAM; by default what suits the host.
    pub memory: Option<u64>,
    /// The root file system, for a guest with a command.
    pub root: RootConfig,
    /// Directories and files of the host that the command may change, where they are.
    pub rw: Vec<PathBuf>,
    /// Shared directories, which the guest finds by their tags.
    pub shares: Vec<ShareConfig>,
    /// Disks.
    pub disks: Vec<DiskConfig>,
    /// Whether the guest has a virtio-rng device; it has by default.
    pub rng: Option<bool>,
    /// Environment variables for the command: a value, or none for the caller's value.
    pub env: Vec<(String, Option<String>)>,
    /// The command's working directory; the caller's by default.
    pub directory: Option<PathBuf>,
    /// How long all of it may take.
    pub timeout: Option<Duration>,
    /// How long the guest may show no sign of life before its init runs.
    pub boot_timeout: Option<Duration>,
    /// Where the kernel's console goes: a file, or `stderr`; with a command it is kept for messages by default.
    pub console: Option<PathBuf>,
    /// Where the report goes.
    pub report: Option<PathBuf>,
    /// Program and arguments; none for a guest with an initramfs of its own.
    pub command: Vec<OsString>,
}

/// The root file system of a guest with a command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct RootConfig {
    /// The directory; the host's own root by default.
    pub path: PathBuf,
    /// What happens to changes.
    pub mode: RootMode,
    /// Which of its files are DAX.
    pub dax: Option<DaxConfig>,
    /// Bytes of its DAX window.
    pub window: Option<u64>,
}

impl Default for RootConfig {
    fn default() -> RootConfig {
        RootConfig { path: "/".into(), mode: RootMode::default(), dax: None, window: None }
    }
}
