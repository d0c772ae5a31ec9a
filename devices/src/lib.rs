//! The devices of daxvm, free of KVM: what a device needs of the hypervisor (interrupts, doorbells, mappings) reaches
//! it through the traits in [`interrupt`] and [`pci`], so that every device can be driven by a unit test.

/// Says what this machine lacks for a test, where the test's own output is not kept back; `scripts/test` counts it.
#[cfg(test)]
macro_rules! skipped {
    ($($why:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), "SKIPPED: {}", format_args!($($why)*));
    }};
}

pub mod bus;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod interrupt;
pub mod legacy;
pub mod pci;
pub mod text;
pub mod virtio;
