//! Each test confines a process of its own, which is this program again, and looks from inside at what is left.

use std::collections::HashMap;
use std::env;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use devices::virtio::thread::{DeviceThread, ThreadKind};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, StatVfsMountFlags};
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, capabilities};
use tempfile::TempDir;

use super::seccomp::{self, Kind};
use super::*;

/// Tells a process which directory to work in, and so that it is to be confined.
const DIRECTORY: &str = "DAXVM_SANDBOX_TEST";
/// A user without privileges: nobody.
const USER: u32 = 65534;

/// A directory with what shares and outputs are made of, and a secret beside them.
struct Place(PathBuf);

impl Place {
    fn make() -> TempDir {
        let directory = TempDir::new().unwrap();
        let path = |name: &str| directory.path().join(name);
        for name in ["rw/sub", "ro/sub", "metrics", "sockets"] {
            fs::create_dir_all(path(name)).unwrap();
        }
        for name in ["rw/file", "ro/file", "sockets/api", "secret"] {
            fs::write(path(name), name).unwrap();
        }
        symlink("../secret", path("rw/link")).unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        directory
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Confines this thread; returns the layers, and the roots of the writable and of the read-only share.
    fn confine(&self) -> (Vec<Layer>, OwnedFd, OwnedFd) {
        let open = |name: &str, read_only| {
            let path = self.path(name);
            let (root, not_own) = match own_tree(&path, read_only) {
                Ok(tree) => (tree, None),
                Err(error) => (File::open(&path).unwrap().into(), Some(error.to_string())),
            };
            (Share { path, read_only, not_own }, root)
        };
        let (shares, roots): (Vec<_>, Vec<_>) = [open("rw", false), open("ro", true)].into_iter().unzip();
        let outputs =
            Outputs { replaced: vec![self.path("metrics/file")], removed: vec![self.path("sockets/api")] };
        let layers = apply(&shares, &roots, &outputs).unwrap();
        let [rw, ro] = <[OwnedFd; 2]>::try_from(roots).unwrap();
        (layers, rw, ro)
    }
}

/// In the process of the tests: runs the test of this name in one of its own, and returns what became of it. In that one:
/// runs `inside`.
fn in_own_process(test: &str, user: Option<u32>, inside: impl FnOnce(Place)) -> Option<Output> {
    if let Some(directory) = env::var_os(DIRECTORY) {
        inside(Place(directory.into()));
        return None;
    }
    let directory = Place::make();
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", "--nocapture", "--test-threads=1", &format!("sandbox::tests::{test}")]);
    command.env(DIRECTORY, directory.path()).env("RUST_BACKTRACE", "full").current_dir("/");
    if let Some(user) = user {
        let walk = walkdir::WalkDir::new(directory.path());
        walk.into_iter().for_each(|entry| chown_link(entry.unwrap().path(), user));
        // Where others may not look, the program itself cannot be opened again.
        let program = directory.path().join("program");
        fs::copy(env::current_exe().unwrap(), &program).unwrap();
        command = copied(command, &program);
        command.uid(user).gid(user);
    }
    let output = command.output().unwrap();
    Some(output)
}

/// The same command by another program.
fn copied(command: Command, program: &Path) -> Command {
    let mut copy = Command::new(program);
    copy.args(command.get_args()).current_dir("/");
    for (name, value) in command.get_envs() {
        copy.env(name, value.unwrap_or_default());
    }
    copy
}

fn chown_link(path: &Path, user: u32) {
    std::os::unix::fs::lchown(path, Some(user), Some(user)).unwrap();
}

fn succeeded(output: Option<Output>) {
    let Some(output) = output else { return };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}\n{}{}", output.status, text(&output.stdout), text(&output.stderr));
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Whether this is the process of the tests, which says what is skipped.
fn is_outside() -> bool {
    env::var_os(DIRECTORY).is_none()
}

fn can_mount() -> bool {
    capabilities(None).unwrap().permitted.contains(CapabilitySet::SYS_ADMIN)
}

fn open_at(directory: &OwnedFd, name: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(directory, name, flags | OFlags::CLOEXEC, Mode::from_raw_mode(0o644))
}

/// What holds for everybody.
fn look_around(place: &Place, rw: &OwnedFd, ro: &OwnedFd) {
    // Nothing outside, by any way.
    for path in ["/etc/passwd", "/proc/1/environ", "/proc/version", "/dev/null"] {
        let error = File::open(path).unwrap_err().kind();
        assert!(matches!(error, ErrorKind::NotFound | ErrorKind::PermissionDenied), "{path}: {error}");
    }
    assert!(File::open(place.path("secret")).is_err());
    for name in ["../secret", "sub/../../secret", "link"] {
        for flags in [OFlags::RDONLY, OFlags::WRONLY, OFlags::WRONLY | OFlags::TRUNC] {
            assert!(open_at(rw, name, flags).is_err(), "{name}");
        }
    }
    assert!(File::create("/tmp/daxvm-sandbox-test").is_err());
    assert!(fs::read_dir("/").is_err() || fs::read_dir("/").unwrap().count() < 5);

    // All of a writable share, also by way of /proc.
    let file = open_at(rw, "file", OFlags::PATH).unwrap();
    let again = File::options().read(true).write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd()));
    again.unwrap().set_len(3).unwrap();
    open_at(rw, "new", OFlags::CREATE | OFlags::EXCL | OFlags::RDWR).unwrap();
    rustix::fs::mkdirat(rw, "directory", Mode::RWXU).unwrap();
    rustix::fs::renameat(rw, "new", rw, "directory/renamed").unwrap();
    rustix::fs::linkat(rw, "directory/renamed", rw, "sub/linked", AtFlags::empty()).unwrap();
    rustix::fs::mknodat(rw, "fifo", FileType::Fifo, Mode::RWXU, 0).unwrap();
    rustix::fs::symlinkat("anywhere", rw, "symlink").unwrap();
    rustix::fs::unlinkat(rw, "sub/linked", AtFlags::empty()).unwrap();
    let mut made = open_at(rw, ".", OFlags::TMPFILE | OFlags::RDWR).map(File::from).unwrap();
    std::io::Write::write_all(&mut made, b"unnamed").unwrap();

    // Only reading of one that is read-only.
    open_at(ro, "file", OFlags::RDONLY).unwrap();
    open_at(ro, "sub", OFlags::DIRECTORY).unwrap();
    for (name, flags) in [("file", OFlags::WRONLY), ("new", OFlags::CREATE | OFlags::WRONLY)] {
        let error = open_at(ro, name, flags).unwrap_err();
        assert!(matches!(error, Errno::ROFS | Errno::ACCESS), "{name}: {error}");
    }
    assert!(rustix::fs::renameat(ro, "file", ro, "sub/file").is_err());
    assert!(rustix::fs::renameat(rw, "file", ro, "taken").is_err());

    // The outputs, and nothing else where they are.
    fs::write(place.path("metrics/temporary"), "1").unwrap();
    fs::rename(place.path("metrics/temporary"), place.path("metrics/file")).unwrap();
    assert!(File::open(place.path("sockets/api")).is_err());
    assert!(File::create(place.path("sockets/other")).is_err());
    fs::remove_file(place.path("sockets/api")).unwrap();

    // What the process reads of itself.
    assert!(fs::read_to_string("/proc/self/smaps").unwrap().contains("Rss"));
    fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
    let limit = rustix::process::getrlimit(rustix::process::Resource::Core);
    assert_eq!((limit.current, limit.maximum), (Some(0), Some(0)));
    assert_eq!((status("NoNewPrivs"), status("Seccomp")), ("1".into(), "2".into()));
}

/// What /proc says of this thread.
fn status(key: &str) -> String {
    let path = format!("/proc/self/task/{}/status", rustix::thread::gettid().as_raw_nonzero());
    let text = fs::read_to_string(path).unwrap();
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    value.unwrap().trim().to_owned()
}

#[test]
fn a_limit_of_file_sizes_is_an_error() {
    succeeded(in_own_process("a_limit_of_file_sizes_is_an_error", None, |place| {
        survive_file_size();
        let limit = rustix::process::Rlimit { current: Some(4096), maximum: None };
        rustix::process::setrlimit(rustix::process::Resource::Fsize, limit).unwrap();
        let file = File::create(place.path("rw/long")).unwrap();
        assert_eq!(rustix::io::pwrite(&file, &[1; 8192], 0), Ok(4096));
        assert_eq!(rustix::io::pwrite(&file, &[1], 4096), Err(Errno::FBIG));
        assert_eq!(rustix::fs::ftruncate(&file, 8192), Err(Errno::FBIG));
    }));
}

#[test]
fn root_keeps_the_shares_and_what_they_need() {
    if !is_root() {
        skipped!("not root");
        return;
    }
    if is_outside() && !can_mount() {
        skipped!("no CAP_SYS_ADMIN here, for which layers are missing");
    }
    let name = "root_keeps_the_shares_and_what_they_need";
    succeeded(in_own_process(name, None, |place| {
        // Whatever this machine's root lacks, it still lacks.
        let before = capabilities(None).unwrap().permitted;
        let (layers, rw, ro) = place.confine();
        look_around(&place, &rw, &ro);
        let now = capabilities(None).unwrap();
        assert_eq!((now.effective, now.inheritable), (now.permitted, CapabilitySet::empty()));
        assert!(before.contains(now.permitted));
        for gone in [CapabilitySet::SYS_ADMIN, CapabilitySet::SYS_PTRACE, CapabilitySet::NET_ADMIN] {
            assert!(!now.permitted.contains(gone));
        }
        let bounding = u64::from_str_radix(&status("CapBnd"), 16).unwrap();
        assert_eq!(bounding & !now.permitted.bits(), 0, "{bounding:#x}");
        assert_eq!(u64::from_str_radix(&status("CapAmb"), 16), Ok(0));
        let others = open_at(&rw, "file", OFlags::RDWR).unwrap();
        rustix::fs::fchown(&others, Some(rustix::fs::Uid::from_raw(7)), None).unwrap();
        rustix::fs::chmodat(&rw, "file", Mode::empty(), AtFlags::empty()).unwrap();
        open_at(&rw, "file", OFlags::RDWR).unwrap();
        let trusted =
            rustix::fs::fsetxattr(&others, "trusted.daxvm", b"value", rustix::fs::XattrFlags::empty());
        assert!(matches!(trusted, Err(Errno::PERM | Errno::OPNOTSUPP)), "{trusted:?}");
        if before.contains(CapabilitySet::SYS_ADMIN) {
            assert!(layers.iter().all(|layer| layer.applied), "{layers:#?}");
            assert_eq!(open_at(&rw, "../secret", OFlags::RDONLY).unwrap_err(), Errno::NOENT);
            assert_eq!(open_at(&rw, "link", OFlags::RDONLY).unwrap_err(), Errno::LOOP);
            let link = fs::read_link(format!("/proc/self/fd/{}", others.as_raw_fd())).unwrap();
            assert_eq!(link, Path::new("/file"), "a tree of its own");
        }
    }));
}

/// Where Landlock is, it refuses to change a read-only share before the mount does.
#[test]
fn trees_of_shares_have_the_flags_that_make_them_harmless() {
    if !can_mount() {
        skipped!("no CAP_SYS_ADMIN here, so that shares are no trees of their own");
        return;
    }
    let directory = Place::make();
    let harmless = StatVfsMountFlags::NOSUID | StatVfsMountFlags::NODEV | StatVfsMountFlags::NOEXEC;
    for (read_only, flags) in [(false, harmless), (true, harmless | StatVfsMountFlags::RDONLY)] {
        let tree = own_tree(&directory.path().join("rw"), read_only).unwrap();
        let found = rustix::fs::fstatvfs(&tree).unwrap().f_flag;
        assert_eq!(found & (harmless | StatVfsMountFlags::RDONLY), flags, "{found:?}");
        let made = open_at(&tree, "made", OFlags::CREATE | OFlags::WRONLY);
        assert_eq!(made.err(), read_only.then_some(Errno::ROFS));
    }
}

/// The version of the kernel's Landlock; 0 if there is none.
fn landlock_version() -> u32 {
    let layer = landlock::plan(&[], &Outputs::default());
    let version = layer.detail.strip_prefix("version ").and_then(|detail| detail.split_once(':'));
    version.filter(|_| layer.applied).map_or(0, |(version, _)| version.parse().unwrap())
}

/// seccomp refuses the system calls, too; what if it did not?
#[test]
fn landlock_alone_forbids_the_network_and_what_concerns_other_processes() {
    const NETWORK: u32 = 4;
    const SIGNALS: u32 = 6;
    let version = landlock_version();
    if is_outside() && version < SIGNALS {
        skipped!(
            "in part: Landlock has version {version} here; {NETWORK} knows the network, {SIGNALS} signals and sockets"
        );
    }
    let name = "landlock_alone_forbids_the_network_and_what_concerns_other_processes";
    succeeded(in_own_process(name, None, |place| {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let tcp = (tcp.local_addr().unwrap(), tcp);
        // Of what was made before, others could be the makers as well.
        let address = SocketAddr::from_abstract_name(format!("daxvm-{}", std::process::id())).unwrap();
        let _unix = UnixListener::bind_addr(&address).unwrap();
        let parent = rustix::process::getppid().unwrap();
        let outcomes = || {
            let errno = |error: std::io::Error| Errno::from_io_error(&error).unwrap();
            (
                TcpStream::connect(tcp.0).map(drop).map_err(errno),
                TcpListener::bind("127.0.0.1:0").map(drop).map_err(errno),
                UnixStream::connect_addr(&address).map(drop).map_err(errno),
                rustix::process::test_kill_process(parent),
            )
        };
        assert_eq!(outcomes(), (Ok(()), Ok(()), Ok(()), Ok(())));
        let path = place.path("rw");
        let root = File::open(&path).unwrap().into();
        let share = Share { path, read_only: false, not_own: None };
        capabilities::forbid_new_privileges().unwrap();
        landlock::apply(&[share], &[root], &Outputs::default()).unwrap();
        let refused = |since: u32, errno| if version >= since { Err(errno) } else { Ok(()) };
        let (network, others) = (refused(NETWORK, Errno::ACCESS), refused(SIGNALS, Errno::PERM));
        assert_eq!(outcomes(), (network, network, others, others));
    }));
}

#[test]
fn an_ordinary_user_keeps_the_shares_alone() {
    if !is_root() && is_outside() {
        skipped!("only root can become another user");
        return;
    }
    let name = "an_ordinary_user_keeps_the_shares_alone";
    succeeded(in_own_process(name, Some(USER), |place| {
        let (layers, rw, ro) = place.confine();
        let state: Vec<_> = layers.iter().map(|layer| (layer.layer, layer.applied)).collect();
        assert_eq!(
            state,
            [
                ("shares", false),
                ("limits", true),
                ("mounts", false),
                ("no-new-privileges", true),
                ("capabilities", true),
                ("landlock", true),
                ("seccomp", true)
            ]
        );
        assert!(layers[2].detail.contains("CAP_SYS_ADMIN"), "{layers:?}");
        look_around(&place, &rw, &ro);
        assert!(
            rustix::fs::chownat(&rw, "file", Some(rustix::fs::Uid::ROOT), None, AtFlags::empty()).is_err()
        );
    }));
}

/// How a process ended that made a forbidden call, and what it said.
fn forbidden(output: Option<Output>, says: &str) {
    let Some(output) = output else { return };
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(33), "{error}");
    assert!(error.contains(says) && error.contains("--sandbox=off"), "{error}");
}

#[test]
fn a_forbidden_call_is_named_with_its_thread() {
    forbidden(
        in_own_process("a_forbidden_call_is_named_with_its_thread", None, |place| {
            place.confine();
            let thread = thread::Builder::new().name("fs0-root".into()).spawn(|| {
                seccomp::enter(Kind::FileSystem);
                let _ = TcpStream::connect("127.0.0.1:1");
            });
            let _ = thread.unwrap().join();
        }),
        "daxvm: thread fs0-root made the forbidden system call socket (41): ",
    );
}

/// As the C library does for a moment where it starts threads and programs.
#[test]
fn a_forbidden_call_with_signals_blocked_ends_the_process_without_a_word() {
    let name = "a_forbidden_call_with_signals_blocked_ends_the_process_without_a_word";
    let output = in_own_process(name, None, |place| {
        place.confine();
        // SAFETY: a signal set is bytes, which the first call fills and the second one reads.
        unsafe {
            let mut all = std::mem::zeroed();
            libc::sigfillset(&mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &all, std::ptr::null_mut());
        }
        let _ = TcpStream::connect("127.0.0.1:1");
        eprintln!("the forbidden call came back");
    });
    let Some(output) = output else { return };
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{error}");
    assert!(!error.contains("forbidden"), "{error}");
}

#[test]
fn nobody_starts_a_process() {
    forbidden(
        in_own_process("nobody_starts_a_process", None, |place| {
            place.confine();
            // By system call, as the C library's function blocks the signal. The child, if there were one, would end.
            // SAFETY: the call takes no arguments.
            if unsafe { libc::syscall(libc::SYS_fork) } == 0 {
                std::process::exit(0);
            }
        }),
        "made the forbidden system call fork (57): ",
    );
}

#[test]
fn nothing_becomes_code() {
    forbidden(
        in_own_process("nothing_becomes_code", None, |place| {
            place.confine();
            let (protection, flags) =
                (libc::PROT_READ | libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            // SAFETY: a new mapping that nobody uses.
            unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0) };
        }),
        "made the forbidden system call mmap (9): ",
    );
}

#[test]
fn a_vcpu_cannot_do_what_a_share_does() {
    forbidden(
        in_own_process("a_vcpu_cannot_do_what_a_share_does", None, |place| {
            let (_, rw, _) = place.confine();
            let thread = thread::Builder::new().name("vcpu-0".into()).spawn(move || {
                seccomp::enter(Kind::Vcpu);
                let _ = rustix::fs::mkdirat(&rw, "made", Mode::RWXU);
            });
            let _ = thread.unwrap().join();
        }),
        "daxvm: thread vcpu-0 made the forbidden system call mkdirat (258): ",
    );
}

/// What any thread does, whatever it is for.
fn live() {
    let map: HashMap<_, _> = (0..10_000).map(|number| (number, vec![number; 100])).collect();
    assert_eq!(map[&9_999][99], 9_999);
    drop(vec![1_u8; 64 << 20]);
    let pair = (Mutex::new(()), Condvar::new());
    let guard = pair.0.lock().unwrap();
    drop(pair.1.wait_timeout(guard, Duration::from_millis(5)).unwrap());
    let start = Instant::now();
    thread::sleep(Duration::from_millis(2));
    thread::park_timeout(Duration::from_millis(2));
    assert!(start.elapsed() > Duration::from_millis(2));
    eprintln!("{:?}", std::time::SystemTime::now());
    tracing::warn!("a message");
    let file = rustix::stdio::stderr().try_clone_to_owned().unwrap();
    assert!(File::from(file).metadata().is_ok());
}

#[test]
fn every_kind_of_thread_lives_panics_and_ends() {
    let name = "every_kind_of_thread_lives_panics_and_ends";
    succeeded(in_own_process(name, None, |place| {
        let _ = tracing_subscriber::fmt().with_writer(std::io::stderr).try_init();
        place.confine();
        live();
        for kind in Kind::ALL {
            let named = || thread::Builder::new().name(format!("{kind:?}"));
            let alive = named().spawn(move || {
                seccomp::enter(kind);
                live();
            });
            alive.unwrap().join().unwrap();
            let panics = named().spawn(move || {
                seccomp::enter(kind);
                panic!("as it may");
            });
            panics.unwrap().join().unwrap_err();
        }
    }));
}

#[test]
fn a_device_that_a_vcpu_activates_has_threads_of_its_own_kind() {
    let name = "a_device_that_a_vcpu_activates_has_threads_of_its_own_kind";
    succeeded(in_own_process(name, None, |place| {
        let (_, rw, _) = place.confine();
        let vcpu = thread::spawn(move || {
            seccomp::enter(Kind::Vcpu);
            let (done, is_done) = std::sync::mpsc::channel();
            let serve = move |_: &_| {
                rustix::fs::mkdirat(&rw, "made", Mode::RWXU).unwrap();
                rustix::fs::fsync(open_at(&rw, "made", OFlags::DIRECTORY).unwrap().as_fd()).unwrap();
                done.send(thread::current().name().map(str::to_owned)).unwrap();
                Ok(())
            };
            let thread = DeviceThread::spawn(ThreadKind::FileSystem, "fs1-share", Arc::new(|| ()), serve);
            assert_eq!(is_done.recv().unwrap().as_deref(), Some("fs1-share"));
            drop(thread.unwrap());
        });
        vcpu.join().unwrap();
    }));
}

#[test]
fn the_plan_tells_of_every_layer() {
    let directory = Place::make();
    let path = |name: &str| directory.path().join(name);
    let outputs = Outputs { replaced: vec![path("metrics/file")], removed: vec![path("sockets/api")] };
    let shares = [(path("rw"), false), (path("ro"), true)];
    let layers = plan(shares.iter().map(|(path, read_only)| (path.as_path(), *read_only)), &outputs);
    let names: Vec<_> = layers.iter().map(|layer| layer.layer).collect();
    assert_eq!(
        names,
        ["shares", "limits", "mounts", "no-new-privileges", "capabilities", "landlock", "seccomp"]
    );
    let landlock = layers.iter().find(|layer| layer.layer == "landlock").unwrap();
    if landlock.applied {
        for part in ["rw", "ro", "metrics", "sockets"] {
            assert!(landlock.detail.contains(path(part).to_str().unwrap()), "{landlock}");
        }
    }
    let missing = Layer::missing("seccomp", "the kernel has none").to_string();
    assert_eq!(missing, "seccomp: not here: the kernel has none");
}
