//! `daxvm run -- CMD`: what the command finds, and what it leaves.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::thread;
use std::time::Duration;

use libtest_mimic::Trial;
use tempfile::TempDir;
use tests::guest::data::Content;
use tests::vm::{CommandEnded, CommandRun, Kernel, scratch};

use crate::harness::{Outcome, Places, ensure, ensure_eq, own_trial};
use crate::{runner_disks, runner_ends, runner_jobs, runner_terminal, sandbox, seen, trapped};

/// A check that runs commands with one kernel.
pub type RunnerCheck = fn(&Kernel) -> Outcome;

/// The checks of the runner. What does not depend on the kernel's drivers is checked with one kernel.
pub fn trials(places: &Result<Places, String>, kernel: &'static str, trials: &mut Vec<Trial>) {
    let mut checks: Vec<(&str, RunnerCheck)> = vec![
        ("the-kernel-runs-a-command", runs),
        ("streams-are-apart", streams),
        ("64-mib-through-a-pipe", large),
        ("a-panic-is-34-at-once", runner_ends::panic),
        ("disks-and-randomness", runner_disks::disks),
    ];
    if kernel == "6.12-cloud" {
        checks.extend([
            ("exit-statuses", statuses as RunnerCheck),
            ("output-closed-early", output_closed),
            ("input-not-read", input_not_read),
            ("an-overlay-leaves-the-host-alone", overlay),
            ("rw-is-written-through", writable),
            ("environment-and-directory", environment),
            ("another-root", other_root),
            ("orphans-do-not-matter", orphans),
            ("a-store-takes-set-id-bits-that-came-late", set_id),
        ]);
        checks.extend(runner_ends::checks());
        checks.extend(seen::checks());
        checks.extend(sandbox::checks());
        checks.extend(trapped::checks());
        checks.extend(runner_terminal::checks());
        checks.extend(runner_jobs::checks());
        checks.extend(runner_disks::checks());
    }
    let mut named: Vec<_> =
        checks.into_iter().map(|(name, check)| (format!("runner/{name}"), check)).collect();
    let (name, check) = runner_jobs::LONG;
    named.push((format!("long/{name}"), check));
    for (name, check) in named {
        trials.push(own_trial(kernel, &name, places, move |kernel, _| check(kernel)));
    }
}

/// The end of a run, by status and by reason; everything that is known if it is another.
pub fn ensure_end(ended: &CommandEnded, status: i32, reason: &str) -> Outcome {
    let found = (ended.status, ended.report.reason.as_str());
    let stdout = String::from_utf8_lossy(&ended.stdout[..ended.stdout.len().min(2000)]).into_owned();
    ensure_eq!(found, (Some(status), reason), "the end; stdout: {stdout}\nstderr: {}", ended.stderr);
    Ok(())
}

fn runs(kernel: &Kernel) -> Outcome {
    let ended = CommandRun::new(kernel, &["uname", "-r"]).run()?;
    ensure_end(&ended, 0, "exited")?;
    let version = kernel.name().split('-').next().unwrap_or_default();
    let printed = String::from_utf8_lossy(&ended.stdout).into_owned();
    ensure!(printed.starts_with(&format!("{version}.")) && printed.ends_with('\n'), "it printed {printed:?}");
    ensure_eq!(ended.stderr, "", "standard error");
    let timing = &ended.report.all["timing"];
    for part in ["vmm_ms", "ready_ms", "started_ms", "total_ms"] {
        ensure!(
            timing[part].as_f64().is_some_and(|time| time > 0.0),
            "{part} of the report's timing: {timing}"
        );
    }
    Ok(())
}

/// Standard output and standard error are apart, and no byte of either is another than the command's.
fn streams(kernel: &Kernel) -> Outcome {
    let script = r#"printf 'a\0b\r\n'; cat >&2; printf '%s|' "$0" "$@"; printf '\377'"#;
    let argv = ["sh", "-c", script, "two words", "new\nline", "", "-x", "'\"$(*)"];
    let ended = CommandRun::new(kernel, &argv).run_with(b"in\0put\xff\n")?;
    ensure_end(&ended, 0, "exited")?;
    ensure_eq!(ended.stdout, b"a\0b\r\ntwo words|new\nline||-x|'\"$(*)|\xff", "standard output");
    ensure_eq!(ended.stderr, String::from_utf8_lossy(b"in\0put\xff\n"), "standard error");
    Ok(())
}

fn large(kernel: &Kernel) -> Outcome {
    const LARGE: Content = Content { seed: 7, len: 64 << 20 };
    let file = tempfile::NamedTempFile::new_in(scratch())?;
    LARGE.write_to(file.path())?;
    let mut running = CommandRun::shell(kernel, "cat; echo ended >&2").start()?;
    let mut source = fs::File::open(file.path())?;
    let mut stdin = running.child.stdin.take().ok_or("no pipe")?;
    let feeder = thread::spawn(move || std::io::copy(&mut source, &mut stdin));
    let ended = running.wait()?;
    let fed = feeder.join().map_err(|_| "the feeder panicked")??;
    ensure_eq!(fed, LARGE.len, "bytes fed");
    ensure_end(&ended, 0, "exited")?;
    ensure_eq!(ended.stderr, "ended\n");
    ensure_eq!(ended.stdout.len() as u64, LARGE.len, "bytes that came back");
    fs::write(file.path(), &ended.stdout)?;
    ensure_eq!(LARGE.differs_from(&fs::File::open(file.path())?)?, None, "the first difference");
    Ok(())
}

fn statuses(kernel: &Kernel) -> Outcome {
    for (script, status, reason) in [
        ("exit 0", 0, "exited"),
        ("exit 1", 1, "exited"),
        ("exit 42", 42, "exited"),
        ("exit 255", 255, "exited"),
        ("kill -9 $$", 137, "signaled"),
        ("kill -SEGV $$", 139, "signaled"),
    ] {
        let ended = CommandRun::shell(kernel, script).run()?;
        ensure_end(&ended, status, reason)?;
        ensure_eq!(ended.stderr, "", "standard error of `{script}`");
    }
    for (program, status) in [("no-such-program", 127), ("/etc/passwd", 126), ("/no/such/program", 127)] {
        let ended = CommandRun::new(kernel, &[program]).run()?;
        ensure_end(&ended, status, "not-run")?;
        ensure!(ended.stderr.contains(program), "the message does not name {program}: {}", ended.stderr);
        ensure!(ended.stderr.lines().count() == 1, "one line says it: {}", ended.stderr);
    }
    Ok(())
}

/// A reader that goes away ends who writes to it, as in a pipe.
fn output_closed(kernel: &Kernel) -> Outcome {
    let mut running = CommandRun::new(kernel, &["yes"]).start()?;
    ensure_eq!(running.wait_for_line()?, "y");
    drop(running.child.stdout.take());
    let ended = running.wait()?;
    ensure_end(&ended, 141, "signaled")?;
    // The guest's own pipe: it ends with its last command.
    let ended = CommandRun::shell(kernel, "yes | head -n 3").run()?;
    ensure_end(&ended, 0, "exited")?;
    ensure_eq!(ended.stdout, b"y\ny\ny\n");
    Ok(())
}

/// Input that nobody reads holds nobody up.
fn input_not_read(kernel: &Kernel) -> Outcome {
    let mut running = CommandRun::new(kernel, &["head", "-n", "1"]).start()?;
    let mut stdin = running.child.stdin.take().ok_or("no pipe")?;
    // Ends when the program has, with EPIPE.
    let feeder = thread::spawn(move || while stdin.write_all(&b"line\n".repeat(1000)).is_ok() {});
    let ended = running.wait()?;
    feeder.join().map_err(|_| "the feeder panicked")?;
    ensure_end(&ended, 0, "exited")?;
    ensure_eq!(ended.stdout, b"line\n");
    // A pipe that stays open is no reason to wait either.
    let mut running = CommandRun::new(kernel, &["true"]).start()?;
    let stdin = running.child.stdin.take();
    let ended = running.wait()?;
    drop(stdin);
    ensure_end(&ended, 0, "exited")
}

/// A directory of the host that a guest with the host's root sees: its `/run` is its own, and in the lab the scratch
/// directories are there.
fn seen_in_guests() -> std::io::Result<tempfile::TempDir> {
    tempfile::Builder::new().prefix("runner-").tempdir_in("/var/tmp")
}

fn overlay(kernel: &Kernel) -> Outcome {
    let before = fs::read("/etc/passwd")?;
    let dir = seen_in_guests()?;
    fs::write(dir.path().join("kept"), "kept\n")?;
    let script = format!(
        "cd {} && rm kept && echo new >new && mv new newer && cat newer && echo x >>/etc/passwd && \
         echo y >/etc/daxvm-was-here && tail -n 1 /etc/passwd",
        dir.path().display()
    );
    let ended = CommandRun::shell(kernel, &script).run()?;
    ensure_end(&ended, 0, "exited")?;
    ensure_eq!(ended.stdout, b"new\nx\n");
    ensure!(fs::read("/etc/passwd")? == before, "/etc/passwd has changed on the host");
    ensure!(!fs::exists("/etc/daxvm-was-here")?, "the host has a new file");
    let names: Vec<_> =
        fs::read_dir(dir.path())?.map(|entry| Ok(entry?.file_name())).collect::<std::io::Result<_>>()?;
    ensure_eq!(names, ["kept"], "the directory on the host");
    Ok(())
}

fn writable(kernel: &Kernel) -> Outcome {
    let dir = seen_in_guests()?;
    let path = |name: &str| dir.path().join(name);
    fs::create_dir(path("out"))?;
    fs::create_dir(path("other"))?;
    fs::write(path("other/file"), "old\n")?;
    fs::write(path("other/sibling"), "old\n")?;
    let script = format!(
        "cd {} && echo result >out/result && echo new >>other/file && echo new >>other/sibling && cat other/*",
        dir.path().display()
    );
    let ended = CommandRun::shell(kernel, &script)
        .option("--rw")
        .option(path("out"))
        .option("--rw")
        .option(path("other/file"));
    let ended = ended.run()?;
    ensure_end(&ended, 0, "exited")?;
    ensure_eq!(ended.stdout, b"old\nnew\nold\nnew\n");
    ensure_eq!(fs::read_to_string(path("out/result"))?, "result\n");
    ensure_eq!(fs::read_to_string(path("other/file"))?, "old\nnew\n");
    ensure_eq!(fs::read_to_string(path("other/sibling"))?, "old\n", "what was not opened");
    Ok(())
}

fn environment(kernel: &Kernel) -> Outcome {
    let dir = tempfile::Builder::new().prefix("with space ").tempdir_in(scratch())?;
    let odd = OsStr::from_bytes(b"/bin:/usr/bin:/odd\xff");
    let run = CommandRun::shell(
        kernel,
        "pwd; env; id -u; cat /proc/sys/kernel/hostname >/dev/null && ls -d /proc/1",
    )
    .options(["--env", "GIVEN=a=b c", "--env", "TAKEN", "--env", "MISSING"]);
    let mut running = run.start_with(|command| {
        let caller = [("TERM", "dumb"), ("TAKEN", "from caller"), ("NOT_TAKEN", "x")];
        command.current_dir(dir.path()).env_clear().envs(caller).env("PATH", odd);
        for name in ["DAXVM", "KERNELS", "LAB_TMPFS"] {
            command.envs(std::env::var_os(name).map(|value| (name, value)));
        }
    })?;
    drop(running.child.stdin.take());
    let ended = running.wait()?;
    ensure_end(&ended, 0, "exited")?;
    let lines: Vec<_> = ended.stdout.split(|byte| *byte == b'\n').collect();
    ensure_eq!(lines[0], dir.path().as_os_str().as_bytes(), "the directory");
    for expected in
        [&b"GIVEN=a=b c"[..], b"TAKEN=from caller", b"TERM=dumb", b"PATH=/bin:/usr/bin:/odd\xff", b"0"]
    {
        ensure!(lines.contains(&expected), "no {}", String::from_utf8_lossy(expected));
    }
    for other in ["NOT_TAKEN", "MISSING", "LAB_TMPFS"] {
        ensure!(
            !lines.iter().any(|line| line.starts_with(other.as_bytes())),
            "{other} is in the environment"
        );
    }
    Ok(())
}

/// Another root: its own programs, the caller's directory when it lies in there.
fn other_root(kernel: &Kernel) -> Outcome {
    let dir = tempfile::tempdir_in(scratch())?;
    fs::create_dir_all(dir.path().join("bin"))?;
    fs::create_dir_all(dir.path().join("work"))?;
    // The program is linked statically, and its policy subcommand needs nothing else.
    fs::copy(tests::vm::daxvm(), dir.path().join("bin/tool"))?;
    let run = CommandRun::new(kernel, &["/bin/tool", "--version"]);
    for mode in ["", ",ro", ",rw"] {
        let root = format!("{}{mode}", dir.path().display());
        let mut running = run.clone().option("--root").option(&root).start_with(|command| {
            command.current_dir(dir.path().join("work"));
        })?;
        drop(running.child.stdin.take());
        let ended = running.wait()?;
        if mode == ",ro" {
            // There is nothing to mount /dev on, and cannot be.
            ensure_end(&ended, 125, "boot-failed")?;
            ensure!(
                ended.stderr.contains("/dev of the root"),
                "the message does not say what is missing: {}",
                ended.stderr
            );
            for name in ["proc", "sys", "dev", "run", "tmp"] {
                fs::create_dir_all(dir.path().join(name))?;
            }
            let ended = run.clone().option("--root").option(&root).run()?;
            ensure_end(&ended, 0, "exited")?;
        } else {
            ensure_end(&ended, 0, "exited")?;
            ensure!(ended.stdout.starts_with(b"daxvm "), "it printed {:?}", ended.stdout);
        }
    }
    let ended = run.option("--root").option("/no/such/root").run()?;
    ensure_eq!(ended.status, Some(125), "a root that is not there; {}", ended.stderr);
    ensure!(ended.time < Duration::from_secs(20), "it took {:?}", ended.time);
    ensure!(ended.stderr.contains("/no/such/root"), "the message does not name it: {}", ended.stderr);
    Ok(())
}

/// Who is left when the command has ended does not hold up anything.
fn orphans(kernel: &Kernel) -> Outcome {
    let script = "(setsid sleep 10000 &) ; (sleep 10000 &) ; (sleep 0.1; echo reaped) & wait; exit 3";
    let ended = CommandRun::shell(kernel, script).run()?;
    ensure_end(&ended, 3, "exited")?;
    ensure_eq!(ended.stdout, b"reaped\n");
    // Many orphans leave no zombies behind.
    let script = "for i in $(seq 200); do (true & true) & done; wait; sleep 0.2; \
                  grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l";
    let ended = CommandRun::shell(kernel, script).run()?;
    ensure_end(&ended, 0, "exited")?;
    ensure_eq!(ended.stdout, b"0\n", "zombies");
    Ok(())
}

/// A file that becomes set-id when it is mapped for writing already: what is written then comes by no request.
fn set_id(kernel: &Kernel) -> Outcome {
    let directory = TempDir::new_in(scratch())?;
    let file = directory.path().join("file");
    fs::write(&file, "content")?;
    let script = "\
        set -e; mount -t virtiofs -o dax=always shared /mnt; perl -e '\
        open(F, \"+<\", \"/mnt/file\") or die; syswrite(F, \"A\") or die; chmod(06777, *F) or die; \
        printf(\"%o \", (stat F)[2] & 07777); $( = $) = 12; $< = $> = 11; \
        sysseek(F, 0, 0); syswrite(F, \"B\") or die; printf(\"%o\", (stat F)[2] & 07777)'";
    let share = format!("tag=shared,window=32M,dax=always,path={}", directory.path().display());
    let ended = CommandRun::shell(kernel, script).option("--share").option(share).run()?;
    ensure_end(&ended, 0, "exited")?;
    ensure_eq!(String::from_utf8_lossy(&ended.stdout), "6777 777", "its modes in the guest");
    ensure_eq!(file.metadata()?.mode() & 0o7777, 0o777, "its mode on the host");
    ensure_eq!(fs::read_to_string(&file)?, "Bontent");
    Ok(())
}
