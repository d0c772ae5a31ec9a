//! What a user asks of `daxvm run`: [`RunConfig`], from the command line and a configuration file. The machine that
//! comes of it is a [`VmConfig`](super::VmConfig).

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use devices::virtio::fs::policy::Prefault;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{DaxConfig, DiskConfig, SandboxMode, ShareConfig, values};
use crate::guest::protocol::RootMode;

/// A guest to run, and what to run in it. In a file its keys are the names of the flags of `daxvm run`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct RunConfig {
    /// A bzImage, an ELF vmlinux, or a directory with an unpacked kernel package; the running kernel when it is missing.
    pub kernel: Option<PathBuf>,
    /// Where the kernel's modules are: a directory that holds `lib/modules/VERSION`, or is one; looked for when missing.
    pub modules: Option<PathBuf>,
    /// The initramfs, for a guest without a command.
    pub initrd: Option<PathBuf>,
    /// Kernel parameters beside daxvm's own. The command line's come after those of a file.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub cmdline: String,
    /// vCPUs; by default what suits the host.
    #[serde(with = "values::cpus", skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "values::cpus_schema")]
    pub cpus: Option<u8>,
    /// Bytes of RAM; by default what suits the host.
    #[serde(with = "values::memory", skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "values::size_schema")]
    pub memory: Option<u64>,
    /// Directories and files of the host that the command may change, where they are. The command line adds to those of
    /// a file.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rw: Vec<PathBuf>,
    /// Whether the guest has a virtio-rng device; it has by default.
    pub rng: Option<bool>,
    /// Whether the guest can have guests of its own (VMX, SVM), where the host's KVM can nest; it cannot by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nested: Option<bool>,
    /// Whether DAX windows may take more than an eighth of the guest's RAM for page descriptors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub large_windows: Option<bool>,
    /// The command's working directory; the caller's by default.
    #[serde(rename = "chdir")]
    pub directory: Option<PathBuf>,
    /// How long all of it may take.
    #[serde(with = "values::limit", skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "values::limit_schema")]
    pub timeout: Option<Duration>,
    /// How long the guest may show no sign of life before its init runs; 10 seconds by default.
    #[serde(with = "values::limit", skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "values::limit_schema")]
    pub boot_timeout: Option<Duration>,
    /// Where the kernel's console goes: a file, or `stderr`; with a command it is kept for messages by default.
    pub console: Option<PathBuf>,
    /// Where the report goes.
    pub report: Option<PathBuf>,
    /// Where counters go while the guest runs, for Prometheus; the file is replaced again and again.
    pub metrics_file: Option<PathBuf>,
    /// How often the metrics file is written; every 5 seconds by default.
    #[serde(with = "values::interval", skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "values::limit_schema")]
    pub metrics_interval: Option<Duration>,
    /// Where the Unix socket is made on which the running VM can be asked what it does.
    pub api_socket: Option<PathBuf>,
    /// Whether daxvm gives up all rights that its guest does not need; it does by default.
    pub sandbox: Option<SandboxMode>,
    /// Program and arguments; none for a guest with an initramfs of its own. The command line's replaces that of a file.
    #[serde(with = "values::command", skip_serializing_if = "Vec::is_empty")]
    #[schemars(with = "Vec<String>")]
    pub command: Vec<OsString>,
    /// The root file system, for a guest with a command. `--root` replaces all of it.
    #[serde(skip_serializing_if = "is_default")]
    pub root: RootConfig,
    /// Environment variables for the command: a value, or none for the caller's value.
    #[serde(with = "values::environment", skip_serializing_if = "Vec::is_empty")]
    #[schemars(with = "HashMap<String, values::environment::Value>")]
    pub env: Vec<(String, Option<String>)>,
    /// Shared directories, which the guest finds by their tags. The command line adds to those of a file; one with the
    /// same tag replaces it.
    #[serde(rename = "share", skip_serializing_if = "Vec::is_empty")]
    pub shares: Vec<ShareConfig>,
    /// Disks, which the guest finds as vda, vdb and so on. The command line adds to those of a file.
    #[serde(rename = "disk", skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskConfig>,
}

/// The root file system of a guest with a command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct RootConfig {
    /// The directory; the host's own root by default.
    pub path: PathBuf,
    /// What happens to changes.
    pub mode: RootMode,
    /// Which of its files are DAX.
    pub dax: Option<DaxConfig>,
    /// Bytes of its DAX window.
    #[serde(with = "values::window", skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "values::size_schema")]
    pub window: Option<u64>,
    /// Which pages of DAX files the guest finds at hand once it has mapped them.
    #[schemars(schema_with = "values::prefault_schema")]
    pub prefault: Option<Prefault>,
}

impl Default for RootConfig {
    fn default() -> RootConfig {
        RootConfig { path: "/".into(), mode: RootMode::default(), dax: None, window: None, prefault: None }
    }
}

fn is_default(root: &RootConfig) -> bool {
    *root == RootConfig::default()
}

impl RunConfig {
    /// What comes of this configuration and of one `over` it, whose single values win. Lists grow, kernel parameters
    /// too; a share of the same tag and a variable of the same name are replaced, and so are the command and a root
    /// that is not the default one, whose parts belong together.
    #[must_use]
    pub fn overridden_by(mut self, over: RunConfig) -> RunConfig {
        let cmdline = format!("{} {}", self.cmdline, over.cmdline).trim().to_owned();
        self.shares.retain(|share| over.shares.iter().all(|other| other.tag != share.tag));
        let mut env: Vec<(String, Option<String>)> = Vec::new();
        for variable in self.env.into_iter().chain(over.env) {
            env.retain(|(name, _)| *name != variable.0);
            env.push(variable);
        }
        RunConfig {
            kernel: over.kernel.or(self.kernel),
            modules: over.modules.or(self.modules),
            initrd: over.initrd.or(self.initrd),
            cmdline,
            cpus: over.cpus.or(self.cpus),
            memory: over.memory.or(self.memory),
            root: if is_default(&over.root) { self.root } else { over.root },
            rw: self.rw.into_iter().chain(over.rw).collect(),
            shares: self.shares.into_iter().chain(over.shares).collect(),
            disks: self.disks.into_iter().chain(over.disks).collect(),
            rng: over.rng.or(self.rng),
            nested: over.nested.or(self.nested),
            large_windows: over.large_windows.or(self.large_windows),
            env,
            directory: over.directory.or(self.directory),
            timeout: over.timeout.or(self.timeout),
            boot_timeout: over.boot_timeout.or(self.boot_timeout),
            console: over.console.or(self.console),
            report: over.report.or(self.report),
            metrics_file: over.metrics_file.or(self.metrics_file),
            metrics_interval: over.metrics_interval.or(self.metrics_interval),
            api_socket: over.api_socket.or(self.api_socket),
            sandbox: over.sandbox.or(self.sandbox),
            command: if over.command.is_empty() { self.command } else { over.command },
        }
    }

    /// Makes all paths absolute; those that are relative are relative to `base`, an absolute path. The console `stderr`
    /// is none, and neither is the program, which is looked for in the guest.
    pub fn resolve_paths(&mut self, base: &Path) {
        let console = self.console.iter_mut().filter(|path| path.as_os_str() != "stderr");
        let single = [&mut self.kernel, &mut self.modules, &mut self.initrd, &mut self.directory];
        let policies = self.shares.iter_mut().map(|share| &mut share.dax).chain(&mut self.root.dax);
        let rule_files = policies.filter_map(|dax| match dax {
            DaxConfig::File(path) => Some(path),
            DaxConfig::Named(_) => None,
        });
        let rule_files: Vec<_> = rule_files.collect();
        for path in rule_files {
            values::absolute(path, base);
        }
        let outputs = [&mut self.report, &mut self.metrics_file, &mut self.api_socket];
        let paths = single.into_iter().chain(outputs).flatten().chain(console);
        let lists = self.rw.iter_mut().chain(self.shares.iter_mut().map(|share| &mut share.path));
        let lists = lists.chain(self.disks.iter_mut().map(|disk| &mut disk.path));
        for path in paths.chain(lists).chain([&mut self.root.path]) {
            values::absolute(path, base);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variable(name: &str, value: &str) -> (String, Option<String>) {
        (name.into(), Some(value.into()))
    }

    #[test]
    fn single_values_are_replaced_and_lists_grow() {
        let root = RootConfig { path: "/srv/debian".into(), mode: RootMode::Rw, ..RootConfig::default() };
        let base = RunConfig {
            kernel: Some("a".into()),
            cmdline: "quiet loglevel=3".into(),
            cpus: Some(2),
            root: root.clone(),
            rw: vec!["/a".into()],
            shares: vec![ShareConfig::new("x", "/a"), ShareConfig::new("y", "/a")],
            env: vec![variable("A", "1"), variable("B", "1")],
            command: vec!["make".into(), "test".into()],
            ..RunConfig::default()
        };
        let over = RunConfig {
            kernel: Some("b".into()),
            cmdline: "loglevel=7".into(),
            rw: vec!["/b".into()],
            shares: vec![ShareConfig::new("x", "/b")],
            env: vec![variable("A", "2"), variable("C", "1"), variable("C", "2")],
            command: vec!["ls".into()],
            rng: Some(false),
            ..RunConfig::default()
        };
        let both = base.clone().overridden_by(over.clone());
        assert_eq!((both.kernel, both.cpus, both.rng), (Some("b".into()), Some(2), Some(false)));
        assert_eq!(both.cmdline, "quiet loglevel=3 loglevel=7");
        assert_eq!((both.root, both.rw), (root, vec!["/a".into(), "/b".into()]));
        assert_eq!(both.shares, [ShareConfig::new("y", "/a"), ShareConfig::new("x", "/b")]);
        assert_eq!(both.env, [variable("B", "1"), variable("A", "2"), variable("C", "2")]);
        assert_eq!(both.command, ["ls"]);
        let other = RootConfig { path: "/other".into(), ..RootConfig::default() };
        let both = base.clone().overridden_by(RunConfig { root: other.clone(), ..RunConfig::default() });
        assert_eq!(both.root, other, "the mode of one root is not that of another");
        assert_eq!(base.clone().overridden_by(RunConfig::default()), base);
        assert_eq!(RunConfig::default().overridden_by(base.clone()), base);
    }
}
