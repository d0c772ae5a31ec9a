//! What is told of a VM while it runs and at its end: it agrees with what the guest did.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;
use tests::guest::data::Content;
use tests::vm::{CommandRun, Kernel, RunningCommand, daxvm, scratch};

use crate::harness::{Outcome, ensure, ensure_eq};
use crate::runner::{RunnerCheck, ensure_end};

/// Chunks of 2 MiB that the guest reads through its window.
const CHUNKS: u64 = 8;

/// The checks, which need one kernel only.
pub fn checks() -> Vec<(&'static str, RunnerCheck)> {
    vec![
        ("a-running-vm-tells-what-it-does", told),
        ("the-socket-goes-with-the-vm-however-it-ends", gone),
        ("a-socket-is-taken-over-from-the-dead-only", taken_over),
    ]
}

/// A directory with a file of [`CHUNKS`] chunks to share, and room for what daxvm writes.
struct Scene(TempDir);

impl Scene {
    fn new() -> Result<Scene, Box<dyn std::error::Error>> {
        let scene = TempDir::new_in(scratch())?;
        fs::create_dir(scene.path().join("share"))?;
        Content { seed: 5, len: CHUNKS << 21 }.write_to(&scene.path().join("share/read by the guest"))?;
        Ok(Scene(scene))
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }

    /// Starts a guest that reads the file through its window, says so, and waits for a line.
    fn start(&self, kernel: &Kernel) -> Result<RunningCommand, Box<dyn std::error::Error>> {
        let script = "mount -t virtiofs -o dax=always seen /mnt && cat /mnt/read* >/dev/null && echo read && read line";
        let share = format!("tag=seen,window=64M,path={}", self.path("share").display());
        let run = CommandRun::shell(kernel, script)
            .option("--share")
            .option(share)
            .option("--api-socket")
            .option(self.path("vm.sock"))
            .option("--metrics-file")
            .option(self.path("daxvm.prom"));
        Ok(run.start()?)
    }

    /// What the API answers.
    fn get(&self, path: &str) -> Result<String, Box<dyn std::error::Error>> {
        let mut stream = UnixStream::connect(self.path("vm.sock"))?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: vm\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").ok_or("no answer")?;
        ensure!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{path}: {head}");
        Ok(body.to_owned())
    }

    fn json(&self, path: &str) -> Result<Value, Box<dyn std::error::Error>> {
        Ok(serde_json::from_str(&self.get(path)?)?)
    }

    /// What `daxvm ...` prints about the VM.
    fn print(&self, arguments: &[&str]) -> Result<String, Box<dyn std::error::Error>> {
        let socket = self.path("vm.sock");
        let mut command = Command::new(daxvm());
        for argument in arguments {
            command.arg(if *argument == "SOCKET" { socket.as_os_str() } else { argument.as_ref() });
        }
        let output = command.stdin(Stdio::null()).output()?;
        ensure!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    }
}

fn of_share(shares: &Value) -> Result<&Value, Box<dyn std::error::Error>> {
    let found =
        shares["shares"].as_array().and_then(|shares| shares.iter().find(|share| share["tag"] == "seen"));
    Ok(found.ok_or("the share is not there")?)
}

/// The value of a metric of the share; none if it is not there.
fn metric(text: &str, name: &str) -> Option<f64> {
    let sample = format!("{name}{{share=\"seen\"}} ");
    text.lines().find_map(|line| line.strip_prefix(&sample)?.parse().ok())
}

fn told(kernel: &Kernel) -> Outcome {
    let scene = Scene::new()?;
    let mut running = scene.start(kernel)?;
    ensure_eq!(running.wait_for_line()?, "read");
    let mode = fs::metadata(scene.path("vm.sock"))?.permissions().mode() & 0o7777;
    ensure_eq!(mode, 0o600, "the socket's mode");

    let status = scene.json("/v1/status")?;
    ensure_eq!(status["pid"].as_u64(), Some(running.child.id().into()));
    ensure_eq!((status["state"].as_str(), status["cpus"].as_u64()), (Some("running"), Some(1)));

    let windows = scene.json("/v1/window")?;
    let window = of_share(&windows)?;
    let counters = &window["counters"];
    for name in ["mapped_chunks", "peak_mapped_chunks", "setup_mappings"] {
        ensure_eq!(counters[name].as_u64(), Some(CHUNKS), "{name}: {counters}");
    }
    let owners = window["chunks"].as_array().ok_or("no map")?;
    let numbers: Vec<_> = owners.iter().filter_map(Value::as_u64).filter(|number| *number != 0).collect();
    ensure_eq!((owners.len(), numbers), (32, vec![1; CHUNKS as usize]), "the map");
    ensure_eq!(window["setup_latency"]["count"].as_u64(), Some(CHUNKS), "requests that were timed");

    let files = scene.json("/v1/files")?;
    let file = &of_share(&files)?["files"][0];
    ensure_eq!(file["path"].as_str(), Some("read by the guest"));
    ensure_eq!((file["number"].as_u64(), file["mapped_chunks"].as_u64()), (Some(1), Some(CHUNKS)), "{file}");

    let metrics = scene.get("/metrics")?;
    ensure_eq!(metric(&metrics, "daxvm_window_mapped_chunks"), Some(CHUNKS as f64));
    ensure_eq!(metric(&metrics, "daxvm_window_setup_mappings_total"), Some(CHUNKS as f64));
    ensure_eq!(metric(&metrics, "daxvm_window_setup_mapping_duration_seconds_count"), Some(CHUNKS as f64));

    let shown = scene.print(&["top", "--once", "SOCKET"])?;
    for says in ["window of seen: 64 MiB, 8 of 32 chunks mapped", "aaaaaaaa", "read by the guest"] {
        ensure!(shown.contains(says), "daxvm top --once does not say {says:?}:\n{shown}");
    }
    let json: Value = serde_json::from_str(&scene.print(&["top", "--once", "--json", "SOCKET"])?)?;
    ensure_eq!(of_share(&json["window"])?["chunks"], window["chunks"]);
    ensure!(scene.print(&["ctl", "SOCKET", "status"])?.contains("running for"), "daxvm ctl status");
    ensure!(scene.print(&["ctl", "SOCKET", "metrics"])?.ends_with("# EOF\n"), "daxvm ctl metrics");

    running.child.stdin.take().ok_or("no pipe")?.write_all(b"go on\n")?;
    let ended = running.wait()?;
    ensure_end(&ended, 0, "exited")?;
    ensure!(!scene.path("vm.sock").exists(), "the socket is left behind");
    let last = fs::read_to_string(scene.path("daxvm.prom"))?;
    ensure_eq!(metric(&last, "daxvm_window_setup_mappings_total"), Some(CHUNKS as f64), "at the end");
    let reported = of_share(&ended.report.all)?;
    ensure_eq!(reported["files"]["files"][0]["setup_mappings"].as_u64(), Some(CHUNKS), "{reported}");
    Ok(())
}

fn gone(kernel: &Kernel) -> Outcome {
    for signal in [Signal::TERM, Signal::HUP] {
        let scene = Scene::new()?;
        let mut running = scene.start(kernel)?;
        ensure_eq!(running.wait_for_line()?, "read");
        running.signal(signal)?;
        running.wait()?;
        ensure!(!scene.path("vm.sock").exists(), "the socket is left behind by {signal:?}");
        ensure!(scene.path("daxvm.prom").exists(), "the metrics are kept");
        ensure_eq!(left_in(scene.0.path())?, ["daxvm.prom", "share"], "after {signal:?}");
    }
    Ok(())
}

fn left_in(directory: &Path) -> std::io::Result<Vec<String>> {
    let mut names: Vec<_> = fs::read_dir(directory)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<std::io::Result<_>>()?;
    names.sort();
    Ok(names)
}

fn taken_over(kernel: &Kernel) -> Outcome {
    let scene = Scene::new()?;
    let mut first = scene.start(kernel)?;
    ensure_eq!(first.wait_for_line()?, "read");
    let second = scene.start(kernel)?.wait()?;
    ensure_eq!(second.status, Some(125), "{}", second.stderr);
    ensure!(second.stderr.contains("another process listens on this socket"), "{}", second.stderr);
    scene.json("/v1/status")?;

    first.signal(Signal::KILL)?;
    first.wait()?;
    ensure!(scene.path("vm.sock").exists(), "nobody can remove it after SIGKILL");
    let mut third = scene.start(kernel)?;
    ensure_eq!(third.wait_for_line()?, "read");
    ensure_eq!(scene.json("/v1/status")?["pid"].as_u64(), Some(third.child.id().into()));
    drop(third.child.stdin.take());
    third.wait()?;
    ensure!(!scene.path("vm.sock").exists(), "the socket is left behind");
    Ok(())
}
