//! What the driver can ask about per-file DAX: files that become known, and opens in a row.

use serde::{Deserialize, Serialize};

use super::GuestPath;
use super::data::Content;

/// Files to become known to the kernel. Each has its size as its name.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MakeKnown {
    /// Their directory.
    pub dir: GuestPath,
    /// Their sizes.
    pub sizes: Vec<u64>,
    /// How.
    pub way: Way,
}

/// How the kernel gets to know a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Way {
    /// By its name.
    LookUp,
    /// With the others in its directory.
    Listing,
    /// Created empty, and grown while it is open.
    Create,
    /// By a new name of a file that is there as `first-SIZE`.
    Link,
    /// Created without a name (O_TMPFILE), grown, and given its name.
    Unnamed,
}

/// What a file was to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    /// STATX_ATTR_DAX when it had become known; of files that were created, before they were closed.
    #[serde(rename = "k")]
    pub known: bool,
    /// The same when it was opened after that.
    #[serde(rename = "o")]
    pub opened: bool,
    /// What reading a byte of each of its chunks met; 0 for nothing.
    #[serde(rename = "e")]
    pub errno: i32,
}

/// Opens in a row.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OpenLoop {
    /// The files and what they contain.
    pub files: Vec<(GuestPath, Content)>,
    /// How many threads do it.
    pub threads: usize,
    /// For how long.
    pub millis: u64,
}

/// What a loop of opens has seen; every byte that it read was right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opened {
    /// How often files were opened, by all threads.
    pub opens: u64,
    /// How often as DAX.
    pub dax: u64,
    /// How often as something else than by the same thread before.
    pub changes: u64,
}
