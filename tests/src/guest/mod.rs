//! The guest's agent: PID 1 of the test guests, which does what the driver (`crate::vm`) asks for over the console.
//!
//! A request is one line, `@` and an [`Op`] in JSON; so is the reply, `@` and a [`Reply`]. Everything else on the console
//! is the kernel's. One request is served at a time. [`data`] generates all file contents, on both sides.

mod agent;
mod changing;
mod contest;
pub mod data;
mod init;
pub mod journal;
mod name;
mod ops;
mod per_file;
mod proto;
mod rogue;
mod wire;

pub use agent::Agent;
pub use changing::{Changing, Met};
pub use contest::{Contest, Crowd, Fared, ReadOrder};
pub use init::init;
pub use journal::Journal;
pub use name::{Bytes, GuestPath};
pub use per_file::*;
pub use proto::*;
pub use rogue::{PROGRAMS, SECRET, SHARED_BIG, SHARED_FILE};
pub use wire::{INIT, Line, READY, read_line, write_line};
