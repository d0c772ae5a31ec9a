//! Counters for Prometheus: the text of `/metrics` and of `--metrics-file`. docs/observability.md lists all names; a test
//! holds it to that.

use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use devices::virtio::fs::window::WindowCounters;
use devices::virtio::fs::{FileSystemCounters, Latency, ThrashCounters};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use crate::api::{Counters, Probe};
use crate::sandbox::seccomp::{self, Kind};

/// The media type of the text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// How often a metrics file is written unless the user says otherwise.
pub const DEFAULT_INTERVAL: Duration = Duration::from_secs(5);

/// The metrics file's permissions.
const MODE: u32 = 0o644;

/// The counters as text, in the OpenMetrics 1.0 format, which Prometheus takes.
pub fn encode(counters: &Counters) -> String {
    let mut registry = Registry::with_prefix("daxvm");
    registry.register_collector(Box::new(Exposition(counters.clone())));
    let mut encoded = String::new();
    // Writing to a string cannot fail.
    let _ = text::encode(&mut encoded, &registry);
    encoded
}

#[derive(Debug)]
struct Exposition(Counters);

/// The labels of one sample.
type Labels = Vec<(&'static str, String)>;

/// Samples of one metric.
type Samples<T> = Vec<(Labels, T)>;

/// A number that the share's counters have, its name and its meaning.
type Entry<T, N = u64> = (&'static str, &'static str, fn(&T) -> N);

/// What only grows, of shares with a window.
const WINDOW_COUNTERS: &[Entry<WindowCounters>] = &[
    ("window_setup_mappings", "SETUPMAPPING requests that were carried out", |w| w.setup_mappings),
    (
        "window_failed_setup_mappings",
        "SETUPMAPPING requests that the window refused or could not carry out",
        |w| w.failed_setup_mappings,
    ),
    ("window_remove_mappings", "Entries of REMOVEMAPPING requests that were carried out", |w| {
        w.remove_mappings
    }),
    ("window_upgraded_chunks", "Chunks that became writable in place", |w| w.upgraded_chunks),
    ("window_overlaid_chunks", "Chunks that were mapped over another mapping", |w| w.overlaid_chunks),
    ("window_cleared_chunks", "Chunks that were unmapped because a session ended", |w| w.cleared_chunks),
    ("window_prefaults", "Times that pages were put in the guest's reach as they were mapped", |w| {
        w.prefaults
    }),
    (
        "window_replaced_pages",
        "Pages that were replaced by zeros because the device could not access them",
        |w| w.replaced_pages,
    ),
    ("window_lost_files", "Mapped files that the host made shorter", |w| w.lost_files),
    ("window_lost_pages", "Pages of mapped files that the host took away", |w| w.lost_pages),
    ("window_restored_pages", "Pages that were lost and show their file again", |w| w.restored_pages),
    ("window_failed_pages", "Pages that the host could not provide", |w| w.failed_pages),
    ("window_copied_pages", "Pages of which the guest got a copy, as it wrote where it may not", |w| {
        w.copied_pages
    }),
    ("window_unwatched_files", "Mapped files that could not be watched on the host", |w| w.unwatched_files),
];

/// What rises and falls, of shares with a window.
const WINDOW_GAUGES: &[Entry<WindowCounters>] = &[
    ("window_chunks", "Chunks of 2 MiB that the window has", |w| w.size >> 21),
    ("window_mapped_chunks", "Chunks that are mapped", |w| w.mapped_chunks),
    ("window_mapped_chunks_peak", "The most chunks that were mapped at once", |w| w.peak_mapped_chunks),
    ("window_stray_bytes", "Bytes that the guest touched where nothing is mapped", |w| w.stray_bytes),
];

/// What only grows, of all shares.
const SHARE_COUNTERS: &[Entry<FileSystemCounters>] = &[
    ("fs_dax_granted", "Times that the guest got to know a file as DAX", |s| s.dax_granted),
    ("fs_dax_denied", "Times that the guest got to know a file as not DAX", |s| s.dax_denied),
    ("fs_dax_changed", "Times that a file which the guest knew became DAX, or was DAX no more", |s| {
        s.reincarnations
    }),
    ("fs_hint_queries", "Questions to the host for a file's persistent hint", |s| s.hint_queries),
    ("fs_denied_mappings", "SETUPMAPPING requests for files that are not DAX", |s| s.denied_mappings),
];

/// Whether the window does for the guest.
const THRASH_GAUGES: &[Entry<ThrashCounters>] = &[
    ("window_thrash_level", "How much DAX is held back because the window thrashes, from 0 to 5", |t| {
        t.level.into()
    }),
    ("window_sufficient_bytes", "Size of a window that would not have thrashed; 0 if it never did", |t| {
        t.sufficient_window
    }),
];

/// What only grows, of shares with a window, from the accounts of its files.
const FILE_COUNTERS: &[Entry<FileSystemCounters>] = &[
    ("window_churned_chunks", "Chunks that a file got within a second after another one had them", |s| {
        s.files.as_ref().map_or(0, |files| files.churned_chunks)
    }),
    ("window_forgotten_files", "Files whose accounts were closed to make room for others", |s| {
        s.files.as_ref().map_or(0, |files| files.forgotten_files)
    }),
    ("window_refaulted_chunks", "Chunks mapped again after they were taken away for want of room", |s| {
        s.thrash.map_or(0, |thrash| thrash.refaulted_chunks)
    }),
];

impl Collector for Exposition {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let Exposition(counters) = self;
        let out = &mut encoder;
        let version = vec![("version", env!("CARGO_PKG_VERSION").to_owned())];
        gauges(out, "build_info", "1, with the version of daxvm", None, vec![(version, 1.0)])?;
        let single = |value: f64| vec![(Vec::new(), value)];
        let seconds = Some(&Unit::Seconds);
        gauges(out, "uptime", "Time since the VM was built", seconds, single(counters.uptime_seconds))?;
        gauges(out, "vcpus", "vCPUs of the guest", None, single(counters.cpus.into()))?;
        let memory = single(counters.memory as f64);
        gauges(out, "memory", "RAM of the guest", Some(&Unit::Bytes), memory)?;
        self.windows(out)?;
        self.shares(out)?;
        self.disks(out)?;
        let ports = |value: fn(&devices::virtio::console::PortCounters) -> u64| {
            counters.ports.iter().map(|port| (vec![("port", port.name.clone())], value(port))).collect()
        };
        let bytes = Some(&Unit::Bytes);
        totals(out, "port_input", "From a port's input to the guest", bytes, ports(|port| port.bytes_in))?;
        totals(out, "port_output", "From the guest to a port's output", bytes, ports(|port| port.bytes_out))
    }
}

impl Exposition {
    fn windows(&self, out: &mut DescriptorEncoder) -> fmt::Result {
        let with_window = || self.0.shares.iter().filter_map(|share| Some((share, share.window.as_ref()?)));
        for (name, help, value) in WINDOW_GAUGES {
            let samples = with_window().map(|(share, window)| (labels(share), value(window) as f64));
            gauges(out, name, help, None, samples.collect())?;
        }
        for (name, help, value) in THRASH_GAUGES {
            let samples = with_window()
                .map(|(share, _)| (labels(share), value(&share.thrash.unwrap_or_default()) as f64));
            gauges(out, name, help, None, samples.collect())?;
        }
        for (name, help, value) in WINDOW_COUNTERS {
            let samples = with_window().map(|(share, window)| (labels(share), value(window)));
            totals(out, name, help, None, samples.collect())?;
        }
        for (name, help, value) in FILE_COUNTERS {
            let samples = with_window().map(|(share, _)| (labels(share), value(share)));
            totals(out, name, help, None, samples.collect())?;
        }
        let prefaulted =
            with_window().map(|(share, window)| (labels(share), window.prefault_bytes)).collect();
        let help = "Pages that were put in the guest's reach as they were mapped";
        totals(out, "window_prefault", help, Some(&Unit::Bytes), prefaulted)?;
        let setup = with_window().map(|(share, _)| (labels(share), &share.setup_latency)).collect();
        durations(out, "window_setup_mapping_duration", "Time that SETUPMAPPING requests took", setup)?;
        let remove = with_window().map(|(share, _)| (labels(share), &share.remove_latency)).collect();
        durations(out, "window_remove_mapping_duration", "Time that REMOVEMAPPING requests took", remove)
    }

    fn shares(&self, out: &mut DescriptorEncoder) -> fmt::Result {
        let shares = &self.0.shares;
        for (name, help, value) in SHARE_COUNTERS {
            let samples = shares.iter().map(|share| (labels(share), value(share)));
            totals(out, name, help, None, samples.collect())?;
        }
        let mut requests = Vec::new();
        let mut decisions = Vec::new();
        for share in shares {
            requests.extend(share.requests.iter().map(|(operation, count)| {
                (with(labels(share), [("operation", (*operation).to_owned())]), *count)
            }));
            decisions.extend(share.decisions.iter().map(|made| {
                let more = [
                    ("rule", made.rule.clone()),
                    ("reason", made.reason.clone()),
                    ("dax", made.dax.to_string()),
                ];
                (with(labels(share), more), made.count)
            }));
        }
        totals(out, "fs_requests", "Requests of the FUSE protocol", None, requests)?;
        totals(out, "fs_policy_decisions", "Decisions of the policy, by rule and reason", None, decisions)
    }

    fn disks(&self, out: &mut DescriptorEncoder) -> fmt::Result {
        type Disk = devices::virtio::block::DiskCounters;
        let disks = |value: fn(&Disk) -> u64| {
            let disks = self.0.disks.iter();
            disks.map(|disk| (vec![("disk", disk.path.display().to_string())], value(disk))).collect()
        };
        let kinds: [Entry<Disk>; 4] = [
            ("read", "", |disk| disk.reads),
            ("write", "", |disk| disk.writes),
            ("flush", "", |disk| disk.flushes),
            ("discard", "", |disk| disk.discards),
        ];
        let mut requests = Samples::new();
        for (kind, _, value) in kinds {
            let of_kind: Samples<u64> = disks(value);
            requests.extend(
                of_kind.into_iter().map(|(labels, count)| (with(labels, [("kind", kind.to_owned())]), count)),
            );
        }
        totals(out, "disk_requests", "Requests to a disk", None, requests)?;
        totals(out, "disk_failed_requests", "Requests that failed", None, disks(|disk| disk.failed))?;
        let bytes = Some(&Unit::Bytes);
        totals(out, "disk_read", "Read by the guest", bytes, disks(|disk| disk.bytes_read))?;
        totals(out, "disk_written", "Written by the guest", bytes, disks(|disk| disk.bytes_written))
    }
}

fn labels(share: &FileSystemCounters) -> Labels {
    vec![("share", share.tag.clone())]
}

fn with<const N: usize>(mut labels: Labels, more: [(&'static str, String); N]) -> Labels {
    labels.extend(more);
    labels
}

/// A metric of which there are samples; nothing for none.
fn family<T>(
    out: &mut DescriptorEncoder,
    (name, help, unit, kind): (&str, &str, Option<&Unit>, MetricType),
    samples: Samples<T>,
    write: impl Fn(&mut MetricEncoder, T) -> fmt::Result,
) -> fmt::Result {
    if samples.is_empty() {
        return Ok(());
    }
    let mut metric = out.encode_descriptor(name, help, unit, kind)?;
    for (labels, value) in samples {
        match labels.is_empty() {
            true => write(&mut metric, value)?,
            false => write(&mut metric.encode_family(&labels)?, value)?,
        }
    }
    Ok(())
}

fn gauges(
    out: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    samples: Samples<f64>,
) -> fmt::Result {
    family(out, (name, help, unit, MetricType::Gauge), samples, |metric, value| metric.encode_gauge(&value))
}

fn totals(
    out: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    samples: Samples<u64>,
) -> fmt::Result {
    family(out, (name, help, unit, MetricType::Counter), samples, |metric, value| {
        metric.encode_counter::<NoLabelSet, _, u64>(&value, None)
    })
}

fn durations(out: &mut DescriptorEncoder, name: &str, help: &str, samples: Samples<&Latency>) -> fmt::Result {
    let kind = (name, help, Some(&Unit::Seconds), MetricType::Histogram);
    family(out, kind, samples, |metric, latency| {
        let bounds = Latency::BOUNDS.iter().copied().map(Some).chain([None]);
        let buckets: Vec<_> = bounds
            .map(|bound| {
                let bucket = latency.buckets.iter().find(|bucket| bucket.le_ns == bound);
                let bound = bound.map_or(f64::INFINITY, |bound| bound as f64 / 1e9);
                (bound, bucket.map_or(0, |bucket| bucket.count))
            })
            .collect();
        metric.encode_histogram::<NoLabelSet>(latency.sum_ns as f64 / 1e9, latency.count, &buckets, None)
    })
}

/// Why there is no metrics file.
#[derive(Debug, thiserror::Error)]
#[error(
    "Cannot write the metrics to {path}: choose a file in a directory that exists and that you may write to"
)]
pub struct MetricsFileError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Writes a file at once and then again and again, until it is dropped; then for the last time.
pub struct MetricsFile {
    path: PathBuf,
    probe: Probe,
    thread: Option<(Sender<()>, JoinHandle<()>)>,
}

impl MetricsFile {
    /// Starts thread `metrics`. Readers always find a whole file, as each time it is replaced by a new one.
    ///
    /// # Errors
    /// The file cannot be written, or the system refuses a thread. If it cannot be written later, that is logged once.
    pub fn start(path: &Path, interval: Duration, probe: Probe) -> Result<MetricsFile, MetricsFileError> {
        let failed = |source| MetricsFileError { path: path.to_owned(), source };
        write(path, &probe).map_err(failed)?;
        let (end, ended) = mpsc::channel();
        let (path_of_thread, probe_of_thread) = (path.to_owned(), probe.clone());
        let again = move || {
            seccomp::enter(Kind::Observer);
            let mut has_failed = false;
            while ended.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                if let Err(error) = write(&path_of_thread, &probe_of_thread)
                    && !std::mem::replace(&mut has_failed, true)
                {
                    tracing::warn!(%error, path = %path_of_thread.display(), "Cannot write the metrics");
                }
            }
        };
        let thread = thread::Builder::new().name("metrics".into()).spawn(again).map_err(failed)?;
        Ok(MetricsFile { path: path.to_owned(), probe, thread: Some((end, thread)) })
    }
}

impl Drop for MetricsFile {
    fn drop(&mut self) {
        if let Some((end, thread)) = self.thread.take() {
            drop(end);
            // A panic has been reported by the panic hook.
            let _ = thread.join();
        }
        if let Err(error) = write(&self.path, &self.probe) {
            tracing::warn!(%error, path = %self.path.display(), "Cannot write the last metrics");
        }
    }
}

/// Replaces the file at once by one with the counters as they are now.
fn write(path: &Path, probe: &Probe) -> io::Result<()> {
    let text = encode(&probe.counters());
    let new = beside(path);
    let replace = || {
        let mut file = create(&new)?;
        file.write_all(text.as_bytes())?;
        fs::rename(&new, path)
    };
    replace().inspect_err(|_| {
        // What there is of it takes up room, which may be what is missing.
        let _ = fs::remove_file(&new);
    })
}

/// Where the next file is while it is written: always the same name, so that a daxvm that is killed leaves one at most,
/// and the next daxvm takes it away. Collectors pass over names that begin with a dot.
fn beside(path: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".new");
    path.with_file_name(name)
}

/// Makes a file that all can read, as collectors are often other users, and only its owner can write, whatever the umask:
/// the server of shares has cleared it.
fn create(path: &Path) -> io::Result<File> {
    let create = || File::options().write(true).create_new(true).mode(MODE).open(path);
    let file = match create() {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            fs::remove_file(path)?;
            create()?
        }
        file => file?,
    };
    file.set_permissions(Permissions::from_mode(MODE))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::time::Instant;

    use devices::virtio::block::DiskCounters;
    use devices::virtio::console::PortCounters;
    use devices::virtio::fs::{DecisionCount, FileTable, LatencyBucket};

    use super::*;
    use crate::api::testing::machine;

    /// One of everything.
    fn everything() -> Counters {
        let buckets = vec![
            LatencyBucket { le_ns: Some(5_000), count: 2 },
            LatencyBucket { le_ns: Some(10_000), count: 1 },
            LatencyBucket { le_ns: None, count: 1 },
        ];
        let share = FileSystemCounters {
            tag: "a \"b\"\\\n".into(),
            window: Some(WindowCounters {
                size: 64 << 20,
                mapped_chunks: 7,
                setup_mappings: 9,
                prefaults: 5,
                prefault_bytes: 12_288,
                ..Default::default()
            }),
            requests: BTreeMap::from([("OPEN", 3), ("SETUPMAPPING", 9)]),
            dax_granted: 4,
            decisions: vec![DecisionCount {
                rule: "big".into(),
                reason: "size".into(),
                dax: false,
                count: 5,
            }],
            setup_latency: Latency { count: 4, sum_ns: 2_000_000_000, buckets },
            files: Some(FileTable { churned_chunks: 6, ..FileTable::default() }),
            thrash: Some(ThrashCounters { level: 3, refaulted_chunks: 11, ..ThrashCounters::default() }),
            ..FileSystemCounters::default()
        };
        let plain = FileSystemCounters { tag: "plain".into(), ..FileSystemCounters::default() };
        Counters {
            uptime_seconds: 1.5,
            cpus: 2,
            memory: 1 << 30,
            shares: vec![share, plain],
            disks: vec![DiskCounters {
                path: "/d".into(),
                writes: 8,
                bytes_written: 4096,
                ..Default::default()
            }],
            ports: vec![PortCounters { name: "out".into(), bytes_in: 0, bytes_out: 12 }],
        }
    }

    /// The samples by name and labels, as they stand there, and the types by name.
    fn parse(text: &str) -> (BTreeMap<String, f64>, BTreeMap<String, String>) {
        let (mut samples, mut types) = (BTreeMap::new(), BTreeMap::new());
        let body = text.strip_suffix("# EOF\n").unwrap();
        for line in body.lines() {
            if let Some(described) = line.strip_prefix("# TYPE ") {
                let (name, kind) = described.split_once(' ').unwrap();
                assert_eq!(types.insert(name.to_owned(), kind.to_owned()), None, "{name} twice");
            } else if !line.starts_with("# ") {
                let (name, value) = line.rsplit_once(' ').unwrap();
                assert_eq!(samples.insert(name.to_owned(), value.parse().unwrap()), None, "{name} twice");
            }
        }
        (samples, types)
    }

    #[test]
    fn what_is_written_can_be_read() {
        let text = encode(&everything());
        let (samples, types) = parse(&text);
        let value = |name: &str| *samples.get(name).unwrap_or_else(|| panic!("no {name} in\n{text}"));
        let share = r#"share="a \"b\"\\\n""#;
        assert_eq!(value("daxvm_uptime_seconds"), 1.5);
        assert_eq!(value("daxvm_memory_bytes"), 1_073_741_824.0);
        assert_eq!(value(&format!("daxvm_window_chunks{{{share}}}")), 32.0);
        assert_eq!(value(&format!("daxvm_window_mapped_chunks{{{share}}}")), 7.0);
        assert_eq!(value(&format!("daxvm_window_setup_mappings_total{{{share}}}")), 9.0);
        assert_eq!(value(&format!("daxvm_window_prefaults_total{{{share}}}")), 5.0);
        assert_eq!(value(&format!("daxvm_window_prefault_bytes_total{{{share}}}")), 12_288.0);
        assert_eq!(value(&format!("daxvm_window_churned_chunks_total{{{share}}}")), 6.0);
        assert_eq!(value(&format!("daxvm_window_refaulted_chunks_total{{{share}}}")), 11.0);
        assert_eq!(value(&format!("daxvm_window_thrash_level{{{share}}}")), 3.0);
        assert_eq!(value(r#"daxvm_fs_dax_granted_total{share="plain"}"#), 0.0);
        assert_eq!(value(&format!("daxvm_fs_requests_total{{{share},operation=\"OPEN\"}}")), 3.0);
        let decided =
            format!("daxvm_fs_policy_decisions_total{{{share},rule=\"big\",reason=\"size\",dax=\"false\"}}");
        assert_eq!(value(&decided), 5.0);
        assert_eq!(value(r#"daxvm_disk_requests_total{disk="/d",kind="write"}"#), 8.0);
        assert_eq!(value(r#"daxvm_disk_written_bytes_total{disk="/d"}"#), 4096.0);
        assert_eq!(value(r#"daxvm_port_output_bytes_total{port="out"}"#), 12.0);
        assert_eq!(types["daxvm_window_setup_mappings"], "counter");
        assert_eq!(types["daxvm_window_chunks"], "gauge");
        // A share without a window has none of its metrics.
        assert!(!samples.contains_key(r#"daxvm_window_chunks{share="plain"}"#));
    }

    #[test]
    fn durations_are_cumulative_buckets_in_seconds() {
        let (samples, types) = parse(&encode(&everything()));
        let name = "daxvm_window_setup_mapping_duration_seconds";
        assert_eq!(types[name], "histogram");
        let share = r#"share="a \"b\"\\\n""#;
        // The place of the label `le` among the others, and how its number is written, are the library's affair.
        let bound = |key: &str| {
            let (_, le) = key.strip_prefix(&format!("{name}_bucket"))?.split_once("le=\"")?;
            le.split('"').next()?.parse::<f64>().ok()
        };
        let bucket = |le: f64| {
            let found = samples.iter().find(|(key, _)| bound(key) == Some(le));
            *found.unwrap_or_else(|| panic!("no bucket {le} in {:?}", samples.keys())).1
        };
        assert_eq!((bucket(2e-6), bucket(5e-6), bucket(1e-5)), (0.0, 2.0, 3.0));
        assert_eq!((bucket(1.0), bucket(f64::INFINITY)), (3.0, 4.0));
        assert_eq!(samples[&format!("{name}_sum{{{share}}}")], 2.0);
        assert_eq!(samples[&format!("{name}_count{{{share}}}")], 4.0);
    }

    #[test]
    fn every_metric_is_in_the_manual_and_only_those() {
        let (_, types) = parse(&encode(&everything()));
        let manual = include_str!("../../docs/observability.md");
        let words = manual.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
        let documented: BTreeSet<_> = words
            .filter(|word| word.starts_with("daxvm_"))
            .map(|word| word.strip_suffix("_total").unwrap_or(word).to_owned())
            .collect();
        assert_eq!(types.into_keys().collect::<BTreeSet<_>>(), documented);
    }

    #[test]
    fn the_file_is_always_whole_and_the_last_one_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.prom");
        let machine = machine();
        let file = MetricsFile::start(&path, Duration::from_millis(1), machine.probe.clone()).unwrap();
        let start = Instant::now();
        let uptime = || parse(&std::fs::read_to_string(&path).unwrap()).0["daxvm_uptime_seconds"];
        let first = uptime();
        while uptime() <= first {
            assert!(start.elapsed() < Duration::from_secs(60), "it is not written again");
        }
        drop(file);
        let last = uptime();
        thread::sleep(Duration::from_millis(20));
        assert_eq!(uptime(), last);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1, "nothing else is left");
    }

    #[test]
    fn all_can_read_it_and_what_a_killed_one_left_goes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.prom");
        // Longer than any metrics, and not even to be opened.
        std::os::unix::fs::symlink("/nonexistent/file", beside(&path)).unwrap();
        drop(MetricsFile::start(&path, DEFAULT_INTERVAL, machine().probe).unwrap());
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o7777, 0o644);
        assert!(fs::read_to_string(&path).unwrap().ends_with("# EOF\n"));
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "nothing else is left");
    }

    #[test]
    fn a_file_that_cannot_be_written_is_told_at_once() {
        let path = Path::new("/nonexistent/metrics.prom");
        let error = MetricsFile::start(path, DEFAULT_INTERVAL, machine().probe).err().unwrap().to_string();
        assert!(
            error.contains("/nonexistent/metrics.prom: choose a file in a directory that exists"),
            "{error}"
        );
    }
}
