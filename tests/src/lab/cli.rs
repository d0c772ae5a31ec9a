//! The `lab` program, as `scripts/lab` runs it.

use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGWINCH};
use signal_hook::iterator::Signals;

use super::direct::hardware_kvm;
use super::paths::Paths;
use super::protocol::Job;
use super::session::Sender;
use super::{Command, Lab, LabError, Mode, agent, daemon};

/// A job's time was over, as timeout(1) says it.
const TIMED_OUT: u8 = 124;

/// The lab itself failed, not the command.
const LAB_FAILED: u8 = 125;

/// A job that was asked to end is killed after this time.
const GRACE: Duration = Duration::from_secs(5);

/// A real KVM host on any machine: this one where it has hardware KVM, else an emulated one.
///
/// Commands find this machine's files, /dev/kvm, and a scratch directory on each of ext4, xfs and tmpfs, named by LAB_EXT4,
/// LAB_XFS and LAB_TMPFS. The scratch directories are empty after each `up`. LAB_MODE=direct|qemu overrides the choice,
/// LAB_CPUS=N the one CPU of an emulated host.
#[derive(Parser)]
#[command(name = "lab")]
struct Cli {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Bring the lab up, if it is down.
    Up,
    /// End the lab and everything that runs in it.
    Down,
    /// Say whether the lab is up (exit status 0) or down (1), and what its host is.
    Status,
    /// Run a command on the lab's host; input, output and exit status are the command's.
    Exec {
        /// Kill the command after this many seconds; the exit status is 124 then.
        #[arg(long, value_name = "SECONDS", value_parser = seconds)]
        timeout: Option<Duration>,
        /// The command and its arguments.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "CMD")]
        command: Vec<OsString>,
    },
    /// A shell on the lab's host.
    Shell,
    /// Keep the lab up (internal).
    #[command(hide = true)]
    Daemon { mode: String },
    /// Run jobs that come by standard input (internal).
    #[command(hide = true)]
    Agent,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("{text} is no number of seconds"))?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

/// Runs the program.
pub fn main() -> ExitCode {
    match run(Cli::parse().action) {
        Ok(code) => code,
        Err(error) => {
            report(&error);
            ExitCode::from(if matches!(error, LabError::TimedOut) { TIMED_OUT } else { LAB_FAILED })
        }
    }
}

/// Prints an error with its causes, once.
pub fn report(error: &dyn std::error::Error) {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        message.push_str(&format!(": {error}"));
        cause = error.source();
    }
    eprintln!("lab: {message}");
}

fn run(action: Action) -> Result<ExitCode, LabError> {
    match action {
        Action::Up => describe(&Lab::up()?),
        Action::Down => {
            if !Lab::down()? {
                eprintln!("lab: it was not up");
            }
        }
        Action::Status => match Lab::running()? {
            Some(lab) => describe(&lab),
            None => {
                println!("down");
                return Ok(ExitCode::from(1));
            }
        },
        Action::Exec { timeout, command } => return exec(command, timeout),
        Action::Shell => return shell(),
        Action::Daemon { mode } => {
            let mode = if mode == "direct" { Mode::Direct } else { Mode::Qemu };
            daemon::run(&Paths::find()?, mode)?;
        }
        Action::Agent => {
            // The end of the port is the end of the lab, and nobody is left to be told.
            let _ = agent::serve();
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn describe(lab: &Lab) {
    let host = match lab.mode() {
        Mode::Direct if hardware_kvm() => "this machine, with hardware KVM",
        Mode::Direct => "this machine, which has no hardware KVM",
        Mode::Qemu => "a Linux under QEMU, with emulated SVM",
    };
    println!("up: {host}; kernel {}", lab.kernel());
    for name in ["LAB_EXT4", "LAB_XFS", "LAB_TMPFS"] {
        match lab.scratch(name) {
            Some(dir) => println!("{name}={}", dir.display()),
            None => println!("{name} is missing"),
        }
    }
    if lab.mode() == Mode::Qemu {
        println!("console: {}", lab.console().display());
    }
}

fn exec(argv: Vec<OsString>, timeout: Option<Duration>) -> Result<ExitCode, LabError> {
    let lab = Lab::up()?;
    let deadline = timeout.map(|timeout| Instant::now() + timeout);
    let mut job = Command::new("").job()?;
    job.argv = argv;
    attend(&lab, &job, deadline, None).inspect_err(|error| {
        if matches!(error, LabError::TimedOut) && lab.mode() == Mode::Qemu {
            eprintln!("lab: the console of the host is in {}", lab.console().display());
        }
    })
}

fn shell() -> Result<ExitCode, LabError> {
    let lab = Lab::up()?;
    let shell = std::env::var_os("SHELL").unwrap_or_else(|| "/bin/sh".into());
    let mut job = Command::new(shell).env("PS1", "lab:\\w\\$ ").job()?;
    if !io::stdin().is_terminal() {
        return attend(&lab, &job, None, None);
    }
    job.terminal = Some(terminal_size());
    let before = tcgetattr(rustix::stdio::stdin());
    let restore = before.map_err(|error| LabError::system("read the terminal's state", error.into()))?;
    let mut raw = restore.clone();
    raw.make_raw();
    set_terminal(&raw).map_err(|error| LabError::system("set the terminal up", error))?;
    let result = attend(&lab, &job, None, Some(restore.clone()));
    // The terminal may be gone, and with it its state.
    let _ = set_terminal(&restore);
    result
}

/// Runs a job with this process's own standard streams; a signal that ends this process restores the terminal first.
fn attend(
    lab: &Lab,
    job: &Job,
    deadline: Option<Instant>,
    restore: Option<Termios>,
) -> Result<ExitCode, LabError> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGWINCH])
        .map_err(|error| LabError::system("receive signals", error))?;
    let session = lab.start(job)?;
    session.feed(io::stdin());
    let sender = session.sender();
    std::thread::spawn(move || pass_signals(&mut signals, &sender, restore));
    match session.wait(io::stdout(), io::stderr(), deadline) {
        Ok(status) => Ok(ExitCode::from(u8::try_from(status).unwrap_or(LAB_FAILED))),
        // As if the command itself had written to the closed pipe.
        Err(LabError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            Ok(ExitCode::from(128 + 13))
        }
        Err(error) => Err(error),
    }
}

/// Passes signals on to the job. One that does not end of it within the grace period, or is told twice, is left to be
/// killed: the end of this process is the end of its job.
fn pass_signals(signals: &mut Signals, sender: &Sender, restore: Option<Termios>) {
    let give_up = move |signal: i32| {
        if let Some(state) = &restore {
            let _ = set_terminal(state);
        }
        std::process::exit(128 + signal);
    };
    let mut told = false;
    for signal in signals.forever() {
        if signal == SIGWINCH {
            let (rows, columns) = terminal_size();
            let _ = sender.resize(rows, columns);
            continue;
        }
        let number = u8::try_from(signal).unwrap_or(0);
        if told || sender.signal(number).is_err() {
            give_up(signal);
        }
        told = true;
        let give_up = give_up.clone();
        std::thread::spawn(move || {
            std::thread::sleep(GRACE);
            give_up(signal);
        });
    }
}

fn terminal_size() -> (u16, u16) {
    tcgetwinsize(rustix::stdio::stdin()).map_or((24, 80), |size| (size.ws_row, size.ws_col))
}

fn set_terminal(state: &Termios) -> io::Result<()> {
    Ok(tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, state)?)
}
