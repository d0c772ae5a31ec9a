//! The daemon: keeps the lab's host running and gives each client a free port to an agent on it.
//!
//! Only the daemon talks to the ports, and it lives as long as the host does: a client that vanishes in the middle of a
//! frame never leaves a port out of step.

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, ExitStatus};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::paths::Paths;
use super::protocol::{Frame, Host, Kind};
use super::{LabError, Mode, direct, qemu};

/// So many jobs run at once; more wait for a free port.
pub const PORTS: usize = 16;

/// How long the host may take until its agents answer. An idle machine needs a few seconds.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// What the daemon prints when the lab is up.
pub const READY: &str = "ready";

/// What runs the agents: one QEMU, or the agents themselves on this machine.
pub struct Machine {
    /// Processes that must all stay.
    pub children: Vec<Child>,
    /// Our ends of the ports.
    pub ports: Vec<UnixStream>,
}

/// Makes connected sockets for the ports: ours and the agents'.
pub fn port_pairs() -> io::Result<(Vec<UnixStream>, Vec<OwnedFd>)> {
    let pairs: Vec<_> = (0..PORTS).map(|_| UnixStream::pair()).collect::<Result<_, _>>()?;
    Ok(pairs.into_iter().map(|(ours, theirs)| (ours, OwnedFd::from(theirs))).unzip())
}

/// Brings the lab up, says so on standard output and serves clients until it is told to stop or the host ends.
pub fn run(paths: &Paths, mode: Mode) -> Result<(), LabError> {
    let machine = match mode {
        Mode::Qemu => qemu::start(paths)?,
        Mode::Direct => direct::start(paths)?,
    };
    let mut guard = Guard { paths: paths.clone(), children: machine.children };
    let host = greet(&machine.ports)?;
    qemu::forget_disks(paths);
    let listener = paths.listen().map_err(|error| LabError::system("listen for clients", error))?;

    let daemon = Arc::new(Daemon { host, mode, free: Mutex::new(machine.ports), returned: Condvar::new() });
    let (stop, stopped) = std::sync::mpsc::channel();
    let to_clients = daemon.clone();
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let (daemon, stop) = (to_clients.clone(), stop.clone());
            std::thread::spawn(move || {
                // An error is the end of this client only; it has seen it too.
                if let Err(error) = daemon.serve(client, &stop) {
                    eprintln!("lab: a client went away: {error}");
                }
            });
        }
    });
    println!("{READY}");
    silence_stdout().map_err(|error| LabError::system("detach from the caller", error))?;
    loop {
        if let Ok(client) = stopped.recv_timeout(Duration::from_millis(200)) {
            drop(guard);
            // The client sees the end of the connection when nothing is left.
            drop::<UnixStream>(client);
            return Ok(());
        }
        if mode == Mode::Qemu {
            daemon.poke();
        }
        if let Some(status) = guard.ended() {
            eprintln!("lab: the host ended by itself: {status}");
            return Err(LabError::HostEnded);
        }
    }
}

/// Takes the greeting of every agent; all of them run on one host.
fn greet(ports: &[UnixStream]) -> Result<Host, LabError> {
    let mut host = None;
    for port in ports {
        port.set_read_timeout(Some(BOOT_LIMIT)).map_err(LabError::Connection)?;
        let hello = Frame::read(port).and_then(|frame| frame.parse::<Host>()).map_err(|error| match error
            .kind()
        {
            io::ErrorKind::WouldBlock => LabError::BootTimedOut(BOOT_LIMIT),
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => LabError::HostEnded,
            _ => LabError::Connection(error),
        })?;
        port.set_read_timeout(None).map_err(LabError::Connection)?;
        host.get_or_insert(hello);
    }
    host.ok_or(LabError::HostEnded)
}

/// Who waits for the daemon to be ready reads its standard output to the end.
fn silence_stdout() -> io::Result<()> {
    io::stdout().flush()?;
    let null = std::fs::OpenOptions::new().write(true).open("/dev/null")?;
    Ok(rustix::stdio::dup2_stdout(&null)?)
}

/// Takes everything away that the lab leaves on the machine.
struct Guard {
    paths: Paths,
    children: Vec<Child>,
}

impl Guard {
    fn ended(&mut self) -> Option<ExitStatus> {
        self.children.iter_mut().find_map(|child| child.try_wait().ok().flatten())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.paths.state("socket"));
        qemu::forget_disks(&self.paths);
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

struct Daemon {
    host: Host,
    mode: Mode,
    free: Mutex<Vec<UnixStream>>,
    returned: Condvar,
}

impl Daemon {
    fn serve(&self, client: UnixStream, stop: &std::sync::mpsc::Sender<UnixStream>) -> io::Result<()> {
        let request = Frame::read(&client)?;
        match request.kind {
            Kind::Status => Frame::json(Kind::Status, &(self.mode, &self.host))?.write(&client),
            Kind::Stop => {
                // The receiver is only gone when the lab is ending anyhow.
                let _ = stop.send(client);
                Ok(())
            }
            Kind::Start => {
                let port = self.take_port();
                let result = relay(&client, &port, &request);
                self.free.lock().unwrap_or_else(PoisonError::into_inner).push(port);
                self.returned.notify_one();
                result
            }
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Interrupts an emulated host. Its CPU was seen to sleep for minutes though tasks could run, until a device woke it.
    fn poke(&self) {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(port) = free.last() {
            // To an agent that has no job this means nothing. One that is gone is noticed by who wants it.
            let _ = Frame::new(Kind::Kill, []).write(port);
        }
    }

    fn take_port(&self) -> UnixStream {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match free.pop() {
                Some(port) => return port,
                None => free = self.returned.wait(free).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

/// Runs one job: everything from the client to the port, everything from the port to the client, until the job's exit
/// status came. Whatever happens to the client, the port is idle afterwards.
fn relay(client: &UnixStream, port: &UnixStream, start: &Frame) -> io::Result<()> {
    start.write(port)?;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Whole frames only: what a vanished client left half sent is dropped.
            while let Ok(frame) = Frame::read(client) {
                if frame.write(port).is_err() {
                    return;
                }
            }
            // To an agent that is done with the job this means nothing.
            let _ = Frame::new(Kind::Kill, []).write(port);
        });
        let mut delivered = Ok(());
        let ended = loop {
            let frame = match Frame::read(port) {
                Ok(frame) => frame,
                Err(error) => break Err(error),
            };
            if delivered.is_ok() {
                delivered = frame.write(client);
                if delivered.is_err() {
                    // Nobody reads any more: the other direction learns it and ends the job.
                    let _ = client.shutdown(Shutdown::Both);
                }
            }
            if frame.kind == Kind::Exit {
                break Ok(());
            }
        };
        // Ends the other direction; what was written to the client can still be read.
        let _ = client.shutdown(Shutdown::Both);
        ended.and(delivered)
    })
}
