//! Any accesses to configuration space and registers leave the transport in a state that the specification knows.

#![no_main]

use devices::virtio::pci::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| fuzzing::registers(data));
