//! Any mappings are those of a model of the window.

#![no_main]

use devices::virtio::fs::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| fuzzing::mappings(data));
