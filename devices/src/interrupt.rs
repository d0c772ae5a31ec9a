//! How a device interrupts the guest, without knowing which hypervisor carries the interrupt.

use std::io;

/// One way to interrupt the guest: an edge on an interrupt line, or one MSI-X vector.
pub trait Interrupt: Send + Sync {
    /// Interrupts the guest once. A masked MSI-X vector remembers it as pending.
    ///
    /// # Errors
    /// The error of the write to the event descriptor behind it.
    fn trigger(&self) -> io::Result<()>;
}
