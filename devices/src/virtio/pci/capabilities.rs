//! Where the parts of the transport lie in its BARs, and the vendor capabilities that tell the driver
//! (virtio 1.2, section 4.1.4).

use crate::pci::ConfigSpace;

/// PCI capability IDs.
const VENDOR_SPECIFIC: u8 = 0x09;
const MSI_X: u8 = 0x11;

/// The BAR with the registers.
pub(super) const REGISTERS_BAR: u8 = 0;
/// The BAR with the shared memory region, if there is one.
pub(super) const SHARED_MEMORY_BAR: u8 = 2;
/// Bytes of the registers' BAR.
pub(super) const REGISTERS_SIZE: u64 = 0x8000;

/// Offsets and lengths in the registers' BAR; a page each, so that nothing shares one with the doorbells.
pub(super) const COMMON: (u64, u64) = (0x0000, 56);
pub(super) const ISR: (u64, u64) = (0x1000, 1);
pub(super) const DEVICE: (u64, u64) = (0x2000, 0x1000);
pub(super) const NOTIFY: (u64, u64) = (0x3000, 0x1000);
pub(super) const MSIX_TABLE: (u64, u64) = (0x4000, 0x2000);
pub(super) const MSIX_PENDING: (u64, u64) = (0x6000, 0x1000);

/// Distance of the doorbells of neighbouring queues.
pub(super) const NOTIFY_MULTIPLIER: u32 = 4;
/// Queues a device may have: what the pages above hold.
pub(super) const MAX_QUEUES: usize = (NOTIFY.1 / NOTIFY_MULTIPLIER as u64 - 1) as usize / 2;

/// cfg_type values.
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;
const SHARED_MEMORY_CFG: u8 = 8;

/// Offsets of the capabilities that the guest writes.
pub(super) struct Capabilities {
    /// Message control of MSI-X.
    pub msix_control: usize,
    /// The window into BARs through configuration space: `struct virtio_pci_cfg_cap`.
    pub pci_cfg: usize,
}

/// Offsets in `struct virtio_pci_cfg_cap`.
pub(super) const PCI_CFG_BAR: usize = 4;
pub(super) const PCI_CFG_OFFSET: usize = 8;
pub(super) const PCI_CFG_LENGTH: usize = 12;
pub(super) const PCI_CFG_DATA: usize = 16;

/// Adds all capabilities of a device with `vectors` MSI-X vectors, and shared memory `(id, bytes)` if it has any.
pub(super) fn add(config: &mut ConfigSpace, vectors: u16, shared_memory: Option<(u8, u64)>) -> Capabilities {
    for (cfg_type, place) in [(COMMON_CFG, COMMON), (ISR_CFG, ISR), (DEVICE_CFG, DEVICE)] {
        config.add_capability(VENDOR_SPECIFIC, &body(cfg_type, REGISTERS_BAR, 0, place, &[]));
    }
    let multiplier = NOTIFY_MULTIPLIER.to_le_bytes();
    config.add_capability(VENDOR_SPECIFIC, &body(NOTIFY_CFG, REGISTERS_BAR, 0, NOTIFY, &multiplier));
    if let Some((id, size)) = shared_memory {
        // struct virtio_pci_cap64: Linux takes the capability only if it is exactly 24 bytes long.
        let high = ((size >> 32) as u32).to_le_bytes();
        let tail = [[0; 4], high].concat();
        let place = (0, size & 0xffff_ffff);
        config.add_capability(VENDOR_SPECIFIC, &body(SHARED_MEMORY_CFG, SHARED_MEMORY_BAR, id, place, &tail));
    }
    let pci_cfg = config.add_capability(VENDOR_SPECIFIC, &body(PCI_CFG, 0, 0, (0, 0), &[0; 4]));
    config.allow_writes(pci_cfg + PCI_CFG_BAR, &[0xff]);
    config.allow_writes(pci_cfg + PCI_CFG_OFFSET, &[0xff; 8]);

    let mut msix = (vectors - 1).to_le_bytes().to_vec();
    for (offset, _) in [MSIX_TABLE, MSIX_PENDING] {
        msix.extend((offset as u32 | u32::from(REGISTERS_BAR)).to_le_bytes());
    }
    let msix_control = config.add_capability(MSI_X, &msix) + 2;
    // Enable and function mask.
    config.allow_writes(msix_control, &[0, 0b1100_0000]);
    Capabilities { msix_control, pci_cfg }
}

/// `struct virtio_pci_cap` without its first two bytes, which every PCI capability has.
fn body(cfg_type: u8, bar: u8, id: u8, (offset, length): (u64, u64), tail: &[u8]) -> Vec<u8> {
    let cap_len = 16 + tail.len() as u8;
    let mut body = vec![cap_len, cfg_type, bar, id, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend((length as u32).to_le_bytes());
    body.extend(tail);
    body
}
