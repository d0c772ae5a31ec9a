//! Runs a test in namespaces of its own, where it may change what would be everybody's.

use std::process::Command;

/// Runs the ignored test `name` in a new process, in the namespaces that `flags` of unshare(1) ask for. Says that it is
/// skipped when the system does not allow them.
pub fn run(name: &str, flags: &[&str]) {
    let user: &[&str] = if is_root() { &[] } else { &["--map-root-user"] };
    let unshare = || {
        let mut command = Command::new("unshare");
        command.args(flags).args(user);
        command
    };
    if !unshare().arg("true").output().is_ok_and(|output| output.status.success()) {
        skipped!("this system does not allow unshare {}", flags.join(" "));
        return;
    }
    let this = std::env::current_exe().unwrap();
    let output = unshare().arg(this).args(["--exact", name, "--ignored"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

/// Whether this process is root, and not just within a user namespace.
pub fn is_root() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap();
    rustix::process::geteuid().is_root() && map.split_whitespace().eq(["0", "0", "4294967295"])
}
