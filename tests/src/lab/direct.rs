//! The host of the lab where the machine has hardware KVM: the machine itself, with the scratch file systems mounted where
//! only the lab sees them.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::thread::UnshareFlags;

use super::LabError;
use super::daemon::{Machine, port_pairs};
use super::paths::Paths;
use super::tools::{Tool, Tools};

/// The ioctl that makes a virtual machine, `_IO(KVMIO, 0x01)`.
const KVM_CREATE_VM: libc::c_ulong = 0xae01;

/// Sparse: they cost what is written to them.
const DISK_SIZE: u64 = 16 << 30;

/// Whether this machine has KVM in hardware. A /dev/kvm alone proves nothing: it may emulate the guest's kernel.
pub fn hardware_kvm() -> bool {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpu.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm") && create_vm().is_ok()
}

/// Makes an empty virtual machine, which ends with its descriptor.
pub fn create_vm() -> io::Result<OwnedFd> {
    let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
    // SAFETY: KVM_CREATE_VM takes a number, not a pointer. The descriptor it returns is new and owned by nobody else.
    unsafe {
        let vm = libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&kvm), KVM_CREATE_VM, 0);
        if vm < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(std::os::fd::FromRawFd::from_raw_fd(vm))
    }
}

/// Prepares the scratch directories and starts the agents. The mounts belong to a mount namespace of the daemon's: they
/// end with it, and the machine never sees them.
pub fn start(paths: &Paths) -> Result<Machine, LabError> {
    let failed = |error| LabError::system("start the lab's agents", error);
    let env = scratch(paths);
    let (ours, theirs) = port_pairs().map_err(failed)?;
    let program = std::env::current_exe().map_err(failed)?;
    let spawn = |port: OwnedFd| {
        Command::new(&program)
            .arg("agent")
            .envs(env.iter().cloned())
            .stdin(Stdio::from(port))
            .stdout(Stdio::null())
            .spawn()
    };
    let children = theirs.into_iter().map(spawn).collect::<io::Result<_>>().map_err(failed)?;
    Ok(Machine { children, ports: ours })
}

/// The scratch directories that can be had, under the names that jobs find in their environment. What cannot is said.
fn scratch(paths: &Paths) -> Vec<(&'static str, PathBuf)> {
    let private = private_mounts();
    let mut env = Vec::new();
    for (name, kind) in [("LAB_EXT4", "ext4"), ("LAB_XFS", "xfs"), ("LAB_TMPFS", "tmpfs")] {
        let mounted = match &private {
            Ok(()) => mount_scratch(paths, kind),
            Err(error) => Err(format!("mounting needs root: {error}")),
        };
        match mounted {
            Ok(dir) => env.push((name, dir)),
            Err(reason) if kind == "tmpfs" => match plain_tmpfs() {
                Ok(dir) => env.push((name, dir)),
                Err(error) => eprintln!("lab: there is no {name}: {reason}; /dev/shm: {error}"),
            },
            Err(reason) => eprintln!("lab: there is no {name}: {reason}"),
        }
    }
    env
}

/// Gives this thread, and what it starts, a mount namespace. What the machine mounts later still appears in it.
pub fn private_mounts() -> io::Result<()> {
    // SAFETY: only the mount namespace is unshared, and with it the working directory: no descriptor table or memory stops
    // being shared with anybody.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS)? };
    Ok(mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?)
}

fn mount_scratch(paths: &Paths, kind: &str) -> Result<PathBuf, String> {
    let dir = paths.state(kind);
    fs::create_dir_all(&dir).map_err(|error| error.to_string())?;
    let mut command = Command::new("mount");
    command.args(["-t", kind]);
    match kind {
        "tmpfs" => command.args(["-o", "size=50%,mode=1777", "tmpfs"]),
        _ => command.args(["-o", "loop"]).arg(make_image(paths, kind)?),
    };
    let output = command.arg(&dir).stdin(Stdio::null()).output().map_err(|error| error.to_string())?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
    }
    open_to_all(&dir).map_err(|error| error.to_string())?;
    Ok(dir)
}

fn make_image(paths: &Paths, kind: &str) -> Result<PathBuf, String> {
    let image = paths.state(&format!("{kind}.img"));
    let _ = fs::remove_file(&image);
    File::create(&image).and_then(|file| file.set_len(DISK_SIZE)).map_err(|error| error.to_string())?;
    let tool = if kind == "ext4" { Tool::MkfsExt4 } else { Tool::MkfsXfs };
    let tools = Tools::find(paths, &[tool]).map_err(|error| error.to_string())?;
    let mut mkfs = tools.command(tool);
    mkfs.arg("-q").arg(if kind == "ext4" { "-F" } else { "-f" }).arg(&image);
    tools.run(&mut mkfs).map_err(|error| error.to_string())?;
    Ok(image)
}

/// A directory on the machine's own tmpfs.
fn plain_tmpfs() -> io::Result<PathBuf> {
    let dir = PathBuf::from(format!("/dev/shm/daxvm-lab-{}", rustix::process::geteuid().as_raw()));
    fs::create_dir_all(&dir)?;
    Ok(dir)
}

/// Everybody may use a scratch directory, and remove only what is theirs.
pub fn open_to_all(dir: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(dir, fs::Permissions::from_mode(0o1777))
}
