//! Base address registers: what is behind them, and how the hypervisor is told where the guest has put them.

use std::fmt;
use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::virtio::device::HostMemory;

/// A 64-bit memory BAR.
#[derive(Debug, Clone)]
pub struct Bar {
    /// The register, 0 to 4; it takes the next one too.
    pub index: u8,
    /// Bytes, a power of two.
    pub size: u64,
    /// What is behind it.
    pub kind: BarKind,
}

/// What is behind a BAR.
#[derive(Clone)]
pub enum BarKind {
    /// Registers: an access is an exit to the device, but for the doorbells.
    Registers {
        /// Offsets of which a write (of any width and value) only signals the descriptor.
        doorbells: Vec<(u64, Arc<EventFd>)>,
    },
    /// Host memory that the guest uses without an exit; prefetchable. It may be smaller than the BAR.
    Memory(Arc<dyn HostMemory>),
}

impl fmt::Debug for BarKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BarKind::Registers { doorbells } => write!(f, "Registers({} doorbells)", doorbells.len()),
            BarKind::Memory(memory) => write!(f, "Memory({:#x})", memory.size()),
        }
    }
}

/// The hypervisor's side of BARs: makes what is behind one answer at a guest-physical address.
pub trait BarMapper: Send + Sync {
    /// Makes `bar` answer at `address`; accesses to registers go to `registers`.
    ///
    /// # Errors
    /// The address is taken (by RAM, by another BAR) or out of reach. The BAR answers nowhere then.
    fn map(&self, bar: &Bar, address: u64, registers: Arc<dyn BusDevice>) -> io::Result<()>;

    /// Undoes `map` of the same `bar` and `address`.
    fn unmap(&self, bar: &Bar, address: u64);
}
