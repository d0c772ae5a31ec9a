//! The command from its start to its end: its streams, the runner's messages, its status.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::thread;

use rustix::io::Errno;
use rustix::process::{self, Pid, Signal, WaitOptions, WaitStatus};
use rustix::termios::{SpecialCodeIndex, tcgetattr, tcgetpgrp};

use super::command::{self, Running, Start, Terminal};
use super::protocol::{Command, FromGuest, Stdio, ToGuest};
use super::pump::{self, InputEnd, Order, Switch};
use super::{Failure, kernel};

/// The control port, which does not block.
pub struct Control(OwnedFd);

impl Control {
    /// Speaks and listens on `port`.
    pub fn new(port: impl Into<OwnedFd>) -> Control {
        Control(port.into())
    }

    /// Sends a message: it is in the port's queue on return.
    pub fn send(&self, message: &FromGuest) -> io::Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        pump::write_patiently(&self.0, &line)
    }

    /// Gives every message to `act`, until the other side ends or `switch` is set.
    fn receive(&self, switch: &Switch, mut act: impl FnMut(ToGuest)) -> io::Result<()> {
        let mut lines = Vec::new();
        let mut buffer = [0; 4096];
        while switch.readable(&self.0)? {
            match rustix::io::read(&self.0, &mut buffer) {
                Ok(0) => return Ok(()),
                Ok(len) => lines.extend_from_slice(&buffer[..len]),
                Err(Errno::AGAIN | Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            while let Some(end) = lines.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = lines.drain(..=end).collect();
                match serde_json::from_slice(&line) {
                    Ok(message) => act(message),
                    Err(error) => {
                        kernel::tell(&format_args!("a message from the runner makes no sense: {error}"))
                    }
                }
            }
        }
        Ok(())
    }
}

/// The ports of the standard streams, which do not block.
pub struct Streams {
    /// For those that [`Command::ports`] names.
    pub ports: [Option<OwnedFd>; 3],
    /// Whether pages can be spliced from pipes into them.
    pub splice: bool,
}

/// The switches of a session's threads.
struct Switches {
    control: Switch,
    input: Switch,
    outputs: [Switch; 2],
}

/// Runs the command to its end and gives the message that tells how it ended; its output is in the ports' queues then.
/// Processes that it has left behind do not prolong it.
///
/// # Errors
/// When the command's surroundings cannot be made.
pub fn run(command: &Command, control: &Control, streams: Streams) -> Result<FromGuest, Failure> {
    let failure = |error: io::Error| Failure::new("run the command", error);
    let switch = || Switch::new().map_err(failure);
    let switches = Switches { control: switch()?, input: switch()?, outputs: [switch()?, switch()?] };
    let running = match command::start(command)? {
        Start::Running(running) => running,
        Start::NotRun(message) => return Ok(message),
    };
    control.send(&FromGuest::Started).map_err(failure)?;
    let Running { pid, input, outputs: [output, error], terminal } = running;
    let [input_port, output_port, error_port] = streams.ports;
    let terminal = terminal.as_ref();
    // The terminal's output goes to one port only.
    let of_terminal = |stream: usize| terminal.filter(|_| command.stdio[stream] == Stdio::Terminal);
    let status = thread::scope(|scope| {
        scope.spawn(|| {
            let act = |message| act(&message, pid, command, terminal, &switches);
            told("control", control.receive(&switches.control, act));
        });
        if let Some(port) = input_port {
            scope.spawn(|| told("input", feed(port, input, of_terminal(0), &switches.input)));
        }
        let mut pumps = Vec::new();
        for (i, (port, end)) in [(output_port, output), (error_port, error)].into_iter().enumerate() {
            let switch = &switches.outputs[i];
            match (port, end, of_terminal(i + 1)) {
                (Some(port), Some(end), _) => {
                    let splice = streams.splice;
                    pumps
                        .push(scope.spawn(move || told("output", pump::output(&end, &port, switch, splice))));
                }
                (Some(port), None, Some(terminal)) => {
                    pumps.push(scope.spawn(move || {
                        told("terminal", pump::output(&terminal.master, &port, switch, false))
                    }))
                }
                _ => {}
            }
        }
        let status = wait_for(pid);
        switches.input.set(Order::Close);
        switches.outputs.iter().for_each(|switch| switch.set(Order::Drain));
        for pump in pumps {
            // A pump that has panicked has said so on the console.
            let _ = pump.join();
        }
        switches.control.set(Order::Close);
        status
    });
    status.map(outcome).map_err(|error| Failure::new("wait for the command", error))
}

/// Says on the console what went wrong with a stream: for the command it looks closed.
fn told(stream: &str, result: io::Result<()>) {
    if let Err(error) = result {
        kernel::tell(&format_args!("the {stream} stream is closed: {error}"));
    }
}

/// Gives the input to a pipe, which is closed at its end, or to a terminal.
fn feed(
    port: OwnedFd,
    pipe: Option<OwnedFd>,
    terminal: Option<&Terminal>,
    switch: &Switch,
) -> io::Result<()> {
    match (pipe, terminal) {
        (Some(pipe), _) => pump::input(&port, &pipe, switch).map(drop),
        (None, Some(terminal)) => match pump::input(&port, &terminal.master, switch)? {
            InputEnd::End { line } => type_end(terminal, line),
            InputEnd::Stopped => Ok(()),
        },
        (None, None) => Ok(()),
    }
}

/// Types the character that ends a terminal's input, as script(1) does: twice when a line has begun, since the first
/// then only ends the line.
fn type_end(terminal: &Terminal, line: bool) -> io::Result<()> {
    let end = tcgetattr(&terminal.master)?.special_codes[SpecialCodeIndex::VEOF];
    pump::write_patiently(&terminal.master, &[end, end][..if line { 1 } else { 2 }])
}

fn act(message: &ToGuest, pid: Pid, command: &Command, terminal: Option<&Terminal>, switches: &Switches) {
    match *message {
        ToGuest::Signal { signal } => {
            if let Some(signal) = Signal::from_named_raw(signal) {
                send_signal(signal, pid, terminal);
            }
        }
        ToGuest::Window(size) => {
            if let Some(terminal) = terminal {
                told("terminal", terminal.resize(size));
            }
        }
        ToGuest::OutputClosed { stream } => {
            let index = usize::from(stream);
            match (command.stdio.get(index), index.checked_sub(1).and_then(|i| switches.outputs.get(i))) {
                (Some(Stdio::Terminal), _) => send_signal(Signal::HUP, pid, terminal),
                (_, Some(switch)) => switch.set(Order::Close),
                _ => {}
            }
        }
    }
}

/// Signals the command's process group, and that which has the terminal.
fn send_signal(signal: Signal, pid: Pid, terminal: Option<&Terminal>) {
    // A group without processes has no use for a signal.
    let _ = process::kill_process_group(pid, signal);
    let foreground = terminal.and_then(|terminal| tcgetpgrp(terminal.master.as_fd()).ok());
    if let Some(group) = foreground.filter(|&group| group != pid) {
        let _ = process::kill_process_group(group, signal);
    }
}

/// Waits for the command's end. PID 1 takes care of orphans meanwhile; any other process leaves its children alone.
fn wait_for(command: Pid) -> io::Result<WaitStatus> {
    let is_init = std::process::id() == 1;
    let next = || {
        let options = WaitOptions::empty();
        if is_init { process::wait(options) } else { process::waitpid(Some(command), options) }
    };
    loop {
        match next() {
            Ok(Some((pid, status))) if pid == command => return Ok(status),
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn outcome(status: WaitStatus) -> FromGuest {
    match status.terminating_signal() {
        Some(signal) => FromGuest::Signaled { signal },
        None => FromGuest::Exited { status: status.exit_status().unwrap_or_default() as u8 },
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::fs;
    use std::io::{BufRead, BufReader, Read, Write};
    use std::net::Shutdown;
    use std::os::unix::net::UnixStream;
    use std::thread::JoinHandle;
    use std::time::{Duration, Instant};

    use super::super::namespace;
    use super::super::protocol::WindowSize;
    use super::*;

    const PIPES: [Stdio; 3] = [Stdio::Pipe; 3];
    const TERMINAL: [Stdio; 3] = [Stdio::Terminal; 3];

    fn command(argv: &[&str], stdio: [Stdio; 3]) -> Command {
        let path = std::env::var_os("PATH").unwrap();
        Command {
            argv: argv.iter().map(OsString::from).collect(),
            env: vec![("PATH".into(), path), ("TERM".into(), "dumb".into())],
            directory: "/".into(),
            stdio,
            window: Some(WindowSize { rows: 24, columns: 80 }),
        }
    }

    fn shell(script: &str, stdio: [Stdio; 3]) -> Command {
        command(&["/bin/sh", "-c", script], stdio)
    }

    /// A session with sockets for ports, and their other ends.
    struct Session {
        control: BufReader<UnixStream>,
        stdin: Option<UnixStream>,
        stdout: Option<UnixStream>,
        stderr: Option<UnixStream>,
        run: JoinHandle<Result<FromGuest, Failure>>,
    }

    fn socket() -> (UnixStream, OwnedFd) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        (ours, theirs.into())
    }

    impl Session {
        fn start(command: Command, splice: bool) -> Session {
            let (control, port) = socket();
            let port = Control::new(port);
            let sockets = command.ports().map(|name| name.map(|_| socket()));
            let mut ports = [None, None, None];
            let mut ends = [const { None }; 3];
            for (i, pair) in sockets.into_iter().enumerate() {
                (ends[i], ports[i]) = pair.unzip();
            }
            let [stdin, stdout, stderr] = ends;
            let run = thread::spawn(move || run(&command, &port, Streams { ports, splice }));
            Session { control: BufReader::new(control), stdin, stdout, stderr, run }
        }

        fn tell(&mut self, message: &ToGuest) {
            let mut line = serde_json::to_vec(message).unwrap();
            line.push(b'\n');
            self.control.get_mut().write_all(&line).unwrap();
        }

        fn hear(&mut self) -> FromGuest {
            let mut line = String::new();
            self.control.read_line(&mut line).unwrap();
            serde_json::from_str(&line).unwrap()
        }

        fn end(self) -> FromGuest {
            self.run.join().unwrap().unwrap()
        }

        /// Output up to and with `text`.
        fn read_until(&mut self, text: &str) -> String {
            let (mut seen, mut byte) = (Vec::new(), [0]);
            while !seen.ends_with(text.as_bytes()) {
                assert_eq!(self.stdout.as_mut().unwrap().read(&mut byte).unwrap(), 1, "{seen:?}");
                seen.push(byte[0]);
            }
            String::from_utf8(seen).unwrap()
        }

        fn read_all(&mut self) -> String {
            let mut text = String::new();
            self.stdout.as_mut().unwrap().read_to_string(&mut text).unwrap();
            text
        }
    }

    /// What a command prints, and how it ends.
    fn output(command: Command) -> (String, FromGuest) {
        let mut session = Session::start(command, true);
        drop(session.stdin.take());
        (session.read_all(), session.end())
    }

    #[test]
    fn sixteen_mebibytes_come_back_from_cat_as_they_were() {
        let data: Vec<u8> = (0..16_u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        for splice in [true, false] {
            let mut session = Session::start(command(&["cat"], PIPES), splice);
            assert_eq!(session.hear(), FromGuest::Started);
            let (mut stdin, data_in) = (session.stdin.take().unwrap(), data.clone());
            let writer = thread::spawn(move || {
                stdin.write_all(&data_in).unwrap();
                stdin.shutdown(Shutdown::Write).unwrap();
            });
            let mut back = Vec::new();
            session.stdout.as_mut().unwrap().read_to_end(&mut back).unwrap();
            writer.join().unwrap();
            assert!(back == data, "{} bytes, splice {splice}", back.len());
            assert_eq!(session.end(), FromGuest::Exited { status: 0 });
        }
    }

    #[test]
    fn output_and_error_are_kept_apart() {
        let mut session = Session::start(shell("echo out; echo err >&2", PIPES), true);
        assert_eq!(session.read_all(), "out\n");
        let mut error = String::new();
        session.stderr.as_mut().unwrap().read_to_string(&mut error).unwrap();
        assert_eq!(error, "err\n");
    }

    #[test]
    fn a_slow_reader_gets_all_output_of_a_command_that_has_ended() {
        for splice in [true, false] {
            let size = (3 * pump::PIPE_SIZE).to_string();
            let mut session = Session::start(command(&["head", "-c", &size, "/dev/zero"], PIPES), splice);
            thread::sleep(Duration::from_millis(300));
            assert_eq!(session.read_all().len(), 3 * pump::PIPE_SIZE);
            assert_eq!(session.end(), FromGuest::Exited { status: 0 });
        }
    }

    #[test]
    fn a_writer_whose_reader_has_gone_gets_sigpipe() {
        let mut session = Session::start(command(&["yes"], PIPES), true);
        session.read_until("y\ny\n");
        // The queue is full and stays so, as when a device no longer takes anything.
        thread::sleep(Duration::from_millis(100));
        session.tell(&ToGuest::OutputClosed { stream: 1 });
        assert_eq!(session.end(), FromGuest::Signaled { signal: libc::SIGPIPE });
    }

    #[test]
    fn statuses_and_signals_are_told_apart() {
        assert_eq!(output(shell("exit 7", PIPES)).1, FromGuest::Exited { status: 7 });
        assert_eq!(output(shell("exit 137", PIPES)).1, FromGuest::Exited { status: 137 });
        assert_eq!(output(shell("kill -9 $$", PIPES)).1, FromGuest::Signaled { signal: libc::SIGKILL });
    }

    #[test]
    fn signals_that_are_ignored_here_are_not_in_the_command() {
        // SAFETY: no handler is installed, and nothing else in these tests uses this signal.
        unsafe { libc::signal(libc::SIGUSR2, libc::SIG_IGN) };
        assert_eq!(output(shell("kill -USR2 $$", PIPES)).1, FromGuest::Signaled { signal: libc::SIGUSR2 });
    }

    #[test]
    fn what_cannot_be_run_is_told_as_a_shell_does() {
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("script");
        fs::write(&script, "#!/nonexistent/interpreter\n").unwrap();
        rustix::fs::chmod(&script, 0o755.into()).unwrap();
        for (program, expected, part) in [
            ("no-such-program", 127, "along PATH="),
            ("/no/such/program", 127, "not found"),
            ("", 127, "not found"),
            ("/etc/passwd", 126, "not executable"),
            ("/etc", 126, "not executable"),
            (script.to_str().unwrap(), 126, "interpreter"),
        ] {
            match output(command(&[program], PIPES)).1 {
                FromGuest::NotRun { status, error } => {
                    assert_eq!(status, expected, "{program}: {error}");
                    assert!(error.contains(part), "{error}");
                }
                other => panic!("{program}: {other:?}"),
            }
        }
    }

    #[test]
    fn the_environment_is_the_tasks_and_a_missing_directory_is_the_root() {
        let mut task = command(&["env"], PIPES);
        task.env.push(("A B".into(), "c=d\ne".into()));
        let path = std::env::var("PATH").unwrap();
        let (text, _) = output(task);
        assert_eq!(text, format!("A B=c=d\ne\nPATH={path}\nTERM=dumb\n"));
        for (directory, expected) in [("/usr", "/usr\n"), ("/nonexistent", "/\n")] {
            let task = Command { directory: directory.into(), ..command(&["pwd"], PIPES) };
            assert_eq!(output(task).0, expected);
        }
    }

    #[test]
    fn a_null_stream_is_empty() {
        let mut task = shell("cat; echo lost >&2; readlink /proc/self/fd/0", PIPES);
        task.stdio = [Stdio::Null, Stdio::Pipe, Stdio::Null];
        assert_eq!(output(task), ("/dev/null\n".to_owned(), FromGuest::Exited { status: 0 }));
    }

    #[test]
    fn the_command_has_no_descriptors_but_its_streams() {
        // Those that whoever runs the tests has left open are nobody's fault here.
        let inherited: Vec<String> = fs::read_dir("/proc/self/fd")
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|fd| {
                let info = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap_or_default();
                let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
                let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
                flags.is_some_and(|flags| flags & libc::O_CLOEXEC == 0)
            })
            .collect();
        let (listed, _) = output(shell("ls /proc/$$/fd", PIPES));
        let new: Vec<&str> = listed.lines().filter(|&fd| !inherited.iter().any(|old| old == fd)).collect();
        assert!(new.iter().all(|fd| ["0", "1", "2"].contains(fd)), "{new:?} beside {inherited:?}");
    }

    #[test]
    fn a_child_that_is_left_behind_does_not_prolong_the_session() {
        let start = Instant::now();
        let (text, end) = output(shell("sleep 30 & echo $!; exit 3", PIPES));
        assert_eq!(end, FromGuest::Exited { status: 3 });
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
        let sleep = Pid::from_raw(text.trim().parse().unwrap()).unwrap();
        process::kill_process(sleep, Signal::KILL).unwrap();
    }

    #[test]
    fn a_child_that_writes_for_ever_does_not_prolong_the_session() {
        let mut session = Session::start(shell("yes & echo $!; exit 3", PIPES), true);
        let mut lines = BufReader::new(session.stdout.take().unwrap());
        let mut first = String::new();
        while first.trim().parse::<i32>().is_err() {
            first.clear();
            assert!(lines.read_line(&mut first).unwrap() > 0);
        }
        std::io::copy(&mut lines, &mut std::io::sink()).unwrap();
        assert_eq!(session.end(), FromGuest::Exited { status: 3 });
        // It got SIGPIPE when the session ended.
        let yes = Pid::from_raw(first.trim().parse().unwrap()).unwrap();
        let gone = || fs::read_to_string(format!("/proc/{}/stat", yes.as_raw_nonzero()));
        let start = Instant::now();
        while gone().is_ok_and(|stat| !stat.contains(") Z ")) {
            assert!(start.elapsed() < Duration::from_secs(20), "yes still runs");
            thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn input_that_nobody_reads_holds_nothing_up() {
        for script in ["true", "exec <&-; sleep 0.1; echo done"] {
            let mut session = Session::start(shell(script, PIPES), true);
            let mut stdin = session.stdin.take().unwrap();
            // It ends with an error when the port is closed.
            let writer = thread::spawn(move || stdin.write_all(&vec![0; 4 << 20]).is_err());
            assert_eq!(session.end(), FromGuest::Exited { status: 0 });
            assert!(writer.join().unwrap());
        }
    }

    #[test]
    fn signals_reach_the_command_and_its_children() {
        let script = "trap 'echo parent; wait; exit 3' TERM\n\
                      sh -c 'trap \"echo child; exit\" TERM; echo ready; while :; do sleep 0.05; done' &\n\
                      while :; do sleep 0.05; done";
        let mut session = Session::start(shell(script, PIPES), true);
        session.read_until("ready\n");
        session.tell(&ToGuest::Signal { signal: libc::SIGTERM });
        let text = session.read_all();
        assert!(text.contains("parent\n") && text.contains("child\n"), "{text}");
        assert_eq!(session.end(), FromGuest::Exited { status: 3 });
    }

    #[test]
    fn nonsense_on_the_control_port_does_no_harm() {
        let mut session = Session::start(command(&["cat"], PIPES), true);
        session.control.get_mut().write_all(b"{}\n\n\xff\n").unwrap();
        session.tell(&ToGuest::OutputClosed { stream: 9 });
        session.tell(&ToGuest::Signal { signal: 9999 });
        session.tell(&ToGuest::Signal { signal: libc::SIGINT });
        assert_eq!(session.end(), FromGuest::Signaled { signal: libc::SIGINT });
    }

    #[test]
    fn a_terminal_has_a_size_that_changes() {
        let script = "trap 'stty size; exit 0' WINCH; stty size; echo ready; while :; do sleep 0.05; done";
        let mut session = Session::start(shell(script, TERMINAL), true);
        assert_eq!(session.read_until("ready\r\n"), "24 80\r\nready\r\n");
        session.tell(&ToGuest::Window(WindowSize { rows: 50, columns: 132 }));
        assert_eq!(session.read_all(), "50 132\r\n");
        assert_eq!(session.end(), FromGuest::Exited { status: 0 });
    }

    #[test]
    fn a_terminal_is_the_controlling_one_and_ctrl_c_is_its_interrupt() {
        let script =
            "trap 'echo interrupted; exit 4' INT; echo ready >/dev/tty; while :; do sleep 0.05; done";
        let mut session = Session::start(shell(script, TERMINAL), true);
        session.read_until("ready\r\n");
        session.stdin.as_mut().unwrap().write_all(b"\x03").unwrap();
        assert_eq!(session.read_all(), "^Cinterrupted\r\n");
        assert_eq!(session.end(), FromGuest::Exited { status: 4 });
    }

    #[test]
    fn the_end_of_a_terminals_input_is_the_end_of_file() {
        for (typed, expected) in [("", ""), ("abc\n", "abc\r\nabc\r\n"), ("abc", "abcabc")] {
            let mut session = Session::start(command(&["cat"], TERMINAL), true);
            let stdin = session.stdin.as_mut().unwrap();
            stdin.write_all(typed.as_bytes()).unwrap();
            stdin.shutdown(Shutdown::Write).unwrap();
            // `^D` is echoed, and erased.
            let shown = session.read_all().replace("^D\u{8}\u{8}", "");
            assert_eq!(shown, expected, "{typed:?}");
            assert_eq!(session.end(), FromGuest::Exited { status: 0 });
        }
    }

    #[test]
    fn a_terminal_that_nobody_sees_any_more_is_hung_up() {
        let mut session = Session::start(command(&["cat"], TERMINAL), true);
        assert_eq!(session.hear(), FromGuest::Started);
        session.tell(&ToGuest::OutputClosed { stream: 1 });
        assert_eq!(session.end(), FromGuest::Signaled { signal: libc::SIGHUP });
    }

    #[test]
    fn output_that_is_no_terminal_stays_a_pipe_beside_one() {
        let stdio = [Stdio::Terminal, Stdio::Pipe, Stdio::Terminal];
        let mut session = Session::start(shell("echo pipe; echo terminal >&2", stdio), true);
        assert_eq!(session.read_all(), "pipe\n");
        let mut error = String::new();
        session.stderr.as_mut().unwrap().read_to_string(&mut error).unwrap();
        assert_eq!(error, "terminal\r\n");
    }

    /// The rest of this test ends all processes that it sees: it is PID 1 of a namespace.
    #[test]
    fn pid_1_reaps_orphans_and_leaves_no_process_behind() {
        namespace::run("guest::session::tests::as_pid_1", &["--mount", "--pid", "--fork", "--mount-proc"]);
    }

    #[test]
    #[ignore = "it is run by pid_1_reaps_orphans_and_leaves_no_process_behind, in a namespace"]
    fn as_pid_1() {
        assert_eq!(std::process::id(), 1);
        let script = "sh -c 'sleep 0.05 & sleep 0.05 &'; sleep 0.5; grep -l ') Z' /proc/[0-9]*/stat\n\
                      sleep 60 &\n\
                      setsid sh -c 'trap \"\" TERM; echo deaf; while :; do sleep 0.05; done' &\n\
                      sleep 0.2; exit 5";
        let start = Instant::now();
        let mut task = shell(script, PIPES);
        task.stdio[2] = Stdio::Null;
        assert_eq!(output(task), ("deaf\n".to_owned(), FromGuest::Exited { status: 5 }));
        super::super::end::stop_processes();
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
        assert_eq!(process::wait(WaitOptions::empty()).unwrap_err(), Errno::CHILD);
    }
}
