//! `daxvm run --dry-run`: the configuration as a file for `--config`, and in comments the machine that comes of it.

use std::error::Error;
use std::fmt::{self, Display, Write};

use devices::text::Bytes;
use devices::virtio::fs::policy::WindowFacts;

use crate::config::{RunConfig, SandboxMode, ShareWindow, ValidConfig};
use crate::runner::{self, Plan};
use crate::sandbox;

/// Prints it. Files are read for it, such as the kernel's modules; nothing is started.
pub(super) fn print(config: &RunConfig) -> Result<(), Box<dyn Error>> {
    let mut text = config.to_toml().map_err(|error| format!("Cannot print the configuration: {error}"))?;
    let plan = runner::plan(config)?;
    let modules: Vec<_> = plan.modules.iter().map(|module| module.name.clone()).collect();
    text.push_str(&Machine::new(&plan.machine, &modules)?.to_string());
    text.push_str(&sandbox(&plan)?);
    super::config::print(&text)?;
    Ok(())
}

/// How the process would be confined on this machine.
fn sandbox(plan: &Plan) -> Result<String, fmt::Error> {
    let mut text = String::from("\n# Sandbox, before the guest runs:\n");
    if plan.machine.sandbox == SandboxMode::Off {
        text.push_str("#   off: daxvm may do all that you may\n");
        return Ok(text);
    }
    let shares = plan.machine.shares.iter().map(|share| (share.path.as_path(), share.read_only));
    for layer in sandbox::plan(shares, &plan.outputs()) {
        writeln!(text, "#   {layer}")?;
    }
    Ok(text)
}

/// A machine, as comments of a configuration file.
pub(super) struct Machine<'a> {
    config: &'a ValidConfig,
    /// The modules that its init loads.
    modules: &'a [String],
    /// The windows of its shares.
    windows: Vec<ShareWindow>,
}

impl<'a> Machine<'a> {
    /// Reads the rule files of the shares.
    pub(super) fn new(config: &'a ValidConfig, modules: &'a [String]) -> Result<Machine<'a>, Box<dyn Error>> {
        Ok(Machine { config, modules, windows: config.windows()? })
    }

    fn windows_cost(&self) -> u64 {
        self.windows.iter().map(|window| WindowFacts::fixed_cost(window.size)).sum()
    }
}

impl Display for Machine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let config = self.config;
        writeln!(f, "\n# The machine that comes of it:")?;
        writeln!(f, "#   kernel: {}", config.kernel.display())?;
        if let Some(initrd) = &config.initrd {
            writeln!(f, "#   initramfs: {}", initrd.display())?;
        }
        if !self.modules.is_empty() {
            writeln!(f, "#   modules: {}", self.modules.join(", "))?;
        }
        writeln!(f, "#   kernel parameters: {}", config.command_line())?;
        writeln!(f, "#   vCPUs: {}", config.cpus)?;
        let (memory, cost) = (Bytes(config.memory), self.windows_cost());
        write!(f, "#   RAM: {memory}")?;
        match cost {
            0 => writeln!(f)?,
            _ => writeln!(f, ", of which DAX windows take {}, used or not", Bytes(cost))?,
        }
        for (share, window) in config.shares.iter().zip(&self.windows) {
            let access = if share.read_only { "read-only" } else { "writable" };
            write!(f, "#   share {}: {}, {access}, ", share.tag, share.path.display())?;
            match window.size {
                0 => writeln!(f, "no DAX window")?,
                size => {
                    let (bytes, cost) = (Bytes(size), Bytes(WindowFacts::fixed_cost(size)));
                    write!(f, "DAX {}, window of {bytes} for {cost} of RAM", window.policy)?;
                    writeln!(f, ", prefault {}", window.prefault)?;
                }
            }
        }
        for (disk, letter) in config.disks.iter().zip('a'..) {
            let access = if disk.read_only { "read-only" } else { "writable" };
            writeln!(f, "#   disk vd{letter}: {}, {access}", disk.path.display())?;
        }
        if config.rng {
            writeln!(f, "#   virtio-rng")?;
        }
        if config.nested {
            writeln!(f, "#   VMX or SVM for guests of its own, if the host's KVM can nest")?;
        }
        Ok(())
    }
}
