//! The few devices of a PC that Linux wants before PCI: the serial port, the keyboard controller for its reset line,
//! the ACPI sleep register.

mod power;
mod serial;

pub use power::{AcpiSleep, KeyboardController, PowerEvent, SLEEP_TYPE_S5};
pub use serial::SerialPort;
