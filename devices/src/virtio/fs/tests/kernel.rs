//! The server under this machine's own kernel: its FUSE client, by /dev/fuse in the place of a virtqueue.
//!
//! There is no DAX this way, but everything that the server relies on for a file to change its state is the kernel's common
//! FUSE code: look-ups after ESTALE, node ids, O_TMPFILE, chattr's ioctls. The bridge offers per-file DAX to the server
//! in the client's name, and keeps from the client what follows from it.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::InHeader;
use tempfile::TempDir;
use vm_memory::ByteValued;

use crate::virtio::fs::abi::{init, opcode};
use crate::virtio::fs::hint::{self, FLAG, HintStore};
use crate::virtio::fs::policy::Policy;
use crate::virtio::fs::testing::{FakeGuest, directories_with_hints};
use crate::virtio::fs::{CacheMode, CountersHandle, FileSystemCounters};

/// What was asked, of which node, and the errno of the answer.
type Log = Arc<Mutex<Vec<(u32, u64, i32)>>>;

/// A share, mounted.
struct Mount {
    mountpoint: TempDir,
    share: PathBuf,
    log: Log,
    counters: CountersHandle,
    bridge: Option<JoinHandle<()>>,
}

impl Mount {
    /// Mounts `share` with a cache that lasts for a day. `None`, said loudly, where that is not allowed.
    fn new(share: TempDir, policy: Policy) -> Option<Mount> {
        let mountpoint = TempDir::new().unwrap();
        let target = CString::new(mountpoint.path().as_os_str().as_bytes()).unwrap();
        let Ok(fuse) = OpenOptions::new().read(true).write(true).open("/dev/fuse") else {
            skipped!("no /dev/fuse");
            return None;
        };
        let options =
            format!("fd={},rootmode=40000,user_id=0,group_id=0,default_permissions", fuse.as_raw_fd());
        let options = CString::new(options).unwrap();
        let (name, kind) = (c"daxvm-test".as_ptr(), c"fuse".as_ptr());
        // SAFETY: all are strings that live through the call.
        if unsafe { libc::mount(name, target.as_ptr(), kind, 0, options.as_ptr().cast()) } != 0 {
            skipped!("cannot mount: {}", io::Error::last_os_error());
            return None;
        }
        let path = share.path().to_path_buf();
        let guest = FakeGuest::on(share, |config| {
            config.policy = policy;
            config.cache = CacheMode::Always;
        });
        let (log, counters) = (Log::default(), guest.device.counters());
        let bridge = std::thread::spawn({
            let log = Arc::clone(&log);
            move || serve(guest, fuse, &log)
        });
        Some(Mount { mountpoint, share: path, log, counters, bridge: Some(bridge) })
    }

    /// A path in the mount.
    fn path(&self, name: &str) -> PathBuf {
        self.mountpoint.path().join(name)
    }

    /// The same file on the host.
    fn host(&self, name: &str) -> PathBuf {
        self.share.join(name)
    }

    fn counters(&self) -> FileSystemCounters {
        self.counters.snapshot()
    }

    /// The opens and look-ups since the last time: operation and errno.
    fn steps(&self) -> Vec<(u32, i32)> {
        let log = std::mem::take(&mut *self.log.lock().unwrap());
        let shown = [opcode::OPEN, opcode::LOOKUP, opcode::CREATE, opcode::TMPFILE];
        log.iter().filter(|(code, ..)| shown.contains(code)).map(|(code, _, error)| (*code, *error)).collect()
    }

    /// Sets a hint on the host.
    fn set_hint(&self, name: &str, hint: bool) {
        HintStore::default().write(File::open(self.host(name)).unwrap().as_fd(), hint).unwrap();
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let target = CString::new(self.mountpoint.path().as_os_str().as_bytes()).unwrap();
        // SAFETY: the string lives through the call.
        assert_eq!(unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) }, 0);
        if let Some(bridge) = self.bridge.take() {
            assert!(bridge.join().is_ok() || std::thread::panicking());
        }
    }
}

/// Passes requests on until the mount is gone.
fn serve(mut guest: FakeGuest, mut fuse: File, log: &Log) {
    let mut buffer = vec![0; 0x12_0000];
    loop {
        let message = match fuse.read(&mut buffer) {
            Ok(len) => &mut buffer[..len],
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return,
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::ENOENT)) => {
                continue;
            }
            Err(error) => panic!("{error}"),
        };
        let header = *InHeader::from_slice(&message[..size_of::<InHeader>()]).unwrap();
        if header.opcode == opcode::INIT {
            let wanted = init::MAP_ALIGNMENT | init::INIT_EXT | init::HAS_INODE_DAX;
            change(message, 52, |flags| (flags | wanted as u32) & !(init::DO_READDIRPLUS as u32));
            change(message, 56, |flags| flags | (wanted >> 32) as u32);
        }
        let (used, mut reply) = guest.send_raw(message, &[40], &[16, 0x10_fff0]).unwrap();
        if used == 0 {
            continue;
        }
        let error = -i32::from_le_bytes(reply[4..8].try_into().unwrap());
        log.lock().unwrap().push((header.opcode, header.nodeid, error));
        if error == 0 {
            match header.opcode {
                opcode::INIT => {
                    change(&mut reply, 28, |flags| flags & !(init::MAP_ALIGNMENT as u32));
                    change(&mut reply, 48, |flags| flags & !((init::HAS_INODE_DAX >> 32) as u32));
                }
                // `attr.flags`, behind the header and what comes before it.
                opcode::GETATTR | opcode::SETATTR => change(&mut reply, 16 + 16 + 84, |_| 0),
                opcode::LOOKUP | opcode::CREATE | opcode::MKNOD | opcode::LINK | opcode::TMPFILE => {
                    change(&mut reply, 16 + 40 + 84, |_| 0);
                }
                _ => {}
            }
        }
        // Who asked may have been killed meanwhile.
        let _ = fuse.write(&reply);
    }
}

/// Changes 4 bytes of a message.
fn change(message: &mut [u8], at: usize, to: impl Fn(u32) -> u32) {
    let old = u32::from_le_bytes(message[at..at + 4].try_into().unwrap());
    message[at..at + 4].copy_from_slice(&to(old).to_le_bytes());
}

const LOOKUP: (u32, i32) = (opcode::LOOKUP, 0);
const OPENED: (u32, i32) = (opcode::OPEN, 0);
const STALE: (u32, i32) = (opcode::OPEN, libc::ESTALE);

#[test]
fn programs_do_not_notice_a_change() {
    for share in directories_with_hints() {
        let Some(mount) = Mount::new(share, Policy::Inode) else { return };
        std::fs::write(mount.host("file"), "hello").unwrap();
        let path = mount.path("file");
        assert_eq!(std::fs::read(&path).unwrap(), b"hello");
        let ino = path.metadata().unwrap().ino();
        assert_eq!(mount.steps(), [LOOKUP, OPENED]);
        std::fs::read(&path).unwrap();
        assert_eq!(mount.steps(), [OPENED], "names are good for a day");

        for round in 1..=6 {
            mount.set_hint("file", round % 2 == 1);
            // Each way to open a file that is there.
            let mut file = match round % 3 {
                0 => File::open(&path).unwrap(),
                1 => OpenOptions::new().create(true).append(true).read(true).open(&path).unwrap(),
                _ => {
                    OpenOptions::new().create(true).truncate(true).write(true).read(true).open(&path).unwrap()
                }
            };
            assert_eq!(mount.steps(), [STALE, LOOKUP, LOOKUP, OPENED], "{round}");
            if round % 3 == 2 {
                file.write_all(b"hello").unwrap();
            } else {
                let mut text = String::new();
                file.read_to_string(&mut text).unwrap();
                assert_eq!(text, "hello");
            }
            // As long as it is open, nothing changes; then it does again.
            mount.set_hint("file", round % 2 == 0);
            File::open(&path).unwrap();
            assert_eq!(mount.steps(), [OPENED]);
            mount.set_hint("file", round % 2 == 1);
            assert_eq!(file.metadata().unwrap().ino(), ino);
            assert_eq!(mount.counters().reincarnations, round);
        }
    }
}

#[test]
fn every_name_and_every_descriptor_opens() {
    for share in directories_with_hints() {
        let Some(mount) = Mount::new(share, Policy::Inode) else { return };
        std::fs::write(mount.host("a"), "hello").unwrap();
        std::fs::hard_link(mount.host("a"), mount.host("b")).unwrap();
        for name in ["a", "b"] {
            std::fs::read(mount.path(name)).unwrap();
        }
        let path_only =
            OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(mount.path("a")).unwrap();
        mount.steps();
        mount.set_hint("a", true);
        // By a descriptor there is nothing to look up: it is opened as it was, and stays so.
        let by_descriptor = File::open(format!("/proc/self/fd/{}", path_only.as_raw_fd())).unwrap();
        assert_eq!(mount.steps(), [STALE, OPENED]);
        std::fs::read(mount.path("b")).unwrap();
        assert_eq!(mount.steps(), [OPENED]);
        drop(by_descriptor);
        for name in ["a", "b"] {
            assert_eq!(std::fs::read(mount.path(name)).unwrap(), b"hello");
            assert_eq!(mount.steps(), [STALE, LOOKUP, LOOKUP, OPENED], "{name}");
        }
        // By a directory's descriptor and a name, and to be executed.
        mount.set_hint("a", false);
        let directory = File::open(mount.mountpoint.path()).unwrap();
        rustix::fs::openat(&directory, "a", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty()).unwrap();
        assert_eq!(mount.steps(), [STALE, LOOKUP, LOOKUP, OPENED]);
    }
}

#[test]
fn chattr_works_in_the_mount() {
    for share in directories_with_hints() {
        let Some(mount) = Mount::new(share, Policy::Inode) else { return };
        std::fs::create_dir(mount.path("directory")).unwrap();
        std::fs::write(mount.path("file"), "").unwrap();
        for name in ["directory", "file"] {
            let (file, hints) = (File::open(mount.path(name)).unwrap(), HintStore::default());
            let before = hint::flags(file.as_fd()).unwrap();
            for hint in [true, false, true] {
                hints.write(file.as_fd(), hint).unwrap();
                assert_eq!(hint::read(&mount.host(name)).unwrap(), hint);
                assert_eq!(hint::read(&mount.path(name)).unwrap(), hint);
                let expected = if hint { before | FLAG } else { before };
                assert_eq!(hint::flags(file.as_fd()).unwrap(), expected);
            }
            // As chattr does it.
            for (flags, outcome) in
                [(before, Ok(())), (before | FLAG, Ok(())), (before | FLAG | 0x80, Err(()))]
            {
                let flags = rustix::fs::IFlags::from_bits_retain(flags);
                let set = rustix::fs::ioctl_setflags(&file, flags);
                assert_eq!(set.map_err(|error| assert_eq!(error, rustix::io::Errno::OPNOTSUPP)), outcome);
            }
            assert!(hint::read(&mount.host(name)).unwrap());
            assert!(!mount.path(name).metadata().unwrap().permissions().readonly());
        }
        std::fs::write(mount.path("directory/heir"), "").unwrap();
        assert!(hint::read(&mount.host("directory/heir")).unwrap());
        mount.steps();
        std::fs::read(mount.path("file")).unwrap();
        assert_eq!(mount.steps(), [STALE, LOOKUP, LOOKUP, OPENED], "the guest's own change shows too");
    }
}

#[test]
fn a_file_without_a_name_gets_one() {
    for share in directories_with_hints() {
        let Some(mount) = Mount::new(share, Policy::Inode) else { return };
        let tmpfile = |flags| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).custom_flags(libc::O_TMPFILE | flags);
            options.open(mount.mountpoint.path()).unwrap()
        };
        let link = |file: &File, name| {
            let from = format!("/proc/self/fd/{}", file.as_raw_fd());
            let to = mount.path(name);
            rustix::fs::linkat(
                rustix::fs::CWD,
                from,
                rustix::fs::CWD,
                to,
                rustix::fs::AtFlags::SYMLINK_FOLLOW,
            )
        };
        let mut file = tmpfile(0);
        file.write_all(b"hello").unwrap();
        link(&file, "named").unwrap();
        assert_eq!(std::fs::read(mount.path("named")).unwrap(), b"hello");
        assert_eq!(std::fs::read(mount.host("named")).unwrap(), b"hello");
        file.write_all(b" there").unwrap();
        drop(file);
        assert_eq!(std::fs::read(mount.host("named")).unwrap(), b"hello there");
        assert_eq!(link(&tmpfile(libc::O_EXCL), "never"), Err(rustix::io::Errno::NOENT));
        assert_eq!(std::fs::read_dir(&mount.share).unwrap().count(), 1);
    }
}

#[test]
fn an_overlay_on_top_opens_what_it_knows() {
    for share in directories_with_hints() {
        let Some(mount) = Mount::new(share, Policy::Inode) else { return };
        std::fs::write(mount.host("file"), "hello").unwrap();
        let Ok(layers) = TempDir::new_in("/dev/shm") else { return };
        for name in ["upper", "work", "merged"] {
            std::fs::create_dir(layers.path().join(name)).unwrap();
        }
        let (lower, layers) = (mount.mountpoint.path().display(), layers.path());
        let at = layers.display();
        let options =
            CString::new(format!("lowerdir={lower},upperdir={at}/upper,workdir={at}/work")).unwrap();
        let target = CString::new(layers.join("merged").as_os_str().as_bytes()).unwrap();
        let (kind, data) = (c"overlay".as_ptr(), options.as_ptr().cast());
        // SAFETY: all are strings that live through the call.
        if unsafe { libc::mount(kind, target.as_ptr(), kind, 0, data) } != 0 {
            skipped!("cannot mount an overlay: {}", io::Error::last_os_error());
            return;
        }
        let merged = layers.join("merged/file");
        let read = || std::fs::read(&merged);
        let outcomes: Vec<_> = (0..4)
            .map(|round| {
                mount.set_hint("file", round % 2 == 1);
                read()
            })
            .collect();
        // Writing to it copies the file up, which opens it like any program; but not twice.
        let written = [std::fs::write(&merged, "up"), std::fs::write(&merged, "up")];
        // SAFETY: the string lives through the call.
        assert_eq!(unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) }, 0);
        assert!(outcomes.into_iter().all(|outcome| outcome.unwrap() == b"hello"));
        let written = written.map(|outcome| outcome.map_err(|error| error.raw_os_error()));
        assert_eq!(written, [Err(Some(libc::ESTALE)), Ok(())]);
        assert_eq!(std::fs::read(mount.host("file")).unwrap(), b"hello");
    }
}

#[test]
fn no_thread_ever_sees_an_error() {
    for share in directories_with_hints() {
        let Some(mount) = Mount::new(share, Policy::Inode) else { return };
        std::fs::write(mount.host("a"), "hello").unwrap();
        std::fs::hard_link(mount.host("a"), mount.host("b")).unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..4)
                .map(|reader| {
                    let (mount, done) = (&mount, &done);
                    scope.spawn(move || {
                        let mut count = 0;
                        while !done.load(Relaxed) {
                            let name = if (reader + count) % 2 == 0 { "a" } else { "b" };
                            assert_eq!(std::fs::read(mount.path(name)).unwrap(), b"hello");
                            count += 1;
                            // There must be moments at which nobody has it open.
                            std::thread::sleep(Duration::from_micros(300 * reader + 100));
                        }
                        count
                    })
                })
                .collect();
            // So many changes, and as many more as it takes where threads get little time.
            let count = || mount.counters().reincarnations;
            for change in (0..).take_while(|change| *change < 400 || (count() <= 10 && *change < 40_000)) {
                mount.set_hint("a", change % 2 == 0);
                std::thread::sleep(Duration::from_micros(500));
            }
            done.store(true, Relaxed);
            assert!(readers.into_iter().all(|reader| reader.join().unwrap() > 10));
        });
        assert!(mount.counters().reincarnations > 10, "{:?}", mount.counters());
    }
}
