//! The virtio-blk device (virtio 1.2, section 5.2): a raw image or a block device of the host as the guest's disk.
//!
//! Each queue has a thread, which carries out one request after the other with system calls between the image and the
//! guest's memory; a guest with several vCPUs has as many requests under way. `image` is the host's side, `request` the
//! guest's.

mod counters;
mod device;
mod image;
mod request;
#[cfg(test)]
mod tests;

pub use self::counters::{DiskCounters, DiskCountersHandle};
pub use self::device::{BlockConfig, BlockDevice};
pub use self::image::DiskError;
