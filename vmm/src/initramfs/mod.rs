//! Builds an initramfs in memory, and finds the kernel modules to put into it.
//!
//! [`Archive`] is the cpio archive; [`ModuleTree`] resolves module names to files in the order they must be loaded.
//!
//! ```no_run
//! use std::path::Path;
//! use vmm::initramfs::{Archive, ModuleTree};
//!
//! let mut archive = Archive::new();
//! archive.host_file("init", 0o755, Path::new("target/init"))?;
//! archive.device("dev/console", 0o600, 5, 1)?;
//! for module in ModuleTree::open(Path::new("/"))?.resolve(&["virtio_pci", "virtiofs"])? {
//!     archive.file(&format!("modules/{}.ko", module.name), 0o644, &module.bytes)?;
//! }
//! let initrd: Vec<u8> = archive.finish()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod archive;
mod modinfo;
mod modules;

pub use archive::{Archive, ArchiveError};
pub use modinfo::{Modinfo, ModinfoError};
pub use modules::{Module, ModuleError, ModuleTree};
