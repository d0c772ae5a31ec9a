//! `daxvm completions`: what a shell needs to complete the command line.

use std::error::Error;

use clap::Args;
use clap_complete::{Shell, generate};

use super::config::print;

/// Print completions for a shell
///
/// For bash: `daxvm completions bash > ~/.local/share/bash-completion/completions/daxvm`. For zsh, a file _daxvm in a
/// directory of $fpath; for fish, ~/.config/fish/completions/daxvm.fish.
#[derive(Debug, Args)]
pub(super) struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

impl CompletionsArgs {
    pub(super) fn execute(self) -> Result<u8, Box<dyn Error>> {
        let mut script = Vec::new();
        generate(self.shell, &mut super::command(), "daxvm", &mut script);
        print(&String::from_utf8(script)?)
    }
}
