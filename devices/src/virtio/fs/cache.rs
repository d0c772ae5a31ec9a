//! How much the guest may keep of what it has seen of a share.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::abi::{FOPEN_CACHE_DIR, FOPEN_DIRECT_IO, FOPEN_KEEP_CACHE};

/// What the guest may keep, with virtiofsd's names and meanings. The contents of DAX files are outside of it: they are
/// in the host's page cache alone, and so never stale.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheMode {
    /// Nothing: each name, attribute and byte is asked for again. For shares that the host or other guests change. Other
    /// name: `none`.
    #[serde(alias = "none")]
    Never,
    /// Names and attributes for a second, contents for as long as the file is not opened again.
    #[default]
    Auto,
    /// Names, attributes and listings for a day, contents not at all.
    Metadata,
    /// All of it for a day. For shares that nobody changes but this guest.
    Always,
}

impl CacheMode {
    /// How long the guest may use names and attributes without asking again.
    pub(super) fn timeout(self) -> Duration {
        match self {
            CacheMode::Never => Duration::ZERO,
            CacheMode::Auto => Duration::from_secs(1),
            CacheMode::Metadata | CacheMode::Always => Duration::from_secs(86_400),
        }
    }

    /// Whether the contents of files that are not DAX bypass the guest's page cache.
    pub(super) fn is_direct(self) -> bool {
        matches!(self, CacheMode::Never | CacheMode::Metadata)
    }

    /// The open flags for a file that is not DAX. `has_old_pages`: the guest may have pages of it that are older than
    /// its own writes.
    pub(super) fn file_flags(self, has_old_pages: bool) -> u32 {
        match self {
            CacheMode::Never | CacheMode::Metadata => FOPEN_DIRECT_IO,
            CacheMode::Always if !has_old_pages => FOPEN_KEEP_CACHE,
            CacheMode::Auto | CacheMode::Always => 0,
        }
    }

    /// The open flags for a directory.
    pub(super) fn directory_flags(self) -> u32 {
        match self {
            CacheMode::Never | CacheMode::Auto => 0,
            CacheMode::Metadata | CacheMode::Always => FOPEN_CACHE_DIR | FOPEN_KEEP_CACHE,
        }
    }
}

impl fmt::Display for CacheMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CacheMode::Never => "never",
            CacheMode::Auto => "auto",
            CacheMode::Metadata => "metadata",
            CacheMode::Always => "always",
        })
    }
}

/// A cache mode that does not exist.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("There is no cache mode {0:?}: use never (or none), auto, metadata or always")]
pub struct UnknownCacheMode(pub String);

impl FromStr for CacheMode {
    type Err = UnknownCacheMode;

    fn from_str(name: &str) -> Result<CacheMode, UnknownCacheMode> {
        match name {
            "never" | "none" => Ok(CacheMode::Never),
            "auto" => Ok(CacheMode::Auto),
            "metadata" => Ok(CacheMode::Metadata),
            "always" => Ok(CacheMode::Always),
            _ => Err(UnknownCacheMode(name.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parsed_as_they_are_printed() {
        for mode in [CacheMode::Never, CacheMode::Auto, CacheMode::Metadata, CacheMode::Always] {
            assert_eq!(mode.to_string().parse(), Ok(mode));
        }
        assert_eq!("none".parse(), Ok(CacheMode::Never));
        assert!("Auto".parse::<CacheMode>().unwrap_err().to_string().contains("use never"));
    }
}
