//! virtme-ng, as `scripts/fetch-virtme-ng` leaves it, with the host's Python, copied to where all of it starts quickly.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::mount_bind;

use super::BenchError;
use super::peers::{Qemu, cache, copy};
use super::runner::MEMORY;
use crate::lab::private_mounts;
use crate::vm::scratch;

/// Parts of Python's library that virtme-ng has no use for, and that are large.
const UNUSED: [&str; 6] = ["test", "site-packages", "dist-packages", "idlelib", "ensurepip", "lib2to3"];

/// What is asked of the host's Python: itself, its version, its library.
const ABOUT: &str = "import sys, sysconfig\n\
    print(sys.executable, 'python%d.%d' % sys.version_info[:2], sysconfig.get_path('stdlib'), sep='\\n')";

/// Debian 12 has virtiofsd in C. virtme-ng starts that in Rust, with other options, and waits for its .pid file.
const VIRTIOFSD: &str = r#"
case $1 in --version | --help) exec "$virtiofsd" "$1" ;; esac
while [ $# -gt 0 ]; do
    case $1 in
        --socket-path) socket=$2 ;;
        --shared-dir) source=$2 ;;
        --cache) cache=$2 ;;
    esac
    shift
done
"$virtiofsd" --socket-path="$socket" -o source="$source",cache="$cache",sandbox=chroot &
until [ -S "$socket" ]; do sleep 0.01; done
echo $! >"$socket.pid"
wait
"#;

/// A virtme-ng that is ready to run.
pub(super) struct VirtmeNg {
    root: PathBuf,
    busybox: PathBuf,
    kernel: PathBuf,
    libraries: OsString,
    qemu: PathBuf,
    qemu_options: String,
}

impl VirtmeNg {
    /// Makes it ready, for a kernel in a directory that has `vmlinuz` and `lib/modules`.
    ///
    /// # Errors
    /// It has not been fetched, there is no Python, or files cannot be copied.
    pub(super) fn find(qemu: &Qemu, kernel: &Path) -> Result<VirtmeNg, BenchError> {
        let source = cache().join("virtme-ng");
        let files = outside_run()?;
        let root = files.join("bench-virtme-ng");
        let plain = root.join("kernel");
        let _ = fs::remove_dir_all(&plain);
        copy(kernel, &plain)?;
        decompress_modules(&plain)?;
        let options: Vec<_> = qemu.firmware().map(|path| format!("-L {}", path.display())).collect();
        let virtme_ng = VirtmeNg {
            busybox: source.join("bin/busybox"),
            kernel: plain.join("vmlinuz"),
            libraries: qemu.libraries(),
            qemu: qemu.program(),
            qemu_options: options.join(" "),
            root,
        };
        if !virtme_ng.bin("vng").exists() {
            virtme_ng.install(&source)?;
        }
        Ok(virtme_ng)
    }

    fn install(&self, source: &Path) -> Result<(), BenchError> {
        copy(&source.join("python"), &self.root.join("python"))?;
        let about = Command::new("python3").args(["-c", ABOUT]).output();
        let about = about.map_err(|source| BenchError::System("run python3", source))?;
        let about = String::from_utf8_lossy(&about.stdout).into_owned();
        let [program, version, library] = about.lines().collect::<Vec<_>>()[..] else {
            return Err(BenchError::Unexpected(format!("python3 says {about:?} of itself")));
        };
        copy(Path::new(program), &self.python())?;
        let to = self.root.join("home/lib").join(version);
        for entry in fs::read_dir(library).map_err(at(Path::new(library)))?.flatten() {
            let name = entry.file_name();
            let config = name.to_string_lossy().starts_with("config-");
            if !config && !UNUSED.iter().any(|unused| name == *unused) {
                copy(&entry.path(), &to.join(name))?;
            }
        }
        let python = self.python();
        for (name, module) in [("vng", "virtme_ng.run"), ("virtme-run", "virtme.commands.run")] {
            let text = format!("import sys\nfrom {module} import main\nsys.exit(main())\n");
            self.script(name, &python, &text)?;
        }
        let virtiofsd = format!("virtiofsd={}{VIRTIOFSD}", source.join("usr/lib/qemu/virtiofsd").display());
        self.script("virtiofsd", Path::new("/bin/sh"), &virtiofsd)?;
        copy(&source.join("bin/kmod"), &self.bin("kmod"))?;
        for name in ["modprobe", "depmod"] {
            symlink("kmod", self.bin(name)).map_err(at(&self.bin(name)))?;
        }
        Ok(())
    }

    /// Runs `script` in a guest with one CPU; with `--verbose` among the options, what the guest's kernel says is printed.
    ///
    /// Where the host has no udev its guest does not find the ports for the command's streams: what the command writes is
    /// lost then, and virtme-ng's exit status is always 255. So the script's status goes to a serial port, and
    /// [`status`](VirtmeNg::status) has it.
    pub(super) fn command(&self, options: &[&str], script: &str) -> Command {
        let _ = fs::remove_file(self.proof());
        let mut command = Command::new(self.bin("vng"));
        let path = std::env::var_os("PATH").unwrap_or_default();
        command.env("PATH", [self.root.join("bin").as_os_str(), &path].join(OsStr::new(":")));
        command.env("PYTHONHOME", self.root.join("home")).env("PYTHONPATH", self.root.join("python"));
        // It caches what it makes of its modules and of kernels.
        command.env_remove("PYTHONDONTWRITEBYTECODE").env("HOME", &self.root).env("TMPDIR", scratch());
        command.env("LD_LIBRARY_PATH", &self.libraries);
        command.args(options).arg("--run").arg(&self.kernel).args(["--cpus", "1", "--memory", MEMORY]);
        // Its microvm has legacy virtio-mmio devices, at which virtiofsd in C aborts.
        command.arg("--disable-microvm").arg("--busybox").arg(&self.busybox).arg("--qemu").arg(&self.qemu);
        command.arg(format!(
            "--qemu-opts={} -chardev file,id=proof,path={} -device isa-serial,chardev=proof,index=1",
            self.qemu_options,
            self.proof().display()
        ));
        command.args(["--", "sh", "-c", &format!("{script}; echo $? >/dev/ttyS1")]);
        command
    }

    /// The exit status of the last script, if it got to its end.
    pub(super) fn status(&self) -> Option<i32> {
        fs::read_to_string(self.proof()).ok()?.trim().parse().ok()
    }

    fn proof(&self) -> PathBuf {
        self.root.join("status")
    }

    fn bin(&self, name: &str) -> PathBuf {
        self.root.join("bin").join(name)
    }

    fn python(&self) -> PathBuf {
        self.root.join("home/bin/python3")
    }

    fn script(&self, name: &str, interpreter: &Path, text: &str) -> Result<(), BenchError> {
        let path = self.bin(name);
        fs::create_dir_all(self.root.join("bin")).map_err(at(&path))?;
        fs::write(&path, format!("#!{}\n{text}", interpreter.display())).map_err(at(&path))?;
        fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).map_err(at(&path))
    }
}

/// Its initramfs loads modules with busybox, which cannot load compressed ones.
fn decompress_modules(kernel: &Path) -> Result<(), BenchError> {
    let mut command = Command::new("find");
    command.arg(kernel).args(["-name", "*.ko.xz", "-exec", "xz", "-d", "{}", "+"]);
    match command.status().map_err(|source| BenchError::System("run find", source))?.success() {
        true => Ok(()),
        false => Err(BenchError::Unexpected("xz cannot decompress the kernel's modules".into())),
    }
}

/// The scratch directory under another name. The guest's root is the host's, but for `/run`, where it mounts a file system of
/// its own, and virtme-ng's init lies among these files.
fn outside_run() -> Result<PathBuf, BenchError> {
    const ELSEWHERE: &str = "/mnt";
    let bound = private_mounts().and_then(|()| Ok(mount_bind(scratch(), ELSEWHERE)?));
    bound.map_err(|source| BenchError::System("show the scratch directory in /mnt", source))?;
    Ok(ELSEWHERE.into())
}

fn at(path: &Path) -> impl FnOnce(std::io::Error) -> BenchError {
    let path = path.to_owned();
    move |source| BenchError::File(path, source)
}
