//! `daxvm policy explain`: what a policy says of single files, and why.

use std::error::Error;
use std::fmt::Display;
use std::io::{BufWriter, Write};
use std::path::PathBuf;

use clap::Args;
use devices::text::Bytes;
use devices::virtio::fs::policy::{Cost, Policy};
use serde::Serialize;

use super::files::{HostFile, Setting};
use super::{ShareArgs, add, default_window, describe_window, parse_window};
use crate::cli::STATUS_ERROR;
use crate::config::DaxConfig;

/// Say of files whether a policy makes them DAX, and why.
///
/// Each file is judged as if it were the only one that is open. Exit status: 0, or 125 if a path cannot be read.
#[derive(Debug, Args)]
pub(super) struct ExplainArgs {
    #[command(flatten)]
    share: ShareArgs,
    /// A policy (never, always, inode, size, size:BYTES, auto) or a rule file
    #[arg(long, value_name = "POLICY", default_value = "auto")]
    policy: DaxConfig,
    /// Size of the DAX window; by default that of one share in a guest of 512M; `daxvm run ... --dry-run` shows another's
    #[arg(long, value_name = "SIZE", value_parser = parse_window)]
    window: Option<u64>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Files and directories, relative to the share; of a directory, all files below it
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
}

/// What is said of a file.
#[derive(Serialize)]
struct Line {
    path: String,
    size: u64,
    hint: bool,
    dax: bool,
    chunks: u64,
    descriptor_bytes: u64,
    page_cache_bytes: u64,
    rule: Option<Rule>,
    reason: String,
}

#[derive(Serialize)]
struct Rule {
    name: Option<String>,
    line: Option<usize>,
}

#[derive(Default, Serialize)]
struct Total {
    files: u64,
    dax_files: u64,
    /// Of the files that are DAX.
    chunks: u64,
    usable_chunks: u64,
    descriptor_bytes: u64,
    /// Of the files that are DAX, and so have none.
    page_cache_bytes_saved: u64,
    /// Of the others.
    page_cache_bytes_left: u64,
}

impl ExplainArgs {
    pub(super) fn execute(self) -> Result<u8, Box<dyn Error>> {
        let policy = self.policy.load()?;
        let share = self.share.open()?;
        let window = self.window.unwrap_or_else(default_window);
        let setting = self.share.setting(window);
        let mut total = Total { usable_chunks: setting.window.usable(), ..Total::default() };
        let mut status = 0;
        let mut complain = |error: &dyn Display| {
            eprintln!("daxvm: {error}");
            status = STATUS_ERROR;
        };
        let mut out: Output<_> = Output { json: self.json, out: BufWriter::new(std::io::stdout().lock()) };
        out.head(&policy, window)?;
        for path in &self.paths {
            match share.find(path) {
                Ok(start) => share.walk(&start, |file| match file {
                    Ok(file) => {
                        let line = explain(&policy, setting, &file);
                        total.add(&line);
                        out.line(&line, total.files)
                    }
                    Err(error) => {
                        complain(&error);
                        Ok(())
                    }
                })?,
                Err(error) => complain(&error),
            }
        }
        out.end(&total)?;
        Ok(status)
    }
}

fn explain(policy: &Policy, setting: Setting, file: &HostFile<'_>) -> Line {
    file.with_facts(policy, setting, |facts| {
        let decision = policy.decide(facts, None);
        let regular = file.metadata.is_file();
        let Cost { chunks, descriptors, page_cache } = Cost::of(if regular { facts.size } else { 0 });
        let rule = match policy {
            Policy::Rules(rules) => {
                let by = decision.reason.by;
                Some(Rule { name: rules.rule_name(by).map(str::to_owned), line: rules.line(by) })
            }
            _ => None,
        };
        Line {
            path: file.path().display().to_string(),
            size: facts.size,
            hint: file.hint(),
            dax: decision.dax,
            chunks,
            descriptor_bytes: descriptors,
            page_cache_bytes: page_cache,
            rule,
            reason: policy.explain(&decision, facts).to_string(),
        }
    })
}

impl Total {
    fn add(&mut self, line: &Line) {
        self.files += 1;
        if line.dax {
            self.dax_files += 1;
            add(&mut self.chunks, line.chunks);
            add(&mut self.descriptor_bytes, line.descriptor_bytes);
            add(&mut self.page_cache_bytes_saved, line.page_cache_bytes);
        } else {
            add(&mut self.page_cache_bytes_left, line.page_cache_bytes);
        }
    }
}

/// Prints a line a file as they come, so that no tree is too large.
struct Output<W> {
    json: bool,
    out: W,
}

impl<W: Write> Output<W> {
    fn head(&mut self, policy: &Policy, window: u64) -> Result<(), Box<dyn Error>> {
        if self.json {
            let policy = serde_json::to_string(&policy.to_string())?;
            write!(self.out, "{{\"policy\":{policy},\"window_bytes\":{window},\"files\":[")?;
            return Ok(());
        }
        writeln!(self.out, "policy {policy}, {}", describe_window(window))?;
        let columns = ["DAX", "HINT", "SIZE", "CHUNKS", "DESCRIPTORS", "PAGE CACHE"];
        let [dax, hint, size, chunks, descriptors, page_cache] = columns;
        Ok(writeln!(
            self.out,
            "{dax:<4} {hint:<4} {size:>9} {chunks:>6} {descriptors:>11} {page_cache:>10}  FILE: REASON"
        )?)
    }

    fn line(&mut self, line: &Line, number: u64) -> Result<(), Box<dyn Error>> {
        if self.json {
            self.out.write_all(if number == 1 { b"\n" } else { b",\n" })?;
            return Ok(serde_json::to_writer(&mut self.out, line)?);
        }
        Ok(writeln!(
            self.out,
            "{:<4} {:<4} {:>9} {:>6} {:>11} {:>10}  {}: {}",
            if line.dax { "yes" } else { "no" },
            if line.hint { "set" } else { "-" },
            Bytes(line.size),
            line.chunks,
            Bytes(line.descriptor_bytes),
            Bytes(line.page_cache_bytes),
            line.path,
            line.reason,
        )?)
    }

    fn end(&mut self, total: &Total) -> Result<(), Box<dyn Error>> {
        if self.json {
            self.out.write_all(b"\n],\"total\":")?;
            serde_json::to_writer(&mut self.out, total)?;
            writeln!(self.out, "}}")?;
        } else {
            writeln!(
                self.out,
                "{} of {} files are DAX and need {} chunks of {} usable ones: {} of descriptors instead of {} of page \
                 cache. The others may take {} of page cache.",
                total.dax_files,
                total.files,
                total.chunks,
                total.usable_chunks,
                Bytes(total.descriptor_bytes),
                Bytes(total.page_cache_bytes_saved),
                Bytes(total.page_cache_bytes_left),
            )?;
        }
        Ok(self.out.flush()?)
    }
}
