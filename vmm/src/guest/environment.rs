//! What a command finds beside files: a name, a loopback interface, limits.

use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;

use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit, setrlimit, umask};

use super::kernel;

const HOST_NAME: &[u8] = b"daxvm";
/// Open files, as systemd gives them to services: the kernel's own hard limit of 4096 is too low for many build tools.
const OPEN_FILES: Rlimit = Rlimit { current: Some(1024), maximum: Some(524_288) };

/// Prepares all of it. What fails is told on the console: few commands need it.
pub fn prepare() {
    umask(Mode::WGRP | Mode::WOTH);
    let steps = [
        ("the host name", rustix::system::sethostname(HOST_NAME).map_err(io::Error::from)),
        ("the loopback interface", loopback_up()),
        ("the limit of open files", setrlimit(Resource::Nofile, OPEN_FILES).map_err(io::Error::from)),
    ];
    for (what, result) in steps {
        if let Err(error) = result {
            kernel::tell(&format_args!("{what} is not set: {error}"));
        }
    }
}

/// Sets the loopback interface up (netdevice(7)); the kernel gives it its addresses.
fn loopback_up() -> io::Result<()> {
    // Any socket will do.
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    // SAFETY: all bytes of the structure may be zero.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(*b"lo") {
        *to = from as libc::c_char;
    }
    for command in [libc::SIOCGIFFLAGS, libc::SIOCSIFFLAGS] {
        // SAFETY: the structure is valid, and both requests read and write no more than it.
        if unsafe { libc::ioctl(socket.as_raw_fd(), command, &raw mut request) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: SIOCGIFFLAGS has filled in this member, as SIOCSIFFLAGS reads it.
        unsafe { request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short };
    }
    Ok(())
}
