//! The client of the API.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::http::parse_response;

/// How long the VM may take for a part of its answer.
const TIMEOUT: Duration = Duration::from_secs(5);
/// The longest answer that is taken, in bytes: 24 shares with the largest window and all their files.
const MAX_ANSWER: u64 = 256 << 20;

/// Why there is no answer. The message names what to do.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody is there.
    #[error("No VM listens on {path}: give the path that `daxvm run --api-socket` was given")]
    NotThere {
        /// The path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The connection broke, or the answer took too long.
    #[error("The VM on {path} does not answer: has it ended?")]
    Broken {
        /// The path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The answer is none of the API's.
    #[error("What listens on {0} is no daxvm, or one of another version")]
    Strange(PathBuf),
    /// The VM refuses.
    #[error("The VM on {path} refuses: {message} (HTTP status {status})")]
    Refused {
        /// The path.
        path: PathBuf,
        /// The status code.
        status: u16,
        /// What it says.
        message: String,
    },
}

/// Asks the VM that listens on a socket for one of the API's paths; returns the text of the answer.
///
/// # Errors
/// See [`ClientError`].
pub fn get(socket: &Path, path: &str) -> Result<String, ClientError> {
    let broken = |source| ClientError::Broken { path: socket.to_owned(), source };
    let mut stream = UnixStream::connect(socket)
        .map_err(|source| ClientError::NotThere { path: socket.to_owned(), source })?;
    let ask = |stream: &mut UnixStream| {
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: daxvm\r\nConnection: close\r\n\r\n")?;
        let mut answer = Vec::new();
        stream.take(MAX_ANSWER).read_to_end(&mut answer)?;
        Ok(answer)
    };
    let answer = ask(&mut stream).map_err(broken)?;
    if answer.is_empty() {
        return Err(broken(io::ErrorKind::UnexpectedEof.into()));
    }
    let strange = || ClientError::Strange(socket.to_owned());
    let (status, body) = parse_response(&answer).ok_or_else(strange)?;
    let body = String::from_utf8(body.to_vec()).map_err(|_| strange())?;
    if status == 200 {
        return Ok(body);
    }
    let said = serde_json::from_str::<serde_json::Value>(&body).ok();
    let message = said.and_then(|said| Some(said["error"].as_str()?.to_owned())).unwrap_or(body);
    Err(ClientError::Refused { path: socket.to_owned(), status, message })
}
