//! Any rings are served by a device or stop their queue.

#![no_main]

use devices::virtio::fs::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| fuzzing::rings(data));
