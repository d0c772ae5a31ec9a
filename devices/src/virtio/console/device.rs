//! The device as the transport sees it: configuration space, queues, start and reset.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::control::Control;
use super::input::Input;
use super::output::Output;
use super::port::{Port, PortState, PortsHandle};
use crate::virtio::device::{
    ActivateError, Activation, ActiveQueue, DeviceMemory, VirtioDevice, read_config_space,
};
use crate::virtio::thread::{DeviceThread, ThreadKind};

/// The most ports that a device can have.
pub const MAX_PORTS: usize = 31;
/// The longest name of a port, in bytes.
const MAX_NAME_LEN: usize = 255;

/// VIRTIO_CONSOLE_F_MULTIPORT: there are control queues, and more ports than one.
const MULTIPORT: u64 = 1 << 1;

/// Sizes of queues, in descriptors. A Linux driver fills input queues with buffers of a page each, whether they are used
/// or not.
const INPUT_QUEUE_SIZE: u16 = 64;
const UNUSED_INPUT_QUEUE_SIZE: u16 = 4;
const OUTPUT_QUEUE_SIZE: u16 = 128;
const CONTROL_QUEUE_SIZE: u16 = 32;

/// Indices of the control queues: the driver's buffers, the driver's messages.
const CONTROL_QUEUES: [u16; 2] = [2, 3];

/// Why there cannot be such ports.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// None or too many.
    #[error("A console device has 1 to {MAX_PORTS} ports, not {0}")]
    Count(usize),
    /// The name is empty, too long or contains NUL.
    #[error("The name {0:?} of a port must have 1 to {MAX_NAME_LEN} bytes and no NUL: choose another one")]
    Name(String),
    /// Two ports of one name.
    #[error("Two ports have the name {0:?}: choose another one for one of them")]
    DuplicateName(String),
    /// An event descriptor.
    #[error("Cannot create an event descriptor")]
    EventFd(#[source] io::Error),
}

/// The caller's descriptors of one port.
struct Files {
    input: Option<Arc<OwnedFd>>,
    output: Option<Arc<OwnedFd>>,
}

/// A virtio-console device with ports.
pub struct ConsoleDevice {
    ports: PortsHandle,
    files: Vec<Files>,
    queue_sizes: Vec<u16>,
    input_ended: Arc<EventFd>,
    threads: Vec<DeviceThread>,
}

impl ConsoleDevice {
    /// Makes a device with the given ports. The process must ignore SIGPIPE, as Rust programs do.
    ///
    /// # Errors
    /// [`ConsoleError`], which names what to change.
    pub fn new(ports: Vec<Port>) -> Result<ConsoleDevice, ConsoleError> {
        if !(1..=MAX_PORTS).contains(&ports.len()) {
            return Err(ConsoleError::Count(ports.len()));
        }
        for (i, Port { name, .. }) in ports.iter().enumerate() {
            if name.is_empty() || name.len() > MAX_NAME_LEN || name.contains('\0') {
                return Err(ConsoleError::Name(name.clone()));
            }
            if ports[..i].iter().any(|other| other.name == *name) {
                return Err(ConsoleError::DuplicateName(name.clone()));
            }
        }
        let input_size =
            |port: &Port| if port.input.is_some() { INPUT_QUEUE_SIZE } else { UNUSED_INPUT_QUEUE_SIZE };
        let mut queue_sizes: Vec<_> =
            ports.iter().flat_map(|port| [input_size(port), OUTPUT_QUEUE_SIZE]).collect();
        queue_sizes.splice(2..2, [CONTROL_QUEUE_SIZE; 2]);
        let (mut states, mut files) = (Vec::new(), Vec::new());
        for Port { name, input, output } in ports {
            states.push(PortState::new(name).map_err(ConsoleError::EventFd)?);
            files.push(Files { input: input.map(Arc::new), output: output.map(Arc::new) });
        }
        Ok(ConsoleDevice {
            ports: PortsHandle { ports: states.into(), ..PortsHandle::default() },
            files,
            queue_sizes,
            input_ended: Arc::new(EventFd::new(EFD_NONBLOCK).map_err(ConsoleError::EventFd)?),
            threads: Vec::new(),
        })
    }

    /// A handle to the ports, which may outlive the device.
    pub fn ports(&self) -> PortsHandle {
        self.ports.clone()
    }

    /// The configuration space: no size of the console (`cols`, `rows`), then the little-endian `max_nr_ports`.
    fn config_space(&self) -> [u8; 8] {
        let mut space = [0; 8];
        space[4..].copy_from_slice(&(self.files.len() as u32).to_le_bytes());
        space
    }

    fn start(&mut self, activation: Activation) -> io::Result<()> {
        let Activation { memory, features, queues, needs_reset } = activation;
        // Without control messages the only port is always open.
        self.ports.ports.iter().for_each(|port| port.set_open(features & MULTIPORT == 0));
        let (control, data): (Vec<_>, Vec<_>) =
            queues.into_iter().partition(|queue| CONTROL_QUEUES.contains(&queue.index));
        for queue in data {
            let thread = self.start_port(queue, memory.clone(), Arc::clone(&needs_reset))?;
            self.threads.extend(thread);
        }
        if let Ok([to_driver, from_driver]) = <[ActiveQueue; 2]>::try_from(control) {
            let control = Control::new(self.ports.clone(), Arc::clone(&self.input_ended));
            self.threads.push(DeviceThread::spawn(
                ThreadKind::Data,
                "console-control",
                needs_reset,
                move |stop| control.run(to_driver, from_driver, &memory, stop),
            )?);
        }
        Ok(())
    }

    /// Starts the thread of a port's queue; the queue for an input that there is not needs none.
    fn start_port(
        &self,
        queue: ActiveQueue,
        memory: DeviceMemory,
        needs_reset: Arc<dyn Fn() + Send + Sync>,
    ) -> io::Result<Option<DeviceThread>> {
        // Port 0 has the queues before the control queues, the others have those behind them.
        let port = usize::from(queue.index / 2).saturating_sub(1);
        let (ports, files) = (self.ports.clone(), &self.files[port]);
        let name = |direction| format!("console-{direction}{port}");
        if !queue.index.is_multiple_of(2) {
            ports.ports[port].begin_output(queue.doorbell.try_clone()?);
            let output = Output::new(ports.clone(), port, files.output.clone());
            let run = move |stop: &_| output.run(queue, &memory, stop);
            return match DeviceThread::spawn_interruptible(ThreadKind::Data, &name("out"), needs_reset, run) {
                Ok(thread) => Ok(Some(thread)),
                Err(error) => {
                    ports.ports[port].end_output();
                    Err(error)
                }
            };
        }
        let Some(file) = &files.input else { return Ok(None) };
        let input = Input::new(ports, port, Arc::clone(file), Arc::clone(&self.input_ended));
        let run = move |stop: &_| input.run(queue, &memory, stop);
        DeviceThread::spawn_interruptible(ThreadKind::Data, &name("in"), needs_reset, run).map(Some)
    }
}

impl VirtioDevice for ConsoleDevice {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        MULTIPORT
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.config_space(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.start(activation).map_err(|source| {
            self.reset();
            let reason = "the console has no thread for a queue".into();
            ActivateError { reason, source: Some(source) }
        })
    }

    fn reset(&mut self) {
        self.threads.clear();
    }
}

impl Drop for ConsoleDevice {
    fn drop(&mut self) {
        self.reset();
    }
}
