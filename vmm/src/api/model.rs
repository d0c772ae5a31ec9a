//! What the API answers, as both sides know it. Fields may be added; none is renamed or changes its meaning.

use std::path::PathBuf;

use devices::virtio::fs::window::WindowCounters;
use devices::virtio::fs::{DecisionCount, FileTable, Latency, ThrashCounters};
use serde::{Deserialize, Serialize};

/// `/v1/status`: what the VM is, and how it is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The version of daxvm.
    pub version: String,
    /// The process.
    pub pid: u32,
    /// How the VM is: `running`.
    pub state: String,
    /// Seconds since the VM was built.
    pub uptime_seconds: f64,
    /// The kernel's image.
    pub kernel: PathBuf,
    /// The kernel's parameters.
    pub cmdline: String,
    /// vCPUs.
    pub cpus: u8,
    /// Bytes of RAM.
    pub memory: u64,
    /// Seconds that the VM may run; none for no limit.
    pub timeout_seconds: Option<f64>,
    /// The shares.
    pub shares: Vec<ShareStatus>,
    /// The disks.
    pub disks: Vec<DiskStatus>,
}

/// A share as it was configured.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShareStatus {
    /// The tag.
    pub tag: String,
    /// The directory.
    pub path: PathBuf,
    /// Whether the guest may change nothing.
    pub read_only: bool,
    /// Bytes of the DAX window, 0 for none.
    pub window: u64,
    /// The DAX policy: its name, or its rule file.
    pub dax: String,
    /// Which pages are prefaulted, where no rule says it.
    pub prefault: String,
    /// The cache mode.
    pub cache: String,
}

/// A disk as it was configured.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// The image.
    pub path: PathBuf,
    /// Whether the guest may not write to it.
    pub read_only: bool,
}

/// `/v1/window`: the windows of all shares that have one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Windows {
    /// Seconds since the VM was built, for rates.
    pub uptime_seconds: f64,
    /// The shares.
    pub shares: Vec<ShareWindow>,
}

/// The window of one share.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShareWindow {
    /// The tag.
    pub tag: String,
    /// What the window holds and has done.
    pub counters: WindowCounters,
    /// Chunks that changed hands at once.
    pub churned_chunks: u64,
    /// Whether the window does for the guest.
    pub thrash: ThrashCounters,
    /// SETUPMAPPING requests that the policy forbade.
    pub denied_mappings: u64,
    /// Times that the guest got to know a file as DAX.
    pub dax_granted: u64,
    /// Times that it got to know one as not DAX.
    pub dax_denied: u64,
    /// What the policy decided.
    pub decisions: Vec<DecisionCount>,
    /// How long SETUPMAPPING requests took.
    pub setup_latency: Latency,
    /// How long REMOVEMAPPING requests took.
    pub remove_latency: Latency,
    /// The number of the file that each chunk of 2 MiB shows, by `number` in `/v1/files`; 0 for none.
    pub chunks: Vec<u32>,
}

/// `/v1/files`: the files that have or had most of the windows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Files {
    /// The shares that have a window.
    pub shares: Vec<ShareFiles>,
}

/// The files of one share.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShareFiles {
    /// The tag.
    pub tag: String,
    /// The files.
    #[serde(flatten)]
    pub table: FileTable,
}
