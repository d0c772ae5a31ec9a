//! Any kernel image and initramfs are loaded into guest memory or refused.

#![no_main]

use vmm::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| fuzzing::kernel(data));
