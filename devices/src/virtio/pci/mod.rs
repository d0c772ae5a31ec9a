//! The modern virtio-pci transport (virtio 1.2, section 4.1): capabilities, the common configuration with its strict
//! status state machine, notifications by doorbell, interrupts by MSI-X. No legacy interface, no INTx.

mod capabilities;
mod common_config;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod transport;

pub use transport::{VirtioPciDevice, VirtioPciError};
