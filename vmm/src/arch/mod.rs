//! What depends on the architecture of host and guest.

#[cfg(target_arch = "x86_64")]
pub mod x86_64;
