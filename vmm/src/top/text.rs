//! What a VM answers, in plain text.

use std::fmt::Write;

use devices::text::Bytes;
use devices::virtio::fs::ThrashCounters;

use super::map::{Map, letter};
use super::{Snapshot, duration, file_name, nanoseconds, printable};
use crate::api::{Files, ShareFiles, ShareWindow, Status, Windows};

/// Cells in a row of a map, and rows.
const COLUMNS: usize = 64;
const ROWS: usize = 16;

/// All of it.
pub(crate) fn snapshot(snapshot: &Snapshot) -> String {
    [status(&snapshot.status), windows(&snapshot.window), files(&snapshot.files)].join("\n")
}

/// What the VM is, and how it is.
pub(crate) fn status(status: &Status) -> String {
    let Status { pid, state, uptime_seconds, kernel, cmdline, cpus, memory, .. } = status;
    let mut text =
        format!("daxvm {}, process {pid}: {state} for {}\n", status.version, duration(*uptime_seconds));
    line(&mut text, "kernel", &printable(&kernel.display().to_string()));
    line(&mut text, "parameters", &printable(cmdline));
    line(&mut text, "machine", &format!("{cpus} vCPUs, {} of RAM", Bytes(*memory)));
    if let Some(limit) = status.timeout_seconds {
        line(&mut text, "time limit", &duration(limit));
    }
    for share in &status.shares {
        let access = if share.read_only { "read-only" } else { "writable" };
        let window = match share.window {
            0 => "no DAX window".to_owned(),
            size => format!("DAX {}, window of {}", share.dax, Bytes(size)),
        };
        let path = printable(&share.path.display().to_string());
        let what = format!("{}: {path}, {access}, {window}, cache {}", printable(&share.tag), share.cache);
        line(&mut text, "share", &what);
    }
    for disk in &status.disks {
        let access = if disk.read_only { "read-only" } else { "writable" };
        line(&mut text, "disk", &format!("{}, {access}", printable(&disk.path.display().to_string())));
    }
    text
}

/// The windows with their maps.
pub(crate) fn windows(windows: &Windows) -> String {
    let shares: Vec<_> = windows.shares.iter().map(window).collect();
    if shares.is_empty() { "no share has a DAX window\n".into() } else { shares.join("\n") }
}

fn window(share: &ShareWindow) -> String {
    let counters = &share.counters;
    let mut text = format!(
        "window of {}: {}, {} of {} chunks mapped, {} at most\n",
        printable(&share.tag),
        Bytes(counters.size),
        counters.mapped_chunks,
        share.chunks.len(),
        counters.peak_mapped_chunks
    );
    let setups = format!(
        "{} done, {} failed, {} denied; {} on average",
        counters.setup_mappings,
        counters.failed_setup_mappings,
        share.denied_mappings,
        nanoseconds(share.setup_latency.mean_ns())
    );
    line(&mut text, "mappings", &setups);
    let removes = format!(
        "{} done; {} on average",
        counters.remove_mappings,
        nanoseconds(share.remove_latency.mean_ns())
    );
    line(&mut text, "removals", &removes);
    let chunks = format!(
        "{} upgraded, {} overlaid, {} changed hands within a second",
        counters.upgraded_chunks, counters.overlaid_chunks, share.churned_chunks
    );
    line(&mut text, "chunks", &chunks);
    if share.thrash.sufficient_window > 0 {
        let ThrashCounters { level, peak_level, refaulted_chunks, sufficient_window } = share.thrash;
        let thrash = format!(
            "level {level} of 5, {peak_level} at most; {refaulted_chunks} chunks taken away too soon; {} would do",
            Bytes(sufficient_window)
        );
        line(&mut text, "thrashing", &thrash);
    }
    for made in &share.decisions {
        let outcome = if made.dax { "DAX" } else { "not DAX" };
        let what = format!("{} by {} ({}): {}", outcome, printable(&made.rule), made.reason, made.count);
        line(&mut text, "decided", &what);
    }
    let map = Map::new(&share.chunks, COLUMNS * ROWS);
    line(&mut text, "map", &map.scale());
    for row in map.cells.chunks(COLUMNS) {
        let row: String = row.iter().map(|number| letter(*number)).collect();
        let _ = writeln!(text, "  {row}");
    }
    text
}

/// The files that have or had most of the windows.
pub(crate) fn files(files: &Files) -> String {
    let shares: Vec<_> = files.shares.iter().map(share_files).collect();
    if shares.is_empty() { "no share has a DAX window\n".into() } else { shares.join("\n") }
}

fn share_files(ShareFiles { tag, table }: &ShareFiles) -> String {
    let tag = printable(tag);
    if table.files.is_empty() {
        return format!("files of {tag}: none was mapped\n");
    }
    let mut text =
        format!("files of {tag}\n    chunks    peak    setups   removed  upgraded   churned  path\n");
    for file in &table.files {
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{:>2} {:>7} {:>7} {:>9} {:>9} {:>9} {:>9}  {}",
            letter(file.number),
            file.mapped_chunks,
            file.peak_mapped_chunks,
            file.setup_mappings,
            file.removed_chunks,
            file.upgraded_chunks,
            file.churned_chunks,
            file_name(file.path.as_deref())
        );
    }
    if table.forgotten_files > 0 {
        let _ = writeln!(text, "  and {} that are forgotten", table.forgotten_files);
    }
    text
}

fn line(text: &mut String, what: &str, value: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, "  {what}: {value}");
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::*;

    #[test]
    fn a_snapshot_says_it_all() {
        let text = snapshot(&testing::snapshot());
        for says in [
            "process 4711: running for 2m 05s\n",
            "  machine: 2 vCPUs, 512 MiB of RAM\n",
            "window of src: 64 MiB, 18 of 32 chunks mapped, 30 at most\n",
            "  mappings: 100 done, 0 failed, 0 denied; 12.3 µs on average\n",
            "  thrashing: level 3 of 5, 4 at most; 1234 chunks taken away too soon; 128 MiB would do\n",
            "  decided: not DAX by default (all): 7\n",
            "  map: a cell is a chunk of 2 MiB\n  aaaaaaaaaaaa..bbbbbb............\n",
            "  map: a cell is 2 chunks of 2 MiB\n",
            " a      12      20        30         0         0         2  lib/libc.so\n",
            "bad\\u{1b}[2Jname\n",
            "files of big: none was mapped\n",
        ] {
            assert!(text.contains(says), "{says:?} is not in:\n{text}");
        }
        assert!(!text.contains('\u{1b}'));
        assert_eq!(windows(&Windows::default()), "no share has a DAX window\n");
    }
}
