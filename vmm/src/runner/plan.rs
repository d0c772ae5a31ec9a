//! From what a user asks for to all that it takes: the machine, the modules that its kernel needs, the guest's task.
//! Files are read for it, and nothing is changed.

use std::collections::BTreeSet;
use std::env;
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use devices::virtio::fs::CacheMode;
use devices::virtio::fs::policy::{Policy, Prefault};
use devices::virtio::fs::window::default_window_size;
use rustix::fs::Mode;

use super::kernel::{Kernel, KernelError};
use super::stdio;
use crate::config::{
    ConfigError, DEFAULT_MEMORY, DaxConfig, Host, RootConfig, RunConfig, SandboxMode, ShareConfig,
    ValidConfig, VmConfig,
};
use crate::guest::protocol::{Command, Mount, Root, RootMode, Stdio, Task};
use crate::initramfs::{Module, ModuleError, ModuleTree};
use crate::metrics;
use crate::sandbox::Outputs;

/// How tags begin that are not the user's to give.
pub(crate) const OWN_TAGS: &str = "daxvm-";
/// The tag of the root file system's share; those of `--rw` have a number behind it.
const ROOT_TAG: &str = "daxvm-root";
/// How long a guest may show no sign of life before its init runs.
const BOOT_TIMEOUT: Duration = Duration::from_secs(10);
/// Kernel parameters for guests with a command. Only errors go to the console: each character costs two exits.
/// `earlyprintk` shows those that happen before the console is there, too, such as memory in which the kernel cannot
/// unpack itself.
const PARAMETERS: &str = "quiet earlyprintk=ttyS0,115200";
/// What programs are looked for along when the caller has no `PATH`.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// What a command has of the caller's environment beside `PATH`, when the root is the host's own.
const VARIABLES: [&str; 5] = ["TERM", "HOME", "USER", "LOGNAME", "LANG"];
/// The same for other roots: the caller's home is not there.
const VARIABLES_ELSEWHERE: [&str; 2] = ["TERM", "LANG"];

/// Which files of the root are DAX by default: those that the guest's readahead, of 128 KiB, would not read at once.
///
/// It is a rule that looks at nothing but the file. `auto` also looks at the room in the window, so that a file may be
/// DAX when it is opened again and was not before; and an overlay, which cannot look its files up again, would fail
/// with ESTALE when such a file is copied up.
const ROOT_DAX: Policy = Policy::Size(128 << 10);
/// The largest window of the root, in bytes, that nobody asked for: each GiB has the kernel initialise 16 MiB at boot.
const ROOT_WINDOW: u64 = 1 << 30;

/// Why there is no plan. The message names what to change.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// There is no such kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The kernel has no driver for something that the guest needs.
    #[error("{image} cannot run this guest: it has no module {module}, for {purpose}")]
    Module {
        /// The kernel's image.
        image: PathBuf,
        /// The module.
        module: &'static str,
        /// What it is for, and how to go without.
        purpose: &'static str,
        /// Where it was looked for.
        #[source]
        source: ModuleError,
    },
    /// The machine cannot be.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A directory that is to be shared is not there.
    #[error("{option} {path}: cannot be shared")]
    Share {
        /// `--root` or `--rw`.
        option: &'static str,
        /// The path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A root that is a file.
    #[error("--root {0}: this is no directory; an image needs to be unpacked first")]
    RootNoDirectory(PathBuf),
    /// A place for a share that cannot be made.
    #[error("--rw {path}: the root {root} has no such place, and is read-only; use --root {root},overlay")]
    NoPlace {
        /// The path.
        path: PathBuf,
        /// The root's directory.
        root: PathBuf,
    },
    /// An initramfs and a command.
    #[error("--initrd is for guests without a command: with one, daxvm brings its own")]
    Initrd,
    /// The working directory is gone.
    #[error("The working directory cannot be used; go elsewhere, or give --chdir")]
    Directory(#[source] io::Error),
}

/// What it takes to run a guest.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The machine.
    pub machine: ValidConfig,
    /// The kernel's version, when its image tells.
    pub kernel_version: Option<String>,
    /// Where the kernel's modules are; none when there are none, and everything has to be built in.
    pub modules_dir: Option<PathBuf>,
    /// The modules that go into the initramfs.
    pub modules: Vec<Module>,
    /// What the guest has to do; none for a guest without a command.
    pub task: Option<Task>,
    /// How long the guest may show no sign of life before its init runs.
    pub boot_timeout: Duration,
    /// Where the kernel's console goes.
    pub console: Console,
    /// Where the report goes.
    pub report: Option<PathBuf>,
    /// The caller's umask, which holds for the report; a device of a share clears that of the process.
    pub umask: Mode,
    /// Where counters go while the guest runs, and how often.
    pub metrics: Option<(PathBuf, Duration)>,
    /// Where the running VM can be asked.
    pub api_socket: Option<PathBuf>,
}

impl Plan {
    /// What is made and removed when the guest runs; all else is open by then.
    pub fn outputs(&self) -> Outputs {
        Outputs {
            replaced: self.metrics.iter().map(|(file, _)| file.clone()).collect(),
            removed: self.api_socket.iter().cloned().collect(),
        }
    }
}

/// Where the output of the kernel's console goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Console {
    /// Nowhere: its last lines are kept for messages.
    Kept,
    /// To standard output, and input comes from standard input.
    Terminal,
    /// To standard error.
    StandardError,
    /// To a file.
    File(PathBuf),
}

/// Resolves everything that a user asks for; nothing on the host is changed.
///
/// # Errors
/// See [`PlanError`].
pub fn plan(config: &RunConfig) -> Result<Plan, PlanError> {
    let directory = env::current_dir().map_err(PlanError::Directory)?;
    let config = &config.clone().with_defaults(&Host::read(), &directory);
    let kernel = Kernel::find(config.kernel.as_deref())?;
    let mut machine = VmConfig {
        kernel: kernel.image.clone(),
        initrd: config.initrd.clone(),
        cmdline: config.cmdline.clone(),
        cpus: config.cpus.unwrap_or(1),
        memory: config.memory.unwrap_or(DEFAULT_MEMORY),
        shares: config.shares.clone(),
        disks: config.disks.clone(),
        rng: config.rng.unwrap_or(true),
        nested: config.nested.unwrap_or(false),
        large_windows: config.large_windows.unwrap_or(false),
        timeout: config.timeout,
        sandbox: config.sandbox.unwrap_or(SandboxMode::On),
    };
    let has_command = !config.command.is_empty();
    let (mut modules_dir, mut modules, mut task) = (None, Vec::new(), None);
    if has_command {
        if machine.initrd.is_some() {
            return Err(PlanError::Initrd);
        }
        machine.cmdline = format!("{PARAMETERS} {}", config.cmdline).trim_end().to_owned();
        if let Some(tree) = kernel.modules(config.modules.as_deref())? {
            modules = needed_modules(&kernel.image, &tree, config)?;
            modules_dir = Some(tree.dir().to_owned());
        }
        let root = RootConfig { path: root_directory(&config.root.path)?, ..config.root.clone() };
        machine.shares.push(root_share(&root, machine.memory));
        let mounts = writable(&config.rw, &root, &mut machine.shares)?;
        task = Some(Task {
            modules: modules.iter().map(|module| module.name.clone()).collect(),
            root: Root { tag: ROOT_TAG.to_owned(), mode: root.mode, options: String::new() },
            mounts,
            command: command(config, &root.path),
        });
    }
    Ok(Plan {
        machine: ValidConfig::new(machine)?,
        kernel_version: kernel.version,
        modules_dir,
        modules,
        task,
        boot_timeout: config.boot_timeout.unwrap_or(BOOT_TIMEOUT),
        console: console(config.console.as_deref(), has_command),
        report: config.report.clone(),
        umask: current_umask(),
        metrics: config
            .metrics_file
            .clone()
            .map(|file| (file, config.metrics_interval.unwrap_or(metrics::DEFAULT_INTERVAL))),
        api_socket: config.api_socket.clone(),
    })
}

/// The process's umask, which can only be read by changing it.
fn current_umask() -> Mode {
    let umask = rustix::process::umask(Mode::empty());
    rustix::process::umask(umask);
    umask
}

fn console(given: Option<&Path>, has_command: bool) -> Console {
    match given {
        None if has_command => Console::Kept,
        None => Console::Terminal,
        Some(path) if path.as_os_str() == "stderr" => Console::StandardError,
        Some(path) => Console::File(path.to_owned()),
    }
}

/// What the guest's init needs of the kernel, and what for.
fn needed_modules(image: &Path, tree: &ModuleTree, config: &RunConfig) -> Result<Vec<Module>, PlanError> {
    let mut needed = vec![
        ("virtio_pci", "all devices"),
        ("virtio_console", "the command's standard streams"),
        ("virtiofs", "its root file system (Linux 5.4 or newer has it, unless it was left out)"),
    ];
    if config.root.mode == RootMode::Overlay {
        needed.push(("overlay", "a root that takes changes and forgets them; --root DIR,ro goes without"));
    }
    if !config.disks.is_empty() {
        needed.push(("virtio_blk", "--disk"));
    }
    let names: Vec<_> = needed.iter().map(|(module, _)| *module).collect();
    // Nothing depends on random numbers from the host: the kernel has others.
    let with_rng = [&names[..], &["virtio_rng"]].concat();
    let resolved = match tree.resolve(if config.rng == Some(false) { &names } else { &with_rng }) {
        Err(ModuleError::NotFound { .. }) => tree.resolve(&names),
        other => other,
    };
    match resolved {
        Err(source @ ModuleError::NotFound { .. }) => {
            // Which of them it is that is missing, or lacks something that it depends on.
            let missing = needed.iter().find(|(module, _)| tree.resolve(&[module]).is_err());
            Err(match missing {
                Some((module, purpose)) => {
                    PlanError::Module { image: image.to_owned(), module, purpose, source }
                }
                None => KernelError::from(source).into(),
            })
        }
        other => Ok(other.map_err(KernelError::from)?),
    }
}

fn root_directory(path: &Path) -> Result<PathBuf, PlanError> {
    let shared = |source| PlanError::Share { option: "--root", path: path.to_owned(), source };
    let root = path.canonicalize().map_err(shared)?;
    if !root.is_dir() {
        return Err(PlanError::RootNoDirectory(root));
    }
    Ok(root)
}

fn root_share(root: &RootConfig, memory: u64) -> ShareConfig {
    // Whoever chooses the policy gets the window that any share with it has.
    let default_window = root.dax.is_none().then(|| default_window_size(memory).min(ROOT_WINDOW));
    ShareConfig {
        tag: ROOT_TAG.to_owned(),
        path: root.path.clone(),
        read_only: root.mode != RootMode::Rw,
        window: root.window.or(default_window),
        dax: root.dax.clone().unwrap_or(DaxConfig::Named(ROOT_DAX)),
        prefault: root.prefault.unwrap_or_default(),
        // The host goes on changing its files, and whoever edits one wants the guest to see it.
        cache: CacheMode::Auto,
    }
}

/// Shares what the command may change, and says where it is mounted. A file is shared with its directory.
///
/// Nothing of these shares is DAX: what a command writes is in the guest's page cache already, and each window would
/// cost the guest memory of its own.
fn writable(
    paths: &[PathBuf],
    root: &RootConfig,
    shares: &mut Vec<ShareConfig>,
) -> Result<Vec<Mount>, PlanError> {
    let shared = |path: &Path| {
        let path = path.to_owned();
        move |source| PlanError::Share { option: "--rw", path, source }
    };
    let mut targets = BTreeSet::new();
    for path in paths {
        targets.insert(path.canonicalize().map_err(shared(path))?);
    }
    let mut mounts: Vec<Mount> = Vec::new();
    let mut directories: Vec<(PathBuf, String)> = Vec::new();
    // In their order a directory comes before what is below it.
    for target in targets {
        let covered = mounts.iter().any(|mount| !mount.file && target.starts_with(&mount.target));
        if covered || root.mode == RootMode::Rw && root.path == Path::new("/") {
            continue;
        }
        let place = root.path.join(target.strip_prefix("/").unwrap_or(&target));
        if root.mode == RootMode::Ro && !place.exists() {
            return Err(PlanError::NoPlace { path: target, root: root.path.clone() });
        }
        let file = !target.is_dir();
        let directory = if file { target.parent().unwrap_or(Path::new("/")) } else { &target };
        let tag = match directories.iter().find(|(known, _)| known == directory) {
            Some((_, tag)) => tag.clone(),
            None => {
                let tag = format!("daxvm-rw-{}", directories.len());
                directories.push((directory.to_owned(), tag.clone()));
                shares.push(ShareConfig {
                    tag: tag.clone(),
                    path: directory.to_owned(),
                    read_only: false,
                    window: Some(0),
                    dax: DaxConfig::Named(Policy::Never),
                    prefault: Prefault::Never,
                    cache: CacheMode::Auto,
                });
                tag
            }
        };
        mounts.push(Mount { tag, target, read_only: false, options: String::new(), file });
    }
    Ok(mounts)
}

fn command(config: &RunConfig, root: &Path) -> Command {
    let stdio = stdio::of_caller();
    let window = if stdio.contains(&Stdio::Terminal) { stdio::window_size() } else { None };
    Command {
        argv: config.command.clone(),
        env: environment(&config.env, root == Path::new("/"), |name| env::var_os(name)),
        directory: directory_in(root, config.directory.clone().unwrap_or_else(|| "/".into())),
        stdio,
        window,
    }
}

/// The command's whole environment. What is given wins; a name without a value stands for the caller's.
fn environment(
    given: &[(String, Option<String>)],
    own_root: bool,
    caller: impl Fn(&OsStr) -> Option<OsString>,
) -> Vec<(OsString, OsString)> {
    let mut variables: Vec<(OsString, OsString)> = Vec::new();
    let mut set = |name: &str, value: Option<OsString>| {
        let Some(value) = value else { return };
        match variables.iter_mut().find(|(known, _)| known == name) {
            Some((_, old)) => *old = value,
            None => variables.push((name.into(), value)),
        }
    };
    set("PATH", Some(caller(OsStr::new("PATH")).unwrap_or_else(|| DEFAULT_PATH.into())));
    if !own_root {
        set("HOME", Some("/root".into()));
    }
    for name in if own_root { &VARIABLES[..] } else { &VARIABLES_ELSEWHERE } {
        set(name, caller(OsStr::new(name)));
    }
    for (name, value) in given {
        set(name, value.clone().map(OsString::from).or_else(|| caller(OsStr::new(name))));
    }
    variables
}

/// The working directory as the guest has it: one that lies in the root on the host and is meant by that name is found
/// below the guest's root.
fn directory_in(root: &Path, directory: PathBuf) -> PathBuf {
    let relative = directory.strip_prefix("/").unwrap_or(&directory);
    if root.join(relative).is_dir() {
        return directory;
    }
    match directory.strip_prefix(root) {
        Ok(below) => Path::new("/").join(below),
        Err(_) => directory,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DiskConfig;
    use std::fs;
    use tempfile::TempDir;

    fn root(path: &Path, mode: RootMode) -> RootConfig {
        RootConfig { path: path.to_owned(), mode, ..RootConfig::default() }
    }

    #[test]
    fn the_environment_is_small_and_what_is_given_wins() {
        let caller = |name: &OsStr| match name.to_str() {
            Some("PATH") => Some("/usr/bin".into()),
            Some("HOME") => Some("/home/me".into()),
            Some("SECRET") => Some("s3cret".into()),
            Some("TERM") => Some("xterm".into()),
            _ => None,
        };
        let env = |given: &[(&str, Option<&str>)], own_root| {
            let given: Vec<_> =
                given.iter().map(|(name, value)| (name.to_string(), value.map(str::to_owned))).collect();
            let variables = environment(&given, own_root, caller);
            let texts =
                variables.iter().map(|(name, value)| format!("{}={}", name.display(), value.display()));
            texts.collect::<Vec<_>>()
        };
        assert_eq!(env(&[], true), ["PATH=/usr/bin", "TERM=xterm", "HOME=/home/me"]);
        assert_eq!(env(&[], false), ["PATH=/usr/bin", "HOME=/root", "TERM=xterm"]);
        let given = [("SECRET", None), ("HOME", Some("/tmp")), ("GONE", None), ("A", Some(""))];
        assert_eq!(env(&given, true), ["PATH=/usr/bin", "TERM=xterm", "HOME=/tmp", "SECRET=s3cret", "A="]);
        assert_eq!(environment(&[], true, |_| None), [("PATH".into(), OsString::from(DEFAULT_PATH))]);
    }

    #[test]
    fn the_working_directory_follows_the_root() {
        let dir = TempDir::new().unwrap();
        let inside = dir.path().join("srv/data");
        fs::create_dir_all(&inside).unwrap();
        assert_eq!(directory_in(Path::new("/"), inside.clone()), inside);
        assert_eq!(directory_in(dir.path(), "/srv/data".into()), Path::new("/srv/data"));
        assert_eq!(directory_in(dir.path(), inside), Path::new("/srv/data"));
        assert_eq!(directory_in(dir.path(), "/elsewhere".into()), Path::new("/elsewhere"));
    }

    #[test]
    fn writable_paths_are_shared_once_and_parents_first() {
        let dir = TempDir::new().unwrap();
        let base = dir.path().canonicalize().unwrap();
        for name in ["out/deep", "etc"] {
            fs::create_dir_all(base.join(name)).unwrap();
        }
        for name in ["etc/a", "etc/b", "out/deep/c"] {
            fs::write(base.join(name), "").unwrap();
        }
        let paths = ["out/deep", "etc/b", "out", "out/../etc/a", "out/deep/c"].map(|name| base.join(name));
        let mut shares = Vec::new();
        let mounts = writable(&paths, &root(Path::new("/"), RootMode::Overlay), &mut shares).unwrap();
        let shown: Vec<_> = mounts
            .iter()
            .map(|mount| (mount.tag.as_str(), mount.target.strip_prefix(&base).unwrap(), mount.file))
            .collect();
        let path = Path::new;
        assert_eq!(
            shown,
            [
                ("daxvm-rw-0", path("etc/a"), true),
                ("daxvm-rw-0", path("etc/b"), true),
                ("daxvm-rw-1", path("out"), false)
            ]
        );
        let shared: Vec<_> = shares.iter().map(|share| share.path.strip_prefix(&base).unwrap()).collect();
        assert_eq!(shared, [path("etc"), path("out")]);

        let none = writable(&paths, &root(Path::new("/"), RootMode::Rw), &mut Vec::new()).unwrap();
        assert!(none.is_empty(), "a writable root has it all");
        let error = writable(&paths, &root(&base, RootMode::Ro), &mut Vec::new()).unwrap_err().to_string();
        assert!(error.contains(",overlay"), "{error}");
        let gone = [base.join("gone")];
        let error = writable(&gone, &root(Path::new("/"), RootMode::Overlay), &mut Vec::new()).unwrap_err();
        assert!(error.to_string().starts_with("--rw ") && error.to_string().contains("/gone"), "{error}");
    }

    #[test]
    fn the_console_is_where_it_does_not_disturb() {
        assert_eq!(console(None, true), Console::Kept);
        assert_eq!(console(None, false), Console::Terminal);
        assert_eq!(console(Some(Path::new("stderr")), true), Console::StandardError);
        assert_eq!(console(Some(Path::new("/tmp/c")), false), Console::File("/tmp/c".into()));
    }

    fn bzimage(dir: &Path) {
        let mut image = vec![0; 0x400];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x20e..0x210].copy_from_slice(&0x100u16.to_le_bytes());
        image[0x300..0x304].copy_from_slice(b"6.1 ");
        fs::write(dir.join("vmlinuz"), image).unwrap();
    }

    #[test]
    fn a_command_needs_a_kernel_and_nothing_else() {
        let dir = TempDir::new().unwrap();
        bzimage(dir.path());
        let config = RunConfig {
            kernel: Some(dir.path().to_owned()),
            command: vec!["true".into()],
            cmdline: "loglevel=7".into(),
            ..RunConfig::default()
        };
        let plan = plan(&config).unwrap();
        assert_eq!(plan.kernel_version.as_deref(), Some("6.1"));
        assert_eq!((plan.modules_dir, plan.modules.len()), (None, 0));
        assert!(plan.machine.cmdline.ends_with(" loglevel=7") && plan.machine.rng);
        let share = &plan.machine.shares[0];
        assert_eq!(
            (share.tag.as_str(), share.path.as_path(), share.read_only),
            (ROOT_TAG, Path::new("/"), true)
        );
        let task = plan.task.unwrap();
        assert_eq!(
            (task.root.mode, task.command.directory),
            (RootMode::Overlay, env::current_dir().unwrap())
        );
    }

    #[test]
    fn kernels_of_a_distribution_are_found_with_their_modules() {
        let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/kernels");
        let drivers =
            ["virtio_pci", "virtio_console", "fuse", "virtiofs", "overlay", "virtio_blk", "virtio_rng"];
        for (name, version, built_in) in [
            ("6.12-cloud", "6.12.", &["virtio_pci", "virtio_console", "fuse", "virtiofs"][..]),
            ("6.12-generic", "6.12.", &["virtio_pci", "virtio_console", "fuse", "virtiofs"]),
            ("6.1-cloud", "6.1.", &[]),
        ] {
            let dir = kernels.join(name);
            if !dir.exists() {
                skipped!("no {}; run scripts/fetch-kernel {name}", dir.display());
                continue;
            }
            for kernel in [dir.clone(), dir.join("vmlinuz"), dir.join("vmlinux")] {
                let config = RunConfig {
                    kernel: Some(kernel.clone()),
                    command: vec!["true".into()],
                    disks: vec![DiskConfig { path: "/dev/null".into(), read_only: true }],
                    ..RunConfig::default()
                };
                let plan = plan(&config).unwrap();
                let found = plan.kernel_version.unwrap();
                assert!(found.starts_with(version), "{}: {found}", kernel.display());
                assert!(plan.modules_dir.unwrap().ends_with(found));
                let modules: Vec<_> = plan.modules.iter().map(|module| module.name.as_str()).collect();
                for driver in drivers {
                    let expected = !built_in.contains(&driver);
                    assert_eq!(modules.contains(&driver), expected, "{}: {driver}", kernel.display());
                }
                let position = |name: &str| modules.iter().position(|module| *module == name);
                assert!(position("fuse") <= position("virtiofs"), "{modules:?}");
            }
        }
    }

    #[test]
    fn without_a_command_nothing_is_added() {
        let dir = TempDir::new().unwrap();
        bzimage(dir.path());
        let config = RunConfig { kernel: Some(dir.path().to_owned()), ..RunConfig::default() };
        let plan = plan(&config).unwrap();
        let machine = &plan.machine;
        assert_eq!((plan.task, machine.shares.len(), machine.cmdline.as_str()), (None, 0, ""));
    }

    #[test]
    fn mistakes_name_the_remedy() {
        let dir = TempDir::new().unwrap();
        bzimage(dir.path());
        let base = RunConfig {
            kernel: Some(dir.path().to_owned()),
            command: vec!["true".into()],
            ..RunConfig::default()
        };
        let root = |path: &str| root(Path::new(path), RootMode::Overlay);
        for (config, says) in [
            (RunConfig { initrd: Some("i".into()), ..base.clone() }, "--initrd"),
            (RunConfig { root: root("/no/such"), ..base.clone() }, "--root /no/such"),
            (RunConfig { root: root("/proc/self/stat"), ..base.clone() }, "no directory"),
            (RunConfig { memory: Some(1), ..base.clone() }, "--memory"),
            (RunConfig { modules: Some("/no/such".into()), ..base.clone() }, "/no/such"),
        ] {
            let error = plan(&config).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        let modules = dir.path().join("lib/modules/6.1");
        fs::create_dir_all(modules.join("kernel")).unwrap();
        fs::write(modules.join("modules.builtin"), "virtio_pci.ko\nvirtio_console.ko\nvirtiofs.ko\n")
            .unwrap();
        let error = plan(&base).unwrap_err().to_string();
        assert!(error.contains("no module overlay") && error.contains("--root DIR,ro"), "{error}");
        let ro = RunConfig { root: RootConfig { mode: RootMode::Ro, ..RootConfig::default() }, ..base };
        assert_eq!(plan(&ro).unwrap().modules.len(), 0, "no virtio_rng is no mistake");
    }
}
