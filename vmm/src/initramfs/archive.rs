//! A newc cpio archive, as the kernel unpacks it into its first root file system.

use std::collections::HashSet;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use cpio::newc::{Builder, ModeFileType, trailer};
use thiserror::Error;

/// Why an entry could not be added to an [`Archive`].
#[derive(Debug, Error)]
pub enum ArchiveError {
    /// The name has no place in an archive.
    #[error("{0:?} cannot be the name of an initramfs entry: use a relative path without . and .. in it")]
    Name(String),
    /// newc sizes have 32 bits.
    #[error(
        "{name} has {size} bytes, and an initramfs takes files below 4 GiB: share it with the guest instead"
    )]
    TooLarge {
        /// The entry's name.
        name: String,
        /// Its size.
        size: usize,
    },
    /// A host file could not be read.
    #[error("Could not read {path} for the initramfs")]
    Read {
        /// The host file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The archive's encoder failed.
    #[error("Could not encode the initramfs entry {name}")]
    Encode {
        /// The entry's name.
        name: String,
        /// What the encoder said.
        #[source]
        source: io::Error,
    },
}

/// An initramfs under construction. Parent directories are added as they are needed; all belongs to root.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
    directories: HashSet<String>,
}

impl Archive {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory, or nothing if it is there already.
    pub fn directory(&mut self, name: &str, mode: u32) -> Result<(), ArchiveError> {
        let name = checked(name)?;
        if self.directories.insert(name.to_owned()) {
            self.parents(name)?;
            self.entry(name, ModeFileType::Directory, mode, (0, 0), &[])?;
        }
        Ok(())
    }

    /// Adds a regular file with the given contents.
    pub fn file(&mut self, name: &str, mode: u32, contents: &[u8]) -> Result<(), ArchiveError> {
        let name = checked(name)?;
        self.parents(name)?;
        self.entry(name, ModeFileType::Regular, mode, (0, 0), contents)
    }

    /// Adds a regular file with the contents of a file of the host.
    pub fn host_file(&mut self, name: &str, mode: u32, path: &Path) -> Result<(), ArchiveError> {
        let contents =
            std::fs::read(path).map_err(|source| ArchiveError::Read { path: path.to_owned(), source })?;
        self.file(name, mode, &contents)
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, name: &str, target: &str) -> Result<(), ArchiveError> {
        let name = checked(name)?;
        self.parents(name)?;
        self.entry(name, ModeFileType::Symlink, 0o777, (0, 0), target.as_bytes())
    }

    /// Adds a character device; without `dev/console` (5, 1) the kernel gives init no standard streams.
    pub fn device(&mut self, name: &str, mode: u32, major: u32, minor: u32) -> Result<(), ArchiveError> {
        let name = checked(name)?;
        self.parents(name)?;
        self.entry(name, ModeFileType::Char, mode, (major, minor), &[])
    }

    /// Ends the archive and gives its bytes.
    pub fn finish(mut self) -> Result<Vec<u8>, ArchiveError> {
        trailer(&mut self.bytes)
            .map_err(|source| ArchiveError::Encode { name: "TRAILER!!!".to_owned(), source })?;
        Ok(self.bytes)
    }

    /// The kernel makes no missing directories: each must come before what is in it.
    fn parents(&mut self, name: &str) -> Result<(), ArchiveError> {
        match name.rsplit_once('/') {
            Some((parent, _)) => self.directory(parent, 0o755),
            None => Ok(()),
        }
    }

    fn entry(
        &mut self,
        name: &str,
        kind: ModeFileType,
        mode: u32,
        (major, minor): (u32, u32),
        contents: &[u8],
    ) -> Result<(), ArchiveError> {
        let size = u32::try_from(contents.len())
            .map_err(|_| ArchiveError::TooLarge { name: name.to_owned(), size: contents.len() })?;
        // Distinct inode numbers, because equal ones would make hard links.
        self.entries += 1;
        let mut writer = Builder::new(name)
            .ino(self.entries)
            .mode(mode & 0o7777)
            .set_mode_file_type(kind)
            .rdev_major(major)
            .rdev_minor(minor)
            .write(&mut self.bytes, size);
        writer
            .write_all(contents)
            .and_then(|()| writer.finish().map(drop))
            .map_err(|source| ArchiveError::Encode { name: name.to_owned(), source })
    }
}

/// Names are relative to the root of the archive; a leading slash is forgiven.
fn checked(name: &str) -> Result<&str, ArchiveError> {
    let relative = name.trim_start_matches('/').trim_end_matches('/');
    let odd = |part: &str| matches!(part, "" | "." | "..");
    if relative.contains('\0') || relative.split('/').any(odd) {
        return Err(ArchiveError::Name(name.to_owned()));
    }
    Ok(relative)
}

#[cfg(test)]
mod tests {
    use super::*;
    use cpio::newc::Reader;
    use std::io::Read;

    type Listed = (String, u32, (u32, u32), Vec<u8>);

    fn list(archive: &[u8]) -> Vec<Listed> {
        let mut rest = archive;
        let mut entries = Vec::new();
        loop {
            let mut reader = Reader::new(rest).unwrap();
            let entry = reader.entry();
            if entry.is_trailer() {
                return entries;
            }
            let mut listed: Listed =
                (entry.name().to_owned(), entry.mode(), (entry.rdev_major(), entry.rdev_minor()), Vec::new());
            reader.read_to_end(&mut listed.3).unwrap();
            entries.push(listed);
            rest = reader.finish().unwrap();
        }
    }

    #[test]
    fn every_kind_of_entry_comes_out_as_it_went_in() {
        let mut archive = Archive::new();
        archive.file("/init", 0o755, b"hello").unwrap();
        archive.device("dev/console", 0o600, 5, 1).unwrap();
        archive.symlink("bin/sh", "busybox").unwrap();
        archive.directory("proc", 0o555).unwrap();
        let listed = list(&archive.finish().unwrap());
        let expected: Vec<Listed> = vec![
            ("init".into(), 0o100755, (0, 0), b"hello".to_vec()),
            ("dev".into(), 0o040755, (0, 0), vec![]),
            ("dev/console".into(), 0o020600, (5, 1), vec![]),
            ("bin".into(), 0o040755, (0, 0), vec![]),
            ("bin/sh".into(), 0o120777, (0, 0), b"busybox".to_vec()),
            ("proc".into(), 0o040555, (0, 0), vec![]),
        ];
        assert_eq!(listed, expected);
    }

    #[test]
    fn parents_come_first_and_only_once() {
        let mut archive = Archive::new();
        archive.file("a/b/c", 0o644, b"1").unwrap();
        archive.file("a/b/d", 0o644, b"").unwrap();
        archive.directory("a", 0o700).unwrap();
        let names: Vec<String> = list(&archive.finish().unwrap()).into_iter().map(|entry| entry.0).collect();
        assert_eq!(names, ["a", "a/b", "a/b/c", "a/b/d"]);
    }

    #[test]
    fn names_that_leave_the_archive_are_refused() {
        for name in ["", "/", "a/../b", ".", "a//b", "a\0b"] {
            assert!(
                matches!(Archive::new().file(name, 0o644, b""), Err(ArchiveError::Name(_))),
                "{name:?} was taken"
            );
        }
    }

    #[test]
    fn a_missing_host_file_is_named() {
        let error = Archive::new().host_file("init", 0o755, Path::new("/nonexistent/init")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/init"));
    }
}
