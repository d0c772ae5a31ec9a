//! Any FUSE requests are answered, and lead to nothing outside of the share.

#![no_main]

use devices::virtio::fs::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| fuzzing::requests(data));
