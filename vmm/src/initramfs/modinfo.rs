//! What a kernel module says of itself: the `.modinfo` section of its ELF file.

use elf::{ElfBytes, ParseError, endian::AnyEndian};
use thiserror::Error;

/// Why a file gives no module information.
#[derive(Debug, Error)]
pub enum ModinfoError {
    /// The file is no readable ELF.
    #[error("Not an ELF file")]
    Elf(#[from] ParseError),
    /// The file is an ELF, but no kernel module.
    #[error("No .modinfo section: not a kernel module")]
    NoSection,
}

/// What a module needs to be loaded before it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Modinfo {
    /// Modules whose symbols it uses.
    pub depends: Vec<String>,
    /// Modules it asks for by name at run time, such as a checksum; optional for the loader.
    pub softdeps: Vec<String>,
}

impl Modinfo {
    /// Reads the `.modinfo` section of an uncompressed module.
    pub fn read(module: &[u8]) -> Result<Self, ModinfoError> {
        let elf = ElfBytes::<AnyEndian>::minimal_parse(module)?;
        let header = elf.section_header_by_name(".modinfo")?.ok_or(ModinfoError::NoSection)?;
        let (section, _) = elf.section_data(&header)?;
        Ok(Self::parse(section))
    }

    /// The section is a list of `key=value` strings, each ended by a zero byte.
    fn parse(section: &[u8]) -> Self {
        let mut info = Self::default();
        for field in section.split(|&byte| byte == 0) {
            let Some((key, value)) = std::str::from_utf8(field).ok().and_then(|f| f.split_once('=')) else {
                continue;
            };
            match key {
                "depends" => {
                    info.depends.extend(value.split(',').filter(|n| !n.is_empty()).map(str::to_owned))
                }
                "softdep" => info.softdeps.extend(before(value)),
                _ => {}
            }
        }
        info
    }
}

/// The `pre:` part of a soft dependency, `pre: a b post: c`.
fn before(softdep: &str) -> impl Iterator<Item = String> {
    let mut pre = false;
    softdep.split_whitespace().filter_map(move |word| {
        if let Some(part) = word.strip_suffix(':') {
            pre = part == "pre";
            return None;
        }
        pre.then(|| word.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_found_among_other_fields() {
        let section = b"license=GPL\0softdep=pre: crc32c post: later\0\0depends=jbd2,crc16\0odd\0name=ext4\0";
        let info = Modinfo::parse(section);
        assert_eq!(info.depends, ["jbd2", "crc16"]);
        assert_eq!(info.softdeps, ["crc32c"]);
    }

    #[test]
    fn no_dependencies_is_an_empty_list() {
        assert_eq!(Modinfo::parse(b"depends=\0"), Modinfo::default());
    }

    #[test]
    fn other_files_are_refused() {
        assert!(matches!(Modinfo::read(b"#!/bin/sh"), Err(ModinfoError::Elf(_))));
        let program = std::fs::read("/proc/self/exe").unwrap();
        assert!(matches!(Modinfo::read(&program), Err(ModinfoError::NoSection)));
    }
}
