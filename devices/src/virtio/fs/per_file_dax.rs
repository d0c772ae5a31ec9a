//! Per-file DAX as the guest sees it: what was negotiated, and the one place where attributes are built.

use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{Attr, AttrOut, EntryOut};
use fuse_backend_rs::api::filesystem::Entry;

use super::abi::{ATTR_DAX, init};
use super::inodes::{Inodes, node_id};
use super::policy::Policy;
use super::refusals::Refusals;

/// Bytes of a page of an x86-64 client.
const PAGE_SIZE: libc::blksize_t = 4096;

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

    /// Why no file of a share with a window will be DAX for a client that offers these flags, and what to do about it.
    /// `None` if files can be.
    pub(super) fn why_off(self, flags: u64) -> Option<&'static str> {
        match self {
            ClientDax::PerFile | ClientDax::Always => None,
            ClientDax::Off if flags & init::HAS_INODE_DAX != 0 => Some(
                "the guest's kernel asks for per-file DAX but cannot use the window: give it CONFIG_FUSE_DAX, \
                 CONFIG_FS_DAX and CONFIG_ZONE_DEVICE, and look for `virtio_fs` in its messages",
            ),
            ClientDax::Off => Some(
                "the guest mounts it with `dax=never`, or its kernel has no DAX for virtio-fs (Linux 5.10, per file \
                 5.17): mount it with `-o dax=inode`, or give the share `window=0` to save the guest's memory",
            ),
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

/// A share's policy, what its client negotiated, and which files the client knows.
pub(super) struct PerFileDax {
    pub(super) policy: Policy,
    client: AtomicU8,
    pub(super) inodes: Inodes,
    pub(super) refusals: Refusals,
}

impl PerFileDax {
    pub(super) fn new(policy: Policy) -> PerFileDax {
        PerFileDax {
            policy,
            client: AtomicU8::new(ClientDax::Off as u8),
            inodes: Inodes::default(),
            refusals: Refusals::default(),
        }
    }

    /// Notes what was negotiated, at the start of a session in which nothing is known yet.
    pub(super) fn set_client(&self, client: ClientDax) {
        self.inodes.clear();
        self.refusals.clear();
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

    /// Whether it is decided about a file of this mode: it is a regular one, and the client goes by the decision.
    pub(super) fn is_per_file(&self, mode: u32) -> bool {
        mode & libc::S_IFMT == libc::S_IFREG && self.client() == ClientDax::PerFile
    }

    /// The one builder of attributes. The flag belongs to the node id (see [`super::inodes`]) and is the same in every
    /// reply: where it is not, the client throws the inode and its mappings away at the next last close
    /// (fs/fuse/dax.c, fuse_dax_dontcache).
    ///
    /// The block size of a file that can be DAX is the client's page size. It makes i_blkbits of it, and with any other
    /// (ext4 can have 1 KiB, a tmpfs of huge pages 2 MiB) fsync(2) and msync(2) of what was stored by a mapping fail with
    /// EIO, and a warning in the kernel's log (fs/dax.c, dax_writeback_mapping_range).
    fn attr(&self, mut stat: libc::stat64, dax: bool) -> Attr {
        let flags = if dax && self.is_per_file(stat.st_mode) { ATTR_DAX } else { 0 };
        if stat.st_mode & libc::S_IFMT == libc::S_IFREG && self.client() != ClientDax::Off {
            stat.st_blksize = PAGE_SIZE;
        }
        Attr::with_flags(stat, flags)
    }

    /// The reply to GETATTR and SETATTR of a node that is DAX or not.
    pub(super) fn attr_out(&self, stat: libc::stat64, timeout: Duration, dax: bool) -> AttrOut {
        AttrOut {
            attr_valid: timeout.as_secs(),
            attr_valid_nsec: timeout.subsec_nanos(),
            dummy: 0,
            attr: self.attr(stat, dax),
        }
    }

    /// The reply to all that yields an inode. The client decides here, and only here, whether the inode is DAX. One that
    /// does not go by the flag knows a file by one node id alone, however it takes it.
    pub(super) fn entry_out(&self, entry: Entry, dax: bool) -> EntryOut {
        let dax = dax && self.is_per_file(entry.attr.st_mode);
        let attr = self.attr(entry.attr, dax);
        let nodeid = node_id(entry.inode, dax);
        EntryOut { nodeid, attr, ..EntryOut::from(entry) }
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

    #[test]
    fn the_block_size_of_what_can_be_dax_is_the_page_size() {
        let per_file = PerFileDax::new(Policy::Always);
        // SAFETY: all zeros are a stat64.
        let mut stat: libc::stat64 = unsafe { std::mem::zeroed() };
        for block_size in [1024, 4096, 2 << 20] {
            stat.st_blksize = block_size;
            for (client, kind, expected) in [
                (ClientDax::Off, libc::S_IFREG, block_size),
                (ClientDax::PerFile, libc::S_IFREG, 4096),
                (ClientDax::Always, libc::S_IFREG, 4096),
                (ClientDax::Always, libc::S_IFDIR, block_size),
            ] {
                per_file.set_client(client);
                stat.st_mode = kind | 0o644;
                let attr = per_file.attr_out(stat, Duration::ZERO, false).attr;
                assert_eq!(attr.blksize, expected as u32, "{client:?} {kind:o}");
            }
        }
    }

    #[test]
    fn a_window_that_is_not_used_has_a_reason() {
        let (align, inode) = (init::MAP_ALIGNMENT, init::HAS_INODE_DAX);
        for (flags, says) in
            [(0, Some("dax=never")), (inode, Some("CONFIG_FUSE_DAX")), (align, None), (align | inode, None)]
        {
            let reason = ClientDax::from_offer(flags, true).why_off(flags);
            assert_eq!(reason.is_some(), says.is_some(), "{flags:#x}");
            assert!(says.is_none_or(|says| reason.unwrap().contains(says)), "{reason:?}");
        }
    }
}
