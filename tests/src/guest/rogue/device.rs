//! A virtio-fs device, driven by hand: registers, rings and requests exactly as an attempt wants them.

use std::thread;
use std::time::{Duration, Instant};

use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_INDIRECT_DESC, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};

use super::function::{Capability, Function, Part};
use super::io::Io;
use super::memory::DmaMemory;
use crate::guest::Failure;

/// What every attempt accepts unless it is about that.
pub const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Descriptors in each ring.
pub const QUEUE_SIZE: u16 = 128;
/// The queue for requests; the one before it is for those of high priority.
pub const REQUESTS: u16 = 1;

/// Device status bits (virtio 1.2, section 2.1).
pub mod status {
    pub const ACKNOWLEDGE: u64 = 1;
    pub const DRIVER: u64 = 2;
    pub const DRIVER_OK: u64 = 4;
    pub const FEATURES_OK: u64 = 8;
    pub const NEEDS_RESET: u64 = 64;
    pub const FAILED: u64 = 128;
    /// Registers that do not answer.
    pub const NOBODY: u64 = 0xff;
}

/// Offsets in the common configuration (virtio 1.2, section 4.1.4.3), in bytes.
pub mod common {
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    pub const DRIVER_FEATURE: u64 = 12;
    pub const CONFIG_VECTOR: u64 = 16;
    pub const NUM_QUEUES: u64 = 18;
    pub const STATUS: u64 = 20;
    pub const QUEUE_SELECT: u64 = 22;
    pub const QUEUE_SIZE: u64 = 24;
    pub const QUEUE_VECTOR: u64 = 26;
    pub const QUEUE_ENABLE: u64 = 28;
    pub const QUEUE_DESC: u64 = 32;
    pub const QUEUE_DRIVER: u64 = 40;
    pub const QUEUE_DEVICE: u64 = 48;
}

pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;
pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;
pub const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// What is where in the memory of a device: the rings first, [`RING_SPACE`] bytes a queue.
const RING_SPACE: u64 = 0x4000;
/// A table of indirect descriptors.
pub const INDIRECT_TABLE: u64 = 0x3_0000;
/// A request.
pub const REQUEST: u64 = 0x4_0000;
/// Its reply, and the room for it.
pub const REPLY: u64 = 0x8_0000;
pub const REPLY_ROOM: u32 = 0x8000;
/// Room for data.
pub const BULK: u64 = 0x10_0000;
pub const BULK_SIZE: u32 = 0x10_0000;

/// How long an answer may take: hosts may be emulated.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// How long to wait for one that must not come.
pub const SHORT: Duration = Duration::from_millis(100);
const POLL: Duration = Duration::from_micros(100);
/// Looks at the ring for each at the status, which costs the guest an exit.
const LOOKS: u32 = 50;

/// An entry of a descriptor table (virtio 1.2, section 2.7.5).
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    pub address: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

impl Descriptor {
    pub fn bytes(table: &[Descriptor]) -> Vec<u8> {
        let bytes = |descriptor: &Descriptor| {
            let Descriptor { address, len, flags, next } = descriptor;
            let tail = [flags.to_le_bytes(), next.to_le_bytes()].concat();
            [&address.to_le_bytes()[..], &len.to_le_bytes(), &tail].concat()
        };
        table.iter().flat_map(bytes).collect()
    }
}

/// Guest-physical addresses of a queue's rings.
#[derive(Clone, Copy, Debug)]
pub struct Rings {
    pub table: u64,
    pub available: u64,
    pub used: u64,
}

/// What came of a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// A reply of success, and what follows its header.
    Done(Vec<u8>),
    /// A reply of an error.
    Errno(i32),
    /// The chain was given back with nothing written.
    Unused,
    /// The device asks to be reset.
    NeedsReset,
    /// Nothing.
    Silence,
}

/// The device.
pub struct Device {
    pub function: Function,
    /// BAR 0.
    pub registers: Io,
    /// The DAX window's BAR.
    pub window: Io,
    /// Where the window is for the device and for descriptors.
    pub window_address: u64,
    pub memory: DmaMemory,
    pub common: Capability,
    pub notify: Capability,
    /// Distance of doorbells.
    multiplier: u64,
    available: [u16; 2],
    used: [u16; 2],
}

impl Device {
    /// Takes the device at a PCI address from whoever might want it.
    pub fn take(address: &str) -> Result<Device, Failure> {
        let function = Function::take(address)?;
        let common = function.capability(Part::Common)?;
        let notify = function.capability(Part::Notify)?;
        let window = function.capability(Part::SharedMemory)?;
        Ok(Device {
            registers: function.map_bar(common.bar)?,
            window: function.map_bar(window.bar)?,
            window_address: function.bar(window.bar) + window.offset,
            memory: DmaMemory::new()?,
            common,
            notify,
            multiplier: function.read(notify.at + 16, 4)?,
            available: [0; 2],
            used: [0; 2],
            function,
        })
    }

    /// Reads a register of the common configuration.
    pub fn get(&self, offset: u64, width: usize) -> Result<u64, Failure> {
        self.registers.read(self.common.offset + offset, width)
    }

    /// Writes a register of the common configuration.
    pub fn set(&self, offset: u64, width: usize, value: u64) -> Result<(), Failure> {
        self.registers.write(self.common.offset + offset, width, value)
    }

    /// The device status.
    pub fn status(&self) -> Result<u64, Failure> {
        self.get(common::STATUS, 1)
    }

    /// Writes the device status.
    pub fn set_status(&self, status: u64) -> Result<(), Failure> {
        self.set(common::STATUS, 1, status)
    }

    /// Resets the device and waits until it has been.
    pub fn reset(&mut self) -> Result<(), Failure> {
        self.set_status(0)?;
        let start = Instant::now();
        while self.status()? != 0 {
            if start.elapsed() > PATIENCE {
                return Err(Failure::new(format!("its status is {:#x} after a reset", self.status()?)));
            }
            thread::sleep(POLL);
        }
        self.available = [0; 2];
        self.used = [0; 2];
        self.memory.fill(0, 2 * RING_SPACE as usize, 0);
        Ok(())
    }

    /// Accepts features; says whether the device agrees.
    pub fn negotiate(&self, features: u64) -> Result<bool, Failure> {
        self.set_status(status::ACKNOWLEDGE)?;
        self.set_status(status::ACKNOWLEDGE | status::DRIVER)?;
        for select in 0..2 {
            self.set(common::DRIVER_FEATURE_SELECT, 4, select)?;
            self.set(common::DRIVER_FEATURE, 4, features >> (32 * select) & 0xffff_ffff)?;
        }
        self.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK)?;
        Ok(self.status()? & status::FEATURES_OK != 0)
    }

    /// Where a queue's rings belong.
    pub fn rings(&self, queue: u16) -> Rings {
        let base = self.memory.physical(RING_SPACE * u64::from(queue));
        Rings { table: base, available: base + 0x1000, used: base + 0x2000 }
    }

    /// Sets a queue up and enables it.
    pub fn set_queue(&self, queue: u16, size: u16, rings: Rings) -> Result<(), Failure> {
        self.set(common::QUEUE_SELECT, 2, queue.into())?;
        self.set(common::QUEUE_SIZE, 2, size.into())?;
        self.set(common::QUEUE_DESC, 8, rings.table)?;
        self.set(common::QUEUE_DRIVER, 8, rings.available)?;
        self.set(common::QUEUE_DEVICE, 8, rings.used)?;
        self.set(common::QUEUE_ENABLE, 2, 1)
    }

    /// Lets the device live.
    pub fn go(&self) -> Result<(), Failure> {
        let all = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        self.set_status(all)
    }

    /// Resets the device and sets it up with other rings for the requests.
    pub fn start_with(&mut self, features: u64, rings: Rings) -> Result<(), Failure> {
        self.reset()?;
        if !self.negotiate(features)? {
            return Err(Failure::new(format!("the device does not agree to {features:#x}")));
        }
        self.set_queue(0, QUEUE_SIZE, self.rings(0))?;
        self.set_queue(REQUESTS, QUEUE_SIZE, rings)?;
        self.go()
    }

    /// Resets the device and sets it up as a driver does.
    pub fn start(&mut self) -> Result<(), Failure> {
        self.start_with(FEATURES, self.rings(REQUESTS))
    }

    /// Writes the first entries of a queue's descriptor table.
    pub fn write_table(&self, queue: u16, chain: &[Descriptor]) {
        self.memory.write(RING_SPACE * u64::from(queue), &Descriptor::bytes(chain));
    }

    /// Makes a chain available by its head, which need not be one; does not ring.
    pub fn offer(&mut self, queue: u16, head: u16) {
        let index = self.available[usize::from(queue)];
        let ring = RING_SPACE * u64::from(queue) + 0x1000;
        self.memory.write(ring + 4 + 2 * u64::from(index % QUEUE_SIZE), &head.to_le_bytes());
        self.set_available(queue, index.wrapping_add(1));
    }

    /// Sets the index of the available ring.
    pub fn set_available(&mut self, queue: u16, index: u16) {
        self.available[usize::from(queue)] = index;
        let ring = RING_SPACE * u64::from(queue) + 0x1000;
        self.memory.write(ring + 2, &index.to_le_bytes());
    }

    /// Rings for a queue.
    pub fn ring(&self, queue: u16) -> Result<(), Failure> {
        let queue = u64::from(queue);
        self.registers.write(self.notify.offset + self.multiplier * queue, 2, queue)
    }

    /// The index of the used ring.
    pub fn used(&self, queue: u16) -> u16 {
        self.memory.load(RING_SPACE * u64::from(queue) + 0x2002)
    }

    /// Has the device carry out a chain of requests.
    pub fn exchange(&mut self, chain: &[Descriptor]) -> Result<Answer, Failure> {
        self.memory.fill(REPLY, 16, 0);
        self.post(chain)?;
        self.answer(PATIENCE)
    }

    /// Makes a chain of requests available and rings.
    pub fn post(&mut self, chain: &[Descriptor]) -> Result<(), Failure> {
        self.write_table(REQUESTS, chain);
        self.offer(REQUESTS, 0);
        self.ring(REQUESTS)
    }

    /// Waits for what comes of the next chain.
    pub fn answer(&mut self, patience: Duration) -> Result<Answer, Failure> {
        let start = Instant::now();
        loop {
            for _ in 0..LOOKS {
                if self.used(REQUESTS) != self.used[usize::from(REQUESTS)] {
                    return Ok(self.take_used());
                }
                thread::sleep(POLL);
                if start.elapsed() > patience {
                    break;
                }
            }
            if self.asks_for_reset()? {
                return Ok(Answer::NeedsReset);
            }
            if start.elapsed() > patience {
                return Ok(Answer::Silence);
            }
        }
    }

    /// Whether the device asks to be reset.
    pub fn asks_for_reset(&self) -> Result<bool, Failure> {
        let status = self.status()?;
        Ok(status != status::NOBODY && status & status::NEEDS_RESET != 0)
    }

    fn take_used(&mut self) -> Answer {
        let index = &mut self.used[usize::from(REQUESTS)];
        let entry = RING_SPACE * u64::from(REQUESTS) + 0x2004 + 8 * u64::from(*index % QUEUE_SIZE);
        *index = index.wrapping_add(1);
        let written = u32::from_le_bytes(self.memory.read(entry + 4, 4).try_into().unwrap_or_default());
        if written == 0 { Answer::Unused } else { self.reply(written) }
    }

    /// Waits for a reply alone, wherever the used ring may be.
    pub fn await_reply(&self) -> Result<Answer, Failure> {
        let start = Instant::now();
        // The number of the request, which the header ends with.
        while self.memory.load(REPLY + 8) == 0 {
            if self.asks_for_reset()? {
                return Ok(Answer::NeedsReset);
            }
            if start.elapsed() > PATIENCE {
                return Ok(Answer::Silence);
            }
            thread::sleep(POLL);
        }
        Ok(self.reply(16))
    }

    /// The reply of so many bytes that is where replies go.
    pub fn reply(&self, written: u32) -> Answer {
        let reply = self.memory.read(REPLY, written.clamp(16, REPLY_ROOM) as usize);
        match i32::from_le_bytes(reply[4..8].try_into().unwrap_or_default()) {
            0 => Answer::Done(reply[16..].to_vec()),
            error => Answer::Errno(-error),
        }
    }
}
