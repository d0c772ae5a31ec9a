//! Which files are DAX: facts are gathered for the policy, its answer is kept with the inode, and an OPEN that finds
//! another answer has the client look the file up anew.
//!
//! All of it happens for clients that negotiated per-file DAX, and costs others nothing.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fuse_backend_rs::abi::fuse_abi::EntryOut;
use fuse_backend_rs::api::filesystem::{Context, Entry, GetxattrReply};

use rustix::fs::{AtFlags, OFlags};

use super::Server;
use super::message::{Request, errno};
use super::xattr;
use crate::virtio::device::HostMemory;
use crate::virtio::fs::inodes::{Decided, KnownHint};
use crate::virtio::fs::per_file_dax::ClientDax;
use crate::virtio::fs::policy::{Fact, FileFacts, Prefault, WindowFacts};
use crate::virtio::fs::window::CHUNK_SIZE;

/// How much older than the moment of reading a file's ctime must be for the hint to be kept with it. The host's file
/// systems take the time from a clock that ticks every 1 to 10 ms, so that a change right after a reading could leave
/// the ctime that was there at the reading (as git's index calls it: racy).
const RACY: Duration = Duration::from_millis(50);

/// The file capabilities, which a write takes away.
pub(super) const CAPABILITIES: &CStr = c"security.capability";

/// As what a file was opened.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Opening {
    /// Whether the client is likely to hold it as DAX.
    pub(super) dax: bool,
    /// Whether the client may have pages of it that are older than its own writes.
    pub(super) has_old_pages: bool,
}

impl Server {
    /// The entry for a reply that makes the client know a file. The reply must be sent.
    pub(super) fn entry_out(&self, context: &Context, entry: Entry) -> EntryOut {
        let dax = self.give_out(context, &entry);
        self.tell_size(&entry.attr);
        self.dax.entry_out(entry, dax)
    }

    /// Decides about a file that the client does not know yet; one that it knows stays as it is. Returns whether the
    /// file is DAX, having counted that it is given out.
    fn give_out(&self, context: &Context, entry: &Entry) -> bool {
        if !self.dax.is_per_file(entry.attr.st_mode) {
            return false;
        }
        if let Some(dax) = self.dax.inodes.give_out(entry.inode) {
            return dax;
        }
        let decided = self.decide(context, entry.inode, &entry.attr, None, None);
        let (dax, is_new) = self.dax.inodes.insert(entry.inode, decided, || {
            // The client may have forgotten it again by another queue.
            self.fs.budget.knows(entry.inode)
        });
        if is_new {
            self.counts.decided(dax);
        }
        dax
    }

    /// Lets a file be opened as the client knows it, or refuses it with ESTALE: then the client looks it up again, and
    /// gets the node id that goes with what the file is now. Counts the file as open; [`Server::closed`] takes it back.
    ///
    /// A file that nobody in the guest has open is decided about anew. This is the moment at which a change shows, be it
    /// of the hint, of the size, or of anything else that the policy looks at, be it made by the guest or on the host,
    /// and however long the client may keep names and attributes.
    pub(super) fn admit(&self, context: &Context, request: &Request<'_>, flags: u32) -> io::Result<Opening> {
        let (node, asked, thread) = (request.header.nodeid, request.dax, request.header.pid);
        match self.dax.client() {
            ClientDax::Off => return Ok(Opening::default()),
            ClientDax::Always => {
                let (stat, _) = self.fs.getattr(context, node, None)?;
                return Ok(Opening { dax: self.allows_mapping(&stat), ..Opening::default() });
            }
            ClientDax::PerFile => {}
        }
        let inodes = &self.dax.inodes;
        let cannot_retry = self.dax.refusals.is_back(node, thread) || !is_retried(flags);
        // The client opens only what it knows. What is not a regular file is not there either.
        let Some(state) = inodes.state(node, asked) else { return Ok(Opening::default()) };
        if state.is_open_so {
            return Ok(Opening { dax: asked, has_old_pages: !inodes.open(node, asked, 0) });
        }
        let (stat, _) = self.fs.getattr(context, node, None)?;
        let as_it_is = |dax| Decided { dax, ..Decided::default() };
        let decided = match state.is_open {
            true => as_it_is(state.dax),
            false if cannot_retry => as_it_is(asked),
            false => self.decide(context, node, &stat, Some(state.dax), state.hint),
        };
        let dax = decided.dax;
        let is_refused =
            dax != asked && !cannot_retry && self.dax.refusals.may_refuse(node, thread, Instant::now());
        if !state.is_open {
            // A client that cannot follow opens it as it is, and so it is given out as long as that lasts.
            self.note_decision(node, Decided { dax: if is_refused { dax } else { asked }, ..decided });
        }
        if is_refused {
            tracing::debug!(node, dax, "a file is DAX no more, or now is: the guest is to look it up again");
            return Err(errno(libc::ESTALE));
        }
        Ok(Opening { dax: asked, has_old_pages: !inodes.open(node, asked, size(&stat)) })
    }

    /// The same for a file that was created, or found to be there by CREATE: the reply can name any node id, and so
    /// there is nothing to refuse. Counts it as given out, too.
    pub(super) fn admit_created(&self, context: &Context, entry: &Entry) -> Opening {
        if !self.dax.is_per_file(entry.attr.st_mode) {
            let always = self.dax.client() == ClientDax::Always;
            return Opening { dax: always && self.allows_mapping(&entry.attr), ..Opening::default() };
        }
        let inodes = &self.dax.inodes;
        if let Some(state) = inodes.state(entry.inode, false).filter(|state| !state.is_open) {
            let decided = self.decide(context, entry.inode, &entry.attr, Some(state.dax), state.hint);
            self.note_decision(entry.inode, decided);
        }
        let dax = self.give_out(context, entry);
        Opening { dax, has_old_pages: !inodes.open(entry.inode, dax, size(&entry.attr)) }
    }

    /// Counts that a file was closed, or could not be opened after all.
    pub(super) fn closed(&self, request: &Request<'_>) {
        if self.dax.client() == ClientDax::PerFile {
            self.dax.inodes.close(request.header.nodeid, request.dax);
        }
    }

    /// Which pages are put in the client's reach when it maps a file, `None` if it may not: as a per-file client it must
    /// have been told that the file is DAX, as another the policy must not forbid it. Rules are about files of which the
    /// client asks what they are, and so a client that does not ask has what holds for the whole share.
    pub(super) fn may_map(&self, request: &Request<'_>, stat: &libc::stat64) -> Option<Prefault> {
        match self.dax.client() {
            ClientDax::Off => None,
            ClientDax::PerFile if !request.dax || !self.dax.is_per_file(stat.st_mode) => None,
            ClientDax::PerFile => self.dax.inodes.granted(request.header.nodeid),
            ClientDax::Always => self.allows_mapping(stat).then_some(self.prefault),
        }
    }

    fn note_decision(&self, node: u64, decided: Decided) {
        let (dax, has_changed) = self.dax.inodes.decide(node, decided);
        if has_changed {
            self.counts.decided(dax);
            self.counts.changed();
        }
    }

    /// Asks the policy about a regular file. `current` is the state in which it is given out now, if it is known, and
    /// `known` its hint when that was read last.
    fn decide(
        &self,
        context: &Context,
        node: u64,
        stat: &libc::stat64,
        current: Option<bool>,
        known: Option<KnownHint>,
    ) -> Decided {
        let needs = self.dax.policy.needs();
        let mut facts = self.cheap_facts(stat);
        let mut kept = None;
        if needs.hint {
            (facts.hint, kept) = self.hint(context, node, stat, known);
        }
        if needs.capabilities {
            facts.capabilities = self.fs.getxattr(context, node, CAPABILITIES, 0).is_ok();
        }
        let path = if needs.path { self.path(node) } else { Vec::new() };
        facts.path = &path;
        let value = |name| match self.fs.getxattr(context, node, name, xattr::SIZE_MAX) {
            Ok(GetxattrReply::Value(value)) => Some(value),
            _ => None,
        };
        let xattrs: Vec<_> = needs.xattrs.iter().map(|name| value(name)).collect();
        facts.xattrs = &xattrs;
        let mut decision = self.dax.policy.decide(&facts, current);
        // A file that could not be mapped would give the client errors, where READ and WRITE give it data.
        if decision.dax
            && current != Some(true)
            && self.window.as_ref().is_some_and(|window| window.is_full())
        {
            decision.dax = false;
            decision.reason.fact = Fact::Window;
        }
        self.counts.decisions.add(&decision);
        tracing::trace!(node, ?decision, ?facts, "decided");
        let prefault = Some(decision.prefault.unwrap_or(self.prefault));
        Decided { dax: decision.dax, prefault, hint: kept }
    }

    fn allows_mapping(&self, stat: &libc::stat64) -> bool {
        self.dax.policy.allows_mapping(&self.cheap_facts(stat))
    }

    /// The facts that need no question to the host beside stat(2).
    fn cheap_facts(&self, stat: &libc::stat64) -> FileFacts<'static> {
        let window = self.window.as_deref();
        FileFacts {
            age: now().saturating_sub(since_epoch(stat.st_mtime, stat.st_mtime_nsec)),
            read_only: self.read_only,
            window: WindowFacts {
                chunks: window.map_or(0, |window| window.size() / CHUNK_SIZE),
                mapped: window.map_or(0, |window| window.mapped_chunks()),
                promised: self.dax.inodes.promised(),
                thrash: self.counts.thrash.as_ref().map_or(0, |thrash| thrash.level(Instant::now())),
            },
            ..FileFacts::from(stat)
        }
    }

    /// The hint of a regular file, from the host unless it is known. A file that cannot be read has none: it could not be
    /// mapped either.
    fn hint(
        &self,
        context: &Context,
        node: u64,
        stat: &libc::stat64,
        known: Option<KnownHint>,
    ) -> (bool, Option<KnownHint>) {
        let ctime = (stat.st_ctime, stat.st_ctime_nsec);
        if let Some(known) = known.filter(|known| known.ctime == ctime) {
            return (known.hint, Some(known));
        }
        self.counts.hint_query();
        let read_at = now();
        let read = self.open_node(context, node, false).and_then(|file| self.hints.read(file.as_fd()));
        match read {
            Ok(hint) => {
                let is_old = read_at.saturating_sub(since_epoch(ctime.0, ctime.1)) > RACY;
                (hint, is_old.then_some(KnownHint { hint, ctime }))
            }
            Err(error) => {
                tracing::debug!(node, %error, "cannot read the DAX hint of a file");
                (false, None)
            }
        }
    }

    /// Where the client found a file first, relative to the share; empty if it is there no more.
    pub(super) fn path(&self, node: u64) -> Vec<u8> {
        const GONE: &[u8] = b" (deleted)";
        let root = std::fs::read_link(format!("/proc/self/fd/{}", self.root.as_raw_fd()));
        let (Ok(root), Ok(path)) = (root, self.fs.readlinkat_proc_file(node)) else { return Vec::new() };
        let Ok(path) = path.strip_prefix(root) else { return Vec::new() };
        // A name may end so, too.
        let is_there = || rustix::fs::statat(&self.root, path, AtFlags::SYMLINK_NOFOLLOW).is_ok();
        if path.as_os_str().as_bytes().ends_with(GONE) && !is_there() {
            return Vec::new();
        }
        path.as_os_str().as_bytes().to_vec()
    }
}

/// Whether a client opens by a path, which it walks again after ESTALE. All system calls that open by path have
/// O_LARGEFILE in a 64-bit kernel, but for those of 32-bit programs; the opens that the client needs for chattr's ioctls
/// have not (fs/fuse/ioctl.c, fuse_priv_ioctl_prepare). Overlayfs opens its layers with O_NOATIME, and hands ESTALE on to
/// the program.
fn is_retried(flags: u32) -> bool {
    const _: () = assert!(OFlags::LARGEFILE.bits() != 0, "rustix has the kernel's value, not that of libc");
    flags & OFlags::LARGEFILE.bits() != 0 && flags & OFlags::NOATIME.bits() == 0
}

fn size(stat: &libc::stat64) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// A file's time; the epoch for one before it.
fn since_epoch(seconds: i64, nanoseconds: i64) -> Duration {
    Duration::new(u64::try_from(seconds).unwrap_or(0), u32::try_from(nanoseconds).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use crate::virtio::fs::inodes::host_node;
    use crate::virtio::fs::policy::Policy;
    use crate::virtio::fs::testing::{FakeGuest, ROOT};

    #[test]
    fn paths_are_relative_to_the_share() {
        let mut guest = FakeGuest::mounted(Policy::Always);
        let directory = guest.mkdir(ROOT, "directory").unwrap().nodeid;
        let (entry, _) = guest.create(directory, "file \n", libc::O_RDWR).unwrap();
        let (odd, _) = guest.create(ROOT, "odd (deleted)", libc::O_RDWR).unwrap();
        let server = std::sync::Arc::clone(&guest.device.server);
        let path = |nodeid| String::from_utf8(server.path(host_node(nodeid).0)).unwrap();
        assert_eq!((path(ROOT), path(directory)), (String::new(), "directory".into()));
        assert_eq!(
            (path(entry.nodeid), path(odd.nodeid)),
            ("directory/file \n".into(), "odd (deleted)".into())
        );
        guest.rename(ROOT, "directory", "moved", 0).unwrap();
        assert_eq!(path(entry.nodeid), "moved/file \n");
        guest.unlink(directory, "file \n").unwrap();
        assert_eq!((path(entry.nodeid), path(12345)), (String::new(), String::new()));
    }
}
