//! `daxvm man`: manual pages.

use std::error::Error;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::{Args, Command, CommandFactory};
use clap_mangen::Man;

use super::config::print;
use super::{Cli, sections};

/// Print a manual page, or write all of them
///
/// `daxvm man run | man -l -` shows one.
#[derive(Debug, Args)]
pub(super) struct ManArgs {
    /// The subcommand whose page is printed, as in `policy check`; none for daxvm itself
    #[arg(conflicts_with = "directory")]
    subcommand: Vec<String>,
    /// Write all pages to this directory, as daxvm.1, daxvm-run.1 and so on
    #[arg(long = "dir", value_name = "DIR")]
    directory: Option<PathBuf>,
}

impl ManArgs {
    pub(super) fn execute(self) -> Result<u8, Box<dyn Error>> {
        // `help` would have pages that say nothing.
        let mut root = Cli::command().disable_help_subcommand(true);
        root.build();
        if let Some(directory) = &self.directory {
            let failed = |error| format!("Cannot write manual pages to {}: {error}", directory.display());
            write_all(&root, directory).map_err(failed)?;
            return Ok(0);
        }
        let mut command = &root;
        for name in &self.subcommand {
            let known: Vec<_> = command.get_subcommands().map(Command::get_name).collect();
            let unknown = || devices::text::unknown("subcommand", name, &known);
            command = command.find_subcommand(name).ok_or_else(unknown)?;
        }
        let mut page = Vec::new();
        render(command, &mut page)?;
        print(&String::from_utf8(page)?)
    }
}

fn write_all(command: &Command, directory: &Path) -> io::Result<()> {
    let name = command.get_display_name().unwrap_or_else(|| command.get_name());
    let mut page = Vec::new();
    render(command, &mut page)?;
    std::fs::write(directory.join(format!("{name}.1")), page)?;
    command.get_subcommands().try_for_each(|subcommand| write_all(subcommand, directory))
}

fn render(command: &Command, page: &mut dyn Write) -> io::Result<()> {
    let man = Man::new(command.clone()).manual("daxvm").source(concat!("daxvm ", env!("CARGO_PKG_VERSION")));
    man.render_title(page)?;
    man.render_name_section(page)?;
    man.render_synopsis_section(page)?;
    man.render_description_section(page)?;
    man.render_options_section(page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(page)?;
    }
    sections::to_man(command, page)
}
