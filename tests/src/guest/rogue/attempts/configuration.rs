//! Configuration space in every width and by every way to it, and MSI-X with nonsense in it.

use super::{Act, Attempt};
use crate::guest::Failure;
use crate::guest::rogue::device::{Device, FEATURES, PATIENCE, QUEUE_SIZE, REQUESTS, common};
use crate::guest::rogue::function::{COMMAND, MEMORY_SPACE, Part};
use crate::guest::rogue::io::{Ports, WIDTHS};
use crate::guest::rogue::{Expected, Rogue};

/// Message control of MSI-X.
const MSIX_ENABLE: u64 = 1 << 15;
const MSIX_MASK: u64 = 1 << 14;

/// Bytes of an entry of the MSI-X table.
const ENTRY: u64 = 16;

/// Addresses and data of messages. None is one that the guest itself would suffer from (an NMI, an INIT).
const MESSAGES: [(&str, u64, u64); 6] = [
    ("zeros", 0, 0),
    ("all ones", u64::MAX, 0xffff_ffff),
    ("an address in RAM", 0x1000, 0x41),
    ("an address in registers", 0xc000_0000, 0x41),
    ("a processor that does not exist", 0xfeef_f000, 0x41),
    ("an illegal vector", 0xfee0_0000, 0x8003),
];

pub fn attempts() -> Vec<Attempt> {
    let widths = WIDTHS.map(|width| {
        Attempt::new("configuration", &format!("accesses of {width} bytes"), move |rogue| {
            by_memory(rogue, width)
        })
    });
    let messages = MESSAGES.map(|(what, address, data)| {
        Attempt::new("msi-x", what, move |rogue| with_messages(rogue, address, data))
    });
    let more: [(&str, &str, Act); 7] = [
        ("configuration", "accesses by ports", by_ports),
        ("configuration", "registers that nothing describes", pci_cfg_nonsense),
        ("configuration", "a reset through it", pci_cfg_reset),
        ("configuration", "no bus mastering", no_bus_master),
        ("msi-x", "vectors that do not exist", no_vectors),
        ("msi-x", "masked, then not", masked),
        ("msi-x", "on and off", on_and_off),
    ];
    let more = more.map(|(group, what, run)| Attempt::new(group, what, run));
    widths.into_iter().chain(messages).chain(more).collect()
}

fn identity(device: &Device) -> Result<u64, Failure> {
    device.function.read(0, 4)
}

/// Ones, zeros and what was there before to every offset, aligned or not: BARs, command and capabilities among them.
fn by_memory(rogue: &mut Rogue, width: usize) -> Result<(), Failure> {
    let device = &mut rogue.device;
    let before = identity(device)?;
    let ecam = device.function.ecam()?;
    for offset in (0..0x48).chain((0x48..0x100).step_by(5)) {
        let kept = ecam.read(offset, width)?;
        for value in [u64::MAX, 0, kept] {
            ecam.write(offset, width, value)?;
            ecam.read(offset, width)?;
        }
    }
    let mut beyond = 0;
    for offset in (0x100..0xff8).step_by(101) {
        ecam.write(offset, width, u64::MAX)?;
        beyond |= ecam.read(offset, width)?;
    }
    let after = identity(device)?;
    rogue.expect_value("what is beyond 256 bytes", 0, beyond);
    rogue.expect_value("vendor and device", before, after);
    Ok(())
}

fn by_ports(rogue: &mut Rogue) -> Result<(), Failure> {
    let device = &mut rogue.device;
    let before = identity(device)?;
    let ports = Ports::open()?;
    for register in (0..0x100).step_by(4) {
        for width in [1, 2, 4] {
            for data in 0xcfc..=0xcff {
                let address = device.function.port_address(register);
                ports.write(0xcf8, 4, address);
                let kept = ports.read(data, width);
                for value in [u32::MAX, 0, kept] {
                    ports.write(0xcf8, 4, address);
                    ports.write(data, width, value);
                }
            }
        }
    }
    // Buses, functions and types of access that do not exist, and other widths of the address.
    for address in [0, 0x7fff_ffff, 0x80ff_0000, 0x8000_0700, u32::MAX] {
        ports.write(0xcf8, 4, address);
        ports.write(0xcfc, 4, ports.read(0xcfc, 4));
    }
    for width in [1, 2] {
        ports.write(0xcf8, width, u32::MAX);
        ports.read(0xcf9, width);
    }
    let after = identity(device)?;
    rogue.expect_value("vendor and device", before, after);
    Ok(())
}

/// Writes BAR, offset and length of the access that the capability for accesses through configuration space makes.
fn describe(device: &Device, bar: u64, offset: u64, len: u64) -> Result<u64, Failure> {
    let at = device.function.capability(Part::PciCfg)?.at;
    device.function.write(at + 4, 1, bar)?;
    device.function.write(at + 8, 4, offset)?;
    device.function.write(at + 12, 4, len)?;
    Ok(at + 16)
}

fn pci_cfg_nonsense(rogue: &mut Rogue) -> Result<(), Failure> {
    let end = rogue.device.registers.len();
    for (bar, offset, len) in [
        (1, common::STATUS, 1),
        (2, 0, 4),
        (5, 0, 4),
        (255, 0, 4),
        (0, common::STATUS, 0),
        (0, common::STATUS, 3),
        (0, common::STATUS, 8),
        (0, common::STATUS, 0xffff_ffff),
        (0, common::STATUS + 1, 2),
        (0, common::STATUS - 1, 4),
        (0, end, 4),
        (0, end - 2, 4),
        (0, 0xffff_fffc, 4),
        (0, 0xffff_ffff, 1),
    ] {
        let data = describe(&rogue.device, bar, offset, len)?;
        for width in [1, 2, 4] {
            rogue.device.function.read(data, width)?;
            rogue.device.function.write(data, width, 0)?;
        }
        let status = rogue.device.status()?;
        rogue.expect_value(format!("the status after {len} bytes at {offset:#x} of BAR {bar}"), 0xf, status);
    }
    rogue.device.read_file()
}

fn pci_cfg_reset(rogue: &mut Rogue) -> Result<(), Failure> {
    let data =
        describe(&rogue.device, rogue.device.common.bar, rogue.device.common.offset + common::STATUS, 1)?;
    let shown = rogue.device.function.read(data, 1)?;
    rogue.expect_value("the status through configuration space", 0xf, shown);
    rogue.device.function.write(data, 1, 0)?;
    let status = rogue.device.status()?;
    rogue.expect_value("the status after a reset", 0, status);
    Ok(())
}

/// Queues go on: the bit is there for Linux, and nothing of the host depends on it.
fn no_bus_master(rogue: &mut Rogue) -> Result<(), Failure> {
    rogue.device.function.write(COMMAND, 2, MEMORY_SPACE)?;
    let answer = rogue.device.send(&Device::init_message(7))?;
    rogue.expect("INIT", Expected::Done, answer);
    Ok(())
}

/// Where the table is in BAR 0, and how many entries it has.
fn table(device: &Device) -> Result<(u64, u64), Failure> {
    let at = device.function.msix;
    let entries = (device.function.read(at + 2, 2)? & 0x7ff) + 1;
    Ok((device.function.read(at + 4, 4)? & !7, entries))
}

fn write_messages(device: &Device, address: u64, data: u64) -> Result<(), Failure> {
    let (start, entries) = table(device)?;
    for entry in (0..entries).map(|entry| start + ENTRY * entry) {
        device.registers.write(entry, 8, address)?;
        device.registers.write(entry + 8, 4, data)?;
        // Not masked; and bits that do not exist.
        device.registers.write(entry + 12, 4, 0xffff_fffe)?;
    }
    Ok(())
}

fn set_control(device: &Device, control: u64) -> Result<(), Failure> {
    device.function.write(device.function.msix + 2, 2, control)
}

/// Sets the device up so that it interrupts by these vectors.
fn start_with_vectors(device: &mut Device, configuration: u64, queue: u64) -> Result<(), Failure> {
    device.reset()?;
    device.negotiate(FEATURES)?;
    device.set(common::CONFIG_VECTOR, 2, configuration)?;
    for number in 0..=REQUESTS {
        device.set(common::QUEUE_SELECT, 2, number.into())?;
        device.set(common::QUEUE_VECTOR, 2, queue)?;
        device.set_queue(number, QUEUE_SIZE, device.rings(number))?;
    }
    device.go()
}

fn with_messages(rogue: &mut Rogue, address: u64, data: u64) -> Result<(), Failure> {
    set_control(&rogue.device, MSIX_ENABLE)?;
    write_messages(&rogue.device, address, data)?;
    start_with_vectors(&mut rogue.device, 0, 1)?;
    rogue.device.init()?;
    rogue.device.read_file()?;
    // The message for the configuration, too: a ring that breaks the rules has the device ask for a reset.
    rogue.device.offer(REQUESTS, u16::MAX);
    rogue.device.ring(REQUESTS)?;
    let answer = rogue.device.answer(PATIENCE)?;
    rogue.expect("a head that is none", Expected::NeedsReset, answer);
    Ok(())
}

fn no_vectors(rogue: &mut Rogue) -> Result<(), Failure> {
    let (_, entries) = table(&rogue.device)?;
    for vector in [entries, 0x7ff, 0x8000, 0xfffe, 0xffff] {
        start_with_vectors(&mut rogue.device, vector, vector)?;
        let found = (rogue.device.get(common::CONFIG_VECTOR, 2)?, rogue.device.get(common::QUEUE_VECTOR, 2)?);
        rogue.expect_value(format!("the configuration's vector after {vector:#x}"), 0xffff, found.0);
        rogue.expect_value(format!("the queue's vector after {vector:#x}"), 0xffff, found.1);
        rogue.device.init()?;
    }
    Ok(())
}

/// Interrupts wait while they are masked, and those of nonsense go when they are not.
fn masked(rogue: &mut Rogue) -> Result<(), Failure> {
    set_control(&rogue.device, MSIX_ENABLE | MSIX_MASK)?;
    write_messages(&rogue.device, u64::MAX, 0xffff_ffff)?;
    start_with_vectors(&mut rogue.device, 0, 1)?;
    rogue.device.init()?;
    let pending = rogue.device.function.read(rogue.device.function.msix + 8, 4)? & !7;
    let bits = rogue.device.registers.read(pending, 8)?;
    rogue.expect_value("the pending bits", 0b10, bits);
    rogue.device.registers.write(pending, 8, u64::MAX)?;
    set_control(&rogue.device, MSIX_ENABLE)?;
    let bits = rogue.device.registers.read(pending, 8)?;
    rogue.expect_value("the pending bits afterwards", 0, bits);
    rogue.device.read_file()
}

fn on_and_off(rogue: &mut Rogue) -> Result<(), Failure> {
    write_messages(&rogue.device, 0, 0)?;
    start_with_vectors(&mut rogue.device, 0, 1)?;
    rogue.device.init()?;
    for control in [MSIX_ENABLE, 0, MSIX_ENABLE | MSIX_MASK, MSIX_MASK, 0xffff, 0, MSIX_ENABLE] {
        set_control(&rogue.device, control)?;
        rogue.device.read_file()?;
        rogue.tried.answers += 1;
    }
    Ok(())
}
