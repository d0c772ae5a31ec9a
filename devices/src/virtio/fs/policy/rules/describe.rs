//! Rules in words, for messages and for `daxvm policy check`.

use super::super::DecidedBy;
use super::conditions::{Choice, Conditions, Flags, Interval};
use super::{Outcome, Rules};
use crate::text::Bytes;

impl Rules {
    /// A rule's name, if it has one.
    pub fn rule_name(&self, by: DecidedBy) -> Option<&str> {
        self.outcome(by).and_then(|outcome| outcome.name.as_deref())
    }

    /// The line in which a rule begins, from 1; none for the default.
    pub fn line(&self, by: DecidedBy) -> Option<usize> {
        self.outcome(by).map(|outcome| outcome.line)
    }

    /// A rule's name and line, in words.
    pub fn describe(&self, by: DecidedBy) -> String {
        match (self.outcome(by), by) {
            (Some(Outcome { name: Some(name), line, .. }), _) => format!("rule `{name}` (line {line})"),
            (Some(Outcome { line, .. }), DecidedBy::Rule(number)) => {
                format!("rule {} (line {line})", number + 1)
            }
            _ => "default".into(),
        }
    }

    /// What a rule asks of a file, in words; empty where it asks nothing.
    pub fn conditions(&self, by: DecidedBy) -> String {
        let DecidedBy::Rule(number) = by else { return String::new() };
        let Some(conditions) = self.conditions.get(number as usize) else { return String::new() };
        let Conditions { size, age, free, flags, sets } = conditions;
        let mut words = Vec::new();
        if let Some(paths) = self.outcome(by).map(|outcome| outcome.paths.join(" or ")) {
            words.extend(Some(paths).filter(|paths| !paths.is_empty()).map(|paths| format!("path {paths}")));
        }
        words.extend(bounds("size", *size, |bytes| Bytes(bytes).to_string()));
        words.extend(bounds("age", *age, |seconds| format!("{seconds} s")));
        words.extend(bounds("window free", *free, |percent| format!("{percent} %")));
        for (bit, yes, no) in [
            (Flags::EXECUTABLE, "executable", "not executable"),
            (Flags::SET_ID, "set-id", "not set-id"),
            (Flags::HINT, "hint set", "hint not set"),
            (Flags::CAPABILITIES, "capabilities", "no capabilities"),
            (Flags::READ_ONLY, "share read-only", "share writable"),
        ] {
            if flags.mask & bit != 0 {
                words.push(if flags.value & bit != 0 { yes } else { no }.to_owned());
            }
        }
        if let Some(sets) = sets {
            let ids = [("uid", &sets.uid), ("gid", &sets.gid)];
            for (name, ids) in ids.into_iter().filter_map(|(name, ids)| Some((name, ids.as_ref()?))) {
                if let Choice::Only(ids) = ids {
                    let ids: Vec<_> = ids.iter().map(u32::to_string).collect();
                    words.push(format!("{name} {}", ids.join(" or ")));
                }
            }
            for (number, values) in &sets.xattrs {
                let name = self.needs.xattrs[*number].to_string_lossy();
                words.push(match values {
                    Choice::Except(_) => format!("has {name}"),
                    Choice::Only(values) => match values.first() {
                        Some(Some(value)) => format!("{name} = {:?}", String::from_utf8_lossy(value)),
                        _ => format!("no {name}"),
                    },
                });
            }
        }
        words.join(", ")
    }
}

fn bounds(name: &str, Interval { min, max }: Interval, show: impl Fn(u64) -> String) -> Option<String> {
    match (min, max) {
        (0, u64::MAX) => None,
        (0, _) => Some(format!("{name} at most {}", show(max))),
        (_, u64::MAX) => Some(format!("{name} at least {}", show(min))),
        _ => Some(format!("{name} {} to {}", show(min), show(max))),
    }
}
