//! The root file system: mounted from its share, with an overlay when it is asked for, and entered.

use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount as mount_fs, mount_move, unmount};

use super::kernel::{self, KernelLog};
use super::protocol::{MODULES_DIR, Root, RootMode, TASK_FILE};
use super::{Failure, INIT};

/// Where the initramfs has the new root before it is entered.
pub const NEW_ROOT: &str = "/new-root";
const LOWER: &str = "/lower";
/// A tmpfs: what the overlay holds.
const CHANGES: &str = "/changes";

/// The best options first: directories of the share can be renamed, a new mode or owner does not copy a file's data
/// into memory, nothing is synced that vanishes anyway. Older kernels do not know them all.
const OVERLAY_OPTIONS: [&str; 3] = [",redirect_dir=on,metacopy=on,volatile", ",volatile", ""];

/// Mounts the root at `target`.
///
/// # Errors
/// When its share or an overlay cannot be mounted.
pub fn mount(root: &Root, target: &Path) -> Result<(), Failure> {
    let read_only = root.mode != RootMode::Rw;
    if root.mode != RootMode::Overlay {
        return mount_share("mount the root", &root.tag, target, read_only, &root.options);
    }
    mount_share("mount the root", &root.tag, Path::new(LOWER), read_only, &root.options)?;
    overlay(Path::new(LOWER), Path::new(CHANGES), target)
}

/// Mounts a share at `target`, which is made when it is missing.
///
/// # Errors
/// When the kernel refuses it; the message says what the kernel logged.
pub fn mount_share(
    what: &str,
    tag: &str,
    target: &Path,
    read_only: bool,
    options: &str,
) -> Result<(), Failure> {
    let log = KernelLog::from_now();
    fs::create_dir_all(target).map_err(|error| Failure::new(what, error))?;
    let flags = if read_only { MountFlags::RDONLY } else { MountFlags::empty() };
    let data = CString::new(options).map_err(|error| Failure::new(what, error))?;
    mount_fs(tag, target, "virtiofs", flags, data.as_c_str()).map_err(|errno| {
        let advice = match errno {
            Errno::NODEV => {
                ": the kernel has no virtio-fs; build it with CONFIG_VIRTIO_FS=y, or give its modules with --modules"
                    .to_owned()
            }
            Errno::INVAL => format!(": there is no share with the tag {tag}, or the kernel refuses {options:?}"),
            _ => String::new(),
        };
        Failure::new(what, format_args!("{errno}{advice}{}", said(log, &["virtio-fs", "virtiofs", "fuse"])))
    })
}

/// Mounts an overlay over `lower` at `target`, whose changes are in a new tmpfs. Neither `lower` nor the tmpfs, at
/// `changes`, can be reached afterwards but through it.
///
/// # Errors
/// When the kernel refuses it.
fn overlay(lower: &Path, changes: &Path, target: &Path) -> Result<(), Failure> {
    let what = "mount the root's overlay";
    let failure = |error: io::Error| Failure::new(what, error);
    let log = KernelLog::from_now();
    fs::create_dir_all(target).map_err(failure)?;
    fs::create_dir_all(changes).map_err(failure)?;
    mount_fs("tmpfs", changes, "tmpfs", MountFlags::empty(), c"mode=0755")
        .map_err(|error| failure(error.into()))?;
    let (upper, work) = (changes.join("upper"), changes.join("work"));
    fs::create_dir(&upper).and_then(|()| fs::create_dir(&work)).map_err(failure)?;
    let layers =
        format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
    let mut mounted = Err(Errno::INVAL);
    for options in OVERLAY_OPTIONS {
        let data = CString::new(format!("{layers}{options}")).map_err(|error| failure(error.into()))?;
        mounted = mount_fs("overlay", target, "overlay", MountFlags::empty(), data.as_c_str());
        if !matches!(mounted, Err(Errno::INVAL | Errno::PERM)) {
            break;
        }
    }
    mounted.map_err(|errno| {
        let advice = match errno {
            Errno::NODEV => {
                ": the kernel has no overlay file system; build it with CONFIG_OVERLAY_FS=y, give its modules with \
                 --modules, or take --root DIR,ro"
            }
            _ => "",
        };
        Failure::new(what, format_args!("{errno}{advice}{}", said(log, &["overlay"])))
    })?;
    for layer in [lower, changes] {
        unmount(layer, UnmountFlags::DETACH).map_err(|error| failure(error.into()))?;
    }
    Ok(())
}

/// What the kernel has said of one of `subjects` in the meantime, as the end of a message.
fn said(log: io::Result<KernelLog>, subjects: &[&str]) -> String {
    let messages = log.and_then(|mut log| log.messages()).unwrap_or_default();
    let last = messages.iter().rfind(|text| subjects.iter().any(|subject| text.contains(subject)));
    last.map(|text| format!(" (the kernel says: {text})")).unwrap_or_default()
}

/// What becomes of the root that is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Initramfs {
    /// It is the initramfs, whose files are memory: they are removed.
    Free,
    /// It is kept as it is.
    #[cfg(test)]
    Keep,
}

/// Makes `new_root`, a mount point, the root, and moves the kernel's own file systems there.
///
/// # Errors
/// When the new root has no directories for them and none can be made.
pub fn enter(new_root: &Path, old: Initramfs) -> Result<(), Failure> {
    for (fstype, path) in kernel::FILE_SYSTEMS {
        let target = new_root.join(path.trim_start_matches('/'));
        fs::create_dir_all(&target).and_then(|()| Ok(mount_move(path, &target)?)).map_err(|error| {
            let what = format!("mount {fstype} on {path} of the root");
            Failure::new(what, format_args!("{error}{}", no_mount_point(&error)))
        })?;
    }
    if old == Initramfs::Free {
        // What stays is memory that is lost, no more.
        let _ = fs::remove_dir_all(MODULES_DIR);
        let _ = fs::remove_file(TASK_FILE);
        let _ = fs::remove_file(INIT);
    }
    let switch = || {
        rustix::process::chdir(new_root)?;
        rustix::mount::mount_move(c".", c"/")?;
        rustix::process::chroot(c".")?;
        rustix::process::chdir(c"/")
    };
    switch().map_err(|error: Errno| Failure::new("enter the root", error))
}

/// Advice for a mount point that could not be made.
pub fn no_mount_point(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EROFS) => ": make it, or let the root be an overlay, which the guest can write to",
        _ => "",
    }
}

/// Mounts a new tmpfs at `target`, which is there.
pub fn tmpfs(target: &Path, options: &CStr) -> rustix::io::Result<()> {
    mount_fs("tmpfs", target, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, options)
}

#[cfg(test)]
mod tests {
    use rustix::mount::mount_bind;

    use super::super::protocol;
    use super::super::{environment, mounts, namespace};
    use super::*;

    /// The rest of this test changes the root of its process.
    #[test]
    fn a_root_is_overlaid_entered_and_furnished() {
        // Terminals that belong to a group, directories that are renamed in an overlay: a user namespace has neither.
        if namespace::is_root() {
            namespace::run("guest::root::tests::in_a_namespace", &["--mount", "--uts", "--net"]);
        } else {
            skipped!("this test needs root");
        }
    }

    #[test]
    #[ignore = "it is run by a_root_is_overlaid_entered_and_furnished, in a namespace"]
    fn in_a_namespace() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        mount_fs("tmpfs", dir, "tmpfs", MountFlags::empty(), c"").unwrap();
        let [host, lower, changes, root, empty] =
            ["host", "lower", "changes", "root", "empty"].map(|name| dir.join(name));
        for made in [
            &host,
            &host.join("run/secrets"),
            &host.join("tmp"),
            &host.join("data"),
            &host.join("directory"),
            &lower,
            &empty,
        ] {
            fs::create_dir_all(made).unwrap();
        }
        fs::write(host.join("data/file"), "old").unwrap();

        // A root that has no directories for the kernel's file systems, and cannot get them.
        mount_fs("tmpfs", &empty, "tmpfs", MountFlags::RDONLY, c"").unwrap();
        let error = enter(&empty, Initramfs::Keep).unwrap_err().to_string();
        assert!(error.contains("mount devtmpfs on /dev") && error.contains("overlay"), "{error}");

        // The host's own /dev and /sys must not be changed.
        for path in ["/dev", "/sys"] {
            mount_fs("tmpfs", path, "tmpfs", MountFlags::empty(), c"").unwrap();
        }
        mount_bind(&host, &lower).unwrap();
        overlay(&lower, &changes, &root).unwrap();
        assert!(!changes.join("upper").exists() && !lower.join("data").exists());
        // Still in sight of this process, for what comes out at the end.
        let before = std::fs::File::open(&host).unwrap();
        enter(&root, Initramfs::Keep).unwrap();

        assert_eq!(fs::read_to_string("/data/file").unwrap(), "old");
        fs::write("/data/file", "new").unwrap();
        assert_eq!(fs::read_to_string("/data/file").unwrap(), "new");
        fs::rename("/directory", "/renamed").unwrap();
        let host_file =
            rustix::fs::openat(&before, "data/file", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty())
                .unwrap();
        assert_eq!(std::io::read_to_string(std::fs::File::from(host_file)).unwrap(), "old");

        let task = protocol::Task {
            modules: Vec::new(),
            root: Root { tag: "root".into(), mode: RootMode::Ro, options: String::new() },
            mounts: Vec::new(),
            command: protocol::Command {
                argv: Vec::new(),
                env: Vec::new(),
                directory: "/tmp/work".into(),
                stdio: [protocol::Stdio::Null; 3],
                window: None,
            },
        };
        fs::write("/tmp/kept", "").unwrap();
        mounts::system(&task).unwrap();
        let table = fs::read_to_string("/proc/self/mounts").unwrap();
        for mounted in ["devpts /dev/pts ", "tmpfs /dev/shm ", "tmpfs /run "] {
            assert!(table.contains(mounted), "{mounted:?} is not in {table}");
        }
        assert!(!Path::new("/run/secrets").exists(), "the host's /run is in sight");
        assert!(Path::new("/tmp/kept").exists(), "the command's directory is out of sight");
        assert_eq!(fs::read_link("/dev/stdout").unwrap(), Path::new("fd/1"));
        assert!(fs::File::open("/dev/pts/ptmx").is_ok());

        fs::write("/data/single", "shared").unwrap();
        for target in ["/new/directory/single", "/data/file"] {
            mounts::bind_file(Path::new("/data/single"), Path::new(target)).unwrap();
            assert_eq!(fs::read_to_string(target).unwrap(), "shared");
        }

        environment::prepare();
        assert_eq!(rustix::system::uname().nodename(), c"daxvm");
        std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let refused = std::net::TcpStream::connect(address).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused, "the loopback interface is down");
    }
}
