//! daxvm: a small KVM virtual machine monitor with a built-in virtio-fs device whose DAX state is decided per file.
//!
//! The boot path, by types: a [`VmConfig`] is what a user wrote; [`ValidConfig`] has been checked; [`Vm::build`] turns
//! it into a [`Vm`] (see `builder.rs`, which reads as the recipe); [`Vm::run`] runs the guest to its end and returns a
//! [`Report`]. [`Vm::ending`] gives the means to end it from another thread. Between the two, [`Vm::confine`] takes from
//! the process what its guest does not need.

/// Says what this machine lacks for a test, where the test's own output is not kept back; `scripts/test` counts it.
#[cfg(test)]
macro_rules! skipped {
    ($($why:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), "SKIPPED: {}", format_args!($($why)*));
    }};
}

pub mod api;
mod arch;
mod boot;
mod builder;
pub mod cli;
mod compression;
pub mod config;
mod console;
mod device_manager;
mod event_loop;
mod exit;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod guest;
pub mod initramfs;
mod interrupts;
mod layout;
mod logging;
pub mod matrix;
mod memory;
pub mod metrics;
mod outcome;
mod own_code;
mod patrol;
mod prefault;
mod report;
pub mod runner;
pub mod sandbox;
mod top;
mod vcpu;
mod vm;

pub use boot::{BootError, KernelFormat, KernelImage};
pub use builder::BuildError;
pub use config::{
    ConfigError, DaxConfig, DiskConfig, RootConfig, RunConfig, ShareConfig, ValidConfig, VmConfig,
};
pub use memory::MemoryError;
pub use outcome::{ExitReason, Stop};
pub use report::{Report, Timing};

pub use devices::virtio::block::{DiskCounters, DiskError};
pub use devices::virtio::console::{ConsoleError, PortCounters};
pub use devices::virtio::fs::FileSystemCounters;
pub use vm::{ConsoleInput, Ending, Port, PortsHandle, Vm, Wiring};
