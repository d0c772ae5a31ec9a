//! What is wrong with a [`RunConfig`] as a whole, and with the files that it names. Nothing is opened but rule files.

use std::fmt;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use devices::text::chain;

use super::{DaxConfig, MAX_SHARES, RootConfig, RunConfig};
use crate::guest::protocol::RootMode;
use crate::runner::OWN_TAGS;

/// Something wrong with a configuration. The message names what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where in a file it would be: keys, and indexes of arrays.
    pub path: Vec<String>,
    /// What is wrong.
    pub message: String,
}

/// A configuration that cannot be run, and all reasons for it, one a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidRun(pub Vec<Problem>);

impl fmt::Display for InvalidRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<_> = self.0.iter().map(|problem| problem.message.as_str()).collect();
        f.write_str(&lines.join("\n"))
    }
}

impl std::error::Error for InvalidRun {}

/// Where kernels come from, for messages.
pub(crate) const WHERE_KERNELS_ARE: &str = "give --kernel a bzImage (vmlinuz), an ELF kernel (vmlinux) or an unpacked \
    kernel package: a distribution has its own as /boot/vmlinuz-VERSION, and others come by `apt download \
    linux-image-VERSION` and `dpkg -x`; scripts/fetch-kernel of daxvm's sources does that";

/// Collects problems.
#[derive(Default)]
struct Problems(Vec<Problem>);

impl Problems {
    fn add(&mut self, path: &[&str], message: impl Into<String>) {
        let path = path.iter().map(|step| (*step).to_owned()).collect();
        self.0.push(Problem { path, message: message.into() });
    }
}

impl RunConfig {
    /// Checks the configuration; see [`RunConfig::problems`].
    ///
    /// # Errors
    /// All that was found.
    pub fn check(&self) -> Result<(), InvalidRun> {
        let problems = self.problems();
        if problems.is_empty() { Ok(()) } else { Err(InvalidRun(problems)) }
    }

    /// All that is wrong with the configuration, as far as it can be told before the machine is built: what does not go
    /// together, and what is not there. Paths have been resolved.
    pub fn problems(&self) -> Vec<Problem> {
        let mut problems = Problems::default();
        match self.command.first() {
            Some(program) if program.is_empty() => {
                problems.add(&["command"], "The command has no name: give a program after `--`");
            }
            Some(_) => self.check_command(&mut problems),
            None => self.check_no_command(&mut problems),
        }
        self.check_boot_files(&mut problems);
        self.check_shares(&mut problems);
        for (i, disk) in self.disks.iter().enumerate() {
            if let Err(why) = check_disk(&disk.path) {
                problems
                    .add(&["disk", &i.to_string(), "path"], format!("--disk {}: {why}", disk.path.display()));
            }
        }
        let console = self.console.as_ref().filter(|path| path.as_os_str() != "stderr");
        let outputs = [
            ("console", console),
            ("report", self.report.as_ref()),
            ("metrics-file", self.metrics_file.as_ref()),
            ("api-socket", self.api_socket.as_ref()),
        ];
        for (key, path) in outputs {
            if let Some(directory) = path.and_then(|path| path.parent()).filter(|parent| !parent.is_dir()) {
                let directory = directory.display();
                problems.add(&[key], format!("--{key}: there is no directory {directory}: make it first"));
            }
        }
        if let Some(path) = &self.metrics_file
            && fs::metadata(path).is_ok_and(|metadata| !metadata.is_file())
        {
            let path = path.display();
            let message = format!("--metrics-file {path}: it is no file, and would be replaced: give a file");
            problems.add(&["metrics-file"], message);
        }
        if self.metrics_interval.is_some() && self.metrics_file.is_none() {
            let message = "--metrics-interval is for --metrics-file: give that, too, or leave both out";
            problems.add(&["metrics-interval"], message);
        }
        problems.0
    }

    fn check_command(&self, problems: &mut Problems) {
        if self.initrd.is_some() {
            problems.add(
                &["initrd"],
                "--initrd has an init of its own, which knows no command: leave --initrd out, since daxvm makes an \
                 initramfs that runs the command, or leave the command out",
            );
        }
        let root = &self.root.path;
        if let Err(why) = check_directory(root) {
            problems.add(&["root", "path"], format!("--root {}: {why}", root.display()));
            return;
        }
        check_policy(self.root.dax.as_ref(), &["root", "dax"], problems);
        for (i, path) in self.rw.iter().enumerate() {
            if let Some(why) = self.wrong_rw(path) {
                problems.add(&["rw", &i.to_string()], format!("--rw {}: {why}", path.display()));
            }
        }
    }

    fn wrong_rw(&self, path: &Path) -> Option<String> {
        let real = match fs::canonicalize(path) {
            Ok(real) => real,
            Err(error) => return Some(format!("{error}: make it first, or name one that exists")),
        };
        // It is mounted where it is on the host, and only a root that takes changes can be given a place for that.
        let root = &self.root.path;
        let place = root.join(real.strip_prefix("/").unwrap_or(&real));
        (self.root.mode == RootMode::Ro && !place.exists()).then(|| {
            let root = root.display();
            format!("the root {root} has no such place, and takes none: use --root {root},overlay")
        })
    }

    /// What is for commands means nothing to a guest with an init of its own.
    fn check_no_command(&self, problems: &mut Problems) {
        let mut only_for_commands = |given: bool, key: &str| {
            if given {
                let message =
                    format!("--{key} is for guests that run a command: give one after `--`, as in `-- make`");
                problems.add(&[key], message);
            }
        };
        only_for_commands(self.root != RootConfig::default(), "root");
        only_for_commands(!self.rw.is_empty(), "rw");
        only_for_commands(!self.env.is_empty(), "env");
        only_for_commands(self.directory.is_some(), "chdir");
        only_for_commands(self.modules.is_some(), "modules");
        only_for_commands(self.boot_timeout.is_some(), "boot-timeout");
        if self.kernel.is_none() && self.initrd.is_some() {
            problems
                .add(&["kernel"], "--kernel is missing: there is a default for guests with a command alone");
        } else if self.kernel.is_none() {
            let message = "There is nothing to run: give a command after `--`, as in `daxvm run -- uname -a`, or a \
                           guest of your own with --kernel and --initrd";
            problems.add(&[], message);
        }
    }

    fn check_boot_files(&self, problems: &mut Problems) {
        if let Some(kernel) = &self.kernel
            && let Err(error) = fs::metadata(kernel)
        {
            let message = format!("--kernel {}: {error}; {WHERE_KERNELS_ARE}", kernel.display());
            problems.add(&["kernel"], message);
        }
        if let Some(modules) = &self.modules
            && let Err(why) = check_directory(modules)
        {
            problems.add(&["modules"], format!("--modules {}: {why}", modules.display()));
        }
        if let Some(initrd) = &self.initrd
            && let Err(why) = check_file(initrd)
        {
            problems.add(&["initrd"], format!("--initrd {}: {why}", initrd.display()));
        }
    }

    fn check_shares(&self, problems: &mut Problems) {
        if self.shares.len() > MAX_SHARES {
            let message = format!("{} shares: at most {MAX_SHARES} fit on the PCI bus", self.shares.len());
            problems.add(&["share"], message);
        }
        for (i, share) in self.shares.iter().enumerate() {
            let index = i.to_string();
            let tag = &share.tag;
            if !self.command.is_empty() && tag.starts_with(OWN_TAGS) {
                let message = format!(
                    "Tags that begin with `{OWN_TAGS}`, as `{tag}` does, are daxvm's own: give another"
                );
                problems.add(&["share", &index, "tag"], message);
            }
            if self.shares[..i].iter().any(|other| other.tag == *tag) {
                let message = format!("Two shares have the tag `{tag}`: give one of them another tag");
                problems.add(&["share", &index, "tag"], message);
            }
            if let Err(why) = check_directory(&share.path) {
                let message = format!("Share `{tag}`: {}: {why}", share.path.display());
                problems.add(&["share", &index, "path"], message);
            }
            check_policy(Some(&share.dax), &["share", &index, "dax"], problems);
        }
    }
}

fn check_policy(dax: Option<&DaxConfig>, path: &[&str], problems: &mut Problems) {
    if let Some(Err(error)) = dax.map(DaxConfig::load) {
        problems.add(path, chain(&error));
    }
}

fn check_directory(path: &PathBuf) -> Result<(), String> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => Ok(()),
        Ok(_) => Err("it is no directory: give one".into()),
        Err(error) => Err(format!("{error}: give a directory that exists")),
    }
}

fn check_file(path: &PathBuf) -> Result<(), String> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => Err("it is a directory: give a file".into()),
        Ok(_) => Ok(()),
        Err(error) => Err(format!("{error}: give a file that exists")),
    }
}

fn check_disk(path: &PathBuf) -> Result<(), String> {
    match fs::metadata(path).map(|metadata| metadata.file_type()) {
        Ok(kind) if kind.is_file() || kind.is_block_device() => Ok(()),
        Ok(_) => {
            Err("it is neither a file nor a block device: give a raw image; directories are for --share"
                .into())
        }
        Err(error) => {
            Err(format!("{error}: give a raw image (`truncate -s 1G FILE` makes one) or a block device"))
        }
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::super::{DiskConfig, ShareConfig};
    use super::*;

    fn command() -> RunConfig {
        RunConfig { command: vec!["ls".into()], ..RunConfig::default() }
    }

    fn guest() -> RunConfig {
        RunConfig { kernel: Some("/dev/null".into()), ..RunConfig::default() }
    }

    #[test]
    fn each_problem_names_the_flag_and_what_to_do() {
        let directory = TempDir::new().unwrap();
        let (root, outside) = (directory.path().join("root"), directory.path().join("outside"));
        std::fs::create_dir(&root).unwrap();
        std::fs::create_dir(&outside).unwrap();
        let rules = directory.path().join("rules.toml");
        std::fs::write(&rules, "version = 1\ndefalt = 1\n").unwrap();
        let other_root = || RootConfig { path: root.clone(), ..RootConfig::default() };
        let none = || PathBuf::from("/nonexistent/x");
        let cases = [
            (RunConfig::default(), "There is nothing to run", "`daxvm run -- uname -a`"),
            (RunConfig { command: vec!["".into()], ..command() }, "has no name", "after `--`"),
            (
                RunConfig { initrd: Some("/dev/null".into()), ..command() },
                "--initrd",
                "leave the command out",
            ),
            (
                RunConfig { kernel: Some(none()), ..command() },
                "--kernel /nonexistent/x: No such",
                "/boot/vmlinuz-",
            ),
            (RunConfig { modules: Some(none()), ..command() }, "--modules", "give a directory that exists"),
            (
                RunConfig { initrd: Some("/".into()), ..guest() },
                "--initrd /: it is a directory",
                "give a file",
            ),
            (
                RunConfig { root: RootConfig { path: none(), ..other_root() }, ..command() },
                "--root /nonexistent/x: No such",
                "give a directory",
            ),
            (
                RunConfig { root: RootConfig { path: "/dev/null".into(), ..other_root() }, ..command() },
                "--root /dev/null: it is no directory",
                "give one",
            ),
            (
                RunConfig {
                    root: RootConfig { mode: RootMode::Ro, ..other_root() },
                    rw: vec![outside],
                    ..command()
                },
                "has no such place",
                "/root,overlay",
            ),
            (RunConfig { rw: vec![none()], ..command() }, "--rw /nonexistent/x: No such", "make it first"),
            (RunConfig { rw: vec!["/".into()], ..guest() }, "--rw is for", "give one after `--`"),
            (RunConfig { root: other_root(), ..guest() }, "--root is for", "give one after `--`"),
            (RunConfig { env: vec![("A".into(), None)], ..guest() }, "--env is for", "give one after `--`"),
            (RunConfig { directory: Some("/".into()), ..guest() }, "--chdir is for", "give one after `--`"),
            (RunConfig { modules: Some("/".into()), ..guest() }, "--modules is for", "give one after `--`"),
            (
                RunConfig { shares: vec![ShareConfig::new("a", "/"), ShareConfig::new("a", "/")], ..guest() },
                "the tag `a`",
                "another tag",
            ),
            (
                RunConfig {
                    shares: (0..25).map(|i| ShareConfig::new(&i.to_string(), "/")).collect(),
                    ..guest()
                },
                "25 shares",
                "at most 24",
            ),
            (
                RunConfig { shares: vec![ShareConfig::new("a", "/dev/null")], ..guest() },
                "Share `a`: /dev/null: it is no directory",
                "give one",
            ),
            (
                RunConfig {
                    shares: vec![ShareConfig { dax: DaxConfig::File(rules), ..ShareConfig::new("a", "/") }],
                    ..guest()
                },
                "rules.toml:2:1: unknown key `defalt`",
                "did you mean `default`",
            ),
            (
                RunConfig { disks: vec![DiskConfig { path: "/".into(), read_only: false }], ..guest() },
                "--disk /: it is neither",
                "--share",
            ),
            (
                RunConfig { disks: vec![DiskConfig { path: none(), read_only: false }], ..guest() },
                "--disk /nonexistent/x",
                "truncate -s 1G",
            ),
            (RunConfig { report: Some(none()), ..guest() }, "no directory /nonexistent", "make it"),
            (
                RunConfig { metrics_file: Some(none()), ..guest() },
                "--metrics-file: there is no directory",
                "make it",
            ),
            (
                RunConfig { metrics_file: Some("/dev/null".into()), ..guest() },
                "--metrics-file /dev/null: it is no file",
                "give a file",
            ),
            (
                RunConfig { metrics_interval: Some(std::time::Duration::from_secs(1)), ..guest() },
                "--metrics-interval is for --metrics-file",
                "give that",
            ),
            (RunConfig { api_socket: Some(none()), ..guest() }, "--api-socket: there is no", "make it"),
            (RunConfig { console: Some(none()), ..guest() }, "--console: there is no directory", "make it"),
        ];
        for (config, what, remedy) in cases {
            let message = config.check().expect_err(what).to_string();
            assert!(message.contains(what) && message.contains(remedy), "{what}: {message}");
        }
    }

    #[test]
    fn what_is_right_has_no_problems() {
        let directory = TempDir::new().unwrap();
        let work = directory.path().join("work");
        std::fs::create_dir(&work).unwrap();
        let root = RootConfig { path: directory.path().into(), ..RootConfig::default() };
        for config in [
            guest(),
            command(),
            RunConfig { rw: vec![work.clone()], ..command() },
            RunConfig { rw: vec![work], root, ..command() },
            RunConfig {
                console: Some("stderr".into()),
                shares: vec![ShareConfig::new("a", "/"), ShareConfig::new("b", "/")],
                ..guest()
            },
        ] {
            assert_eq!(config.check(), Ok(()));
        }
    }

    #[test]
    fn all_problems_are_found_in_one_go() {
        let config = RunConfig { initrd: Some("/none".into()), rw: vec!["/none".into()], ..command() };
        let message = config.check().unwrap_err().to_string();
        assert_eq!(message.lines().count(), 3, "{message}");
    }
}
