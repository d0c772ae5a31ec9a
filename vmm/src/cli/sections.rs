//! What follows the options in `--help` and in manual pages, from one text.

use std::io::{self, Write};

use clap::Command;
use clap_mangen::roff::{Roff, bold, roman};

/// A section: its title, and entries of which each explains one thing.
struct Section {
    title: &'static str,
    entries: &'static [(&'static str, &'static str)],
}

const RUN: &[Section] = &[
    Section {
        title: "Exit status",
        entries: &[
            ("the command's", "The command ended by itself."),
            (
                "128+n",
                "The command was ended by signal n, or daxvm was; 130 also for Ctrl-A x during a command.",
            ),
            ("126", "The command could not be executed."),
            ("127", "The command was not found."),
            ("124", "The time was over (--timeout)."),
            (
                "125",
                "An error of daxvm or of its configuration; or the guest did not come to the command, or powered off before it had ended.",
            ),
            ("0", "Without a command: the guest powered off, or Ctrl-A x."),
            ("32", "The guest asked for a reset."),
            (
                "33",
                "The guest crashed: its CPU could not go on. Also a panic or a forbidden system call of daxvm.",
            ),
            ("34", "The guest's kernel panicked."),
            (
                "",
                "A command can end with any status; `reason` in the report (--report) says which case it was.",
            ),
        ],
    },
    Section {
        title: "Examples",
        entries: &[
            (
                "daxvm run -- uname -a",
                "Runs a command in a guest with the host's kernel; what it changes vanishes.",
            ),
            (
                "daxvm run --kernel bzImage --rw target --timeout 10m -- cargo test",
                "Tests with another kernel; the build directory stays on the host.",
            ),
            (
                "daxvm run --root /srv/debian,rw --env LANG -- sh",
                "A shell in a system that is unpacked in a directory, and may change it.",
            ),
            (
                "daxvm run --kernel vmlinuz --initrd initrd.img --share tag=src,path=.,ro,dax=auto",
                "A guest with an init of its own, which finds a directory under the name `src`.",
            ),
            (
                "daxvm run --api-socket vm.sock -- make",
                "Can be watched meanwhile: `daxvm top vm.sock`, `daxvm ctl vm.sock status`.",
            ),
            (
                "daxvm run --config ci.toml --dry-run",
                "Shows what a configuration file makes of the machine; nothing is booted.",
            ),
        ],
    },
    Section {
        title: "Files",
        entries: &[
            ("/dev/kvm", "Must be there, readable and writable: usually for the group `kvm`."),
            ("/boot, /lib/modules", "Where the running kernel and its modules are looked for."),
        ],
    },
    Section {
        title: "Environment",
        entries: &[("RUST_LOG", "What daxvm logs to standard error: `warn` by default; `debug` is more.")],
    },
];

const CONFIG: &[Section] = &[
    Section {
        title: "Exit status",
        entries: &[("0", "The file is right."), ("125", "It has mistakes, or cannot be read.")],
    },
    Section {
        title: "Examples",
        entries: &[
            ("daxvm config check ci.toml", "Names all mistakes of a file."),
            (
                "daxvm config schema > daxvm.schema.json",
                "For editors: `#:schema daxvm.schema.json` in a file.",
            ),
        ],
    },
];

const TOP: &[Section] = &[
    Section {
        title: "Keys",
        entries: &[("q", "End."), ("Tab", "The next share; Shift-Tab for the one before.")],
    },
    Section {
        title: "Environment",
        entries: &[("NO_COLOR", "Set to anything: files are told apart by letters alone.")],
    },
];

/// The sections of a subcommand. They are those of its first page: `config` has them for `config check`.
fn of(command: &Command) -> &'static [Section] {
    match command.get_name() {
        "run" => RUN,
        "config" => CONFIG,
        "top" => TOP,
        _ => &[],
    }
}

/// Adds the sections to the long help of the subcommands.
pub(super) fn add_to_help(command: Command) -> Command {
    command.mut_subcommands(|subcommand| match of(&subcommand) {
        [] => subcommand,
        sections => {
            let text: Vec<_> = sections.iter().map(in_help).collect();
            subcommand.after_long_help(text.join("\n"))
        }
    })
}

fn in_help(section: &Section) -> String {
    let mut text = format!("{}:\n", section.title);
    // As clap does it: what is explained in a column where all of it is short, else in a line of its own.
    let width = section.entries.iter().map(|(what, _)| what.len()).max().unwrap_or(0);
    for (what, meaning) in section.entries {
        match (what.is_empty(), width > 20) {
            (true, _) => text.push_str(&format!("  {meaning}\n")),
            (false, true) => text.push_str(&format!("  {what}\n          {meaning}\n")),
            (false, false) => text.push_str(&format!("  {what:<width$}  {meaning}\n")),
        }
    }
    text
}

/// Writes the sections of a subcommand's manual page.
pub(super) fn to_man(command: &Command, page: &mut dyn Write) -> io::Result<()> {
    let mut roff = Roff::new();
    for section in of(command) {
        roff.control("SH", [section.title.to_uppercase().as_str()]);
        for (what, meaning) in section.entries {
            if what.is_empty() {
                roff.control("PP", []);
            } else {
                roff.control("TP", []);
                roff.text([bold(*what)]);
            }
            roff.text([roman(*meaning)]);
        }
    }
    roff.to_writer(page)
}
