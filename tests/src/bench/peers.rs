//! The peers, as Debian packages them and `scripts/fetch-qemu` unpacks them.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::BenchError;
use crate::vm::{in_target, scratch};

const PROGRAM: &str = "usr/bin/qemu-system-x86_64";
const LIBRARIES: [&str; 3] =
    ["usr/lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/pulseaudio", "lib/x86_64-linux-gnu"];
const FIRMWARE: [&str; 2] = ["usr/share/qemu", "usr/share/seabios"];

/// Where `scripts/fetch-*` leave what they fetch.
pub(super) fn cache() -> PathBuf {
    env::var_os("DAXVM_CACHE").map_or_else(|| in_target("cache"), PathBuf::from)
}

/// Copies parts of what a script has unpacked to where they are read quickly; those that are not there are left out.
fn install<'a>(
    source: &Path,
    name: &str,
    parts: impl IntoIterator<Item = &'a str>,
) -> Result<PathBuf, BenchError> {
    let root = scratch().join(name);
    if !root.exists() {
        // Under its name only when it is whole.
        let partial = root.with_extension("partial");
        for part in parts.into_iter().filter(|part| source.join(part).exists()) {
            copy(&source.join(part), &partial.join(part))?;
        }
        fs::rename(&partial, &root).map_err(|source| BenchError::File(root.clone(), source))?;
    }
    Ok(root)
}

/// Where the libraries of a package are, for LD_LIBRARY_PATH.
fn libraries(root: &Path) -> OsString {
    let libraries: Vec<_> = LIBRARIES.iter().map(|part| root.join(part).into_os_string()).collect();
    libraries.join(OsStr::new(":"))
}

/// QEMU, copied to where it starts quickly.
pub struct Qemu {
    root: PathBuf,
}

impl Qemu {
    /// Finds QEMU.
    ///
    /// # Errors
    /// It has not been fetched, or cannot be copied.
    pub fn find() -> Result<Qemu, BenchError> {
        let source = cache().join("qemu-10");
        fs::metadata(source.join(PROGRAM)).map_err(|error| BenchError::File(source.join(PROGRAM), error))?;
        let parts = [PROGRAM].into_iter().chain(LIBRARIES).chain(FIRMWARE);
        Ok(Qemu { root: install(&source, "bench-qemu", parts)? })
    }

    /// The program.
    pub fn program(&self) -> PathBuf {
        self.root.join(PROGRAM)
    }

    /// LD_LIBRARY_PATH for it.
    pub fn libraries(&self) -> OsString {
        libraries(&self.root)
    }

    /// Where its firmware is, each directory for an option `-L`.
    pub fn firmware(&self) -> impl Iterator<Item = PathBuf> {
        FIRMWARE.iter().map(|firmware| self.root.join(firmware))
    }

    /// A microvm with KVM and `memory` in QEMU's notation; its serial port is still to be chosen.
    pub fn microvm(&self, memory: &str, cpus: u32) -> Command {
        let mut command = Command::new(self.program());
        command.env("LD_LIBRARY_PATH", self.libraries());
        for firmware in self.firmware() {
            command.arg("-L").arg(firmware);
        }
        command.args(["-M", "microvm", "-accel", "kvm", "-cpu", "host", "-m", memory]);
        command.args(["-smp", &cpus.to_string(), "-nodefaults", "-no-user-config", "-no-reboot"]);
        command.args(["-display", "none"]);
        command
    }
}

/// virtiofsd, copied to where it starts quickly.
pub struct Virtiofsd {
    root: PathBuf,
    program: &'static str,
}

impl Virtiofsd {
    /// The one in C, a part of QEMU until 8.0.
    const IN_C: &str = "usr/lib/qemu/virtiofsd";
    /// The one in Rust.
    const IN_RUST: &str = "usr/libexec/virtiofsd";

    /// Finds it.
    ///
    /// # Errors
    /// It has not been fetched, or cannot be copied.
    pub fn find() -> Result<Virtiofsd, BenchError> {
        let source = cache().join("virtiofsd");
        let is_there = |program: &&str| source.join(program).exists();
        let Some(program) = [Virtiofsd::IN_RUST, Virtiofsd::IN_C].into_iter().find(is_there) else {
            return Err(BenchError::File(source, std::io::ErrorKind::NotFound.into()));
        };
        let root = install(&source, "bench-virtiofsd", [program].into_iter().chain(LIBRARIES))?;
        Ok(Virtiofsd { root, program })
    }

    /// Shares `dir`, with its own defaults for all but confinement, at `socket`, until QEMU lets go of that. Libraries
    /// that it has not are `qemu`'s.
    pub fn command(&self, qemu: &Qemu, socket: &Path, dir: &Path) -> Command {
        let mut command = Command::new(self.root.join(self.program));
        command.env("LD_LIBRARY_PATH", [libraries(&self.root), qemu.libraries()].join(OsStr::new(":")));
        let option = |name: &str, path: &Path| {
            let mut option = OsString::from(name);
            option.push(path);
            option
        };
        command.arg(option("--socket-path=", socket));
        match self.program {
            Virtiofsd::IN_C => command.arg("-o").arg(option("sandbox=chroot,cache=auto,source=", dir)),
            _ => command.arg(option("--shared-dir=", dir)).args(["--sandbox=chroot", "--cache=auto"]),
        };
        command
    }
}

/// Copies a file or a directory, links followed.
pub(super) fn copy(from: &Path, to: &Path) -> Result<(), BenchError> {
    let failed = |source| BenchError::File(from.to_owned(), source);
    if fs::metadata(from).map_err(failed)?.is_dir() {
        fs::create_dir_all(to).map_err(failed)?;
        for entry in fs::read_dir(from).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            // Packages contain links to files of packages that are not needed here.
            if from.join(&name).exists() {
                copy(&from.join(&name), &to.join(&name))?;
            }
        }
        return Ok(());
    }
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).map_err(failed)?;
    }
    fs::copy(from, to).map(drop).map_err(failed)
}
