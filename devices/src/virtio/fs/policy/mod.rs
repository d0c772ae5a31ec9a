//! Which files a share offers through its DAX window: facts about a file in, a decision with its reason out.
//!
//! The policy is a pure function. It knows neither descriptors nor inode numbers, asks nobody, and gives the same
//! answer to the same question. docs/per-file-dax.md is its manual.

mod cost;
mod facts;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod prefault;
mod reason;
mod rules;
#[cfg(test)]
mod tests;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

pub use self::cost::{BREAK_EVEN, CHUNK_COST, Cost, MAX_THRASH_LEVEL};
use self::cost::{FREE_BAND, size_before_shrinking};
pub use self::facts::{FileFacts, Needs, WindowFacts};
pub use self::prefault::{Prefault, UnknownPrefault};
pub use self::reason::{DecidedBy, Decision, Explanation, Fact, Reason};
pub use self::rules::{Mistake, Problem, RuleFileError, Rules};
use crate::text::{exact_size, parse_size, unknown};

/// A share's policy. All but [`Policy::Rules`] and [`Policy::Never`] leave set-id files out, see [`Fact::SetId`].
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum Policy {
    /// No file is DAX.
    Never,
    /// Every regular file is.
    #[default]
    Always,
    /// The files whose persistent flag (FS_XFLAG_DAX) is set are.
    Inode,
    /// The files of at least so many bytes are, but for some while the window thrashes.
    Size(u64),
    /// The files are whose page descriptors cost the guest less memory than their page cache would, that have no
    /// capabilities, and for which the window has room; fewer while it thrashes.
    Auto,
    /// A rule file decides.
    Rules(Arc<Rules>),
}

/// The needs of the policies that are not rule files.
static NOTHING: Needs = Needs { path: false, hint: false, capabilities: false, xattrs: Vec::new() };
static HINT: Needs = Needs { path: false, hint: true, capabilities: false, xattrs: Vec::new() };
static CAPABILITIES: Needs = Needs { path: false, hint: false, capabilities: true, xattrs: Vec::new() };

impl Policy {
    /// The facts that the policy asks for beside those of stat(2).
    pub fn needs(&self) -> &Needs {
        match self {
            Policy::Never | Policy::Always | Policy::Size(_) => &NOTHING,
            Policy::Inode => &HINT,
            Policy::Auto => &CAPABILITIES,
            Policy::Rules(rules) => rules.needs(),
        }
    }

    /// Decides about one file. `current` is what the guest now takes the file for, if it knows the file: a policy with
    /// thresholds keeps to it until the file is clearly on the other side. Without it the thresholds are taken as they
    /// stand. Nothing is allocated.
    pub fn decide(&self, facts: &FileFacts<'_>, current: Option<bool>) -> Decision {
        match self {
            _ if facts.mode & libc::S_IFMT != libc::S_IFREG => {
                decision(DecidedBy::Policy, (false, Fact::NotRegular, false))
            }
            Policy::Rules(rules) => rules.decide(facts, current),
            _ => decision(DecidedBy::Policy, self.judge(facts, current, false)),
        }
    }

    /// What a policy other than a rule file says of a regular file: whether it is DAX, why, and whether that is only
    /// so because it was. `trusted` lets set-id files through.
    fn judge(&self, facts: &FileFacts<'_>, current: Option<bool>, trusted: bool) -> (bool, Fact, bool) {
        let was_dax = current == Some(true);
        let at_least = |test: &dyn Fn(u64) -> bool| {
            let now = test(facts.size);
            let kept = !now && was_dax && test(size_before_shrinking(facts.size));
            (now || kept, kept)
        };
        match self {
            Policy::Never => (false, Fact::Alike, false),
            _ if !trusted && is_set_id(facts.mode) => (false, Fact::SetId, false),
            Policy::Always | Policy::Rules(_) => (true, Fact::Alike, false),
            Policy::Inode => (facts.hint, Fact::Hint, false),
            Policy::Size(bytes) => {
                let (dax, kept) = at_least(&|size| size >= *bytes);
                match dax && !facts.window.is_worth(facts.size, was_dax) {
                    true => (false, Fact::Thrash, false),
                    false => (dax, Fact::Size, kept),
                }
            }
            Policy::Auto if facts.capabilities => (false, Fact::Capabilities, false),
            Policy::Auto => {
                let (pays, kept) = at_least(&|size| Cost::of(size).pays());
                let chunks = facts.window.promised.saturating_add(Cost::of(facts.size).chunks);
                match chunks {
                    _ if !pays => (false, Fact::Cost, false),
                    _ if !facts.window.is_worth(facts.size, was_dax) => (false, Fact::Thrash, false),
                    _ if chunks <= facts.window.usable() => (true, Fact::Cost, kept),
                    // Files that grow make the promises exceed what is usable. To take all of them back at once would
                    // help nobody; so they hold for as long as the window could carry them at all.
                    _ if was_dax && chunks <= facts.window.chunks => (true, Fact::Window, true),
                    _ => (false, Fact::Window, false),
                }
            }
        }
    }

    /// Whether a client may map a file that it takes for DAX whatever its attributes say: `dax=always` mounts do not
    /// ask.
    ///
    /// `never` forbids it, and so does a rule file with `enforce = true` for the files that it denies. All other
    /// policies are about what is worth its memory, and a file that its client maps but may not is one that nobody
    /// there can read.
    pub fn allows_mapping(&self, facts: &FileFacts<'_>) -> bool {
        let regular = facts.mode & libc::S_IFMT == libc::S_IFREG;
        match self {
            Policy::Never => false,
            Policy::Rules(rules) if rules.enforced() => self.decide(facts, None).dax,
            _ => regular,
        }
    }

    /// Whether any file could be DAX, so that a window is of use.
    pub fn may_grant(&self) -> bool {
        match self {
            Policy::Never => false,
            Policy::Rules(rules) => rules.may_grant(),
            _ => true,
        }
    }

    /// Whether pages of any file could be put in the guest's reach as it maps them; `default` holds where no rule says it.
    pub fn may_prefault(&self, default: Prefault) -> bool {
        match self {
            Policy::Rules(rules) => rules.may_prefault(default),
            _ => self.may_grant() && default != Prefault::Never,
        }
    }

    /// A decision of this policy, about the file of these facts, in words.
    pub fn explain<'a>(&'a self, decision: &Decision, facts: &'a FileFacts<'a>) -> Explanation<'a> {
        Explanation { policy: self, decision: *decision, facts }
    }
}

fn decision(by: DecidedBy, (dax, fact, kept): (bool, Fact, bool)) -> Decision {
    Decision { dax, prefault: None, reason: Reason { by, fact, kept } }
}

/// Whether a file of this mode runs with its owner's or its group's rights, which a write takes away.
pub(super) fn is_set_id(mode: u32) -> bool {
    let set_gid = libc::S_ISGID | libc::S_IXGRP;
    mode & libc::S_IFMT == libc::S_IFREG && (mode & libc::S_ISUID != 0 || mode & set_gid == set_gid)
}

/// The mode of a set-id file after a write; set-group-ID without the group's execute bit means something else.
pub(super) fn without_set_id(mode: u32) -> u32 {
    let set_gid = if mode & libc::S_IXGRP != 0 { libc::S_ISGID } else { 0 };
    mode & !(libc::S_ISUID | set_gid)
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Policy::Never => f.pad("never"),
            Policy::Always => f.pad("always"),
            Policy::Inode => f.pad("inode"),
            Policy::Size(BREAK_EVEN) => f.pad("size"),
            Policy::Size(bytes) => f.pad(&format!("size:{}", exact_size(*bytes))),
            Policy::Auto => f.pad("auto"),
            Policy::Rules(rules) => f.pad(rules.name()),
        }
    }
}

/// A name that no policy has.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct UnknownPolicy(pub String);

/// The names of policies, for messages.
const NAMES: [&str; 5] = ["never", "always", "inode", "size", "auto"];

/// The policies that have names: `never`, `always`, `inode`, `size`, `size:BYTES` and `auto`.
impl FromStr for Policy {
    type Err = UnknownPolicy;

    fn from_str(name: &str) -> Result<Policy, UnknownPolicy> {
        match name {
            "never" => Ok(Policy::Never),
            "always" => Ok(Policy::Always),
            "inode" => Ok(Policy::Inode),
            "size" => Ok(Policy::Size(BREAK_EVEN)),
            "auto" => Ok(Policy::Auto),
            _ => match name.split_once(':') {
                Some(("size", bytes)) => parse_size(bytes).map(Policy::Size).map_err(UnknownPolicy),
                _ => Err(UnknownPolicy(unknown("DAX policy", name, &NAMES))),
            },
        }
    }
}
