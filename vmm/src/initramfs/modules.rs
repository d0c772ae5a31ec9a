//! Kernel modules on the host: which files a list of names stands for, and in which order they are loaded.

use std::cell::OnceCell;
use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::modinfo::{Modinfo, ModinfoError};
use crate::compression::Compression;

/// Why modules could not be found or read.
#[derive(Debug, Error)]
pub enum ModuleError {
    /// There are no modules where they were looked for.
    #[error(
        "No kernel modules in {0}: name a directory that holds lib/modules/VERSION, such as an unpacked kernel package"
    )]
    NoModules(PathBuf),
    /// Several kernels' modules are there.
    #[error("{dir} holds modules of several kernels ({versions}): name one of them, {dir}/VERSION")]
    SeveralKernels {
        /// Where they are.
        dir: PathBuf,
        /// The kernels' versions.
        versions: String,
    },
    /// No file, and not built into the kernel.
    #[error("The kernel has no module {name} in {dir}: do the modules belong to this kernel?")]
    NotFound {
        /// The module.
        name: String,
        /// The tree it is not in.
        dir: PathBuf,
    },
    /// A file or directory could not be read.
    #[error("Could not read {path}")]
    Read {
        /// What was read.
        path: PathBuf,
        /// What the system or the decompressor said.
        #[source]
        source: io::Error,
    },
    /// A file is not what its name says.
    #[error("{path} is no kernel module")]
    NotAModule {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: ModinfoError,
    },
}

/// A module that is ready to be loaded by `init_module`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// The name as the kernel shows it, with underscores.
    pub name: String,
    /// The file it came from.
    pub path: PathBuf,
    /// The ELF file, decompressed.
    pub bytes: Vec<u8>,
}

/// The modules of one kernel, `lib/modules/VERSION`.
///
/// Dependencies are read from the modules themselves: an unpacked package has no `modules.dep`, which is only made when
/// it is installed.
#[derive(Debug)]
pub struct ModuleTree {
    dir: PathBuf,
    listed: BTreeMap<String, PathBuf>,
    files: OnceCell<BTreeMap<String, PathBuf>>,
    builtin: HashSet<String>,
}

impl ModuleTree {
    /// Opens `lib/modules/VERSION`, or the only such directory below a root file system or an unpacked package.
    pub fn open(dir: &Path) -> Result<Self, ModuleError> {
        let dir = version_dir(dir)?;
        let list = dir.join("modules.builtin");
        let builtin = match fs::read_to_string(&list) {
            Ok(lines) => lines.lines().filter_map(|line| module_name(Path::new(line))).collect(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => HashSet::new(),
            Err(source) => return Err(ModuleError::Read { path: list, source }),
        };
        let order = fs::read_to_string(dir.join("modules.order")).unwrap_or_default();
        let listed = order.lines().filter_map(|line| {
            // A build tree of a newer kernel lists what the modules are linked from.
            let file = line.strip_suffix(".o").map_or(line.to_owned(), |stem| format!("{stem}.ko"));
            Some((module_name(Path::new(&file))?, dir.join(file)))
        });
        Ok(Self { listed: listed.collect(), files: OnceCell::new(), builtin, dir })
    }

    /// The file of a module. A distribution has thousands of them, which are only looked through for one that is not
    /// where the kernel's own list says.
    fn file(&self, name: &str) -> Result<Option<PathBuf>, ModuleError> {
        if let Some(path) = self.listed.get(name) {
            let compressed = |suffix: &&str| PathBuf::from(format!("{}{suffix}", path.display()));
            let candidates = ["", ".xz", ".zst", ".gz"].iter().map(compressed);
            if let Some(path) = candidates.into_iter().find(|path| path.exists()) {
                return Ok(Some(path));
            }
        }
        Ok(self.files()?.get(name).cloned())
    }

    /// All module files by name.
    fn files(&self) -> Result<&BTreeMap<String, PathBuf>, ModuleError> {
        if let Some(files) = self.files.get() {
            return Ok(files);
        }
        let mut files = BTreeMap::new();
        scan(&self.dir, &mut files)?;
        Ok(self.files.get_or_init(|| files))
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The kernel's version, as `uname -r` prints it.
    pub fn version(&self) -> &str {
        self.dir.file_name().and_then(|name| name.to_str()).unwrap_or_default()
    }

    /// Whether the kernel has the module built in, so that nothing has to be loaded.
    pub fn is_builtin(&self, name: &str) -> bool {
        self.builtin.contains(&canonical(name))
    }

    /// The modules that must be loaded to have all of `names`, each after those it depends on; what is built into the
    /// kernel needs no file.
    pub fn resolve(&self, names: &[&str]) -> Result<Vec<Module>, ModuleError> {
        let mut modules = Vec::new();
        let mut seen = HashSet::new();
        for name in names {
            self.visit(&canonical(name), &mut seen, &mut modules)?;
        }
        Ok(modules)
    }

    fn visit(
        &self,
        name: &str,
        seen: &mut HashSet<String>,
        modules: &mut Vec<Module>,
    ) -> Result<(), ModuleError> {
        if self.builtin.contains(name) || !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let path = self
            .file(name)?
            .ok_or_else(|| ModuleError::NotFound { name: name.to_owned(), dir: self.dir.clone() })?;
        let bytes = read_module(&path)?;
        let info =
            Modinfo::read(&bytes).map_err(|source| ModuleError::NotAModule { path: path.clone(), source })?;
        for softdep in &info.softdeps {
            if let Some(wanted) = file_of_softdep(self.files()?, softdep) {
                self.visit(&wanted, seen, modules)?;
            }
        }
        for dependency in &info.depends {
            self.visit(&canonical(dependency), seen, modules)?;
        }
        modules.push(Module { name: name.to_owned(), path, bytes });
        Ok(())
    }
}

/// The module a soft dependency stands for, if any. Those on algorithms (`crypto-crc32c`) name an alias that every
/// implementation carries; the generic one always works.
fn file_of_softdep(files: &BTreeMap<String, PathBuf>, softdep: &str) -> Option<String> {
    let name = canonical(softdep);
    let algorithm = name.strip_prefix("crypto_").unwrap_or(&name);
    [name.clone(), algorithm.to_owned(), format!("{algorithm}_generic")]
        .into_iter()
        .find(|candidate| files.contains_key(candidate))
}

/// The one directory below `dir`, or `dir` itself, that holds the modules of a kernel.
fn version_dir(dir: &Path) -> Result<PathBuf, ModuleError> {
    if dir.join("kernel").is_dir() && dir.join("modules.builtin").exists() {
        return Ok(dir.to_owned());
    }
    for base in [dir.join("lib/modules"), dir.join("usr/lib/modules"), dir.to_owned()] {
        let Ok(entries) = fs::read_dir(&base) else { continue };
        let mut versions: Vec<PathBuf> = entries
            .filter_map(Result::ok)
            .map(|entry| entry.path())
            .filter(|path| path.join("kernel").is_dir())
            .collect();
        versions.sort();
        match versions.as_slice() {
            [] => continue,
            [only] => return Ok(only.clone()),
            several => {
                let names = several.iter().filter_map(|path| path.file_name()?.to_str());
                return Err(ModuleError::SeveralKernels {
                    dir: base,
                    versions: names.collect::<Vec<_>>().join(", "),
                });
            }
        }
    }
    Err(ModuleError::NoModules(dir.to_owned()))
}

/// Collects the module files below `dir`. Links are not followed: `build` and `source` lead out of the tree.
fn scan(dir: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<(), ModuleError> {
    let failed = |source| ModuleError::Read { path: dir.to_owned(), source };
    for entry in fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_type().map_err(failed)?.is_dir() {
            scan(&entry.path(), files)?;
        } else if let Some(name) = module_name(&entry.path()) {
            files.insert(name, entry.path());
        }
    }
    Ok(())
}

/// `kernel/fs/fuse/virtio-fs.ko.xz` is the module `virtio_fs`.
fn module_name(path: &Path) -> Option<String> {
    let (stem, suffix) = path.file_name()?.to_str()?.split_once(".ko")?;
    matches!(suffix, "" | ".xz" | ".zst" | ".gz").then(|| canonical(stem))
}

/// The kernel takes dashes in module names for underscores.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

/// A module file's contents, decompressed as its name says.
fn read_module(path: &Path) -> Result<Vec<u8>, ModuleError> {
    let extension = path.extension().and_then(|extension| extension.to_str());
    let decompress = || -> io::Result<Vec<u8>> {
        let raw = fs::read(path)?;
        match extension.and_then(Compression::of_module) {
            Some(compression) => compression.decompress(&raw),
            None => Ok(raw),
        }
    };
    decompress().map_err(|source| ModuleError::Read { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use tempfile::TempDir;

    /// The smallest ELF with a `.modinfo` section: a header, two strings tables' worth of bytes, three section headers.
    fn module(modinfo: &str) -> Vec<u8> {
        const NAMES: &[u8] = b"\0.modinfo\0.shstrtab\0";
        let modinfo = modinfo.as_bytes();
        let names_at = 64 + modinfo.len() as u64;
        let sections_at = names_at + NAMES.len() as u64;
        let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        for half in [1u16, 62] {
            elf.extend(half.to_le_bytes());
        }
        elf.extend(1u32.to_le_bytes());
        for word in [0, 0, sections_at] {
            elf.extend(u64::to_le_bytes(word));
        }
        elf.extend(0u32.to_le_bytes());
        for half in [64u16, 0, 0, 64, 3, 2] {
            elf.extend(half.to_le_bytes());
        }
        elf.extend(modinfo);
        elf.extend(NAMES);
        let sections =
            [(0, 0, 0, 0), (1, 1, 64, modinfo.len() as u64), (10, 3, names_at, NAMES.len() as u64)];
        for (name, kind, offset, size) in sections {
            elf.extend(u32::to_le_bytes(name));
            elf.extend(u32::to_le_bytes(kind));
            for word in [0, 0, offset, size, 0, 1, 0] {
                elf.extend(u64::to_le_bytes(word));
            }
        }
        elf
    }

    fn tree(modules: &[(&str, &str)]) -> TempDir {
        let dir = TempDir::new().unwrap();
        let root = dir.path().join("lib/modules/6.1-test");
        fs::create_dir_all(root.join("kernel/fs")).unwrap();
        fs::write(root.join("modules.builtin"), "kernel/fs/built-in.ko\n").unwrap();
        for (file, modinfo) in modules {
            fs::write(root.join("kernel").join(file), module(modinfo)).unwrap();
        }
        dir
    }

    fn order_of(tree: &ModuleTree, names: &[&str]) -> Vec<String> {
        tree.resolve(names).unwrap().into_iter().map(|module| module.name).collect()
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let dir = tree(&[
            ("fs/top.ko", "depends=mid-dle,base\0"),
            ("fs/mid_dle.ko", "depends=base,built_in\0"),
            ("base.ko", "depends=\0"),
        ]);
        let tree = ModuleTree::open(dir.path()).unwrap();
        assert_eq!(tree.version(), "6.1-test");
        assert_eq!(order_of(&tree, &["top", "base", "built-in"]), ["base", "mid_dle", "top"]);
    }

    #[test]
    fn the_kernels_list_is_believed_as_far_as_it_is_true() {
        let dir = tree(&[
            ("fs/a.ko", "depends=b-c\0"),
            ("b_c.ko", "depends=moved\0"),
            ("fs/moved.ko", "depends=\0"),
        ]);
        let order = dir.path().join("lib/modules/6.1-test/modules.order");
        fs::write(&order, "kernel/fs/a.ko\nkernel/b_c.o\nkernel/net/moved.ko\nkernel/gone.ko\n").unwrap();
        let tree = ModuleTree::open(dir.path()).unwrap();
        assert!(tree.file("a").unwrap().is_some() && tree.file("b_c").unwrap().is_some());
        assert!(tree.files.get().is_none(), "nobody had to look for them");
        assert_eq!(order_of(&tree, &["a"]), ["moved", "b_c", "a"]);
        assert!(tree.resolve(&["gone"]).is_err());
    }

    #[test]
    fn soft_dependencies_are_loaded_when_they_are_there() {
        let dir =
            tree(&[("ext4.ko", "softdep=pre: crypto-crc32c absent\0"), ("crc32c_generic.ko", "depends=\0")]);
        let tree = ModuleTree::open(dir.path()).unwrap();
        assert_eq!(order_of(&tree, &["ext4"]), ["crc32c_generic", "ext4"]);
    }

    #[test]
    fn a_version_directory_can_be_named_itself() {
        let dir = tree(&[("a.ko", "depends=\0")]);
        let tree = ModuleTree::open(&dir.path().join("lib/modules/6.1-test")).unwrap();
        assert_eq!(order_of(&tree, &["a"]), ["a"]);
        assert!(tree.is_builtin("built-in") && !tree.is_builtin("a"));
    }

    #[test]
    fn compressed_modules_are_decompressed() {
        let dir = tree(&[]);
        let kernel = dir.path().join("lib/modules/6.1-test/kernel");
        let gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        let xz = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(0)).unwrap();
        let zstd = ruzstd::encoding::compress_to_vec(
            module("depends=\0").as_slice(),
            ruzstd::encoding::CompressionLevel::Fastest,
        );
        fs::write(kernel.join("g.ko.gz"), written(gzip, |w| w.finish().unwrap())).unwrap();
        fs::write(kernel.join("x.ko.xz"), written(xz, |w| w.finish().unwrap())).unwrap();
        fs::write(kernel.join("z.ko.zst"), zstd).unwrap();
        for module_read in ModuleTree::open(dir.path()).unwrap().resolve(&["g", "x", "z"]).unwrap() {
            assert_eq!(module_read.bytes, module("depends=\0"), "{}", module_read.name);
        }
    }

    fn written<W: Write>(mut encoder: W, finish: impl FnOnce(W) -> Vec<u8>) -> Vec<u8> {
        encoder.write_all(&module("depends=\0")).unwrap();
        finish(encoder)
    }

    #[test]
    fn what_is_missing_is_named() {
        let dir = tree(&[("a.ko", "depends=gone\0"), ("b.ko", "depends=\0")]);
        let tree = ModuleTree::open(dir.path()).unwrap();
        assert!(matches!(tree.resolve(&["a"]), Err(ModuleError::NotFound { name, .. }) if name == "gone"));
        assert!(matches!(ModuleTree::open(Path::new("/proc/self")), Err(ModuleError::NoModules(_))));
    }

    #[test]
    fn several_kernels_are_not_guessed_between() {
        let dir = tree(&[]);
        fs::create_dir_all(dir.path().join("lib/modules/6.2/kernel")).unwrap();
        let error = ModuleTree::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("6.1-test, 6.2"), "{error}");
    }

    #[test]
    fn a_file_that_is_no_module_is_named() {
        let dir = tree(&[]);
        fs::write(dir.path().join("lib/modules/6.1-test/kernel/a.ko"), "text").unwrap();
        let error = ModuleTree::open(dir.path()).unwrap().resolve(&["a"]).unwrap_err();
        assert!(matches!(error, ModuleError::NotAModule { path, .. } if path.ends_with("a.ko")));
    }
}
