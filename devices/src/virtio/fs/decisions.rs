//! What the policy decided, by rule and by reason.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::{Deserialize, Serialize};

use super::policy::{DecidedBy, Decision, Fact, Policy};

/// How often the policy was asked about a file and decided for one reason. It is asked when the guest gets to know a file,
/// and again at each open of a file that nobody in the guest has open.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct DecisionCount {
    /// What decided: a rule's name, `rule N` (from 1) for one without, `default`, or the policy where there are no rules.
    pub rule: String,
    /// What the decision hangs on; [`Fact::name`].
    pub reason: String,
    /// Whether it was for DAX.
    pub dax: bool,
    /// How often.
    pub count: u64,
}

/// The living counters: one for each rule, reason and outcome, so that all memory is there from the start.
pub(super) struct DecisionCounts {
    policy: Policy,
    deciders: Vec<DecidedBy>,
    counts: Box<[Outcomes]>,
}

/// By reason, and by outcome.
type Outcomes = [[AtomicU64; 2]; Fact::ALL.len()];

impl DecisionCounts {
    pub(super) fn new(policy: Policy) -> DecisionCounts {
        // What is no regular file is denied before any rule is asked.
        let mut deciders = vec![DecidedBy::Policy];
        if let Policy::Rules(rules) = &policy {
            deciders.extend(rules.deciders());
        }
        let zeros = || [const { [const { AtomicU64::new(0) }; 2] }; Fact::ALL.len()];
        let counts = deciders.iter().map(|_| zeros()).collect();
        DecisionCounts { policy, deciders, counts }
    }

    pub(super) fn add(&self, decision: &Decision) {
        let index = match decision.reason.by {
            DecidedBy::Policy => 0,
            DecidedBy::Rule(number) => 1 + number as usize,
            DecidedBy::Default => self.counts.len() - 1,
        };
        if let Some(outcomes) = self.counts.get(index) {
            outcomes[decision.reason.fact as usize][usize::from(decision.dax)].fetch_add(1, Relaxed);
        }
    }

    /// Those that were made, in the order of the rules.
    pub(super) fn snapshot(&self) -> Vec<DecisionCount> {
        let mut made = Vec::new();
        for (by, outcomes) in self.deciders.iter().zip(&self.counts) {
            for (fact, counts) in Fact::ALL.into_iter().zip(outcomes) {
                for (dax, count) in [(true, &counts[1]), (false, &counts[0])] {
                    let count = count.load(Relaxed);
                    if count > 0 {
                        made.push(DecisionCount {
                            rule: self.name(*by),
                            reason: fact.name().to_owned(),
                            dax,
                            count,
                        });
                    }
                }
            }
        }
        made
    }

    fn name(&self, by: DecidedBy) -> String {
        let name = match &self.policy {
            Policy::Rules(rules) => rules.rule_name(by),
            _ => None,
        };
        match (name, by) {
            (Some(name), _) => name.to_owned(),
            (None, DecidedBy::Policy) => self.policy.to_string(),
            (None, DecidedBy::Rule(number)) => format!("rule {}", number + 1),
            (None, DecidedBy::Default) => "default".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::fs::policy::FileFacts;

    const RULES: &str = r#"
version = 1
default = "deny"
[[rule]]
name = "programs"
executable = true
dax = "allow"
[[rule]]
path = "*.img"
dax = "size:1M"
"#;

    fn count(rule: &str, reason: &str, dax: bool, count: u64) -> DecisionCount {
        DecisionCount { rule: rule.into(), reason: reason.into(), dax, count }
    }

    #[test]
    fn each_rule_has_its_counts() {
        let policy = Policy::from_rules("r.toml", RULES).unwrap();
        let counts = DecisionCounts::new(policy.clone());
        let regular = FileFacts { mode: libc::S_IFREG | 0o644, ..FileFacts::default() };
        let program = FileFacts { mode: libc::S_IFREG | 0o755, ..regular };
        let image = FileFacts { path: b"a.img", ..regular };
        let large = FileFacts { size: 2 << 20, ..image };
        let directory = FileFacts { mode: libc::S_IFDIR, ..regular };
        for facts in [&program, &program, &image, &large, &regular, &directory] {
            counts.add(&policy.decide(facts, None));
        }
        let made = counts.snapshot();
        assert_eq!(
            made,
            [
                count("r.toml", "not-regular", false, 1),
                count("programs", "all", true, 2),
                count("rule 2", "size", true, 1),
                count("rule 2", "size", false, 1),
                count("default", "all", false, 1),
            ]
        );
    }

    #[test]
    fn a_policy_without_rules_counts_by_its_name() {
        let counts = DecisionCounts::new(Policy::Auto);
        let small = FileFacts { mode: libc::S_IFREG, size: 10, ..FileFacts::default() };
        counts.add(&Policy::Auto.decide(&small, None));
        assert_eq!(counts.snapshot(), [count("auto", "cost", false, 1)]);
    }
}
