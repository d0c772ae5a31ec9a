//! Rule files: ordered rules of which the first that matches decides.
//!
//! [`parse`] reads the TOML, [`check`] finds rules that no file reaches, [`conditions`] and [`paths`] match, and
//! [`index`] spares most of the matching.

mod check;
mod conditions;
mod describe;
mod error;
mod index;
mod parse;
mod paths;

use std::path::Path;

use self::conditions::{Conditions, Probe};
pub use self::error::{Mistake, Problem, RuleFileError};
use self::index::PathIndex;
use super::{DecidedBy, Decision, FileFacts, Needs, Policy, Prefault, decision};

/// The rules of a rule file, ready to decide.
#[derive(Debug)]
pub struct Rules {
    name: String,
    text: String,
    needs: Needs,
    enforce: bool,
    index: PathIndex,
    /// The conditions of each rule; kept together, since a decision looks at many of them.
    conditions: Vec<Conditions>,
    outcomes: Vec<Outcome>,
    default: Policy,
}

/// What a rule is called, and what it does with the files that it matches.
#[derive(Debug)]
struct Outcome {
    name: Option<String>,
    line: usize,
    action: Policy,
    /// What it says about the pages of the files that it allows.
    prefault: Option<Prefault>,
    /// The globs as they are written.
    paths: Vec<String>,
    /// The rule speaks of set-id files, so what it allows it allows them too.
    trusts_set_id: bool,
}

impl Policy {
    /// Understands the text of a rule file; `name` is what messages call it.
    ///
    /// # Errors
    /// All mistakes, with line and column.
    pub fn from_rules(name: &str, text: &str) -> Result<Policy, RuleFileError> {
        match Rules::new(name, text) {
            Ok(rules) => Ok(Policy::Rules(rules.into())),
            Err(mistakes) => Err(RuleFileError::Mistakes { name: name.to_owned(), mistakes }),
        }
    }

    /// Reads a rule file.
    ///
    /// # Errors
    /// The file cannot be read, or has mistakes.
    pub fn load(path: &Path) -> Result<Policy, RuleFileError> {
        let unreadable = |source| RuleFileError::Read { path: path.into(), source };
        let text = std::fs::read_to_string(path).map_err(unreadable)?;
        Policy::from_rules(&path.display().to_string(), &text)
    }
}

/// Two are equal when they were read from the same text under the same name.
impl PartialEq for Rules {
    fn eq(&self, other: &Rules) -> bool {
        (&self.name, &self.text) == (&other.name, &other.text)
    }
}

impl Eq for Rules {}

impl Rules {
    fn new(name: &str, text: &str) -> Result<Rules, Vec<Mistake>> {
        let document = parse::parse(text)?;
        check::reachable(text, &document.rules)?;
        let mut rules = Rules {
            name: name.to_owned(),
            text: text.to_owned(),
            needs: document.needs,
            enforce: document.enforce,
            index: PathIndex::new(&document.rules),
            conditions: Vec::with_capacity(document.rules.len()),
            outcomes: Vec::with_capacity(document.rules.len()),
            default: document.default,
        };
        for rule in document.rules {
            rules.conditions.push(rule.conditions);
            rules.outcomes.push(rule.outcome);
        }
        Ok(rules)
    }

    /// What the file is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The number of rules, the default not counted.
    pub fn len(&self) -> usize {
        self.outcomes.len()
    }

    /// Whether there is nothing but the default.
    pub fn is_empty(&self) -> bool {
        self.outcomes.is_empty()
    }

    /// Whether clients that take all files for DAX may not map those that the rules deny.
    pub fn enforced(&self) -> bool {
        self.enforce
    }

    pub(super) fn needs(&self) -> &Needs {
        &self.needs
    }

    pub(super) fn may_grant(&self) -> bool {
        let mut actions = self.outcomes.iter().map(|outcome| &outcome.action).chain([&self.default]);
        actions.any(Policy::may_grant)
    }

    pub(super) fn may_prefault(&self, default: Prefault) -> bool {
        self.deciders()
            .any(|by| self.action(by).may_grant() && self.prefault(by).unwrap_or(default) != Prefault::Never)
    }

    /// All that can decide: the rules in order, and the default.
    pub fn deciders(&self) -> impl Iterator<Item = DecidedBy> {
        (0..self.outcomes.len()).map(|number| DecidedBy::Rule(number as u32)).chain([DecidedBy::Default])
    }

    /// What a rule does, as one of the policies that are no rule files: `allow` is [`Policy::Always`], `deny` is
    /// [`Policy::Never`].
    pub fn action(&self, by: DecidedBy) -> &Policy {
        self.outcome(by).map_or(&self.default, |outcome| &outcome.action)
    }

    /// Which pages of the files that a rule makes DAX are put in the guest's reach; `None` where it is as for the whole
    /// share.
    pub fn prefault(&self, by: DecidedBy) -> Option<Prefault> {
        self.outcome(by).and_then(|outcome| outcome.prefault)
    }

    fn outcome(&self, by: DecidedBy) -> Option<&Outcome> {
        match by {
            DecidedBy::Rule(number) => self.outcomes.get(number as usize),
            DecidedBy::Policy | DecidedBy::Default => None,
        }
    }

    pub(super) fn decide(&self, facts: &FileFacts<'_>, current: Option<bool>) -> Decision {
        let exact = Probe::exact(facts);
        let rule = self.first(&exact);
        let decided = self.carry_out(rule, facts, current);
        match current {
            Some(current) if current != decided.dax => self.keep(facts, current).unwrap_or(decided),
            _ => decided,
        }
    }

    /// The decision that keeps what the file is, if the file is near enough to facts under which a rule would say so.
    fn keep(&self, facts: &FileFacts<'_>, current: bool) -> Option<Decision> {
        const NONE: u32 = u32::MAX;
        let near = Probe::near(facts);
        let path = facts.path;
        let carry_out = |rule| self.carry_out(rule, facts, Some(current));
        // The first rule that can match something near and agrees, and the first that matches all that is near: no rule
        // behind that one has a say.
        let (mut agreeing, mut last) = (NONE, NONE);
        for bucket in self.index.buckets(path) {
            for entry in bucket {
                if entry.rule > agreeing.min(last) {
                    break;
                }
                let conditions = &self.conditions[entry.rule as usize];
                if !near.passes(entry.size, entry.flags) || !conditions.can_hold(&near) {
                    continue;
                }
                let agrees = entry.rule < agreeing && carry_out(Some(entry.rule)).dax == current;
                let is_last = entry.rule < last && conditions.must_hold(&near);
                if (agrees || is_last) && entry.matches(path) {
                    agreeing = if agrees { entry.rule } else { agreeing };
                    last = if is_last { entry.rule } else { last };
                }
            }
        }
        let rule = (agreeing != NONE && agreeing <= last).then_some(agreeing);
        let mut decision = (rule.is_some() || last == NONE).then(|| carry_out(rule))?;
        decision.reason.kept = true;
        (decision.dax == current).then_some(decision)
    }

    /// The first rule that can match the probe.
    fn first(&self, probe: &Probe<'_>) -> Option<u32> {
        let path = probe.facts.path;
        let mut first = u32::MAX;
        for bucket in self.index.buckets(path) {
            for entry in bucket {
                if entry.rule >= first {
                    break;
                }
                let conditions = &self.conditions[entry.rule as usize];
                if probe.passes(entry.size, entry.flags) && conditions.can_hold(probe) && entry.matches(path)
                {
                    first = entry.rule;
                }
            }
        }
        (first != u32::MAX).then_some(first)
    }

    fn carry_out(&self, rule: Option<u32>, facts: &FileFacts<'_>, current: Option<bool>) -> Decision {
        let by = rule.map_or(DecidedBy::Default, DecidedBy::Rule);
        let trusted = self.outcome(by).is_some_and(|outcome| outcome.trusts_set_id);
        let decided = decision(by, self.action(by).judge(facts, current, trusted));
        Decision { prefault: self.prefault(by), ..decided }
    }
}
