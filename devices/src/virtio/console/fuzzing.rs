//! What the device's threads do with rings of any kind, for the fuzz target of rings.

use std::fs::File;
use std::sync::Arc;

use vm_memory::{GuestMemoryMmap, Le16, Le32};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::control::{Control, Message, event};
use super::input::{Input, has_buffers};
use super::output::Output;
use super::{ConsoleDevice, Port};
use crate::virtio::device::ActiveQueue;
use crate::virtio::thread::Stop;
use crate::virtio::worker::ChainError;

/// More is not asked of a queue, though a driver may ask for as much as it likes.
const MOST: usize = 64;

/// Serves a queue of a console with one port: input, output, messages to the driver or from it, as `index` says.
///
/// # Errors
/// The rings break the rules.
pub(crate) fn serve(index: u8, queue: &mut ActiveQueue, memory: &GuestMemoryMmap) -> Result<(), ChainError> {
    let zero = || File::options().read(true).write(true).open("/dev/zero").unwrap().into();
    let port = Port { name: "fuzz".into(), input: Some(zero()), output: Some(zero()) };
    let ports = ConsoleDevice::new(vec![port]).unwrap().ports();
    let ended = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    match index % 4 {
        0 => {
            let input = Input::new(ports, 0, Arc::new(zero()), ended);
            for _ in 0..MOST {
                if !has_buffers(queue, memory)? || !input.batch(queue, memory)? {
                    break;
                }
            }
        }
        1 => {
            let (mut output, stop) = (Output::new(ports, 0, Some(Arc::new(zero()))), Stop::new().unwrap());
            for _ in 0..MOST {
                if !output.batch(queue, memory, &stop)? {
                    break;
                }
            }
        }
        direction => {
            let mut control = Control::new(ports, ended);
            for event in [event::DEVICE_READY, event::PORT_READY] {
                control.hear(Message { id: Le32::from(0), event: Le16::from(event), value: Le16::from(1) });
            }
            match direction {
                2 => drop(control.speak(queue, memory)?),
                _ => control.listen(queue, memory)?,
            }
        }
    }
    Ok(())
}
