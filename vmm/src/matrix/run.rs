//! Runs a matrix: starts children when the schedule says so, tries again, stops early, and gathers the results.

use std::any::Any;
use std::fs;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, Scope};
use std::time::{Duration, Instant, SystemTime};

use tempfile::TempDir;

use super::child::{self, Attempt, Interrupted, Interruption, Task};
use super::schedule::{Resources, Schedule};
use super::summary::{CaseResult, Summary};
use super::verdict::Verdict;
use super::{Case, Filter, Flaky, Matrix, MatrixError, Observer, host};

/// What a VMM needs beside its guest's RAM, in bytes.
const VMM_MEMORY: u64 = 16 << 20;
/// How often observers learn that time has passed.
const TICK: Duration = Duration::from_secs(1);

/// How a matrix is run. What is `None` comes from the matrix file, or from the host.
#[derive(Debug, Clone)]
pub struct Options {
    /// The `daxvm` of the cases: any program that takes its arguments, and exits and reports as `daxvm run` does.
    pub program: PathBuf,
    /// Which cases.
    pub filter: Filter,
    /// vCPUs that may run at the same time.
    pub jobs: Option<u32>,
    /// Bytes of memory for all guests together.
    pub memory_budget: Option<u64>,
    /// How often a case is tried again.
    pub retries: Option<u32>,
    /// What a case is that has failed and then passed.
    pub flaky: Option<Flaky>,
    /// Whether nothing more is started after a failure; what runs then runs to its end.
    pub fail_fast: bool,
    /// Where each case leaves a log.
    pub logs: Option<PathBuf>,
    /// How long after its time limit a child may still be there before it is ended: it keeps the limit itself.
    pub overdue: Duration,
    /// Where a directory for what a run needs meanwhile is made; the system's place for such by default.
    pub scratch: Option<PathBuf>,
}

impl Options {
    /// This very program, and nothing else asked for.
    pub fn new() -> Options {
        Options {
            program: "/proc/self/exe".into(),
            filter: Filter::default(),
            jobs: None,
            memory_budget: None,
            retries: None,
            flaky: None,
            fail_fast: false,
            logs: None,
            overdue: Duration::from_secs(30),
            scratch: None,
        }
    }
}

impl Default for Options {
    fn default() -> Options {
        Options::new()
    }
}

enum Event {
    Ended(usize, Attempt),
    Interrupt(i32),
}

/// Interrupts a [`Run`] from other threads.
#[derive(Debug, Clone)]
pub struct Handle(Sender<Event>);

impl Handle {
    /// A signal has come. At the first all cases are told to end and get 10 seconds for it, at the second they are
    /// killed. The run then ends, with what is known by then in its summary.
    pub fn interrupt(&self, signal: i32) {
        // A run that has ended cannot be interrupted.
        let _ = self.0.send(Event::Interrupt(signal));
    }
}

/// A matrix that is about to be run. All that can be checked before has been.
pub struct Run {
    path: PathBuf,
    directory: PathBuf,
    program: PathBuf,
    cases: Vec<Case>,
    schedule: Schedule,
    budget: Resources,
    fail_fast: bool,
    logs: Option<PathBuf>,
    overdue: Duration,
    scratch: TempDir,
    interruption: Interruption,
    interrupted: Arc<Interrupted>,
    sender: Sender<Event>,
    receiver: Receiver<Event>,
}

impl Run {
    /// Chooses the cases and checks that each can run.
    ///
    /// # Errors
    /// Nothing is chosen, a kernel is not there, a case can never fit, or the directory of logs cannot be made.
    pub fn new(matrix: &Matrix, options: &Options) -> Result<Run, MatrixError> {
        let mut cases = options.filter.select(&matrix.cases)?;
        for case in &mut cases {
            case.retries = options.retries.unwrap_or(case.retries);
            case.flaky = options.flaky.unwrap_or(case.flaky);
            if let Some(path) = case.kernel_path.as_ref().map(|path| matrix.directory.join(path))
                && !path.exists()
            {
                return Err(MatrixError::NoKernel { kernel: case.kernel.clone(), path });
            }
        }
        let host = host::resources();
        let budget = Resources {
            cpus: options.jobs.or(matrix.jobs).unwrap_or(host.cpus).max(1),
            memory: options.memory_budget.or(matrix.memory_budget).unwrap_or(host.memory),
        };
        let costs: Vec<_> = cases.iter().map(cost).collect();
        let schedule = Schedule::new(budget, &costs).map_err(|case| MatrixError::DoesNotFit {
            case: cases[case].name.clone(),
            needed: costs[case].memory,
            budget: budget.memory,
        })?;
        if let Some(logs) = &options.logs {
            let failed = |source| MatrixError::Write { what: "logs", path: logs.clone(), source };
            fs::create_dir_all(logs).map_err(failed)?;
        }
        let temporary = std::path::absolute(options.scratch.clone().unwrap_or_else(std::env::temp_dir))
            .map_err(MatrixError::Host)?;
        let scratch = tempfile::Builder::new()
            .prefix("daxvm-test-")
            .tempdir_in(temporary)
            .map_err(MatrixError::Host)?;
        let (interruption, interrupted) = Interruption::new().map_err(MatrixError::Host)?;
        let (sender, receiver) = channel();
        Ok(Run {
            path: matrix.path.clone(),
            directory: matrix.directory.clone(),
            program: options.program.clone(),
            cases,
            schedule,
            budget,
            fail_fast: options.fail_fast,
            logs: options.logs.clone(),
            overdue: options.overdue,
            scratch,
            interruption,
            interrupted,
            sender,
            receiver,
        })
    }

    /// The cases that will run.
    pub fn cases(&self) -> &[Case] {
        &self.cases
    }

    /// What all cases together may take.
    pub fn budget(&self) -> Resources {
        self.budget
    }

    /// The means to interrupt it.
    pub fn handle(&self) -> Handle {
        Handle(self.sender.clone())
    }

    /// Runs all cases; returns when no child is left.
    pub fn execute(mut self, observer: &mut dyn Observer) -> Summary {
        let (started, clock) = (SystemTime::now(), Instant::now());
        let mut results: Vec<_> = self.cases.iter().map(|case| CaseResult::new(case.clone())).collect();
        if self.logs.is_some() {
            for result in &mut results {
                result.log = self.logs.as_ref().map(|logs| logs.join(result.case.log_path()));
            }
        }
        let mut signal = None;
        observer.begin(&self.cases, self.budget);
        std::thread::scope(|scope| {
            while !self.schedule.is_done() {
                while let Some(case) = self.schedule.start() {
                    let attempt = results[case].attempts.len() as u32 + 1;
                    observer.started(case, attempt);
                    self.start(scope, case, attempt);
                }
                match self.receiver.recv_timeout(TICK) {
                    Ok(Event::Ended(case, attempt)) => self.ended(case, attempt, &mut results, observer),
                    Ok(Event::Interrupt(number)) => {
                        self.interruption.next();
                        self.schedule.give_up();
                        observer.interrupted(number, signal.is_some());
                        signal.get_or_insert(number);
                    }
                    Err(_) => observer.tick(),
                }
            }
        });
        observer.end();
        Summary {
            path: self.path,
            results,
            budget: self.budget,
            started,
            duration: clock.elapsed(),
            interrupted: signal,
        }
    }

    fn start<'s>(&self, scope: &'s Scope<'s, '_>, case: usize, attempt: u32) {
        let (sender, interrupted) = (self.sender.clone(), Arc::clone(&self.interrupted));
        let failed = |error: io::Error| {
            let _ = self
                .sender
                .send(Event::Ended(case, error_attempt(format!("Cannot start the case: {error}"))));
        };
        let scratch = self.scratch.path().join(format!("{case}-{attempt}"));
        if let Err(error) = fs::create_dir(&scratch) {
            return failed(error);
        }
        let logs = self.logs.as_deref().unwrap_or(self.scratch.path());
        let task = Task {
            log: logs.join(self.cases[case].log_path()),
            case: self.cases[case].clone(),
            attempt,
            program: self.program.clone(),
            directory: self.directory.clone(),
            scratch,
            overdue: self.overdue,
        };
        let body = move || {
            // Whatever happens here, the run must learn that the case has ended.
            let attempt = catch_unwind(AssertUnwindSafe(|| child::run(&task, &interrupted)))
                .unwrap_or_else(|panic| error_attempt(format!("Internal error: {}", panic_text(&*panic))));
            remove(&task.scratch);
            let _ = sender.send(Event::Ended(case, attempt));
        };
        if let Err(error) = Builder::new().name("case".into()).spawn_scoped(scope, body) {
            failed(error);
        }
    }

    /// Notes what came of an attempt, and decides how it goes on.
    fn ended(
        &mut self,
        case: usize,
        mut attempt: Attempt,
        results: &mut [CaseResult],
        observer: &mut dyn Observer,
    ) {
        if attempt.verdict == Verdict::Passed {
            // Nobody reads it again, and thousands of cases may pass.
            attempt.output = Vec::new();
        }
        let result = &mut results[case];
        let failed = matches!(attempt.verdict, Verdict::Failed(_));
        result.attempts.push(attempt);
        if failed && result.attempts.len() as u32 <= result.case.retries && !self.interruption.has_begun() {
            observer.retrying(case, result);
            self.schedule.again(case);
            return;
        }
        self.schedule.end(case);
        result.finish();
        observer.ended(case, result);
        if self.fail_fast && result.is_failure() {
            self.schedule.give_up();
        }
    }
}

fn cost(case: &Case) -> Resources {
    Resources { cpus: case.cpus.into(), memory: case.memory.saturating_add(VMM_MEMORY) }
}

fn remove(directory: &Path) {
    // The directory above it goes too, at the end.
    let _ = fs::remove_dir_all(directory);
}

fn error_attempt(why: String) -> Attempt {
    Attempt {
        verdict: Verdict::Error(why),
        started: SystemTime::now(),
        duration: Duration::ZERO,
        report: None,
        output: Vec::new(),
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic".to_owned())
}
