//! Virtio devices (virtio 1.2) and the transport that carries them.

pub mod device;
pub mod fs;
pub mod pci;
pub mod worker;
