//! PID 1 of a test guest: mounts, modules, console, then the agent.

use std::fs::{self, File};
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::io::Errno;
use rustix::system::RebootCommand;
use rustix::termios::{OptionalActions, tcdrain, tcgetattr, tcsetattr};
use vmm::guest::kernel;

use super::ops::system;
use super::wire::{INIT, READY, write_line};
use super::{Agent, End, Failure, GuestPath};

/// Kernel messages up to this level (notice) go to the console while the agent has it.
const SHOWN: u32 = 5;

type Console = Arc<Mutex<File>>;

/// Boots the guest's user space and serves the driver; returns only if the console is lost.
pub fn init() -> Result<(), Failure> {
    println!("{INIT}");
    for (fstype, target) in kernel::FILE_SYSTEMS.into_iter().chain([("tmpfs", "/tmp")]) {
        kernel::mount_once(fstype, Path::new(target)).map_err(|error| Failure::from(error).within(target))?;
    }
    let console = open_console()?;
    load_modules(Path::new("/modules"))?;
    let end = serve(console)?;
    leave(end)
}

/// Opens the console that the kernel was told to use last, for lines of any length and any bytes, and makes it standard
/// input, output and error.
fn open_console() -> Result<File, Failure> {
    let cmdline = fs::read_to_string("/proc/cmdline")?;
    let name = cmdline.split_whitespace().filter_map(|word| word.strip_prefix("console=")).next_back();
    let name = name.and_then(|value| value.split(',').next()).unwrap_or("ttyS0");
    let console = File::options().read(true).write(true).open(Path::new("/dev").join(name))?;
    let mut mode = tcgetattr(&console)?;
    mode.make_raw();
    tcsetattr(&console, OptionalActions::Now, &mode)?;
    rustix::stdio::dup2_stdin(&console)?;
    rustix::stdio::dup2_stdout(&console)?;
    rustix::stdio::dup2_stderr(&console)?;
    Ok(console)
}

/// Loads the modules that `order` lists, one name a line.
fn load_modules(dir: &Path) -> Result<(), Failure> {
    let order = match fs::read_to_string(dir.join("order")) {
        Ok(order) => order,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    for name in order.split_whitespace() {
        kernel::load_module(&dir.join(name))
            .map_err(|error| Failure::from(error).within(format_args!("module {name}")))?;
    }
    Ok(())
}

/// Takes the console over from the kernel and serves requests on it.
fn serve(console: File) -> Result<Option<End>, Failure> {
    // The kernel would write into the middle of replies. So it is silent from here on, panics aside, and its messages
    // come line by line through us.
    let mut log = File::open("/dev/kmsg")?;
    log.seek(SeekFrom::End(0))?;
    system::write_text(&GuestPath::from("/proc/sys/kernel/printk"), "1")?;
    let mut input = BufReader::with_capacity(64 << 10, console.try_clone()?);
    let console: Console = Arc::new(Mutex::new(console));
    let logged = Arc::clone(&console);
    thread::spawn(move || forward(log, &logged));
    // The kernel may have stopped in the middle of a line.
    lock(&console).write_all(format!("\n{READY}\n").as_bytes())?;
    Ok(Agent::default().serve(&mut input, |reply| write_line(&mut *lock(&console), reply))?)
}

fn lock(console: &Console) -> MutexGuard<'_, File> {
    console.lock().unwrap_or_else(PoisonError::into_inner)
}

fn forward(mut log: File, console: &Console) {
    let mut record = [0; 8192];
    loop {
        match log.read(&mut record) {
            Ok(len) => {
                if let (..=SHOWN, Some(text)) = kernel::message(&record[..len]) {
                    // Nobody could be told that the console is gone.
                    let _ = lock(console).write_all(format!("{text}\n").as_bytes());
                }
            }
            // Overwritten before it was read; the next read goes on with the oldest that is left.
            Err(error) if error.raw_os_error() == Some(Errno::PIPE.raw_os_error()) => {}
            Err(_) => return,
        }
    }
}

/// Ends the guest.
fn leave(end: Option<End>) -> Result<(), Failure> {
    rustix::fs::sync();
    // What was written last must be out before the machine is gone; a console that cannot drain has nobody behind it.
    let _ = tcdrain(rustix::stdio::stdout());
    match end {
        Some(End::PowerOff) => rustix::system::reboot(RebootCommand::PowerOff)?,
        Some(End::Reboot) => rustix::system::reboot(RebootCommand::Restart)?,
        Some(End::Panic) => system::write_text(&GuestPath::from("/proc/sysrq-trigger"), "c")?,
        None => return Err(Failure::new("the console has ended")),
    }
    Err(Failure::new(format!("still here after {end:?}")))
}
