//! A policy decides about any facts alike each time, and stands by what it decided.

#![no_main]

use devices::virtio::fs::policy::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| fuzzing::decide(data));
