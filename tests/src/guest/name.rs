//! Names and bytes as JSON strings: paths need not be UTF-8, and JSON must.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use serde::de::{self, Deserialize, Deserializer};
use serde::{Serialize, Serializer};

/// A path in the guest. As text, every byte that is `%` or not printable ASCII is written `%XX`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestPath(PathBuf);

impl GuestPath {
    /// The path as the system sees it.
    pub fn as_path(&self) -> &Path {
        &self.0
    }

    /// The path of an entry of this directory.
    pub fn join(&self, name: impl AsRef<Path>) -> GuestPath {
        GuestPath(self.0.join(name))
    }

    /// The last component, or nothing.
    pub fn file_name(&self) -> OsString {
        self.0.file_name().unwrap_or_default().to_owned()
    }

    fn from_text(text: &str) -> Option<GuestPath> {
        let mut bytes = Vec::with_capacity(text.len());
        let mut rest = text.as_bytes();
        while let Some((&first, tail)) = rest.split_first() {
            if first == b'%' {
                bytes.push(u8::from_str_radix(std::str::from_utf8(tail.get(..2)?).ok()?, 16).ok()?);
                rest = &tail[2..];
            } else {
                bytes.push(first);
                rest = tail;
            }
        }
        Some(GuestPath(PathBuf::from(OsString::from_vec(bytes))))
    }
}

impl AsRef<Path> for GuestPath {
    fn as_ref(&self) -> &Path {
        &self.0
    }
}

impl<T: AsRef<OsStr> + ?Sized> From<&T> for GuestPath {
    fn from(path: &T) -> GuestPath {
        GuestPath(PathBuf::from(path.as_ref()))
    }
}

impl From<String> for GuestPath {
    fn from(path: String) -> GuestPath {
        GuestPath(PathBuf::from(path))
    }
}

impl From<&GuestPath> for GuestPath {
    fn from(path: &GuestPath) -> GuestPath {
        path.clone()
    }
}

impl fmt::Display for GuestPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for &byte in self.0.as_os_str().as_bytes() {
            match byte {
                b'%' | ..=b' ' | 0x7f.. => write!(f, "%{byte:02X}")?,
                _ => write!(f, "{}", byte as char)?,
            }
        }
        Ok(())
    }
}

impl fmt::Debug for GuestPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for GuestPath {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for GuestPath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<GuestPath, D::Error> {
        let text = String::deserialize(deserializer)?;
        GuestPath::from_text(&text)
            .ok_or_else(|| de::Error::custom(format!("{text:?} is not an escaped path")))
    }
}

/// Bytes, as lower-case hexadecimal text.
#[derive(Clone, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
        let text = String::deserialize(deserializer)?;
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
        let bytes: Option<Vec<u8>> = text.as_bytes().chunks(2).map(byte).collect();
        bytes
            .filter(|_| text.len().is_multiple_of(2))
            .map(Bytes)
            .ok_or_else(|| de::Error::custom("not hexadecimal bytes"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_survives_in_a_path_and_in_bytes() {
        let all: Vec<u8> = (1..=255).collect();
        let path = GuestPath::from(OsStr::from_bytes(&all));
        let text = serde_json::to_string(&path).unwrap();
        assert!(text.is_ascii());
        assert_eq!(serde_json::from_str::<GuestPath>(&text).unwrap(), path);
        let bytes = Bytes(all);
        let text = serde_json::to_string(&bytes).unwrap();
        assert_eq!(serde_json::from_str::<Bytes>(&text).unwrap(), bytes);
    }

    #[test]
    fn broken_escapes_are_refused() {
        for text in ["\"%\"", "\"%1\"", "\"%zz\""] {
            assert!(serde_json::from_str::<GuestPath>(text).is_err(), "{text}");
        }
        assert!(serde_json::from_str::<Bytes>("\"abc\"").is_err());
    }
}
