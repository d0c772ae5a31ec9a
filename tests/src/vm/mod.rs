//! Drives guests under `daxvm`: boots one, asks its agent (`crate::guest`) to do things, and says how it ended.
//!
//! ```no_run
//! use tests::vm::{Kernel, Share, Vm};
//!
//! let mut vm = Vm::builder(&Kernel::find("6.12-cloud")?)
//!     .cpus(4)
//!     .memory("512M")
//!     .share(Share::new("data", "/srv/data").window("32M").dax("always"))
//!     .boot()?;
//! vm.mount("data", "/mnt", "dax=always")?;
//! assert!(vm.stat("/mnt/file")?.dax);
//! let ended = vm.power_off()?;
//! assert_eq!(ended.status, Some(0));
//! # Ok::<(), tests::vm::VmError>(())
//! ```
//!
//! Where things are: `DAXVM` names the program (else `target/daxvm`), `KERNELS` the directory of kernels (else
//! `target/kernels`), `GUEST_INIT` the guest's init (else it is beside the running program). Every wait has a deadline;
//! `DEADLINE_SCALE` multiplies them all.

mod builder;
mod calls;
mod command;
mod console;
mod error;
mod host;
mod kernel;
mod report;
mod running;
mod trap;

pub use builder::{Share, VmBuilder, daxvm};
pub use command::{CommandEnded, CommandRun, RunningCommand};
pub use error::VmError;
pub use host::{Holdings, HostProcess};
pub use kernel::{Kernel, beside, guest_init, in_target, scratch};
pub use report::{DaxCounts, Report, WindowCounts};
pub use running::{Ended, Vm};
pub use trap::{Misdeed, PANIC_MESSAGE, Trap};
