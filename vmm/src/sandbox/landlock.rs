//! Landlock (landlock(7)): which files may be opened and changed by their paths, whoever the process is.
//!
//! It concerns paths and not descriptors: what is open stays usable, and what is opened again by /proc/self/fd is looked
//! at where the file is, below its share.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, Scope, make_bitflags,
};

use super::{Layer, Outputs, SandboxError, Share};

const NAME: &str = "landlock";

/// What is denied but for the rules: all that the library knows. What the kernel does not know stays allowed.
const DENIED: ABI = ABI::V10;
/// The first version of the interface that lets files be renamed and linked between directories: Linux 5.19.
const WITH_RENAMES: i32 = 2;
/// The versions that know of truncation, of the network, and of signals and abstract sockets: Linux 6.2, 6.7, 6.12.
const LATER: [(i32, &str); 3] =
    [(3, "truncation"), (4, "the network"), (6, "signals to other processes and abstract sockets")];

/// Reading of files and directories. Nothing is ever executed.
const READ: BitFlags<AccessFs> = make_bitflags!(AccessFs::{ReadFile | ReadDir});
/// Files that are replaced by new ones of the same directory.
const REPLACE: BitFlags<AccessFs> =
    make_bitflags!(AccessFs::{ReadFile | WriteFile | MakeReg | RemoveFile | Truncate});
const REMOVE: BitFlags<AccessFs> = make_bitflags!(AccessFs::{RemoveFile});

/// All that the guest may do to a writable share. Devices are made, but never used.
fn change() -> BitFlags<AccessFs> {
    (AccessFs::from_all(ABI::V5) & !(AccessFs::Execute | AccessFs::IoctlDev)) | READ
}

/// Files beside the shares that are read: what the process knows of itself, and a limit for an error message.
const OWN: [&str; 2] = ["/proc/self", "/proc/sys/vm/max_map_count"];

/// The version of the kernel's interface; why there is none.
fn version() -> Result<i32, String> {
    const VERSION: libc::c_uint = 1;
    // SAFETY: with this flag the call has no structure to read.
    let version = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<libc::c_void>(), 0_usize, VERSION)
    };
    match i32::try_from(version) {
        Ok(version @ WITH_RENAMES..) => Ok(version),
        Ok(1) => Err("that of this kernel forbids to rename between directories; Linux 5.19 is newer".into()),
        _ => Err(format!("the kernel has none, or it is switched off ({})", std::io::Error::last_os_error())),
    }
}

/// What would be allowed.
pub(super) fn plan(shares: &[Share], outputs: &Outputs) -> Layer {
    match version() {
        Ok(version) => layer(version, shares, outputs),
        Err(why) => Layer::missing(NAME, why),
    }
}

fn layer(version: i32, shares: &[Share], outputs: &Outputs) -> Layer {
    let list = |paths: Vec<&Path>| {
        let names: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
        names.join(", ")
    };
    let of = |read_only: bool| {
        let those = shares.iter().filter(|share| share.read_only == read_only);
        list(those.map(|share| share.path.as_path()).collect())
    };
    let parts = [
        (
            "read",
            [of(true), OWN.join(", ")]
                .into_iter()
                .filter(|part| !part.is_empty())
                .collect::<Vec<_>>()
                .join(", "),
        ),
        ("change", of(false)),
        ("replace files in", list(outputs.replaced_in())),
        ("remove files in", list(outputs.removed_in())),
    ];
    let parts: Vec<_> = parts
        .iter()
        .filter(|(_, what)| !what.is_empty())
        .map(|(verb, what)| format!("{verb} {what}"))
        .collect();
    let missing: Vec<_> = LATER.iter().filter(|(since, _)| version < *since).map(|(_, what)| *what).collect();
    let rest = match missing.is_empty() {
        true => "and nothing else".to_owned(),
        false => format!("and no other files; this kernel cannot forbid {}", missing.join(", ")),
    };
    Layer::applied(NAME, format!("version {version}: {}; {rest}", parts.join("; ")))
}

/// Denies all that the shares and the outputs do not need.
pub(super) fn apply(shares: &[Share], roots: &[OwnedFd], outputs: &Outputs) -> Result<Layer, SandboxError> {
    let version = match version() {
        Ok(version) => version,
        Err(why) => return Ok(Layer::missing(NAME, why)),
    };
    restrict(shares, roots, outputs).map_err(SandboxError::new("deny access to files with Landlock"))?;
    Ok(layer(version, shares, outputs))
}

fn restrict(
    shares: &[Share],
    roots: &[OwnedFd],
    outputs: &Outputs,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(DENIED))?
        .handle_access(AccessNet::from_all(DENIED))?
        .scope(Scope::from_all(DENIED))?
        .create()?;
    for (share, root) in shares.iter().zip(roots) {
        let access = if share.read_only { READ } else { change() };
        rules = rules.add_rule(PathBeneath::new(root.as_fd(), access))?;
    }
    let [own, limit] = OWN;
    rules = rules.add_rule(PathBeneath::new(PathFd::new(own)?, READ))?;
    rules = rules.add_rule(PathBeneath::new(PathFd::new(limit)?, AccessFs::ReadFile))?;
    for directory in outputs.replaced_in() {
        rules = rules.add_rule(PathBeneath::new(PathFd::new(directory)?, REPLACE))?;
    }
    for directory in outputs.removed_in() {
        rules = rules.add_rule(PathBeneath::new(PathFd::new(directory)?, REMOVE))?;
    }
    rules.restrict_self()?;
    Ok(())
}
