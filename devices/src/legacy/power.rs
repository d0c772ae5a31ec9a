//! How a guest turns its machine off or resets it: the ACPI sleep and reset registers (ACPI 6.4, sections 4.8.3.7 and
//! 4.8.3.6) and the reset line of the PS/2 keyboard controller.

use std::convert::Infallible;
use std::sync::Mutex;

use vm_superio::{I8042Device, Trigger};

use crate::bus::BusDevice;

/// The sleep type that means S5, soft off; `\_S5` in the DSDT says the same.
pub const SLEEP_TYPE_S5: u8 = 5;

/// What the guest asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerEvent {
    /// Power off.
    Off,
    /// Reset.
    Reset,
}

/// The ACPI registers: one byte each.
pub struct AcpiSleep<F> {
    on_event: F,
}

impl<F: Fn(PowerEvent) + Send + Sync> AcpiSleep<F> {
    /// Offset of the sleep control register.
    pub const CONTROL: u64 = 0;
    /// Offset of the sleep status register.
    pub const STATUS: u64 = 1;
    /// Offset of the reset register.
    pub const RESET: u64 = 2;
    /// Value that resets when it is written to the reset register.
    pub const RESET_VALUE: u8 = 1;
    /// Ports taken.
    pub const SIZE: u64 = 4;

    const SLEEP_ENABLE: u8 = 1 << 5;
    const SLEEP_TYPE_SHIFT: u8 = 2;

    /// Registers that call `on_event` from the vCPU thread that wrote them.
    pub fn new(on_event: F) -> Self {
        AcpiSleep { on_event }
    }
}

impl<F: Fn(PowerEvent) + Send + Sync> BusDevice for AcpiSleep<F> {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let s5 = SLEEP_TYPE_S5 << Self::SLEEP_TYPE_SHIFT | Self::SLEEP_ENABLE;
        match (offset, data) {
            (Self::CONTROL, [value]) if *value == s5 => (self.on_event)(PowerEvent::Off),
            (Self::RESET, [Self::RESET_VALUE]) => (self.on_event)(PowerEvent::Reset),
            _ => {}
        }
    }
}

/// The keyboard controller at ports 0x60 to 0x64, of which only the command that pulses the reset line does anything.
pub struct KeyboardController<F: Fn(PowerEvent)>(Mutex<I8042Device<ResetLine<F>>>);

struct ResetLine<F>(F);

impl<F: Fn(PowerEvent)> Trigger for ResetLine<F> {
    type E = Infallible;
    fn trigger(&self) -> Result<(), Infallible> {
        (self.0)(PowerEvent::Reset);
        Ok(())
    }
}

impl<F: Fn(PowerEvent) + Send> KeyboardController<F> {
    /// Ports taken.
    pub const SIZE: u64 = 5;

    /// A controller that calls `on_event` from the vCPU thread that pulsed the line.
    pub fn new(on_event: F) -> Self {
        KeyboardController(Mutex::new(I8042Device::new(ResetLine(on_event))))
    }
}

impl<F: Fn(PowerEvent) + Send> BusDevice for KeyboardController<F> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let [byte] = data {
            *byte = self.0.lock().unwrap_or_else(|e| e.into_inner()).read(offset as u8);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let [byte] = data {
            let Ok(()) = self.0.lock().unwrap_or_else(|e| e.into_inner()).write(offset as u8, *byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn only_s5_turns_off_and_only_the_reset_value_resets() {
        let (sender, events) = mpsc::channel();
        let sleep = AcpiSleep::new(move |event| sender.send(event).unwrap());
        for value in [0, 0x20, 5 << 2, 4 << 2 | 0x20, 0xff] {
            sleep.write(0, &[value]);
            sleep.write(1, &[value]);
        }
        sleep.write(2, &[0]);
        sleep.write(2, &[1, 0]);
        assert_eq!(events.try_recv(), Err(mpsc::TryRecvError::Empty));
        sleep.write(0, &[5 << 2 | 0x20]);
        sleep.write(2, &[1]);
        assert_eq!(events.try_iter().collect::<Vec<_>>(), [PowerEvent::Off, PowerEvent::Reset]);
    }

    #[test]
    fn the_keyboard_controller_resets_on_its_command() {
        let (sender, events) = mpsc::channel();
        let keyboard = KeyboardController::new(move |event| sender.send(event).unwrap());
        let mut status = [0xaa];
        keyboard.read(4, &mut status);
        keyboard.write(4, &[0xd1]);
        keyboard.write(0, &[0xfe]);
        assert_eq!(events.try_recv(), Err(mpsc::TryRecvError::Empty));
        keyboard.write(4, &[0xfe]);
        assert_eq!(events.try_recv(), Ok(PowerEvent::Reset));
    }
}
