//! `daxvm policy simulate`: what the window and the guest's memory would carry for a whole tree, policy by policy.

use std::error::Error;
use std::io::{BufWriter, Write};

use clap::Args;
use devices::text::Bytes;
use devices::virtio::fs::policy::{BREAK_EVEN, Cost, Policy, WindowFacts};
use devices::virtio::fs::window::{CHUNK_SIZE, MAX_WINDOW_SIZE, MIN_WINDOW_SIZE};
use serde::Serialize;

use super::files::{HardLinks, HostFile, Setting};
use super::progress::Progress;
use super::{ShareArgs, add, describe_window, parse_window};
use crate::cli::STATUS_ERROR;
use crate::config::DaxConfig;

/// Say of a whole tree what the window and the guest's memory would carry under each policy.
///
/// Each file is judged as if it were the only one that is open; a file with several names counts once, under the name
/// that is met first. Symbolic links are not followed. Exit status: 0, or 125 if something cannot be read, which the
/// numbers then leave out.
#[derive(Debug, Args)]
pub(super) struct SimulateArgs {
    #[command(flatten)]
    share: ShareArgs,
    /// Size of the DAX window
    #[arg(long, value_name = "SIZE", value_parser = parse_window)]
    window: u64,
    /// A policy (never, always, inode, size, size:BYTES, auto) or a rule file; may be repeated. By default, all that
    /// have names
    #[arg(long = "policy", value_name = "POLICY")]
    policies: Vec<DaxConfig>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Simulation {
    share: String,
    /// Regular files, each counted once.
    files: u64,
    bytes: u64,
    /// Further names of files that are counted.
    hard_links: u64,
    unreadable: u64,
    window_bytes: u64,
    window_chunks: u64,
    usable_chunks: u64,
    window_cost_bytes: u64,
    policies: Vec<Outcome>,
}

/// What one policy comes to.
#[derive(Serialize)]
struct Outcome {
    #[serde(skip)]
    policy: Policy,
    #[serde(rename = "policy")]
    name: String,
    dax_files: u64,
    /// What the files that are DAX need, if all are open.
    chunks: u64,
    descriptor_bytes: u64,
    /// What they would take as page cache.
    page_cache_bytes_saved: u64,
    /// What the others take, if all is read.
    page_cache_bytes_left: u64,
    /// The smallest window that carries all files that are DAX at once; none if no window is that large.
    window_bytes_for_all: Option<u64>,
    /// The window's fixed cost and the page cache that is left.
    guest_memory_bytes: u64,
}

impl SimulateArgs {
    pub(super) fn execute(self) -> Result<u8, Box<dyn Error>> {
        let mut policies = self.policies.iter().map(DaxConfig::load).collect::<Result<Vec<_>, _>>()?;
        if policies.is_empty() {
            let size = Policy::Size(BREAK_EVEN);
            policies = vec![Policy::Never, Policy::Always, Policy::Inode, size, Policy::Auto];
        }
        let share = self.share.open()?;
        let setting = self.share.setting(self.window);
        let mut simulation = Simulation {
            share: share.root().display().to_string(),
            files: 0,
            bytes: 0,
            hard_links: 0,
            unreadable: 0,
            window_bytes: self.window,
            window_chunks: setting.window.chunks,
            usable_chunks: setting.window.usable(),
            window_cost_bytes: WindowFacts::fixed_cost(self.window),
            policies: policies.into_iter().map(Outcome::new).collect(),
        };
        let mut links = HardLinks::default();
        let mut progress = Progress::new();
        share.walk(share.root(), |file| {
            match file {
                Ok(file) if !file.metadata.is_file() => {}
                Ok(file) if links.is_known(&file.metadata) => simulation.hard_links += 1,
                Ok(file) => simulation.add(setting, &file),
                Err(error) => {
                    progress.clear();
                    eprintln!("daxvm: {error}");
                    simulation.unreadable += 1;
                }
            }
            progress.count();
            Ok::<_, std::convert::Infallible>(())
        })?;
        drop(progress);
        simulation.finish();
        let mut out = BufWriter::new(std::io::stdout().lock());
        if self.json {
            serde_json::to_writer_pretty(&mut out, &simulation)?;
            writeln!(out)?;
        } else {
            simulation.print(&mut out)?;
        }
        out.flush()?;
        Ok(if simulation.unreadable == 0 { 0 } else { STATUS_ERROR })
    }
}

impl Simulation {
    fn add(&mut self, setting: Setting, file: &HostFile<'_>) {
        self.files += 1;
        add(&mut self.bytes, file.metadata.len());
        let Cost { chunks, descriptors, page_cache } = Cost::of(file.metadata.len());
        for outcome in &mut self.policies {
            let policy = &outcome.policy;
            if file.with_facts(policy, setting, |facts| policy.decide(facts, None).dax) {
                outcome.dax_files += 1;
                add(&mut outcome.chunks, chunks);
                add(&mut outcome.descriptor_bytes, descriptors);
                add(&mut outcome.page_cache_bytes_saved, page_cache);
            } else {
                add(&mut outcome.page_cache_bytes_left, page_cache);
            }
        }
    }

    fn finish(&mut self) {
        for outcome in &mut self.policies {
            // `daxvm run` gives no window to a share whose policy has no use for one.
            let window = if outcome.policy.may_grant() { self.window_cost_bytes } else { 0 };
            outcome.window_bytes_for_all = window_for(outcome.chunks);
            outcome.guest_memory_bytes = window.saturating_add(outcome.page_cache_bytes_left);
        }
    }

    fn print(&self, out: &mut impl Write) -> std::io::Result<()> {
        let (files, bytes) = (self.files, Bytes(self.bytes));
        write!(out, "{}: {files} files, {bytes}", self.share)?;
        if self.hard_links > 0 {
            write!(out, "; {} further names of them are not counted", self.hard_links)?;
        }
        if self.unreadable > 0 {
            write!(out, "; what could not be read is left out ({})", self.unreadable)?;
        }
        writeln!(out, "\n{}\n", describe_window(self.window_bytes))?;
        let columns = [
            "POLICY",
            "DAX FILES",
            "CHUNKS",
            "OF WINDOW",
            "DESCRIPTORS",
            "WINDOW FOR ALL",
            "SAVED",
            "LEFT",
            "MEMORY",
        ];
        row(out, columns.map(str::to_owned))?;
        for outcome in &self.policies {
            row(
                out,
                [
                    outcome.name.clone(),
                    outcome.dax_files.to_string(),
                    outcome.chunks.to_string(),
                    match (outcome.chunks, self.usable_chunks) {
                        (0, _) => "-".to_owned(),
                        (_, 0) => "none".to_owned(),
                        (chunks, usable) => format!("{} %", chunks.saturating_mul(100).div_ceil(usable)),
                    },
                    Bytes(outcome.descriptor_bytes).to_string(),
                    outcome
                        .window_bytes_for_all
                        .map_or("too large".to_owned(), |size| Bytes(size).to_string()),
                    Bytes(outcome.page_cache_bytes_saved).to_string(),
                    Bytes(outcome.page_cache_bytes_left).to_string(),
                    Bytes(outcome.guest_memory_bytes).to_string(),
                ],
            )?;
        }
        writeln!(
            out,
            "\nCHUNKS: what the DAX files need if all are open. OF WINDOW: that in percent of the usable chunks; above \
             100 %\nthe guest takes chunks from one file for another, except under auto, which then grants no more. \
             DESCRIPTORS: what\nthese chunks cost. WINDOW FOR ALL: the window that would carry them at once. SAVED, \
             LEFT: page cache that the DAX\nfiles need not have, and that the others take if all is read. MEMORY: \
             LEFT and the cost of the window."
        )
    }
}

fn row(
    out: &mut impl Write,
    [policy, files, chunks, part, descriptors, window, saved, left, memory]: [String; 9],
) -> std::io::Result<()> {
    writeln!(
        out,
        "{policy:<12} {files:>9} {chunks:>8} {part:>9} {descriptors:>11} {window:>14} {saved:>9} {left:>9} {memory:>9}"
    )
}

impl Outcome {
    fn new(policy: Policy) -> Outcome {
        Outcome {
            name: policy.to_string(),
            policy,
            dax_files: 0,
            chunks: 0,
            descriptor_bytes: 0,
            page_cache_bytes_saved: 0,
            page_cache_bytes_left: 0,
            window_bytes_for_all: None,
            guest_memory_bytes: 0,
        }
    }
}

/// The smallest window of which so many chunks are usable, in bytes; 0 for no chunk.
fn window_for(chunks: u64) -> Option<u64> {
    if chunks == 0 {
        return Some(0);
    }
    // A fifth stays free, so it is a quarter more; in small windows a chunk more, as one stays free at least.
    let about = chunks.checked_add((chunks - 1) / 4)?.checked_mul(CHUNK_SIZE)?;
    let sizes = (0..2).map(|more| about + more * CHUNK_SIZE);
    let size = sizes
        .map(|size| size.max(MIN_WINDOW_SIZE))
        .find(|size| WindowFacts::idle(*size).usable() >= chunks)?;
    (size <= MAX_WINDOW_SIZE).then_some(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_for_all_is_the_smallest_that_will_do() {
        assert_eq!(window_for(0), Some(0));
        for chunks in (1..3000).chain([104_858]) {
            let size = window_for(chunks).unwrap();
            assert!(WindowFacts::idle(size).usable() >= chunks, "{chunks}");
            let smaller = WindowFacts::idle(size - CHUNK_SIZE).usable();
            assert!(size == MIN_WINDOW_SIZE || smaller < chunks, "{chunks}");
        }
        assert_eq!(window_for(13), Some(32 << 20));
        assert_eq!((window_for(104_859), window_for(u64::MAX)), (None, None));
    }
}
