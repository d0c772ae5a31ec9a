//! Which files a share offers through its DAX window: facts about a file in, a decision with its reason out.
//!
//! The policy is a pure function. It knows neither descriptors nor inode numbers, asks nobody, and gives the same
//! answer to the same question.

mod facts;

use std::fmt;
use std::str::FromStr;

pub use facts::{FileFacts, Needs, WindowFacts};

/// A share's policy.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum Policy {
    /// Every regular file is DAX, set-id files apart (see [`Reason::SetId`]).
    #[default]
    Always,
    /// No file is.
    Never,
    /// Regular files with the persistent hint.
    Inode,
    /// Regular files of at least so many bytes.
    Size(u64),
}

/// Whether a file is DAX, and why.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Decision {
    /// Whether the guest is to access the file's pages through the window.
    pub dax: bool,
    /// What decided it.
    pub reason: Reason,
}

/// What decided.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Reason {
    /// Only regular files have pages to map.
    NotRegular,
    /// A write to a set-id file must take the bit away, and the device sees no write that goes through the window.
    SetId,
    /// The policy makes no difference between files.
    Always,
    /// The same.
    Never,
    /// The persistent hint.
    Hint,
    /// The file's size.
    Size,
}

/// The needs of policies that ask for nothing.
static NOTHING: Needs = Needs { path: false, hint: false, capabilities: false, xattrs: Vec::new() };

impl Policy {
    /// The facts that the policy asks for beside those of stat(2).
    pub fn needs(&self) -> &Needs {
        static HINT: Needs = Needs { path: false, hint: true, capabilities: false, xattrs: Vec::new() };
        if *self == Policy::Inode { &HINT } else { &NOTHING }
    }

    /// Decides about one file. `current` is what the guest now takes the file for, if it knows the file: a policy with
    /// thresholds keeps to it until the file is clearly on the other side.
    pub fn decide(&self, facts: &FileFacts<'_>, current: Option<bool>) -> Decision {
        let _ = current;
        let (dax, reason) = match self {
            _ if facts.mode & libc::S_IFMT != libc::S_IFREG => (false, Reason::NotRegular),
            Policy::Always if is_set_id(facts.mode) => (false, Reason::SetId),
            Policy::Always => (true, Reason::Always),
            Policy::Never => (false, Reason::Never),
            Policy::Inode => (facts.hint, Reason::Hint),
            Policy::Size(least) => (facts.size >= *least, Reason::Size),
        };
        Decision { dax, reason }
    }

    /// Whether a client may map a file that it takes for DAX whatever its attributes say: `dax=always` mounts do not
    /// ask.
    pub fn allows_mapping(&self, facts: &FileFacts<'_>) -> bool {
        *self != Policy::Never && facts.mode & libc::S_IFMT == libc::S_IFREG
    }
}

/// Whether a file of this mode runs with its owner's or its group's rights, which a write takes away.
pub(super) fn is_set_id(mode: u32) -> bool {
    let set_gid = libc::S_ISGID | libc::S_IXGRP;
    mode & libc::S_IFMT == libc::S_IFREG && (mode & libc::S_ISUID != 0 || mode & set_gid == set_gid)
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Policy::Always => f.write_str("always"),
            Policy::Never => f.write_str("never"),
            Policy::Inode => f.write_str("inode"),
            Policy::Size(least) => write!(f, "size:{least}"),
        }
    }
}

/// A policy that does not exist.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("There is no DAX policy {0:?}: use always or never")]
pub struct UnknownPolicy(pub String);

impl FromStr for Policy {
    type Err = UnknownPolicy;

    fn from_str(name: &str) -> Result<Policy, UnknownPolicy> {
        match name {
            "always" => Ok(Policy::Always),
            "never" => Ok(Policy::Never),
            _ => Err(UnknownPolicy(name.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(mode: u32) -> FileFacts<'static> {
        FileFacts { mode, ..FileFacts::default() }
    }

    fn decide(policy: Policy, mode: u32) -> (bool, Reason) {
        let Decision { dax, reason } = policy.decide(&file(mode), None);
        (dax, reason)
    }

    #[test]
    fn only_regular_files_are_dax() {
        for kind in
            [libc::S_IFDIR, libc::S_IFLNK, libc::S_IFIFO, libc::S_IFSOCK, libc::S_IFCHR, libc::S_IFBLK]
        {
            for policy in [Policy::Always, Policy::Never] {
                assert_eq!(decide(policy.clone(), kind | 0o777), (false, Reason::NotRegular));
                assert!(!policy.allows_mapping(&file(kind | 0o777)));
            }
        }
    }

    #[test]
    fn regular_files_follow_the_policy() {
        for mode in [0, 0o644, 0o755, 0o1777, 0o2644] {
            let mode = libc::S_IFREG | mode;
            assert_eq!(decide(Policy::Always, mode), (true, Reason::Always));
            assert_eq!(decide(Policy::Never, mode), (false, Reason::Never));
        }
    }

    #[test]
    fn set_id_files_are_not_dax() {
        for mode in [0o4755, 0o4644, 0o2755, 0o6755, 0o2010] {
            let mode = libc::S_IFREG | mode;
            assert_eq!(decide(Policy::Always, mode), (false, Reason::SetId));
            assert!(Policy::Always.allows_mapping(&file(mode)));
            assert!(!Policy::Never.allows_mapping(&file(mode)));
        }
    }

    #[test]
    fn names_are_parsed_as_they_are_printed() {
        for policy in [Policy::Always, Policy::Never] {
            assert_eq!(policy.to_string().parse(), Ok(policy));
        }
        assert!("Always".parse::<Policy>().unwrap_err().to_string().contains("use always or never"));
    }
}
