//! The end of a guest: no process, no dirty page, no mounted disk is left when it is switched off.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount_remount, unmount};
use rustix::process::WaitOptions;
use rustix::system::RebootCommand;

/// How long processes that the command has left behind have to end after SIGTERM, and after SIGKILL.
const GRACE: Duration = Duration::from_millis(500);
const PAUSE: Duration = Duration::from_millis(2);

/// Ends all processes but this one, which must be PID 1: they are asked first.
pub fn stop_processes() {
    for signal in [libc::SIGTERM, libc::SIGKILL] {
        if no_children(Duration::ZERO) {
            return;
        }
        signal_all(signal);
        // One that is stopped would not hear the other.
        signal_all(libc::SIGCONT);
        if no_children(GRACE) {
            return;
        }
    }
}

fn signal_all(signal: libc::c_int) {
    assert_eq!(std::process::id(), 1, "only PID 1 may end all other processes");
    // SAFETY: it has no effect on the memory of this process, and PID 1 does not signal itself with -1 (kill(2)).
    unsafe { libc::kill(-1, signal) };
}

/// Takes leave of children that have ended, for as long as `patience`. Whether all have; every process without a parent
/// is a child of PID 1.
fn no_children(patience: Duration) -> bool {
    let start = Instant::now();
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some(_)) | Err(Errno::INTR) => {}
            Ok(None) if start.elapsed() >= patience => return false,
            Ok(None) => thread::sleep(PAUSE),
            Err(_) => return true,
        }
    }
}

/// Writes back everything, and unmounts what has contents that outlive the guest; what is still in use becomes
/// read-only.
pub fn release_file_systems() {
    rustix::fs::sync();
    let table = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for target in lasting(&table).into_iter().rev() {
        // The root is in use by this very process, and a file system that stays writable has been synced.
        if unmount(&target, UnmountFlags::NOFOLLOW).is_err() {
            let _ = mount_remount(&target, MountFlags::RDONLY, c"");
        }
    }
}

/// The mount points of disks and shares in a mount table (proc_pid_mounts(5)).
fn lasting(table: &str) -> Vec<PathBuf> {
    let mounts = table.lines().filter_map(|line| {
        let mut fields = line.split(' ');
        let (source, target, fstype) = (fields.next()?, fields.next()?, fields.next()?);
        (source.starts_with("/dev/") || fstype == "virtiofs").then(|| unescape(target).into())
    });
    mounts.collect()
}

/// Blanks are octal numbers in a mount table.
fn unescape(field: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .into_iter()
        .fold(field.to_owned(), |text, (escaped, plain)| text.replace(escaped, plain))
}

/// Switches the machine off. Returns why it did not happen.
pub fn power_off() -> io::Error {
    match rustix::system::reboot(RebootCommand::PowerOff) {
        Ok(()) => io::Error::other("the kernel has no way to switch it off"),
        Err(error) => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_and_disks_are_released_and_nothing_else() {
        let table = "overlay / overlay rw 0 0\nproc /proc proc rw 0 0\ntmpfs /run tmpfs rw 0 0\n\
                     share0 /home/a\\040b virtiofs rw 0 0\n/dev/vda /mnt ext4 rw 0 0\n";
        assert_eq!(lasting(table), [PathBuf::from("/home/a b"), PathBuf::from("/mnt")]);
    }
}
