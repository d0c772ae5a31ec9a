//! What becomes of a VM one of whose own threads goes wrong: it panics, or makes a system call that it has no need of.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;

use tempfile::TempDir;
use tests::guest::Op;
use tests::vm::{Ended, Kernel, Misdeed, PANIC_MESSAGE, Share, Trap, Vm, scratch};

use crate::harness::{Outcome, ensure, ensure_ended, ensure_eq};
use crate::runner::RunnerCheck;
use crate::runner_ends::traces;

/// The checks, which need one kernel only.
pub fn checks() -> Vec<(&'static str, RunnerCheck)> {
    vec![
        ("a-confined-thread-that-panics-ends-the-vm", panics),
        ("a-confined-thread-that-breaks-out-is-named", breaks_out),
    ]
}

/// A thread that goes wrong in the middle of what the guest, or somebody on the host, has it do.
struct Victim {
    thread: &'static str,
    /// What it comes by once it is lured, by each of its names.
    function: &'static [&'static str],
    lure: fn(&mut Vm, &Path) -> Outcome,
    /// A system call that threads of its kind are not allowed, others mostly are.
    forbidden: (i64, &'static str),
}

const VICTIMS: [Victim; 6] = [
    // What the agent is asked for comes as input of the serial port ...
    Victim {
        thread: "daxvm",
        function: &["<vmm::event_loop::Loop as event_manager::MutEventSubscriber>::process"],
        lure: read_another,
        forbidden: (libc::SYS_socket, "socket"),
    },
    // ... has a file mapped ...
    Victim {
        thread: "fs1-shared",
        function: &["<devices::virtio::fs::server::mapping::Mapper as \
             fuse_backend_rs::transport::fs_cache_req_handler::virtiofs::FsCacheReqHandler>::map"],
        lure: read_another,
        forbidden: (libc::SYS_accept4, "accept4"),
    },
    // ... and is answered by output of the serial port.
    Victim {
        thread: "vcpu-0",
        function: &["<devices::legacy::serial::SerialPort as devices::bus::BusDevice>::write"],
        lure: read_another,
        forbidden: (libc::SYS_mkdirat, "mkdirat"),
    },
    // It sleeps and wakes, whatever there is.
    Victim {
        thread: "vcpu-patrol",
        function: &["std::thread::functions::park_timeout", "std::thread::park_timeout"],
        lure: |_, _| Ok(()),
        forbidden: (libc::SYS_socket, "socket"),
    },
    Victim {
        thread: "dax-watch",
        function: &[
            "devices::virtio::fs::window::repair::<impl devices::virtio::fs::window::state::Shared>::look_at",
        ],
        lure: shrink_the_mapped,
        forbidden: (libc::SYS_mkdirat, "mkdirat"),
    },
    Victim {
        thread: "api",
        function: &["vmm::api::routes::Routes::answer"],
        lure: ask,
        forbidden: (libc::SYS_mkdirat, "mkdirat"),
    },
];

/// Has the guest map a file that was not mapped yet.
fn read_another(vm: &mut Vm, _: &Path) -> Outcome {
    Ok(vm.begin(&Op::ReadBytes("/mnt/another".into(), 0, 7))?)
}

fn shrink_the_mapped(_: &mut Vm, place: &Path) -> Outcome {
    Ok(File::options().write(true).open(place.join("share/mapped"))?.set_len(1)?)
}

fn ask(_: &mut Vm, place: &Path) -> Outcome {
    Ok(UnixStream::connect(place.join("api"))?.write_all(b"GET /status HTTP/1.1\r\nHost: vm\r\n\r\n")?)
}

/// Makes a share, and gives an API socket a place.
fn place() -> Result<TempDir, std::io::Error> {
    let place = TempDir::new_in(scratch())?;
    fs::create_dir(place.path().join("share"))?;
    for name in ["mapped", "another"] {
        fs::write(place.path().join("share").join(name), "content")?;
    }
    Ok(place)
}

/// A guest that has a file mapped.
fn boot(kernel: &Kernel, place: &Path) -> Result<Vm, Box<dyn std::error::Error>> {
    let share = Share::new("shared", place.join("share")).window("32M").dax("always");
    let vm = Vm::builder(kernel).share(share).argument("--api-socket").argument(place.join("api"));
    let mut vm = vm.boot()?;
    vm.mount("shared", "/mnt", "dax=always")?;
    vm.read_bytes("/mnt/mapped", 0, 7)?;
    Ok(vm)
}

/// Has each thread go wrong, in a VM of its own, and looks at the end of that.
fn each(
    kernel: &Kernel,
    misdeed: fn(&Victim) -> Misdeed,
    look: fn(&Victim, &Ended, &Path) -> Outcome,
) -> Outcome {
    for victim in &VICTIMS {
        let place = place()?;
        let end = || -> Result<Ended, Box<dyn std::error::Error>> {
            let mut vm = boot(kernel, place.path())?;
            let trap = Trap::set(&vm.host(), victim.thread, victim.function)?;
            (victim.lure)(&mut vm, place.path())?;
            trap.spring(misdeed(victim))?;
            Ok(vm.wait()?)
        };
        let ended = end().map_err(|error| format!("{}: {error}", victim.thread))?;
        look(victim, &ended, place.path())
            .map_err(|error| format!("{}: {error}\n{}", victim.thread, ended.console))?;
    }
    Ok(())
}

/// The VM ends as it does otherwise, with a report, and leaves nothing.
fn panics(kernel: &Kernel) -> Outcome {
    // What the host sets up once is no residue.
    ensure_ended(&boot(kernel, place()?.path())?.power_off()?, 0, "power-off")?;
    let before = traces()?;
    each(
        kernel,
        |_| Misdeed::Panic,
        |victim, ended, place| {
            ensure_ended(ended, 33, "crash")?;
            let message = ended.report.all["message"].as_str().unwrap_or_default();
            ensure!(
                message.contains("a thread of the VMM panicked") && message.contains(PANIC_MESSAGE),
                "the report says {message:?}"
            );
            let name = if victim.thread == "daxvm" { "main" } else { victim.thread };
            ensure!(ended.console.contains(&format!("thread '{name}' panicked")), "nobody says which thread");
            ensure!(!place.join("api").exists(), "the socket is still there");
            Ok(())
        },
    )?;
    ensure_eq!(traces()?, before, "what is left behind");
    Ok(())
}

/// The process ends at once, and says by which thread and which call.
fn breaks_out(kernel: &Kernel) -> Outcome {
    each(
        kernel,
        |victim| Misdeed::SystemCall(victim.forbidden.0),
        |victim, ended, place| {
            ensure_eq!(ended.status, Some(33), "the exit status");
            ensure_eq!(ended.report.reason, "", "the reason in a report that there cannot be");
            let (number, name) = victim.forbidden;
            let said =
                format!("daxvm: thread {} made the forbidden system call {name} ({number})", victim.thread);
            ensure!(ended.console.contains(&said), "it does not say {said:?}");
            ensure!(place.join("api").exists(), "the socket has gone");
            ensure!(UnixStream::connect(place.join("api")).is_err(), "somebody answers on the socket");
            Ok(())
        },
    )
}
