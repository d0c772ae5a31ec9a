//! Moves bytes between a descriptor of the command and a port, without ever blocking in a read or a write: a thread that
//! waits can be told to stop.
//!
//! The descriptors that a pump reads and writes must have O_NONBLOCK, and no one else may share their descriptions.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, splice};

/// Bytes in a pipe of the command, and so the most that one splice puts into an entry of a port's queue: a full queue of
/// such pages, which a slow reader leaves there, is memory of the guest (16 MiB with 128 entries).
pub const PIPE_SIZE: usize = 128 << 10;
/// Bytes that are copied at a time.
const CHUNK: usize = 64 << 10;

/// What a pump is told. Later ones replace earlier ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
#[repr(u8)]
pub enum Order {
    /// Move bytes until the source ends.
    Run,
    /// Move what is there now, then stop.
    Drain,
    /// Stop.
    Close,
}

/// Tells a pump what to do.
#[derive(Debug)]
pub struct Switch {
    event: OwnedFd,
    order: AtomicU8,
}

impl Switch {
    /// A switch at [`Order::Run`].
    pub fn new() -> io::Result<Switch> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Switch { event, order: AtomicU8::new(Order::Run as u8) })
    }

    /// Gives an order, and wakes the pump.
    pub fn set(&self, order: Order) {
        self.order.fetch_max(order as u8, Ordering::SeqCst);
        // It can only fail when it has been woken 2^64 times before.
        let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
    }

    fn order(&self) -> Order {
        match self.order.load(Ordering::SeqCst) {
            0 => Order::Run,
            1 => Order::Drain,
            _ => Order::Close,
        }
    }

    /// Waits until `fd` has data or has ended. False when an order has come instead.
    pub fn readable(&self, fd: &impl AsFd) -> io::Result<bool> {
        let mut fds = [PollFd::new(fd, PollFlags::IN), PollFd::new(&self.event, PollFlags::IN)];
        wait(&mut fds, None)?;
        Ok(self.order() == Order::Run)
    }

    /// Waits until `fd` takes data. False when its reader has gone, or when the order is to give up: while it is
    /// `limit` or beyond.
    fn writable(&self, fd: &impl AsFd, limit: Order) -> io::Result<bool> {
        loop {
            let order = self.order();
            if order >= limit {
                return Ok(false);
            }
            let mut fds = [PollFd::new(fd, PollFlags::OUT), PollFd::new(&self.event, PollFlags::IN)];
            // An event that was seen stays, since it is for the other waits too.
            let waited = if order == Order::Run { 2 } else { 1 };
            wait(&mut fds[..waited], None)?;
            if fds[0].revents().contains(PollFlags::OUT) {
                return Ok(true);
            }
            if has_failed(&fds[0]) {
                return Ok(false);
            }
        }
    }
}

/// How an input came to its end.
#[derive(Debug, PartialEq, Eq)]
pub enum InputEnd {
    /// All of it was moved. Whether the last byte, if there was any, ended a line.
    End {
        /// True also when there was no byte.
        line: bool,
    },
    /// Nobody reads it any more, or the pump was stopped.
    Stopped,
}

/// Moves input from a port to the command, to its end.
pub fn input(from: &impl AsFd, to: &impl AsFd, switch: &Switch) -> io::Result<InputEnd> {
    let mut buffer = vec![0; CHUNK];
    let mut line = true;
    loop {
        // A reader that goes away is noticed while there is no input.
        let mut fds = [
            PollFd::new(from, PollFlags::IN),
            PollFd::new(to, PollFlags::empty()),
            PollFd::new(&switch.event, PollFlags::IN),
        ];
        wait(&mut fds, None)?;
        if switch.order() != Order::Run || has_failed(&fds[1]) {
            return Ok(InputEnd::Stopped);
        }
        let (len, end) = fill(from, &mut buffer)?;
        if let Some(last) = buffer[..len].last() {
            line = *last == b'\n';
        }
        if !write_all(to, &buffer[..len], switch, Order::Drain)? {
            return Ok(InputEnd::Stopped);
        }
        if end {
            return Ok(InputEnd::End { line });
        }
    }
}

/// Reads what is there, up to the buffer's size: a port gives a page at a time. Also whether the input has ended.
fn fill(from: &impl AsFd, buffer: &mut [u8]) -> io::Result<(usize, bool)> {
    let mut filled = 0;
    while filled < buffer.len() {
        match rustix::io::read(from, &mut buffer[filled..]) {
            Ok(0) => return Ok((filled, true)),
            Ok(len) => filled += len,
            Err(Errno::AGAIN) => break,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok((filled, false))
}

/// Moves output of the command to a port: until all writers have closed it, its reader has gone, or an order.
/// `by_pages`: whether pages may be spliced, which needs a pipe; else they are copied.
pub fn output(from: &impl AsFd, to: &impl AsFd, switch: &Switch, by_pages: bool) -> io::Result<()> {
    let mut by_pages = by_pages;
    let mut buffer = Vec::new();
    // A writer that was left behind may write for ever: what was there at the end is no more than this.
    let mut left = PIPE_SIZE;
    loop {
        let draining = match switch.order() {
            Order::Close => return Ok(()),
            Order::Drain => true,
            Order::Run => {
                if !switch.readable(from)? {
                    continue;
                }
                false
            }
        };
        let limit = if draining { left } else { PIPE_SIZE };
        if limit == 0 || !has_data(from)? || !switch.writable(to, Order::Close)? {
            return Ok(());
        }
        let moved =
            if by_pages { splice_pages(from, to, limit) } else { copy(from, to, &mut buffer, limit, switch) };
        match moved {
            Ok(0) => return Ok(()),
            Ok(len) if draining => left -= len,
            Ok(_) => {}
            Err(Errno::INVAL) if by_pages => by_pages = false,
            Err(Errno::AGAIN | Errno::INTR) => {}
            // The terminal's last descriptor was closed, or the port's reader has gone.
            Err(Errno::IO | Errno::PIPE) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether there is something to read at this moment.
fn has_data(from: &impl AsFd) -> io::Result<bool> {
    let mut fds = [PollFd::new(from, PollFlags::IN)];
    wait(&mut fds, Some(&Timespec::default()))?;
    Ok(fds[0].revents().contains(PollFlags::IN))
}

fn splice_pages(from: &impl AsFd, to: &impl AsFd, limit: usize) -> Result<usize, Errno> {
    match splice(from, None, to, None, limit, SpliceFlags::MOVE | SpliceFlags::NONBLOCK)? {
        // There was data: the port has taken it out of the pipe and could not queue it.
        0 => Err(Errno::NOBUFS),
        len => Ok(len),
    }
}

fn copy(
    from: &impl AsFd,
    to: &impl AsFd,
    buffer: &mut Vec<u8>,
    limit: usize,
    switch: &Switch,
) -> Result<usize, Errno> {
    buffer.resize(CHUNK, 0);
    let len = rustix::io::read(from, &mut buffer[..limit.min(CHUNK)])?;
    match write_all(to, &buffer[..len], switch, Order::Close) {
        Ok(true) => Ok(len),
        Ok(false) => Err(Errno::PIPE),
        Err(error) => Err(Errno::from_io_error(&error).unwrap_or(Errno::IO)),
    }
}

/// Writes all of `bytes`. False when the reader has gone, or an order from `limit` on has come before the end.
fn write_all(to: &impl AsFd, mut bytes: &[u8], switch: &Switch, limit: Order) -> io::Result<bool> {
    while !bytes.is_empty() {
        match rustix::io::write(to, bytes) {
            Ok(len) => bytes = &bytes[len..],
            Err(Errno::AGAIN) if !switch.writable(to, limit)? => return Ok(false),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(Errno::PIPE | Errno::IO) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(true)
}

/// Writes all of `bytes` to a descriptor that does not block, however long it takes.
pub fn write_patiently(to: &impl AsFd, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(to, bytes) {
            Ok(len) => bytes = &bytes[len..],
            Err(Errno::AGAIN) => {
                let mut fds = [PollFd::new(to, PollFlags::OUT)];
                wait(&mut fds, None)?;
                if !fds[0].revents().contains(PollFlags::OUT) && has_failed(&fds[0]) {
                    return Err(Errno::PIPE.into());
                }
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn has_failed(fd: &PollFd<'_>) -> bool {
    fd.revents().intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL)
}

fn wait(fds: &mut [PollFd<'_>], timeout: Option<&Timespec>) -> io::Result<()> {
    match poll(fds, timeout) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
