//! The results as JUnit XML, which CI systems show: a suite for each kernel, a test case for each case.

use std::io::{self, Write};

use chrono::{DateTime, Utc};
use quick_junit::{NonSuccessKind, Property, Report, TestCase, TestCaseStatus, TestRerun, TestSuite};

use super::{Attempt, CaseResult, Outcome, Summary, Verdict};

/// What the report is called.
const NAME: &str = "daxvm test";

impl Summary {
    /// Writes the results as JUnit XML. A flaky case is a success with `flakyFailure`s, or a failure with
    /// `rerunFailure`s, as the case has it.
    ///
    /// # Errors
    /// `out` cannot be written to.
    pub fn write_junit(&self, out: &mut dyn Write) -> io::Result<()> {
        let mut report = Report::new(NAME);
        report.set_timestamp(DateTime::<Utc>::from(self.started)).set_time(self.duration);
        let mut suites: Vec<TestSuite> = Vec::new();
        for result in &self.results {
            let known = suites.iter().position(|suite| suite.name.as_str() == result.case.kernel);
            let place = known.unwrap_or_else(|| {
                suites.push(TestSuite::new(&*result.case.kernel));
                suites.len() - 1
            });
            let suite = &mut suites[place];
            suite.set_time(suite.time.unwrap_or_default() + result.duration());
            suite.add_test_case(test_case(result));
        }
        report.add_test_suites(suites);
        report.serialize(out).map_err(io::Error::other)
    }
}

fn test_case(result: &CaseResult) -> TestCase {
    let case = &result.case;
    let mut test = TestCase::new(&*case.name, status(result));
    test.set_classname(&*case.kernel).set_time(result.duration());
    test.add_property(Property::new("cpus", case.cpus.to_string()));
    test.add_property(Property::new("memory", case.memory.to_string()));
    if let Some(log) = &result.log {
        test.add_property(Property::new("log", log.display().to_string()));
    }
    if let Some(first) = result.attempts.first() {
        test.set_timestamp(DateTime::<Utc>::from(first.started));
    }
    if let Some(last) = result.attempts.last().filter(|last| !last.output.is_empty()) {
        test.set_system_out_lossy(&last.output);
    }
    test
}

fn status(result: &CaseResult) -> TestCaseStatus {
    let mut status = match result.outcome {
        Outcome::NotRun => TestCaseStatus::skipped(),
        Outcome::Error => TestCaseStatus::non_success(NonSuccessKind::Error),
        _ if result.is_failure() => TestCaseStatus::non_success(NonSuccessKind::Failure),
        _ => TestCaseStatus::success(),
    };
    let reason = |attempt: &Attempt| {
        let report = attempt.report.as_ref();
        report.and_then(|report| report.get("reason")?.as_str().map(str::to_owned))
    };
    status.set_message(result.remark());
    if result.outcome == Outcome::Flaky {
        status.set_type("flaky");
    } else if let Some(reason) = result.attempts.last().and_then(reason) {
        status.set_type(reason);
    }
    // The last attempt is the test itself, those before it are reruns.
    let before = result.attempts.len().saturating_sub(1);
    for attempt in &result.attempts[..before] {
        let Verdict::Failed(why) = &attempt.verdict else { continue };
        let mut rerun = TestRerun::new(NonSuccessKind::Failure);
        rerun
            .set_message(&**why)
            .set_time(attempt.duration)
            .set_timestamp(DateTime::<Utc>::from(attempt.started));
        if let Some(reason) = reason(attempt) {
            rerun.set_type(reason);
        }
        rerun.set_system_out_lossy(&attempt.output);
        status.add_rerun(rerun);
    }
    status
}
