//! The devices of daxvm, free of KVM: what a device needs of the hypervisor (interrupts, doorbells, mappings) reaches
//! it through the traits in [`interrupt`] and [`pci`], so that every device can be driven by a unit test.

pub mod bus;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod interrupt;
pub mod legacy;
pub mod pci;
pub mod text;
pub mod virtio;
