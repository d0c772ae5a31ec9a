//! Guest kernels, and the initramfs that each needs.

use std::collections::HashMap;
use std::env;
use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use flate2::Compression;
use flate2::write::GzEncoder;
use tempfile::NamedTempFile;
use vmm::initramfs::{Archive, ModuleTree};

use super::VmError;

/// Modules that a guest with virtio-fs on PCI needs, where they are not built in.
const MODULES: [&str; 2] = ["virtio_pci", "virtiofs"];

/// What an initramfs is made of: the kernel's directory, and the modules.
type Contents = (PathBuf, Vec<&'static str>);

/// A guest kernel as `scripts/fetch-kernel` leaves it.
#[derive(Clone, Debug)]
pub struct Kernel {
    name: String,
    dir: PathBuf,
    elf: bool,
    modules: Vec<&'static str>,
}

impl Kernel {
    /// Finds a kernel by the name of its directory.
    pub fn find(name: &str) -> Result<Kernel, VmError> {
        let kernels = env::var_os("KERNELS").map_or_else(|| in_target("kernels"), PathBuf::from);
        let kernel =
            Kernel { name: name.to_owned(), dir: kernels.join(name), elf: false, modules: MODULES.to_vec() };
        let path = kernel.image();
        match fs::metadata(&path) {
            Ok(_) => Ok(kernel),
            Err(source) => Err(VmError::Missing { what: "the kernel", path, source }),
        }
    }

    /// The same kernel as an uncompressed ELF file.
    pub fn elf(self) -> Kernel {
        Kernel { elf: true, ..self }
    }

    /// With one more module that is loaded at boot.
    pub fn module(mut self, name: &'static str) -> Kernel {
        self.modules.push(name);
        self
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its directory, which has its modules too.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The file to boot.
    pub fn image(&self) -> PathBuf {
        self.dir.join(if self.elf { "vmlinux" } else { "vmlinuz" })
    }

    /// The initramfs for it: the agent as init, and modules as the kernel needs them. Made once a process.
    pub fn initrd(&self) -> Result<PathBuf, VmError> {
        static MADE: Mutex<Option<HashMap<Contents, NamedTempFile>>> = Mutex::new(None);
        let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
        let made = made.get_or_insert_default();
        let key = (self.dir.clone(), self.modules.clone());
        if let Some(file) = made.get(&key) {
            return Ok(file.path().to_owned());
        }
        let bytes = self.build_initrd().map_err(VmError::Initramfs)?;
        let file = NamedTempFile::new_in(scratch()).map_err(VmError::system("a temporary file"))?;
        fs::write(file.path(), bytes).map_err(VmError::system("writing the initramfs"))?;
        // Ordinary users boot it, too.
        fs::set_permissions(file.path(), Permissions::from_mode(0o644))
            .map_err(VmError::system("the initramfs's mode"))?;
        Ok(made.entry(key).or_insert(file).path().to_owned())
    }

    fn build_initrd(&self) -> Result<Vec<u8>, Box<dyn std::error::Error + Send + Sync>> {
        let mut archive = Archive::new();
        archive.host_file("init", 0o755, &guest_init()?)?;
        archive.device("dev/console", 0o600, 5, 1)?;
        let mut order = String::new();
        for module in ModuleTree::open(&self.dir.join("modules"))?.resolve(&self.modules)? {
            let file = format!("{}.ko", module.name);
            archive.file(&format!("modules/{file}"), 0o644, &module.bytes)?;
            order += &(file + "\n");
        }
        archive.file("modules/order", 0o644, order.as_bytes())?;
        // Small guests hold it and what comes out of it at the same time.
        let mut compressed = GzEncoder::new(Vec::new(), Compression::best());
        compressed.write_all(&archive.finish()?)?;
        Ok(compressed.finish()?)
    }
}

/// The guest's init.
pub fn guest_init() -> Result<PathBuf, VmError> {
    match env::var_os("GUEST_INIT") {
        Some(path) => found(path.into()),
        None => beside("guest-init"),
    }
}

/// One of this crate's programs: cargo leaves them beside each other, and tests one directory below them.
pub fn beside(name: &str) -> Result<PathBuf, VmError> {
    let program = env::current_exe().map_err(VmError::system("the running program"))?;
    let mut dirs = program.ancestors().skip(1).filter(|dir| !dir.ends_with("deps"));
    found(dirs.next().unwrap_or(Path::new("/")).join(name))
}

fn found(path: PathBuf) -> Result<PathBuf, VmError> {
    match fs::metadata(&path) {
        Ok(_) => Ok(path),
        Err(source) => Err(VmError::Missing { what: "a program of the tests", path, source }),
    }
}

/// Where the driver keeps its own files: in the lab this machine's files, /tmp among them, are reached slowly.
pub fn scratch() -> PathBuf {
    env::var_os("LAB_TMPFS").map_or_else(env::temp_dir, PathBuf::from)
}

/// A file that the project's scripts leave below `target`.
pub fn in_target(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target").join(name)
}
