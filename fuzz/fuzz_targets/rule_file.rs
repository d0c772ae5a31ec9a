//! Any bytes are a rule file, or have mistakes in named places.

#![no_main]

use devices::virtio::fs::policy::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| fuzzing::rule_file(data));
