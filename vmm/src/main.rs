//! The `daxvm` program.
fn main() {}
