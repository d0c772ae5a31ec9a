//! `daxvm top`: a running VM's windows on a terminal, live. [`view`] draws a screen, [`map`] the map of chunks in it, and
//! [`text`] says the same in plain text for scripts.

pub(crate) mod live;
mod map;
pub(crate) mod text;
mod view;

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::api::{ClientError, Files, Status, Windows, get};

/// What a VM answers at one time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Snapshot {
    pub status: Status,
    pub window: Windows,
    pub files: Files,
}

impl Snapshot {
    /// Asks a VM.
    pub(crate) fn fetch(socket: &Path) -> Result<Snapshot, ClientError> {
        Ok(Snapshot {
            status: ask(socket, "/v1/status")?,
            window: ask(socket, "/v1/window")?,
            files: ask(socket, "/v1/files")?,
        })
    }
}

/// Asks a VM for one thing.
pub(crate) fn ask<T: for<'a> Deserialize<'a>>(socket: &Path, path: &str) -> Result<T, ClientError> {
    let text = get(socket, path)?;
    serde_json::from_str(&text).map_err(|_| ClientError::Strange(socket.to_owned()))
}

/// A name as it can be shown. Guests choose names, and a terminal obeys control characters.
fn printable(name: &str) -> String {
    let is_harmful = |c: char| {
        c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    name.chars().map(|c| if is_harmful(c) { c.escape_unicode().to_string() } else { c.to_string() }).collect()
}

/// The path of a file, as it can be shown.
fn file_name(path: Option<&str>) -> String {
    path.map_or_else(|| "(no name)".to_owned(), printable)
}

/// A time in words: `3d 4h`, `2m 05s`, `7s`.
fn duration(seconds: f64) -> String {
    let seconds = seconds.max(0.0) as u64;
    match (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60, seconds % 60) {
        (0, 0, 0, s) => format!("{s}s"),
        (0, 0, m, s) => format!("{m}m {s:02}s"),
        (0, h, m, _) => format!("{h}h {m:02}m"),
        (d, h, _, _) => format!("{d}d {h}h"),
    }
}

/// A time of nanoseconds in words: `850 ns`, `12.3 µs`, `4.0 ms`.
fn nanoseconds(time: u64) -> String {
    match time {
        0..1_000 => format!("{time} ns"),
        1_000..1_000_000 => format!("{:.1} µs", time as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} ms", time as f64 / 1e6),
        _ => format!("{:.1} s", time as f64 / 1e9),
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use devices::virtio::fs::window::WindowCounters;
    use devices::virtio::fs::{DecisionCount, FileCounters, FileTable, Latency, ThrashCounters};

    use super::*;
    use crate::api::{ShareFiles, ShareStatus, ShareWindow};

    pub(crate) fn file(number: u32, path: &str, mapped_chunks: u64) -> FileCounters {
        FileCounters {
            number,
            path: Some(path.into()),
            mapped_chunks,
            peak_mapped_chunks: 20,
            setup_mappings: 30,
            churned_chunks: 2,
            ..FileCounters::default()
        }
    }

    /// A VM with two shares, `src` with a window of 32 chunks and `big` with one of 2048, which is empty.
    pub(crate) fn snapshot() -> Snapshot {
        let window = |tag: &str, chunks: Vec<u32>| ShareWindow {
            tag: tag.into(),
            counters: WindowCounters {
                size: (chunks.len() as u64) << 21,
                mapped_chunks: chunks.iter().filter(|chunk| **chunk != 0).count() as u64,
                peak_mapped_chunks: 30,
                setup_mappings: 100,
                remove_mappings: 80,
                ..WindowCounters::default()
            },
            churned_chunks: 5,
            thrash: ThrashCounters {
                level: 3,
                peak_level: 4,
                refaulted_chunks: 1234,
                sufficient_window: 128 << 20,
            },
            setup_latency: Latency { count: 100, sum_ns: 1_230_000, buckets: Vec::new() },
            decisions: vec![
                DecisionCount { rule: "big files".into(), reason: "size".into(), dax: true, count: 12 },
                DecisionCount { rule: "default".into(), reason: "all".into(), dax: false, count: 7 },
            ],
            chunks,
            ..ShareWindow::default()
        };
        let mut chunks = vec![0; 32];
        chunks[..12].fill(1);
        chunks[14..20].fill(2);
        let table = FileTable {
            files: vec![file(1, "lib/libc.so", 12), file(2, "bad\u{1b}[2Jname", 6)],
            ..FileTable::default()
        };
        let files = ["src", "big"].map(|tag| ShareFiles {
            tag: tag.into(),
            table: if tag == "src" { table.clone() } else { FileTable::default() },
        });
        Snapshot {
            status: Status {
                pid: 4711,
                state: "running".into(),
                uptime_seconds: 125.0,
                cpus: 2,
                memory: 512 << 20,
                shares: vec![ShareStatus {
                    tag: "src".into(),
                    path: "/srv".into(),
                    dax: "auto".into(),
                    ..Default::default()
                }],
                ..Status::default()
            },
            window: Windows {
                uptime_seconds: 125.0,
                shares: vec![window("src", chunks), window("big", vec![0; 2048])],
            },
            files: Files { shares: files.into() },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_move_the_cursor() {
        assert_eq!(printable("a b/ü.txt"), "a b/ü.txt");
        assert_eq!(printable("\u{1b}[2J\n\u{202e}x"), "\\u{1b}[2J\\u{a}\\u{202e}x");
        assert_eq!(file_name(None), "(no name)");
    }

    #[test]
    fn times_are_short() {
        let words: Vec<_> = [0.4, 7.0, 125.0, 3_661.0, 270_000.0].into_iter().map(duration).collect();
        assert_eq!(words, ["0s", "7s", "2m 05s", "1h 01m", "3d 3h"]);
        let words: Vec<_> = [850, 12_345, 4_000_000, 5_000_000_000].into_iter().map(nanoseconds).collect();
        assert_eq!(words, ["850 ns", "12.3 µs", "4.0 ms", "5.0 s"]);
    }
}
