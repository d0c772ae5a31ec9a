//! The results as JSON, for programs.

use std::io::{self, Write};
use std::time::{Duration, SystemTime};

use chrono::{DateTime, SecondsFormat, Utc};
use serde::Serialize;
use serde_json::Value;

use super::{CaseResult, Outcome, Summary, Verdict};

/// The version of the format: higher when something is no longer as it was.
const VERSION: u32 = 1;

#[derive(Serialize)]
struct Report<'a> {
    version: u32,
    file: String,
    started: String,
    duration_ms: f64,
    status: u8,
    #[serde(skip_serializing_if = "Option::is_none")]
    interrupted_by_signal: Option<i32>,
    budget: Budget,
    counts: Counts,
    cases: Vec<CaseReport<'a>>,
}

#[derive(Serialize)]
struct Budget {
    cpus: u32,
    memory: u64,
}

#[derive(Serialize)]
struct Counts {
    cases: usize,
    passed: usize,
    flaky: usize,
    failed: usize,
    errors: usize,
    not_run: usize,
}

#[derive(Serialize)]
struct CaseReport<'a> {
    name: &'a str,
    kernel: &'a str,
    command: &'a str,
    cpus: u8,
    memory: u64,
    run: &'a [String],
    expected: Vec<String>,
    outcome: Outcome,
    /// Whether it counts in the exit status.
    failure: bool,
    #[serde(skip_serializing_if = "String::is_empty")]
    remark: String,
    duration_ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    log: Option<String>,
    again: String,
    attempts: Vec<AttemptReport<'a>>,
}

#[derive(Serialize)]
struct AttemptReport<'a> {
    #[serde(flatten)]
    verdict: &'a Verdict,
    started: String,
    duration_ms: f64,
    /// What `daxvm run --report` wrote.
    report: Option<&'a Value>,
}

impl Summary {
    /// Writes the results as JSON.
    ///
    /// # Errors
    /// `out` cannot be written to.
    pub fn write_json(&self, out: &mut dyn Write) -> io::Result<()> {
        let report = Report {
            version: VERSION,
            file: self.path.display().to_string(),
            started: time(self.started),
            duration_ms: milliseconds(self.duration),
            status: self.status(),
            interrupted_by_signal: self.interrupted,
            budget: Budget { cpus: self.budget.cpus, memory: self.budget.memory },
            counts: Counts {
                cases: self.results.len(),
                passed: self.count(Outcome::Passed),
                flaky: self.count(Outcome::Flaky),
                failed: self.count(Outcome::Failed),
                errors: self.count(Outcome::Error),
                not_run: self.count(Outcome::NotRun),
            },
            cases: self.results.iter().map(|result| self.case_report(result)).collect(),
        };
        serde_json::to_writer_pretty(&mut *out, &report)?;
        writeln!(out)
    }

    fn case_report<'a>(&self, result: &'a CaseResult) -> CaseReport<'a> {
        let case = &result.case;
        let attempts = result.attempts.iter().map(|attempt| AttemptReport {
            verdict: &attempt.verdict,
            started: time(attempt.started),
            duration_ms: milliseconds(attempt.duration),
            report: attempt.report.as_ref(),
        });
        CaseReport {
            name: &case.name,
            kernel: &case.kernel,
            command: &case.command,
            cpus: case.cpus,
            memory: case.memory,
            run: &case.run,
            expected: case.expect.iter().map(ToString::to_string).collect(),
            outcome: result.outcome,
            failure: result.is_failure(),
            remark: result.remark(),
            duration_ms: milliseconds(result.duration()),
            log: result.log.as_ref().map(|log| log.display().to_string()),
            again: self.again(case),
            attempts: attempts.collect(),
        }
    }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// As RFC 3339 has it.
fn time(time: SystemTime) -> String {
    DateTime::<Utc>::from(time).to_rfc3339_opts(SecondsFormat::Millis, true)
}
