//! The socket in the file system: made for its owner alone, taken over from one that died, never from one that lives,
//! and removed at the end.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, fchmod, flock};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};

/// Bytes that the path of a Unix socket may have (unix(7), sun_path with its final NUL).
const MAX_PATH: usize = 107;
/// Clients that may wait to be accepted.
const BACKLOG: i32 = 64;
/// How long another process that takes a socket in the same directory is waited for.
const TAKING: Duration = Duration::from_secs(1);

/// Why there is no API socket. The message names what to do.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The path is too long for the system.
    #[error(
        "--api-socket {0}: the path of a socket has at most {MAX_PATH} bytes; choose a shorter one, such as one in /run"
    )]
    TooLong(PathBuf),
    /// Somebody listens on it.
    #[error(
        "--api-socket {0}: another process listens on this socket; choose another path, or end that process first"
    )]
    InUse(PathBuf),
    /// There is something else.
    #[error("--api-socket {0}: there is a file that is no socket; choose another path, or remove it first")]
    NotASocket(PathBuf),
    /// The system refuses.
    #[error(
        "--api-socket {path}: cannot make the socket; choose a path in a directory that exists and that you may write to"
    )]
    Make {
        /// The path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// The sockets of this process, for the ways out on which nothing is dropped.
static SOCKETS: Mutex<Vec<Place>> = Mutex::new(Vec::new());

/// A socket that listens; nobody but its owner and root can connect (mode 0600). It is removed when it is dropped.
#[derive(Debug)]
pub struct ApiSocket {
    listener: UnixListener,
    place: Place,
}

/// Where a socket is, and which one it is, so that no other is removed that came after it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl ApiSocket {
    /// Makes a socket, in place of one on which nobody listens any more.
    ///
    /// # Errors
    /// See [`SocketError`].
    pub fn bind(path: &Path) -> Result<ApiSocket, SocketError> {
        if path.as_os_str().len() > MAX_PATH {
            return Err(SocketError::TooLong(path.to_owned()));
        }
        let failed = |source| SocketError::Make { path: path.to_owned(), source };
        let address = SocketAddrUnix::new(path).map_err(|error| failed(error.into()))?;
        let _turn = take_turn(path);
        make_room(path)?;
        let make = || {
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
            // The file gets the mode that the socket has, so there is no moment in which others can connect.
            fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
            bind(&socket, &address)?;
            // Only from now on is there something to remove.
            let place = Place::of(path)?;
            SOCKETS.lock().unwrap_or_else(PoisonError::into_inner).push(place.clone());
            let made = ApiSocket { listener: UnixListener::from(socket), place };
            listen(&made.listener, BACKLOG)?;
            Ok(made)
        };
        make().map_err(failed)
    }

    /// The listening socket.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for ApiSocket {
    fn drop(&mut self) {
        self.place.remove();
        SOCKETS.lock().unwrap_or_else(PoisonError::into_inner).retain(|place| *place != self.place);
    }
}

impl Place {
    fn of(path: &Path) -> io::Result<Place> {
        let metadata = fs::symlink_metadata(path)?;
        Ok(Place { path: path.to_owned(), device: metadata.dev(), inode: metadata.ino() })
    }

    fn remove(&self) {
        if Place::of(&self.path).is_ok_and(|found| found == *self)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(%error, path = %self.path.display(), "Cannot remove the API socket");
        }
    }
}

/// Removes the sockets of this process, on ways out on which nothing is dropped.
pub fn remove_sockets() {
    // Whoever holds the lock removes them, or fails to for a reason that holds here as well.
    if let Ok(sockets) = SOCKETS.try_lock() {
        sockets.iter().for_each(Place::remove);
    }
}

/// Has no two processes take a socket in the same directory at the same time: both could find an old one dead, and the
/// slower would take the place of the faster. Nobody is waited for for long, since anybody may lock a directory that all
/// can read.
fn take_turn(path: &Path) -> Option<File> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let directory = File::open(directory).ok()?;
    let until = Instant::now() + TAKING;
    while flock(&directory, FlockOperation::NonBlockingLockExclusive).is_err() && Instant::now() < until {
        thread::sleep(Duration::from_millis(10));
    }
    Some(directory)
}

/// Removes a socket on which nobody listens.
fn make_room(path: &Path) -> Result<(), SocketError> {
    let failed = |source| SocketError::Make { path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(SocketError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(failed),
        // It went by itself.
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        // Whoever may not connect cannot know, and must not remove it.
        _ => Err(SocketError::InUse(path.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn it_is_for_its_owner_alone_and_goes_with_its_object() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api");
        let socket = ApiSocket::bind(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o7777, 0o600);
        UnixStream::connect(&path).unwrap();
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "the standard library leaves it");
        let first = ApiSocket::bind(&path).unwrap();
        let error = ApiSocket::bind(&path).unwrap_err().to_string();
        assert!(
            error.contains("another process listens") && error.contains("choose another path"),
            "{error}"
        );
        UnixStream::connect(&path).unwrap();
        drop(first);
        ApiSocket::bind(&path).unwrap();
    }

    #[test]
    fn what_took_its_place_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api");
        let socket = ApiSocket::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(directory.path().join("keeps the inode number in use"), "").unwrap();
        fs::write(&path, "another's").unwrap();
        drop(socket);
        assert_eq!(fs::read_to_string(&path).unwrap(), "another's");
    }

    #[test]
    fn ways_out_without_drops_remove_it_too() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api");
        let socket = ApiSocket::bind(&path).unwrap();
        // Not remove_sockets(), which would remove those of the tests beside this one.
        assert!(SOCKETS.lock().unwrap().contains(&socket.place));
        socket.place.remove();
        assert!(!path.exists());
    }

    #[test]
    fn errors_name_the_fix() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "").unwrap();
        for (path, says) in [
            (file, "is no socket; choose another path"),
            (directory.path().join("none/api"), "a directory that exists"),
            (directory.path().join("x".repeat(100)), "choose a shorter one"),
        ] {
            let error = ApiSocket::bind(&path).unwrap_err().to_string();
            assert!(error.contains(says) && error.starts_with("--api-socket /"), "{error}");
        }
    }
}
