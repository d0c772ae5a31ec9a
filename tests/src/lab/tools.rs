//! Programs the lab needs of the machine: used where they are installed, else unpacked by `scripts/fetch-qemu`.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::LabError;
use super::paths::Paths;

/// One of the programs.
#[derive(Debug, Clone, Copy)]
pub enum Tool {
    /// The emulator.
    Qemu,
    /// Makes ext4.
    MkfsExt4,
    /// Makes xfs.
    MkfsXfs,
}

impl Tool {
    fn name(self) -> &'static str {
        match self {
            Self::Qemu => "qemu-system-x86_64",
            Self::MkfsExt4 => "mkfs.ext4",
            Self::MkfsXfs => "mkfs.xfs",
        }
    }

    /// The installed program, unless it is too old.
    fn installed(self) -> Option<PathBuf> {
        let path = env::var_os("PATH").unwrap_or_default();
        let program = env::split_paths(&path)
            .chain(["/usr/sbin".into(), "/sbin".into()])
            .map(|dir| dir.join(self.name()))
            .find(|program| program.is_file())?;
        (!matches!(self, Self::Qemu) || recent_enough(&program)).then_some(program)
    }
}

/// Older ones give guests wrong sizes of the extended state: scripts/fetch-qemu.
fn recent_enough(qemu: &Path) -> bool {
    let Ok(output) = Command::new(qemu).arg("--version").output() else { return false };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text.split_whitespace().nth(3).unwrap_or_default();
    let mut numbers = version.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (10, 0)
}

/// Where the programs are.
#[derive(Debug)]
pub struct Tools {
    /// The unpacked packages, if anything of them is needed.
    unpacked: Option<PathBuf>,
}

impl Tools {
    /// Finds programs, fetching them if one is missing.
    pub fn find(paths: &Paths, tools: &[Tool]) -> Result<Self, LabError> {
        let complete = tools.iter().all(|tool| tool.installed().is_some());
        let unpacked =
            if complete { None } else { Some(PathBuf::from(script(paths, "scripts/fetch-qemu", &[])?)) };
        Ok(Self { unpacked })
    }

    /// A command that runs the program, with the libraries and firmware that were unpacked beside it.
    pub fn command(&self, tool: Tool) -> Command {
        if let Some(installed) = tool.installed() {
            return Command::new(installed);
        }
        let root = self.unpacked.clone().unwrap_or_default();
        let program = ["usr/bin", "usr/sbin", "sbin"]
            .map(|dir| root.join(dir).join(tool.name()))
            .into_iter()
            .find(|program| program.is_file())
            .unwrap_or_else(|| tool.name().into());
        let mut command = Command::new(program);
        let mut libraries: Vec<PathBuf> =
            ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"].map(|dir| root.join(dir)).into();
        libraries.extend(env::split_paths(&env::var_os("LD_LIBRARY_PATH").unwrap_or_default()));
        let libraries = env::join_paths(libraries).unwrap_or_else(|_| OsString::new());
        command.env("LD_LIBRARY_PATH", libraries);
        if matches!(tool, Tool::Qemu) {
            command.env("QEMU_MODULE_DIR", root.join("usr/lib/x86_64-linux-gnu/qemu"));
            for firmware in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
                command.arg("-L").arg(root.join(firmware));
            }
        }
        command
    }

    /// Runs a program that only has to succeed.
    pub fn run(&self, command: &mut Command) -> Result<(), LabError> {
        let name = command.get_program().display().to_string();
        let output = command
            .stdin(Stdio::null())
            .output()
            .map_err(|error| LabError::system("run a program", error))?;
        if output.status.success() {
            return Ok(());
        }
        Err(LabError::Tool { name, said: String::from_utf8_lossy(&output.stderr).trim().to_owned() })
    }
}

/// Runs a script of the source tree and gives the line it prints; its progress goes to our standard error.
pub fn script(paths: &Paths, name: &str, arguments: &[&str]) -> Result<String, LabError> {
    let output = Command::new(paths.source(name))
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| LabError::system("run a script", error))?;
    if !output.status.success() {
        return Err(LabError::Tool { name: name.to_owned(), said: "see what it printed".to_owned() });
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
