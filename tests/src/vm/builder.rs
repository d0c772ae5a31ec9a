//! What to boot.

use std::env;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::kernel::in_target;
use super::{Kernel, Vm, VmError, scratch};

/// Emulated hosts are slow, and 32 emulated processors slower still.
const DEADLINE: Duration = Duration::from_secs(120);

/// A directory of the host, shared.
#[derive(Clone, Debug)]
pub struct Share(OsString);

impl Share {
    /// Shares a directory under a tag.
    pub fn new(tag: &str, dir: impl AsRef<Path>) -> Share {
        let mut text = OsString::from(format!("tag={tag},path="));
        text.push(dir.as_ref());
        Share(text)
    }

    /// One more of its options, `KEY=VALUE`.
    pub fn with(mut self, option: &str) -> Share {
        self.0.push(",");
        self.0.push(option);
        self
    }

    /// The size of its DAX window: `32M`, `8G`, `0`.
    pub fn window(self, size: &str) -> Share {
        self.with(&format!("window={size}"))
    }

    /// Its policy: `always`, `size:64K`, or a rule file.
    pub fn dax(self, policy: &str) -> Share {
        self.with(&format!("dax={policy}"))
    }

    /// Which pages the guest finds at hand: `never`, `cached`, `all`.
    pub fn prefault(self, prefault: &str) -> Share {
        self.with(&format!("prefault={prefault}"))
    }

    /// What the guest may keep: `never`, `auto`, `metadata`, `always`.
    pub fn cache(self, mode: &str) -> Share {
        self.with(&format!("cache={mode}"))
    }

    /// Refuses every change.
    pub fn read_only(self) -> Share {
        self.with("ro")
    }
}

/// A virtual machine to be.
#[derive(Clone, Debug)]
pub struct VmBuilder {
    kernel: Kernel,
    cpus: u32,
    memory: String,
    cmdline: String,
    shares: Vec<Share>,
    more: Vec<OsString>,
    under: Vec<OsString>,
    user: Option<u32>,
    report: Option<PathBuf>,
    deadline: Duration,
}

impl VmBuilder {
    /// One processor, 512 MiB, no share.
    pub(super) fn new(kernel: &Kernel) -> VmBuilder {
        VmBuilder {
            kernel: kernel.clone(),
            cpus: 1,
            memory: "512M".into(),
            cmdline: "console=ttyS0 quiet".into(),
            shares: Vec::new(),
            more: Vec::new(),
            under: Vec::new(),
            user: None,
            report: None,
            deadline: DEADLINE,
        }
    }

    /// The number of processors.
    pub fn cpus(mut self, cpus: u32) -> VmBuilder {
        self.cpus = cpus;
        self
    }

    /// The guest's memory: `512M`, `6G`.
    pub fn memory(mut self, size: &str) -> VmBuilder {
        self.memory = size.into();
        self
    }

    /// One more share; the guest finds them in this order.
    pub fn share(mut self, share: Share) -> VmBuilder {
        self.shares.push(share);
        self
    }

    /// More words on the kernel's command line.
    pub fn cmdline_extra(mut self, words: &str) -> VmBuilder {
        self.cmdline = format!("{} {words}", self.cmdline);
        self
    }

    /// One more argument for `daxvm run`.
    pub fn argument(mut self, argument: impl Into<OsString>) -> VmBuilder {
        self.more.push(argument.into());
        self
    }

    /// Has another program start `daxvm`, which it is given as its last arguments: `prlimit --nofile=100`. It must become
    /// daxvm (exec), and not stay beside it.
    pub fn under(mut self, words: &[impl AsRef<OsStr>]) -> VmBuilder {
        self.under = words.iter().map(|word| word.as_ref().to_owned()).collect();
        self
    }

    /// Has a user and a group of this number run it, who may do nothing else.
    pub fn user(mut self, user: u32) -> VmBuilder {
        self.user = Some(user);
        self
    }

    /// Has the report written here, and not where [`super::Ended::report`] has it from.
    pub fn report(mut self, path: &Path) -> VmBuilder {
        self.report = Some(path.to_owned());
        self
    }

    /// How long each step may take, before `DEADLINE_SCALE`.
    pub fn deadline(mut self, deadline: Duration) -> VmBuilder {
        self.deadline = deadline;
        self
    }

    /// Starts the virtual machine and waits until its agent listens.
    pub fn boot(&self) -> Result<Vm, VmError> {
        let mut vm = self.start()?;
        vm.wait_ready()?;
        Ok(vm)
    }

    /// Starts the virtual machine and waits for nothing. `GUEST_CMDLINE` in the environment adds to the kernel's command
    /// line, `DEADLINE_SCALE` lengthens the time limits: for whoever looks for a fault.
    pub fn start(&self) -> Result<Vm, VmError> {
        let initrd = self.kernel.initrd()?;
        let scale = env::var("DEADLINE_SCALE").ok().and_then(|text| text.parse().ok()).unwrap_or(1.0);
        let words: Vec<_> = self.under.iter().cloned().chain([daxvm().into_os_string()]).collect();
        let mut command = Command::new(&words[0]);
        command
            .args(&words[1..])
            .env("TMPDIR", scratch())
            .arg("run")
            .arg("--kernel")
            .arg(self.kernel.image())
            .arg("--initrd")
            .arg(initrd);
        let more = env::var("GUEST_CMDLINE").unwrap_or_default();
        command.arg("--cmdline").arg(format!("{} {more}", self.cmdline).trim_end());
        command.args(["--cpus", &self.cpus.to_string(), "--memory", &self.memory]);
        for share in &self.shares {
            command.arg("--share").arg(&share.0);
        }
        command.args(&self.more);
        Vm::spawn(command, self.user, self.report.as_deref(), self.deadline.mul_f64(scale))
    }
}

/// The program under test.
pub fn daxvm() -> PathBuf {
    env::var_os("DAXVM").map_or_else(|| in_target("daxvm"), PathBuf::from)
}
