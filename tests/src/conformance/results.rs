//! What guests do otherwise than the host: a table, and target/conformance.json.

use std::collections::BTreeMap;
use std::fs;

use serde::Serialize;

use super::place::{FileSystem, Policy};
use super::suite::{Settings, Suite};
use super::{ConformanceError, Outcome, Outcomes, exclusions};
use crate::vm::in_target;

/// The case that there is beside those of suites and guests.
const ENOUGH: &str = "enough cases pass";

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
    /// Those that count, as the host passes them or the suite needs no host: what they said.
    failures: BTreeMap<String, String>,
    /// Chunks that the guests mapped.
    pub setup_mappings: u64,
    /// The time in the guest, boot included, in seconds.
    pub seconds: u64,
    /// The time on the host, if it had to be asked.
    pub host_seconds: Option<u64>,
}

impl Row {
    /// Compares the guest with the host. A case that the guest fails fails, unless the host does too and the suite needs it
    /// to say what is right; so does one that the host passes and the guest skips, or does not come to. A suite that does not
    /// begin fails on both sides alike, so each has a least number of cases that pass in the guest.
    pub fn new(
        suite: Suite,
        file_system: FileSystem,
        dax: Policy,
        settings: &Settings,
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
                (Some(Outcome::Passed), _) => continue,
                (_, Some(Outcome::Failed(_))) if !suite.judges_itself() => continue,
                (Some(Outcome::Failed(why)), _) => why.clone(),
                (Some(Outcome::Skipped(why)), Some(Outcome::Passed)) => format!("skipped: {why}"),
                (None, Some(Outcome::Passed | Outcome::Failed(_))) => "did not run".to_owned(),
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
        let least = suite.least(dax, settings);
        if row.passed < least {
            row.failures.insert(ENOUGH.into(), format!("{} passed, not {least}", row.passed));
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

    /// Whether nothing failed that counts.
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
            "counted",
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
                println!("fails: {} on {}, dax={}: {name}", row.suite, row.file_system, row.dax);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;
    use crate::conformance::Mode;

    fn outcomes(cases: &[(&str, Outcome)]) -> Outcomes {
        cases.iter().map(|(name, outcome)| ((*name).to_owned(), outcome.clone())).collect()
    }

    /// The row of a suite on ext4 with `dax=always`, where fsx is run twice.
    fn row(suite: Suite, host: &Outcomes, guest: &Outcomes) -> Row {
        let settings = Settings {
            kernel: "6.12-cloud".into(),
            operations: 1,
            seeds: vec![1, 2],
            modes: vec![Mode::Buffered],
            seconds: 1,
            rounds: 1,
        };
        Row::new(suite, FileSystem::Ext4, Policy::Always, &settings, host, guest)
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
        let row = row(Suite::StressNg, &outcomes(&host), &outcomes(&guest));
        let names: Vec<_> = row.failures.keys().map(String::as_str).collect();
        assert_eq!(
            names,
            [ENOUGH, "guest fails", "guest is gone", "guest skips", "guest's own", "host skips"]
        );
        assert_eq!(row.failures["guest skips"], "skipped: cannot");
        assert_eq!(row.excluded.keys().collect::<Vec<_>>(), ["fiemap"]);
        assert_eq!((row.passed, row.failed, row.skipped), (1, 5, 1));
    }
    #[test]
    fn a_suite_that_does_not_begin_fails() {
        let nothing = Outcomes::new();
        for suite in Suite::value_variants() {
            let row = row(*suite, &nothing, &nothing);
            assert_eq!(row.failures.keys().collect::<Vec<_>>(), [ENOUGH], "{suite}");
            assert!(!Results(vec![row]).passed());
        }
    }

    #[test]
    fn a_suite_that_says_what_is_right_passes_whatever_the_host_does() {
        let run = |outcome: Outcome| {
            let guest = ["the guest ends", "its kernel is content", "DAX is used", "buffered/seed-1"];
            let passed = guest.map(|name| (name, Outcome::Passed));
            outcomes(&[passed.as_slice(), &[("buffered/seed-2", outcome)]].concat())
        };
        let fails = || run(Outcome::Failed("cannot start".into()));
        assert!(row(Suite::Fsx, &fails(), &run(Outcome::Passed)).failures.is_empty());
        let failures = row(Suite::Fsx, &fails(), &fails()).failures;
        assert_eq!(failures["buffered/seed-2"], "cannot start");
        assert_eq!(failures[ENOUGH], "4 passed, not 5");
        let mut without = fails();
        without.remove("buffered/seed-2");
        assert_eq!(row(Suite::Fsx, &fails(), &without).failures["buffered/seed-2"], "did not run");
    }
}
