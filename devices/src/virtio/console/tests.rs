//! Ports as a Linux driver uses them, and as none does.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vm_memory::ByteValued;

use super::control::{Message, event};
use super::{ConsoleDevice, MAX_PORTS, Port};
use crate::virtio::device::VirtioDevice;
use crate::virtio::testing::{BUFFERS, FakeDriver, MEMORY_SIZE, readable, wait_for, writable};

const MULTIPORT: u64 = 2;
/// Queues: of the first port, of control messages, of the second port.
const IN: usize = 0;
const OUT: usize = 1;
const TO_DRIVER: usize = 2;
const FROM_DRIVER: usize = 3;
const SECOND_IN: usize = 4;
const SECOND_OUT: usize = 5;

/// Where control messages are put.
const CONTROL_IN: u64 = BUFFERS;
const CONTROL_OUT: u64 = BUFFERS + 0x1_0000;
const DATA: u64 = BUFFERS + 0x2_0000;
/// Outside of guest memory.
const HOLE: u64 = MEMORY_SIZE + 0x1000;

fn port(name: &str, input: Option<OwnedFd>, output: Option<OwnedFd>) -> Port {
    Port { name: name.into(), input, output }
}

struct Console {
    device: ConsoleDevice,
    driver: FakeDriver,
}

impl Console {
    /// A device whose driver has said nothing yet.
    fn silent(ports: Vec<Port>) -> Console {
        let mut device = ConsoleDevice::new(ports).unwrap();
        let driver = FakeDriver::new(&mut device, MULTIPORT);
        Console { device, driver }
    }

    /// A device all of whose ports the driver has open.
    fn open(ports: Vec<Port>) -> Console {
        let count = ports.len() as u32;
        let mut console = Console::silent(ports);
        console.say(u32::MAX, event::DEVICE_READY, 1);
        for id in 0..count {
            assert_eq!(console.hear(), (id, event::PORT_ADD, 0, Vec::new()));
        }
        for id in 0..count {
            console.say(id, event::PORT_READY, 1);
            assert_eq!(console.hear().1, event::PORT_NAME);
            assert_eq!(console.hear(), (id, event::PORT_OPEN, 1, Vec::new()));
            console.say(id, event::PORT_OPEN, 1);
        }
        console
    }

    fn say(&mut self, id: u32, event: u16, value: u16) {
        let message = Message { id: id.into(), event: event.into(), value: value.into() };
        self.driver.write(CONTROL_OUT, message.as_slice());
        self.driver.send(FROM_DRIVER, &[readable(CONTROL_OUT, 8)]);
        self.driver.wait_used(FROM_DRIVER);
    }

    /// The next control message, with what follows it.
    fn hear(&mut self) -> (u32, u16, u16, Vec<u8>) {
        self.driver.send(TO_DRIVER, &[writable(CONTROL_IN, 512)]);
        let (_, len) = self.driver.wait_used(TO_DRIVER);
        let bytes = self.driver.read(CONTROL_IN, len as usize);
        let message = Message::from_slice(&bytes[..8]).unwrap();
        let (event, value) = (message.event.to_native(), message.value.to_native());
        (message.id.to_native(), event, value, bytes[8..].to_vec())
    }

    /// Offers one buffer for the first port's input; returns what arrived.
    fn input(&mut self, size: u32) -> Vec<u8> {
        self.driver.send(IN, &[writable(DATA, size)]);
        let (_, len) = self.driver.wait_used(IN);
        self.driver.read(DATA, len as usize)
    }

    fn output(&mut self, data: &[u8]) {
        self.driver.write(DATA, data);
        self.driver.send(OUT, &[readable(DATA, data.len() as u32)]);
    }
}

fn pipe() -> (File, OwnedFd) {
    let (reader, writer) = io::pipe().unwrap();
    (File::from(OwnedFd::from(reader)), writer.into())
}

/// A port of whose output the reader is returned.
fn output_port() -> (Port, File) {
    let (reader, writer) = pipe();
    (port("out", None, Some(writer)), reader)
}

/// A port of whose input the writer is returned.
fn input_port() -> (Port, File) {
    let (reader, writer) = pipe();
    (port("in", Some(reader.into()), None), writer.into())
}

/// A fixed sequence of bytes that does not repeat for long.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let next = move |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(next).collect()
}

#[test]
fn ports_that_cannot_be_are_refused() {
    let refusal = |names: &[&str]| {
        let ports = names.iter().map(|name| port(name, None, None)).collect();
        ConsoleDevice::new(ports).err().expect("the ports are refused").to_string()
    };
    assert!(refusal(&[]).contains("1 to 31 ports, not 0"));
    assert!(refusal(&[""]).contains("1 to 255 bytes"));
    assert!(refusal(&["a\0b"]).contains("no NUL"));
    assert!(refusal(&[&"n".repeat(256)]).contains("1 to 255 bytes"));
    assert!(refusal(&["a", "b", "a"]).contains("Two ports have the name \"a\""));
    let names: Vec<_> = (0..=MAX_PORTS).map(|i| i.to_string()).collect();
    let names: Vec<_> = names.iter().map(|name| &name[..]).collect();
    assert!(refusal(&names).contains("not 32"));
}

#[test]
fn the_transport_sees_ports_and_queues() {
    let (input, _writer) = input_port();
    let device = ConsoleDevice::new(vec![input, port("b", None, None)]).unwrap();
    assert_eq!((device.device_type(), device.features()), (3, MULTIPORT));
    assert_eq!(device.queue_max_sizes(), [64, 128, 32, 32, 4, 128]);
    let mut space = [0xff; 12];
    device.read_config(0, &mut space);
    assert_eq!(space, [0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn ports_are_introduced_as_the_specification_says() {
    let mut console = Console::silent(vec![port("first", None, None), port("second", None, None)]);
    console.say(u32::MAX, event::DEVICE_READY, 1);
    assert_eq!(console.hear(), (0, event::PORT_ADD, 0, Vec::new()));
    // The driver answers before it has heard of the other one.
    console.say(0, event::PORT_READY, 1);
    assert_eq!(console.hear(), (0, event::PORT_NAME, 1, b"first".to_vec()));
    assert_eq!(console.hear(), (0, event::PORT_OPEN, 1, Vec::new()));
    assert_eq!(console.hear(), (1, event::PORT_ADD, 0, Vec::new()));
    console.say(1, event::PORT_READY, 1);
    assert_eq!(console.hear(), (1, event::PORT_NAME, 1, b"second".to_vec()));
    assert_eq!(console.hear(), (1, event::PORT_OPEN, 1, Vec::new()));
}

#[test]
fn control_messages_of_no_sense_are_ignored() {
    let mut console = Console::silent(vec![port("first", None, None)]);
    for id in [0, 1, 2, 1 << 16, u32::MAX] {
        for event in (0..=9).chain([u16::MAX]).filter(|event| *event != event::DEVICE_READY) {
            for value in [0, 2, u16::MAX] {
                console.say(id, event, value);
            }
        }
    }
    console.say(0, event::DEVICE_READY, 0);
    let chains = [
        &[readable(CONTROL_OUT, 7)][..],
        &[readable(CONTROL_OUT, 0)],
        &[writable(CONTROL_OUT, 8)],
        &[readable(CONTROL_OUT, 4), writable(CONTROL_OUT, 4)],
    ];
    for chain in chains {
        console.driver.send(FROM_DRIVER, chain);
        assert_eq!(console.driver.wait_used(FROM_DRIVER).1, 0);
    }
    // Cut in pieces it makes sense.
    let message = Message { id: u32::MAX.into(), event: 0.into(), value: 1.into() };
    console.driver.write(CONTROL_OUT, message.as_slice());
    let pieces = [0, 1, 5, 2].iter().scan(CONTROL_OUT, |at, len| {
        *at += len;
        Some(readable(*at - len, *len as u32))
    });
    console.driver.send(FROM_DRIVER, &pieces.collect::<Vec<_>>());
    console.driver.wait_used(FROM_DRIVER);
    // Buffers that are too small or of the wrong kind are given back empty.
    for chain in [[writable(CONTROL_IN, 7)], [writable(CONTROL_IN, 0)], [readable(CONTROL_IN, 8)]] {
        console.driver.send(TO_DRIVER, &chain);
        assert_eq!(console.driver.wait_used(TO_DRIVER).1, 0);
    }
    assert_eq!(console.hear(), (0, event::PORT_ADD, 0, Vec::new()));
    assert_eq!(console.driver.resets(), 0);
}

#[test]
fn buffers_outside_of_memory_need_a_reset() {
    for queue in [IN, OUT, TO_DRIVER, FROM_DRIVER] {
        let (reader, input) = pipe();
        let (_output, writer) = pipe();
        let mut console = Console::open(vec![port("port", Some(reader.into()), Some(writer))]);
        let mut input = File::from(input);
        input.write_all(b"data").unwrap();
        // There is something to say.
        console.say(0, event::PORT_READY, 1);
        let address = if queue == IN { MEMORY_SIZE - 1 } else { HOLE };
        let buffer = if queue == OUT || queue == FROM_DRIVER { readable } else { writable };
        console.driver.send(queue, &[buffer(address, 64)]);
        wait_for("the call for a reset", || console.driver.resets() == 1);
        assert!(console.device.ports().drain(Duration::from_secs(20)), "a dead queue holds nobody up");
        console.device.reset();
        // It can be used again.
        console.driver = FakeDriver::new(&mut console.device, MULTIPORT);
        console.say(u32::MAX, event::DEVICE_READY, 1);
        assert_eq!(console.hear().1, event::PORT_ADD);
    }
}

#[test]
fn rings_that_lie_need_a_reset() {
    let (output, _reader) = output_port();
    let mut console = Console::open(vec![output]);
    // More chains than the ring holds.
    for _ in 0..300 {
        console.driver.add(OUT, &[readable(DATA, 1)]);
    }
    console.driver.ring(OUT);
    wait_for("the call for a reset", || console.driver.resets() == 1);
}

#[test]
fn output_of_all_shapes_keeps_its_order() {
    let (output, mut reader) = output_port();
    let mut console = Console::open(vec![output]);
    let data = noise(1 << 16);
    console.driver.write(DATA, &data);
    let mut at = 0;
    let mut expected: Vec<u8> = Vec::new();
    for lens in [&[1][..], &[0], &[0, 0, 5, 0], &[4096, 1, 4095], &[32768], &[7; 40], &[0, 10]] {
        let mut chain = Vec::new();
        for len in lens {
            chain.push(readable(DATA + at as u64, *len as u32));
            // What the device could write is no output.
            chain.push(writable(DATA + 0x2_0000, 512));
            expected.extend(&data[at..at + len]);
            at += len;
        }
        console.driver.send(OUT, &chain);
        assert_eq!(console.driver.wait_used(OUT).1, 0);
    }
    let mut got = vec![0; expected.len()];
    reader.read_exact(&mut got).unwrap();
    assert!(got == expected);
    assert_eq!(console.device.ports().counters()[0].bytes_out, expected.len() as u64);
}

#[test]
fn a_batch_costs_one_interrupt() {
    let (output, mut reader) = output_port();
    let mut console = Console::open(vec![output]);
    // The thread has had its first look at the ring, and waits for the doorbell soon.
    assert!(console.device.ports().drain(Duration::from_secs(20)));
    std::thread::sleep(Duration::from_millis(5));
    console.driver.write(DATA, &noise(100));
    for i in 0..100 {
        console.driver.add(OUT, &[readable(DATA + i, 1)]);
    }
    console.driver.ring(OUT);
    let mut got = [0; 100];
    reader.read_exact(&mut got).unwrap();
    assert_eq!(got[..], noise(100));
    for _ in 0..100 {
        console.driver.wait_used(OUT);
    }
    assert!(console.device.ports().drain(Duration::from_secs(20)));
    // One more where the thread was not asleep yet.
    assert!(console.driver.interrupts(OUT) <= 2);
}

#[test]
fn sixty_four_mebibytes_go_through_a_port_each_way() {
    const TOTAL: usize = 64 << 20;
    const BUFFER: usize = 32 << 10;
    let ((reader, writer), (mut sink, out)) = (pipe(), pipe());
    let mut console = Console::open(vec![port("both", Some(reader.into()), Some(out))]);
    let data = Arc::new(noise(1 << 20));
    let (to_send, to_expect) = (Arc::clone(&data), Arc::clone(&data));
    let feeder = std::thread::spawn(move || {
        let mut writer = File::from(writer);
        (0..TOTAL >> 20).for_each(|_| writer.write_all(&to_send).unwrap());
    });
    let checker = std::thread::spawn(move || {
        let mut chunk = vec![0; 1 << 20];
        for _ in 0..TOTAL >> 20 {
            sink.read_exact(&mut chunk).unwrap();
            assert!(chunk == *to_expect);
        }
    });
    // 64 buffers for each direction; what comes in is sent back as it is.
    let buffer = |i: usize| DATA + (i % 64 * BUFFER) as u64;
    let echo = |i: usize| DATA + (4 << 20) + (i % 64 * BUFFER) as u64;
    let (mut offered, mut received, mut sent, mut done, mut bytes) = (0, 0, 0, 0, 0);
    let start = Instant::now();
    while bytes < TOTAL || done < sent {
        let before = (offered, received, done);
        while offered < received + 64 {
            console.driver.add(IN, &[writable(buffer(offered), BUFFER as u32)]);
            offered += 1;
        }
        while sent < done + 64
            && let Some((_, len)) = console.driver.used(IN)
        {
            let data = console.driver.read(buffer(received), len as usize);
            console.driver.write(echo(sent), &data);
            console.driver.add(OUT, &[readable(echo(sent), len)]);
            received += 1;
            sent += 1;
            bytes += len as usize;
        }
        while console.driver.used(OUT).is_some() {
            done += 1;
        }
        if before == (offered, received, done) {
            assert!(start.elapsed() < Duration::from_secs(120), "it goes on");
            std::thread::yield_now();
        } else {
            console.driver.ring(IN);
            console.driver.ring(OUT);
        }
    }
    feeder.join().unwrap();
    checker.join().unwrap();
    let counters = &console.device.ports().counters()[0];
    assert_eq!((counters.bytes_in, counters.bytes_out), (TOTAL as u64, TOTAL as u64));
}

#[test]
fn input_waits_until_the_guest_has_the_port_open() {
    let (input, mut writer) = input_port();
    let mut console = Console::silent(vec![input]);
    writer.write_all(b"early").unwrap();
    console.driver.send(IN, &[writable(DATA, 64)]);
    console.say(u32::MAX, event::DEVICE_READY, 1);
    console.hear();
    console.say(0, event::PORT_READY, 1);
    console.hear();
    console.hear();
    assert_eq!(console.driver.used(IN), None);
    console.say(0, event::PORT_OPEN, 1);
    assert_eq!(console.driver.wait_used(IN).1, 5);
    assert_eq!(console.driver.read(DATA, 5), b"early");
    // Closed again, it waits again.
    console.say(0, event::PORT_OPEN, 0);
    console.driver.send(IN, &[writable(DATA, 64)]);
    writer.write_all(b"late").unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(console.driver.used(IN), None);
    console.say(0, event::PORT_OPEN, 1);
    assert_eq!(console.driver.wait_used(IN).1, 4);
}

#[test]
fn input_fills_buffers_of_all_shapes_and_its_end_closes_the_port() {
    let (input, mut writer) = input_port();
    let mut console = Console::open(vec![input]);
    let data = noise(1000);
    writer.write_all(&data).unwrap();
    console.driver.add(IN, &[writable(DATA, 10), writable(DATA + 10, 0), writable(DATA + 10, 90)]);
    console.driver.add(IN, &[writable(DATA + 100, 0)]);
    console.driver.add(IN, &[readable(DATA + 100, 50)]);
    console.driver.add(IN, &[writable(DATA + 100, 1900)]);
    console.driver.add(IN, &[writable(DATA + 4096, 100)]);
    console.driver.ring(IN);
    // Chains without room come back at once, whatever is before them.
    let mut lens: Vec<_> = (0..4).map(|_| console.driver.wait_used(IN).1).collect();
    lens.sort();
    assert_eq!(lens, [0, 0, 100, 900]);
    assert_eq!(console.driver.read(DATA, 1000), data);
    assert_eq!(console.driver.used(IN), None, "the last buffer was put back");
    writer.write_all(b"end").unwrap();
    drop(writer);
    assert_eq!(console.driver.wait_used(IN).1, 3);
    assert_eq!(console.driver.read(DATA + 4096, 3), b"end");
    // The end is found when there are buffers again.
    console.driver.send(IN, &[writable(DATA, 100)]);
    assert_eq!(console.hear(), (0, event::PORT_OPEN, 0, Vec::new()));
    assert_eq!(console.driver.used(IN), None);
}

#[test]
fn files_that_cannot_be_polled_are_inputs_and_outputs_too() {
    let mut source = tempfile::tempfile().unwrap();
    source.write_all(b"skipped and read").unwrap();
    source.seek(io::SeekFrom::Start(12)).unwrap();
    let mut sink = tempfile::tempfile().unwrap();
    sink.write_all(b"before ").unwrap();
    let null = || File::options().read(true).write(true).open("/dev/null").unwrap();
    let mut console = Console::open(vec![
        port("file", Some(source.into()), Some(sink.try_clone().unwrap().into())),
        port("null", Some(null().into()), Some(null().into())),
    ]);
    assert_eq!(console.input(64), b"read");
    console.driver.send(IN, &[writable(DATA, 64)]);
    assert_eq!(console.hear(), (0, event::PORT_OPEN, 0, Vec::new()));
    console.driver.send(SECOND_IN, &[writable(DATA, 64)]);
    assert_eq!(console.hear(), (1, event::PORT_OPEN, 0, Vec::new()));
    console.output(b"behind");
    console.driver.send(SECOND_OUT, &[readable(DATA, 64)]);
    console.driver.wait_used(SECOND_OUT);
    console.driver.wait_used(OUT);
    let mut text = String::new();
    sink.rewind().unwrap();
    sink.read_to_string(&mut text).unwrap();
    assert_eq!(text, "before behind");
}

#[test]
fn a_description_that_somebody_made_non_blocking_works_and_none_is_made_so() {
    let flags = |fd: &OwnedFd| rustix::fs::fcntl_getfl(fd).unwrap();
    let (output, mut reader) = output_port();
    let writer = output.output.as_ref().unwrap().try_clone().unwrap();
    let before = flags(&writer);
    let (input, mut source) = input_port();
    rustix::fs::fcntl_setfl(input.input.as_ref().unwrap(), rustix::fs::OFlags::NONBLOCK).unwrap();
    let mut console = Console::open(vec![Port { name: "both".into(), output: output.output, ..input }]);
    console.output(b"blocking");
    console.driver.wait_used(OUT);
    assert_eq!(flags(&writer), before);
    rustix::fs::fcntl_setfl(&writer, before | rustix::fs::OFlags::NONBLOCK).unwrap();
    // Much more than the pipe holds.
    let data = noise(1 << 20);
    console.output(&data);
    let mut got = vec![0; 8 + data.len()];
    reader.read_exact(&mut got).unwrap();
    assert!(got[8..] == data);
    source.write_all(b"input").unwrap();
    assert_eq!(console.input(64), b"input");
}

#[test]
fn a_reader_that_has_gone_is_reported_once_and_holds_nobody_up() {
    let (output, reader) = output_port();
    let mut console = Console::open(vec![output]);
    let ports = console.device.ports();
    drop(reader);
    for _ in 0..3 {
        console.output(&noise(1 << 20));
        console.driver.wait_used(OUT);
    }
    let reports = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&reports);
    ports.on_output_closed(move |name, error| {
        seen.lock().unwrap().push((name.to_owned(), error.kind()));
    });
    assert_eq!(*reports.lock().unwrap(), [("out".to_owned(), io::ErrorKind::BrokenPipe)]);
    console.device.reset();
    console.driver = FakeDriver::new(&mut console.device, MULTIPORT);
    console.output(b"more");
    console.driver.wait_used(OUT);
    assert!(ports.drain(Duration::from_secs(20)));
    assert_eq!(reports.lock().unwrap().len(), 1);
    assert_eq!(ports.counters()[0].bytes_out, 0);
}

#[test]
fn whoever_listens_before_hears_of_it_when_it_happens() {
    let (output, reader) = output_port();
    let mut console = Console::open(vec![output]);
    let (sender, receiver) = std::sync::mpsc::channel();
    console.device.ports().on_output_closed(move |name, _| sender.send(name.to_owned()).unwrap());
    drop(reader);
    console.output(b"data");
    assert_eq!(receiver.recv_timeout(Duration::from_secs(20)).unwrap(), "out");
}

#[test]
fn a_device_whose_output_nobody_reads_stops_at_once() {
    let (output, mut reader) = output_port();
    let mut console = Console::open(vec![output]);
    let data = noise(1 << 20);
    console.output(&data);
    // What the pipe holds is in it, and the thread blocks.
    // SAFETY: fcntl(2) with this command takes no pointer.
    let len = unsafe { libc::fcntl(reader.as_raw_fd(), libc::F_GETPIPE_SZ) };
    wait_for("a full pipe", || rustix::io::ioctl_fionread(&reader).unwrap() == len as u64);
    assert!(!console.device.ports().drain(Duration::from_millis(30)));
    let start = Instant::now();
    console.device.reset();
    assert!(start.elapsed() < Duration::from_secs(2));
    assert_eq!(console.driver.used(OUT), None);
    assert!(console.device.ports().drain(Duration::ZERO), "nobody has anything to drain");
    drop(console);
    let mut got = Vec::new();
    reader.read_to_end(&mut got).unwrap();
    assert!(got == data[..got.len()]);
}

#[test]
fn a_terminal_is_an_input_and_an_output_and_holds_nobody_up() {
    let (mut user, mut terminal) = (-1, -1);
    let (name, attributes, size) = (std::ptr::null_mut(), std::ptr::null(), std::ptr::null());
    // SAFETY: two integers to write to, and no name, attributes and size.
    assert_eq!(unsafe { libc::openpty(&mut user, &mut terminal, name, attributes, size) }, 0);
    // SAFETY: both were just opened, and nobody else owns them.
    let [mut user, terminal] = [user, terminal].map(|fd| unsafe { File::from_raw_fd(fd) });
    let input = terminal.try_clone().unwrap().into();
    let mut console = Console::open(vec![port("tty", Some(input), Some(terminal.into()))]);
    user.write_all(b"line\n").unwrap();
    assert_eq!(console.input(64), b"line\n");
    let mut echo = [0; 6];
    user.read_exact(&mut echo).unwrap();
    assert_eq!(&echo, b"line\r\n");
    console.output(b"output");
    user.read_exact(&mut echo).unwrap();
    assert_eq!(&echo, b"output");
    // Much more than a terminal takes when nobody looks.
    console.output(&[b'x'; 1 << 20]);
    console.driver.send(IN, &[writable(DATA + (2 << 20), 64)]);
    std::thread::sleep(Duration::from_millis(50));
    let start = Instant::now();
    console.device.reset();
    assert!(start.elapsed() < Duration::from_secs(2));
    assert_eq!((console.driver.used(IN), console.driver.wait_used(OUT).1), (None, 0));
    assert_eq!(console.driver.used(OUT), None);
}

#[test]
fn a_device_whose_input_never_comes_stops_at_once() {
    let (input, _writer) = input_port();
    let mut console = Console::open(vec![input]);
    console.driver.send(IN, &[writable(DATA, 100)]);
    std::thread::sleep(Duration::from_millis(5));
    let start = Instant::now();
    console.device.reset();
    assert!(start.elapsed() < Duration::from_secs(2));
}

#[test]
fn chains_without_room_are_given_back_in_their_turn() {
    let (input, mut writer) = input_port();
    let mut console = Console::open(vec![input]);
    let driver = &mut console.driver;
    let first = driver.add(IN, &[writable(DATA, 4)]);
    let without_room = driver.add(IN, &[readable(DATA, 4)]);
    let last = driver.send(IN, &[writable(DATA + 4, 4)]);
    writer.write_all(b"ab").unwrap();
    assert_eq!(driver.wait_used(IN), (first, 2));
    writer.write_all(b"cd").unwrap();
    assert_eq!([driver.wait_used(IN), driver.wait_used(IN)], [(without_room, 0), (last, 2)]);
    assert_eq!((driver.read(DATA, 2), driver.read(DATA + 4, 2)), (b"ab".to_vec(), b"cd".to_vec()));
}

#[test]
fn draining_waits_for_what_was_there_and_for_no_more() {
    let (output, mut reader) = output_port();
    let mut console = Console::open(vec![output]);
    let ports = console.device.ports();
    assert!(ports.drain(Duration::from_secs(20)), "there is nothing");
    console.output(&noise(1 << 20));
    let waiting = std::thread::spawn(move || ports.drain(Duration::from_secs(20)));
    let mut got = vec![0; 1 << 20];
    reader.read_exact(&mut got).unwrap();
    assert!(waiting.join().unwrap());
    assert!(console.driver.used(OUT).is_some());
    assert!(super::PortsHandle::default().drain(Duration::ZERO), "no ports, nothing to drain");
}

#[test]
fn memory_that_cannot_be_accessed_loses_its_data_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("mapped");
    let file = File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap();
    file.set_len(8192).unwrap();
    let (output, mut reader) = output_port();
    let mut device = ConsoleDevice::new(vec![output]).unwrap();
    let driver = FakeDriver::idle(device.queue_max_sizes());
    // As a window shows a file which the host then truncates.
    let address = driver.host_address(DATA);
    let flags = libc::MAP_SHARED | libc::MAP_FIXED;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the two pages are part of the driver's memory, into which nobody holds a reference.
    let mapped = unsafe { libc::mmap(address.cast(), 8192, protection, flags, file.as_raw_fd(), 0) };
    assert_ne!(mapped, libc::MAP_FAILED);
    driver.write(DATA, &[b'w'; 8192]);
    file.set_len(4096).unwrap();
    driver.write(DATA + 8192, b"behind");
    driver.activate(&mut device, MULTIPORT);
    let mut console = Console { device, driver };
    console.driver.send(OUT, &[readable(DATA + 4096, 4096), readable(DATA + 8192, 6)]);
    console.driver.wait_used(OUT);
    let mut got = [0; 6];
    reader.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"behind");
}

#[test]
fn without_control_messages_the_only_port_is_open() {
    let (reader, writer) = pipe();
    let mut writer = File::from(writer);
    let (mut sink, out) = pipe();
    let mut device = ConsoleDevice::new(vec![port("port", Some(reader.into()), Some(out))]).unwrap();
    let driver = FakeDriver::idle(&device.queue_max_sizes()[..2]);
    driver.activate(&mut device, 0);
    let mut console = Console { device, driver };
    writer.write_all(b"in").unwrap();
    assert_eq!(console.input(64), b"in");
    console.output(b"out");
    let mut got = [0; 3];
    sink.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"out");
}
