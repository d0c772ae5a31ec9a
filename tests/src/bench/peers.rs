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
        let root = scratch().join("bench-qemu");
        if !root.exists() {
            // Under its name only when it is whole.
            let partial = root.with_extension("partial");
            copy(&source.join(PROGRAM), &partial.join(PROGRAM))?;
            for part in LIBRARIES.iter().chain(&FIRMWARE).filter(|part| source.join(part).exists()) {
                copy(&source.join(part), &partial.join(part))?;
            }
            fs::rename(&partial, &root).map_err(|source| BenchError::File(root.clone(), source))?;
        }
        Ok(Qemu { root })
    }

    /// The program.
    pub fn program(&self) -> PathBuf {
        self.root.join(PROGRAM)
    }

    /// LD_LIBRARY_PATH for it.
    pub fn libraries(&self) -> OsString {
        let libraries: Vec<_> = LIBRARIES.iter().map(|part| self.root.join(part).into_os_string()).collect();
        libraries.join(OsStr::new(":"))
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
