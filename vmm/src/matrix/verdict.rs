//! What came of an attempt: the exit status and the report of `daxvm run` against what the case expects.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use super::Case;

/// What came of one attempt of a case.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "verdict", content = "why", rename_all = "kebab-case")]
pub enum Verdict {
    /// What was expected.
    Passed,
    /// The guest or the command did something else; what, and what was expected.
    Failed(String),
    /// Nothing is known of the guest, as daxvm could not run it. Trying again would not help.
    Error(String),
    /// It was ended because the user wanted all to end.
    Interrupted,
}

/// How the child process ended.
#[derive(Debug)]
pub(super) enum Ending {
    /// By itself.
    Exited(ExitStatus),
    /// By force, as it was still there this long after its time limit.
    Overdue(Duration),
    /// Because the user wanted it.
    Interrupted,
    /// It did not begin, or could not be watched.
    NotRun(String),
}

/// Judges an attempt. `report` is what the report file holds; `output` is the end of what the child wrote.
pub(super) fn judge(case: &Case, ending: &Ending, report: Option<&Value>, output: &[u8]) -> Verdict {
    let status = match ending {
        Ending::Interrupted => return Verdict::Interrupted,
        Ending::NotRun(why) => return Verdict::Error(why.clone()),
        Ending::Overdue(late) => {
            let late = late.as_secs();
            return Verdict::Error(format!(
                "daxvm run was still there {late} s after the time limit and was killed"
            ));
        }
        Ending::Exited(status) => status,
    };
    let Some((reason, reported)) = report.and_then(reason_and_status) else {
        return Verdict::Error(without_report(*status, output));
    };
    if status.code() != Some(reported.into()) {
        return Verdict::Error(format!(
            "daxvm run ended with {status}, but its report says exit status {reported}"
        ));
    }
    if case.expect.iter().any(|expected| expected.is_met_by(reason, reported)) {
        return Verdict::Passed;
    }
    let what = describe(reason, reported, report.and_then(|report| report.get("message")), case.timeout);
    let expected: Vec<_> = case.expect.iter().map(ToString::to_string).collect();
    Verdict::Failed(format!("{what}; expected: {}", expected.join(" or ")))
}

/// What the report says first of all.
pub(super) fn reason_and_status(report: &Value) -> Option<(&str, u8)> {
    let status = report.get("status")?.as_u64()?;
    Some((report.get("reason")?.as_str()?, u8::try_from(status).ok()?))
}

/// A child that wrote no report has refused its configuration, or has died.
fn without_report(status: ExitStatus, output: &[u8]) -> String {
    if let Some(signal) = status.signal() {
        let memory = if signal == libc::SIGKILL { "; the host may have run out of memory" } else { "" };
        return format!("daxvm run died of signal {signal} and left no report{memory}");
    }
    let output = String::from_utf8_lossy(output);
    let complaint =
        output.lines().rev().find(|line| line.starts_with("daxvm: ") || line.starts_with("error: "));
    let complaint = complaint.map(|line| format!(": {line}")).unwrap_or_default();
    format!("daxvm run left no report and ended with {status}{complaint}")
}

fn describe(reason: &str, status: u8, message: Option<&Value>, timeout: Duration) -> String {
    let message = match message {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => format!(": {}", text.trim_end()),
        Some(other) => format!(": {other}"),
    };
    match reason {
        "exited" => format!("exit status {status}"),
        "signaled" => format!("the command died of signal {}", status.saturating_sub(128)),
        "not-run" => format!("the command could not be run{message} (exit status {status})"),
        "boot-failed" => format!("the guest did not boot{message}"),
        "panic" => format!("the guest's kernel panicked{message}"),
        "crash" => format!("the guest crashed{message}"),
        "timeout" => format!("it did not end within {} s", timeout.as_secs_f64()),
        "power-off" => "the guest powered off".to_owned(),
        "reset" => "the guest was reset".to_owned(),
        other => format!("{other}{message}"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::matrix::testing::case;
    use crate::matrix::{Expected, case::Case};

    fn exited(status: i32) -> Ending {
        Ending::Exited(ExitStatus::from_raw(status << 8))
    }

    fn expecting(expect: &[Expected]) -> Case {
        Case { expect: expect.to_vec(), ..case("k/c") }
    }

    fn why(verdict: Verdict) -> String {
        match verdict {
            Verdict::Failed(why) => format!("failed: {why}"),
            Verdict::Error(why) => format!("error: {why}"),
            other => format!("{other:?}"),
        }
    }

    #[test]
    fn the_reason_counts_and_not_the_status_alone() {
        let report = |reason: &str, status: u8| json!({"reason": reason, "status": status, "message": "so"});
        for (expected, reason, status, passes) in [
            (Expected::Status(0), "exited", 0, true),
            (Expected::Status(0), "power-off", 0, false),
            (Expected::Status(34), "exited", 34, true),
            (Expected::Status(34), "panic", 34, false),
            (Expected::Status(124), "timeout", 124, false),
            (Expected::Status(139), "signaled", 139, true),
            (Expected::Status(127), "not-run", 127, true),
            (Expected::Reason("panic"), "panic", 34, true),
            (Expected::Reason("panic"), "exited", 34, false),
            (Expected::Reason("exited"), "exited", 7, true),
        ] {
            let report = report(reason, status);
            let verdict = judge(&expecting(&[expected]), &exited(status.into()), Some(&report), b"");
            assert_eq!(verdict == Verdict::Passed, passes, "{expected} {reason} {status}: {verdict:?}");
        }
    }

    #[test]
    fn failures_say_what_came_and_what_was_expected() {
        let either = expecting(&[Expected::Status(0), Expected::Reason("timeout")]);
        let report = json!({"reason": "panic", "status": 34, "message": "Attempted to kill init!"});
        let text = why(judge(&either, &exited(34), Some(&report), b""));
        let expected = "failed: the guest's kernel panicked: Attempted to kill init!; expected: exit status 0 or timeout";
        assert_eq!(text, expected);
        let report = json!({"reason": "timeout", "status": 124});
        let text = why(judge(&expecting(&[Expected::Status(0)]), &exited(124), Some(&report), b""));
        assert_eq!(text, "failed: it did not end within 600 s; expected: exit status 0");
    }

    #[test]
    fn without_a_report_it_is_an_error_with_the_complaint() {
        let case = expecting(&[Expected::Status(125)]);
        let output = b"booting\ndaxvm: Cannot open /dev/kvm: join the group kvm\n";
        let text = why(judge(&case, &exited(125), None, output));
        assert!(
            text.starts_with("error: ")
                && text.ends_with(": daxvm: Cannot open /dev/kvm: join the group kvm"),
            "{text}"
        );
        let killed = Ending::Exited(ExitStatus::from_raw(libc::SIGKILL));
        assert!(why(judge(&case, &killed, None, b"")).contains("out of memory"));
        let liar = json!({"reason": "exited", "status": 0});
        assert!(why(judge(&case, &exited(1), Some(&liar), b"")).contains("its report says"));
        assert_eq!(judge(&case, &Ending::Interrupted, Some(&liar), b""), Verdict::Interrupted);
        let broken = json!({"reason": "exited", "status": 300});
        assert!(why(judge(&case, &exited(44), Some(&broken), b"")).contains("no report"));
    }
}
