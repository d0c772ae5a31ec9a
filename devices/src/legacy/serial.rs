//! The serial port (16550A), the guest's console.

use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};

use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};

use crate::bus::BusDevice;
use crate::interrupt::Interrupt;

struct Line(Arc<dyn Interrupt>);

impl Trigger for Line {
    type E = std::io::Error;
    fn trigger(&self) -> std::io::Result<()> {
        self.0.trigger()
    }
}

/// Tells whoever feeds the port that there is room again.
struct RoomAgain(Box<dyn Fn() + Send>);

impl SerialEvents for RoomAgain {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        (self.0)();
    }
}

type Port = Serial<Line, RoomAgain, Box<dyn Write + Send>>;

/// Registers, as offsets from the port's base, and their bits (8250 family).
const INTERRUPT_ENABLE: u64 = 1;
const INTERRUPT_ID: u64 = 2;
const LINE_CONTROL: u64 = 3;
#[cfg(test)]
const MODEM_CONTROL: u64 = 4;
const RECEIVED_DATA: u8 = 1;
const ID_NONE: u8 = 1;
const ID_MASK: u8 = 0xf;
const ID_RECEIVED_DATA: u8 = 4;
const DIVISOR_LATCH: u8 = 0x80;
#[cfg(test)]
const LOOP_BACK: u8 = 0x10;

/// A 16550A that writes what the guest sends to a writer.
///
/// The library's port forgets that there is received data with the first byte that is read. A driver that leaves bytes
/// in the FIFO (Linux stops after 256 in a row, which are more than the FIFO holds if it is fed meanwhile) would never
/// come back for them. So the interrupt identification says what a real port derives from the FIFO.
pub struct SerialPort {
    port: Mutex<Port>,
    /// Bytes that the FIFO holds.
    fifo_size: usize,
}

impl SerialPort {
    /// Ports taken.
    pub const SIZE: u64 = 8;

    /// A port that interrupts by `line` and sends to `out`; `room_again` is called, with the port locked, when the
    /// guest has read all that was fed.
    pub fn new(
        line: Arc<dyn Interrupt>,
        out: Box<dyn Write + Send>,
        room_again: impl Fn() + Send + 'static,
    ) -> SerialPort {
        let port = Serial::with_events(Line(line), RoomAgain(Box::new(room_again)), out);
        SerialPort { fifo_size: port.fifo_capacity(), port: Mutex::new(port) }
    }

    /// Bytes that [`SerialPort::feed`] would take now.
    pub fn room(&self) -> usize {
        self.lock().fifo_capacity()
    }

    /// Gives the guest input; returns how many bytes were taken. If the FIFO is full before they all are, `room_again` is
    /// called when there is room.
    ///
    /// None if nothing can be taken for another reason, and there is no call when that is over: a vCPU is at the port, for as
    /// long as who reads the output likes, or the guest tests it in loop-back mode. This never waits for either.
    pub fn feed(&self, input: &[u8]) -> Option<usize> {
        let mut port = match self.port.try_lock() {
            Ok(port) => port,
            Err(TryLockError::Poisoned(error)) => error.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        let input = &input[..input.len().min(port.fifo_capacity())];
        match port.enqueue_raw_bytes(input) {
            Ok(0) if !input.is_empty() => None,
            Ok(taken) => Some(taken),
            Err(error) => {
                tracing::warn!(%error, "Console input lost");
                Some(input.len())
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Port> {
        self.port.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Whether the guest wants an interrupt for received data, and there is some.
    fn has_news(&self, port: &mut Port) -> bool {
        // Reading these has no side effects; while the divisor is set, the other one is hidden behind it.
        let divisor = port.read(LINE_CONTROL as u8) & DIVISOR_LATCH != 0;
        !divisor
            && port.fifo_capacity() < self.fifo_size
            && port.read(INTERRUPT_ENABLE as u8) & RECEIVED_DATA != 0
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let [byte] = data {
            let mut port = self.lock();
            *byte = port.read(offset as u8);
            if offset == INTERRUPT_ID && *byte & ID_NONE != 0 && self.has_news(&mut port) {
                *byte = *byte & !ID_MASK | ID_RECEIVED_DATA;
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let [byte] = data {
            // A console whose reader has gone away is not the guest's fault: it goes on without one.
            let _ = self.lock().write(offset as u8, *byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

    #[derive(Default)]
    struct Counter(AtomicUsize);

    impl Interrupt for Counter {
        fn trigger(&self) -> std::io::Result<()> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    }

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend(data);
            Ok(data.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn bytes_go_both_ways_and_nothing_is_lost_when_the_fifo_is_full() {
        let (line, sink, rooms) =
            (Arc::new(Counter::default()), Sink::default(), Arc::new(AtomicUsize::new(0)));
        let again = rooms.clone();
        let port = SerialPort::new(line.clone(), Box::new(sink.clone()), move || {
            again.fetch_add(1, Ordering::Relaxed);
        });
        for byte in b"hello" {
            port.write(0, &[*byte]);
        }
        assert_eq!(*sink.0.lock().unwrap(), b"hello");

        port.write(1, &[1]);
        let input: Vec<u8> = (0..200).collect();
        let mut fed = 0;
        let mut got = Vec::new();
        while got.len() < input.len() {
            fed += port.feed(&input[fed..]).unwrap();
            while port.room() < 64 {
                let mut byte = [0];
                port.read(0, &mut byte);
                got.push(byte[0]);
            }
        }
        assert_eq!(got, input);
        assert!(rooms.load(Ordering::Relaxed) >= 4);
        assert!(line.0.load(Ordering::Relaxed) > 0);
    }

    fn read(port: &SerialPort, register: u64) -> u8 {
        let mut byte = [0];
        port.read(register, &mut byte);
        byte[0]
    }

    #[test]
    fn bytes_that_are_left_in_the_fifo_are_still_news() {
        let line = Arc::new(Counter::default());
        let port = SerialPort::new(line.clone(), Box::new(Sink::default()), || {});
        port.write(INTERRUPT_ENABLE, &[RECEIVED_DATA]);
        assert_eq!(read(&port, INTERRUPT_ID) & ID_MASK, ID_NONE);
        assert_eq!(port.feed(b"abc"), Some(3));
        for left in [b'a', b'b', b'c'] {
            assert_eq!(read(&port, INTERRUPT_ID) & ID_MASK, ID_RECEIVED_DATA, "before {left}");
            assert_eq!(read(&port, 0), left);
        }
        assert_eq!(read(&port, INTERRUPT_ID) & ID_MASK, ID_NONE);
    }

    #[test]
    fn feeding_waits_for_nobody() {
        /// Tells that it was written to, and comes back when it may.
        struct Blocked(SyncSender<()>, Receiver<()>);

        impl Write for Blocked {
            fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
                self.0.send(()).unwrap();
                self.1.recv().unwrap();
                Ok(data.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }

        let ((writes, is_written_to), (read, is_read)) = (sync_channel(1), sync_channel(1));
        let line = Arc::new(Counter::default());
        let port = SerialPort::new(line, Box::new(Blocked(writes, is_read)), || {});
        std::thread::scope(|scope| {
            scope.spawn(|| port.write(0, b"x"));
            is_written_to.recv().unwrap();
            assert_eq!(port.feed(b"abc"), None);
            read.send(()).unwrap();
        });
        assert_eq!(port.feed(b"abc"), Some(3));
        port.write(MODEM_CONTROL, &[LOOP_BACK]);
        assert_eq!(port.feed(b"abc"), None);
        port.write(MODEM_CONTROL, &[0]);
        assert_eq!(port.feed(&[b'x'; 100]), Some(61));
        assert_eq!(port.feed(b"x"), Some(0), "there will be a call");
    }
}
