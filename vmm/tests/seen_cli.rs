//! `daxvm top` and `daxvm ctl` where no VM answers, and API sockets that cannot be: what is said, and the exit status.
//! Nothing is booted.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

/// Standard error and the status.
fn daxvm(directory: &Path, arguments: &[&str]) -> (String, i32) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_daxvm"));
    let command = command.current_dir(directory).args(arguments).stdin(Stdio::null());
    let Output { stderr, status, .. } = command.output().unwrap();
    (String::from_utf8(stderr).unwrap(), status.code().unwrap())
}

#[test]
fn without_a_vm_the_message_says_which_path_to_give() {
    let scene = TempDir::new().unwrap();
    for arguments in [
        &["ctl", "vm.sock", "status"][..],
        &["ctl", "vm.sock", "metrics", "--json"],
        &["top", "--once", "vm.sock"],
        &["top", "--once", "--json", "vm.sock"],
    ] {
        let (message, status) = daxvm(scene.path(), arguments);
        assert_eq!(status, 125, "{message}");
        assert!(message.starts_with("daxvm: No VM listens on vm.sock: give the path that"), "{message}");
    }
}

#[test]
fn top_needs_a_terminal() {
    let (message, status) = daxvm(Path::new("/"), &["top", "vm.sock"]);
    assert_eq!(status, 125);
    assert!(message.contains("needs a terminal") && message.contains("--once"), "{message}");
}

#[test]
fn a_socket_that_cannot_be_is_refused_before_anything_boots() {
    let scene = TempDir::new().unwrap();
    // What is looked at of a kernel before it is booted: the magic number of a bzImage.
    let mut image = vec![0; 0x400];
    image[0x202..0x206].copy_from_slice(b"HdrS");
    fs::write(scene.path().join("bzImage"), image).unwrap();
    fs::write(scene.path().join("file"), "precious").unwrap();
    let _listener = UnixListener::bind(scene.path().join("live.sock")).unwrap();
    let long = "x".repeat(200);
    for (path, says) in [
        ("file", "is no socket; choose another path"),
        ("live.sock", "another process listens on this socket"),
        ("none/vm.sock", "make it first"),
        (&long, "choose a shorter one"),
    ] {
        let arguments = ["run", "--kernel", "bzImage", "--initrd", "file", "--api-socket", path];
        let (message, status) = daxvm(scene.path(), &arguments);
        assert_eq!(status, 125, "{message}");
        assert!(message.contains("--api-socket") && message.contains(says), "{message}");
    }
    assert_eq!(fs::read_to_string(scene.path().join("file")).unwrap(), "precious");
    assert!(scene.path().join("live.sock").exists());
}
