//! A virtio device as a PCI function: ties the registers to configuration space, to the device behind them, and to the
//! two bells of each queue.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::capabilities::{
    self, COMMON, Capabilities, DEVICE, ISR, MAX_QUEUES, MSIX_PENDING, MSIX_TABLE, NOTIFY, NOTIFY_MULTIPLIER,
    PCI_CFG_BAR, PCI_CFG_DATA, PCI_CFG_LENGTH, PCI_CFG_OFFSET, REGISTERS_BAR, REGISTERS_SIZE,
    SHARED_MEMORY_BAR,
};
use super::common_config::{Action, CommonConfig, NO_VECTOR, status};
use crate::interrupt::Interrupt;
use crate::pci::{Bar, BarKind, ConfigSpace, Identity, MsiRouter, Msix, PciDevice};
use crate::virtio::device::{Activation, ActiveQueue, DeviceMemory, VirtioDevice};

const VENDOR: u16 = 0x1af4;
/// Modern devices: 0x1040 plus the virtio device type.
const FIRST_DEVICE_ID: u16 = 0x1040;
/// Class code: a mass storage controller of no further kind.
const CLASS_STORAGE_OTHER: u32 = 0x01_80_00;
const RING_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Why a device could not be put behind the transport.
#[derive(Debug, thiserror::Error)]
pub enum VirtioPciError {
    /// No address is left for one of its BARs.
    #[error("No guest-physical address is left for a BAR of {size:#x} bytes")]
    NoAddress {
        /// Size of the BAR in bytes.
        size: u64,
    },
    /// The device asks for queues that the transport cannot carry.
    #[error("A virtio device cannot have these queues: {0:?}")]
    BadQueues(Vec<u16>),
    /// The system refuses an event descriptor.
    #[error("Cannot create an event descriptor")]
    EventFd(#[source] io::Error),
}

/// A virtio device as a PCI function.
pub struct VirtioPciDevice {
    device: Box<dyn VirtioDevice>,
    memory: DeviceMemory,
    config: ConfigSpace,
    capabilities: Capabilities,
    common: CommonConfig,
    bars: Vec<Bar>,
    doorbells: Vec<Arc<EventFd>>,
    msix: Arc<Msix>,
    isr: Arc<AtomicU8>,
}

impl VirtioPciDevice {
    /// Puts `device` behind the transport. `router` is asked for by number of vectors; `place` gives a BAR of so many
    /// bytes (true: prefetchable memory) its first address, aligned to its size.
    ///
    /// # Errors
    /// See [`VirtioPciError`]; errors of `router` come as [`VirtioPciError::EventFd`].
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: DeviceMemory,
        router: impl FnOnce(u16) -> io::Result<Arc<dyn MsiRouter>>,
        mut place: impl FnMut(u64, bool) -> Option<u64>,
    ) -> Result<VirtioPciDevice, VirtioPciError> {
        let sizes = device.queue_max_sizes();
        let bad_queues = || VirtioPciError::BadQueues(sizes.to_vec());
        if sizes.len() > MAX_QUEUES {
            return Err(bad_queues());
        }
        // One vector for changes of the configuration, one for each queue.
        let vectors = sizes.len() as u16 + 1;
        let common =
            CommonConfig::new(device.features() | RING_FEATURES, sizes, vectors).map_err(|_| bad_queues())?;
        let doorbells = (0..sizes.len())
            .map(|_| EventFd::new(EFD_NONBLOCK).map(Arc::new))
            .collect::<io::Result<Vec<_>>>()
            .map_err(VirtioPciError::EventFd)?;

        let mut config = ConfigSpace::new(Identity {
            vendor: VENDOR,
            device: FIRST_DEVICE_ID + device.device_type() as u16,
            revision: 1,
            class: CLASS_STORAGE_OTHER,
            subsystem_vendor: VENDOR,
            subsystem: FIRST_DEVICE_ID,
        });
        let rings = doorbells.iter().zip(0..);
        let at =
            |(bell, i): (&Arc<EventFd>, u64)| (NOTIFY.0 + i * u64::from(NOTIFY_MULTIPLIER), Arc::clone(bell));
        let registers = BarKind::Registers { doorbells: rings.map(at).collect() };
        let mut bars = vec![Bar { index: REGISTERS_BAR, size: REGISTERS_SIZE, kind: registers }];
        let shared = device.shared_memory();
        if let Some(shared) = &shared {
            let size = shared.memory.size().next_power_of_two();
            let kind = BarKind::Memory(Arc::clone(&shared.memory));
            bars.push(Bar { index: SHARED_MEMORY_BAR, size, kind });
        }
        for bar in &bars {
            let prefetchable = matches!(bar.kind, BarKind::Memory(_));
            let no_address = VirtioPciError::NoAddress { size: bar.size };
            config.add_bar(bar, place(bar.size, prefetchable).ok_or(no_address)?);
        }
        let shared = shared.map(|shared| (shared.id, shared.memory.size()));
        let capabilities = capabilities::add(&mut config, vectors, shared);
        let msix = Arc::new(Msix::new(vectors, router(vectors).map_err(VirtioPciError::EventFd)?));
        let isr = Arc::new(AtomicU8::new(0));
        Ok(VirtioPciDevice { device, memory, config, capabilities, common, bars, doorbells, msix, isr })
    }

    fn interrupt(&self, vector: &Arc<AtomicU16>, cause: u8) -> Arc<VectorInterrupt> {
        let (msix, isr) = (Arc::clone(&self.msix), Arc::clone(&self.isr));
        Arc::new(VectorInterrupt { msix, vector: Arc::clone(vector), isr, cause })
    }

    fn apply(&mut self, action: Action) {
        match action {
            Action::Reset => {
                self.device.reset();
                self.common.reset();
                self.isr.store(0, Ordering::SeqCst);
            }
            Action::Activate => {
                let needs_reset = self.needs_reset();
                if let Err(reason) = self.activate(Arc::clone(&needs_reset)) {
                    tracing::error!(%reason, "Cannot start a virtio device");
                    needs_reset();
                }
            }
        }
    }

    fn needs_reset(&self) -> Arc<dyn Fn() + Send + Sync> {
        let device_status = Arc::clone(&self.common.status);
        let interrupt = self.interrupt(&self.common.config_vector, ISR_CONFIG);
        Arc::new(move || {
            device_status.fetch_or(status::NEEDS_RESET, Ordering::SeqCst);
            if let Err(error) = interrupt.trigger() {
                tracing::error!(%error, "Cannot tell the driver that its device needs a reset");
            }
        })
    }

    fn activate(&mut self, needs_reset: Arc<dyn Fn() + Send + Sync>) -> Result<(), String> {
        let features = self.common.features();
        let event_idx = features >> VIRTIO_RING_F_EVENT_IDX & 1 == 1;
        let memory = self.memory.memory();
        let mut queues = Vec::new();
        for (index, setup) in self.common.queues.iter().enumerate() {
            if !setup.queue.ready() {
                continue;
            }
            if !setup.queue.is_valid(&*memory) {
                return Err(format!("The rings of queue {index} are not in guest memory"));
            }
            let state = setup.queue.state();
            let mut queue = virtio_queue::Queue::try_from(state).map_err(|e| e.to_string())?;
            queue.set_event_idx(event_idx);
            queues.push(ActiveQueue {
                index: index as u16,
                queue,
                doorbell: self.doorbells[index].try_clone().map_err(|e| e.to_string())?,
                interrupt: self.interrupt(&setup.vector, ISR_QUEUE),
            });
        }
        let activation = Activation { memory: self.memory.clone(), features, queues, needs_reset };
        self.device.activate(activation).map_err(|error| match &error.source {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        })
    }

    /// The window into the BARs through configuration space: which access `struct virtio_pci_cfg_cap` describes now.
    fn pci_cfg_access(&self, length: usize) -> Option<(u8, u64)> {
        let at = self.capabilities.pci_cfg;
        let mut bar = [0];
        self.config.read(at + PCI_CFG_BAR, &mut bar);
        let offset = self.config.read_u32(at + PCI_CFG_OFFSET);
        let wanted = self.config.read_u32(at + PCI_CFG_LENGTH) as usize;
        let aligned = matches!(wanted, 1 | 2 | 4) && (offset as usize).is_multiple_of(wanted);
        (bar[0] == REGISTERS_BAR && aligned && wanted == length).then_some((bar[0], offset.into()))
    }
}

impl PciDevice for VirtioPciDevice {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        if offset == self.capabilities.pci_cfg + PCI_CFG_DATA
            && let Some((bar, at)) = self.pci_cfg_access(data.len())
        {
            return self.read_bar(bar, at, data);
        }
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if offset == self.capabilities.pci_cfg + PCI_CFG_DATA
            && let Some((bar, at)) = self.pci_cfg_access(data.len())
        {
            return self.write_bar(bar, at, data);
        }
        self.config.write(offset, data);
        let control = self.capabilities.msix_control;
        if offset < control + 2 && control < offset + data.len() {
            self.msix.write_control(self.config.read_u16(control));
        }
    }

    fn bars(&self) -> &[Bar] {
        &self.bars
    }

    fn read_bar(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        let within = |(start, length): (u64, u64)| offset.checked_sub(start).filter(|at| *at < length);
        if bar != REGISTERS_BAR {
            return data.fill(0xff);
        }
        if let Some(at) = within(COMMON) {
            self.common.read(at, data);
        } else if let Some(at) = within(DEVICE) {
            self.device.read_config(at, data);
        } else if let Some(at) = within(MSIX_TABLE) {
            self.msix.read_table(at, data);
        } else if let Some(at) = within(MSIX_PENDING) {
            self.msix.read_pending(at, data);
        } else {
            data.fill(0);
            if within(ISR).is_some() && !data.is_empty() {
                data[0] = self.isr.swap(0, Ordering::SeqCst);
            }
        }
    }

    fn write_bar(&mut self, bar: u8, offset: u64, data: &[u8]) {
        let within = |(start, length): (u64, u64)| offset.checked_sub(start).filter(|at| *at < length);
        if bar != REGISTERS_BAR {
            return;
        }
        if let Some(at) = within(COMMON) {
            if let Some(action) = self.common.write(at, data) {
                self.apply(action);
            }
        } else if let Some(at) = within(DEVICE) {
            self.device.write_config(at, data);
        } else if let Some(at) = within(NOTIFY) {
            // Only where the hypervisor does not take doorbells off our hands.
            if let Some(bell) = self.doorbells.get((at / u64::from(NOTIFY_MULTIPLIER)) as usize) {
                let _ = bell.write(1);
            }
        } else if let Some(at) = within(MSIX_TABLE) {
            self.msix.write_table(at, data);
        }
    }
}

impl Drop for VirtioPciDevice {
    fn drop(&mut self) {
        self.device.reset();
    }
}

/// The interrupt of one queue, or of the configuration, through whichever vector the driver gave it.
struct VectorInterrupt {
    msix: Arc<Msix>,
    vector: Arc<AtomicU16>,
    isr: Arc<AtomicU8>,
    cause: u8,
}

impl Interrupt for VectorInterrupt {
    fn trigger(&self) -> io::Result<()> {
        match self.vector.load(Ordering::Relaxed) {
            NO_VECTOR => {
                self.isr.fetch_or(self.cause, Ordering::SeqCst);
                Ok(())
            }
            vector => self.msix.trigger(vector),
        }
    }
}
