//! `daxvm test`: what a matrix makes of real guests.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use quick_junit::{NonSuccessKind, TestCaseStatus};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use tests::vm::{Kernel, daxvm, scratch};

use crate::harness::{Outcome, Places, end_current, ensure, ensure_eq, trial};
use crate::runner_ends::processes;
use crate::terminal::Terminal;

/// The checks.
pub fn trials(places: &Result<Places, String>, trials: &mut Vec<Trial>) {
    for (name, check) in [
        ("matrix/every-outcome", every_outcome as fn() -> Outcome),
        ("matrix/an-interrupt-leaves-reports-and-no-process", interrupt),
        ("matrix/a-terminal-shows-what-runs", live),
    ] {
        trials.push(trial(name.to_owned(), places, move |_| {
            end_current();
            check()
        }));
    }
}

/// Every way in which a case can end, once; what does not depend on the kernel, with one.
const COMMANDS: &str = r#"
[[command]]
name = "true"
run = ["true"]
cpus = [1, 2]
cmdline = "loglevel=7"

[[command]]
name = "three"
run = "exit 3"
expect = 3

[[command]]
name = "one"
kernels = "6.12"
run = "echo to stdout; echo to stderr >&2; exit 1"
cmdline = "loglevel=7"

[[command]]
name = "panics"
kernels = "6.12"
run = "echo c >/proc/sysrq-trigger; sleep 1000"
expect = "panic"

[[command]]
name = "sleeps"
kernels = "6.12"
run = "sleep 1000"
timeout = "20s"
expect = "timeout"

[[command]]
name = "fails-once"
kernels = "6.12"
run = "if [ -e out/mark ]; then exit 0; fi; touch out/mark; exit 1"
rw = "out"
retries = 1

[[command]]
name = "no-share"
kernels = "6.12"
run = ["true"]
share = "tag=x,path=missing"
"#;

/// A directory with a matrix, `out`, and what a run leaves.
struct Place(TempDir);

impl Place {
    fn new(kernels: &[&str], commands: &str) -> Result<Place, Box<dyn Error>> {
        let place = Place(tempfile::tempdir_in(scratch())?);
        // An emulated host takes its time to unpack a kernel.
        let mut text = String::from("version = 1\n[defaults]\ntimeout = \"5m\"\nboot-timeout = \"90s\"\n");
        for kernel in kernels {
            let dir = Kernel::find(&format!("{kernel}-cloud"))?.dir().canonicalize()?;
            text += &format!("[[kernel]]\nname = \"{kernel}\"\npath = {:?}\n", dir.to_string_lossy());
        }
        fs::write(place.path("m.toml"), text + commands)?;
        fs::create_dir(place.path("out"))?;
        fs::create_dir(place.path("tmp"))?;
        Ok(place)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `daxvm test` with all its reports.
    fn command(&self) -> Command {
        let mut command = Command::new(daxvm());
        command.arg("test").arg(self.path("m.toml")).args(["--jobs", "1", "--memory-budget", "1G"]);
        for option in ["junit", "report", "logs"] {
            command.arg(format!("--{option}")).arg(self.path(option));
        }
        command.env("TMPDIR", self.path("tmp"));
        command
    }

    fn start(&self) -> std::io::Result<Child> {
        let mut command = self.command();
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(fs::File::create(self.path("stderr"))?).spawn()
    }

    fn text(&self, name: &str) -> std::io::Result<String> {
        fs::read_to_string(self.path(name))
    }

    fn report(&self) -> Result<Value, Box<dyn Error>> {
        Ok(serde_json::from_str(&self.text("report")?)?)
    }

    /// Nothing is left of it.
    fn ensure_gone(&self) -> Outcome {
        ensure!(processes()?.is_empty(), "left behind: {:?}", processes()?);
        let files: Vec<_> = fs::read_dir(self.path("tmp"))?.flatten().map(|entry| entry.path()).collect();
        ensure!(files.is_empty(), "left in TMPDIR: {files:?}");
        Ok(())
    }
}

/// The outcomes of a report, by the cases' names.
fn outcomes(report: &Value) -> BTreeMap<String, String> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let cases = report["cases"].as_array().into_iter().flatten();
    cases.map(|case| (text(&case["name"]), text(&case["outcome"]))).collect()
}

fn every_outcome() -> Outcome {
    let place = Place::new(&["6.12", "6.1"], COMMANDS)?;
    let status = place.start()?.wait()?;
    let (printed, report) = (place.text("stderr")?, place.report()?);
    let expected = [
        ("6.1/three", "passed"),
        ("6.1/true/cpus=1", "passed"),
        ("6.1/true/cpus=2", "passed"),
        ("6.12/fails-once", "flaky"),
        ("6.12/no-share", "error"),
        ("6.12/one", "failed"),
        ("6.12/panics", "passed"),
        ("6.12/sleeps", "passed"),
        ("6.12/three", "passed"),
        ("6.12/true/cpus=1", "passed"),
        ("6.12/true/cpus=2", "passed"),
    ];
    let expected: BTreeMap<_, _> =
        expected.iter().map(|(name, outcome)| ((*name).to_owned(), (*outcome).to_owned())).collect();
    ensure_eq!(outcomes(&report), expected, "the outcomes\n{printed}");
    ensure_eq!(status.code(), Some(2), "the exit status: the number failed\n{printed}");
    let counts =
        serde_json::json!({"cases": 11, "passed": 8, "flaky": 1, "failed": 1, "errors": 1, "not_run": 0});
    ensure_eq!(report["counts"], counts, "the counts");
    check_attempts(&report)?;
    check_logs(&place)?;
    check_junit(&place)?;
    for said in ["PASS", "FAIL", "exit status 1", "missing", "FLAKY"] {
        ensure!(printed.contains(said), "it does not say {said:?}:\n{printed}");
    }
    place.ensure_gone()?;
    again(&place, &report, &printed)
}

/// The attempts have what `daxvm run` reported.
fn check_attempts(report: &Value) -> Outcome {
    let attempts = |name: &str| -> Vec<(Value, Value)> {
        let cases = report["cases"].as_array().into_iter().flatten();
        let case = cases.filter(|case| case["name"] == name).flat_map(|case| case["attempts"].as_array());
        case.flatten()
            .map(|attempt| (attempt["verdict"].clone(), attempt["report"]["reason"].clone()))
            .collect()
    };
    for (case, expected) in [
        ("6.12/one", &[("failed", "exited")][..]),
        ("6.12/fails-once", &[("failed", "exited"), ("passed", "exited")]),
        ("6.12/panics", &[("passed", "panic")]),
        ("6.12/sleeps", &[("passed", "timeout")]),
    ] {
        let expected: Vec<_> =
            expected.iter().map(|(verdict, why)| ((*verdict).into(), (*why).into())).collect();
        ensure_eq!(attempts(case), expected, "the attempts of {case}");
    }
    Ok(())
}

/// The logs have the output and the console.
fn check_logs(place: &Place) -> Outcome {
    for (case, parts) in [
        (
            "6.12/one",
            &["to stdout\n", "to stderr\n", "exit status 1", "console", "Run /init as init process"][..],
        ),
        ("6.12/panics", &["sysrq triggered crash"]),
        ("6.12/fails-once", &["attempt 1", "attempt 2"]),
        ("6.12/no-share", &["missing"]),
        ("6.1/true/cpus=2", &["Run /init as init process"]),
    ] {
        let log = place.text(&format!("logs/{case}.log"))?;
        for part in parts {
            ensure!(log.contains(part), "the log of {case} has no {part:?}:\n{log}");
        }
    }
    Ok(())
}

/// The JUnit file can be read, and says the same.
fn check_junit(place: &Place) -> Outcome {
    let junit = quick_junit::Report::deserialize_from_str(&place.text("junit")?)?;
    let suites: Vec<_> = junit.test_suites.iter().map(|suite| suite.name.to_string()).collect();
    ensure_eq!(suites, ["6.12", "6.1"], "the suites");
    for test in junit.test_suites.iter().flat_map(|suite| &suite.test_cases) {
        let found = match &test.status {
            TestCaseStatus::Success { flaky_runs } if flaky_runs.is_empty() => "passed",
            TestCaseStatus::Success { .. } => "flaky",
            TestCaseStatus::NonSuccess { kind: NonSuccessKind::Failure, .. } => "failed",
            TestCaseStatus::NonSuccess { kind: NonSuccessKind::Error, .. } => "error",
            TestCaseStatus::Skipped { .. } => "skipped",
        };
        let expected = match test.name.as_str() {
            "6.12/one" => "failed",
            "6.12/fails-once" => "flaky",
            "6.12/no-share" => "error",
            _ => "passed",
        };
        ensure_eq!(found, expected, "{} in the JUnit file", test.name.as_str());
    }
    ensure_eq!(junit.tests, 11, "tests in the JUnit file");
    Ok(())
}

/// The line that runs a failed case again runs that case, and no other.
fn again(place: &Place, report: &Value, printed: &str) -> Outcome {
    let cases = report["cases"].as_array().into_iter().flatten();
    let line = cases.filter(|case| case["name"] == "6.12/one").find_map(|case| case["again"].as_str());
    let line = line.ok_or("no line to run 6.12/one again")?;
    ensure!(printed.contains(line), "it does not print {line:?}:\n{printed}");
    let script =
        format!("daxvm() {{ \"$DAXVM_PROGRAM\" \"$@\"; }}; {line} --report {:?}", place.path("again"));
    let output = Command::new("sh").args(["-c", &script]).env("DAXVM_PROGRAM", daxvm()).output()?;
    ensure_eq!(output.status.code(), Some(1), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_str(&place.text("again")?)?;
    let expected = BTreeMap::from([("6.12/one".to_owned(), "failed".to_owned())]);
    ensure_eq!(outcomes(&report), expected, "{line}");
    Ok(())
}

fn interrupt() -> Outcome {
    let commands = "[[command]]\nname = \"waits\"\nrun = \"echo here; touch out/started; sleep 1000\"\nrw = \"out\"\n\
                    [[command]]\nname = \"next\"\nrun = [\"true\"]\n";
    let place = Place::new(&["6.12"], commands)?;
    let mut running = place.start()?;
    let end = Instant::now() + Duration::from_secs(240);
    while !place.path("out/started").exists() {
        ensure!(Instant::now() < end, "the first case does not start:\n{}", place.text("stderr")?);
        std::thread::sleep(Duration::from_millis(50));
    }
    let sent = Instant::now();
    kill_process(Pid::from_child(&running), Signal::INT)?;
    let status = running.wait()?;
    let printed = place.text("stderr")?;
    ensure_eq!(status.code(), Some(130), "the exit status\n{printed}");
    ensure!(sent.elapsed() < Duration::from_secs(20), "it took {:?}", sent.elapsed());
    place.ensure_gone()?;
    let report = place.report()?;
    let expected = ["6.12/next", "6.12/waits"].map(|name| (name.to_owned(), "not-run".to_owned()));
    ensure_eq!(outcomes(&report), BTreeMap::from(expected), "the outcomes");
    ensure_eq!(report["interrupted_by_signal"], 2, "the signal in the report");
    let junit = quick_junit::Report::deserialize_from_str(&place.text("junit")?)?;
    ensure_eq!(junit.tests, 2, "tests in the JUnit file");
    let log = place.text("logs/6.12/waits.log")?;
    ensure!(log.contains("here\n") && log.contains("interrupted"), "the log:\n{log}");
    Ok(())
}

/// On a terminal, a line for each case that runs, the total below, and a line that stays for each that has ended.
fn live() -> Outcome {
    let commands = "[[command]]\nname = \"good\"\nrun = \"while [ ! -e out/go ]; do sleep 0.1; done\"\nrw = \"out\"\n\
                    [[command]]\nname = \"bad\"\nrun = \"exit 3\"\n";
    let place = Place::new(&["6.12"], commands)?;
    let mut terminal = Terminal::open(24, 80)?;
    let before = terminal.modes()?;
    let mut command = place.command();
    terminal.attach(&mut command)?;
    command.env("TERM", "xterm");
    let mut running = command.spawn()?;
    terminal.wait_for("Running 2 cases on")?;
    // What runs, while it runs, and how many have ended; time goes on.
    terminal.wait_for("6.12/good")?;
    terminal.wait_for("0/2 1s")?;
    terminal.wait_for("0/2 3s")?;
    fs::write(place.path("out/go"), "")?;
    let shown = terminal.wait_for("] 6.12/good")?;
    ensure!(shown.contains("PASS"), "the first case has not passed: {shown:?}");
    let shown = terminal.wait_for("1/2")?;
    ensure!(!shown.contains("FAIL"), "the second case ends before it runs: {shown:?}");
    terminal.wait_for("6.12/bad: exit status 3")?;
    let status = running.wait()?;
    ensure_eq!(status.code(), Some(1), "the exit status: the number failed");
    terminal.wait_for("1 failed")?;
    ensure_eq!(terminal.modes()?, before, "the terminal afterwards");
    place.ensure_gone()
}
