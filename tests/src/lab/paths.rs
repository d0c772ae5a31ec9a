//! Where the lab keeps its things: below `target/` of the source tree that its program was built in.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use super::LabError;

/// The places the lab uses.
#[derive(Debug, Clone)]
pub struct Paths {
    root: PathBuf,
}

impl Paths {
    /// Finds the source tree: the nearest directory above the running program that has `scripts/lab`.
    pub fn find() -> Result<Self, LabError> {
        let program =
            std::env::current_exe().map_err(|error| LabError::system("find this program", error))?;
        program
            .ancestors()
            .find(|dir| dir.join("scripts/lab").is_file())
            .map(|root| Self { root: root.to_owned() })
            .ok_or(LabError::NoTree(program))
    }

    /// A file of the source tree.
    pub fn source(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// One of the lab's two programs, as `scripts/lab` builds them.
    pub fn program(&self, name: &str) -> Result<PathBuf, LabError> {
        let path = self.root.join("target/x86_64-unknown-linux-gnu/release").join(name);
        if path.is_file() { Ok(path) } else { Err(LabError::NotBuilt(path)) }
    }

    /// A file of the running lab.
    pub fn state(&self, name: &str) -> PathBuf {
        self.root.join("target/lab").join(name)
    }

    /// The console of the lab's host.
    pub fn console(&self) -> PathBuf {
        self.state("console.log")
    }

    /// Makes the directory of the running lab; who may enter it may do there what its owner may do here.
    pub fn create_state(&self) -> io::Result<()> {
        fs::create_dir_all(self.root.join("target"))?;
        match DirBuilder::new().mode(0o700).create(self.state("")) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        }
    }

    /// Connects to the daemon of the running lab.
    pub fn connect(&self) -> io::Result<UnixStream> {
        self.short_socket_path(|path| UnixStream::connect(path))
    }

    /// Makes the socket that the daemon listens on.
    pub fn listen(&self) -> io::Result<UnixListener> {
        self.short_socket_path(|path| {
            let _ = fs::remove_file(path);
            UnixListener::bind(path)
        })
    }

    /// Socket addresses have room for 108 bytes, and source trees may lie deeper.
    fn short_socket_path<T>(&self, act: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
        let dir = File::open(self.state(""))?;
        act(&PathBuf::from(format!("/proc/self/fd/{}/socket", dir.as_raw_fd())))
    }
}
