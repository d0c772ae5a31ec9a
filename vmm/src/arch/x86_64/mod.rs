//! x86_64: CPUID, the state in which vCPUs start, ACPI tables, the two boot protocols.

pub mod acpi;
pub mod boot_params;
pub mod cpuid;
pub mod entry;
pub mod fault;
mod paging;
mod vectors;

/// What an APIC ID can name, and so how many vCPUs there may be.
pub const MAX_VCPUS: u8 = 32;
