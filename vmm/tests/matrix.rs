//! `daxvm test`: the harness with a small program in place of `daxvm run` that keeps its protocol (arguments, exit status,
//! report, console), and the command line. What guests make of it is a guest test.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use vmm::matrix::{
    Case, CaseResult, Filter, Flaky, Handle, Lines, Matrix, MatrixError, Observer, Options, Outcome,
    Resources, Run, Summary,
};

/// In place of `daxvm`: commands run on the host, and a few names stand for what guests do.
const STAND_IN: &str = r#"#!/bin/sh
[ "$1" = run ] || exit 125
shift
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case $1 in
        --report=*) report=${1#*=} ;;
        --console=*) console=${1#*=} ;;
        --env=*) export "${1#*=}" ;;
        --cpus=*) cpus=${1#*=} ;;
    esac
    shift
done
shift
echo "Linux version 6.12 with $cpus CPUs" > "$console"
case $1 in
    panic) echo '{"reason":"panic","message":"Attempted to kill init!","status":34}' > "$report"; exit 34 ;;
    refuse) echo 'daxvm: Cannot open /dev/kvm: join the group kvm' >&2; exit 125 ;;
    die) kill -KILL $$ ;;
esac
"$@"
status=$?
echo "{\"reason\":\"exited\",\"status\":$status}" > "$report"
exit $status
"#;

/// A directory with a matrix file and what stands for daxvm.
struct Place {
    directory: TempDir,
    options: Options,
}

impl Place {
    /// `commands` are the tables of the file; a kernel `k` is there.
    fn new(commands: &str) -> Place {
        let directory = TempDir::new().unwrap();
        let program = directory.path().join("stand-in");
        fs::write(&program, STAND_IN).unwrap();
        fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        let text = format!("version = 1\n[[kernel]]\nname = \"k\"\npath = \"stand-in\"\n{commands}");
        fs::write(directory.path().join("m.toml"), text).unwrap();
        let options = Options {
            program,
            jobs: Some(4),
            memory_budget: Some(8 << 30),
            logs: Some(directory.path().join("logs")),
            ..Options::new()
        };
        Place { directory, options }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn prepare(&self) -> Result<Run, MatrixError> {
        Run::new(&Matrix::load(&self.path("m.toml")).unwrap(), &self.options)
    }

    /// Runs the matrix; also returns the lines.
    fn run(&self) -> (Summary, String) {
        let mut lines = Vec::new();
        let summary = self.prepare().unwrap().execute(&mut Lines::new(&mut lines));
        (summary, String::from_utf8(lines).unwrap())
    }

    fn log(&self, case: &str) -> String {
        fs::read_to_string(self.path("logs").join(case.to_owned() + ".log")).unwrap()
    }
}

fn command(name: &str, run: &str) -> String {
    format!("[[command]]\nname = \"{name}\"\nrun = {run}\n")
}

fn outcomes(summary: &Summary) -> Vec<(&str, Outcome)> {
    summary.results.iter().map(|result| (&*result.case.command, result.outcome)).collect()
}

fn end_text(summary: &Summary) -> String {
    let mut text = Vec::new();
    summary.print(&mut text).unwrap();
    String::from_utf8(text).unwrap()
}

fn json(summary: &Summary) -> Value {
    let mut text = Vec::new();
    summary.write_json(&mut text).unwrap();
    serde_json::from_slice(&text).unwrap()
}

fn junit(summary: &Summary) -> String {
    let mut text = Vec::new();
    summary.write_junit(&mut text).unwrap();
    String::from_utf8(text).unwrap()
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Whether the process whose number a file holds is there.
fn lives(pid_file: &Path) -> bool {
    let pid = fs::read_to_string(pid_file).unwrap();
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
    // A zombie whose new parent has not reaped it yet has ended.
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}

#[test]
fn every_kind_of_end_is_told_apart_in_every_output() {
    let commands = [
        command("good", "\"echo fine\""),
        command("bad", "\"echo first; echo 'e\\u001b[31mvil' >&2; exit 3\""),
        command("panics", "[\"panic\"]"),
        command("should-panic", "[\"panic\"]") + "expect = \"panic\"\n",
        command("three", "\"exit 3\"") + "expect = [0, 3]\n",
        command("refused", "[\"refuse\"]") + "retries = 3\n",
        command("dies", "[\"die\"]"),
    ];
    let place = Place::new(&commands.concat());
    let (summary, lines) = place.run();
    let expected = [
        ("good", Outcome::Passed),
        ("bad", Outcome::Failed),
        ("panics", Outcome::Failed),
        ("should-panic", Outcome::Passed),
        ("three", Outcome::Passed),
        ("refused", Outcome::Error),
        ("dies", Outcome::Error),
    ];
    assert_eq!(outcomes(&summary), expected);
    assert_eq!((summary.status(), summary.failures()), (4, 4));
    assert_eq!(summary.results[5].attempts.len(), 1, "what daxvm refuses is not tried again");

    assert!(lines.starts_with("Running 7 cases on 4 CPUs with 8 GiB of memory\n"), "{lines}");
    assert!(lines.contains("k/bad: exit status 3; expected: exit status 0\n"), "{lines}");
    let end = end_text(&summary);
    for part in [
        "\nFAILED k/bad: exit status 3; expected: exit status 0\n  | first\n  | evil\n  log:   ",
        "FAILED k/panics: the guest's kernel panicked: Attempted to kill init!; expected: exit status 0\n",
        "ended with exit status: 125: daxvm: Cannot open /dev/kvm: join the group kvm\n",
        "daxvm run died of signal 9 and left no report",
        "\nSlowest:\n",
        ": 3 passed, 2 failed, 2 could not be run\n",
    ] {
        assert!(end.contains(part), "{part}\n{end}");
    }
    let again = format!("  again: daxvm test {} --filter k/bad\n", place.path("m.toml").display());
    assert!(end.contains(&again), "{end}");

    let report = json(&summary);
    assert_eq!(report["counts"]["failed"], 2);
    assert_eq!((&report["status"], &report["version"]), (&4.into(), &1.into()));
    let bad = &report["cases"][1];
    assert_eq!((&bad["outcome"], &bad["failure"]), (&"failed".into(), &true.into()));
    assert_eq!(bad["attempts"][0]["report"]["reason"], "exited");
    assert_eq!(bad["attempts"][0]["verdict"], "failed");

    let xml = junit(&summary);
    assert!(xml.contains(r#"tests="7" skipped="0" failures="2" errors="2""#), "{xml}");
    assert!(
        xml.contains(r#"<failure message="exit status 3; expected: exit status 0" type="exited"/>"#),
        "{xml}"
    );
    assert!(xml.contains("<system-out>first\nevil"), "{xml}");
    assert!(!xml.contains('\u{1b}'), "{xml}");

    let log = place.log("k/bad");
    let begin =
        "# k/bad, attempt 1\n# daxvm run --kernel=stand-in --cpus=1 --memory=512M --timeout=600s -- sh -ec ";
    assert!(log.starts_with(begin), "{log}");
    assert!(log.contains("\nfirst\ne\u{1b}[31mvil\n# After "), "{log}");
    assert!(log.ends_with("# The kernel's console:\nLinux version 6.12 with 1 CPUs\n\n"), "{log}");
}

#[test]
fn what_passes_at_a_later_attempt_is_flaky_in_every_output() {
    // The second attempt finds what the first has left.
    let once = "\"echo try; test -e $MARK || { touch $MARK; exit 1; }\"";
    let commands = [
        command("shaky", once) + "retries = 2\nenv.MARK = \"mark-1\"\n",
        command("strict", once) + "retries = 2\nenv.MARK = \"mark-2\"\nflaky = \"fail\"\n",
        command("hopeless", "\"exit 1\"") + "retries = 2\n",
    ];
    let place = Place::new(&commands.concat());
    let (summary, lines) = place.run();
    let expected = [("shaky", Outcome::Flaky), ("strict", Outcome::Flaky), ("hopeless", Outcome::Failed)];
    assert_eq!(outcomes(&summary), expected);
    assert_eq!(summary.status(), 2);
    let attempts: Vec<_> = summary.results.iter().map(|result| result.attempts.len()).collect();
    assert_eq!(attempts, [2, 2, 3]);
    assert!(lines.contains("k/shaky: attempt 1 of 3: exit status 1"), "{lines}");
    assert!(lines.contains("k/shaky: passed at attempt 2; before that: exit status 1"), "{lines}");
    let end = end_text(&summary);
    assert!(
        end.contains("\nFLAKY k/shaky: passed at attempt 2") && end.contains(": 2 flaky, 1 failed\n"),
        "{end}"
    );
    assert!(end.contains("(the last of 3 attempts)"), "{end}");
    let report = json(&summary);
    assert_eq!(
        (&report["cases"][0]["outcome"], &report["cases"][0]["failure"]),
        (&"flaky".into(), &false.into())
    );
    assert_eq!(report["cases"][1]["failure"], true);
    let xml = junit(&summary);
    assert_eq!(xml.matches("<flakyFailure ").count(), 1, "{xml}");
    assert_eq!(xml.matches("<rerunFailure ").count(), 3, "{xml}");
    assert!(xml.contains(r#"type="flaky""#), "{xml}");
    let log = place.log("k/shaky");
    assert!(log.contains("attempt 1\n") && log.contains("attempt 2\n"), "{log}");
    // A later run begins a log anew, and the command line says more than the file.
    let place =
        Place { options: Options { retries: Some(0), flaky: Some(Flaky::Pass), ..place.options }, ..place };
    let (summary, _) = place.run();
    assert_eq!((summary.status(), summary.count(Outcome::Passed)), (1, 2));
    assert!(!place.log("k/hopeless").contains("attempt 2"));
}

#[test]
fn one_job_is_one_case_at_a_time_and_memory_is_never_exceeded() {
    let alone = "\"mkdir lock; sleep 0.2; rmdir lock\"\nrepeat = 6\n";
    let mut place = Place::new(&command("alone", alone));
    place.options.jobs = Some(1);
    assert_eq!(place.run().0.status(), 0);
    place.options.jobs = Some(6);
    place.options.memory_budget = Some(900 << 20);
    assert_eq!(place.run().0.status(), 0);
    place.options.memory_budget = Some(512 << 20);
    let error = place.prepare().err().unwrap().to_string();
    assert!(error.contains("k/alone/run=1 needs 528 MiB of memory, which the budget of 512 MiB"), "{error}");
    place.options.memory_budget = Some(4 << 30);
    assert_ne!(place.run().0.status(), 0, "with room for all they meet, so this test can fail");
}

#[test]
fn cases_run_at_the_same_time() {
    // Each waits for the other.
    let meet = |mine: &str, other: &str| {
        let wait = format!("touch {mine}; until test -e {other}; do sleep 0.02; done");
        command(mine, &format!("\"{wait}\""))
    };
    let place = Place::new(&(meet("a", "b") + &meet("b", "a")));
    assert_eq!(place.run().0.status(), 0);
}

#[test]
fn failing_fast_starts_nothing_more_but_lets_the_rest_end() {
    let commands = [
        command("slow", "\"until test -e failed; do sleep 0.02; done; sleep 0.2\""),
        command("bad", "\"touch failed; exit 1\""),
        command("never", "\"true\""),
    ];
    let mut place = Place::new(&commands.concat());
    place.options.jobs = Some(2);
    place.options.fail_fast = true;
    let (summary, _) = place.run();
    let expected = [("slow", Outcome::Passed), ("bad", Outcome::Failed), ("never", Outcome::NotRun)];
    assert_eq!(outcomes(&summary), expected);
    assert_eq!(summary.status(), 1);
    assert!(junit(&summary).contains(r#"<skipped message="not run"/>"#));
}

#[test]
fn an_interrupt_ends_all_cases_and_leaves_the_results() {
    let commands = [
        command("done", "\"true\""),
        command("polite", "\"echo here; echo $$ > polite; exec sleep 1000\""),
        command("waiting", "\"true\"") + "cpus = 4\n",
    ];
    let place = Place::new(&commands.concat());
    let run = place.prepare().unwrap();
    let handle = run.handle();
    let running = std::thread::spawn(move || {
        let mut lines = Vec::new();
        let summary = run.execute(&mut Lines::new(&mut lines));
        (summary, String::from_utf8(lines).unwrap())
    });
    let pid = place.path("polite");
    wait_for("the case runs", || fs::read_to_string(&pid).is_ok_and(|pid| pid.ends_with('\n')));
    wait_for("another has ended", || {
        fs::read_to_string(place.path("logs/k/done.log")).is_ok_and(|log| log.contains("passed"))
    });
    assert!(lives(&pid));
    let begin = Instant::now();
    handle.interrupt(libc::SIGINT);
    let (summary, lines) = running.join().unwrap();
    assert!(begin.elapsed() < Duration::from_secs(5), "SIGTERM is enough for it");
    // A signal takes a moment where it is not the child itself.
    wait_for("it is gone", || !lives(&pid));
    let expected = [("done", Outcome::Passed), ("polite", Outcome::NotRun), ("waiting", Outcome::NotRun)];
    assert_eq!(outcomes(&summary), expected);
    assert_eq!((summary.status(), summary.failures()), (130, 0));
    assert!(lines.contains("Signal 2: ending all cases"), "{lines}");
    assert!(end_text(&summary).contains("Interrupted by signal 2."));
    assert_eq!(json(&summary)["interrupted_by_signal"], 2);
    assert!(place.log("k/polite").contains("here\n# After "), "{}", place.log("k/polite"));
}

#[test]
fn a_second_interrupt_kills_what_does_not_listen() {
    let place = Place::new(&command("deaf", "\"trap '' TERM; echo $$ > deaf; while :; do sleep 1; done\""));
    // The program itself must not listen either.
    fs::write(place.path("stand-in"), STAND_IN.replacen("\n", "\ntrap '' TERM\n", 1)).unwrap();
    let run = place.prepare().unwrap();
    let handle = run.handle();
    let running = std::thread::spawn(move || run.execute(&mut Lines::new(Vec::new())));
    let pid = place.path("deaf");
    wait_for("the case runs", || fs::read_to_string(&pid).is_ok_and(|pid| pid.ends_with('\n')));
    handle.interrupt(libc::SIGTERM);
    std::thread::sleep(Duration::from_millis(300));
    assert!(lives(&pid) && !running.is_finished());
    let begin = Instant::now();
    handle.interrupt(libc::SIGTERM);
    assert_eq!(running.join().unwrap().status(), 143);
    assert!(begin.elapsed() < Duration::from_secs(5));
    wait_for("it is gone", || !lives(&pid));
}

#[test]
fn what_a_case_leaves_running_is_ended_with_it() {
    let place = Place::new(&command("parent", "\"sleep 1000 & echo $! > left\""));
    let begin = Instant::now();
    assert_eq!(place.run().0.status(), 0);
    assert!(
        begin.elapsed() < Duration::from_secs(10),
        "nobody waits for a process that holds the output open"
    );
    wait_for("it is gone", || !lives(&place.path("left")));
}

#[test]
fn a_program_that_outlives_its_time_limit_is_an_error() {
    // The stand-in knows no time limits, as a daxvm run that hangs.
    let mut place = Place::new(&(command("hangs", "\"exec sleep 1000\"") + "timeout = \"10ms\"\n"));
    place.options.overdue = Duration::from_secs(1);
    let (summary, _) = place.run();
    assert_eq!(summary.results[0].outcome, Outcome::Error);
    assert!(summary.results[0].remark().contains("still there 1 s after the time limit"), "{summary}");
}

#[test]
fn more_output_than_anyone_reads_is_cut() {
    let place = Place::new(&command(
        "loud",
        "\"head -c 80000000 /dev/zero | tr '\\\\0' x; echo; echo last; exit 1\"",
    ));
    let (summary, _) = place.run();
    let attempt = &summary.results[0].attempts[0];
    assert!(
        attempt.output.ends_with(b"x\nlast\n") && attempt.output.len() == 64 << 10,
        "{}",
        attempt.output.len()
    );
    let log = place.log("k/loud");
    assert!(log.contains("# Output beyond 64 MiB is left out.\n# After "), "{}", log.len());
    assert!(log.len() < (64 << 20) + 1000);
}

#[test]
fn nothing_temporary_is_left() {
    /// Looks for the run's own directory while it runs, and afterwards.
    struct Look<'p>(&'p Path, usize);
    impl Look<'_> {
        fn count(&self) -> usize {
            fs::read_dir(self.0).unwrap().count()
        }
    }
    impl Observer for Look<'_> {
        fn begin(&mut self, _: &[Case], _: Resources) {
            self.1 = self.count();
        }
        fn started(&mut self, _: usize, _: u32) {}
        fn retrying(&mut self, _: usize, _: &CaseResult) {}
        fn ended(&mut self, _: usize, _: &CaseResult) {}
        fn interrupted(&mut self, _: i32, _: bool) {}
    }
    let place = Place::new(&command("a", "\"true\""));
    let temporary = place.path("tmp");
    fs::create_dir(&temporary).unwrap();
    let options = Options { scratch: Some(temporary.clone()), ..place.options.clone() };
    let run = Run::new(&Matrix::load(&place.path("m.toml")).unwrap(), &options).unwrap();
    let mut look = Look(&temporary, 0);
    let summary = run.execute(&mut look);
    assert_eq!((summary.status(), look.1, look.count()), (0, 1, 0));
}

#[test]
fn handles_outlive_their_run() {
    let place = Place::new(&command("a", "\"true\""));
    let run = place.prepare().unwrap();
    let handle: Handle = run.handle();
    assert_eq!(run.execute(&mut Lines::new(Vec::new())).status(), 0);
    handle.interrupt(2);
}

fn daxvm(directory: &Path, arguments: &[&str]) -> (String, String, i32) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_daxvm"));
    let Output { stdout, stderr, status } =
        command.arg("test").args(arguments).current_dir(directory).output().unwrap();
    (String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap(), status.code().unwrap())
}

#[test]
fn the_command_line_lists_and_refuses() {
    let place =
        Place::new(&(command("build", "\"make\"") + "cpus = [1, 2]\n" + &command("boot", "\"true\"")));
    let directory = place.directory.path();
    let (out, err, status) = daxvm(directory, &["m.toml", "--list"]);
    assert_eq!((&*out, &*err, status), ("k/build/cpus=1\nk/build/cpus=2\nk/boot\n", "", 0));
    let (out, _, status) = daxvm(directory, &["m.toml", "--list", "-f", "boot"]);
    assert_eq!((&*out, status), ("k/boot\n", 0));
    let refused = |arguments: &[&str], says: &str| {
        let (out, err, status) = daxvm(directory, arguments);
        assert!(err.contains(says), "{says}: {err}");
        assert_eq!((&*out, status), ("", 125), "{err}");
    };
    refused(&[], "Cannot read the matrix file daxvm.toml");
    refused(&["m.toml", "-f", "bild"], "did you mean `build`?");
    refused(&["m.toml", "--memory-budget", "100M"], "raise --memory-budget");
    refused(&["m.toml", "--jobs", "0"], "0 is not in 1..");
    refused(&["m.toml", "--junit", "/proc/none/j.xml"], "Cannot write the JUnit file /proc/none/j.xml");
    fs::remove_file(place.path("stand-in")).unwrap();
    refused(&["m.toml"], "The kernel `k` of the matrix is not at ");
    fs::write(place.path("bad.toml"), "version = 1\ncomand = 1\n").unwrap();
    refused(&["bad.toml"], "bad.toml:2:1: unknown key `comand`; did you mean `command`?");
    let odd = Place::new(&(command("odd", "\"true\"") + "share = \"tag=t,path=.,window=3M\"\n"));
    let (_, err, status) = daxvm(odd.directory.path(), &["m.toml", "--list"]);
    assert_eq!(status, 125);
    assert!(
        err.contains("The case k/odd: invalid value 'tag=t,path=.,window=3M'")
            && err.contains("use 32M or more"),
        "{err}"
    );
    let filter = Filter::new(vec!["k/boot".into()]);
    assert_eq!(filter.select(&Matrix::load(&place.path("m.toml")).unwrap().cases).unwrap().len(), 1);
}
