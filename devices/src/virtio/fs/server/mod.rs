//! The FUSE server: a chain of descriptors in, a reply in the chain's writable part out.
//!
//! fuse-backend-rs carries out what a request asks of the host's file system (its `PassthroughFs`); the messages
//! themselves are taken apart and put together here. The library's own message layer is not used, because it drops the
//! DAX flag of GETATTR and CREATE, leaves some errors without a reply, and lacks the operations that make the window.
//!
//! Nothing that a guest can send may panic, block for good or reach a file outside the share: see [`message`] for
//! lengths and names, [`Server::dispatch`] for read-only shares.

mod buffers;
mod decide;
mod directories;
mod files;
mod identity;
mod init;
mod ioctl;
mod known;
mod mapping;
pub(super) mod message;
mod names;
mod open;
mod pseudo;
mod unnamed;
mod xattr;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use fuse_backend_rs::api::filesystem::Context;
use fuse_backend_rs::passthrough::{CachePolicy, Config, PassthroughFs};
use virtio_queue::DescriptorChain;
use vm_memory::GuestMemoryMmap;

use self::buffers::Buffers;
use self::directories::Directories;
use self::identity::{Maker, NOBODY};
use self::message::{Reply, Request, errno};
use self::pseudo::PseudoFileSystems;
use self::unnamed::Files;
use super::abi::opcode;
use super::budget::Budget;
use super::cache::CacheMode;
use super::counters::Counts;
use super::hint::HintStore;
use super::latency::Histogram;
use super::per_file_dax::{ClientDax, PerFileDax};
use super::policy::{Policy, Prefault};
use super::window::DaxWindow;
use crate::virtio::worker::ChainError;

/// What a server serves.
pub(super) struct ServerConfig {
    /// The share's name in messages.
    pub(super) tag: Arc<str>,
    /// The shared directory, opened with O_PATH.
    pub(super) root: File,
    /// Whether the guest may change nothing.
    pub(super) read_only: bool,
    /// Which files are DAX.
    pub(super) policy: Policy,
    /// Which pages of DAX files are put in the guest's reach, where no rule says it.
    pub(super) prefault: Prefault,
    /// What the guest may keep.
    pub(super) cache: CacheMode,
    /// The DAX window, if there is one.
    pub(super) window: Option<Arc<DaxWindow>>,
    /// Where to count.
    pub(super) counts: Arc<Counts>,
    /// The most descriptors for what the guest knows and has open.
    pub(super) descriptors: u64,
}

/// The server of one share; all queues use it at once.
pub(super) struct Server {
    tag: Arc<str>,
    fs: Files,
    dax: PerFileDax,
    prefault: Prefault,
    window: Option<Arc<DaxWindow>>,
    directories: Directories,
    hints: HintStore,
    /// Pins the directory that `fs` starts from: it opens it anew for each session, by this descriptor.
    root: File,
    cache: CacheMode,
    read_only: bool,
    /// The user that it acts as.
    uid: u32,
    /// Whether it was said that nobody uses the window.
    has_warned: AtomicBool,
    counts: Arc<Counts>,
}

impl Server {
    /// A server without a session; the first INIT starts one.
    ///
    /// # Errors
    /// What the host says of the directory or of /proc.
    pub(super) fn new(config: ServerConfig) -> io::Result<Server> {
        let ServerConfig { tag, root, read_only, policy, prefault, cache, window, counts, descriptors } =
            config;
        let fs = PassthroughFs::new(Config {
            // The final dot makes it the directory and not the link in /proc, which the library would not follow.
            root_dir: format!("/proc/self/fd/{}/.", root.as_raw_fd()),
            // For the timeouts; open flags are the server's own.
            cache_policy: CachePolicy::Auto,
            entry_timeout: cache.timeout(),
            attr_timeout: cache.timeout(),
            xattr: true,
            killpriv_v2: true,
            // Host inode numbers as node ids: otherwise the library remembers every file that it ever saw.
            use_host_ino: true,
            ..Config::default()
        })?;
        fs.import()?;
        if let Some(window) = window.as_ref().filter(|_| read_only) {
            window.set_read_only();
        }
        let dax = PerFileDax::new(policy);
        let pseudo = PseudoFileSystems::new(&root)?;
        let budget = Arc::new(Budget::new(Arc::clone(&tag), descriptors));
        Ok(Server {
            tag,
            directories: Directories::new(Arc::clone(&budget)),
            fs: Files::new(fs, pseudo, budget, cache.timeout()),
            dax,
            prefault,
            window,
            hints: HintStore::default(),
            root,
            cache,
            read_only,
            uid: rustix::process::geteuid().as_raw(),
            has_warned: AtomicBool::new(false),
            counts,
        })
    }

    /// Serves one request; returns the number of bytes written.
    ///
    /// # Errors
    /// [`ChainError`] if the chain points outside of guest memory.
    pub(super) fn handle(
        &self,
        memory: &GuestMemoryMmap,
        chain: DescriptorChain<&GuestMemoryMmap>,
    ) -> Result<u32, ChainError> {
        let body = Buffers::new(memory, chain.clone().readable())?;
        let room = Buffers::new(memory, chain.writable())?;
        let Some(mut request) = Request::parse(body) else {
            tracing::debug!("a request is shorter than its header");
            return Ok(0);
        };
        let mut reply = Reply::new(room, request.header.unique);
        self.counts.request(request.header.opcode);
        let result = request.check_length().and_then(|()| self.dispatch(&mut request, &mut reply));
        Ok(result.unwrap_or_else(|error| {
            tracing::trace!(header = ?request.header, %error, "request failed");
            if expects_reply(request.header.opcode) { reply.error(&error) } else { 0 }
        }))
    }

    /// Carries out a request. `Err` means that nothing has been replied yet.
    fn dispatch(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let code = request.header.opcode;
        if self.read_only && always_changes(code) {
            return Err(errno(libc::EROFS));
        }
        if self.fs.pseudo.refuses(code, request.header.nodeid) {
            return Err(errno(libc::EACCES));
        }
        if creates(code) && (request.header.uid == NOBODY || request.header.gid == NOBODY) {
            return Err(errno(libc::EINVAL));
        }
        match code {
            opcode::INIT => self.init(request, reply),
            opcode::DESTROY => self.destroy(reply),

            opcode::LOOKUP => self.lookup(request, reply),
            opcode::FORGET => self.forget(request),
            opcode::BATCH_FORGET => self.batch_forget(request),
            opcode::READLINK => self.readlink(request, reply),
            opcode::SYMLINK => self.symlink(request, reply),
            opcode::MKNOD => self.mknod(request, reply),
            opcode::MKDIR => self.mkdir(request, reply),
            opcode::UNLINK => self.unlink(request, reply),
            opcode::RMDIR => self.rmdir(request, reply),
            opcode::RENAME => self.rename(request, reply),
            opcode::RENAME2 => self.rename2(request, reply),
            opcode::LINK => self.link(request, reply),
            opcode::STATFS => self.statfs(request, reply),

            opcode::GETATTR => self.getattr(request, reply),
            opcode::SETATTR => self.setattr(request, reply),
            opcode::ACCESS => self.access(request, reply),
            opcode::OPEN => self.open(request, reply),
            opcode::CREATE => self.create(request, reply),
            opcode::TMPFILE => self.tmpfile(request, reply),
            opcode::READ => self.read(request, reply),
            opcode::WRITE => self.write(request, reply),
            opcode::FLUSH => self.flush(request, reply),
            opcode::FSYNC => self.fsync(request, reply),
            opcode::RELEASE => self.release(request, reply),
            opcode::FALLOCATE => self.fallocate(request, reply),
            opcode::LSEEK => self.lseek(request, reply),
            opcode::COPY_FILE_RANGE => self.copy_file_range(request, reply),
            opcode::SYNCFS => self.syncfs(request, reply),

            opcode::OPENDIR => self.opendir(request, reply),
            opcode::READDIR => self.readdir(request, reply, false),
            opcode::READDIRPLUS => self.readdir(request, reply, true),
            opcode::RELEASEDIR => self.releasedir(request, reply),
            opcode::FSYNCDIR => self.fsyncdir(request, reply),

            opcode::GETXATTR => self.getxattr(request, reply),
            opcode::LISTXATTR => self.listxattr(request, reply),
            opcode::SETXATTR => self.setxattr(request, reply),
            opcode::REMOVEXATTR => self.removexattr(request, reply),

            opcode::SETUPMAPPING => {
                timed(&self.counts.setup_latency, |now| self.setup_mapping(request, reply, now))
            }
            opcode::REMOVEMAPPING => {
                timed(&self.counts.remove_latency, |now| self.remove_mapping(request, reply, now))
            }

            opcode::IOCTL => self.ioctl(request, reply),
            opcode::INTERRUPT | opcode::NOTIFY_REPLY => Ok(0),
            // Among them STATX, which would be answered without the DAX flag; the client asks once and then takes
            // GETATTR. Locks are not negotiated and stay in the guest.
            _ => Err(errno(libc::ENOSYS)),
        }
    }

    /// Ends the session: nothing is mapped, known or open any more. The root stays known, as before the first INIT.
    ///
    /// No queue may be in use by a driver that trusts the outcome: a request that is being served at the same time
    /// may still map or open something.
    pub(super) fn end_session(&self) {
        self.dax.set_client(ClientDax::Off);
        if let Some(Err(error)) = self.window.as_ref().map(|window| window.clear()) {
            tracing::error!(%error, "cannot clear the DAX window");
        }
        if let Some(accounts) = &self.counts.accounts {
            accounts.cleared();
        }
        if let Some(thrash) = &self.counts.thrash {
            thrash.cleared();
        }
        self.directories.clear();
        self.fs.destroy();
    }

    /// Descriptors that the budget has been charged with.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn descriptors_used(&self) -> u64 {
        self.fs.budget.used()
    }

    /// Whether files can be created in the name of the guest's users.
    fn is_privileged(&self) -> bool {
        self.uid == 0
    }

    /// Who asks. A server without privileges does everything in its own name, and so does not try to change it.
    fn context(&self, request: &Request<'_>) -> Context {
        let mut context = Context::from(&request.header);
        if !self.is_privileged() {
            (context.uid, context.gid) = (0, 0);
        }
        context
    }

    /// Who makes a file, by a request whose body has been read.
    ///
    /// # Errors
    /// As [`Request::supplementary_group`] says.
    fn maker(&self, request: &mut Request<'_>) -> io::Result<Maker> {
        let group = request.supplementary_group()?.filter(|_| self.is_privileged());
        Ok(Maker { context: self.context(request), group })
    }
}

/// Does something, which is told when it begins, and counts how long that took.
fn timed<T>(latency: &Histogram, work: impl FnOnce(Instant) -> T) -> T {
    let start = Instant::now();
    let result = work(start);
    latency.add(start.elapsed());
    result
}

/// Operations that change something whatever their arguments are. Those that only may (OPEN, SETUPMAPPING) look for
/// themselves.
fn always_changes(code: u32) -> bool {
    matches!(
        code,
        opcode::SETATTR
            | opcode::SYMLINK
            | opcode::MKNOD
            | opcode::MKDIR
            | opcode::UNLINK
            | opcode::RMDIR
            | opcode::RENAME
            | opcode::RENAME2
            | opcode::LINK
            | opcode::WRITE
            | opcode::SETXATTR
            | opcode::REMOVEXATTR
            | opcode::CREATE
            | opcode::FALLOCATE
            | opcode::COPY_FILE_RANGE
            | opcode::TMPFILE
    )
}

/// Operations that make something which belongs to who asks.
fn creates(code: u32) -> bool {
    matches!(code, opcode::SYMLINK | opcode::MKNOD | opcode::MKDIR | opcode::CREATE | opcode::TMPFILE)
}

/// Operations that the client does not wait for.
fn expects_reply(code: u32) -> bool {
    !matches!(code, opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT | opcode::NOTIFY_REPLY)
}
