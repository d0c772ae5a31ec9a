//! What is said on standard error about the end of a guest: nothing when it ended as it was meant to.

use std::fmt::Write;

use super::plan::Plan;
use crate::guest::protocol::Command;
use crate::outcome::ExitReason;

/// Lines of the guest's console that are shown when it failed.
pub(super) const TAIL_LINES: usize = 50;

/// What is known of a guest with a command.
pub(super) struct Context<'a> {
    /// What it was made from.
    pub plan: &'a Plan,
    /// What it was to run.
    pub command: &'a Command,
    /// Whether its init ran.
    pub is_ready: bool,
}

/// Tells how a guest without a command ended, when it was not by its own will.
pub(super) fn own_init(reason: &ExitReason, console: impl FnOnce() -> String) {
    let what = match reason {
        ExitReason::Crash(message) => format!("The guest crashed: {message}"),
        ExitReason::Panic(message) => format!("The guest's kernel panicked: {message}"),
        ExitReason::Timeout => "The guest did not end within its time (--timeout)".to_owned(),
        _ => return,
    };
    eprint!("{}", with_console(what, &console()));
}

/// Tells how a guest with a command ended, when it was not with its command.
pub(super) fn command(reason: &ExitReason, context: &Context, console: impl FnOnce() -> String) {
    let Some(text) = sentence(reason, context) else { return };
    let text = match reason {
        // Neither has anything to do with the kernel.
        ExitReason::NotRun { .. } | ExitReason::Stopped(_) => format!("daxvm: {text}.\n"),
        _ => {
            let text = text + &advice(reason, context);
            with_console(text, &console())
        }
    };
    eprint!("{text}");
}

fn sentence(reason: &ExitReason, context: &Context) -> Option<String> {
    let program = context.command.argv.first().map(|program| program.display().to_string());
    let program = program.unwrap_or_default();
    Some(match reason {
        ExitReason::Exited { .. } | ExitReason::Signaled { .. } | ExitReason::Stopped(_) => return None,
        ExitReason::NotRun { error, .. } => format!("Cannot run `{program}` in the guest: {error}"),
        ExitReason::BootFailed { what, error } => format!("The guest could not {what}: {error}"),
        ExitReason::Timeout if !context.is_ready => {
            "The guest did not boot within the time for all of it (--timeout)".to_owned()
        }
        ExitReason::Timeout => format!("`{program}` did not end within its time (--timeout)"),
        ExitReason::PowerOff => format!("The guest switched itself off before `{program}` had ended"),
        ExitReason::Reset => format!("The guest reset itself before `{program}` had ended"),
        ExitReason::Crash(message) => format!("The guest crashed: {message}"),
        ExitReason::Panic(message) => format!("The guest's kernel panicked: {message}"),
    })
}

/// What can be done about a guest whose init never ran.
fn advice(reason: &ExitReason, context: &Context) -> String {
    let mut advice = String::new();
    if context.is_ready {
        return advice;
    }
    if matches!(reason, ExitReason::BootFailed { .. } | ExitReason::Panic(_))
        && context.plan.modules_dir.is_none()
    {
        let version = context.plan.kernel_version.as_deref().unwrap_or("this kernel");
        // Writing to a String cannot fail.
        let _ = write!(
            advice,
            ". There are no modules of {version} beside the kernel or in /lib/modules, so its drivers for \
             virtio-pci, virtio-console, virtiofs and overlay must be built in: if they are not, give --modules DIR"
        );
    }
    if !context.plan.machine.cmdline.contains("loglevel") {
        advice.push_str(". To see how far the kernel comes, add `--console stderr --cmdline loglevel=7`");
    }
    advice
}

fn with_console(what: String, console: &str) -> String {
    match console.trim_end() {
        "" => format!("daxvm: {what}.\n"),
        console => format!("daxvm: {what}. The last lines of its console:\n{console}\n"),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::RunConfig;
    use crate::guest::protocol::Stdio;
    use crate::runner::plan;

    /// What is said of the end of `make`, with a kernel whose modules nobody has.
    fn said(reason: ExitReason, is_ready: bool) -> Option<String> {
        let dir = tempfile::TempDir::new().unwrap();
        let mut image = vec![0; 0x400];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        std::fs::write(dir.path().join("vmlinuz"), image).unwrap();
        let plan = plan(&RunConfig { kernel: Some(dir.path().to_owned()), ..RunConfig::default() }).unwrap();
        let command = Command {
            argv: vec!["make".into()],
            env: Vec::new(),
            directory: Path::new("/").to_owned(),
            stdio: [Stdio::Null; 3],
            window: None,
        };
        let context = Context { plan: &plan, command: &command, is_ready };
        sentence(&reason, &context).map(|text| text + &advice(&reason, &context))
    }

    #[test]
    fn the_commands_own_end_needs_no_words() {
        for reason in [ExitReason::Exited { status: 1 }, ExitReason::Signaled { signal: 9 }] {
            assert_eq!(said(reason, true), None);
        }
    }

    #[test]
    fn every_other_end_is_one_sentence_with_the_remedy() {
        let failed = || ExitReason::BootFailed { what: "boot".into(), error: "why".into() };
        let not_run = ExitReason::NotRun { status: 127, error: "why".into() };
        for (reason, is_ready, says) in [
            (failed(), false, &["could not boot: why", "--modules DIR", "--console stderr"][..]),
            (failed(), true, &["could not boot: why"]),
            (ExitReason::Panic("why".into()), false, &["panicked: why", "--modules DIR"]),
            (ExitReason::Crash("why".into()), false, &["crashed: why", "--console stderr"]),
            (ExitReason::Timeout, false, &["did not boot", "--timeout"]),
            (ExitReason::Timeout, true, &["`make`", "--timeout"]),
            (ExitReason::PowerOff, true, &["before `make` had ended"]),
            (ExitReason::Reset, true, &["before `make` had ended"]),
            (not_run, true, &["Cannot run `make`", "why"]),
        ] {
            let text = said(reason.clone(), is_ready).unwrap();
            for part in says {
                assert!(text.contains(part), "{reason:?}: {text}");
            }
            assert!(is_ready != text.contains("--console"), "{reason:?}: {text}");
        }
    }

    #[test]
    fn the_console_is_shown_when_there_is_something() {
        assert_eq!(with_console("It hangs".into(), " \n"), "daxvm: It hangs.\n");
        assert_eq!(
            with_console("It hangs".into(), "a\nb\n"),
            "daxvm: It hangs. The last lines of its console:\na\nb\n"
        );
    }
}
