//! What is known of a VM that has ended, for people and for programs (`--report FILE.json`).

use std::fs;
use std::io::{self, Write};
use std::ops::Range;
use std::time::Duration;

use devices::virtio::block::DiskCounters;
use devices::virtio::console::PortCounters;
use devices::virtio::fs::{CountersHandle, FileSystemCounters};
use serde::Serialize;

use crate::outcome::ExitReason;
use crate::sandbox::Layer;
use crate::vm::Parts;

/// The report of one VM.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Why it ended; authoritative, where exit statuses can collide.
    #[serde(flatten)]
    pub reason: ExitReason,
    /// The exit status that says so.
    pub status: u8,
    /// Where the time went.
    pub timing: Timing,
    /// KiB of the VMM's own resident memory at the end: all but guest RAM and windows.
    pub vmm_memory_kib: Option<u64>,
    /// How the process was confined; none if it was not.
    pub sandbox: Vec<Layer>,
    /// The shares.
    pub shares: Vec<FileSystemCounters>,
    /// The disks.
    pub disks: Vec<DiskCounters>,
    /// The ports of the virtio-console device.
    pub ports: Vec<PortCounters>,
}

/// Where the time went, in milliseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Timing {
    /// From the start of the VMM to the first instruction of the guest.
    pub vmm_ms: f64,
    /// From there to the point where the guest's init, which is daxvm's own, runs; for guests with a command.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready_ms: Option<f64>,
    /// From there to the start of the command.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_ms: Option<f64>,
    /// From the start of the VMM to the end of the guest.
    pub total_ms: f64,
}

impl Timing {
    pub(crate) fn new(vmm: Duration, total: Duration) -> Timing {
        Timing { vmm_ms: milliseconds(vmm), ready_ms: None, started_ms: None, total_ms: milliseconds(total) }
    }
}

pub(crate) fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Where a share's counters are, and its window in the process's address space.
pub(crate) struct ShareCounters {
    pub counters: CountersHandle,
    pub window: Option<Range<usize>>,
}

impl Report {
    pub(crate) fn new(reason: ExitReason, timing: Timing, parts: &Parts) -> Report {
        let status = reason.status(false);
        let windows = parts.shares.iter().filter_map(|share| share.window.clone());
        let guest: Vec<_> = windows.chain([parts.ram.host_range()]).collect();
        let smaps = fs::read_to_string("/proc/self/smaps").ok();
        let vmm_memory_kib = smaps.map(|smaps| own_memory(&smaps, &guest));
        let shares = parts.shares.iter().map(|share| share.counters.snapshot()).collect();
        let disks = parts.disks.iter().map(|disk| disk.snapshot()).collect();
        let ports = parts.ports.counters();
        Report { reason, status, timing, vmm_memory_kib, sandbox: parts.layers.clone(), shares, disks, ports }
    }

    /// Writes the report as JSON.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, mut out: impl Write) -> io::Result<()> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        out.write_all(text.as_bytes())
    }
}

/// Sums the resident KiB of all mappings of `smaps` (proc(5)) that are not inside one of the `guest`'s ranges.
fn own_memory(smaps: &str, guest: &[Range<usize>]) -> u64 {
    let mut own = true;
    let mut sum = 0;
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let Some(first) = words.next() else { continue };
        if let Some(start) =
            first.split_once('-').and_then(|(start, _)| usize::from_str_radix(start, 16).ok())
        {
            own = !guest.iter().any(|range| range.contains(&start));
        } else if first == "Rss:" && own {
            sum += words.next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0);
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_memory_is_not_the_vmms() {
        let smaps = "00400000-00500000 r-xp 00000000 fe:00 1 /daxvm\nSize: 1024 kB\nRss:  600 kB\nPss: 9 kB\n\
                     7f0000000000-7f0020000000 rw-p 00000000 00:00 0\nRss:  400000 kB\n\
                     7fff00000000-7fff00021000 rw-p 00000000 00:00 0 [stack]\nRss:  40 kB\n";
        let ram = 0x7f00_0000_0000..0x7f00_2000_0000;
        let window = 0x7e00_0000_0000..0x7e00_0020_0000;
        assert_eq!(own_memory(smaps, &[ram, window]), 640);
        assert_eq!(own_memory(smaps, &[]), 400_640);
    }

    #[test]
    fn the_reason_is_spelled_out() {
        let json = |reason: ExitReason| serde_json::to_value(reason).unwrap();
        assert_eq!(json(ExitReason::PowerOff)["reason"], "power-off");
        assert_eq!(json(ExitReason::Panic("why".into()))["message"], "why");
        assert_eq!(json(ExitReason::Timeout)["reason"], "timeout");
        assert_eq!(json(ExitReason::Exited { status: 3 })["message"]["status"], 3);
        let failed = ExitReason::BootFailed { what: "mount the root".into(), error: "why".into() };
        assert_eq!(json(failed.clone())["reason"], "boot-failed");
        assert_eq!(json(failed)["message"]["what"], "mount the root");
    }
}
