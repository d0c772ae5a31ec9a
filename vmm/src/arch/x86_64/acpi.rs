//! The ACPI tables (ACPI 6.4): hardware-reduced, so that Linux looks for nothing that is not there. They name the
//! CPUs, the PCI bus, the serial port, and how to power off.

use std::ops::Range;

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path,
    ResourceTemplate,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as GasSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use devices::legacy::{AcpiSleep, PowerEvent, SLEEP_TYPE_S5, SerialPort};
use devices::pci::{ConfigPorts, Ecam};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::layout::{self, boot, irq, ports};

const OEM_ID: [u8; 6] = *b"DAXVM ";
const OEM_TABLE_ID: [u8; 8] = *b"DAXVM   ";
const OEM_REVISION: u32 = 1;

/// Boot architecture flags of the FADT (ACPI 6.4, table 5.11): what of a PC Linux need not look for.
const NO_VGA: u16 = 1 << 2;
const NO_ASPM: u16 = 1 << 4;
const NO_CMOS_RTC: u16 = 1 << 5;

type Registers = AcpiSleep<fn(PowerEvent)>;

/// Writes all tables; returns the guest-physical address of the RSDP.
///
/// # Errors
/// Guest memory is too small for them, which validation of the configuration rules out.
pub fn write_tables(
    memory: &GuestMemoryMmap,
    vcpus: u8,
    mmio_64: &Range<u64>,
) -> Result<u64, GuestMemoryError> {
    let rsdp_address = boot::ACPI.start;
    let mut next = rsdp_address + 64;
    let mut write = |table: &dyn Aml| -> Result<u64, GuestMemoryError> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let address = next;
        next = (address + bytes.len() as u64).next_multiple_of(16);
        if next > boot::ACPI.end {
            return Err(GuestMemoryError::InvalidBackendAddress);
        }
        memory.write_slice(&bytes, GuestAddress(address))?;
        Ok(address)
    };
    let dsdt = write(&dsdt(vcpus, mmio_64))?;
    let tables = [write(&fadt(dsdt))?, write(&madt(vcpus))?, write(&mcfg())?];
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in tables {
        xsdt.add_entry(table);
    }
    let xsdt = write(&xsdt)?;
    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    memory.write_slice(&rsdp, GuestAddress(rsdp_address))?;
    Ok(rsdp_address)
}

fn fadt(dsdt: u64) -> impl Aml {
    let register = |offset: u64| {
        GAS::new(GasSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(ports::ACPI_SLEEP) + offset)
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (NO_VGA | NO_ASPM | NO_CMOS_RTC).into();
    fadt.reset_reg = register(Registers::RESET);
    fadt.reset_value = Registers::RESET_VALUE;
    fadt.sleep_control_reg = register(Registers::CONTROL);
    fadt.sleep_status_reg = register(Registers::STATUS);
    fadt.finalize()
}

fn madt(vcpus: u8) -> impl Aml {
    let apics = LocalInterruptController::Address(layout::LOCAL_APIC);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, apics);
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IO_APIC, 0));
    madt
}

fn mcfg() -> impl Aml {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM, 0, 0, 0);
    mcfg
}

fn dsdt(vcpus: u8, mmio_64: &Range<u64>) -> Sdt {
    let mut aml = Vec::new();
    pci_bridge(mmio_64, &mut aml);
    ecam_reservation(&mut aml);
    serial_port(&mut aml);
    processors(vcpus, &mut aml);
    let s5 = Package::new(vec![&SLEEP_TYPE_S5, &aml::ZERO, &aml::ZERO, &aml::ZERO]);
    Name::new("_S5_".into(), &s5).to_aml_bytes(&mut aml);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&aml);
    dsdt
}

fn pci_bridge(mmio_64: &Range<u64>, aml: &mut Vec<u8>) {
    use AddressSpaceCacheable::{NotCacheable, PreFetchable};
    let mmio_32 = layout::MMIO_32;
    let (first, last) = (mmio_32.start as u32, (mmio_32.end - 1) as u32);
    let low = AddressSpace::new_memory(NotCacheable, true, first, last, None);
    let high = AddressSpace::new_memory(PreFetchable, true, mmio_64.start, mmio_64.end - 1, None);
    let buses = AddressSpace::new_bus_number(0_u16, 0_u16);
    let config = IO::new(ports::PCI_CONFIG, ports::PCI_CONFIG, 1, ConfigPorts::SIZE as u8);
    let resources = ResourceTemplate::new(vec![&buses, &config, &low, &high]);
    Device::new(
        "_SB_.PCI0".into(),
        vec![
            // PCI Express root bridge, compatible with a PCI one.
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_SEG".into(), &aml::ZERO),
            &Name::new("_BBN".into(), &aml::ZERO),
            &Name::new("_UID".into(), &aml::ZERO),
            // The caches of all CPUs are coherent with the devices.
            &Name::new("_CCA".into(), &aml::ONE),
            &Name::new("_CRS".into(), &resources),
        ],
    )
    .to_aml_bytes(aml);
}

/// Linux uses ECAM only where the firmware has reserved it (PCI Firmware Specification 3.2, section 4.1.2).
fn ecam_reservation(aml: &mut Vec<u8>) {
    let range = Memory32Fixed::new(true, layout::ECAM as u32, Ecam::SIZE as u32);
    Device::new(
        "_SB_.MBRD".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&range])),
        ],
    )
    .to_aml_bytes(aml);
}

fn serial_port(aml: &mut Vec<u8>) {
    let ports = IO::new(ports::SERIAL, ports::SERIAL, 1, SerialPort::SIZE as u8);
    let line = Interrupt::new(true, true, false, false, irq::SERIAL);
    Device::new(
        "_SB_.COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new("_DDN".into(), &"COM1"),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&line, &ports])),
        ],
    )
    .to_aml_bytes(aml);
}

fn processors(vcpus: u8, aml: &mut Vec<u8>) {
    for id in 0..vcpus {
        let path = Path::new(&format!("_SB_.C{id:03X}"));
        let children: Vec<&dyn Aml> = Vec::new();
        let hid = Name::new("_HID".into(), &"ACPI0007");
        let uid = Name::new("_UID".into(), &id);
        Device::new(path, [vec![&hid as &dyn Aml, &uid], children].concat()).to_aml_bytes(aml);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_linked_and_their_sums_are_zero() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let rsdp = write_tables(&memory, 32, &layout::mmio_64(512 << 20, 40)).unwrap();
        let bytes = |address: u64, length: usize| {
            let mut data = vec![0_u8; length];
            memory.read_slice(&mut data, GuestAddress(address)).unwrap();
            data
        };
        let sum = |data: &[u8]| data.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        let word = |address| memory.read_obj::<u32>(GuestAddress(address)).unwrap();
        let long = |address| memory.read_obj::<u64>(GuestAddress(address)).unwrap();
        assert_eq!(bytes(rsdp, 8), b"RSD PTR ");
        assert_eq!((sum(&bytes(rsdp, 20)), sum(&bytes(rsdp, 36))), (0, 0));
        let xsdt = long(rsdp + 24);
        let mut seen = Vec::new();
        let entries = (word(xsdt + 4) - 36) / 8;
        for entry in 0..u64::from(entries) {
            let table = long(xsdt + 36 + entry * 8);
            let data = bytes(table, word(table + 4) as usize);
            assert_eq!(sum(&data), 0);
            seen.push(String::from_utf8(data[..4].to_vec()).unwrap());
        }
        assert_eq!(seen, ["FACP", "APIC", "MCFG"]);
        let fadt = long(xsdt + 36);
        let dsdt = long(fadt + 140);
        assert_eq!(sum(&bytes(dsdt, word(dsdt + 4) as usize)), 0);
        assert_eq!(bytes(dsdt, 4), b"DSDT");
    }
}
