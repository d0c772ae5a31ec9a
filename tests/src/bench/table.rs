//! Results: rows with medians and ratios, printed as a table and written as JSON.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use serde::Serialize;

/// One result.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// What was measured.
    pub row: String,
    /// Of what.
    pub subject: String,
    /// The median of the measurements.
    pub median: f64,
    /// Its unit.
    pub unit: &'static str,
    /// Number of measurements.
    pub n: usize,
    /// The median divided by that of each peer in the same row.
    pub ratio_to: BTreeMap<String, f64>,
}

/// What could not be measured.
#[derive(Debug, Clone, Serialize)]
struct Missing {
    row: String,
    subject: String,
    /// Why there is no median.
    missing: String,
}

/// The results of one benchmark.
#[derive(Debug, Default)]
pub struct Table {
    rows: Vec<Row>,
    missing: Vec<Missing>,
}

impl Table {
    /// Adds what was measured; nothing happens when nothing was.
    pub fn add(&mut self, row: &str, subject: &str, unit: &'static str, mut samples: Vec<f64>) {
        samples.sort_by(f64::total_cmp);
        let n = samples.len();
        let Some(upper) = samples.get(n / 2) else { return };
        let median = if n % 2 == 1 { *upper } else { (samples[n / 2 - 1] + upper) / 2.0 };
        let (row, subject) = (row.to_owned(), subject.to_owned());
        let mut ratio_to = BTreeMap::new();
        for other in self.rows.iter_mut().filter(|other| other.row == row && other.median > 0.0) {
            ratio_to.insert(other.subject.clone(), median / other.median);
            if median > 0.0 {
                other.ratio_to.insert(subject.clone(), other.median / median);
            }
        }
        self.rows.push(Row { row, subject, median, unit, n, ratio_to });
    }

    /// Adds that there is no result, and why.
    pub fn add_missing(&mut self, row: &str, subject: &str, why: &str) {
        let (row, subject, missing) = (row.to_owned(), subject.to_owned(), why.to_owned());
        self.missing.push(Missing { row, subject, missing });
    }

    /// The results so far.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// Prints the table.
    pub fn print(&self) {
        println!("{:<26} {:<16} {:>10} {:<4} {:>3}  ratio to", "", "", "median", "", "n");
        for row in &self.rows {
            let ratios: Vec<_> =
                row.ratio_to.iter().map(|(peer, ratio)| format!("{peer} {ratio:.2}")).collect();
            let (median, unit, n) = (row.median, row.unit, row.n);
            println!(
                "{:<26} {:<16} {median:>10.1} {unit:<4} {n:>3}  {}",
                row.row,
                row.subject,
                ratios.join(", ")
            );
        }
        for Missing { row, subject, missing } in &self.missing {
            println!("{row:<26} {subject:<16} not measured: {missing}");
        }
    }

    /// Writes the rows, and what is missing, to `target/bench/NAME.json`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, name: &str) -> io::Result<()> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench");
        fs::create_dir_all(&dir)?;
        let rows = self.rows.iter().map(serde_json::to_value);
        let missing = self.missing.iter().map(serde_json::to_value);
        let all = rows.chain(missing).collect::<Result<Vec<_>, _>>()?;
        let mut text = serde_json::to_string_pretty(&all)?;
        text.push('\n');
        fs::write(dir.join(format!("{name}.json")), text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_ratios_both_ways() {
        let mut table = Table::default();
        table.add("boot", "daxvm", "ms", vec![30.0, 10.0, 20.0]);
        table.add("boot", "peer", "ms", vec![30.0, 50.0]);
        table.add("other", "peer", "ms", vec![1.0]);
        table.add("other", "nobody", "ms", vec![]);
        assert_eq!(table.rows.len(), 3);
        assert_eq!((table.rows[0].median, table.rows[1].median), (20.0, 40.0));
        assert_eq!(table.rows[0].ratio_to["peer"], 0.5);
        assert_eq!(table.rows[1].ratio_to["daxvm"], 2.0);
        assert!(table.rows[2].ratio_to.is_empty());
    }
}
