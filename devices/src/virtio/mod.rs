//! Virtio devices (virtio 1.2) and the transport that carries them.

pub mod block;
mod buffers;
pub mod console;
pub mod device;
pub mod fs;
pub mod pci;
pub mod rng;
#[cfg(any(test, feature = "testing"))]
#[doc(hidden)]
pub mod testing;
pub mod thread;
pub mod worker;
