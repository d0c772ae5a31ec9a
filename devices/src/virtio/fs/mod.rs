//! The virtio-fs device (virtio 1.2, section 5.11): shares a host directory with the guest, with a DAX window into
//! which the guest has parts of files mapped, file by file as a policy decides.
//!
//! A request comes in at `device`'s queues, is taken apart in `server`, carried out by fuse-backend-rs and answered
//! with attributes from `per_file_dax`, which asks the [`policy`]; mappings go to the [`window`].

mod abi;
mod accounts;
mod budget;
mod cache;
mod counters;
mod decisions;
mod device;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod hint;
mod inodes;
mod latency;
mod per_file_dax;
pub mod policy;
mod refusals;
mod server;
#[cfg(any(test, feature = "fuzzing"))]
#[cfg_attr(not(test), allow(dead_code))]
mod testing;
#[cfg(test)]
mod tests;
mod thrash;
pub mod window;

pub use self::accounts::{CHURN_TIME, FileCounters, FileTable, MAX_FILES};
pub use self::budget::{TooFewDescriptors, descriptors_per_share};
pub use self::cache::{CacheMode, UnknownCacheMode};
pub use self::counters::{CountersHandle, FileSystemCounters};
pub use self::decisions::DecisionCount;
pub use self::device::{
    FileSystemConfig, FileSystemDevice, FileSystemError, MAX_REQUEST_QUEUES, TagError, check_tag,
    open_directory,
};
pub use self::latency::{Latency, LatencyBucket};
pub use self::thrash::ThrashCounters;
