//! The conditions of a rule, and whether a file meets them.

use super::super::{FREE_BAND, FileFacts, is_set_id, size_before_shrinking};

/// Whole numbers from `min` to `max`, both included.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Interval {
    pub(super) min: u64,
    pub(super) max: u64,
}

impl Interval {
    pub(super) const ALL: Interval = Interval { min: 0, max: u64::MAX };

    pub(super) fn is_empty(self) -> bool {
        self.min > self.max
    }

    pub(super) fn overlaps(self, other: Interval) -> bool {
        self.min <= other.max && other.min <= self.max
    }

    pub(super) fn covers(self, other: Interval) -> bool {
        self.min <= other.min && other.max <= self.max
    }
}

/// A set of values: only these, or all but these. The values are sorted.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Choice<T> {
    Only(Vec<T>),
    Except(Vec<T>),
}

impl<T: Ord> Choice<T> {
    pub(super) fn contains(&self, value: &T) -> bool {
        match self {
            Choice::Only(values) => values.binary_search(value).is_ok(),
            Choice::Except(values) => values.binary_search(value).is_err(),
        }
    }
}

/// Facts that are true or false, a bit each.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Flags {
    /// The bits that a rule asks about.
    pub(super) mask: u8,
    /// What they must be.
    pub(super) value: u8,
}

impl Flags {
    pub(super) const EXECUTABLE: u8 = 1;
    pub(super) const SET_ID: u8 = 2;
    pub(super) const HINT: u8 = 4;
    pub(super) const CAPABILITIES: u8 = 8;
    pub(super) const READ_ONLY: u8 = 16;

    pub(super) fn require(&mut self, bit: u8, set: bool) {
        self.mask |= bit;
        self.value |= if set { bit } else { 0 };
    }

    fn of(facts: &FileFacts<'_>) -> u8 {
        let bit = |bit, set| if set { bit } else { 0 };
        bit(Flags::EXECUTABLE, facts.mode & 0o111 != 0)
            | bit(Flags::SET_ID, is_set_id(facts.mode))
            | bit(Flags::HINT, facts.hint)
            | bit(Flags::CAPABILITIES, facts.capabilities)
            | bit(Flags::READ_ONLY, facts.read_only)
    }
}

/// The conditions of a rule, the path apart. All must be met.
#[derive(Clone, Debug)]
pub(super) struct Conditions {
    /// Bytes.
    pub(super) size: Interval,
    /// Seconds.
    pub(super) age: Interval,
    /// The free part of the window, in percent.
    pub(super) free: Interval,
    pub(super) flags: Flags,
    /// Apart, since few rules have them.
    pub(super) sets: Option<Box<Sets>>,
}

/// Conditions that name values.
#[derive(Clone, Debug, Default)]
pub(super) struct Sets {
    pub(super) uid: Option<Choice<u32>>,
    pub(super) gid: Option<Choice<u32>>,
    /// Extended attributes by their number in `Needs::xattrs`; `None` is the value of one that a file has not.
    pub(super) xattrs: Vec<(usize, Choice<Option<Vec<u8>>>)>,
}

impl Default for Conditions {
    fn default() -> Conditions {
        Conditions {
            size: Interval::ALL,
            age: Interval::ALL,
            free: Interval::ALL,
            flags: Flags::default(),
            sets: None,
        }
    }
}

impl Conditions {
    /// Whether they hold somewhere in the probe's ranges.
    pub(super) fn can_hold(&self, probe: &Probe<'_>) -> bool {
        probe.passes(self.size, self.flags)
            && self.free.overlaps(probe.free)
            && self.age.overlaps(probe.age)
            && self.sets.as_ref().is_none_or(|sets| sets.hold(probe.facts))
    }

    /// Whether they hold everywhere in the probe's ranges.
    pub(super) fn must_hold(&self, probe: &Probe<'_>) -> bool {
        self.size.covers(probe.size) && self.free.covers(probe.free) && self.can_hold(probe)
    }
}

impl Sets {
    fn hold(&self, facts: &FileFacts<'_>) -> bool {
        static ABSENT: Option<Vec<u8>> = None;
        self.uid.as_ref().is_none_or(|uid| uid.contains(&facts.uid))
            && self.gid.as_ref().is_none_or(|gid| gid.contains(&facts.gid))
            && self
                .xattrs
                .iter()
                .all(|(number, values)| values.contains(facts.xattrs.get(*number).unwrap_or(&ABSENT)))
    }
}

/// A file's facts, with ranges in place of the numbers that have thresholds with a band.
pub(super) struct Probe<'a> {
    pub(super) facts: &'a FileFacts<'a>,
    flags: u8,
    size: Interval,
    age: Interval,
    free: Interval,
}

impl<'a> Probe<'a> {
    /// The facts as they are.
    pub(super) fn exact(facts: &'a FileFacts<'a>) -> Probe<'a> {
        let point = |at| Interval { min: at, max: at };
        Probe {
            facts,
            flags: Flags::of(facts),
            size: point(facts.size),
            age: point(facts.age.as_secs()),
            free: point(facts.window.free_percent()),
        }
    }

    /// Whether the size can be in the bounds and the flags are as wanted. Most rules fail here. There is no short cut,
    /// as the processor would guess the branch wrong at times, which costs more than to look at all.
    pub(super) fn passes(&self, size: Interval, flags: Flags) -> bool {
        size.overlaps(self.size) & (self.flags & flags.mask == flags.value)
    }

    /// The facts, and those that are so near that a file which had them is not clearly past a threshold now.
    ///
    /// Time has no band: it runs in one direction, and only a write turns it back.
    pub(super) fn near(facts: &'a FileFacts<'a>) -> Probe<'a> {
        let free = facts.window.free_percent();
        Probe {
            size: Interval { min: facts.size, max: size_before_shrinking(facts.size) },
            free: Interval { min: free.saturating_sub(FREE_BAND), max: (free + FREE_BAND).min(100) },
            ..Probe::exact(facts)
        }
    }
}
