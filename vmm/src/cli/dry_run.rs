//! `daxvm run --dry-run`: the configuration as a file for `--config`, and in comments the machine that comes of it.

use std::error::Error;
use std::fmt::{self, Display};

use devices::text::Bytes;
use devices::virtio::fs::policy::{Policy, WindowFacts};

use crate::config::{RunConfig, ShareConfig, ValidConfig};
use crate::runner;

/// Prints it. Files are read for it, such as the kernel's modules; nothing is started.
pub(super) fn print(config: &RunConfig) -> Result<(), Box<dyn Error>> {
    let mut text = config.to_toml().map_err(|error| format!("Cannot print the configuration: {error}"))?;
    let plan = runner::plan(config)?;
    let modules: Vec<_> = plan.modules.iter().map(|module| module.name.clone()).collect();
    text.push_str(&Machine::new(&plan.machine, &modules)?.to_string());
    super::config::print(&text)?;
    Ok(())
}

/// A machine, as comments of a configuration file.
pub(super) struct Machine<'a> {
    config: &'a ValidConfig,
    /// The modules that its init loads.
    modules: &'a [String],
    /// The shares, with what was made of their `dax`.
    shares: Vec<(&'a ShareConfig, Policy)>,
}

impl<'a> Machine<'a> {
    /// Reads the rule files of the shares.
    pub(super) fn new(config: &'a ValidConfig, modules: &'a [String]) -> Result<Machine<'a>, Box<dyn Error>> {
        let with_policy = |share: &'a ShareConfig| Ok((share, share.dax.load()?));
        let shares = config.shares.iter().map(with_policy).collect::<Result<_, Box<dyn Error>>>()?;
        Ok(Machine { config, modules, shares })
    }

    fn windows_cost(&self) -> u64 {
        let memory = self.config.memory;
        self.shares
            .iter()
            .map(|(share, policy)| WindowFacts::fixed_cost(share.window_size(policy, memory)))
            .sum()
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
        for (share, policy) in &self.shares {
            let access = if share.read_only { "read-only" } else { "writable" };
            write!(f, "#   share {}: {}, {access}, ", share.tag, share.path.display())?;
            match share.window_size(policy, config.memory) {
                0 => writeln!(f, "no DAX window")?,
                size => {
                    let (window, cost) = (Bytes(size), Bytes(WindowFacts::fixed_cost(size)));
                    writeln!(f, "DAX {policy}, window of {window} for {cost} of RAM")?;
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
        Ok(())
    }
}
