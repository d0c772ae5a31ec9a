//! When the pages of a DAX file are put in the guest's reach.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::text::unknown;

/// Which pages of a part of a file the guest finds at hand once it has mapped the part; the others come one by one as it
/// touches them. docs/window.md, "First touch", says what that costs and saves.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Prefault {
    /// None.
    Never,
    /// Those that are in the host's page cache: nothing is read from a disk for it.
    #[default]
    Cached,
    /// All. What is not in the page cache is read.
    All,
}

impl Prefault {
    /// The names, for messages.
    const NAMES: [&str; 3] = ["never", "cached", "all"];
}

impl fmt::Display for Prefault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(Prefault::NAMES[*self as usize])
    }
}

/// A name that stands for no way to prefault.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct UnknownPrefault(pub String);

impl FromStr for Prefault {
    type Err = UnknownPrefault;

    fn from_str(name: &str) -> Result<Prefault, UnknownPrefault> {
        match name {
            "never" => Ok(Prefault::Never),
            "cached" => Ok(Prefault::Cached),
            "all" => Ok(Prefault::All),
            _ => Err(UnknownPrefault(unknown("way to prefault", name, &Prefault::NAMES))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_written_and_a_wrong_one_tells_the_right_one() {
        for prefault in [Prefault::Never, Prefault::Cached, Prefault::All] {
            assert_eq!(prefault.to_string().parse(), Ok(prefault));
        }
        let error = "cache".parse::<Prefault>().unwrap_err().to_string();
        assert!(error.contains("did you mean `cached`"), "{error}");
    }
}
