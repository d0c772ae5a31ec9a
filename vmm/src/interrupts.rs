//! Interrupts without an exit: event descriptors that KVM turns into interrupts by itself (irqfd).

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

use devices::interrupt::Interrupt;
use devices::pci::{MsiMessage, MsiRouter};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::layout::irq;

/// An edge on a line of the I/O APIC.
pub struct Line(EventFd);

impl Line {
    /// The line `gsi` of `vm`.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn new(vm: &VmFd, gsi: u32) -> io::Result<Line> {
        let fd = EventFd::new(EFD_NONBLOCK)?;
        vm.register_irqfd(&fd, gsi)?;
        Ok(Line(fd))
    }
}

impl Interrupt for Line {
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The VM's table of interrupt routes: the I/O APIC's lines, and one route for each MSI-X vector in use.
pub struct Routes {
    vm: Arc<VmFd>,
    table: Mutex<Table>,
}

struct Table {
    messages: BTreeMap<u32, MsiMessage>,
    next: u32,
}

impl Routes {
    /// The table as KVM has it at first.
    pub fn new(vm: Arc<VmFd>) -> Arc<Routes> {
        let table = Table { messages: BTreeMap::new(), next: irq::IO_APIC_LINES };
        Arc::new(Routes { vm, table: Mutex::new(table) })
    }

    /// Vectors for a device that has `count` of them.
    ///
    /// # Errors
    /// The system refuses descriptors, or KVM so many routes.
    pub fn vectors(self: &Arc<Self>, count: u16) -> io::Result<Vectors> {
        let first = {
            let mut table = self.table.lock().unwrap_or_else(|e| e.into_inner());
            let first = table.next;
            table.next += u32::from(count);
            first
        };
        let fds = (first..first + u32::from(count))
            .map(|gsi| {
                let fd = EventFd::new(EFD_NONBLOCK)?;
                self.vm.register_irqfd(&fd, gsi)?;
                Ok(fd)
            })
            .collect::<io::Result<_>>()?;
        Ok(Vectors { routes: Arc::clone(self), first, fds })
    }

    fn set(&self, gsi: u32, message: MsiMessage) -> io::Result<()> {
        let mut table = self.table.lock().unwrap_or_else(|e| e.into_inner());
        table.messages.insert(gsi, message);
        let lines = (0..irq::IO_APIC_LINES).map(io_apic_route);
        let entries: Vec<_> =
            lines.chain(table.messages.iter().map(|(gsi, m)| msi_route(*gsi, *m))).collect();
        let routing =
            KvmIrqRouting::from_entries(&entries).map_err(|e| io::Error::other(format!("{e:?}")))?;
        Ok(self.vm.set_gsi_routing(&routing)?)
    }
}

fn io_apic_route(gsi: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip = kvm_irq_routing_irqchip { irqchip: KVM_IRQCHIP_IOAPIC, pin: gsi };
    entry
}

fn msi_route(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        ..Default::default()
    };
    entry
}

/// The MSI-X vectors of one device.
pub struct Vectors {
    routes: Arc<Routes>,
    first: u32,
    fds: Vec<EventFd>,
}

impl MsiRouter for Vectors {
    fn route(&self, vector: u16, message: MsiMessage) -> io::Result<()> {
        self.routes.set(self.first + u32::from(vector), message)
    }

    fn deliver(&self, vector: u16) -> io::Result<()> {
        self.fds[usize::from(vector)].write(1)
    }
}
