//! The start and the end of a session: INIT, where client and server agree on what they use, and DESTROY.

use std::io;
use std::sync::atomic::Ordering::Relaxed;

use fuse_backend_rs::abi::fuse_abi::{InitIn, InitIn2, InitOut, KERNEL_VERSION};
use fuse_backend_rs::api::filesystem::{FileSystem, FsOptions};

use super::Server;
use super::message::{Reply, Request, errno};
use crate::virtio::fs::abi::{self, init};
use crate::virtio::fs::per_file_dax::ClientDax;
use crate::virtio::fs::window::CHUNK_SHIFT;

/// The most pages in one READ or WRITE, the client's own limit (FUSE_MAX_MAX_PAGES before Linux 6.13).
const MAX_PAGES: u16 = 256;
/// The most bytes in one WRITE.
pub(super) const MAX_WRITE: u32 = MAX_PAGES as u32 * 4096;

/// What is used of what a client offers, beside DAX. Left out on purpose: WRITEBACK_CACHE (with DAX it freezes mtime),
/// POSIX_LOCKS and FLOCK_LOCKS (locks stay in the guest), POSIX_ACL (the client would have to enforce what the host
/// knows), EXPORT_SUPPORT (node ids are reused), SUBMOUNTS.
const WANTED: u64 = init::ASYNC_READ
    | init::ATOMIC_O_TRUNC
    | init::BIG_WRITES
    | init::AUTO_INVAL_DATA
    | init::DO_READDIRPLUS
    | init::READDIRPLUS_AUTO
    | init::ASYNC_DIO
    | init::PARALLEL_DIROPS
    | init::MAX_PAGES
    | init::CACHE_SYMLINKS
    | init::HANDLE_KILLPRIV_V2
    | init::CREATE_SUPP_GROUP
    | init::INIT_EXT;

impl Server {
    /// Starts a session. A client that sends INIT again (after a crash, or for kexec) has forgotten all that it had.
    pub(super) fn init(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let offer: InitIn = request.arg()?;
        if offer.major > KERNEL_VERSION {
            // The client repeats INIT with the version that it is told.
            let out = InitOut { major: KERNEL_VERSION, minor: abi::MINOR_VERSION, ..Default::default() };
            return reply.object(&out);
        }
        if offer.major < KERNEL_VERSION || offer.minor < abi::MIN_MINOR_VERSION {
            return Err(errno(libc::EPROTO));
        }
        let mut offered = u64::from(offer.flags);
        if offered & init::INIT_EXT != 0 {
            offered |= u64::from(request.arg::<InitIn2>()?.flags2) << 32;
        }

        self.end_session();
        let client = ClientDax::from_offer(offered, self.window.is_some());
        let direct = if self.cache.is_direct() { init::DIRECT_IO_ALLOW_MMAP } else { 0 };
        let used = offered & (WANTED | direct | client.reply_flags());
        // The library is told what it acts on. It can only switch killpriv_v2 on, but then nothing follows from it
        // unless the client asks for it in each request.
        self.fs.init(FsOptions::from_bits_truncate(used))?;
        self.dax.set_client(client);
        tracing::debug!(minor = offer.minor, ?client, offered, used, "a client has mounted the share");
        if let Some(reason) = self.why_unused(client, offered) {
            let share = &*self.tag;
            tracing::warn!(share, "no file of this share can be DAX, though it has a window: {reason}");
        }

        reply.object(&InitOut {
            major: KERNEL_VERSION,
            minor: abi::MINOR_VERSION,
            max_readahead: offer.max_readahead,
            flags: used as u32,
            flags2: (used >> 32) as u32,
            max_background: u16::MAX,
            congestion_threshold: u16::MAX / 4 * 3,
            max_write: MAX_WRITE,
            max_pages: MAX_PAGES,
            map_alignment: if client == ClientDax::Off { 0 } else { CHUNK_SHIFT as u16 },
            time_gran: 1,
            ..Default::default()
        })
    }

    /// Why nobody uses the share's window, if a client that offers these flags does not. Said once: who mounts the share
    /// again so, does it on purpose.
    fn why_unused(&self, client: ClientDax, offered: u64) -> Option<&'static str> {
        self.window.as_ref()?;
        let reason = client.why_off(offered)?;
        (!self.has_warned.swap(true, Relaxed)).then_some(reason)
    }

    /// Ends a session. The client has sent no REMOVEMAPPING and no FORGET for what it still had.
    pub(super) fn destroy(&self, reply: &mut Reply<'_>) -> io::Result<u32> {
        self.end_session();
        reply.empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::fs::policy::Policy;
    use crate::virtio::fs::testing::FakeGuest;

    #[test]
    fn that_the_window_is_of_no_use_is_said_once() {
        let guest = FakeGuest::mounted(Policy::Inode);
        let server = &guest.device.server;
        assert_eq!(server.why_unused(ClientDax::PerFile, 0), None);
        assert!(server.why_unused(ClientDax::Off, 0).is_some_and(|reason| reason.contains("dax=never")));
        assert_eq!(server.why_unused(ClientDax::Off, 0), None);
    }
}
