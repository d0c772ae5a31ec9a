//! How cases end, and the lines by which scripts say so.

use std::collections::BTreeMap;

/// How a case ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// As it should.
    Passed,
    /// Otherwise: what it said.
    Failed(String),
    /// It could not run where it was: why.
    Skipped(String),
}

/// The cases of a run, by name.
pub type Outcomes = BTreeMap<String, Outcome>;

/// A function for scripts: `run NAME COMMAND...` runs a case, and marks its end with its name and status. [`cases`] reads it.
pub const RUN: &str = "run() { name=$1; shift; \"$@\" 2>&1; printf '\\n@case %s %s\\n' \"$name\" $?; }\n";

const MARK: &str = "@case ";

/// A case as the script marked it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its exit status.
    pub status: i32,
    /// What it printed.
    pub output: &'a str,
}

/// The cases that a script ran with [`RUN`], in order. What follows the last mark was never finished, and is left out.
pub fn cases(output: &str) -> Vec<Case<'_>> {
    let mut cases = Vec::new();
    let mut begin = 0;
    let mut at = 0;
    for line in output.split_inclusive('\n') {
        let mark = line.strip_prefix(MARK).filter(|_| line.ends_with('\n'));
        let case = mark.and_then(|mark| mark.trim_end().rsplit_once(' '));
        if let Some((name, status)) = case
            && let Ok(status) = status.parse()
        {
            cases.push(Case { name, status, output: output[begin..at].trim_end() });
            begin = at + line.len();
        }
        at += line.len();
    }
    cases
}

/// Cases that pass when their status is 0.
pub fn by_status(output: &str) -> Outcomes {
    let outcome = |case: &Case<'_>| match case.status {
        0 => Outcome::Passed,
        status => Outcome::Failed(format!("status {status}: {}", tail(case.output))),
    };
    cases(output).iter().map(|case| (case.name.to_owned(), outcome(case))).collect()
}

/// The end of an output: enough to see what happened.
pub fn tail(output: &str) -> String {
    const LINES: usize = 12;
    let lines: Vec<_> = output.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_are_told_apart_by_their_marks() {
        let output = "before\n\n@case one 0\n@case of no status\nno newline\n\n@case two words 7\nunfinished\n@case three";
        let expected = [
            Case { name: "one", status: 0, output: "before" },
            Case { name: "two words", status: 7, output: "@case of no status\nno newline" },
        ];
        assert_eq!(cases(output), expected);
        let outcomes = by_status(output);
        assert_eq!(outcomes["one"], Outcome::Passed);
        assert_eq!(outcomes["two words"], Outcome::Failed("status 7: @case of no status\nno newline".into()));
    }

    #[test]
    fn a_shell_marks_cases_so_that_they_are_read() {
        let script = format!("{RUN}run good printf 'no newline'; run bad sh -c 'echo why >&2; exit 3'");
        let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
        let output = String::from_utf8(output.stdout).unwrap();
        let expected = [
            Case { name: "good", status: 0, output: "no newline" },
            Case { name: "bad", status: 3, output: "why" },
        ];
        assert_eq!(cases(&output), expected);
    }
}
