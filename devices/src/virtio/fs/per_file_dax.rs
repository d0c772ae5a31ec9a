//! Per-file DAX as the guest sees it: what was negotiated, and the one place where attributes are built.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{Attr, AttrOut, EntryOut};
use fuse_backend_rs::api::filesystem::Entry;

use super::abi::{ATTR_DAX, init};
use super::counters::Counts;
use super::policy::{FileFacts, Policy};

/// How the client decides which files are DAX; it follows from what its INIT offers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub(super) enum ClientDax {
    /// No file is: there is no window, the mount says `dax=never`, or no INIT was seen.
    Off,
    /// Those whose attributes say so: the mount says `dax=inode` or nothing.
    PerFile,
    /// All regular files, whatever their attributes say: the mount says `dax=always`.
    Always,
}

impl ClientDax {
    /// The mode of a client that offers these INIT flags to a share with or without a window.
    ///
    /// MAP_ALIGNMENT alone says that the client has a usable window and wants it; HAS_INODE_DAX alone says nothing, as
    /// it is sent without a window too.
    pub(super) fn from_offer(flags: u64, has_window: bool) -> ClientDax {
        match (has_window && flags & init::MAP_ALIGNMENT != 0, flags & init::HAS_INODE_DAX != 0) {
            (false, _) => ClientDax::Off,
            (true, true) => ClientDax::PerFile,
            (true, false) => ClientDax::Always,
        }
    }

    /// The INIT flags that tell the client that the device goes along.
    pub(super) fn reply_flags(self) -> u64 {
        match self {
            ClientDax::Off => 0,
            ClientDax::PerFile => init::MAP_ALIGNMENT | init::HAS_INODE_DAX,
            ClientDax::Always => init::MAP_ALIGNMENT,
        }
    }
}

/// A share's policy and its client's mode, and what they make of a file's attributes.
pub(super) struct PerFileDax {
    policy: Policy,
    client: AtomicU8,
    counts: Arc<Counts>,
}

impl PerFileDax {
    pub(super) fn new(policy: Policy, counts: Arc<Counts>) -> PerFileDax {
        PerFileDax { policy, client: AtomicU8::new(ClientDax::Off as u8), counts }
    }

    /// Notes what was negotiated.
    pub(super) fn set_client(&self, client: ClientDax) {
        // Relaxed: the client sends nothing before it has seen the reply to INIT, and that orders it.
        self.client.store(client as u8, Relaxed);
    }

    /// What was negotiated.
    pub(super) fn client(&self) -> ClientDax {
        match self.client.load(Relaxed) {
            mode if mode == ClientDax::PerFile as u8 => ClientDax::PerFile,
            mode if mode == ClientDax::Always as u8 => ClientDax::Always,
            _ => ClientDax::Off,
        }
    }

    /// The one builder of attributes. A file's DAX flag must be the same in every reply: where it is not, the client
    /// throws the inode and its mappings away at the next last close (fs/fuse/dax.c, fuse_dax_dontcache).
    fn attr(&self, stat: libc::stat64) -> Attr {
        let dax =
            self.client() == ClientDax::PerFile && self.policy.decide(&FileFacts::from(&stat), None).dax;
        Attr::with_flags(stat, if dax { ATTR_DAX } else { 0 })
    }

    /// The reply to GETATTR and SETATTR.
    pub(super) fn attr_out(&self, stat: libc::stat64, timeout: Duration) -> AttrOut {
        AttrOut {
            attr_valid: timeout.as_secs(),
            attr_valid_nsec: timeout.subsec_nanos(),
            dummy: 0,
            attr: self.attr(stat),
        }
    }

    /// The reply to all that yields an inode. The client decides here, and only here, whether the inode is DAX.
    pub(super) fn entry_out(&self, entry: Entry) -> EntryOut {
        let attr = self.attr(entry.attr);
        if self.client() == ClientDax::PerFile && attr.mode & libc::S_IFMT == libc::S_IFREG {
            self.counts.decided(attr.flags & ATTR_DAX != 0);
        }
        EntryOut { attr, ..EntryOut::from(entry) }
    }

    /// Whether the client is likely to hold a file as DAX, so that an OPEN that lets it drop what it has cached would
    /// only make it take the file's mappings out of its page tables.
    pub(super) fn is_dax(&self, stat: &libc::stat64) -> bool {
        let facts = FileFacts::from(stat);
        match self.client() {
            ClientDax::Off => false,
            ClientDax::PerFile => self.policy.decide(&facts, None).dax,
            ClientDax::Always => self.policy.allows_mapping(&facts),
        }
    }

    /// Whether the client may map a file: it negotiated a window, and the policy does not forbid it.
    pub(super) fn may_map(&self, stat: &libc::stat64) -> bool {
        self.client() != ClientDax::Off && self.policy.allows_mapping(&FileFacts::from(stat))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clients_mode_follows_from_both_bits_and_the_window() {
        let (align, inode) = (init::MAP_ALIGNMENT, init::HAS_INODE_DAX);
        for (flags, has_window, mode, reply) in [
            (0, true, ClientDax::Off, 0),
            (inode, true, ClientDax::Off, 0),
            (align, true, ClientDax::Always, align),
            (align | inode, true, ClientDax::PerFile, align | inode),
            (0, false, ClientDax::Off, 0),
            (inode, false, ClientDax::Off, 0),
            (align, false, ClientDax::Off, 0),
            (align | inode, false, ClientDax::Off, 0),
        ] {
            assert_eq!(ClientDax::from_offer(flags, has_window), mode, "{flags:#x} {has_window}");
            assert_eq!(mode.reply_flags(), reply);
        }
    }
}
