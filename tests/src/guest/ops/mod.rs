//! The operations, by what they touch.

pub(super) mod changing;
pub(super) mod contest;
pub(super) mod files;
pub(super) mod journal;
pub(super) mod maps;
pub(super) mod passes;
pub(super) mod per_file;
pub(super) mod read;
pub(super) mod small;
pub(super) mod system;
pub(super) mod write;

pub(super) use maps::Mapping;
