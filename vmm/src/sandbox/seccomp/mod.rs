//! System call filters (seccomp(2)), one for each kind of threads.
//!
//! The process has one for all that any of its threads does, which each thread inherits. Those that work for the guest
//! then take a narrower one upon themselves, as the first thing that they do ([`enter`]). All filters name what is allowed
//! (`tables.rs`). Anything else ends the process with a message (`violation.rs`).
//!
//! A thread inherits the filter of the one that starts it, and devices are activated by vCPUs. So their threads are started
//! by a thread that does nothing else (`starter.rs`).

mod starter;
mod tables;
mod violation;

use std::collections::{BTreeMap, BTreeSet};
use std::env::consts::ARCH;
use std::error::Error;
use std::io::{self, Write};
use std::panic::{self, PanicHookInfo};
use std::sync::OnceLock;
use std::thread;

use devices::virtio::thread::ThreadKind;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter,
};
use syscalls::Sysno;

use self::tables::{Limited, Table, When};
use super::{Layer, SandboxError};

const NAME: &str = "seccomp";

/// What a thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// Runs the guest, and carries out what it does to registers.
    Vcpu,
    /// Serves the requests of a share.
    FileSystem,
    /// Moves data between guest memory and open descriptors.
    Data,
    /// Watches mapped files.
    Watcher,
    /// Tells others what the guest does: the API socket, the metrics file.
    Observer,
}

impl Kind {
    pub(super) const ALL: [Kind; 5] =
        [Kind::Vcpu, Kind::FileSystem, Kind::Data, Kind::Watcher, Kind::Observer];

    fn name(self) -> &'static str {
        match self {
            Kind::Vcpu => "vCPU",
            Kind::FileSystem => "share",
            Kind::Data => "disk, port, entropy",
            Kind::Watcher => "watcher",
            Kind::Observer => "API, metrics",
        }
    }

    fn tables(self) -> Vec<&'static Table> {
        match self {
            Kind::Vcpu => vec![&tables::ANY, &tables::WINDOW, &tables::VCPU],
            Kind::FileSystem => vec![&tables::ANY, &tables::WINDOW, &tables::FILE_SYSTEM],
            Kind::Data => vec![&tables::ANY, &tables::DATA],
            Kind::Watcher => vec![&tables::ANY, &tables::WINDOW],
            Kind::Observer => vec![&tables::ANY, &tables::OBSERVER],
        }
    }
}

impl From<ThreadKind> for Kind {
    fn from(kind: ThreadKind) -> Kind {
        match kind {
            ThreadKind::FileSystem => Kind::FileSystem,
            ThreadKind::Data => Kind::Data,
            ThreadKind::Watcher => Kind::Watcher,
        }
    }
}

/// All that any thread of the process does.
fn process_tables() -> Vec<&'static Table> {
    Kind::ALL.into_iter().flat_map(Kind::tables).chain([&tables::PROCESS]).collect()
}

/// The filters of the process, once it is confined.
static FILTERS: OnceLock<BTreeMap<Kind, BpfProgram>> = OnceLock::new();

/// Confines the calling thread to what its kind does, if the process is confined. It must be the first thing that the
/// thread does.
///
/// # Panics
/// The system refuses the filter, and the thread must not run without.
pub(crate) fn enter(kind: Kind) {
    let Some(filter) = FILTERS.get().and_then(|filters| filters.get(&kind)) else { return };
    if let Err(error) = apply_filter(filter) {
        panic!("Cannot confine a thread ({}): {error}", kind.name());
    }
}

/// What would be done.
pub(super) fn plan() -> Layer {
    match is_there() {
        true => layer(),
        false => Layer::missing(NAME, "the kernel has no system call filters"),
    }
}

/// Whether the kernel can filter system calls: it says so by complaining of the filter, which is none.
fn is_there() -> bool {
    // SAFETY: the null pointer is what makes this a question; the kernel answers EFAULT.
    let answer = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, std::ptr::null::<libc::c_void>())
    };
    // Without privileges and no_new_privs it looks at the rights first.
    answer < 0 && matches!(io::Error::last_os_error().raw_os_error(), Some(libc::EFAULT | libc::EACCES))
}

fn layer() -> Layer {
    let count = |tables: &[&Table]| {
        let calls: BTreeSet<_> = tables.iter().flat_map(|table| table.calls()).collect();
        calls.len()
    };
    let kinds: Vec<_> =
        Kind::ALL.iter().map(|kind| format!("{} {}", count(&kind.tables()), kind.name())).collect();
    let all = count(&process_tables());
    Layer::applied(NAME, format!("{all} system calls, no new processes; by thread: {}", kinds.join("; ")))
}

/// Filters the system calls of the calling thread and of all that it starts from now on.
pub(super) fn apply() -> Result<Layer, SandboxError> {
    if !is_there() {
        return Ok(plan());
    }
    install().map_err(SandboxError::new("filter system calls"))?;
    starter::start().map_err(SandboxError::new("start a thread"))?;
    Ok(layer())
}

fn install() -> Result<(), Box<dyn Error + Send + Sync>> {
    let mut filters = BTreeMap::new();
    for kind in Kind::ALL {
        filters.insert(kind, compile(&kind.tables())?);
    }
    let process = compile(&process_tables())?;
    violation::report()?;
    panic::set_hook(Box::new(say_panic));
    apply_filter(&old_clone()?)?;
    apply_filter(&process)?;
    // A second VM of the process has the same filters.
    let _ = FILTERS.set(filters);
    Ok(())
}

/// Says of a panic what the standard library does, but for a backtrace (`RUST_BACKTRACE`): for that the program would have to be
/// looked for and read, and the panic end as a forbidden system call.
fn say_panic(info: &PanicHookInfo<'_>) {
    let thread = thread::current();
    // Without standard error there is nobody to tell.
    let _ = writeln!(io::stderr(), "\nthread '{}' {info}", thread.name().unwrap_or("<unnamed>"));
}

/// A filter that allows what the tables say.
fn compile(tables: &[&Table]) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for Limited(call, when) in tables.iter().flat_map(|table| table.limited) {
        rules.entry(call.id().into()).or_default().extend(conditions(*when)?);
    }
    // No conditions allow a call always, whatever another table says of it.
    for call in tables.iter().flat_map(|table| table.always()) {
        rules.insert(call.id().into(), Vec::new());
    }
    let filter = SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, ARCH.try_into()?)?;
    filter.try_into()
}

fn conditions(when: When) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let rule = |argument, operator, value| {
        let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?;
        SeccompRule::new(vec![condition])
    };
    match when {
        When::OneOf(argument, values) => {
            values.iter().map(|value| rule(argument, SeccompCmpOp::Eq, (*value).into())).collect()
        }
        When::With(argument, bits) => {
            Ok(vec![rule(argument, SeccompCmpOp::MaskedEq(bits.into()), bits.into())?])
        }
        When::Without(argument, bits) => Ok(vec![rule(argument, SeccompCmpOp::MaskedEq(bits.into()), 0)?]),
        When::OwnProcess(argument) => Ok(vec![rule(argument, SeccompCmpOp::Eq, std::process::id().into())?]),
    }
}

/// A filter that lets clone3 be unknown. The C library then takes clone, whose flags a filter can see.
fn old_clone() -> Result<BpfProgram, seccompiler::BackendError> {
    let rules = BTreeMap::from([(Sysno::clone3.id().into(), Vec::new())]);
    let unknown = SeccompAction::Errno(libc::ENOSYS as u32);
    SeccompFilter::new(rules, SeccompAction::Allow, unknown, ARCH.try_into()?)?.try_into()
}
