//! A look into a running VM: HTTP/1.1 with JSON over a Unix socket (`--api-socket`), read-only. docs/observability.md is
//! its manual.
//!
//! [`ApiSocket`] takes a path in the file system and gives it back; [`Server`] answers on it, in one thread of its own that
//! waits for nobody; what it answers comes from a [`Probe`], which holds handles to counters and nothing of the VM's.
//! [`get`] is the other side.

mod client;
mod http;
mod model;
mod probe;
mod routes;
mod server;
mod socket;

pub use client::{ClientError, get};
pub use model::{DiskStatus, Files, ShareFiles, ShareStatus, ShareWindow, Status, Windows};
#[cfg(test)]
pub(crate) use probe::testing;
pub use probe::{Counters, Probe};
pub use server::Server;
pub use socket::{ApiSocket, SocketError, remove_sockets};
