//! The host of the lab where the machine has no hardware KVM: QEMU emulates a CPU with SVM and nested paging, on which
//! the kvm_amd of a stock kernel is a genuine KVM.
//!
//! The host has one CPU unless `LAB_CPUS` says otherwise. With two, each a thread of QEMU, memory of the host's own
//! kernel is corrupted within minutes while several vCPUs of a guest run and the host takes pages from them (seen with
//! QEMU 7.2 and 10.0, Linux 6.12: panics of the host's kernel by "corrupted stack end", triple faults and impossible
//! addresses in guests; never with one CPU, nor with both threads held to one CPU of the machine).

use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use vmm::initramfs::{Archive, ModuleTree};

use super::LabError;
use super::daemon::{Machine, port_pairs};
use super::init::MODULE_DIR;
use super::paths::Paths;
use super::tools::{Tool, Tools, script};

/// The kernel of the host: the only Debian flavour with 9p.
pub const KERNEL: &str = "6.12-generic";

/// What the host needs beyond what is built in.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "9p",
    "9pnet_virtio",
    "kvm",
    "kvm_amd",
    "ext4",
    "xfs",
    "overlay",
    "fuse",
    "virtiofs",
    "loop",
    "dm_mod",
    "dm_flakey",
];

/// The scratch disks, in the order of /dev/vda, /dev/vdb.
const DISKS: [&str; 2] = ["ext4.img", "xfs.img"];

/// Sparse: they cost what is written to them.
const DISK_SIZE: u64 = 16 << 30;

/// The first descriptor number of QEMU's ports; far above what QEMU opens before it looks at them.
const FIRST_PORT_FD: RawFd = 100;

/// QEMU drops what it has to say of ports, among it that one is open, when the 32 buffers of a bus are full. A port takes
/// three messages.
const PORTS_PER_BUS: usize = 8;

/// What an emulated host takes.
pub const TOOLS: [Tool; 3] = [Tool::Qemu, Tool::MkfsExt4, Tool::MkfsXfs];

/// Starts QEMU; its host is not up before its agents have greeted.
pub fn start(paths: &Paths) -> Result<Machine, LabError> {
    let tools = Tools::find(paths, &TOOLS)?;
    let kernel = PathBuf::from(script(paths, "scripts/fetch-kernel", &[KERNEL])?);
    let initramfs = paths.state("initramfs.cpio");
    build_initramfs(paths, &kernel, &initramfs)?;
    make_disks(paths, &tools)?;

    let failed = |error| LabError::system("start QEMU", error);
    let (ours, theirs) = port_pairs().map_err(failed)?;
    let mut command = tools.command(Tool::Qemu);
    command.args(machine_arguments(paths, &kernel, &initramfs));
    for (index, _) in theirs.iter().enumerate() {
        let fd = FIRST_PORT_FD + RawFd::try_from(index).unwrap_or_default();
        command.args(["-chardev", &format!("socket,id=port{index},fd={fd}")]);
        let (bus, number) = (index / PORTS_PER_BUS, index % PORTS_PER_BUS + 1);
        if number == 1 {
            command.args(["-device", &format!("virtio-serial-pci,id=serial{bus}")]);
        }
        let place = format!("bus=serial{bus}.0,nr={number}");
        command.args(["-device", &format!("virtserialport,{place},chardev=port{index},name=lab.{index}")]);
    }
    let log = File::options().create(true).append(true).open(paths.state("qemu.log")).map_err(failed)?;
    command.stdin(Stdio::null()).stdout(log.try_clone().map_err(failed)?).stderr(log);
    give_ports(&mut command, theirs);
    let qemu = command.spawn().map_err(failed)?;
    Ok(Machine { children: vec![qemu], ports: ours })
}

/// Removes the disks' names; QEMU keeps the open files until it ends, however it ends.
pub fn forget_disks(paths: &Paths) {
    for disk in DISKS {
        let _ = fs::remove_file(paths.state(disk));
    }
}

fn machine_arguments(paths: &Paths, kernel: &Path, initramfs: &Path) -> Vec<String> {
    let cpus = std::env::var("LAB_CPUS").unwrap_or_else(|_| "1".into());
    // Root passes the machine's files through as they are; anybody else can only be anybody else.
    let security = if rustix::process::geteuid().is_root() { "passthrough" } else { "none" };
    let file = |path: &Path| path.display().to_string().replace(',', ",,");
    let mut arguments: Vec<String> = [
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-M",
        "q35",
        "-accel",
        "tcg,thread=multi",
        "-cpu",
        // Without the fast string instructions: QEMU runs them byte by byte, and kernels use them wherever they are.
        "max,+svm,+npt,-la57,-erms,-fsrm",
        "-m",
        &memory_mib().to_string(),
        "-smp",
        &cpus,
        "-kernel",
        &kernel.join("vmlinuz").display().to_string(),
        "-initrd",
        &initramfs.display().to_string(),
        // No mitigations and no watchdogs: they only cost emulated time. So do timers between the kernel's ticks of 4 ms:
        // each ends what a guest is doing, and with it all that QEMU knows of the guest's addresses. The huge pages and
        // the overcommitment are what a host of virtual machines has.
        "-append",
        "console=ttyS0 loglevel=5 panic=-1 mitigations=off nowatchdog tsc=reliable no_timer_check \
                    highres=off random.trust_cpu=on audit=0 apparmor=0 transparent_hugepage=always",
        "-chardev",
        &format!("file,id=console,path={}", file(&paths.console())),
        "-serial",
        "chardev:console",
        "-fsdev",
        &format!("local,id=root,path=/,security_model={security},multidevs=remap"),
        "-device",
        // Requests are taken up by the thread that makes them: a wake-up less for each, and opening a file takes dozens.
        "virtio-9p-pci,ioeventfd=off,fsdev=root,mount_tag=root",
    ]
    .map(str::to_owned)
    .into();
    for disk in DISKS {
        let path = file(&paths.state(disk));
        arguments.extend(
            ["-drive", &format!("file={path},format=raw,if=virtio,cache=unsafe,discard=unmap")]
                .map(str::to_owned),
        );
    }
    arguments
}

/// 8 GiB, or half of a machine that has less than twice that.
fn memory_mib() -> u64 {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total_kib: u64 = info
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse().ok())
        .unwrap_or(16 << 20);
    (total_kib / 1024 / 2).min(8192)
}

/// Moves the ports to the numbers that the command line names, and ties QEMU's life to the daemon's.
fn give_ports(command: &mut Command, ports: Vec<OwnedFd>) {
    let prepare = move || {
        for (port, number) in ports.iter().zip(FIRST_PORT_FD..) {
            // The numbers are free: the daemon has a few dozen descriptors open.
            if duplicate(port.as_raw_fd(), number) < 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?)
    };
    // SAFETY: the closure runs between fork and exec and makes nothing but system calls.
    unsafe { command.pre_exec(prepare) };
}

fn duplicate(from: RawFd, to: RawFd) -> RawFd {
    // SAFETY: dup2 touches no memory; in the forked child no other code owns the descriptor `to`.
    unsafe { libc::dup2(from, to) }
}

/// The initramfs: this program's other half as init, and the modules in the order of their loading.
fn build_initramfs(paths: &Paths, kernel: &Path, initramfs: &Path) -> Result<(), LabError> {
    let mut archive = Archive::new();
    archive.host_file("init", 0o755, &paths.program("lab-init")?)?;
    archive.device("dev/console", 0o600, 5, 1)?;
    for (index, module) in ModuleTree::open(&kernel.join("modules"))?.resolve(MODULES)?.iter().enumerate() {
        archive.file(
            &format!("{MODULE_DIR}/{index:03}-{}.ko", module.name),
            0o644,
            unsigned(&module.bytes),
        )?;
    }
    fs::write(initramfs, archive.finish()?).map_err(|error| LabError::system("write the initramfs", error))
}

/// A module without its signature, which the kernel would take seconds of emulated time to verify, and does not insist on.
/// The signature is followed by twelve bytes, the last four its length in big-endian order, and a mark.
fn unsigned(module: &[u8]) -> &[u8] {
    const MARK: &[u8] = b"~Module signature appended~\n";
    let signature = module
        .strip_suffix(MARK)
        .and_then(|signed| signed.split_last_chunk::<4>())
        .map(|(rest, length)| (rest.len() - 8).checked_sub(u32::from_be_bytes(*length) as usize));
    match signature {
        Some(Some(end)) => &module[..end],
        _ => module,
    }
}

fn make_disks(paths: &Paths, tools: &Tools) -> Result<(), LabError> {
    forget_disks(paths);
    for (disk, tool, options) in [
        // 4 KiB blocks whatever the size, as DAX on real memory would need them.
        (DISKS[0], Tool::MkfsExt4, &["-q", "-F", "-b", "4096", "-E", "nodiscard"][..]),
        (DISKS[1], Tool::MkfsXfs, &["-q", "-f", "-K"][..]),
    ] {
        let path = paths.state(disk);
        File::create(&path)
            .and_then(|file| file.set_len(DISK_SIZE))
            .map_err(|error| LabError::system("make a scratch disk", error))?;
        tools.run(tools.command(tool).args(options).arg(&path))?;
    }
    Ok(())
}
