//! From a configuration to a VM, one helper a step.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use devices::bus::BusError;
use devices::legacy::{AcpiSleep, KeyboardController, PowerEvent, SerialPort};
use devices::pci::{ConfigPorts, Ecam};
use devices::virtio::block::{BlockConfig, BlockDevice, DiskCountersHandle, DiskError};
use devices::virtio::console::{ConsoleDevice, ConsoleError, Port, PortsHandle};
use devices::virtio::device::{DeviceMemory, VirtioDevice};
use devices::virtio::fs::{
    FileSystemConfig, FileSystemDevice, FileSystemError, TooFewDescriptors, descriptors_per_share,
    open_directory,
};
use devices::virtio::pci::VirtioPciError;
use devices::virtio::rng::RngDevice;
use kvm_bindings::CpuId;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{GuestMemoryError, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::arch::x86_64::entry::{self, EntryError, EntryPoint};
use crate::arch::x86_64::{acpi, cpuid};
use crate::boot::{self, Boot, BootError, Initramfs};
use crate::config::{DiskConfig, SandboxMode, ShareConfig, ShareWindow, ValidConfig, WindowsError};
use crate::console::{ConsoleLog, ConsoleOutput};
use crate::device_manager::DeviceManager;
use crate::exit::Buses;
use crate::interrupts::Line;
use crate::layout::{self, irq, ports};
use crate::memory::{GuestRam, MemoryError, Slot, Slots};
use crate::prefault::PrefaultVcpu;
use crate::report::ShareCounters;
use crate::sandbox;
use crate::vcpu::Memory;
use crate::vm::{Ending, Parts, Vm, Wiring};

/// Why a VM could not be built. The message names what to do where the user can do something.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// /dev/kvm is missing.
    #[error(
        "There is no /dev/kvm: load the module kvm_intel or kvm_amd, and enable virtualisation in the firmware \
         (or nested virtualisation in the hypervisor that runs this machine)"
    )]
    NoKvm(#[source] kvm_ioctls::Error),
    /// /dev/kvm may not be opened.
    #[error("No permission to use /dev/kvm: add the user to the group `kvm` and log in again")]
    KvmPermission(#[source] kvm_ioctls::Error),
    /// KVM refuses something.
    #[error("KVM cannot {0}")]
    Kvm(&'static str, #[source] kvm_ioctls::Error),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel, initramfs, command line.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The initial state of a vCPU.
    #[error(transparent)]
    Entry(#[from] EntryError),
    /// A shared directory.
    #[error("Share `{tag}`")]
    Share {
        /// Its tag.
        tag: String,
        /// Why not.
        #[source]
        source: FileSystemError,
    },
    /// The limit of open files.
    #[error(transparent)]
    TooFewDescriptors(#[from] TooFewDescriptors),
    /// The DAX windows of the shares, or their policies.
    #[error(transparent)]
    Windows(#[from] WindowsError),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The ports of the wiring.
    #[error(transparent)]
    Ports(#[from] ConsoleError),
    /// A device behind the virtio transport.
    #[error(transparent)]
    Virtio(#[from] VirtioPciError),
    /// Two devices at one address, which would be a mistake in the layout.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// ACPI tables do not fit.
    #[error("Cannot write the ACPI tables")]
    Acpi(#[source] GuestMemoryError),
    /// An event descriptor.
    #[error("Cannot create an event descriptor")]
    EventFd(#[source] io::Error),
    /// No descriptors are left.
    #[error("Cannot open another file")]
    Descriptor(#[source] io::Error),
}

/// Builds a VM.
///
/// # Errors
/// See [`BuildError`].
pub(crate) fn build(config: ValidConfig, wiring: Wiring) -> Result<Vm, BuildError> {
    let started = Instant::now();
    sandbox::survive_file_size();
    let kvm = open_kvm()?;
    let vm = create_vm(&kvm)?;
    let slots = Slots::new(Arc::clone(&vm));
    let ram = GuestRam::new(config.memory)?;
    let memory = ram.describe()?;
    let cpuid = cpuid::supported(&kvm, config.nested).map_err(|e| BuildError::Kvm("tell its CPUID", e))?;
    let mmio_64 = layout::mmio_64(config.memory, cpuid::address_bits(&cpuid));

    let ending = Ending::new().map_err(BuildError::EventFd)?;
    let buses = Buses::default();
    let console =
        ConsoleParts::new(&vm, wiring.console, wiring.console_is_the_kernels).map_err(BuildError::EventFd)?;
    add_legacy_devices(&buses, &console, &ending)?;
    let devices_memory = DeviceMemory::new(memory.clone());
    let mut manager = DeviceManager::new(
        Arc::clone(&vm),
        Arc::clone(&slots),
        &buses.memory,
        devices_memory.clone(),
        mmio_64.clone(),
    );
    buses.ports.insert(
        ports::PCI_CONFIG.into(),
        ConfigPorts::SIZE,
        Arc::new(ConfigPorts::new(manager.bus())),
    )?;
    buses.memory.insert(layout::ECAM, Ecam::SIZE, Arc::new(Ecam(manager.bus())))?;

    // Devices end in this order. Those without a window come first, because descriptors may point into windows.
    let ports = add_ports(&mut manager, wiring.ports)?;
    if config.rng {
        manager.add(Box::new(RngDevice::default()))?;
    }
    let disks = (0..)
        .zip(&config.disks)
        .map(|(index, disk)| add_disk(&mut manager, index, disk, &config))
        .collect::<Result<_, _>>()?;
    let windows = config.windows()?;
    let descriptors = descriptors_per_share(&windows.iter().map(|window| window.size).collect::<Vec<_>>())?;
    let may_prefault = windows.iter().any(ShareWindow::may_prefault);
    let (mut shares, mut to_confine) = (Vec::new(), (Vec::new(), Vec::new()));
    for (share, window) in config.shares.iter().zip(windows) {
        let (root, not_own) = open_share(share, config.sandbox)
            .map_err(|source| BuildError::Share { tag: share.tag.clone(), source })?;
        let facts = sandbox::Share { path: share.path.clone(), read_only: share.read_only, not_own };
        to_confine.0.push(facts);
        to_confine.1.push(root.try_clone().map_err(BuildError::Descriptor)?.into());
        shares.push(add_share(&mut manager, share, root, window, descriptors, &config)?);
    }

    let rsdp = acpi::write_tables(&memory, config.cpus, &mmio_64).map_err(BuildError::Acpi)?;
    let entry = load_guest(&config, wiring.initramfs.as_deref(), &memory, rsdp)?;
    let vcpus = create_vcpus(&vm, &cpuid, config.cpus, &memory, entry)?;
    if may_prefault {
        add_prefault_vcpu(&kvm, &vm, &cpuid, config.cpus, &manager)?;
    }
    let parts = Parts {
        buses,
        memory: Memory { all: devices_memory, windows: manager.windows() },
        serial: console.serial,
        room_in_serial: console.room,
        panicked: console.panicked,
        console_log: console.log,
        shares,
        to_confine,
        layers: Vec::new(),
        disks,
        ports,
        config,
        started,
        _slots: map_ram(&slots, &ram)?,
        ram,
    };
    Ok(Vm::new(parts, vcpus, ending))
}

fn open_kvm() -> Result<Kvm, BuildError> {
    Kvm::new().map_err(not_opened)
}

fn not_opened(error: kvm_ioctls::Error) -> BuildError {
    match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => BuildError::NoKvm(error),
        libc::EACCES | libc::EPERM => BuildError::KvmPermission(error),
        _ => BuildError::Kvm("be opened", error),
    }
}

/// The VM with its interrupt controllers. There is no PIT: the tables say hardware-reduced, and Linux takes its time
/// from kvmclock and the local APIC.
fn create_vm(kvm: &Kvm) -> Result<Arc<VmFd>, BuildError> {
    let vm = kvm.create_vm().map_err(|e| BuildError::Kvm("create a VM", e))?;
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .map_err(|e| BuildError::Kvm("set the identity map's address", e))?;
    vm.set_tss_address(layout::KVM_TSS as usize)
        .map_err(|e| BuildError::Kvm("set the task state segment's address", e))?;
    vm.create_irq_chip().map_err(|e| BuildError::Kvm("create interrupt controllers", e))?;
    Ok(Arc::new(vm))
}

/// The serial port and what tells the main thread of it.
struct ConsoleParts {
    serial: Arc<SerialPort>,
    room: EventFd,
    panicked: EventFd,
    log: Arc<Mutex<ConsoleLog>>,
}

impl ConsoleParts {
    fn new(vm: &VmFd, out: Box<dyn io::Write + Send>, is_the_kernels: bool) -> io::Result<ConsoleParts> {
        let log = Arc::default();
        let (room, panicked) = (EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?);
        let (tell_room, tell_panic) = (room.try_clone()?, panicked.try_clone()?);
        // The main thread reads both; a write can only fail when it has not done so 2^64 times.
        let on_panic = move || {
            if is_the_kernels {
                drop(tell_panic.write(1));
            }
        };
        let out = ConsoleOutput::new(out, Arc::clone(&log), on_panic);
        let line = Arc::new(Line::new(vm, irq::SERIAL)?);
        let serial = SerialPort::new(line, Box::new(out), move || drop(tell_room.write(1)));
        Ok(ConsoleParts { serial: Arc::new(serial), room, panicked, log })
    }
}

fn add_legacy_devices(buses: &Buses, console: &ConsoleParts, ending: &Ending) -> Result<(), BuildError> {
    let on_event = || {
        let ending = ending.clone();
        move |event: PowerEvent| ending.power_event(event)
    };
    buses.ports.insert(ports::SERIAL.into(), SerialPort::SIZE, Arc::clone(&console.serial) as _)?;
    let keyboard = KeyboardController::new(on_event());
    buses.ports.insert(ports::KEYBOARD.into(), KEYBOARD_PORTS, Arc::new(keyboard))?;
    let sleep = AcpiSleep::new(on_event());
    buses.ports.insert(ports::ACPI_SLEEP.into(), ACPI_SLEEP_PORTS, Arc::new(sleep))?;
    Ok(())
}

const KEYBOARD_PORTS: u64 = KeyboardController::<fn(PowerEvent)>::SIZE;
const ACPI_SLEEP_PORTS: u64 = AcpiSleep::<fn(PowerEvent)>::SIZE;

/// Request queues of a share or a disk: one a vCPU, so that none waits for another's request, up to what a host can serve.
const MAX_REQUEST_QUEUES: u8 = 8;

/// Opens a share's directory, as a tree of its own if the process is to be confined; and says why it is none then.
fn open_share(share: &ShareConfig, sandbox: SandboxMode) -> Result<(File, Option<String>), FileSystemError> {
    let why = match sandbox {
        SandboxMode::Off => "the sandbox is off".to_owned(),
        SandboxMode::On => match sandbox::own_tree(&share.path, share.read_only) {
            Ok(tree) => return Ok((tree.into(), None)),
            Err(error) => error.to_string(),
        },
    };
    Ok((open_directory(&share.path)?, Some(why)))
}

fn add_share(
    manager: &mut DeviceManager,
    share: &ShareConfig,
    root: File,
    window: ShareWindow,
    descriptors: u64,
    config: &ValidConfig,
) -> Result<ShareCounters, BuildError> {
    let settings = FileSystemConfig {
        tag: share.tag.clone(),
        path: share.path.clone(),
        read_only: share.read_only,
        window_size: window.size,
        policy: window.policy,
        prefault: window.prefault,
        cache: share.cache,
        request_queues: config.cpus.min(MAX_REQUEST_QUEUES).into(),
        descriptors,
    };
    let device = FileSystemDevice::with_root(settings, root)
        .map_err(|source| BuildError::Share { tag: share.tag.clone(), source })?;
    let counters = ShareCounters {
        counters: device.counters(),
        window: device.shared_memory().map(|shared| {
            let start = shared.memory.host_address() as usize;
            start..start + shared.memory.size() as usize
        }),
    };
    manager.add(Box::new(device))?;
    Ok(counters)
}

fn add_ports(manager: &mut DeviceManager, ports: Vec<Port>) -> Result<PortsHandle, BuildError> {
    if ports.is_empty() {
        return Ok(PortsHandle::default());
    }
    let device = ConsoleDevice::new(ports)?;
    let handle = device.ports();
    manager.add(Box::new(device))?;
    Ok(handle)
}

fn add_disk(
    manager: &mut DeviceManager,
    index: usize,
    disk: &DiskConfig,
    config: &ValidConfig,
) -> Result<DiskCountersHandle, BuildError> {
    let device = BlockDevice::new(BlockConfig {
        path: disk.path.clone(),
        read_only: disk.read_only,
        id: format!("disk{index}"),
        queues: config.cpus.min(MAX_REQUEST_QUEUES).into(),
    })?;
    let counters = device.counters();
    manager.add(Box::new(device))?;
    Ok(counters)
}

fn load_guest(
    config: &ValidConfig,
    initramfs: Option<&[u8]>,
    memory: &GuestMemoryMmap,
    rsdp: u64,
) -> Result<EntryPoint, BuildError> {
    let command_line = config.command_line();
    let what = Boot {
        kernel: &config.kernel,
        initramfs: initramfs.map(Initramfs::Bytes).or_else(|| config.initrd.as_deref().map(Initramfs::File)),
        command_line: &command_line,
        ram: config.memory,
        rsdp,
    };
    Ok(boot::load(memory, &what)?)
}

fn create_vcpus(
    vm: &VmFd,
    supported: &CpuId,
    count: u8,
    memory: &GuestMemoryMmap,
    entry: EntryPoint,
) -> Result<Vec<VcpuFd>, BuildError> {
    (0..count)
        .map(|id| {
            let vcpu = vm.create_vcpu(id.into()).map_err(|e| BuildError::Kvm("create a vCPU", e))?;
            let cpuid = vcpu_cpuid(supported, id, count)?;
            vcpu.set_cpuid2(&cpuid).map_err(|e| BuildError::Kvm("set a vCPU's CPUID", e))?;
            entry::set_up_any(&vcpu)?;
            if id == 0 {
                entry::set_up_first(&vcpu, memory, entry)?;
            }
            Ok(vcpu)
        })
        .collect()
}

fn vcpu_cpuid(supported: &CpuId, id: u8, count: u8) -> Result<CpuId, BuildError> {
    let no_room = |_| BuildError::Kvm("take so many CPUID leaves", kvm_ioctls::Error::new(libc::E2BIG));
    cpuid::for_vcpu(supported, id, count).map_err(no_room)
}

/// Adds the vCPU that prefaults windows, after those of the guest, whose numbers begin at 0.
fn add_prefault_vcpu(
    kvm: &Kvm,
    vm: &VmFd,
    supported: &CpuId,
    cpus: u8,
    manager: &DeviceManager,
) -> Result<(), BuildError> {
    let cpuid = vcpu_cpuid(supported, cpus, cpus)?;
    if let Some(vcpu) = PrefaultVcpu::new(kvm, vm, cpus, &cpuid) {
        manager.windows().prefault_by(vcpu);
    }
    Ok(())
}

fn map_ram(slots: &Arc<Slots>, ram: &GuestRam) -> Result<Vec<Slot>, BuildError> {
    ram.ranges()
        .map(|(range, host)| {
            // SAFETY: the range is part of `ram`, which the VM drops after the slots.
            unsafe { slots.map(host, range.end - range.start, range.start) }.map_err(BuildError::from)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_kvm_the_message_says_how_to_get_it() {
        for (errno, says) in [
            (libc::ENOENT, "load the module kvm_intel or kvm_amd"),
            (libc::ENODEV, "enable virtualisation in the firmware"),
            (libc::EACCES, "add the user to the group `kvm`"),
        ] {
            let message = not_opened(kvm_ioctls::Error::new(errno)).to_string();
            assert!(message.contains("/dev/kvm") && message.contains(says), "{message}");
        }
    }
}
