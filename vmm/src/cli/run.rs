//! `daxvm run`: boots a guest.

use std::error::Error;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use devices::text::{parse_duration, parse_size};

use super::share::parse_share;
use crate::config::{RootConfig, RunConfig, ShareConfig};

/// Boot a guest.
///
/// Exit status: 0 power-off, 32 reset, 33 crash, 34 kernel panic, 124 timeout, 125 an error of daxvm or of its
/// configuration, 128+n when signal n ended it.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The kernel: a bzImage (vmlinuz) or an uncompressed ELF kernel (vmlinux)
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// The initramfs
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Kernel parameters, appended to `console=ttyS0 panic=-1 reboot=a`
    #[arg(long, value_name = "PARAMETERS", default_value = "", hide_default_value = true)]
    cmdline: String,
    /// vCPUs, 1 to 32
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u8,
    /// RAM, 64M or more, in steps of 2M
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_size)]
    memory: u64,
    /// Share a directory: tag=TAG,path=DIR and, if wanted, ro, window=SIZE, dax=POLICY (never, always, inode, size,
    /// size:BYTES, auto, or a rule file); may be repeated
    #[arg(long = "share", value_name = "KEY=VALUE,...", value_parser = parse_share)]
    shares: Vec<ShareConfig>,
    /// End the guest after this time
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    timeout: Option<Duration>,
    /// Write a report as JSON when the guest has ended
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    #[arg(long, default_value = "/")]
    root: PathBuf,
    #[arg(long)]
    rw: Vec<PathBuf>,
    #[arg(long)]
    env: Vec<String>,
    #[arg(long)]
    rng: bool,
    #[arg(long, value_parser = parse_duration)]
    boot_timeout: Option<Duration>,
    #[arg(long)]
    console: Option<PathBuf>,
    #[arg(last = true)]
    command: Vec<std::ffi::OsString>,
}

impl RunArgs {
    /// Runs the guest; returns the exit status.
    pub(super) fn execute(self) -> Result<u8, Box<dyn Error>> {
        let config = RunConfig {
            kernel: Some(self.kernel),
            initrd: self.initrd,
            cmdline: self.cmdline,
            cpus: Some(self.cpus),
            memory: Some(self.memory),
            shares: self.shares,
            timeout: self.timeout,
            report: self.report,
            rng: Some(self.rng),
            root: RootConfig { path: self.root, ..RootConfig::default() },
            rw: self.rw,
            env: self
                .env
                .into_iter()
                .map(|e| match e.split_once('=') {
                    Some((n, v)) => (n.to_owned(), Some(v.to_owned())),
                    None => (e, None),
                })
                .collect(),
            boot_timeout: self.boot_timeout,
            console: self.console,
            command: self.command,
            ..RunConfig::default()
        };
        Ok(crate::runner::run(config)?)
    }
}
