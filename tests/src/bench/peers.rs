//! The peers, as Debian packages them and `scripts/fetch-qemu` unpacks them.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::BenchError;
use crate::vm::{in_target, scratch};

const PROGRAM: &str = "usr/bin/qemu-system-x86_64";
const LIBRARIES: [&str; 3] =
    ["usr/lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/pulseaudio", "lib/x86_64-linux-gnu"];
const FIRMWARE: [&str; 2] = ["usr/share/qemu", "usr/share/seabios"];

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
        let cache = env::var_os("DAXVM_CACHE").map_or_else(|| in_target("cache"), PathBuf::from);
        let source = cache.join("qemu");
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

    /// A microvm with KVM, `memory` in QEMU's notation and the serial port on standard output.
    pub fn microvm(&self, memory: &str, cpus: u32) -> Command {
        let mut command = Command::new(self.root.join(PROGRAM));
        let libraries: Vec<_> = LIBRARIES.iter().map(|part| self.root.join(part).into_os_string()).collect();
        command.env("LD_LIBRARY_PATH", libraries.join(OsStr::new(":")));
        for firmware in FIRMWARE {
            command.arg("-L").arg(self.root.join(firmware));
        }
        command.args(["-M", "microvm", "-accel", "kvm", "-cpu", "host", "-m", memory]);
        command.args(["-smp", &cpus.to_string(), "-nodefaults", "-no-user-config", "-no-reboot"]);
        command.args(["-display", "none", "-serial", "stdio"]);
        command
    }
}

fn copy(from: &Path, to: &Path) -> Result<(), BenchError> {
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
