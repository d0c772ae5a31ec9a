//! What the caller's standard streams are, and so what the command's are to be.

use std::os::fd::BorrowedFd;

use rustix::fs::{FileType, fstat, major, minor};
use rustix::stdio::{stderr, stdin, stdout};
use rustix::termios::{isatty, tcgetpgrp, tcgetwinsize};

use crate::guest::protocol::{Stdio, WindowSize};

/// What a standard stream of the caller is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stream {
    /// `/dev/null`, or closed: Rust's runtime opens `/dev/null` in the place of a closed stream.
    Null,
    /// A terminal.
    Terminal,
    /// A pipe, a file, a socket.
    Other,
}

/// The command's standard streams.
pub(super) fn of_caller() -> [Stdio; 3] {
    let input = match stream(stdin()) {
        // Who reads from the terminal in the background is stopped: a job there has no input.
        Stream::Terminal if !in_foreground() => Stream::Null,
        other => other,
    };
    kinds(input, stream(stdout()), stream(stderr()))
}

/// The rule: a pseudo-terminal, when somebody types and sees what comes of it. Otherwise every stream is a pipe.
fn kinds(input: Stream, output: Stream, error: Stream) -> [Stdio; 3] {
    let interactive = input == Stream::Terminal && [output, error].contains(&Stream::Terminal);
    [input, output, error].map(|stream| match stream {
        Stream::Null => Stdio::Null,
        Stream::Terminal if interactive => Stdio::Terminal,
        Stream::Terminal | Stream::Other => Stdio::Pipe,
    })
}

fn stream(fd: BorrowedFd) -> Stream {
    if isatty(fd) {
        return Stream::Terminal;
    }
    let is_null = |stat: rustix::fs::Stat| {
        FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
            && (major(stat.st_rdev), minor(stat.st_rdev)) == (1, 3)
    };
    if fstat(fd).is_ok_and(is_null) { Stream::Null } else { Stream::Other }
}

fn in_foreground() -> bool {
    // An error means that this is not our controlling terminal: then nobody stops us for reading.
    tcgetpgrp(stdin()).map_or(true, |group| group == rustix::process::getpgrp())
}

/// The size of the caller's terminal.
pub(super) fn window_size() -> Option<WindowSize> {
    let size = [stdin(), stdout(), stderr()].into_iter().find_map(|fd| tcgetwinsize(fd).ok())?;
    Some(WindowSize { rows: size.ws_row, columns: size.ws_col })
}

#[cfg(test)]
mod tests {
    use super::Stream::{Null, Other, Terminal};
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;

    #[test]
    fn a_terminal_needs_somebody_who_types_and_sees() {
        use Stdio::{Null as N, Pipe as P, Terminal as T};
        for (streams, expected) in [
            ([Terminal, Terminal, Terminal], [T, T, T]),
            ([Terminal, Other, Terminal], [T, P, T]),
            ([Terminal, Terminal, Null], [T, T, N]),
            ([Terminal, Other, Other], [P, P, P]),
            ([Other, Terminal, Terminal], [P, P, P]),
            ([Null, Terminal, Terminal], [N, P, P]),
            ([Null, Null, Null], [N, N, N]),
        ] {
            assert_eq!(kinds(streams[0], streams[1], streams[2]), expected, "{streams:?}");
        }
    }

    #[test]
    fn the_null_device_is_told_from_other_devices_and_files() {
        let kind = |path: &str| stream(File::open(path).unwrap().as_fd());
        assert_eq!(kind("/dev/null"), Null);
        assert_eq!(kind("/dev/zero"), Other);
        assert_eq!(kind("/proc/self/stat"), Other);
    }
}
