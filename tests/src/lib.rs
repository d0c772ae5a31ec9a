//! The lab, the guest's agent and what guest tests are written with.

pub mod bench;
pub mod conformance;
pub mod guest;
pub mod inode_flags;
pub mod lab;
pub mod vm;
