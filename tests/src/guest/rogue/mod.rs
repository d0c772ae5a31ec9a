//! A guest that drives a virtio-fs device itself, and lies: root with the kernel's own means (sysfs, /dev/mem), no module.
//!
//! It takes two devices that the kernel's driver has let go of, one of a writable share and one of a read-only share that has
//! the same in it, and makes attempts ([`attempts`]) to get out of the share, to take the device down for good, or to take
//! the virtual machine with it. After each, both devices must come back with a reset, and serve a file.

mod attempts;
mod device;
mod function;
mod fuse;
mod io;
mod memory;
mod operations;

use std::fmt::Display;

use self::attempts::Attempt;
use self::device::{Answer, Device};
use self::fuse::ROOT;
use self::memory::DmaMemory;
use super::data::Content;
use super::{Failure, Tried};

/// What `file` of both shares contains.
pub const SHARED_FILE: Content = Content { seed: 6, len: 10_000 };

/// What `big` of both shares contains.
pub const SHARED_BIG: Content = Content { seed: 7, len: 16 << 20 };

/// What the file beside the shares contains that no reply may show.
pub const SECRET: &str = "a secret of the host, which no guest may see";

/// Names of the writable share's set-id programs (mode 06755), one for each way to write.
pub const PROGRAMS: [&str; 8] = [
    "program-write",
    "program-open",
    "program-create",
    "program-setattr",
    "program-chown",
    "program-fallocate",
    "program-copy",
    "program-map",
];

/// What an answer must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// A reply of success.
    Done,
    /// A reply of an error.
    Errno(i32),
    /// The chain with nothing written.
    Unused,
    /// The device asks to be reset.
    NeedsReset,
    /// No answer.
    Silence,
    /// A reply of any kind, or the chain with nothing written: the device goes on.
    Served,
    /// What follows from nonsense need only be harmless.
    Anything,
}

/// The devices, and how an attempt goes.
pub struct Rogue {
    /// That of the writable share.
    device: Device,
    /// That of the read-only share.
    read_only: Device,
    attempts: Vec<Attempt>,
    tried: Tried,
}

impl Rogue {
    /// Takes the devices at two PCI addresses, which have no driver: that of the writable share, and that of the read-only one.
    pub fn take(writable: &str, read_only: &str) -> Result<Rogue, Failure> {
        DmaMemory::reserve(2)?;
        let (device, read_only) = (Device::take(writable)?, Device::take(read_only)?);
        let mut rogue = Rogue {
            device,
            read_only,
            attempts: attempts::all(),
            tried: Tried { answers: 0, wrong: Vec::new() },
        };
        rogue.recover()?;
        Ok(rogue)
    }

    /// The names of all attempts.
    pub fn names(&self) -> Vec<String> {
        self.attempts.iter().map(|attempt| attempt.name.clone()).collect()
    }

    /// Makes an attempt, then has both devices recover.
    pub fn attempt(&mut self, name: &str) -> Result<Tried, Failure> {
        let position = self.attempts.iter().position(|attempt| attempt.name == name);
        let position = position.ok_or_else(|| Failure::new(format!("no attempt is called {name}")))?;
        self.tried = Tried { answers: 0, wrong: Vec::new() };
        let attempt = self.attempts.swap_remove(position);
        let outcome = (attempt.run)(self);
        self.attempts.push(attempt);
        if let Err(failure) = outcome {
            self.tried.wrong.push(failure.text);
        }
        if let Err(failure) = self.recover() {
            self.tried.wrong.push(format!("afterwards {}", failure.text));
        }
        Ok(self.tried.clone())
    }

    /// Puts everything back in its place, resets both devices, and reads a file of each as a driver that works.
    fn recover(&mut self) -> Result<(), Failure> {
        for (device, share) in [(&mut self.device, "writable"), (&mut self.read_only, "read-only")] {
            let recovered = device.function.restore().and_then(|()| device.start());
            let recovered = recovered.and_then(|()| device.init()).and_then(|()| device.read_file());
            recovered.map_err(|failure| failure.within(format_args!("the device of the {share} share")))?;
        }
        Ok(())
    }

    /// Leaves the devices as they were found, for the kernel's driver.
    pub fn leave(mut self) -> Result<(), Failure> {
        for device in [&mut self.device, &mut self.read_only] {
            device.function.restore()?;
            device.reset()?;
            device.function.leave()?;
        }
        DmaMemory::reserve(0)
    }

    /// Notes an answer that must be another one.
    fn expect(&mut self, what: impl Display, expected: Expected, answer: Answer) {
        self.tried.answers += 1;
        let is_right = match (expected, &answer) {
            (Expected::Anything, _) | (Expected::Done, Answer::Done(_)) => true,
            (Expected::Errno(expected), Answer::Errno(errno)) => expected == *errno,
            (Expected::Unused, Answer::Unused) => true,
            (Expected::NeedsReset, Answer::NeedsReset) => true,
            (Expected::Silence, Answer::Silence) => true,
            (Expected::Served, Answer::Done(_) | Answer::Errno(_) | Answer::Unused) => true,
            _ => false,
        };
        if !is_right {
            let shown: String = format!("{answer:?}").chars().take(60).collect();
            self.tried.wrong.push(format!("{what}: {shown}, not {expected:?}"));
        }
        if let Answer::Done(reply) = answer
            && reply.windows(SECRET.len()).any(|window| window == SECRET.as_bytes())
        {
            self.tried.wrong.push(format!("{what} shows the secret"));
        }
    }

    /// Notes a value that must be another one.
    fn expect_value(&mut self, what: impl Display, expected: u64, value: u64) {
        self.tried.answers += 1;
        if value != expected {
            self.tried.wrong.push(format!("{what}: {value:#x}, not {expected:#x}"));
        }
    }

    /// Sends a request to the writable share's device and notes the answer if it is not as expected.
    fn try_call(
        &mut self,
        what: impl Display,
        expected: Expected,
        code: u32,
        node: u64,
        parts: &[Vec<u8>],
    ) -> Result<(), Failure> {
        let parts: Vec<_> = parts.iter().map(Vec::as_slice).collect();
        let answer = self.device.call(code, node, &parts)?;
        self.expect(what, expected, answer);
        Ok(())
    }

    /// The shared file and directory of the writable share.
    fn nodes(&mut self) -> Result<(u64, u64), Failure> {
        Ok((self.device.lookup(ROOT, "file")?, self.device.lookup(ROOT, "directory")?))
    }
}
