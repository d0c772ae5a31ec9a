//! Any bytes are a configuration or a matrix of cases, or have mistakes in named places.

#![no_main]

use vmm::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| fuzzing::config_file(data));
