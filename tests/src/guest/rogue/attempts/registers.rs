//! Features, status and the other registers behind BAR 0: in the wrong order, of the wrong width, and with nonsense.

use super::{Act, Attempt};
use crate::guest::Failure;
use crate::guest::rogue::device::{
    Device, FEATURES, PATIENCE, QUEUE_SIZE, REQUESTS, SHORT, common,
    status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET},
};
use crate::guest::rogue::function::Part;
use crate::guest::rogue::io::WIDTHS;
use crate::guest::rogue::{Expected, Rogue};

/// Status of a device that lives.
const ALIVE: u64 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;

/// Features that are accepted, and whether the device agrees.
const NEGOTIATIONS: [(&str, u64, bool); 8] = [
    ("no features", 0, false),
    ("all but version 1", FEATURES & !(1 << 32), false),
    ("a feature of other devices", FEATURES | 1, false),
    ("a feature that does not exist", FEATURES | 1 << 45, false),
    ("packed rings", FEATURES | 1 << 34, false),
    ("an IOMMU", FEATURES | 1 << 33, false),
    ("all features", u64::MAX, false),
    ("event indices that stay as they are", FEATURES | 1 << 29, true),
];

/// Statuses that are written one after the other after a reset, and what the status then is.
const STEPS: [(&str, &[u64], u64); 6] = [
    ("DRIVER_OK first", &[DRIVER_OK], 0),
    ("DRIVER_OK without a driver", &[ACKNOWLEDGE, ACKNOWLEDGE | DRIVER_OK], ACKNOWLEDGE),
    (
        "DRIVER_OK without features",
        &[ACKNOWLEDGE, ACKNOWLEDGE | DRIVER, ACKNOWLEDGE | DRIVER | DRIVER_OK],
        ACKNOWLEDGE | DRIVER,
    ),
    ("FEATURES_OK first", &[FEATURES_OK], 0),
    ("all at once", &[ALIVE], ACKNOWLEDGE | DRIVER),
    ("NEEDS_RESET of the driver", &[ACKNOWLEDGE | NEEDS_RESET], ACKNOWLEDGE),
];

pub fn attempts() -> Vec<Attempt> {
    let negotiations = NEGOTIATIONS.map(|(what, features, agrees)| {
        Attempt::new("registers", what, move |rogue| negotiate(rogue, features, agrees))
    });
    let steps = STEPS.map(|(what, written, expected)| {
        Attempt::new("registers", what, move |rogue| {
            rogue.device.reset()?;
            written.iter().try_for_each(|status| rogue.device.set_status(*status))?;
            let found = rogue.device.status()?;
            rogue.expect_value("the status", expected, found);
            Ok(())
        })
    });
    let more: [(&str, Act); 8] = [
        ("status bits cleared", bits_cleared),
        ("FAILED before DRIVER_OK", failed),
        ("features after they were agreed", features_late),
        ("every width in the common configuration", sweep_common),
        ("every width in a queue's setup", sweep_setup),
        ("every width in the device's configuration", sweep_device),
        ("every width in the MSI-X table", |rogue| sweep_at(rogue, 0x4000, 80)),
        ("every width everywhere else", sweep_elsewhere),
    ];
    let more = more.map(|(what, run)| Attempt::new("registers", what, run));
    negotiations.into_iter().chain(steps).chain(more).collect()
}

fn negotiate(rogue: &mut Rogue, features: u64, agrees: bool) -> Result<(), Failure> {
    let device = &mut rogue.device;
    device.reset()?;
    let agreed = device.negotiate(features)?;
    device.set_queue(REQUESTS, QUEUE_SIZE, device.rings(REQUESTS))?;
    device.go()?;
    let chain = device.put(&Device::init_message(7));
    device.post(&chain)?;
    let patience = if agrees { PATIENCE } else { SHORT };
    let answer = device.answer(patience)?;
    let status = device.status()?;
    rogue.expect_value("whether the device agrees", agrees.into(), agreed.into());
    let (expected, alive) =
        if agrees { (Expected::Done, ALIVE) } else { (Expected::Silence, ACKNOWLEDGE | DRIVER) };
    rogue.expect("INIT", expected, answer);
    rogue.expect_value("the status", alive, status);
    Ok(())
}

fn bits_cleared(rogue: &mut Rogue) -> Result<(), Failure> {
    for status in [ACKNOWLEDGE, DRIVER, ALIVE & !DRIVER_OK, ALIVE & !FEATURES_OK, FAILED, NEEDS_RESET, 0x30] {
        rogue.device.set_status(status)?;
        let found = rogue.device.status()?;
        rogue.expect_value(format!("the status after {status:#x}"), ALIVE, found);
    }
    rogue.device.read_file()
}

fn failed(rogue: &mut Rogue) -> Result<(), Failure> {
    let device = &mut rogue.device;
    device.reset()?;
    device.negotiate(FEATURES)?;
    device.set_queue(REQUESTS, QUEUE_SIZE, device.rings(REQUESTS))?;
    device.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | FAILED)?;
    device.set_status(ALIVE | FAILED)?;
    let chain = device.put(&Device::init_message(7));
    device.post(&chain)?;
    let answer = device.answer(SHORT)?;
    rogue.expect("INIT", Expected::Silence, answer);
    Ok(())
}

fn features_late(rogue: &mut Rogue) -> Result<(), Failure> {
    for select in [0, 1, 2, u64::from(u32::MAX)] {
        rogue.device.set(common::DRIVER_FEATURE_SELECT, 4, select)?;
        let before = rogue.device.get(common::DRIVER_FEATURE, 4)?;
        for features in [0, 0xffff_ffff] {
            rogue.device.set(common::DRIVER_FEATURE, 4, features)?;
            let after = rogue.device.get(common::DRIVER_FEATURE, 4)?;
            rogue.expect_value(format!("features {select}"), before, after);
        }
    }
    rogue.device.read_file()
}

/// Reads and writes a range of the registers in every width and at every offset. Nothing is expected but an end.
fn sweep(device: &Device, start: u64, len: u64) -> Result<(), Failure> {
    for width in WIDTHS {
        for offset in start..(start + len).min(device.registers.len() - width as u64 + 1) {
            device.registers.read(offset, width)?;
            for value in [u64::MAX, 0x0102_0304_0506_0708] {
                device.registers.write(offset, width, value)?;
            }
        }
    }
    Ok(())
}

fn sweep_at(rogue: &mut Rogue, start: u64, len: u64) -> Result<(), Failure> {
    sweep(&rogue.device, start, len)?;
    rogue.tried.answers += 1;
    Ok(())
}

fn sweep_common(rogue: &mut Rogue) -> Result<(), Failure> {
    sweep_at(rogue, rogue.device.common.offset, rogue.device.common.len + 16)
}

/// The rings' registers while they can be written, and the start of a device with what is then in them.
fn sweep_setup(rogue: &mut Rogue) -> Result<(), Failure> {
    for queue in 0..=REQUESTS {
        rogue.device.reset()?;
        rogue.device.negotiate(FEATURES)?;
        rogue.device.set(common::QUEUE_SELECT, 2, queue.into())?;
        sweep_at(rogue, rogue.device.common.offset + common::QUEUE_SIZE, 32)?;
        rogue.device.set(common::QUEUE_ENABLE, 2, 1)?;
        rogue.device.go()?;
        rogue.device.ring(queue)?;
        let answer = rogue.device.answer(SHORT)?;
        rogue.expect("rings of nonsense", Expected::Anything, answer);
    }
    Ok(())
}

/// The tag and the number of queues stay.
fn sweep_device(rogue: &mut Rogue) -> Result<(), Failure> {
    let at = rogue.device.function.capability(Part::Device)?.offset;
    let before = rogue.device.registers.read_bytes(at, 40)?;
    sweep_at(rogue, at, 64)?;
    sweep_at(rogue, at + 0xfe0, 32)?;
    let after = rogue.device.registers.read_bytes(at, 40)?;
    rogue.expect_value("whether the configuration has changed", 0, (before != after).into());
    rogue.device.read_file()
}

fn sweep_elsewhere(rogue: &mut Rogue) -> Result<(), Failure> {
    let isr = rogue.device.function.capability(Part::Isr)?.offset;
    let end = rogue.device.registers.len();
    for (start, len) in
        [(0xff0, 16), (isr, 16), (0x2ff0, 32), (0x3ff0, 16), (0x5ff0, 32), (0x6ff0, 32), (end - 24, 24)]
    {
        sweep_at(rogue, start, len)?;
    }
    rogue.device.read_file()
}
