//! The control queues, by which device and driver tell each other of ports (virtio 1.2, section 5.3.6.2).
//!
//! What the device has to say is kept as what is due for each port, not as a queue of messages: a driver that asks and
//! never listens costs no memory.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use vm_memory::{ByteValued, GuestAddressSpace, GuestMemoryMmap, Le16, Le32};
use vmm_sys_util::eventfd::EventFd;

use super::port::PortsHandle;
use crate::virtio::device::{ActiveQueue, DeviceMemory};
use crate::virtio::thread::Stop;
use crate::virtio::worker::{ChainError, cannot_wait};

/// `struct virtio_console_control`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Message {
    /// The port.
    pub id: Le32,
    /// One of [`event`].
    pub event: Le16,
    /// What it is about the port.
    pub value: Le16,
}

// SAFETY: plain integers, 4 + 2 + 2 bytes without padding.
unsafe impl ByteValued for Message {}

/// Kinds of control messages.
pub(super) mod event {
    pub const DEVICE_READY: u16 = 0;
    pub const PORT_ADD: u16 = 1;
    pub const PORT_READY: u16 = 3;
    pub const PORT_OPEN: u16 = 6;
    pub const PORT_NAME: u16 = 7;
}

/// What the driver is to be told of a port.
#[derive(Clone, Copy, Default)]
struct Due {
    add: bool,
    name: bool,
    open: bool,
    /// Whether the driver has taken the port on.
    is_ready: bool,
    /// What was said last of whether it is open here.
    is_open: bool,
}

/// The device's side of the control queues.
pub(super) struct Control {
    ports: PortsHandle,
    due: Vec<Due>,
    /// Rung when an input has ended.
    input_ended: Arc<EventFd>,
}

impl Control {
    /// Talks about `ports`; `input_ended` is rung when one of their inputs has ended.
    pub fn new(ports: PortsHandle, input_ended: Arc<EventFd>) -> Control {
        Control { due: vec![Due::default(); ports.ports.len()], ports, input_ended }
    }

    /// Serves both queues until `stop` is set: `to_driver` has the driver's buffers, `from_driver` its messages.
    ///
    /// # Errors
    /// The guest breaks the rules of rings.
    pub fn run(
        mut self,
        mut to_driver: ActiveQueue,
        mut from_driver: ActiveQueue,
        memory: &DeviceMemory,
        stop: &Stop,
    ) -> Result<(), ChainError> {
        while !stop.is_set() {
            let snapshot = memory.memory();
            self.listen(&mut from_driver, &snapshot)?;
            self.note_ends();
            let is_waiting = !self.speak(&mut to_driver, &snapshot)?;
            let more_to_hear = from_driver.listen_to_driver(&snapshot)?;
            let can_speak = is_waiting && to_driver.listen_to_driver(&snapshot)?;
            if more_to_hear || can_speak {
                continue;
            }
            let bells = [&to_driver.doorbell, &from_driver.doorbell, &*self.input_ended];
            let Some(rung) =
                stop.wait(bells.map(|bell| (bell.as_raw_fd(), libc::POLLIN))).map_err(cannot_wait)?
            else {
                break;
            };
            for (bell, _) in bells.into_iter().zip(rung).filter(|(_, rung)| *rung) {
                // Non-blocking: a spurious wake-up finds nothing to do.
                let _ = bell.read();
            }
        }
        Ok(())
    }

    /// Hears what the driver has said so far.
    pub(super) fn listen(
        &mut self,
        queue: &mut ActiveQueue,
        memory: &GuestMemoryMmap,
    ) -> Result<(), ChainError> {
        // No more than the ring holds, so that a driver that talks without a pause cannot keep the thread here.
        for _ in 0..queue.available(memory)? {
            let Some(chain) = queue.next_chain(memory)? else { break };
            let head = chain.head_index();
            let mut reader = chain.reader(memory).map_err(not_in_memory)?;
            // One that is too short says nothing.
            if let Ok(message) = reader.read_obj() {
                self.hear(message);
            }
            queue.add_used(memory, head, 0)?;
            queue.notify_driver(memory)?;
        }
        Ok(())
    }

    pub(super) fn hear(&mut self, message: Message) {
        let (event, value) = (message.event.to_native(), message.value.to_native());
        if event == event::DEVICE_READY && value == 1 {
            self.due.fill(Due { add: true, ..Due::default() });
            return;
        }
        let id = message.id.to_native() as usize;
        let Some(due) = self.due.get_mut(id) else {
            tracing::debug!(id, event, "The guest speaks of a port that it does not have");
            return;
        };
        let port = &self.ports.ports[id];
        match event {
            event::PORT_READY if value == 1 => {
                *due =
                    Due { name: true, open: true, is_ready: true, is_open: !port.has_input_ended(), ..*due };
            }
            event::PORT_READY => tracing::warn!(port = port.name, "The guest cannot use a port"),
            event::PORT_OPEN => port.set_open(value != 0),
            _ => tracing::debug!(id, event, value, "The guest sends a message of no known kind"),
        }
    }

    /// Ports whose input has ended are closed here.
    fn note_ends(&mut self) {
        for (due, port) in self.due.iter_mut().zip(self.ports.ports.iter()) {
            if due.is_ready && due.is_open && port.has_input_ended() {
                (due.open, due.is_open) = (true, false);
            }
        }
    }

    /// Says what is due; false if buffers have run out.
    pub(super) fn speak(
        &mut self,
        queue: &mut ActiveQueue,
        memory: &GuestMemoryMmap,
    ) -> Result<bool, ChainError> {
        let mut spoken = false;
        // No more than the ring holds, so that a driver that posts buffers which are too small, without a pause, cannot keep the
        // thread here.
        let mut left = queue.available(memory)?;
        let complete = loop {
            let Some((id, event)) = self.next_due() else { break true };
            let Some(rest) = left.checked_sub(1) else { break false };
            left = rest;
            let Some(chain) = queue.next_chain(memory)? else { break false };
            let head = chain.head_index();
            let value = match event {
                event::PORT_OPEN => self.due[id].is_open.into(),
                event::PORT_NAME => 1,
                _ => 0,
            };
            let message = Message { id: (id as u32).into(), event: event.into(), value: value.into() };
            let name = if event == event::PORT_NAME { self.ports.ports[id].name.as_bytes() } else { &[] };
            let bytes = [message.as_slice(), name].concat();
            let mut writer = chain.writer(memory).map_err(not_in_memory)?;
            let mut written = 0;
            // A buffer that is too small is given back, and the next one tried.
            if bytes.len() <= writer.available_bytes() {
                std::io::Write::write_all(&mut writer, &bytes)
                    .map_err(|error| ChainError(format!("Cannot write to the guest's buffer: {error}")))?;
                written = bytes.len() as u32;
                self.said(id, event);
            }
            queue.add_used(memory, head, written)?;
            spoken = true;
        };
        if spoken {
            queue.notify_driver(memory)?;
        }
        Ok(complete)
    }

    /// The port and the message that is next: a port is added before it is named, and named before it is open.
    fn next_due(&self) -> Option<(usize, u16)> {
        self.due.iter().enumerate().find_map(|(id, due)| {
            let events =
                [(due.add, event::PORT_ADD), (due.name, event::PORT_NAME), (due.open, event::PORT_OPEN)];
            events.into_iter().find(|(is_due, _)| *is_due).map(|(_, event)| (id, event))
        })
    }

    fn said(&mut self, id: usize, event: u16) {
        let due = &mut self.due[id];
        match event {
            event::PORT_ADD => due.add = false,
            event::PORT_NAME => due.name = false,
            _ => due.open = false,
        }
    }
}

fn not_in_memory(error: virtio_queue::Error) -> ChainError {
    ChainError(format!("A control message is not in guest memory: {error}"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use virtio_queue::desc::RawDescriptor;
    use virtio_queue::{Queue, QueueT};
    use vm_memory::{Bytes, GuestAddress};
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::super::ConsoleDevice;
    use super::super::port::Port;
    use super::*;
    use crate::virtio::testing::{Bell, writable};

    #[test]
    fn a_driver_whose_buffers_are_all_too_small_keeps_nobody() {
        // As from a driver that is faster than the device: the used ring lies on the available one and is ahead of it, so that
        // what is given back is available again.
        const RING: u64 = 0x1000;
        const AHEAD: u16 = 3;
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 16)]).unwrap();
        memory.write_obj(RawDescriptor::from(writable(0x2000, 1)), GuestAddress(0)).unwrap();
        memory.write_obj(AHEAD, GuestAddress(RING + 2)).unwrap();
        let mut queue = Queue::new(32).unwrap();
        queue.try_set_desc_table_address(GuestAddress(0)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(RING)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(RING)).unwrap();
        queue.set_next_used(AHEAD);
        queue.set_ready(true);
        let bell = || EventFd::new(EFD_NONBLOCK).unwrap();
        let mut queue =
            ActiveQueue { index: 2, queue, doorbell: bell(), interrupt: Arc::new(Bell::default()) };
        let port = Port { name: "port".into(), input: None, output: None };
        let ports = ConsoleDevice::new(vec![port]).unwrap().ports();
        let mut control = Control::new(ports, Arc::new(bell()));
        control.due[0].add = true;

        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let is_complete = control.speak(&mut queue, &memory).unwrap();
            sender.send((is_complete, queue.available(&memory).unwrap())).unwrap();
        });
        let spoken = receiver.recv_timeout(Duration::from_secs(20));
        assert_eq!(spoken, Ok((false, AHEAD)), "there is more to say, and to say it in");
    }
}
