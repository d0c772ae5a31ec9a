//! The machine's file systems, by how they keep the DAX hint.

use std::path::Path;

use tempfile::TempDir;

/// An empty directory on a file system that keeps the DAX hint as a flag (ext4, xfs). `None`, said loudly, if there is
/// none where the tests are built.
pub(in crate::virtio::fs) fn directory_with_flags() -> Option<TempDir> {
    let built = std::env::current_exe().unwrap();
    directory_on(built.parent().unwrap(), &[0xef53, 0x5846_5342])
}

/// An empty directory on one that keeps it as an attribute (tmpfs since Linux 6.6).
pub(in crate::virtio::fs) fn directory_with_attributes() -> Option<TempDir> {
    let directory = directory_on(Path::new("/dev/shm"), &[0x0102_1994])?;
    let no_flags = rustix::fs::XattrFlags::empty();
    if rustix::fs::setxattr(directory.path(), c"user.test", b"", no_flags).is_err() {
        skipped!("on tmpfs: before Linux 6.6 it has no user attributes");
        return None;
    }
    Some(directory)
}

/// Both.
pub(in crate::virtio::fs) fn directories_with_hints() -> impl Iterator<Item = TempDir> {
    directory_with_flags().into_iter().chain(directory_with_attributes())
}

fn directory_on(parent: &Path, kinds: &[u64]) -> Option<TempDir> {
    let directory = TempDir::new_in(parent).unwrap();
    let kind = rustix::fs::statfs(directory.path()).unwrap().f_type as u64;
    if kinds.contains(&kind) {
        return Some(directory);
    }
    skipped!("on {}: its file system is {kind:#x} and not one of {kinds:#x?}", parent.display());
    None
}
