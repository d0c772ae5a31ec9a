//! The server: one thread that waits for nobody.
//!
//! All sockets are non-blocking and one poll(2) waits for all of them. A client has [`PATIENCE`] from its connection to the
//! last byte of the answer, and when there are [`MAX_CONNECTIONS`] of them the one that has been there longest makes room
//! for a new one. So clients that are slow, silent or many cost a little memory, and take nothing from the others.

use std::io::{self, ErrorKind, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::http::{MAX_REQUEST, Parsed, parse};
use super::probe::Probe;
use super::routes::{Routes, error};
use super::socket::ApiSocket;
use crate::sandbox::seccomp::{self, Kind};

/// Clients that are served at the same time.
const MAX_CONNECTIONS: usize = 32;
/// How long a client may take for all of it.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the thread rests when the system refuses to accept a connection (no descriptors left).
const REST: Duration = Duration::from_millis(100);

/// Answers on a socket until it is dropped; then the socket is gone from the file system.
pub struct Server {
    /// Closing it ends the thread.
    alive: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
    _socket: ApiSocket,
}

impl Server {
    /// Starts thread `api`.
    ///
    /// # Errors
    /// The system refuses a thread or a descriptor.
    pub fn start(socket: ApiSocket, probe: Probe) -> io::Result<Server> {
        let listener = socket.listener().try_clone()?;
        listener.set_nonblocking(true)?;
        let (end, alive) = io::pipe()?;
        let serving =
            Serving { listener, end, routes: Routes::new(probe), connections: Vec::new(), rest_until: None };
        let thread = thread::Builder::new().name("api".into()).spawn(move || {
            seccomp::enter(Kind::Observer);
            serving.run();
        })?;
        Ok(Server { alive: Some(alive), thread: Some(thread), _socket: socket })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.alive.take());
        if let Some(thread) = self.thread.take() {
            // A panic has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

struct Serving {
    listener: UnixListener,
    /// Hangs up when it is time to end.
    end: PipeReader,
    routes: Routes,
    /// Those that came first are first.
    connections: Vec<Connection>,
    rest_until: Option<Instant>,
}

struct Connection {
    stream: UnixStream,
    deadline: Instant,
    state: State,
}

enum State {
    /// What has come of the request.
    Reading(Vec<u8>),
    /// The answer, and how much of it has gone.
    Writing(Vec<u8>, usize),
    Done,
}

impl Serving {
    fn run(mut self) {
        loop {
            match self.turn() {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    tracing::warn!(%error, "The API socket answers no more");
                    return;
                }
            }
        }
    }

    /// Waits, and does what there is to do. False when it is time to end.
    fn turn(&mut self) -> io::Result<bool> {
        let now = Instant::now();
        self.rest_until = self.rest_until.filter(|until| *until > now);
        let deadlines = self.connections.iter().map(|connection| connection.deadline);
        let wait = deadlines.chain(self.rest_until).min().map(|until| until.saturating_duration_since(now));
        let (stopped, incoming, ready) = self.wait(wait)?;
        if stopped {
            return Ok(false);
        }
        let now = Instant::now();
        for (connection, ready) in self.connections.iter_mut().zip(ready) {
            if ready {
                connection.go_on(&mut self.routes);
            }
            if connection.deadline <= now {
                connection.state = State::Done;
            }
        }
        self.connections.retain(|connection| !matches!(connection.state, State::Done));
        if incoming {
            self.accept();
        }
        Ok(true)
    }

    /// Waits for the order to end, a new client, and those that are there.
    fn wait(&self, wait: Option<Duration>) -> io::Result<(bool, bool, Vec<bool>)> {
        let wanted = |connection: &Connection| match connection.state {
            State::Writing(..) => PollFlags::OUT,
            _ => PollFlags::IN,
        };
        let accepting = if self.rest_until.is_some() { PollFlags::empty() } else { PollFlags::IN };
        let mut fds = vec![PollFd::new(&self.end, PollFlags::IN), PollFd::new(&self.listener, accepting)];
        fds.extend(
            self.connections
                .iter()
                .map(|connection| PollFd::from_borrowed_fd(connection.stream.as_fd(), wanted(connection))),
        );
        let timeout = wait.and_then(|wait| Timespec::try_from(wait).ok());
        match poll(&mut fds, timeout.as_ref()) {
            Err(error) if error != rustix::io::Errno::INTR => return Err(error.into()),
            _ => {}
        }
        let is_ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
        Ok((is_ready(&fds[0]), is_ready(&fds[1]), fds[2..].iter().map(is_ready).collect()))
    }

    fn accept(&mut self) {
        // Those that wait behind so many have their turn after the others.
        for _ in 0..MAX_CONNECTIONS {
            match self.listener.accept() {
                Ok((stream, _)) if stream.set_nonblocking(true).is_ok() => {
                    if self.connections.len() >= MAX_CONNECTIONS {
                        self.connections.remove(0);
                    }
                    let deadline = Instant::now() + PATIENCE;
                    self.connections.push(Connection { stream, deadline, state: State::Reading(Vec::new()) });
                }
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => {
                    tracing::debug!(%error, "The API socket accepts nobody");
                    self.rest_until = Some(Instant::now() + REST);
                    return;
                }
            }
        }
    }
}

impl Connection {
    /// Reads or writes what it can.
    fn go_on(&mut self, routes: &mut Routes) {
        if let State::Reading(request) = &mut self.state {
            let mut buffer = [0; MAX_REQUEST];
            let room = MAX_REQUEST - request.len();
            match self.stream.read(&mut buffer[..room]) {
                Ok(0) => self.state = State::Done,
                Ok(read) => {
                    request.extend_from_slice(&buffer[..read]);
                    if let Some(answer) = answer(request, routes) {
                        self.state = State::Writing(answer, 0);
                    }
                }
                Err(error) => self.give_up_unless_later(&error),
            }
        }
        if let State::Writing(answer, gone) = &mut self.state {
            match self.stream.write(&answer[*gone..]) {
                Ok(written) => {
                    *gone += written;
                    if *gone == answer.len() {
                        self.state = State::Done;
                    }
                }
                Err(error) => self.give_up_unless_later(&error),
            }
        }
    }

    fn give_up_unless_later(&mut self, error: &io::Error) {
        if !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) {
            self.state = State::Done;
        }
    }
}

/// The answer to what has come of a request, if that is enough for one.
fn answer(request: &[u8], routes: &mut Routes) -> Option<Vec<u8>> {
    match parse(request) {
        Parsed::Incomplete => None,
        Parsed::Request { method, target } => {
            Some(routes.answer(&method, &target).to_bytes(method != "HEAD"))
        }
        Parsed::Malformed => Some(error((400, "Bad Request"), "this is no HTTP/1.1 request").to_bytes(true)),
        Parsed::TooLarge => {
            let status = (431, "Request Header Fields Too Large");
            Some(
                error(status, "the request is too large: 8 KiB and 64 header fields are enough")
                    .to_bytes(true),
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::super::client::{ClientError, get};
    use super::super::model::{Status, Windows};
    use super::super::probe::testing::{Machine, machine};
    use super::*;

    /// A server for the counters of devices that nobody runs.
    struct Test {
        _machine: Machine,
        directory: tempfile::TempDir,
        server: Option<Server>,
    }

    impl Test {
        fn new() -> Test {
            let directory = tempfile::tempdir().unwrap();
            let machine = machine();
            let socket = ApiSocket::bind(&directory.path().join("api")).unwrap();
            let server = Server::start(socket, machine.probe.clone()).unwrap();
            Test { _machine: machine, directory, server: Some(server) }
        }

        fn path(&self) -> std::path::PathBuf {
            self.directory.path().join("api")
        }

        fn connect(&self) -> UnixStream {
            UnixStream::connect(self.path()).unwrap()
        }

        fn raw(&self, request: &[u8]) -> String {
            let mut stream = self.connect();
            stream.write_all(request).unwrap();
            let mut answer = String::new();
            // The server closes without having read all, of which the system tells the client behind the answer.
            let _ = stream.read_to_string(&mut answer);
            answer
        }
    }

    #[test]
    fn every_path_answers() {
        let test = Test::new();
        let text = |path| get(&test.path(), path).unwrap();
        let status: Status = serde_json::from_str(&text("/v1/status")).unwrap();
        assert_eq!((status.state.as_str(), status.cpus, status.pid), ("running", 3, std::process::id()));
        assert_eq!(status.shares.iter().map(|share| share.window).collect::<Vec<_>>(), [64 << 20, 0]);
        let windows: Windows = serde_json::from_str(&text("/v1/window?x=y")).unwrap();
        assert_eq!(windows.shares.len(), 1);
        assert_eq!(windows.shares[0].chunks, [0; 32]);
        let files: serde_json::Value = serde_json::from_str(&text("/v1/files")).unwrap();
        assert_eq!(files["shares"][0]["files"], serde_json::json!([]));
        let report: serde_json::Value = serde_json::from_str(&text("/v1/report")).unwrap();
        assert_eq!(report["shares"][1]["tag"], "without");
        assert!(text("/metrics").ends_with("# EOF\n"));
    }

    #[test]
    fn mistakes_are_told() {
        let test = Test::new();
        let error = get(&test.path(), "/v2").unwrap_err();
        assert!(matches!(&error, ClientError::Refused { status: 404, .. }), "{error}");
        assert!(error.to_string().contains("/v1/status"), "{error}");
        let posted = test.raw(b"POST /v1/status HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc");
        assert!(
            posted.starts_with("HTTP/1.1 405 ") && posted.contains("\r\nAllow: GET, HEAD\r\n"),
            "{posted}"
        );
        assert!(test.raw(b"hello\r\n\r\n").starts_with("HTTP/1.1 400 "));
        assert!(test.raw(&[b'A'; 2 * MAX_REQUEST]).starts_with("HTTP/1.1 4"));
        let head = test.raw(b"HEAD /v1/status HTTP/1.1\r\n\r\n");
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.ends_with("\r\n\r\n"), "{head}");
    }

    #[test]
    fn silent_clients_make_room_for_others() {
        let test = Test::new();
        let silent: Vec<_> = (0..3 * MAX_CONNECTIONS).map(|_| test.connect()).collect();
        let mut slow = test.connect();
        slow.write_all(b"GET /v1/sta").unwrap();
        let start = Instant::now();
        for _ in 0..MAX_CONNECTIONS / 2 {
            get(&test.path(), "/v1/status").unwrap();
        }
        assert!(start.elapsed() < PATIENCE, "nobody waited for the silent ones");
        slow.write_all(b"tus HTTP/1.1\r\n\r\n").unwrap();
        let mut answer = String::new();
        slow.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        drop(silent);
    }

    #[test]
    fn a_client_that_takes_too_long_is_let_go() {
        let test = Test::new();
        let mut stream = test.connect();
        let start = Instant::now();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        assert!(answer.is_empty() && start.elapsed() >= PATIENCE);
    }

    #[test]
    fn the_socket_goes_with_the_server() {
        let mut test = Test::new();
        let idle = test.connect();
        drop(test.server.take());
        assert!(!test.path().exists());
        let error = get(&test.path(), "/v1/status").unwrap_err();
        assert!(error.to_string().contains("--api-socket"), "{error}");
        drop(idle);
    }
}
