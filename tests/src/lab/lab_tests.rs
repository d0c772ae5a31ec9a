//! What jobs may rely on, tried in the lab itself.

use std::fs;
use std::time::{Duration, Instant};

use super::{Command, Lab, LabError};

fn lab() -> Lab {
    Lab::up().unwrap_or_else(|error| panic!("{error}"))
}

#[test]
#[ignore = "needs the lab"]
fn streams_and_status_are_the_commands_own() {
    let output = lab().exec(&Command::new("sh").args(["-c", "echo out; echo err >&2; exit 7"])).unwrap();
    assert_eq!((output.status, &*output.stdout, &*output.stderr), (7, &b"out\n"[..], &b"err\n"[..]));
    assert_eq!(lab().exec(&Command::shell("kill -9 $$")).unwrap().status, 137);
    assert_eq!(lab().exec(&Command::new("no-such-program")).unwrap().status, 127);
}

#[test]
#[ignore = "needs the lab"]
fn any_bytes_pass_through() {
    let bytes: Vec<u8> = (0..3_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    assert_eq!(lab().exec(&Command::new("cat").stdin(bytes.clone())).unwrap().stdout, bytes);
    // A job that reads nothing does not wait for who would like to write to it.
    assert!(lab().exec(&Command::new("true").stdin(bytes)).unwrap().success());
}

#[test]
#[ignore = "needs the lab"]
fn a_job_out_of_time_is_gone_with_all_its_processes() {
    let mark = format!("31{}", std::process::id());
    let hang = format!("setsid sleep {mark} & sleep {mark}");
    let started = Instant::now();
    let result = lab().exec(&Command::shell(&hang).timeout(Duration::from_secs(1)));
    assert!(matches!(result, Err(LabError::TimedOut)));
    assert!(started.elapsed() < Duration::from_secs(10));
    std::thread::sleep(Duration::from_millis(500));
    let left = lab().exec(&Command::shell(&format!(
        "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -c 'slee[p] {mark}' || true"
    )));
    assert_eq!(left.unwrap().text(), "0");
}

#[test]
#[ignore = "needs the lab"]
fn jobs_run_beside_each_other() {
    let lab = lab();
    std::thread::scope(|scope| {
        for number in 0..20 {
            let lab = &lab;
            scope.spawn(move || {
                let output = lab.exec(&Command::shell(&format!("sleep 0.2; exit {number}"))).unwrap();
                assert_eq!(output.status, number);
            });
        }
    });
}

#[test]
#[ignore = "needs the lab"]
fn files_of_the_machine_are_never_stale() {
    let lab = lab();
    let file = std::env::temp_dir().join(format!("lab-fresh-{}", std::process::id()));
    // Same size, same second: nothing but the contents tells them apart.
    for round in 10..16 {
        fs::write(&file, round.to_string()).unwrap();
        assert_eq!(lab.exec(&Command::new("cat").arg(&file)).unwrap().text(), round.to_string());
        let mapped = lab.exec(&Command::new("grep").args(["-o", "[0-9]*"]).arg(&file)).unwrap();
        assert_eq!(mapped.text(), round.to_string());
    }
    fs::remove_file(&file).unwrap();
    assert!(!lab.exec(&Command::new("cat").arg(&file)).unwrap().success());
}

#[test]
#[ignore = "needs the lab"]
fn scratch_directories_are_what_they_are_called() {
    let lab = lab();
    for (name, kind) in [("LAB_EXT4", "ext2/ext3"), ("LAB_XFS", "xfs"), ("LAB_TMPFS", "tmpfs")] {
        let Some(dir) = lab.scratch(name) else { continue };
        let output = lab.exec(&Command::new("stat").args(["-f", "-c", "%T"]).arg(dir)).unwrap();
        assert_eq!(output.text(), kind);
    }
}
