//! The confinement of daxvm, which is on in all other checks, too: what it is, and that a guest lacks nothing.

use std::error::Error;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use serde_json::Value;
use tempfile::TempDir;
use tests::vm::{CommandRun, Kernel, Report, scratch};

use crate::harness::{Outcome, ensure, ensure_eq};
use crate::host_file_systems::Disk;
use crate::runner::{RunnerCheck, ensure_end};

/// An ordinary user.
const USER: u32 = 1000;

/// The checks, which need one kernel only.
pub fn checks() -> Vec<(&'static str, RunnerCheck)> {
    vec![
        ("a-confined-share-can-do-everything", everything),
        ("every-thread-is-confined", every_thread),
        ("an-ordinary-user-is-confined", ordinary_user),
        ("the-sandbox-can-be-off", off),
    ]
}

/// A directory to share, with a file.
fn shared() -> Result<TempDir, Box<dyn Error>> {
    let directory = TempDir::new_in(scratch())?;
    fs::write(directory.path().join("file"), "from the host\n")?;
    Ok(directory)
}

/// A run of a script in the share, which has a window and is DAX.
fn in_share(kernel: &Kernel, directory: &Path, script: &str) -> CommandRun {
    let share = format!("tag=confined,window=32M,dax=always,path={}", directory.display());
    let script = format!("set -e; mount -t virtiofs -o dax=always confined /mnt; cd /mnt; {script}");
    CommandRun::shell(kernel, &script).option("--share").option(share)
}

/// The layers of the report, by name, and whether each was applied.
fn layers(report: &Report) -> Vec<(String, bool)> {
    let layers = report.all["sandbox"].as_array().into_iter().flatten();
    let layer = |layer: &Value| {
        (layer["layer"].as_str().unwrap_or_default().to_owned(), layer["applied"] == Value::Bool(true))
    };
    layers.map(layer).collect()
}

fn expected(missing: &[&str]) -> Vec<(String, bool)> {
    let names = ["shares", "limits", "mounts", "no-new-privileges", "capabilities", "landlock", "seccomp"];
    names.iter().map(|name| ((*name).to_owned(), !missing.contains(name))).collect()
}

fn everything(kernel: &Kernel) -> Outcome {
    let directory = shared()?;
    let path = |name: &str| directory.path().join(name);
    let script = "\
        cat file; echo from the guest >>file; mkdir -p a/b; echo new >a/new; mv a/new a/b/moved; ln a/b/moved linked; \
        ln -s nowhere symlink; mkfifo fifo; mknod device c 1 3; chown 7:8 linked; chmod 6755 linked; \
        touch -d '2001-02-03 04:05:06' linked; truncate -s 5M large; dd if=/dev/zero of=large bs=64k count=40 conv=notrunc \
        2>/dev/null; cp large copy; rm large; sync; echo secret >locked; chmod 0 locked; chown 9:9 locked; cat locked; \
        ls -la >/dev/null; find . >/dev/null; df . >/dev/null; su_other() { chroot --userspec=11:12 / \"$@\"; }; \
        mkdir -m 777 open; mkdir -m 2775 club; chgrp 13 club; chmod g+s club; \
        member() { chroot --userspec=11:12 --groups=13 / perl -e \"$1\"; }; \
        member 'use Fcntl; umask 0; sysopen F, q(/mnt/club/ours), O_CREAT|O_WRONLY, 02775 or exit 1'; \
        su_other sh -c 'echo mine >/mnt/open/mine'";
    let ended = in_share(kernel, directory.path(), script).run()?;
    ensure_end(&ended, 0, "exited")?;
    ensure_eq!(ended.stderr, "", "standard error");
    ensure!(ended.stdout.starts_with(b"from the host\nsecret\n"), "it printed {:?}", ended.stdout);
    ensure_eq!(fs::read_to_string(path("file"))?, "from the host\nfrom the guest\n");
    let linked = path("linked").metadata()?;
    ensure_eq!((linked.uid(), linked.gid(), linked.mode() & 0o7777, linked.nlink()), (7, 8, 0o6755, 2));
    ensure_eq!(linked.mtime(), 981_173_106, "the time");
    ensure!(path("device").symlink_metadata()?.file_type().is_char_device(), "no device");
    ensure!(path("fifo").symlink_metadata()?.file_type().is_fifo(), "no fifo");
    ensure_eq!(path("copy").metadata()?.len(), 5 << 20);
    let mine = path("open/mine").metadata()?;
    ensure_eq!((mine.uid(), mine.gid()), (11, 12), "who made the file");
    let ours = path("club/ours").metadata()?;
    ensure_eq!((ours.uid(), ours.gid(), ours.mode() & 0o7777), (11, 13, 0o2775), "what a member made");
    ensure_eq!(layers(&ended.report), expected(&[]), "the layers: {}", ended.report.all["sandbox"]);
    Ok(())
}

/// What /proc says of a task.
fn status(task: &Path, key: &str) -> Result<String, Box<dyn Error>> {
    let text = fs::read_to_string(task.join("status"))?;
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    Ok(value.ok_or("not in /proc/PID/status")?.trim().to_owned())
}

fn every_thread(kernel: &Kernel) -> Outcome {
    let directory = shared()?;
    let outputs = TempDir::new_in(scratch())?;
    let later = directory.path().join("mounted-later");
    fs::create_dir(&later)?;
    let script = "\
        cat file; dd if=/dev/hwrng of=/dev/null bs=16 count=1 2>/dev/null; echo ready; read line || ls mounted-later; exit 1";
    let mut running = in_share(kernel, directory.path(), script)
        .option("--api-socket")
        .option(outputs.path().join("api"))
        .option("--metrics-file")
        .option(outputs.path().join("metrics"))
        .options(["--timeout", "1h"])
        .start()?;
    while running.wait_for_line()? != "ready" {
        ensure!(running.child.try_wait()?.is_none(), "it ended before it was ready");
    }
    let proc = PathBuf::from(format!("/proc/{}", running.child.id()));
    let mut names = Vec::new();
    for task in fs::read_dir(proc.join("task"))? {
        let task = task?.path();
        let name = status(&task, "Name")?;
        ensure_eq!(status(&task, "NoNewPrivs")?, "1", "{name}");
        ensure_eq!(status(&task, "Seccomp")?, "2", "{name}");
        let filters: u32 = status(&task, "Seccomp_filters")?.parse()?;
        // The last is a thread of KVM's, made by the vCPU.
        let is_own = ["vcpu-0", "fs", "rng", "console-", "dax-watch", "api", "metrics", "kvm-"];
        let is_own = is_own.iter().any(|own| name.starts_with(own));
        ensure_eq!(filters, if is_own { 3 } else { 2 }, "filters of {name}");
        // Bits 0 to 4, 6, 7, 27 and 31: chown, dac_override, dac_read_search, fowner, fsetid, setgid, setuid, mknod, setfcap.
        let kept = u64::from_str_radix(&status(&task, "CapPrm")?, 16)?;
        ensure_eq!(kept, 0x8800_00df, "capabilities of {name}");
        ensure_eq!(status(&task, "CapBnd")?, status(&task, "CapPrm")?, "the bounding set of {name}");
        names.push(name);
    }
    for thread in ["vcpu-0", "dax-watch", "api", "metrics", "starter", "time-limit"] {
        ensure!(names.iter().any(|name| name == thread), "no {thread} among {names:?}");
    }
    // The root directory has nothing but what leads to the outputs and to the process itself.
    let root: Vec<_> = fs::read_dir(proc.join("root"))?
        .map(|entry| Ok(entry?.file_name()))
        .collect::<std::io::Result<_>>()?;
    let first = outputs.path().components().nth(1).ok_or("no directory")?;
    ensure!(
        root.iter().all(|name| name == "proc" || *name == first.as_os_str()),
        "the root directory of the process has {root:?}"
    );
    let own: Vec<_> = fs::read_dir(proc.join("root/proc"))?.collect::<Result<_, _>>()?;
    ensure_eq!(own.len(), 2, "self and sys in /proc: {own:?}");
    // The host's later mounts are the host's.
    Disk::run(&["mount", "-t", "tmpfs", "none", later.to_str().ok_or("a path that is no text")?])?;
    let made = fs::write(later.join("of the host"), "");
    drop(running.child.stdin.take());
    let ended = running.wait();
    Disk::run(&["umount", later.to_str().ok_or("a path that is no text")?])?;
    made?;
    let ended = ended?;
    ensure_eq!(
        String::from_utf8_lossy(&ended.stdout),
        "",
        "what is in a directory on which the host has mounted"
    );
    ensure!(
        ended.status == Some(1) && ended.report.reason == "exited",
        "{:?} {}",
        ended.status,
        ended.stderr
    );
    ensure!(!outputs.path().join("api").exists(), "the socket is still there");
    ensure!(outputs.path().join("metrics").metadata()?.len() > 1000, "no metrics");
    Ok(())
}

/// Without privileges the guest's files are the user's, and what only root can do fails.
fn ordinary_user(kernel: &Kernel) -> Outcome {
    let directory = shared()?;
    let path = |name: &str| directory.path().join(name);
    for of_user in [directory.path().to_owned(), path("file")] {
        chown(of_user, Some(USER), Some(USER))?;
    }
    fs::write(path("private"), "root's")?;
    fs::set_permissions(path("private"), fs::Permissions::from_mode(0o600))?;
    fs::create_dir(path("theirs"))?;
    fs::set_permissions("/dev/kvm", fs::Permissions::from_mode(0o666))?;
    let script = "\
        cat file; echo more >>file; mkdir a; echo new >a/new; mv a/new moved; ln -s nowhere symlink; cp moved copy; \
        truncate -s 5M large; rm copy; fails() { if \"$@\" 2>errors; then echo it works; else sed 's/.*: //' errors; fi; }; \
        fails chown 7 moved; fails mknod device c 1 3; fails cat private; fails touch theirs/new; fails cat /etc/shadow; \
        chmod 777 .; chroot --userspec=11:12 / sh -c 'echo >/mnt/of-another'; echo end";
    let mut report = PathBuf::new();
    let mut running = in_share(kernel, directory.path(), script).start_with(|command| {
        let argument = command.get_args().skip_while(|argument| *argument != "--report").nth(1);
        report = argument.map(PathBuf::from).unwrap_or_default();
        // Where it cannot write, daxvm says so itself.
        let _ = report.parent().map(|files| chown(files, Some(USER), Some(USER)));
        command.uid(USER).gid(USER).current_dir("/");
        let private = || {
            rustix::process::umask(Mode::RWXG | Mode::RWXO);
            Ok(())
        };
        // SAFETY: umask(2) may be called between fork(2) and execve(2).
        unsafe { command.pre_exec(private) };
    })?;
    drop(running.child.stdin.take());
    let ended = running.wait()?;
    ensure_eq!(report.metadata()?.mode() & 0o777, 0o600, "who may read the report");
    ensure_end(&ended, 0, "exited")?;
    let (not_permitted, denied) = ("Operation not permitted\n", "Permission denied\n");
    let expected_output = ["from the host\n", not_permitted, not_permitted, denied, denied, denied, "end\n"];
    ensure_eq!(String::from_utf8_lossy(&ended.stdout), expected_output.concat());
    for name in ["a", "moved", "large", "of-another"] {
        let found = path(name).metadata()?;
        ensure_eq!((found.uid(), found.gid()), (USER, USER), "whose {name} is");
    }
    let found = layers(&ended.report);
    ensure_eq!(found, expected(&["shares", "mounts"]), "the layers: {}", ended.report.all["sandbox"]);
    Ok(())
}

fn off(kernel: &Kernel) -> Outcome {
    let ended = CommandRun::new(kernel, &["true"]).option("--sandbox=off").run()?;
    ensure_end(&ended, 0, "exited")?;
    ensure!(ended.stderr.contains("The sandbox is off"), "no warning: {}", ended.stderr);
    ensure_eq!(layers(&ended.report), [], "layers");
    Ok(())
}
