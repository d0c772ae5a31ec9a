//! What a policy decided and why, cheap enough for each look-up, and how it is told to people.

use std::fmt;

use super::cost::{CHUNK_COST, Cost};
use super::{FileFacts, Policy, Prefault};
use crate::text::Bytes;

/// Whether a file is DAX, and why.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Decision {
    /// Whether the guest is to access the file's pages through the window.
    pub dax: bool,
    /// Which of its pages are put in the guest's reach, if a rule says so; else it is as for the whole share.
    pub prefault: Option<Prefault>,
    /// What decided it; [`Policy::explain`] puts it in words.
    pub reason: Reason,
}

/// What decided.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Reason {
    /// Whose decision it is.
    pub by: DecidedBy,
    /// What it hangs on.
    pub fact: Fact,
    /// Whether the file keeps what it had, although it is past a threshold, because it is not clearly past it.
    pub kept: bool,
}

/// Whose decision it is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum DecidedBy {
    /// The share's policy as a whole.
    Policy,
    /// A rule of a rule file, counted from 0.
    Rule(u32),
    /// The default of a rule file.
    Default,
}

/// What a decision hangs on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fact {
    /// Only regular files have pages to map.
    NotRegular,
    /// A write to a set-id file must take the bit away, and the device sees no write that goes through the window.
    SetId,
    /// The same for a file's capabilities.
    Capabilities,
    /// Nothing: all files are treated alike.
    Alike,
    /// The persistent flag, set or not.
    Hint,
    /// The size.
    Size,
    /// What the file costs the guest's memory.
    Cost,
    /// What the window has room for.
    Window,
    /// What profits least has to wait while the window thrashes.
    Thrash,
}

impl Fact {
    /// All of them, in the order of their declaration.
    pub const ALL: [Fact; 9] = [
        Fact::NotRegular,
        Fact::SetId,
        Fact::Capabilities,
        Fact::Alike,
        Fact::Hint,
        Fact::Size,
        Fact::Cost,
        Fact::Window,
        Fact::Thrash,
    ];

    /// One word for counters: `not-regular`, `set-id`, `capabilities`, `all` (the rule treats all files alike), `hint`,
    /// `size`, `cost`, `window`, `thrash`.
    pub fn name(self) -> &'static str {
        match self {
            Fact::NotRegular => "not-regular",
            Fact::SetId => "set-id",
            Fact::Capabilities => "capabilities",
            Fact::Alike => "all",
            Fact::Hint => "hint",
            Fact::Size => "size",
            Fact::Cost => "cost",
            Fact::Window => "window",
            Fact::Thrash => "thrash",
        }
    }
}

/// A decision in words.
pub struct Explanation<'a> {
    pub(super) policy: &'a Policy,
    pub(super) decision: Decision,
    pub(super) facts: &'a FileFacts<'a>,
}

impl fmt::Display for Explanation<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Decision { dax, reason, .. } = self.decision;
        let mut acting = self.policy;
        if let Policy::Rules(rules) = self.policy {
            acting = rules.action(reason.by);
            write!(f, "{}: ", rules.describe(reason.by))?;
        }
        let FileFacts { size, window, .. } = *self.facts;
        let Cost { chunks, descriptors, page_cache } = Cost::of(size);
        match reason.fact {
            Fact::NotRegular => f.write_str("not a regular file")?,
            Fact::SetId => f.write_str("set-id: a store through the window would not take the bit away")?,
            Fact::Capabilities => {
                f.write_str("has capabilities: a store through the window would not take them away")?;
            }
            Fact::Alike => f.write_str(if dax { "allows every file" } else { "denies every file" })?,
            Fact::Hint => write!(f, "the hint FS_XFLAG_DAX is {}set", if dax { "" } else { "not " })?,
            Fact::Size => {
                let threshold = if let Policy::Size(bytes) = acting { *bytes } else { 0 };
                let at_least = if size >= threshold { "at least" } else { "below" };
                write!(f, "{} is {at_least} {}", Bytes(size), Bytes(threshold))?;
            }
            Fact::Cost | Fact::Window if dax => {
                write!(
                    f,
                    "{} of descriptors against {} of page cache",
                    Bytes(descriptors),
                    Bytes(page_cache)
                )?;
            }
            Fact::Cost => {
                let descriptors = descriptors.max(CHUNK_COST);
                write!(f, "{} of page cache, no more than", Bytes(page_cache))?;
                write!(f, " {} of descriptors", Bytes(descriptors))?;
            }
            Fact::Window => {
                write!(f, "needs {chunks} of {} usable chunks", window.usable())?;
                if window.promised > 0 {
                    write!(f, ", {} of which are promised", window.promised)?;
                }
            }
            Fact::Thrash => {
                write!(f, "the window thrashes at level {}, others profit more", window.thrash)?;
            }
        }
        if reason.kept {
            f.write_str(" (kept: not clearly past a threshold)")?;
        }
        Ok(())
    }
}
