//! Finds and opens the ports to the runner.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;

use super::Failure;
use super::protocol::{Command, PORT_CONTROL};
use super::session::{Control, Streams};

const CLASS: &str = "/sys/class/virtio-ports";
/// How long ports are waited for: the driver learns their names after it has started, by messages from the device.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(1);
/// VIRTIO_F_INDIRECT_DESC (virtio 1.2, 6).
const INDIRECT_DESC: usize = 28;

const WHAT: &str = "find the ports to the runner";

/// The open ports. None of them blocks.
pub struct Ports {
    /// The control port; it is connected.
    pub control: Control,
    /// The ports of the standard streams.
    pub streams: Streams,
}

/// Opens the control port and the ports of the streams.
///
/// # Errors
/// When a port does not appear, or cannot be opened.
pub fn open(command: &Command) -> Result<Ports, Failure> {
    let wanted: Vec<&str> = command.ports().into_iter().flatten().chain([PORT_CONTROL]).collect();
    let found = wait_for(&wanted)?;
    // Whoever connects them does so in their order, see `PORT_CONTROL`.
    let control_id = &found[PORT_CONTROL];
    if let Some(name) = wanted.iter().find(|&&name| port_number(&found[name]) > port_number(control_id)) {
        return Err(Failure::new(
            WHAT,
            format_args!("{name} comes after {PORT_CONTROL}, which must be the last"),
        ));
    }
    let control = open_port(control_id)?;
    connected(&control)?;
    let mut ports = [None, None, None];
    for (port, name) in ports.iter_mut().zip(command.ports()) {
        *port = name.map(|name| open_port(&found[name])).transpose()?;
    }
    let splice = has_indirect_descriptors(&Path::new(CLASS).join(control_id));
    Ok(Ports {
        control: Control::new(control),
        streams: Streams { ports: ports.map(|p| p.map(File::into)), splice },
    })
}

fn wait_for(wanted: &[&str]) -> Result<BTreeMap<String, String>, Failure> {
    let start = Instant::now();
    loop {
        let found = match named(Path::new(CLASS)) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(Failure::new(WHAT, error)),
        };
        let missing = wanted.iter().find(|&&name| !found.contains_key(name));
        let Some(missing) = missing else { return Ok(found) };
        // The driver's class is there as soon as the driver is.
        let driver = Path::new(CLASS).exists();
        if start.elapsed() > PATIENCE || !driver {
            let advice = if driver { "" } else { NO_DRIVER };
            return Err(Failure::new(WHAT, format_args!("there is no port {missing}{advice}")));
        }
        thread::sleep(PAUSE);
    }
}

const NO_DRIVER: &str = ", and no virtio-console driver in the kernel: build it with CONFIG_VIRTIO_CONSOLE=y, or give \
                         its modules with --modules";

/// The ports that have a name, as name and device.
fn named(class: &Path) -> io::Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(class)? {
        let entry = entry?;
        if let Ok(name) = fs::read_to_string(entry.path().join("name")) {
            found.insert(name.trim_end().to_owned(), entry.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(found)
}

/// `3` of `vport0p3`.
fn port_number(device: &str) -> Option<u32> {
    device.rsplit_once('p').and_then(|(_, number)| number.parse().ok())
}

fn open_port(device: &str) -> Result<File, Failure> {
    let path = Path::new("/dev").join(device);
    let flags = OFlags::NONBLOCK.bits() as i32;
    File::options()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(&path)
        .map_err(|error| Failure::new(format!("open the port {}", path.display()), error))
}

/// Waits for the device to say that the port's other side is there: until then a port cannot be written to.
fn connected(port: &File) -> Result<(), Failure> {
    let start = Instant::now();
    let failure = |error: &dyn std::fmt::Display| Failure::new("connect to the runner", error);
    while start.elapsed() < PATIENCE {
        let mut fds = [PollFd::new(port, PollFlags::OUT)];
        poll(&mut fds, Some(&Timespec::default())).map_err(|error| failure(&error))?;
        if fds[0].revents().contains(PollFlags::OUT) {
            return Ok(());
        }
        thread::sleep(PAUSE);
    }
    Err(failure(&format_args!("the other side of {PORT_CONTROL} was not opened")))
}

/// Whether pages can be spliced into a port. Without indirect descriptors Linux drops what has more pages than the queue
/// has free descriptors, and says nothing (drivers/char/virtio_console.c: `__send_to_port`).
fn has_indirect_descriptors(port: &Path) -> bool {
    fs::read_to_string(port.join("device/features"))
        .is_ok_and(|features| features.as_bytes().get(INDIRECT_DESC) == Some(&b'1'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(class: &Path, device: &str, name: Option<&str>) {
        fs::create_dir_all(class.join(device)).unwrap();
        if let Some(name) = name {
            fs::write(class.join(device).join("name"), format!("{name}\n")).unwrap();
        }
    }

    #[test]
    fn ports_are_found_by_their_names_as_soon_as_they_have_one() {
        let class = tempfile::tempdir().unwrap();
        port(class.path(), "vport0p0", None);
        port(class.path(), "vport0p10", Some(PORT_CONTROL));
        let found = named(class.path()).unwrap();
        assert_eq!(found, BTreeMap::from([(PORT_CONTROL.to_owned(), "vport0p10".to_owned())]));
        assert_eq!(port_number("vport0p10"), Some(10));
        assert!(named(Path::new("/nonexistent")).is_err());
    }

    #[test]
    fn pages_are_spliced_only_with_indirect_descriptors() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!has_indirect_descriptors(dir.path()));
        fs::create_dir(dir.path().join("device")).unwrap();
        for (bit, expected) in [("0", false), ("1", true)] {
            let features = format!("{}{bit}{}\n", "0".repeat(28), "1".repeat(35));
            fs::write(dir.path().join("device/features"), features).unwrap();
            assert_eq!(has_indirect_descriptors(dir.path()), expected);
        }
    }
}
