//! The PCI bus: configuration space, base address registers, MSI-X, and the two mechanisms by which the guest reaches
//! configuration space (PCI Local Bus 3.0; PCI Express Base 5.0, section 7.2 for ECAM).

mod bar;
mod bus;
mod config_space;
mod msix;

pub use bar::{Bar, BarKind, BarMapper};
pub use bus::{ConfigPorts, Ecam, PciBus, PciDevice};
pub use config_space::{ConfigSpace, Identity, command};
pub use msix::{MsiMessage, MsiRouter, Msix};
