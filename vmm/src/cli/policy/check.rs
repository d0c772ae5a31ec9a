//! `daxvm policy check`: whether a rule file is right, and how it was understood.

use std::error::Error;
use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use devices::virtio::fs::policy::{Policy, Rules};

/// Check a rule file, and print how it was understood.
///
/// Exit status: 0, or 125 if the file has mistakes, which are printed as FILE:LINE:COLUMN: MISTAKE.
#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    /// The rule file
    file: PathBuf,
}

impl CheckArgs {
    pub(super) fn execute(self) -> Result<u8, Box<dyn Error>> {
        let policy = Policy::load(&self.file)?;
        if let Policy::Rules(rules) = &policy {
            print(&policy, rules, std::io::stdout().lock())?;
        }
        Ok(0)
    }
}

fn print(policy: &Policy, rules: &Rules, mut out: impl Write) -> std::io::Result<()> {
    writeln!(out, "{}: version 1, rules: {}", rules.name(), rules.len())?;
    for by in rules.deciders() {
        let action = match rules.action(by) {
            Policy::Always => "allow".to_owned(),
            Policy::Never => "deny".to_owned(),
            other => other.to_string(),
        };
        let conditions = rules.conditions(by);
        let conditions = if conditions.is_empty() { "all others" } else { &conditions };
        write!(out, "  {}: {conditions} -> {action}", rules.describe(by))?;
        match rules.prefault(by) {
            Some(prefault) => writeln!(out, ", prefault {prefault}")?,
            None => writeln!(out)?,
        }
    }
    if rules.enforced() {
        writeln!(out, "  enforced: clients that mount with dax=always cannot use the files that are denied")?;
    }
    let needs = policy.needs();
    let asked = [("path", needs.path), ("hint", needs.hint), ("capabilities", needs.capabilities)];
    let asked = asked.into_iter().filter(|(_, asked)| *asked).map(|(name, _)| name.to_owned());
    let xattrs = needs.xattrs.iter().map(|name| name.to_string_lossy().into_owned());
    let asked: Vec<_> = asked.chain(xattrs).collect();
    let asked = if asked.is_empty() { "nothing".to_owned() } else { asked.join(", ") };
    writeln!(out, "  looked up for each file, beside its attributes: {asked}")
}
