//! What every init does with its kernel: mount its file systems, load modules, read and write its log.

use std::ffi::CStr;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::mount::MountFlags;

/// The kernel's own file systems, by type and mount point, in the order in which they are needed.
pub const FILE_SYSTEMS: [(&str, &str); 3] = [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")];

const LOG: &str = "/dev/kmsg";

/// Mounts a file system that has no source at `target`, which is made when it is missing, unless it is there already.
///
/// # Errors
/// What the system says; ENODEV when the kernel does not know `fstype`.
pub fn mount_once(fstype: &str, target: &Path) -> io::Result<()> {
    fs::create_dir_all(target)?;
    match rustix::mount::mount(fstype, target, fstype, MountFlags::empty(), None::<&CStr>) {
        // The kernel mounts devtmpfs itself when it is told to.
        Ok(()) | Err(Errno::BUSY) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Loads the module in the file `path`, which is not compressed, unless it is loaded already.
///
/// # Errors
/// What the system says; ENOEXEC when the module is of another kernel.
pub fn load_module(path: &Path) -> io::Result<()> {
    match rustix::system::finit_module(File::open(path)?, c"", 0) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The kernel's log, from some point on.
#[derive(Debug)]
pub struct KernelLog(File);

impl KernelLog {
    /// The log from its oldest message on that is kept.
    ///
    /// # Errors
    /// What the system says of /dev/kmsg.
    pub fn from_start() -> io::Result<KernelLog> {
        let flags = OFlags::NONBLOCK.bits() as i32;
        Ok(KernelLog(File::options().read(true).custom_flags(flags).open(LOG)?))
    }

    /// The log from the next message on.
    ///
    /// # Errors
    /// What the system says of /dev/kmsg.
    pub fn from_now() -> io::Result<KernelLog> {
        let mut log = KernelLog::from_start()?;
        log.0.seek(SeekFrom::End(0))?;
        Ok(log)
    }

    /// The texts of the messages that have come since.
    ///
    /// # Errors
    /// What the system says of reading /dev/kmsg.
    pub fn messages(&mut self) -> io::Result<Vec<String>> {
        let mut texts = Vec::new();
        let mut record = [0; 8192];
        loop {
            match self.0.read(&mut record) {
                Ok(len) => texts.extend(message(&record[..len]).1),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(texts),
                // Records that were overwritten meanwhile: the next read goes on with the oldest there is.
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// The level and the text of a record of /dev/kmsg (Documentation/ABI/testing/dev-kmsg).
pub fn message(record: &[u8]) -> (u32, Option<String>) {
    let text = String::from_utf8_lossy(record);
    let Some((prefix, message)) = text.split_once(';') else { return (0, None) };
    let level = prefix.split(',').next().and_then(|number| number.parse::<u32>().ok()).unwrap_or(0) & 7;
    (level, message.lines().next().map(str::to_owned))
}

/// Says something on the console: by the kernel's log as an error, which `quiet` does not hide.
pub(super) fn tell(text: &dyn fmt::Display) {
    let line = format!("<3>daxvm: {text}\n");
    let written = File::options().write(true).open(LOG).and_then(|mut log| log.write_all(line.as_bytes()));
    if written.is_err() {
        eprintln!("daxvm: {text}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_the_log_has_a_level_and_a_text() {
        let record = b"30,1234,5678,-;virtio-fs: tag <x> not found\n SUBSYSTEM=virtio\n";
        assert_eq!(message(record), (6, Some("virtio-fs: tag <x> not found".to_owned())));
        assert_eq!(message(b"nonsense"), (0, None));
    }
}
