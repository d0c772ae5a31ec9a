//! What guests do otherwise than the host: a table, and target/conformance.json.

use std::collections::BTreeMap;
use std::fs;

use serde::Serialize;

use super::place::{FileSystem, Policy};
use super::suite::Suite;
use super::{ConformanceError, Outcome, Outcomes, exclusions};
use crate::vm::in_target;

/// A suite on a file system under a policy.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    suite: Suite,
    file_system: FileSystem,
    dax: Policy,
    /// The guest's kernel.
    pub kernel: String,
    /// Cases that passed in the guest.
    passed: usize,
    /// Those that failed there.
    failed: usize,
    /// Those that neither the guest nor the host can run.
    skipped: usize,
    /// Those that the host passes and the guest does not, but which do not count: why.
    excluded: BTreeMap<String, &'static str>,
    /// Those that the host passes and the guest does not: what they said.
    failures: BTreeMap<String, String>,
    /// Chunks that the guests mapped.
    pub setup_mappings: u64,
    /// The time in the guest, boot included, in seconds.
    pub seconds: u64,
    /// The time on the host, if it had to be asked.
    pub host_seconds: Option<u64>,
}

impl Row {
    /// Compares the guest with the host. A case that the guest fails fails, unless the host does too; so does one that the
    /// host passes and the guest skips, or does not come to.
    pub fn new(
        suite: Suite,
        file_system: FileSystem,
        dax: Policy,
        reference: &Outcomes,
        guest: &Outcomes,
    ) -> Row {
        let count = |wanted: fn(&Outcome) -> bool| guest.values().filter(|outcome| wanted(outcome)).count();
        let mut row = Row {
            suite,
            file_system,
            dax,
            kernel: String::new(),
            passed: count(|outcome| *outcome == Outcome::Passed),
            failed: count(|outcome| matches!(outcome, Outcome::Failed(_))),
            skipped: 0,
            excluded: BTreeMap::new(),
            failures: BTreeMap::new(),
            setup_mappings: 0,
            seconds: 0,
            host_seconds: None,
        };
        let names = guest.keys().chain(reference.keys().filter(|name| !guest.contains_key(*name)));
        for name in names {
            let why = match (guest.get(name), reference.get(name)) {
                (Some(Outcome::Passed), _) | (_, Some(Outcome::Failed(_))) => continue,
                (Some(Outcome::Failed(why)), _) => why.clone(),
                (Some(Outcome::Skipped(why)), Some(Outcome::Passed)) => format!("skipped: {why}"),
                (None, Some(Outcome::Passed)) => "did not run".to_owned(),
                (Some(Outcome::Skipped(_)) | None, _) => {
                    row.skipped += 1;
                    continue;
                }
            };
            match exclusions::reason(suite, dax, name) {
                Some(reason) => drop(row.excluded.insert(name.clone(), reason)),
                None => drop(row.failures.insert(name.clone(), why)),
            }
        }
        row
    }

    /// Says which cases fail, to standard error, as soon as it is known.
    pub fn print_failures(&self) {
        for (name, why) in &self.failures {
            eprintln!("  {name}: {}", why.replace('\n', "\n    "));
        }
    }
}

/// All rows.
#[derive(Debug, Default)]
pub struct Results(Vec<Row>);

impl Results {
    /// Adds a row, and writes target/conformance.json.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn add(&mut self, row: Row) -> Result<(), ConformanceError> {
        self.0.push(row);
        let path = in_target("conformance.json");
        let text = serde_json::to_string_pretty(&self.0).map_err(std::io::Error::from);
        text.and_then(|text| fs::write(&path, text + "\n"))
            .map_err(|source| ConformanceError::File(path, source))
    }

    /// Whether no guest fails what its host passes.
    pub fn passed(&self) -> bool {
        self.0.iter().all(|row| row.failures.is_empty())
    }

    /// Prints the table, and the names of what fails.
    pub fn print(&self) {
        println!(
            "{:<10} {:<6} {:<7} {:>6} {:>6} {:>7} {:>8} {:>8} {:>9} {:>8} {:>8}",
            "suite",
            "fs",
            "dax",
            "passed",
            "failed",
            "skipped",
            "excluded",
            "not host",
            "mappings",
            "host s",
            "guest s"
        );
        for row in &self.0 {
            println!(
                "{:<10} {:<6} {:<7} {:>6} {:>6} {:>7} {:>8} {:>8} {:>9} {:>8} {:>8}",
                row.suite,
                row.file_system,
                row.dax,
                row.passed,
                row.failed,
                row.skipped,
                row.excluded.len(),
                row.failures.len(),
                row.setup_mappings,
                row.host_seconds.map_or("-".to_owned(), |seconds| seconds.to_string()),
                row.seconds,
            );
        }
        for row in &self.0 {
            for name in row.failures.keys() {
                println!(
                    "fails in the guest only: {} on {}, dax={}: {name}",
                    row.suite, row.file_system, row.dax
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcomes(cases: &[(&str, Outcome)]) -> Outcomes {
        cases.iter().map(|(name, outcome)| ((*name).to_owned(), outcome.clone())).collect()
    }

    #[test]
    fn what_the_host_passes_and_the_guest_does_not_is_a_failure() {
        let failed = || Outcome::Failed("why".into());
        let skipped = || Outcome::Skipped("cannot".into());
        let host = [
            ("both pass", Outcome::Passed),
            ("both fail", failed()),
            ("guest fails", Outcome::Passed),
            ("guest skips", Outcome::Passed),
            ("guest is gone", Outcome::Passed),
            ("host skips", skipped()),
            ("both skip", skipped()),
            ("fiemap", Outcome::Passed),
        ];
        let guest = [
            ("both pass", Outcome::Passed),
            ("both fail", failed()),
            ("guest fails", failed()),
            ("guest skips", skipped()),
            ("host skips", failed()),
            ("both skip", skipped()),
            ("fiemap", failed()),
            ("guest's own", failed()),
        ];
        let row =
            Row::new(Suite::StressNg, FileSystem::Ext4, Policy::Always, &outcomes(&host), &outcomes(&guest));
        let names: Vec<_> = row.failures.keys().map(String::as_str).collect();
        assert_eq!(names, ["guest fails", "guest is gone", "guest skips", "guest's own", "host skips"]);
        assert_eq!(row.failures["guest skips"], "skipped: cannot");
        assert_eq!(row.excluded.keys().collect::<Vec<_>>(), ["fiemap"]);
        assert_eq!((row.passed, row.failed, row.skipped), (1, 5, 1));
    }
}
