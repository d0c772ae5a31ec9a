//! Where the answers come from: handles to the counters of a VM, and what it was configured to be.

use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::virtio::block::{DiskCounters, DiskCountersHandle};
use devices::virtio::console::{PortCounters, PortsHandle};
use devices::virtio::fs::{CountersHandle, FileSystemCounters};
use serde::Serialize;

use super::model::{DiskStatus, Files, ShareFiles, ShareStatus, ShareWindow, Status, Windows};
use crate::config::ValidConfig;

/// Files that `/v1/files` names, for each share.
const TOP_FILES: usize = 100;

/// A view of a VM, from any thread, also when the VM has ended.
#[derive(Clone)]
pub struct Probe(Arc<Parts>);

struct Parts {
    config: ValidConfig,
    started: Instant,
    shares: Vec<CountersHandle>,
    disks: Vec<DiskCountersHandle>,
    ports: PortsHandle,
}

/// All counters of a VM at one moment, named as in the report of its end.
#[derive(Clone, Debug, Serialize)]
pub struct Counters {
    /// Seconds since the VM was built.
    pub uptime_seconds: f64,
    /// vCPUs.
    pub cpus: u8,
    /// Bytes of RAM.
    pub memory: u64,
    /// The shares.
    pub shares: Vec<FileSystemCounters>,
    /// The disks.
    pub disks: Vec<DiskCounters>,
    /// The ports of the virtio-console device.
    pub ports: Vec<PortCounters>,
}

impl Probe {
    pub(crate) fn new(
        config: ValidConfig,
        started: Instant,
        shares: Vec<CountersHandle>,
        disks: Vec<DiskCountersHandle>,
        ports: PortsHandle,
    ) -> Probe {
        Probe(Arc::new(Parts { config, started, shares, disks, ports }))
    }

    fn uptime(&self) -> f64 {
        self.0.started.elapsed().as_secs_f64()
    }

    /// All counters as they are now. What costs the VM something to find out, such as the VMM's own memory, is not among
    /// them.
    pub fn counters(&self) -> Counters {
        Counters {
            uptime_seconds: self.uptime(),
            cpus: self.0.config.cpus,
            memory: self.0.config.memory,
            shares: self.0.shares.iter().map(CountersHandle::snapshot).collect(),
            disks: self.0.disks.iter().map(DiskCountersHandle::snapshot).collect(),
            ports: self.0.ports.counters(),
        }
    }

    /// What the VM is, and how it is.
    pub fn status(&self) -> Status {
        let config = &self.0.config;
        let shares = config.shares.iter().zip(&self.0.shares).map(|(share, handle)| ShareStatus {
            tag: share.tag.clone(),
            path: share.path.clone(),
            read_only: share.read_only,
            window: handle.snapshot().window.map_or(0, |window| window.size),
            dax: share.dax.to_string(),
            prefault: share.prefault.to_string(),
            cache: share.cache.to_string(),
        });
        let disks =
            config.disks.iter().map(|disk| DiskStatus { path: disk.path.clone(), read_only: disk.read_only });
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            state: "running".to_owned(),
            uptime_seconds: self.uptime(),
            kernel: config.kernel.clone(),
            cmdline: config.command_line(),
            cpus: config.cpus,
            memory: config.memory,
            timeout_seconds: config.timeout.as_ref().map(Duration::as_secs_f64),
            shares: shares.collect(),
            disks: disks.collect(),
        }
    }

    /// The windows.
    pub fn windows(&self) -> Windows {
        let window = |handle: &CountersHandle| {
            let FileSystemCounters {
                tag,
                window,
                files,
                thrash,
                denied_mappings,
                dax_granted,
                dax_denied,
                decisions,
                setup_latency,
                remove_latency,
                ..
            } = handle.snapshot();
            Some(ShareWindow {
                tag,
                counters: window?,
                churned_chunks: files.map_or(0, |files| files.churned_chunks),
                thrash: thrash.unwrap_or_default(),
                denied_mappings,
                dax_granted,
                dax_denied,
                decisions,
                setup_latency,
                remove_latency,
                chunks: handle.chunk_owners(),
            })
        };
        Windows { uptime_seconds: self.uptime(), shares: self.0.shares.iter().filter_map(window).collect() }
    }

    /// The files that have or had most of the windows.
    pub fn files(&self) -> Files {
        let with_window = self.0.shares.iter().filter(|share| share.has_window());
        let files = |share: &CountersHandle| ShareFiles {
            tag: share.tag().to_owned(),
            table: share.files(TOP_FILES),
        };
        Files { shares: with_window.map(files).collect() }
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use devices::virtio::fs::{FileSystemConfig, FileSystemDevice};

    use super::*;
    use crate::config::{ShareConfig, VmConfig};

    /// Devices as a VM has them, without a VM.
    pub(crate) struct Machine {
        pub(crate) probe: Probe,
        _devices: Vec<FileSystemDevice>,
        _directory: tempfile::TempDir,
    }

    /// Two shares, the first of which has a window of 64 MiB, and 3 vCPUs.
    pub(crate) fn machine() -> Machine {
        let directory = tempfile::tempdir().unwrap();
        let share = |tag: &str, window| ShareConfig {
            read_only: true,
            window: Some(window),
            dax: "auto".parse().unwrap(),
            ..ShareConfig::new(tag, directory.path())
        };
        let shares = vec![share("with \"window\"", 64 << 20), share("without", 0)];
        let devices: Vec<_> = shares
            .iter()
            .map(|share| {
                FileSystemDevice::new(FileSystemConfig {
                    tag: share.tag.clone(),
                    path: share.path.clone(),
                    read_only: share.read_only,
                    window_size: share.window.unwrap_or(0),
                    policy: share.dax.load().unwrap(),
                    prefault: share.prefault,
                    cache: share.cache,
                    request_queues: 1,
                    descriptors: 1_000,
                })
                .unwrap()
            })
            .collect();
        let config = VmConfig {
            kernel: "/boot/vmlinuz".into(),
            initrd: None,
            cmdline: "quiet".into(),
            cpus: 3,
            memory: 512 << 20,
            shares,
            disks: Vec::new(),
            rng: false,
            nested: false,
            ..VmConfig::default()
        };
        let handles = devices.iter().map(FileSystemDevice::counters).collect();
        let config = ValidConfig::new(config).unwrap();
        let probe = Probe::new(config, Instant::now(), handles, Vec::new(), PortsHandle::default());
        Machine { probe, _devices: devices, _directory: directory }
    }
}
