//! Mounts, the kernel's files, PCI devices and programs.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use rustix::mount::{MountFlags, UnmountFlags};
use vmm::guest::kernel::KernelLog;

use crate::guest::{CommandOutput, Failure, GuestPath, Mount, PciDevice};

/// The text of a file.
pub fn read_text(path: &GuestPath) -> Result<String, Failure> {
    Ok(String::from_utf8_lossy(&fs::read(path)?).into_owned())
}

/// Writes text to a file that exists, in one write as the kernel's files want it.
pub fn write_text(path: &GuestPath, text: &str) -> Result<(), Failure> {
    Ok(File::options().write(true).open(path)?.write_all(text.as_bytes())?)
}

/// Mounts.
pub fn mount(mount: &Mount) -> Result<(), Failure> {
    fs::create_dir_all(&mount.target)?;
    let options = std::ffi::CString::new(mount.options.as_str())
        .map_err(|_| Failure::new("mount options with a zero byte"))?;
    let (target, flags) = (mount.target.as_path(), MountFlags::empty());
    Ok(rustix::mount::mount(&mount.source, target, &mount.fstype, flags, options.as_c_str())?)
}

/// Unmounts.
pub fn umount(target: &GuestPath, lazy: bool) -> Result<(), Failure> {
    let flags = if lazy { UnmountFlags::DETACH } else { UnmountFlags::empty() };
    Ok(rustix::mount::unmount(target.as_path(), flags)?)
}

/// Writes back and drops every cache that can be dropped.
pub fn drop_caches() -> Result<(), Failure> {
    rustix::fs::sync();
    write_text(&GuestPath::from("/proc/sys/vm/drop_caches"), "3")
}

/// The kernel's messages that contain a text.
pub fn kernel_log(text: &str) -> Result<Vec<String>, Failure> {
    let mut found = KernelLog::from_start()?.messages()?;
    found.retain(|message| message.contains(text));
    Ok(found)
}

/// Runs a program.
pub fn command(argv: &[GuestPath], stdin: &str) -> Result<CommandOutput, Failure> {
    let [program, arguments @ ..] = argv else { return Err(Failure::new("no program is named")) };
    let mut child = Command::new(program.as_path())
        .args(arguments.iter().map(GuestPath::as_path))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut pipe = child.stdin.take();
    // A program may answer before it has read everything, or read nothing at all: neither may block the other.
    let output = thread::scope(|scope| {
        scope.spawn(move || pipe.as_mut().map(|pipe| pipe.write_all(stdin.as_bytes())));
        child.wait_with_output()
    })?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(CommandOutput {
        status: output.status.code(),
        stdout: text(&output.stdout),
        stderr: text(&output.stderr),
    })
}

/// Every PCI device.
pub fn pci() -> Result<Vec<PciDevice>, Failure> {
    let mut devices: Vec<PciDevice> = fs::read_dir("/sys/bus/pci/devices")?
        .map(|entry| pci_device(&entry?.path()))
        .collect::<Result<_, Failure>>()?;
    devices.sort_by(|a, b| a.address.cmp(&b.address));
    Ok(devices)
}

fn pci_device(dir: &Path) -> Result<PciDevice, Failure> {
    let number = |text: &str| u64::from_str_radix(text.trim().trim_start_matches("0x"), 16).unwrap_or(0);
    let id = |file: &str| Ok::<_, Failure>(number(&fs::read_to_string(dir.join(file))?) as u16);
    let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    let resources = fs::read_to_string(dir.join("resource"))?;
    let resources = resources.lines().filter_map(|line| {
        let mut fields = line.split_whitespace().map(number);
        Some((fields.next()?, fields.next()?, fields.next()?))
    });
    Ok(PciDevice {
        address: name(dir).unwrap_or_default(),
        vendor: id("vendor")?,
        device: id("device")?,
        driver: fs::read_link(dir.join("driver")).ok().and_then(|link| name(&link)),
        resources: resources.filter(|&(_, end, _)| end != 0).collect(),
    })
}
