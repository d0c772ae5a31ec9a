//! The host's side: the initramfs of a guest with a command, made in memory.

use std::fs;
use std::io;
use std::path::Path;

use elf::ElfBytes;
use elf::abi::PT_INTERP;
use elf::endian::AnyEndian;
use thiserror::Error;

use super::INIT;
use super::protocol::{MODULES_DIR, TASK_FILE, Task};
use crate::initramfs::{Archive, ArchiveError, Module};

/// This very program.
const SELF: &str = "/proc/self/exe";

/// Why an initramfs could not be made.
#[derive(Debug, Error)]
pub enum ImageError {
    /// An entry could not be added.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// The task cannot be written as JSON.
    #[error("Could not tell the guest what to do: paths of mounts and directories must be UTF-8")]
    Task(#[source] serde_json::Error),
    /// The program could not be read.
    #[error("Could not read daxvm itself, {SELF}, which is the guest's init: is /proc mounted?")]
    Program(#[source] io::Error),
    /// The program needs a dynamic loader, which a guest does not have.
    #[error(
        "daxvm is linked dynamically, so it cannot be the guest's init: build it with \
         RUSTFLAGS=-Ctarget-feature=+crt-static, as .cargo/config.toml of its sources does"
    )]
    Dynamic,
}

/// An initramfs with this program as `/init`, the task, and `modules`, which the task names.
///
/// # Errors
/// See [`ImageError`].
pub fn initramfs(task: &Task, modules: &[Module]) -> Result<Vec<u8>, ImageError> {
    let program = fs::read(SELF).map_err(ImageError::Program)?;
    if is_dynamic(&program) {
        return Err(ImageError::Dynamic);
    }
    let mut archive = Archive::new();
    archive.device("dev/console", 0o600, 5, 1)?;
    // Opened before devtmpfs is mounted, in place of standard streams that the kernel has no console for.
    archive.device("dev/null", 0o666, 1, 3)?;
    archive.file(INIT, 0o755, &program)?;
    archive.file(TASK_FILE, 0o600, &serde_json::to_vec(task).map_err(ImageError::Task)?)?;
    for module in modules {
        let path = Path::new(MODULES_DIR).join(format!("{}.ko", module.name));
        archive.file(&path.to_string_lossy(), 0o600, &module.bytes)?;
    }
    Ok(archive.finish()?)
}

fn is_dynamic(program: &[u8]) -> bool {
    let segments = ElfBytes::<AnyEndian>::minimal_parse(program).ok().and_then(|program| program.segments());
    segments.is_some_and(|segments| segments.iter().any(|segment| segment.p_type == PT_INTERP))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Read;

    use cpio::newc::Reader;

    use super::super::protocol::{Command, Mount, Root, RootMode, Stdio};
    use super::*;

    fn task() -> Task {
        Task {
            modules: vec!["virtio_console".into()],
            root: Root { tag: "root".into(), mode: RootMode::Overlay, options: "dax=inode".into() },
            mounts: vec![Mount {
                tag: "share0".into(),
                target: "/home/user/target".into(),
                read_only: false,
                options: String::new(),
                file: false,
            }],
            command: Command {
                argv: vec!["cat".into()],
                env: vec![("PATH".into(), "/bin".into())],
                directory: "/tmp".into(),
                stdio: [Stdio::Pipe, Stdio::Pipe, Stdio::Null],
                window: None,
            },
        }
    }

    fn files(archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let mut rest = archive;
        let mut files = BTreeMap::new();
        loop {
            let mut reader = Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                return files;
            }
            let name = reader.entry().name().to_owned();
            let mut bytes = Vec::new();
            reader.read_to_end(&mut bytes).unwrap();
            files.insert(name, bytes);
            rest = reader.finish().unwrap();
        }
    }

    #[test]
    fn the_guest_finds_this_program_the_task_and_the_modules() {
        let module =
            Module { name: "virtio_console".into(), path: "x.ko.xz".into(), bytes: b"module".to_vec() };
        let files = files(&initramfs(&task(), &[module]).unwrap());
        assert!(files["init"] == fs::read(SELF).unwrap());
        assert_eq!(serde_json::from_slice::<Task>(&files["task.json"]).unwrap(), task());
        assert_eq!(files["modules/virtio_console.ko"], b"module");
        assert!(files.contains_key("dev/console") && files.contains_key("dev/null"), "{:?}", files.keys());
    }

    #[test]
    fn a_program_with_a_dynamic_loader_is_refused() {
        assert!(!is_dynamic(&fs::read(SELF).unwrap()));
        assert!(
            is_dynamic(&fs::read("/bin/sh").unwrap()),
            "/bin/sh is linked dynamically on every glibc host"
        );
    }
}
