//! `daxvm run`: boots a guest.

use std::error::Error;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::dry_run;
use super::root::{parse_disk, parse_root};
use super::share::parse_share;
use crate::config::{
    DiskConfig, Host, RootConfig, RunConfig, SandboxMode, ShareConfig, parse_cpus, parse_interval,
    parse_limit, parse_memory, parse_variable,
};

/// Boot a guest, and run a command in it
///
/// Without --kernel the guest runs the host's kernel. With a command its root is the host's root directory, or what
/// --root says, below a layer that takes all changes and vanishes at the end; the command has the caller's working
/// directory, standard input, output and error. Without a command the guest needs an init of its own (--initrd, or a
/// disk), and its serial console is standard input and output.
///
/// --config takes all of it from a file. The command line wins: single values replace those of the file, as do --root
/// and the command; --share, --disk, --rw, --env and --cmdline add to those of the file, and a share with the same tag or
/// a variable with the same name replaces it.
#[derive(Debug, Args)]
#[command(override_usage = "daxvm run [OPTIONS] [-- COMMAND [ARGUMENT]...]")]
pub struct RunArgs {
    /// The kernel: a bzImage (vmlinuz), an uncompressed ELF kernel (vmlinux), or a directory with an unpacked kernel
    /// package; by default the running one
    #[arg(long, value_name = "FILE|DIR", help_heading = "Machine")]
    kernel: Option<PathBuf>,
    /// Where the kernel's modules are: a directory that holds lib/modules/VERSION, or is one; looked for by default
    #[arg(long, value_name = "DIR", help_heading = "Machine")]
    modules: Option<PathBuf>,
    /// The initramfs, for a guest without a command
    #[arg(long, value_name = "FILE", help_heading = "Machine")]
    initrd: Option<PathBuf>,
    /// Kernel parameters, appended to `console=ttyS0 panic=-1 reboot=a` and, for a command, `quiet
    /// earlyprintk=ttyS0,115200`
    #[arg(long, value_name = "PARAMETERS", help_heading = "Machine")]
    cmdline: Option<String>,
    /// vCPUs, 1 to 32; by default those of the host, no more than 8, for a command, and 1 otherwise
    #[arg(long, value_name = "N", value_parser = parse_cpus, help_heading = "Machine")]
    cpus: Option<u8>,
    /// RAM, 64M or more, in steps of 2M; by default a fourth of the host's available memory, from 512M to 4G, for a
    /// command, and 512M otherwise
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, help_heading = "Machine")]
    memory: Option<u64>,
    /// A disk: a raw image or a block device, which the guest may not write to with `ro`; may be repeated
    #[arg(long = "disk", value_name = "FILE[,ro]", value_parser = parse_disk, help_heading = "Machine")]
    disks: Vec<DiskConfig>,
    /// Whether the guest has a source of randomness (virtio-rng); it has by default
    #[arg(
        long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
        help_heading = "Machine"
    )]
    rng: Option<bool>,
    /// Let the guest have guests of its own (VMX, SVM), where the host's KVM can nest
    #[arg(
        long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
        help_heading = "Machine"
    )]
    nested: Option<bool>,
    /// The root directory of a guest with a command, by default the host's `/`. Changes vanish (`overlay`, the default),
    /// are refused (`ro`) or go to the host (`rw`). dax=POLICY, window=SIZE and prefault=PAGES as for
    /// --share
    #[arg(
        long, value_name = "DIR[,rw|ro|overlay][,KEY=VALUE]", value_parser = parse_root, help_heading = "Directories"
    )]
    root: Option<RootConfig>,
    /// A directory or a file of the host that the command may change, found where it is on the host; may be repeated
    #[arg(long, value_name = "PATH", help_heading = "Directories")]
    rw: Vec<PathBuf>,
    /// Share a directory: tag=TAG,path=DIR and, if wanted, ro, window=SIZE (0 for none, or 32M to 256G in steps of 2M; by
    /// default what costs the guest 2 % of its RAM), dax=POLICY (never, always, inode, size, size:BYTES, auto, or a rule
    /// file), prefault=PAGES (those of DAX files that the guest finds at hand: never, cached, all), cache=MODE (never or none,
    /// auto, metadata, always); may be repeated. A comma in a path is written twice
    #[arg(long = "share", value_name = "KEY=VALUE,...", value_parser = parse_share, help_heading = "Directories")]
    shares: Vec<ShareConfig>,
    /// Allow DAX windows that take more than an eighth of the guest's RAM for page descriptors
    #[arg(
        long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
        help_heading = "Directories"
    )]
    large_windows: Option<bool>,
    /// Set an environment variable for the command, or pass on the caller's, as is done with PATH, TERM, LANG and, when the
    /// root is the host's, HOME, USER and LOGNAME; may be repeated
    #[arg(long, value_name = "NAME[=VALUE]", value_parser = parse_variable, help_heading = "Command")]
    env: Vec<(String, Option<String>)>,
    /// The command's working directory; by default the caller's
    #[arg(long = "chdir", value_name = "DIR", help_heading = "Command")]
    directory: Option<PathBuf>,
    /// End the guest after this time: 90s, 5m, 1h
    #[arg(long, value_name = "TIME", value_parser = parse_limit, help_heading = "Command")]
    timeout: Option<Duration>,
    /// End the guest when it shows no sign of life for this time before its init runs; 10s by default
    #[arg(long, value_name = "TIME", value_parser = parse_limit, help_heading = "Command")]
    boot_timeout: Option<Duration>,
    /// Where the guest's console goes; by default to standard output, and with a command nowhere, but its last lines are shown
    /// when the guest fails
    #[arg(long, value_name = "FILE|stderr", help_heading = "Output")]
    console: Option<PathBuf>,
    /// Write how the guest ended, timing and counters as JSON
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    report: Option<PathBuf>,
    /// Write counters for Prometheus again and again while the guest runs, and at its end
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    metrics_file: Option<PathBuf>,
    /// How often to write them; every 5s by default
    #[arg(long, value_name = "TIME", value_parser = parse_interval, help_heading = "Output")]
    metrics_interval: Option<Duration>,
    /// Listen on a Unix socket that tells, over HTTP, what the guest does (for `daxvm top` and `daxvm ctl`)
    #[arg(long, value_name = "PATH", help_heading = "Output")]
    api_socket: Option<PathBuf>,
    /// Whether daxvm gives up all rights that its guest does not need before it runs: `on`, the default, or `off`, which is
    /// for the time in which a mistake of the sandbox is looked for
    #[arg(long, value_name = "on|off", value_enum, hide_possible_values = true, help_heading = "Machine")]
    sandbox: Option<SandboxMode>,
    /// Take the configuration from a file (`daxvm config schema` says what is in it)
    #[arg(long = "config", value_name = "FILE", help_heading = "Configuration")]
    file: Option<PathBuf>,
    /// Print the configuration, as a file for --config, and the machine that comes of it; boot nothing
    #[arg(long, help_heading = "Configuration")]
    dry_run: bool,
    /// The command to run in the guest, and its arguments
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

impl RunArgs {
    /// Runs the guest, or says how it would be; returns the exit status.
    pub(super) fn execute(self) -> Result<u8, Box<dyn Error>> {
        let dry_run = self.dry_run;
        let config = self.resolve()?;
        config.check()?;
        if dry_run {
            dry_run::print(&config)?;
            return Ok(0);
        }
        Ok(crate::runner::run(config)?)
    }

    /// The configuration: the command line over the file over the defaults.
    fn resolve(self) -> Result<RunConfig, Box<dyn Error>> {
        let here = std::env::current_dir().map_err(|error| {
            format!("Cannot tell the working directory: {error}; change to one that exists")
        })?;
        let mut base = self.file.as_deref().map(RunConfig::load).transpose()?.unwrap_or_default();
        if self.root.is_some() {
            base.root = RootConfig::default();
        }
        let mut given = self.into_config();
        given.resolve_paths(&here);
        Ok(base.overridden_by(given).with_defaults(&Host::read(), &here))
    }

    fn into_config(self) -> RunConfig {
        RunConfig {
            kernel: self.kernel,
            modules: self.modules,
            initrd: self.initrd,
            cmdline: self.cmdline.unwrap_or_default(),
            cpus: self.cpus,
            memory: self.memory,
            root: self.root.unwrap_or_default(),
            rw: self.rw,
            shares: self.shares,
            disks: self.disks,
            rng: self.rng,
            nested: self.nested,
            large_windows: self.large_windows,
            env: self.env,
            directory: self.directory,
            timeout: self.timeout,
            boot_timeout: self.boot_timeout,
            console: self.console,
            report: self.report,
            metrics_file: self.metrics_file,
            metrics_interval: self.metrics_interval,
            api_socket: self.api_socket,
            sandbox: self.sandbox,
            command: self.command,
        }
    }
}
