//! What is shown while a matrix runs: plain lines for logs, a line for each running case on a terminal.

use std::collections::BTreeMap;
use std::io::Write;
use std::time::{Duration, Instant};

use console::Style;
use devices::text::Bytes;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::summary::seconds;
use super::{Case, CaseResult, Outcome, Resources};

/// A case that still runs is mentioned in plain output this often, so that nobody takes silence for a hang.
const SLOW: Duration = Duration::from_secs(60);
/// How often a live display moves.
const STEADY: Duration = Duration::from_millis(200);

/// Who wants to see what goes on. Cases are known by their places in the list that [`begin`](Observer::begin) has.
pub trait Observer {
    /// These cases are going to run.
    fn begin(&mut self, cases: &[Case], budget: Resources);
    /// An attempt begins; the first is 1.
    fn started(&mut self, case: usize, attempt: u32);
    /// The last attempt has failed, and there will be another.
    fn retrying(&mut self, case: usize, result: &CaseResult);
    /// A case has ended.
    fn ended(&mut self, case: usize, result: &CaseResult);
    /// A second has passed in which nothing happened.
    fn tick(&mut self) {}
    /// A signal ends the run; at the second the cases are killed.
    fn interrupted(&mut self, signal: i32, again: bool);
    /// All have ended.
    fn end(&mut self) {}
}

/// The words of both.
fn begins(cases: &[Case], budget: Resources) -> String {
    let (count, cpus) = (cases.len(), budget.cpus);
    let noun = if count == 1 { "case" } else { "cases" };
    format!("Running {count} {noun} on {cpus} CPUs with {} of memory", Bytes(budget.memory))
}

fn interruption(signal: i32, again: bool) -> String {
    match again {
        false => format!("Signal {signal}: ending all cases; the next one kills them"),
        true => format!("Signal {signal}: killing all cases"),
    }
}

fn word(outcome: Outcome) -> (&'static str, Style) {
    let style = Style::new().for_stderr().bold();
    match outcome {
        Outcome::Passed => ("PASS", style.green()),
        Outcome::Flaky => ("FLAKY", style.yellow()),
        Outcome::Failed => ("FAIL", style.red()),
        Outcome::Error => ("ERROR", style.red()),
        Outcome::NotRun => ("END", style.dim()),
    }
}

fn line(word: &str, duration: Duration, name: &str, remark: &str) -> String {
    let colon = if remark.is_empty() { "" } else { ": " };
    // A remark may have lines of a guest in it.
    let remark = remark.lines().next().unwrap_or_default();
    format!("{word} [{:>8}] {name}{colon}{remark}", seconds(duration))
}

/// One line for each thing that happens.
pub struct Lines<W> {
    out: W,
    names: Vec<String>,
    /// When each running case began, and when it is mentioned next.
    running: BTreeMap<usize, (Instant, Instant)>,
}

impl<W: Write> Lines<W> {
    /// Lines that go to `out`.
    pub fn new(out: W) -> Lines<W> {
        Lines { out, names: Vec::new(), running: BTreeMap::new() }
    }

    fn say(&mut self, text: &str) {
        // Who closes the output does not want to see it; the reports are written all the same.
        let _ = writeln!(self.out, "{text}");
        let _ = self.out.flush();
    }
}

impl<W: Write> Observer for Lines<W> {
    fn begin(&mut self, cases: &[Case], budget: Resources) {
        self.names = cases.iter().map(|case| case.name.clone()).collect();
        self.say(&begins(cases, budget));
    }

    fn started(&mut self, case: usize, _attempt: u32) {
        let now = Instant::now();
        self.running.insert(case, (now, now + SLOW));
    }

    fn retrying(&mut self, case: usize, result: &CaseResult) {
        self.running.remove(&case);
        self.say(&retry_line("RETRY", result));
    }

    fn ended(&mut self, case: usize, result: &CaseResult) {
        self.running.remove(&case);
        let (word, _) = word(result.outcome);
        self.say(&line(&format!("{word:5}"), result.duration(), &result.case.name, &result.remark()));
        self.tick();
    }

    fn tick(&mut self) {
        let now = Instant::now();
        let mut slow = Vec::new();
        for (case, (began, next)) in self.running.iter_mut().filter(|(_, (_, next))| now >= *next) {
            slow.push(line("SLOW ", now - *began, &self.names[*case], "still running"));
            *next = now + SLOW;
        }
        for text in slow {
            self.say(&text);
        }
    }

    fn interrupted(&mut self, signal: i32, again: bool) {
        self.say(&interruption(signal, again));
    }
}

fn retry_line(word: &str, result: &CaseResult) -> String {
    let (attempts, most) = (result.attempts.len(), result.case.retries + 1);
    let (duration, why) =
        result.failure().map_or((Duration::ZERO, ""), |(attempt, why)| (attempt.duration, why));
    line(word, duration, &result.case.name, &format!("attempt {attempts} of {most}: {why}"))
}

/// A display on a terminal: what runs now, how far it is, and above it a line for each case that has ended.
pub struct Live {
    display: MultiProgress,
    total: Option<ProgressBar>,
    running: BTreeMap<usize, ProgressBar>,
    names: Vec<String>,
    counts: [usize; 2],
}

impl Live {
    /// A display on standard error.
    pub fn new() -> Live {
        Live {
            display: MultiProgress::new(),
            total: None,
            running: BTreeMap::new(),
            names: Vec::new(),
            counts: [0; 2],
        }
    }

    fn say(&self, text: &str) {
        let _ = self.display.println(text);
    }

    fn remove(&mut self, case: usize) {
        if let Some(bar) = self.running.remove(&case) {
            bar.finish_and_clear();
            self.display.remove(&bar);
        }
    }
}

impl Default for Live {
    fn default() -> Live {
        Live::new()
    }
}

/// A style from a template of this file.
fn style(bar: ProgressStyle, template: &str) -> ProgressStyle {
    bar.template(template).expect("templates of this file are right")
}

impl Observer for Live {
    fn begin(&mut self, cases: &[Case], budget: Resources) {
        self.names = cases.iter().map(|case| case.name.clone()).collect();
        self.say(&begins(cases, budget));
        let total = self.display.add(ProgressBar::new(cases.len() as u64));
        total.set_style(style(ProgressStyle::default_bar(), "{bar:24} {pos}/{len} {elapsed} {msg}"));
        total.enable_steady_tick(STEADY);
        self.total = Some(total);
    }

    fn started(&mut self, case: usize, attempt: u32) {
        let Some(total) = &self.total else { return };
        let bar = self.display.insert_before(total, ProgressBar::new_spinner());
        bar.set_style(style(ProgressStyle::default_spinner(), "  {spinner} {elapsed:>4} {wide_msg}"));
        let name = &self.names[case];
        bar.set_message(if attempt > 1 { format!("{name}, attempt {attempt}") } else { name.clone() });
        bar.enable_steady_tick(STEADY);
        self.running.insert(case, bar);
    }

    fn retrying(&mut self, case: usize, result: &CaseResult) {
        self.remove(case);
        let word = Style::new().for_stderr().bold().yellow().apply_to("RETRY");
        self.say(&retry_line(&word.to_string(), result));
    }

    fn ended(&mut self, case: usize, result: &CaseResult) {
        self.remove(case);
        let (word, style) = word(result.outcome);
        let word = style.apply_to(format!("{word:5}")).to_string();
        self.say(&line(&word, result.duration(), &result.case.name, &result.remark()));
        self.counts[0] += usize::from(result.is_failure());
        self.counts[1] += usize::from(result.outcome == Outcome::Flaky);
        if let Some(total) = &self.total {
            total.inc(1);
            let [failed, flaky] = self.counts;
            total.set_message(match (failed, flaky) {
                (0, 0) => String::new(),
                (failed, 0) => format!("{failed} failed"),
                (failed, flaky) => format!("{failed} failed, {flaky} flaky"),
            });
        }
    }

    fn interrupted(&mut self, signal: i32, again: bool) {
        self.say(&interruption(signal, again));
    }

    fn end(&mut self) {
        if let Some(total) = self.total.take() {
            total.finish_and_clear();
        }
    }
}
