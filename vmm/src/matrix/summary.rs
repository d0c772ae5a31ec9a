//! What came of a run, for the exit status and for people.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::Serialize;

use super::{Attempt, Case, Flaky, Resources, Verdict, shell_line};

/// The file that `daxvm test` reads when it is given none.
pub(crate) const DEFAULT_FILE: &str = "daxvm.toml";
/// Exit statuses above this are no counts of failures.
const MAX_STATUS: usize = 100;
/// Lines of output that are shown of a failed case.
const TAIL_LINES: usize = 25;
/// The same where the guest failed and not the command: daxvm then shows its console's last 50 lines.
const GUEST_TAIL_LINES: usize = 60;
/// Cases that are called the slowest, if there are more.
const SLOWEST: usize = 5;

/// What a case has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It passed at the first attempt.
    Passed,
    /// It failed, and then passed.
    Flaky,
    /// It failed, and failed again as often as it was tried.
    Failed,
    /// daxvm could not run it.
    Error,
    /// It was not run, or not to its end: the run was interrupted, or stopped after a failure.
    NotRun,
}

/// What came of one case.
#[derive(Debug, Clone)]
pub struct CaseResult {
    /// The case.
    pub case: Case,
    /// All attempts, the last at the end.
    pub attempts: Vec<Attempt>,
    /// What it has come to.
    pub outcome: Outcome,
    /// Its log, if logs are kept.
    pub log: Option<PathBuf>,
}

impl CaseResult {
    pub(super) fn new(case: Case) -> CaseResult {
        CaseResult { case, attempts: Vec::new(), outcome: Outcome::NotRun, log: None }
    }

    /// Draws the conclusion from the attempts.
    pub(super) fn finish(&mut self) {
        self.outcome = match self.attempts.last().map(|attempt| &attempt.verdict) {
            None | Some(Verdict::Interrupted) => Outcome::NotRun,
            Some(Verdict::Passed) if self.attempts.len() > 1 => Outcome::Flaky,
            Some(Verdict::Passed) => Outcome::Passed,
            Some(Verdict::Failed(_)) => Outcome::Failed,
            Some(Verdict::Error(_)) => Outcome::Error,
        };
    }

    /// Whether the run has failed with this.
    pub fn is_failure(&self) -> bool {
        match self.outcome {
            Outcome::Failed | Outcome::Error => true,
            Outcome::Flaky => self.case.flaky == Flaky::Fail,
            Outcome::Passed | Outcome::NotRun => false,
        }
    }

    /// How long all attempts took together.
    pub fn duration(&self) -> Duration {
        self.attempts.iter().map(|attempt| attempt.duration).sum()
    }

    /// The last attempt that failed, and why.
    pub fn failure(&self) -> Option<(&Attempt, &str)> {
        self.attempts.iter().rev().find_map(|attempt| match &attempt.verdict {
            Verdict::Failed(why) | Verdict::Error(why) => Some((attempt, &**why)),
            Verdict::Passed | Verdict::Interrupted => None,
        })
    }

    /// What there is to say of it beside the outcome; empty when it passed.
    pub fn remark(&self) -> String {
        let why = self.failure().map_or("", |(_, why)| why);
        let attempts = self.attempts.len();
        match self.outcome {
            Outcome::Passed => String::new(),
            Outcome::Flaky => format!("passed at attempt {attempts}; before that: {why}"),
            Outcome::Failed if attempts > 1 => format!("{why} (the last of {attempts} attempts)"),
            Outcome::Failed | Outcome::Error => why.to_owned(),
            Outcome::NotRun if attempts > 0 => "interrupted".to_owned(),
            Outcome::NotRun => "not run".to_owned(),
        }
    }
}

/// What came of a run.
#[derive(Debug)]
pub struct Summary {
    /// The matrix file, as it was named.
    pub path: PathBuf,
    /// The cases that were chosen, in the order of the file.
    pub results: Vec<CaseResult>,
    /// What all cases together could take.
    pub budget: Resources,
    /// When it began.
    pub started: SystemTime,
    /// How long it took.
    pub duration: Duration,
    /// The signal by which the user ended it.
    pub interrupted: Option<i32>,
}

impl Summary {
    /// How many cases have failed.
    pub fn failures(&self) -> usize {
        self.results.iter().filter(|result| result.is_failure()).count()
    }

    /// How many cases have come to `outcome`.
    pub fn count(&self, outcome: Outcome) -> usize {
        self.results.iter().filter(|result| result.outcome == outcome).count()
    }

    /// The exit status: how many cases have failed, 100 for more than 100; 128+n when signal n ended the run.
    pub fn status(&self) -> u8 {
        match self.interrupted {
            Some(signal) => 128_u8.saturating_add(u8::try_from(signal).unwrap_or(0)),
            None => self.failures().min(MAX_STATUS) as u8,
        }
    }

    /// The command line that runs just this case again.
    pub fn again(&self, case: &Case) -> String {
        let mut arguments = vec!["daxvm".into(), "test".into()];
        if self.path != Path::new(DEFAULT_FILE) {
            arguments.push(self.path.clone().into());
        }
        arguments.extend(["--filter".into(), case.name.clone().into()]);
        shell_line(&arguments)
    }

    /// Prints what is left to say at the end: the failures with their last lines, the slowest cases, the counts.
    ///
    /// # Errors
    /// `out` cannot be written to.
    pub fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        for result in &self.results {
            if result.is_failure() || result.outcome == Outcome::Flaky {
                self.print_failure(result, out)?;
            }
        }
        self.print_slowest(out)?;
        if let Some(signal) = self.interrupted {
            writeln!(out, "\nInterrupted by signal {signal}.")?;
        }
        writeln!(out, "\n{self}")
    }

    fn print_failure(&self, result: &CaseResult, out: &mut dyn Write) -> io::Result<()> {
        let what = if result.outcome == Outcome::Flaky { "FLAKY" } else { "FAILED" };
        writeln!(out, "\n{what} {}: {}", result.case.name, result.remark())?;
        if let Some((attempt, _)) = result.failure() {
            let of_the_command = attempt.report.as_ref().and_then(|report| report.get("reason")?.as_str());
            let lines = if of_the_command == Some("exited") { TAIL_LINES } else { GUEST_TAIL_LINES };
            for line in last_lines(&attempt.output, lines) {
                writeln!(out, "  | {line}")?;
            }
        }
        if let Some(log) = &result.log {
            writeln!(out, "  log:   {}", log.display())?;
        }
        writeln!(out, "  again: {}", self.again(&result.case))
    }

    fn print_slowest(&self, out: &mut dyn Write) -> io::Result<()> {
        let mut ran: Vec<_> = self.results.iter().filter(|result| !result.attempts.is_empty()).collect();
        if ran.len() <= SLOWEST {
            return Ok(());
        }
        ran.sort_by_key(|result| std::cmp::Reverse(result.duration()));
        writeln!(out, "\nSlowest:")?;
        for result in &ran[..SLOWEST] {
            writeln!(out, "  {:>8} {}", seconds(result.duration()), result.case.name)?;
        }
        Ok(())
    }
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let counts: Vec<_> = [
            (Outcome::Passed, "passed"),
            (Outcome::Flaky, "flaky"),
            (Outcome::Failed, "failed"),
            (Outcome::Error, "could not be run"),
            (Outcome::NotRun, "not run"),
        ]
        .into_iter()
        .map(|(outcome, name)| (self.count(outcome), name))
        .filter(|(count, _)| *count > 0)
        .map(|(count, name)| format!("{count} {name}"))
        .collect();
        let cases = if self.results.len() == 1 { "case" } else { "cases" };
        write!(f, "{} {cases} in {}: {}", self.results.len(), seconds(self.duration), counts.join(", "))
    }
}

/// A duration as all output has it.
pub(super) fn seconds(duration: Duration) -> String {
    format!("{:.1}s", duration.as_secs_f64())
}

/// The last lines of output, fit to be printed: control characters, colours among them, would act on the terminal.
fn last_lines(output: &[u8], count: usize) -> Vec<String> {
    let text = String::from_utf8_lossy(output);
    let text = console::strip_ansi_codes(&text);
    let lines: Vec<_> = text.lines().collect();
    let last = &lines[lines.len().saturating_sub(count)..];
    let printable = |line: &&str| line.chars().filter(|c| *c == '\t' || !c.is_control()).collect();
    last.iter().map(printable).collect()
}
