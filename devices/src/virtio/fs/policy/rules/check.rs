//! Finds rules that no file reaches, because those before leave nothing to them.

use super::conditions::{Choice, Conditions, Flags, Interval, Sets};
use super::parse::ParsedRule;
use super::paths::Glob;
use super::{Mistake, Problem};

/// Steps after which a rule counts as reachable. What is spent on one rule grows with the number of ways in which the
/// rules before it overlap, which nobody writes by hand in large numbers.
const PATIENCE: usize = 2_000;

/// # Errors
/// A mistake for each rule that can never match.
pub(super) fn reachable(text: &str, rules: &[ParsedRule]) -> Result<(), Vec<Mistake>> {
    let mut mistakes = Vec::new();
    for (number, rule) in rules.iter().enumerate() {
        // A rule with several globs is several rules in one; each must be out of reach.
        let globs = rule.paths.iter().map(Some).chain(rule.paths.is_empty().then_some(None));
        let mut in_the_way: Vec<&ParsedRule> = Vec::new();
        let covered = globs.into_iter().all(|glob| {
            let before = rules[..number].iter().filter(|before| takes_all_of(before, glob));
            let before: Vec<_> = before.filter(|before| Region::of(rule).restrict(before, |_| {})).collect();
            in_the_way.extend(&before);
            Region::of(rule).is_covered(&before, &mut PATIENCE.clone())
        });
        if covered {
            in_the_way.sort_by_key(|rule| rule.offset);
            in_the_way.dedup_by_key(|rule| rule.offset);
            let problem = Problem::Unreachable(named(&in_the_way));
            mistakes.push(Mistake::at(text, rule.offset, problem));
        }
    }
    if mistakes.is_empty() { Ok(()) } else { Err(mistakes) }
}

/// Whether a rule matches all paths that match the glob, or all paths if there is no glob. Where that is hard to say,
/// it is no.
fn takes_all_of(rule: &ParsedRule, glob: Option<&Glob>) -> bool {
    rule.paths.is_empty() || glob.is_some_and(|glob| rule.paths.iter().any(|wide| wide.covers(glob)))
}

/// The lines of the rules that are in the way, the first few of them.
fn named(rules: &[&ParsedRule]) -> String {
    const SHOWN: usize = 4;
    let lines: Vec<_> = rules.iter().take(SHOWN).map(|rule| rule.outcome.line.to_string()).collect();
    let more = if rules.len() > SHOWN { " and others" } else { "" };
    let (rules, leave) = if rules.len() == 1 { ("rule", "leaves") } else { ("rules", "leave") };
    format!("the {rules} of line {}{more} {leave}", lines.join(", "))
}

/// Files that are left for a rule: all that meet the conditions. Of paths nothing is said here.
#[derive(Clone)]
struct Region {
    conditions: Conditions,
}

impl Region {
    fn of(rule: &ParsedRule) -> Region {
        let mut conditions = rule.conditions.clone();
        conditions.free.max = conditions.free.max.min(100);
        Region { conditions }
    }

    /// Whether the rules match all of the region. Where that is hard to say, it is no.
    fn is_covered(&self, rules: &[&ParsedRule], patience: &mut usize) -> bool {
        let Some((first, rest)) = rules.split_first() else { return false };
        let Some(left) = patience.checked_sub(1) else { return false };
        *patience = left;
        let mut pieces = Vec::new();
        if !self.clone().restrict(first, |piece| pieces.push(piece)) {
            return self.is_covered(rest, patience);
        }
        pieces.iter().all(|piece| piece.is_covered(rest, patience))
    }

    /// Takes from the region all that `rule` does not match, in pieces that do not overlap. Whether anything is left.
    fn restrict(mut self, rule: &ParsedRule, mut take: impl FnMut(Region)) -> bool {
        let other = &rule.conditions;
        type Get = fn(&mut Conditions) -> &mut Interval;
        let intervals: [(Get, Interval); 3] =
            [(|c| &mut c.size, other.size), (|c| &mut c.age, other.age), (|c| &mut c.free, other.free)];
        for (get, bounds) in intervals {
            let mine = *get(&mut self.conditions);
            if !mine.overlaps(bounds) {
                return false;
            }
            let below = bounds.min.checked_sub(1).map(|max| Interval { min: mine.min, max });
            let above = bounds.max.checked_add(1).map(|min| Interval { min, max: mine.max });
            for rest in [below, above].into_iter().flatten().filter(|rest| !rest.is_empty()) {
                let mut piece = self.clone();
                *get(&mut piece.conditions) = rest;
                take(piece);
            }
            *get(&mut self.conditions) =
                Interval { min: mine.min.max(bounds.min), max: mine.max.min(bounds.max) };
        }
        self.restrict_flags(other.flags, &mut take)
            && other.sets.as_ref().is_none_or(|sets| self.restrict_sets(sets, &mut take))
    }

    fn restrict_flags(&mut self, flags: Flags, take: &mut impl FnMut(Region)) -> bool {
        for bit in (0..u8::BITS).map(|shift| 1 << shift).filter(|bit| flags.mask & bit != 0) {
            let wanted = flags.value & bit != 0;
            let mine = self.conditions.flags;
            if mine.mask & bit == 0 {
                let mut piece = self.clone();
                piece.conditions.flags.require(bit, !wanted);
                take(piece);
                self.conditions.flags.require(bit, wanted);
            } else if (mine.value & bit != 0) != wanted {
                return false;
            }
        }
        true
    }

    fn restrict_sets(&mut self, sets: &Sets, take: &mut impl FnMut(Region)) -> bool {
        self.restrict_choice(|sets| &mut sets.uid, sets.uid.as_ref(), take)
            && self.restrict_choice(|sets| &mut sets.gid, sets.gid.as_ref(), take)
            && sets.xattrs.iter().all(|(number, values)| self.restrict_xattr(*number, values, take))
    }

    fn sets(&mut self) -> &mut Sets {
        self.conditions.sets.get_or_insert_default()
    }

    fn restrict_choice<T: Ord + Clone>(
        &mut self,
        get: impl Fn(&mut Sets) -> &mut Option<Choice<T>>,
        wanted: Option<&Choice<T>>,
        take: &mut impl FnMut(Region),
    ) -> bool {
        let Some(wanted) = wanted else { return true };
        let mine = get(self.sets()).take().unwrap_or(Choice::Except(Vec::new()));
        let (inside, rest) = (mine.and(wanted), mine.and(&wanted.clone().not()));
        if !rest.is_empty() {
            let mut piece = self.clone();
            *get(piece.sets()) = Some(rest);
            take(piece);
        }
        let left = !inside.is_empty();
        *get(self.sets()) = Some(inside);
        left
    }

    fn restrict_xattr(
        &mut self,
        number: usize,
        wanted: &Choice<Option<Vec<u8>>>,
        take: &mut impl FnMut(Region),
    ) -> bool {
        let xattrs = &mut self.sets().xattrs;
        let at = xattrs.iter().position(|(known, _)| *known == number).unwrap_or_else(|| {
            xattrs.push((number, Choice::Except(Vec::new())));
            xattrs.len() - 1
        });
        let mine = self.sets().xattrs[at].1.clone();
        let (inside, rest) = (mine.and(wanted), mine.and(&wanted.clone().not()));
        if !rest.is_empty() {
            let mut piece = self.clone();
            piece.sets().xattrs[at].1 = rest;
            take(piece);
        }
        let left = !inside.is_empty();
        self.sets().xattrs[at].1 = inside;
        left
    }
}

impl<T: Ord + Clone> Choice<T> {
    /// Whether nothing is in it. All but some is never nothing: there are more users, groups and values than a rule
    /// file can list.
    fn is_empty(&self) -> bool {
        matches!(self, Choice::Only(values) if values.is_empty())
    }

    fn not(self) -> Choice<T> {
        match self {
            Choice::Only(values) => Choice::Except(values),
            Choice::Except(values) => Choice::Only(values),
        }
    }

    fn and(&self, other: &Choice<T>) -> Choice<T> {
        match (self, other) {
            (Choice::Only(values), set) | (set, Choice::Only(values)) => {
                Choice::Only(values.iter().filter(|value| set.contains(value)).cloned().collect())
            }
            (Choice::Except(a), Choice::Except(b)) => {
                let mut values: Vec<T> = a.iter().chain(b).cloned().collect();
                values.sort();
                values.dedup();
                Choice::Except(values)
            }
        }
    }
}
