//! What the program does inside a guest, as PID 1: it is the `/init` of the initramfs that the runner makes in memory.

pub mod protocol;
