//! `/init` of QEMU's guests in `scripts/bench runner`: runs the program that its arguments name, and powers off. With
//! `port` before it, standard input and output of the program are the first virtio-serial port.

use std::convert::Infallible;
use std::error::Error;
use std::fs::{self, File};
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, mount};
use rustix::system::RebootCommand;

fn main() -> ExitCode {
    let result = run();
    println!("bench-init: {result:?}");
    let Err(_) = power_off();
    ExitCode::FAILURE
}

fn run() -> Result<i32, Box<dyn Error>> {
    fs::create_dir_all("/dev")?;
    mount("devtmpfs", "/dev", "devtmpfs", MountFlags::empty(), None)?;
    let mut arguments = std::env::args().skip(1).peekable();
    let port = arguments.next_if_eq("port").map(|_| port()).transpose()?;
    let mut command = Command::new(arguments.next().ok_or("no program")?);
    command.args(arguments);
    if let Some(port) = port {
        command.stdin(Stdio::from(port.try_clone()?)).stdout(Stdio::from(port));
    }
    Ok(command.status()?.code().unwrap_or(-1))
}

/// The port is there a moment after its driver.
fn port() -> Result<File, Box<dyn Error>> {
    let end = Instant::now() + Duration::from_secs(20);
    while Instant::now() < end {
        for entry in fs::read_dir("/dev")?.flatten() {
            if entry.file_name().to_string_lossy().starts_with("vport") {
                return Ok(File::options().read(true).write(true).open(entry.path())?);
            }
        }
        thread::sleep(Duration::from_millis(10));
    }
    Err("no virtio-serial port".into())
}

fn power_off() -> Result<Infallible, rustix::io::Errno> {
    rustix::system::reboot(RebootCommand::PowerOff)?;
    // Without ACPI nothing has happened; QEMU runs with -no-reboot.
    rustix::system::reboot(RebootCommand::Restart)?;
    Err(rustix::io::Errno::NOSYS)
}
