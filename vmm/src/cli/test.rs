//! `daxvm test`: runs a matrix of kernels and commands.

use std::error::Error;
use std::fs::File;
use std::io::{BufWriter, IsTerminal, Write, stderr, stdout};
use std::iter;
use std::path::{Path, PathBuf};

use clap::Args;
use devices::text::parse_size;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::matrix::{
    Filter, Flaky, Handle, Lines, Live, Matrix, MatrixError, Observer, Options, Run, Summary,
};

/// Run a matrix of kernels and commands, each case in a guest of its own.
///
/// Exit status: how many cases have failed, 100 for more than 100; 125 when the matrix could not be run or a report not
/// be written; 128+n when signal n ended it.
#[derive(Debug, Args)]
pub(super) struct TestArgs {
    /// The matrix file
    #[arg(default_value = "daxvm.toml")]
    file: PathBuf,
    /// Only the cases whose name has this in it, is this, or matches this glob (as `6.12/*`); may be repeated
    #[arg(long = "filter", short, value_name = "PATTERN")]
    filters: Vec<String>,
    /// Print the names of the cases, and run nothing
    #[arg(long)]
    list: bool,
    /// vCPUs that may run at the same time; by default as many as the host has CPUs
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    jobs: Option<u32>,
    /// Memory for all guests together; by default nine tenths of what the host has available
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory_budget: Option<u64>,
    /// Start no more cases after the first failure
    #[arg(long)]
    fail_fast: bool,
    /// Try failed cases again, up to this often; those that pass then are flaky
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(..=100))]
    retries: Option<u32>,
    /// What flaky cases are: pass or fail
    #[arg(long, value_name = "OUTCOME", value_parser = |text: &str| text.parse::<Flaky>())]
    flaky: Option<Flaky>,
    /// Write the results as JUnit XML
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Write the results as JSON
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Write a log of each case, its output and the kernel's console, to DIR/KERNEL/COMMAND.log
    #[arg(long, value_name = "DIR")]
    logs: Option<PathBuf>,
}

impl TestArgs {
    /// Runs the matrix; returns the exit status.
    pub(super) fn execute(self) -> Result<u8, Box<dyn Error>> {
        let matrix = Matrix::load(&self.file)?;
        check(&matrix)?;
        let filter = Filter::new(self.filters);
        if self.list {
            let mut out = stdout().lock();
            for case in filter.select(&matrix.cases)? {
                writeln!(out, "{}", case.name)?;
            }
            return Ok(0);
        }
        let options = Options {
            filter,
            jobs: self.jobs,
            memory_budget: self.memory_budget,
            retries: self.retries,
            flaky: self.flaky,
            fail_fast: self.fail_fast,
            logs: self.logs,
            ..Options::new()
        };
        let run = Run::new(&matrix, &options)?;
        // Made before anything runs, as an hour of tests without a report would be lost.
        let junit = self.junit.as_deref().map(|path| create("JUnit file", path)).transpose()?;
        let report = self.report.as_deref().map(|path| create("report", path)).transpose()?;
        interrupt_on_signals(run.handle())?;
        let summary = run.execute(&mut *observer());
        // Who has closed standard error still gets the reports.
        let _ = summary.print(&mut stderr().lock());
        annotate(&summary);
        for (output, write) in [
            (junit, Summary::write_junit as fn(&Summary, &mut dyn Write) -> _),
            (report, Summary::write_json),
        ] {
            let Some(Output { what, path, file }) = output else { continue };
            let mut file = BufWriter::new(file);
            let written: std::io::Result<()> = write(&summary, &mut file).and_then(|()| file.flush());
            written.map_err(|source| MatrixError::Write { what, path: path.to_owned(), source })?;
        }
        Ok(summary.status())
    }
}

/// A case that `daxvm run` would not take is a mistake in the file, and no test that fails in the end.
fn check(matrix: &Matrix) -> Result<(), MatrixError> {
    let command = super::command();
    for case in &matrix.cases {
        let words = iter::once("daxvm".into()).chain(case.arguments());
        if let Err(error) = command.clone().try_get_matches_from(words) {
            let text = error.to_string();
            let why = text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned();
            return Err(MatrixError::Case { case: case.name.clone(), why });
        }
    }
    Ok(())
}

struct Output<'p> {
    what: &'static str,
    path: &'p Path,
    file: File,
}

fn create<'p>(what: &'static str, path: &'p Path) -> Result<Output<'p>, MatrixError> {
    let failed = |source| MatrixError::Write { what, path: path.to_owned(), source };
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).map_err(failed)?;
    }
    Ok(Output { what, path, file: File::create(path).map_err(failed)? })
}

/// A live display for people, plain lines where nobody looks on, or wants no colours.
fn observer() -> Box<dyn Observer> {
    let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
    match stderr().is_terminal() && !set("CI") && !set("NO_COLOR") && !dumb {
        true => Box::new(Live::new()),
        false => Box::new(Lines::new(stderr())),
    }
}

fn interrupt_on_signals(handle: Handle) -> std::io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP, SIGQUIT])?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        for signal in signals.forever() {
            handle.interrupt(signal);
        }
    })?;
    Ok(())
}

/// GitHub shows these lines of a job's log with the change that is tested.
fn annotate(summary: &Summary) {
    if std::env::var_os("GITHUB_ACTIONS").is_none_or(|value| value != "true") {
        return;
    }
    let escape = |text: &str| text.replace('%', "%25").replace('\r', "%0D").replace('\n', "%0A");
    for result in &summary.results {
        let level = match (result.is_failure(), result.remark().is_empty()) {
            (true, _) => "error",
            (false, false) if result.outcome == crate::matrix::Outcome::Flaky => "warning",
            _ => continue,
        };
        let title = escape(&result.case.name).replace(':', "%3A").replace(',', "%2C");
        let _ = writeln!(stdout(), "::{level} title={title}::{}", escape(&result.remark()));
    }
}
