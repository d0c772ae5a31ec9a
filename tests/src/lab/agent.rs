//! The agent: runs jobs on the lab's host, one after the other, as its port says.
//!
//! One process a port, single-threaded. It never blocks while a job runs: what the job does not take and what the port
//! does not take is kept here, within bounds, so that the order to end a job is always heard.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open, set_child_subreaper};

use super::process::{self, NotStarted, Streams};
use super::protocol::{CHUNK, Frame, Host, Job, Kind, VERSION};

/// No more of a job's output is read while this much waits for the port.
const OUTPUT_LIMIT: usize = 256 * 1024;

/// How long a killed job may take to be gone.
const END_LIMIT: Duration = Duration::from_secs(5);

/// Serves the port that is this process's standard input until the other side is gone.
pub fn serve() -> io::Result<()> {
    set_child_subreaper(Some(rustix::process::getpid()))?;
    let port = std::io::stdin().as_fd().try_clone_to_owned()?;
    // Jobs never see the port: its copy is closed on exec, and standard input is theirs.
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned();
    let env: Vec<(String, String)> = std::env::vars().filter(|(name, _)| name.starts_with("LAB_")).collect();
    let mut agent = Agent { port: Port::new(port)?, env: env.clone() };
    agent.port.send(Frame::json(Kind::Hello, &Host { version: VERSION, kernel, env })?);
    loop {
        agent.port.pump(&[], None)?;
        while let Some(frame) = agent.port.receive()? {
            if frame.kind == Kind::Start {
                agent.run(&frame.parse()?)?;
            }
        }
    }
}

struct Agent {
    port: Port,
    env: Vec<(String, String)>,
}

impl Agent {
    /// Runs one job to its end. An error is an error of the port: the agent cannot go on.
    fn run(&mut self, job: &Job) -> io::Result<()> {
        let status = match process::start(job, &self.env) {
            Ok((pid, streams)) => {
                let result = self.attend(pid, streams);
                if result.is_err() {
                    process::end_descendants(pid, &mut None, END_LIMIT);
                }
                result?
            }
            Err(NotStarted { status, reason }) => {
                self.port.send(Frame::new(Kind::Trouble, reason));
                status
            }
        };
        self.port.send(Frame::new(Kind::Exit, status.to_le_bytes()));
        Ok(())
    }

    /// Carries bytes between the port and the job until the job ended and all its output is under way.
    fn attend(&mut self, pid: Pid, mut streams: Streams) -> io::Result<i32> {
        let exited = pidfd_open(pid, PidfdFlags::empty())?;
        for stream in [&streams.stdin, &streams.stdout, &streams.stderr].into_iter().flatten() {
            set_nonblocking(stream)?;
        }
        let mut stdin = Stdin::default();
        let mut status = None;
        let mut end_of_output = None;
        loop {
            let room = self.port.output.len() < OUTPUT_LIMIT;
            let mut waits = Vec::new();
            if status.is_none() {
                waits.push((exited.as_fd(), PollFlags::IN));
            }
            for output in [&streams.stdout, &streams.stderr].into_iter().flatten().filter(|_| room) {
                waits.push((output.as_fd(), PollFlags::IN));
            }
            if let Some(input) = streams.stdin.as_ref().filter(|_| !stdin.bytes.is_empty()) {
                waits.push((input.as_fd(), PollFlags::OUT));
            }
            self.port.pump(&waits, Some(Duration::from_millis(500)))?;

            while let Some(frame) = self.port.receive()? {
                self.obey(&frame, pid, &streams, &mut stdin, &mut status);
            }
            stdin.give(&mut streams.stdin, &mut self.port);
            if room {
                collect(&mut streams.stdout, Kind::Stdout, &mut self.port);
                collect(&mut streams.stderr, Kind::Stderr, &mut self.port);
            }
            status = process::reap(pid).or(status);
            if let Some(code) = status {
                // What the command left behind would hold its streams open, and is part of the job anyhow.
                let deadline = *end_of_output.get_or_insert_with(|| {
                    if !process::end_descendants(pid, &mut None, END_LIMIT) {
                        self.port.send(Frame::new(Kind::Trouble, "processes of the job do not end"));
                    }
                    Instant::now() + END_LIMIT
                });
                let drained = streams.stdout.is_none() && streams.stderr.is_none();
                if drained || (room && Instant::now() > deadline) {
                    return Ok(code);
                }
            }
        }
    }

    fn obey(
        &mut self,
        frame: &Frame,
        pid: Pid,
        streams: &Streams,
        stdin: &mut Stdin,
        status: &mut Option<i32>,
    ) {
        match (frame.kind, frame.payload.as_slice()) {
            (Kind::Stdin, bytes) => stdin.bytes.extend(bytes),
            (Kind::StdinEnd, _) => stdin.ended = true,
            (Kind::Signal, &[number]) if status.is_none() => {
                if let Some(signal) = Signal::from_named_raw(number.into()) {
                    // The group may be gone already.
                    let _ = kill_process_group(pid, signal);
                }
            }
            (Kind::Resize, &[r0, r1, c0, c1]) => {
                if let Some(terminal) = &streams.terminal {
                    // A terminal of the wrong size is no reason to end a job.
                    let _ =
                        process::resize(terminal, u16::from_le_bytes([r0, r1]), u16::from_le_bytes([c0, c1]));
                }
            }
            (Kind::Kill, _) => {
                process::end_descendants(pid, status, END_LIMIT);
            }
            _ => {}
        }
    }
}

/// Standard input on its way to the job.
#[derive(Default)]
struct Stdin {
    bytes: VecDeque<u8>,
    ended: bool,
}

impl Stdin {
    /// Writes what the job takes, and tells the client that it may send as much again.
    fn give(&mut self, stream: &mut Option<OwnedFd>, port: &mut Port) {
        let mut taken = 0;
        while let Some(fd) = stream.as_ref().filter(|_| !self.bytes.is_empty()) {
            match rustix::io::write(fd, self.bytes.as_slices().0) {
                Ok(count) => {
                    self.bytes.drain(..count);
                    taken += count;
                }
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => break,
                // The job closed its input. As with a pipe on one machine, it is not told again.
                Err(_) => *stream = None,
            }
        }
        if stream.is_none() {
            taken += self.bytes.len();
            self.bytes.clear();
        }
        if let Ok(taken @ 1..) = u32::try_from(taken) {
            port.send(Frame::new(Kind::Credit, taken.to_le_bytes()));
        }
        if self.ended && self.bytes.is_empty() {
            *stream = None;
        }
    }
}

/// Reads what the job printed; closes the stream at its end.
fn collect(stream: &mut Option<OwnedFd>, kind: Kind, port: &mut Port) {
    let Some(fd) = stream else { return };
    let mut chunk = vec![0; CHUNK];
    match rustix::io::read(&*fd, &mut chunk) {
        Ok(0) => *stream = None,
        Ok(count) => {
            chunk.truncate(count);
            port.send(Frame::new(kind, chunk));
        }
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
        // A terminal whose last user is gone says EIO.
        Err(_) => *stream = None,
    }
}

fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    Ok(fcntl_setfl(fd, fcntl_getfl(fd)? | OFlags::NONBLOCK)?)
}

/// The port with what waits on either side of it.
struct Port {
    file: File,
    input: Vec<u8>,
    output: VecDeque<u8>,
    /// A virtio port says "hung up" until QEMU has opened its side; a socket only says so in the end.
    is_socket: bool,
}

impl Port {
    fn new(fd: OwnedFd) -> io::Result<Self> {
        set_nonblocking(&fd)?;
        let is_socket = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode).is_socket();
        Ok(Self { file: File::from(fd), input: Vec::new(), output: VecDeque::new(), is_socket })
    }

    fn send(&mut self, frame: Frame) {
        self.output.extend(frame.encode());
    }

    fn receive(&mut self) -> io::Result<Option<Frame>> {
        Frame::decode(&mut self.input)
    }

    /// Waits until the port or something else is ready, and moves bytes through the port.
    fn pump(&mut self, others: &[(BorrowedFd<'_>, PollFlags)], limit: Option<Duration>) -> io::Result<()> {
        let mut wanted = PollFlags::IN;
        if !self.output.is_empty() {
            wanted |= PollFlags::OUT;
        }
        let mut fds = vec![PollFd::new(&self.file, wanted)];
        fds.extend(others.iter().map(|(fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)));
        let timeout = limit.map(|limit| Timespec {
            tv_sec: limit.as_secs().cast_signed(),
            tv_nsec: limit.subsec_nanos().into(),
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready = fds[0].revents();
        if ready.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
            self.read(ready)?;
        }
        self.write()
    }

    fn read(&mut self, ready: PollFlags) -> io::Result<()> {
        let mut chunk = vec![0; CHUNK];
        match self.file.read(&mut chunk) {
            Ok(0) if self.is_socket => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(0) => {
                if ready.contains(PollFlags::HUP) {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Ok(())
            }
            Ok(count) => {
                self.input.extend(&chunk[..count]);
                Ok(())
            }
            Err(error) if again(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn write(&mut self) -> io::Result<()> {
        while !self.output.is_empty() {
            match self.file.write(self.output.as_slices().0) {
                Ok(count) => drop(self.output.drain(..count)),
                Err(error) if again(&error) => return Ok(()),
                // The same port that is not open yet.
                Err(error) if !self.is_socket && error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn again(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
