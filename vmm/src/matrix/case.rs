//! One case: what `daxvm run` is asked for, and what has to come of it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use devices::text::{exact_size, unknown};
use serde::Serialize;

/// How long a case may take when nothing says so: a hung case must not hold a CI job for hours.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(600);

/// What the report of `daxvm run` can say, and a test can expect.
const REASONS: [&str; 9] =
    ["panic", "crash", "timeout", "power-off", "reset", "boot-failed", "signaled", "exited", "not-run"];
/// The reasons whose status is that of the command.
const OF_THE_COMMAND: [&str; 3] = ["exited", "signaled", "not-run"];

/// A case of the matrix. Paths are relative to the matrix file's directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Case {
    /// Its name, which no other has: KERNEL/COMMAND, and what is chosen of each axis.
    pub name: String,
    /// The kernel's name.
    pub kernel: String,
    /// The kernel: a file or a directory; none for the host's own.
    pub kernel_path: Option<PathBuf>,
    /// The command's name.
    pub command: String,
    /// vCPUs.
    pub cpus: u8,
    /// Bytes of RAM.
    pub memory: u64,
    /// Variables: a value, or none for the caller's value.
    pub env: Vec<(String, Option<String>)>,
    /// Kernel parameters.
    pub cmdline: String,
    /// As `--modules` takes it.
    pub modules: Option<String>,
    /// As `--initrd` takes it.
    pub initrd: Option<String>,
    /// As `--root` takes it.
    pub root: Option<String>,
    /// As `--rw` takes them.
    pub rw: Vec<String>,
    /// As `--share` takes them.
    pub shares: Vec<String>,
    /// As `--disk` takes them.
    pub disks: Vec<String>,
    /// As `--rng` takes it.
    pub rng: Option<bool>,
    /// As `--nested` takes it.
    pub nested: Option<bool>,
    /// As `--chdir` takes it.
    pub directory: Option<String>,
    /// How long an attempt may take.
    pub timeout: Duration,
    /// As `--boot-timeout` takes it.
    pub boot_timeout: Option<Duration>,
    /// What may come of it, one of these; never empty.
    pub expect: Vec<Expected>,
    /// How often it is tried again after a failure.
    pub retries: u32,
    /// What it is when a failure was followed by a success.
    pub flaky: Flaky,
    /// Program and arguments; empty for a guest with an initramfs of its own.
    pub run: Vec<String>,
}

impl Case {
    /// The arguments of `daxvm` that run it: `run`, options, command.
    pub fn arguments(&self) -> Vec<OsString> {
        self.arguments_with(&[])
    }

    /// The same with more options, as `("--report", path)`.
    pub(super) fn arguments_with(&self, more: &[(&str, &Path)]) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = vec!["run".into()];
        // In one word with its option, a value can begin with a dash.
        let mut option = |name: &str, value: &dyn AsRef<std::ffi::OsStr>| {
            let mut argument = OsString::from(format!("{name}="));
            argument.push(value);
            arguments.push(argument);
        };
        if let Some(path) = &self.kernel_path {
            option("--kernel", path);
        }
        for (name, value) in [
            ("--modules", &self.modules),
            ("--initrd", &self.initrd),
            ("--root", &self.root),
            ("--chdir", &self.directory),
        ] {
            if let Some(value) = value {
                option(name, value);
            }
        }
        if !self.cmdline.is_empty() {
            option("--cmdline", &self.cmdline);
        }
        option("--cpus", &self.cpus.to_string());
        option("--memory", &exact_size(self.memory));
        for (name, values) in [("--rw", &self.rw), ("--share", &self.shares), ("--disk", &self.disks)] {
            for value in values {
                option(name, value);
            }
        }
        if let Some(rng) = self.rng {
            option("--rng", &rng.to_string());
        }
        if let Some(nested) = self.nested {
            option("--nested", &nested.to_string());
        }
        for (name, value) in &self.env {
            match value {
                Some(value) => option("--env", &format!("{name}={value}")),
                None => option("--env", name),
            }
        }
        option("--timeout", &exact_duration(self.timeout));
        if let Some(timeout) = self.boot_timeout {
            option("--boot-timeout", &exact_duration(timeout));
        }
        for (name, path) in more {
            option(name, path);
        }
        if !self.run.is_empty() {
            arguments.push("--".into());
            arguments.extend(self.run.iter().map(OsString::from));
        }
        arguments
    }

    /// Where its log is below the directory of logs: the name, with what a file name should not have in percent signs.
    pub(super) fn log_path(&self) -> PathBuf {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._+-=,@:".contains(&byte);
        // Only the values of variables can have anything special in them, also slashes and dots.
        let encode = |part: &str| -> String {
            let hidden = part.starts_with('.');
            let bytes =
                part.bytes().enumerate().map(|(at, byte)| match plain(byte) && !(hidden && at == 0) {
                    true => char::from(byte).to_string(),
                    false => format!("%{byte:02X}"),
                });
            bytes.collect()
        };
        let parts: Vec<_> = self.name.split('/').collect();
        let (last, directories) = parts.split_last().unwrap_or((&"", &[]));
        let mut path: PathBuf = directories.iter().map(|part| encode(part)).collect();
        path.push(encode(last) + ".log");
        path
    }
}

/// Printed as the parser of durations reads it.
fn exact_duration(duration: Duration) -> String {
    match duration.subsec_nanos() {
        0 => format!("{}s", duration.as_secs()),
        _ => format!("{}ms", duration.as_millis().max(1)),
    }
}

/// What may come of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// The command's exit status, with 128+n for signal n, and 126 or 127 when it could not be run.
    Status(u8),
    /// How the guest or the command ended, as the report of `daxvm run` has it.
    Reason(&'static str),
}

impl Expected {
    /// What a guest without a command should do.
    pub(super) const POWER_OFF: Expected = Expected::Reason("power-off");

    /// A reason by its name.
    ///
    /// # Errors
    /// Which names there are.
    pub fn from_reason(name: &str) -> Result<Expected, String> {
        let known = REASONS.into_iter().find(|known| *known == name);
        known.map(Expected::Reason).ok_or_else(|| unknown("reason", name, &REASONS))
    }

    /// Whether this is what came.
    pub(super) fn is_met_by(self, reason: &str, status: u8) -> bool {
        match self {
            Expected::Reason(expected) => expected == reason,
            Expected::Status(expected) => expected == status && OF_THE_COMMAND.contains(&reason),
        }
    }
}

impl std::fmt::Display for Expected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Expected::Status(status) => write!(f, "exit status {status}"),
            Expected::Reason(reason) => f.write_str(reason),
        }
    }
}

/// What a case is that has failed and then passed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Flaky {
    /// A success that is reported as flaky.
    #[default]
    Pass,
    /// A failure that is reported as flaky.
    Fail,
}
