//! What the emulated host does as PID 1: loads modules, makes this machine's files its root, mounts the scratch file
//! systems, checks that KVM is real, and starts an agent on each port.
//!
//! Its root is the machine's `/` by 9p, read and written. Its own are `/proc`, `/sys`, `/dev` and `/run`, where the
//! scratch directories are: `/run/lab/ext4`, `/run/lab/xfs` and `/run/lab/tmpfs`. `/tmp` is the machine's, so that what a
//! test leaves there for its jobs is found.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, mount, mount_move};
use rustix::process::WaitOptions;
use rustix::system::RebootCommand;
use thiserror::Error;

use super::direct;

/// Where the initramfs has the modules, named so that their order is the order of loading.
pub const MODULE_DIR: &str = "modules";

/// Why the emulated host cannot be used.
#[derive(Debug, Error)]
#[error("{step}")]
pub struct InitError {
    step: String,
    #[source]
    source: io::Error,
}

/// Adds what was being done to a system's error.
fn at<T>(step: impl Into<String>, result: Result<T, impl Into<io::Error>>) -> Result<T, InitError> {
    result.map_err(|error| InitError { step: step.into(), source: error.into() })
}

/// Runs as PID 1. Returns only to say why the host cannot be used; [`power_off`] is all that is left to do then.
pub fn run() -> InitError {
    match set_up().and_then(|()| start_agents()) {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

/// Ends the machine.
pub fn power_off() -> ! {
    rustix::fs::sync();
    // The machine has -no-reboot and no ACPI daemon: both calls end QEMU, whichever works.
    let _ = rustix::system::reboot(RebootCommand::PowerOff);
    let _ = rustix::system::reboot(RebootCommand::Restart);
    std::process::exit(1);
}

/// The console is what is left of a host that hangs: it says how far it came.
fn reached(what: &str) {
    let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
    println!("lab: {} s: {what}", uptime.split_whitespace().next().unwrap_or_default());
}

fn set_up() -> Result<(), InitError> {
    for (kind, dir) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        at(format!("Could not make {dir}"), fs::create_dir_all(dir))?;
        mount_at(kind, dir, kind, "")?;
    }
    reached("init");
    load_modules()?;
    reached("modules loaded");
    at("Could not make /root", fs::create_dir_all("/root"))?;
    // Nothing is cached: files change on the machine while they are read here. Large messages make up for it.
    mount_at("root", "/root", "9p", "trans=virtio,version=9p2000.L,access=any,cache=none,msize=512000")?;
    read_ahead()?;
    enter_root()?;
    reached("the machine's files mounted");
    own_file_systems()?;
    scratch()?;
    reached("scratch file systems mounted");
    tune()?;
    at("Could not bring the loopback interface up", loopback())?;
    check_kvm()?;
    reached("KVM works, with nested paging");
    Ok(())
}

fn mount_at(source: &str, dir: &str, kind: &str, options: &str) -> Result<(), InitError> {
    let options = CString::new(options).unwrap_or_default();
    let mounted = mount(source, dir, kind, MountFlags::empty(), options.as_c_str());
    at(format!("Could not mount {kind} on {dir}"), mounted)
}

fn load_modules() -> Result<(), InitError> {
    let dir = Path::new("/").join(MODULE_DIR);
    let mut files: Vec<PathBuf> =
        at("Could not list the modules", fs::read_dir(dir))?.flatten().map(|entry| entry.path()).collect();
    files.sort();
    for path in files {
        let bytes = at(format!("Could not read {}", path.display()), fs::read(&path))?;
        match rustix::system::init_module(&bytes, c"") {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return at(format!("Could not load {}", path.display()), Err(error)),
        }
        // The memory of the initramfs is the host's memory.
        let _ = fs::remove_file(&path);
    }
    Ok(())
}

/// Without a cache the kernel reads a mapped file, and so a program, page by page, each with a message. What is read ahead
/// is still dropped whenever a file is mapped anew.
fn read_ahead() -> Result<(), InitError> {
    for entry in at("Could not list /sys/class/bdi", fs::read_dir("/sys/class/bdi"))?.flatten() {
        if entry.file_name().to_string_lossy().starts_with("9p") {
            at("Could not set the read-ahead", fs::write(entry.path().join("read_ahead_kb"), "512"))?;
        }
    }
    Ok(())
}

/// Makes the machine's files the root, as switch_root does: jobs are not in a chroot, so they may make namespaces.
fn enter_root() -> Result<(), InitError> {
    for dir in ["dev", "proc", "sys"] {
        at(format!("Could not move /{dir}"), mount_move(format!("/{dir}"), format!("/root/{dir}")))?;
    }
    at("Could not enter the machine's files", std::env::set_current_dir("/root"))?;
    at("Could not move the root", mount_move(".", "/"))?;
    at("Could not change the root", rustix::process::chroot("."))?;
    at("Could not enter the root", std::env::set_current_dir("/"))
}

fn own_file_systems() -> Result<(), InitError> {
    for (kind, dir, options) in [
        ("devpts", "/dev/pts", "mode=620,ptmxmode=666"),
        ("tmpfs", "/dev/shm", "mode=1777"),
        ("cgroup2", "/sys/fs/cgroup", ""),
        ("tmpfs", "/run", "mode=755"),
    ] {
        if dir.starts_with("/dev") {
            at(format!("Could not make {dir}"), fs::create_dir_all(dir))?;
        }
        mount_at(kind, dir, kind, options)?;
    }
    for dir in ["/run/lock", "/run/user"] {
        at("Could not make the directories of /run", fs::create_dir_all(dir))?;
    }
    for (link, target) in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")]
    {
        at("Could not make the links of /dev", std::os::unix::fs::symlink(target, format!("/dev/{link}")))?;
    }
    for device in ["/dev/kvm", "/dev/fuse"] {
        use std::os::unix::fs::PermissionsExt;
        let open = fs::set_permissions(device, fs::Permissions::from_mode(0o666));
        at(format!("Could not open {device} to all"), open)?;
    }
    Ok(())
}

fn scratch() -> Result<(), InitError> {
    for (source, dir, kind, options) in [
        // Inode tables are made at once or not at all: no thread does it while something is measured.
        ("/dev/vda", "/run/lab/ext4", "ext4", "noinit_itable"),
        ("/dev/vdb", "/run/lab/xfs", "xfs", ""),
        ("tmpfs", "/run/lab/tmpfs", "tmpfs", "size=75%"),
    ] {
        at(format!("Could not make {dir}"), fs::create_dir_all(dir))?;
        mount_at(source, dir, kind, options)?;
        at(format!("Could not open {dir} to all"), direct::open_to_all(Path::new(dir)))?;
    }
    Ok(())
}

fn tune() -> Result<(), InitError> {
    for (file, value) in [
        // Windows and guests' RAM are reserved far beyond the memory that is there.
        ("/proc/sys/vm/overcommit_memory", "1"),
        ("/proc/sys/kernel/hostname", "lab"),
        ("/proc/sys/kernel/panic_on_oops", "1"),
    ] {
        at(format!("Could not write {file}"), fs::write(file, value))?;
    }
    // Root's limit of this machine is what jobs are used to; the kernel's first one is meagre.
    let limit = rustix::process::Rlimit { current: Some(1 << 20), maximum: Some(1 << 20) };
    at(
        "Could not raise the descriptor limit",
        rustix::process::setrlimit(rustix::process::Resource::Nofile, limit),
    )
}

/// Brings up the only network interface.
fn loopback() -> io::Result<()> {
    // Any socket will do to speak of interfaces (netdevice(7)).
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: all zeros are a request, with an empty name.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[..2].copy_from_slice(&b"lo".map(|byte| byte as libc::c_char));
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: the call reads a request, which outlives it.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A KVM without nested paging would run, with shadow page tables that no real host uses.
///
/// One empty virtual machine stays for good. With the first one and after the last one the kernel patches its scheduler
/// (the static key of preempt_notifier_inc), and an emulator that runs each CPU on a thread of its own now and then
/// executes the breakpoint that stands there meanwhile: `Oops: int3` in `__schedule`, about once in twenty boots.
fn check_kvm() -> Result<(), InitError> {
    let parameter = "/sys/module/kvm_amd/parameters/npt";
    let npt = at(format!("Could not read {parameter}"), fs::read_to_string(parameter))?;
    if !matches!(npt.trim(), "Y" | "1") {
        return at("KVM has no nested paging: is QEMU 10 or newer?", Err(io::Error::other(npt)));
    }
    std::mem::forget(at("KVM_CREATE_VM failed", direct::create_vm())?);
    Ok(())
}

/// Starts an agent on each port and collects orphans for ever. An agent that ends leaves its port unusable, and with it
/// the lab.
fn start_agents() -> Result<std::convert::Infallible, InitError> {
    let mut agents = Vec::new();
    for port in ports()? {
        let file = at(format!("Could not open {}", port.display()), open_port(&port))?;
        let mut command = Command::new("/proc/self/exe");
        command.arg("agent").stdin(Stdio::from(file)).env_clear();
        for (name, dir) in
            [("LAB_EXT4", "/run/lab/ext4"), ("LAB_XFS", "/run/lab/xfs"), ("LAB_TMPFS", "/run/lab/tmpfs")]
        {
            command.env(name, dir);
        }
        let agent = at("Could not start an agent", command.spawn())?;
        agents.push(rustix::process::Pid::from_child(&agent));
    }
    reached("agents started");
    loop {
        match at("Could not wait for the agents", rustix::process::wait(WaitOptions::empty()))? {
            Some((pid, status)) if agents.contains(&pid) => {
                return at("An agent ended", Err(io::Error::other(format!("{status:?}"))));
            }
            _ => {}
        }
    }
}

/// The device files of the ports called `lab.0`, `lab.1`, ... in this order.
fn ports() -> Result<Vec<PathBuf>, InitError> {
    let mut ports = Vec::new();
    let entries = at("Could not list the ports", fs::read_dir("/sys/class/virtio-ports"))?;
    for entry in entries.flatten() {
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if let Some(number) = name.trim().strip_prefix("lab.").and_then(|n| n.parse::<u32>().ok()) {
            ports.push((number, Path::new("/dev").join(entry.file_name())));
        }
    }
    if ports.is_empty() {
        return at("There is no port to serve", Err(io::Error::from(io::ErrorKind::NotFound)));
    }
    ports.sort();
    Ok(ports.into_iter().map(|(_, device)| device).collect())
}

/// The node may be a moment behind the port.
fn open_port(device: &Path) -> io::Result<File> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        match File::options().read(true).write(true).open(device) {
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
            result => return result,
        }
    }
}
