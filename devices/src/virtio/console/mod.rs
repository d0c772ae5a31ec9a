//! The virtio-console device (virtio 1.2, section 5.3): ports, each a stream to and a stream from the guest, between
//! descriptors of the caller and the guest's memory.
//!
//! Each direction of a port has a thread: `input` reads from the caller's descriptor straight into the guest's buffers,
//! `output` writes from them straight to a descriptor. Both may block in the system call, since the descriptors share their
//! file description with other processes and must not be made non-blocking; a signal ends the call when the device is
//! reset. `control` talks with the driver about ports and never blocks, as drivers spin until it has listened. What the
//! threads and the caller know of each other is in `port`.

mod control;
mod device;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod input;
mod output;
mod port;
#[cfg(test)]
mod tests;

pub use self::device::{ConsoleDevice, ConsoleError, MAX_PORTS};
pub use self::port::{Port, PortCounters, PortsHandle};
