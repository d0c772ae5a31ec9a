//! What runner and guest say to each other: a [`Task`], which the initramfs carries as [`TASK_FILE`], and messages, one
//! JSON object a line, on the virtio-console port [`PORT_CONTROL`]. Standard streams have a port each, on which nothing
//! but their bytes travels.

use std::ffi::OsString;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where the initramfs has the [`Task`], as JSON.
pub const TASK_FILE: &str = "/task.json";
/// Where the initramfs has kernel modules, uncompressed, as `NAME.ko`.
pub const MODULES_DIR: &str = "/modules";

/// The port of [`ToGuest`] and [`FromGuest`]. A port's name is in `/sys/class/virtio-ports/*/name`.
///
/// It must be the last port of its device: the guest takes the connection of this port as the sign that all others are
/// connected too, since a read from a port that is not returns 0, like the end of the input. Its host end must stay open
/// until the guest has ended: nothing can be written to a closed port.
pub const PORT_CONTROL: &str = "org.daxvm.control";
/// The command's standard input; the port's host end closes at the end of the input.
pub const PORT_STDIN: &str = "org.daxvm.stdin";
/// The command's standard output.
pub const PORT_STDOUT: &str = "org.daxvm.stdout";
/// The command's standard error.
pub const PORT_STDERR: &str = "org.daxvm.stderr";

/// What a guest has to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// Modules to load, in this order, before anything else: names below [`MODULES_DIR`] without `.ko`.
    pub modules: Vec<String>,
    /// The root file system.
    pub root: Root,
    /// Shares to mount below the root afterwards, in this order.
    pub mounts: Vec<Mount>,
    /// What to run.
    pub command: Command,
}

/// The guest's root file system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Root {
    /// The share's tag.
    pub tag: String,
    /// How it is mounted.
    pub mode: RootMode,
    /// Options for `mount -t virtiofs`, such as `dax=inode`; may be empty.
    pub options: String,
}

/// How a root file system is mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RootMode {
    /// Read-only, below an overlay in the guest's memory that takes all changes and vanishes at the end.
    #[default]
    Overlay,
    /// Read-only.
    Ro,
    /// Changes go to the host.
    Rw,
}

/// A share that is mounted below the root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// The share's tag.
    pub tag: String,
    /// Where, an absolute path in the root; made if it is missing and the root can be written to.
    pub target: PathBuf,
    /// Whether it is mounted read-only.
    pub read_only: bool,
    /// Options for `mount -t virtiofs`; may be empty.
    pub options: String,
    /// Whether `target` is a file: the share is its directory, and the file of that name in it is mounted.
    pub file: bool,
}

/// A command and how it is run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// Program and arguments; a program without a slash is looked for along the `PATH` of `env`.
    pub argv: Vec<OsString>,
    /// The whole environment.
    pub env: Vec<(OsString, OsString)>,
    /// Working directory in the root; `/` when it is not there.
    pub directory: PathBuf,
    /// Standard input, output and error.
    pub stdio: [Stdio; 3],
    /// The terminal's size at the start, when there is one.
    pub window: Option<WindowSize>,
}

impl Command {
    /// The port of each standard stream; a terminal has one for its output.
    pub fn ports(&self) -> [Option<&'static str>; 3] {
        let [input, output, error] = self.stdio;
        let shared = error == Stdio::Terminal && output == Stdio::Terminal;
        [
            (input != Stdio::Null).then_some(PORT_STDIN),
            (output != Stdio::Null).then_some(PORT_STDOUT),
            (error != Stdio::Null && !shared).then_some(PORT_STDERR),
        ]
    }
}

/// What a standard stream is to the command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stdio {
    /// `/dev/null`: the caller has closed it, or has `/dev/null` there.
    Null,
    /// A pipe to the stream's port.
    Pipe,
    /// The pseudo-terminal that the command has as its controlling terminal. Its input comes from [`PORT_STDIN`]; its
    /// output goes to [`PORT_STDOUT`] when standard output is a terminal too, else to [`PORT_STDERR`].
    Terminal,
}

/// The size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// From the runner.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "kebab-case")]
pub enum ToGuest {
    /// Send a signal (a number of Linux) to the command's process group, and to the foreground process group of its
    /// terminal.
    Signal {
        /// Its number.
        signal: i32,
    },
    /// The terminal has a new size.
    Window(WindowSize),
    /// Nobody reads an output any more: its reader in the guest goes away too, so that writers get SIGPIPE, or SIGHUP
    /// when it is a terminal.
    OutputClosed {
        /// 1 or 2.
        stream: u8,
    },
}

/// From the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "kebab-case")]
pub enum FromGuest {
    /// PID 1 runs and has the ports open; nothing is mounted yet.
    Ready,
    /// The command has been started.
    Started,
    /// The guest cannot go on. After this or one of the following messages it only waits for its end.
    Failed {
        /// What was being done, as in `mount the root`.
        what: String,
        /// What the system said, and what to do about it.
        error: String,
    },
    /// The command could not be run.
    NotRun {
        /// 127 when it was not found, 126 otherwise.
        status: u8,
        /// What the system said.
        error: String,
    },
    /// The command has ended by itself. All output is in the ports' queues and the disks are in sync.
    Exited {
        /// Its exit status.
        status: u8,
    },
    /// The command was ended by a signal; output and disks as above.
    Signaled {
        /// The signal's number.
        signal: i32,
    },
}
