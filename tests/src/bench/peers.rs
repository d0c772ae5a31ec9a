//! The peers, as Debian packages them and `scripts/fetch-qemu` unpacks them.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::BenchError;
use crate::vm::{in_target, scratch};

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
        let source = cache.join("qemu/usr");
        let root = scratch().join("bench-qemu");
        if !root.exists() {
            for part in ["bin/qemu-system-x86_64", "lib/x86_64-linux-gnu", "share/qemu", "share/seabios"] {
                copy(&source.join(part), &root.join(part))?;
            }
        }
        Ok(Qemu { root })
    }

    /// A microvm with KVM, `memory` in QEMU's notation and the serial port on standard output.
    pub fn microvm(&self, memory: &str, cpus: u32) -> Command {
        let lib = self.root.join("lib/x86_64-linux-gnu");
        let mut path = OsString::from(&lib);
        path.push(":");
        path.push(lib.join("pulseaudio"));
        let mut command = Command::new(self.root.join("bin/qemu-system-x86_64"));
        command.env("LD_LIBRARY_PATH", path);
        for firmware in ["share/qemu", "share/seabios"] {
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
