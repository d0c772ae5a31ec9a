//! The files of a share on the host, as facts for a policy.

use std::cell::OnceCell;
use std::collections::HashMap;
use std::ffi::CStr;
use std::fs::Metadata;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use devices::virtio::fs::hint;
use devices::virtio::fs::policy::{FileFacts, Policy, WindowFacts};
use walkdir::WalkDir;

/// Directories that are read at the same time. With more levels than that, the names of an upper directory are held in
/// memory.
const OPEN_DIRECTORIES: usize = 64;
/// The longest value of an extended attribute (linux/limits.h, XATTR_SIZE_MAX).
const XATTR_SIZE_MAX: usize = 64 << 10;

/// A directory that is to be shared.
pub(super) struct Share {
    root: PathBuf,
    now: SystemTime,
}

/// What all files of a share have in common.
#[derive(Clone, Copy)]
pub(super) struct Setting {
    pub(super) window: WindowFacts,
    pub(super) read_only: bool,
}

impl Share {
    /// The share of a directory, which may be a symbolic link to one.
    pub(super) fn open(directory: &Path) -> io::Result<Share> {
        let root = directory.canonicalize()?;
        if !root.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        Ok(Share { root, now: SystemTime::now() })
    }

    /// Where a path given by the user leads: one relative to the share, or an absolute one into it.
    ///
    /// # Errors
    /// There is nothing, or it is not in the share. A message that says what to write.
    pub(super) fn find(&self, path: &Path) -> Result<PathBuf, String> {
        let wrong = |error: io::Error| {
            let path = path.display();
            format!("{path}: {error}; give a path relative to the share, or an absolute one into it")
        };
        let whole = self.root.join(path);
        // The last component is not followed: a symbolic link is a file of its own.
        let found = match (whole.parent(), whole.file_name()) {
            (Some(parent), Some(name)) => parent.canonicalize().map(|parent| parent.join(name)),
            _ => whole.canonicalize(),
        };
        let found = found.map_err(wrong)?;
        if !found.starts_with(&self.root) {
            return Err(format!("{} is not in the share {}", path.display(), self.root.display()));
        }
        found.symlink_metadata().map_err(wrong)?;
        Ok(found)
    }

    /// The share itself.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Calls `each` for all that is at or below `start`, directories left out, or for why something cannot be read.
    /// Symbolic links are not followed.
    pub(super) fn walk<E>(
        &self,
        start: &Path,
        mut each: impl FnMut(Result<HostFile<'_>, String>) -> Result<(), E>,
    ) -> Result<(), E> {
        for entry in WalkDir::new(start).max_open(OPEN_DIRECTORIES) {
            let file = entry.and_then(|entry| {
                let metadata = entry.metadata()?;
                Ok((entry.into_path(), metadata))
            });
            match file {
                Ok((_, metadata)) if metadata.is_dir() => {}
                Ok((path, metadata)) => each(Ok(HostFile::new(self, path, metadata)))?,
                Err(error) => each(Err(unreadable(&error)))?,
            }
        }
        Ok(())
    }
}

fn unreadable(error: &walkdir::Error) -> String {
    let path = error.path().unwrap_or(Path::new("a file")).display();
    error.io_error().map_or(format!("Cannot read {path}"), |why| format!("Cannot read {path}: {why}"))
}

/// A file, of which a policy's facts are gathered when the policy asks for them.
pub(super) struct HostFile<'a> {
    share: &'a Share,
    path: PathBuf,
    pub(super) metadata: Metadata,
    hint: OnceCell<bool>,
    capabilities: OnceCell<bool>,
}

impl<'a> HostFile<'a> {
    fn new(share: &'a Share, path: PathBuf, metadata: Metadata) -> HostFile<'a> {
        HostFile { share, path, metadata, hint: OnceCell::new(), capabilities: OnceCell::new() }
    }

    /// The path relative to the share.
    pub(super) fn path(&self) -> &Path {
        self.path.strip_prefix(&self.share.root).unwrap_or(&self.path)
    }

    /// Whether its persistent flag is set.
    pub(super) fn hint(&self) -> bool {
        *self.hint.get_or_init(|| self.metadata.is_file() && hint::read(&self.path).unwrap_or(false))
    }

    fn capabilities(&self) -> bool {
        let read = || rustix::fs::lgetxattr_query(&*self.path, "security.capability").is_ok();
        *self.capabilities.get_or_init(read)
    }

    fn xattr(&self, name: &CStr) -> Option<Vec<u8>> {
        let mut value = vec![0; rustix::fs::lgetxattr_query(&*self.path, name).ok()?];
        match rustix::fs::lgetxattr(&*self.path, name, &mut value) {
            Ok(length) => value.truncate(length),
            // It has become longer meanwhile.
            Err(rustix::io::Errno::RANGE) => {
                value.resize(XATTR_SIZE_MAX, 0);
                let length = rustix::fs::lgetxattr(&*self.path, name, &mut value).ok()?;
                value.truncate(length);
            }
            Err(_) => return None,
        }
        Some(value)
    }

    /// Hands the facts that `policy` asks for to `use_facts`.
    pub(super) fn with_facts<T>(
        &self,
        policy: &Policy,
        setting: Setting,
        use_facts: impl FnOnce(&FileFacts<'_>) -> T,
    ) -> T {
        let needs = policy.needs();
        let xattrs: Vec<_> = needs.xattrs.iter().map(|name| self.xattr(name)).collect();
        let changed = self.metadata.modified().ok();
        let age = changed.and_then(|changed| self.share.now.duration_since(changed).ok());
        use_facts(&FileFacts {
            mode: self.metadata.mode(),
            size: self.metadata.len(),
            uid: self.metadata.uid(),
            gid: self.metadata.gid(),
            age: age.unwrap_or_default(),
            read_only: setting.read_only,
            window: setting.window,
            path: self.path().as_os_str().as_bytes(),
            hint: needs.hint && self.hint(),
            capabilities: needs.capabilities && self.capabilities(),
            xattrs: &xattrs,
        })
    }
}

/// Recognises further names of a file, with memory for those alone of which more names are to come.
#[derive(Default)]
pub(super) struct HardLinks {
    to_come: HashMap<(u64, u64), u64>,
}

impl HardLinks {
    /// Whether the file was seen under another name.
    pub(super) fn is_known(&mut self, metadata: &Metadata) -> bool {
        if metadata.nlink() <= 1 {
            return false;
        }
        let inode = (metadata.dev(), metadata.ino());
        let Some(to_come) = self.to_come.get_mut(&inode) else {
            self.to_come.insert(inode, metadata.nlink() - 1);
            return false;
        };
        *to_come -= 1;
        if *to_come == 0 {
            self.to_come.remove(&inode);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_one_file_are_counted_once_and_then_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("one"), "").unwrap();
        std::fs::write(path("other"), "").unwrap();
        std::fs::hard_link(path("one"), path("two")).unwrap();
        std::fs::hard_link(path("one"), path("three")).unwrap();
        let mut links = HardLinks::default();
        let seen =
            ["one", "other", "two", "three"].map(|name| links.is_known(&path(name).metadata().unwrap()));
        assert_eq!(seen, [false, false, true, true]);
        assert!(links.to_come.is_empty());
    }

    #[test]
    fn paths_lead_into_the_share_and_nowhere_else() {
        let directory = tempfile::tempdir().unwrap();
        let inside = directory.path().join("share");
        std::fs::create_dir_all(inside.join("sub")).unwrap();
        std::fs::write(inside.join("sub/file"), "").unwrap();
        std::fs::write(directory.path().join("secret"), "").unwrap();
        std::os::unix::fs::symlink("..", inside.join("up")).unwrap();
        std::os::unix::fs::symlink("share", directory.path().join("link")).unwrap();
        let share = Share::open(&directory.path().join("link")).unwrap();
        let root = inside.canonicalize().unwrap();
        for path in ["sub/file", "./sub/../sub/file", "up/share/sub/file"] {
            assert_eq!(share.find(path.as_ref()), Ok(root.join("sub/file")), "{path}");
        }
        assert_eq!(share.find(&root.join("sub/file")), Ok(root.join("sub/file")));
        assert_eq!(share.find(".".as_ref()), Ok(root.clone()));
        assert_eq!(share.find("up".as_ref()), Ok(root.join("up")));
        for path in ["../secret", "up/secret", "/etc/passwd", ".."] {
            assert!(share.find(path.as_ref()).unwrap_err().contains("not in the share"), "{path}");
        }
        assert!(share.find("none".as_ref()).unwrap_err().contains("relative to the share"));
        assert!(Share::open(&inside.join("sub/file")).is_err());
    }
}
