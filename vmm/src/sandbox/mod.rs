//! Confinement: what the process may still do once the guest runs. docs/security.md says against whom.
//!
//! The server of shares parses what a hostile guest sends, in the process that holds the VM. So before the first guest
//! instruction the process gives up all that its shares do not need, in layers, each of which holds if the others do not:
//!
//! | layer | file | what is left |
//! | --- | --- | --- |
//! | shares | `namespaces.rs` | each share is a copy of its mounts that is mounted nowhere: there is nothing above its root |
//! | limits | `limits.rs` | no core dumps, in which the guest's memory would be |
//! | mounts | `namespaces.rs` | an empty root directory |
//! | no-new-privileges, capabilities | `capabilities.rs` | what the server needs to serve root's files |
//! | landlock | `landlock.rs` | files of the shares, as they are shared; no network, no signals to others |
//! | seccomp | `seccomp/` | the system calls that a kind of threads makes |
//!
//! Layers that the machine lacks are left out and told ([`Layer`]); one that is there and fails is an error.
//! All of it concerns the calling thread and those that it starts: [`crate::Vm::confine`] comes before there are any.

mod capabilities;
mod landlock;
mod limits;
pub(crate) use limits::survive_file_size;
mod namespaces;
pub(crate) mod seccomp;
#[cfg(test)]
mod tests;

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub(crate) use namespaces::own_tree;

/// Whether the process is confined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum SandboxMode {
    /// It is, as far as the machine allows.
    On,
    /// It may do all that whoever started it may.
    #[default]
    Off,
}

/// Files that are made or removed after the process was confined, by their paths.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outputs {
    /// Files that are replaced again and again, by new ones made in the same directory.
    pub replaced: Vec<PathBuf>,
    /// Files that are removed at the end.
    pub removed: Vec<PathBuf>,
}

impl Outputs {
    /// The directories of the files that are replaced.
    fn replaced_in(&self) -> Vec<&Path> {
        directories(&self.replaced)
    }

    /// The directories of the files that are removed.
    fn removed_in(&self) -> Vec<&Path> {
        directories(&self.removed)
    }
}

fn directories(files: &[PathBuf]) -> Vec<&Path> {
    let mut directories: Vec<_> = files.iter().filter_map(|file| file.parent()).collect();
    directories.sort();
    directories.dedup();
    directories
}

/// A share, as far as confinement is concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Share {
    /// Its directory.
    pub path: PathBuf,
    /// Whether it is shared read-only.
    pub read_only: bool,
    /// Why it is no tree of its own, if it is none.
    pub not_own: Option<String>,
}

/// A layer of the confinement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Layer {
    /// Its name, as in the table of this module.
    pub layer: &'static str,
    /// Whether it is there.
    pub applied: bool,
    /// What it leaves to the process; why it is not there.
    pub detail: String,
}

impl Layer {
    fn applied(layer: &'static str, detail: impl Into<String>) -> Layer {
        Layer { layer, applied: true, detail: detail.into() }
    }

    fn missing(layer: &'static str, why: impl Into<String>) -> Layer {
        Layer { layer, applied: false, detail: why.into() }
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Layer { layer, applied, detail } = self;
        if *applied { write!(f, "{layer}: {detail}") } else { write!(f, "{layer}: not here: {detail}") }
    }
}

/// Why the process cannot be confined, although the machine has what it takes.
#[derive(Debug, thiserror::Error)]
#[error("Cannot confine daxvm: {what}; --sandbox=off runs the guest without, with all rights that you have")]
pub struct SandboxError {
    what: &'static str,
    #[source]
    source: Box<dyn std::error::Error + Send + Sync>,
}

impl SandboxError {
    fn new<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
        what: &'static str,
    ) -> impl FnOnce(E) -> SandboxError {
        move |error| SandboxError { what, source: error.into() }
    }
}

/// What confining would come to on this machine; nothing is changed. `shares` are directories, and whether they are
/// read-only.
pub(crate) fn plan<'a>(shares: impl Iterator<Item = (&'a Path, bool)>, outputs: &Outputs) -> Vec<Layer> {
    let share = |(path, read_only): (&Path, bool)| Share {
        path: path.to_owned(),
        read_only,
        not_own: own_tree(path, read_only).err().map(|error| error.to_string()),
    };
    let shares: Vec<_> = shares.map(share).collect();
    vec![
        own_trees(&shares),
        limits::layer(),
        namespaces::plan(outputs),
        capabilities::no_new_privileges(),
        capabilities::plan(&shares),
        landlock::plan(&shares, outputs),
        seccomp::plan(),
    ]
}

/// Confines the calling thread, and all that it starts from now on, to what the shares need, of which `roots` are the
/// root directories, and to these outputs.
///
/// # Errors
/// A layer fails that the machine has.
pub(crate) fn apply(
    shares: &[Share],
    roots: &[OwnedFd],
    outputs: &Outputs,
) -> Result<Vec<Layer>, SandboxError> {
    let layers = vec![
        own_trees(shares),
        limits::apply()?,
        // Mounts need capabilities, and Landlock lets nobody mount.
        namespaces::apply(outputs)?,
        capabilities::forbid_new_privileges()?,
        capabilities::apply(shares)?,
        landlock::apply(shares, roots, outputs)?,
        seccomp::apply()?,
    ];
    for layer in &layers {
        tracing::debug!(layer = layer.layer, applied = layer.applied, "{}", layer.detail);
    }
    Ok(layers)
}

/// The layer of shares that are trees of their own.
fn own_trees(shares: &[Share]) -> Layer {
    const NAME: &str = "shares";
    if shares.is_empty() {
        return Layer::applied(NAME, "none");
    }
    let not_own: Vec<_> = shares
        .iter()
        .filter_map(|share| Some(format!("{}: {}", share.path.display(), share.not_own.as_ref()?)))
        .collect();
    match not_own.is_empty() {
        true => Layer::applied(
            NAME,
            "each is a tree of its own, mounted nowhere, in which no links are followed, no devices opened and no programs run",
        ),
        false => Layer::missing(NAME, not_own.join(", ")),
    }
}
