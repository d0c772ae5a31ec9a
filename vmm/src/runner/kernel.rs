//! The kernel to boot: the image that a user means, its version, and where its modules are.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::boot::{BootError, KernelFormat, KernelImage};
use crate::config::WHERE_KERNELS_ARE;
use crate::initramfs::{ModuleError, ModuleTree};

/// Where a directory may hold a kernel image, the most common first. A star stands for the end of a file name, or for
/// one directory.
const IMAGES: [&str; 11] = [
    "vmlinuz",
    "bzImage",
    "arch/x86/boot/bzImage",
    "vmlinuz-*",
    "boot/vmlinuz-*",
    "lib/modules/*/vmlinuz",
    "usr/lib/modules/*/vmlinuz",
    "vmlinux",
    "vmlinux-*",
    "boot/vmlinux-*",
    "usr/lib/debug/boot/vmlinux-*",
];

/// Why there is no kernel to boot. The message names what to do.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The running kernel has no image.
    #[error("No image of the running kernel {release} (looked for {looked}); {WHERE_KERNELS_ARE}")]
    NotRunning {
        /// As `uname -r` prints it.
        release: String,
        /// The files that are not there.
        looked: String,
    },
    /// The given path is not there.
    #[error("--kernel {0}: no such file or directory; {WHERE_KERNELS_ARE}")]
    Missing(PathBuf),
    /// The image may not be read.
    #[error("No permission to read the kernel {0}: `sudo chmod a+r {0}`, or give a copy of it with --kernel")]
    Permission(PathBuf),
    /// A directory without an image.
    #[error(
        "--kernel {0}: no kernel image in this directory; daxvm looks for vmlinuz, bzImage, arch/x86/boot/bzImage, \
         boot/vmlinuz-VERSION, lib/modules/VERSION/vmlinuz, vmlinux"
    )]
    NoImage(PathBuf),
    /// A directory with several images.
    #[error("--kernel {dir}: several kernels ({images}); name one of them")]
    Several {
        /// The directory.
        dir: PathBuf,
        /// The images, relative to it.
        images: String,
    },
    /// The image cannot be read, or is none.
    #[error(transparent)]
    Image(#[from] BootError),
    /// The image cannot be read.
    #[error("Cannot read the kernel {path}")]
    Read {
        /// The image.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Modules of another kernel.
    #[error("--modules {dir}: these are modules of {found}, and the kernel is {version}")]
    OtherModules {
        /// The directory.
        dir: PathBuf,
        /// The version that its modules have.
        found: String,
        /// The kernel's version.
        version: String,
    },
    /// The modules cannot be read.
    #[error(transparent)]
    Modules(#[from] ModuleError),
}

/// A kernel image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Kernel {
    /// The file.
    pub image: PathBuf,
    /// As `uname -r` will print it; none when the image does not tell.
    pub version: Option<String>,
}

impl Kernel {
    /// The kernel that a user means by `--kernel`: a file, a directory, or nothing for the running one.
    pub fn find(given: Option<&Path>) -> Result<Kernel, KernelError> {
        let image = match given {
            None => running(Path::new("/"), &running_release())?,
            Some(path) => match fs::metadata(path) {
                Ok(found) if found.is_dir() => image_in(path)?,
                Ok(_) => path.to_owned(),
                Err(error) => return Err(unreadable(path, error)),
            },
        };
        // The guest's modules are looked for beside the image itself, not beside a link to it.
        let image = image.canonicalize().map_err(|error| unreadable(&image, error))?;
        let mut file = File::open(&image).map_err(|error| unreadable(&image, error))?;
        let format = KernelImage::open(&image)?.format();
        let version = match format {
            KernelFormat::BzImage => version_of_bzimage(&mut file),
            KernelFormat::Elf => version_of_elf(&mut file),
        };
        let version = version.map_err(|source| KernelError::Read { path: image.clone(), source })?;
        Ok(Kernel { image, version })
    }

    /// The kernel's modules: in `given`, else beside the image or where the system has them. None when there are none,
    /// as with a kernel that has everything built in.
    pub fn modules(&self, given: Option<&Path>) -> Result<Option<ModuleTree>, KernelError> {
        if let Some(dir) = given {
            return self.given_modules(dir).map(Some);
        }
        let Some(version) = &self.version else { return Ok(None) };
        for base in self.image.ancestors().skip(1).take(4).chain([Path::new("/")]) {
            if let Some(dir) = modules_below(base, version) {
                return Ok(Some(ModuleTree::open(&dir)?));
            }
        }
        Ok(None)
    }

    fn given_modules(&self, dir: &Path) -> Result<ModuleTree, KernelError> {
        if let Some(dir) = self.version.as_deref().and_then(|version| modules_below(dir, version)) {
            return Ok(ModuleTree::open(&dir)?);
        }
        let tree = ModuleTree::open(dir)?;
        match &self.version {
            // A directory that is itself what is meant may have any name.
            Some(version) if !is_tree(dir) => Err(KernelError::OtherModules {
                dir: dir.to_owned(),
                found: tree.version().to_owned(),
                version: version.clone(),
            }),
            _ => Ok(tree),
        }
    }
}

fn running_release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// The image of the running kernel, below the host's `root`.
fn running(root: &Path, release: &str) -> Result<PathBuf, KernelError> {
    let candidates = [
        format!("boot/vmlinuz-{release}"),
        format!("lib/modules/{release}/vmlinuz"),
        format!("usr/lib/modules/{release}/vmlinuz"),
    ];
    let candidates = candidates.map(|candidate| root.join(candidate));
    let found = candidates.iter().find(|path| path.exists()).cloned();
    found.ok_or_else(|| KernelError::NotRunning {
        release: release.to_owned(),
        looked: candidates.map(|path| path.display().to_string()).join(", "),
    })
}

fn unreadable(path: &Path, error: io::Error) -> KernelError {
    match error.kind() {
        io::ErrorKind::NotFound => KernelError::Missing(path.to_owned()),
        io::ErrorKind::PermissionDenied => KernelError::Permission(path.to_owned()),
        _ => KernelError::Read { path: path.to_owned(), source: error },
    }
}

/// The only kernel image of the most common kind in a directory.
fn image_in(dir: &Path) -> Result<PathBuf, KernelError> {
    for pattern in IMAGES {
        let mut images = matches(dir, pattern);
        match images.len() {
            0 => continue,
            1 => return Ok(images.remove(0)),
            _ => {
                images.sort();
                let names = images.iter().filter_map(|image| image.strip_prefix(dir).ok()?.to_str());
                let images = names.collect::<Vec<_>>().join(", ");
                return Err(KernelError::Several { dir: dir.to_owned(), images });
            }
        }
    }
    Err(KernelError::NoImage(dir.to_owned()))
}

/// The files that a pattern of [`IMAGES`] stands for.
fn matches(dir: &Path, pattern: &str) -> Vec<PathBuf> {
    let candidates = match pattern.split_once('*') {
        None => vec![dir.join(pattern)],
        Some((before, after)) => {
            let (parent, start) = before.rsplit_once('/').unwrap_or(("", before));
            let entries = fs::read_dir(dir.join(parent)).into_iter().flatten().flatten();
            let named = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(start));
            named.map(|entry| entry.path().join(after.trim_start_matches('/'))).collect()
        }
    };
    // A path that ends in a slash, as after a pattern that ends in a star, is no file.
    let candidates = candidates.into_iter().map(|path| path.components().collect::<PathBuf>());
    candidates.filter(|path| path.is_file()).collect()
}

/// The modules of `version` that a directory holds or is.
fn modules_below(base: &Path, version: &str) -> Option<PathBuf> {
    let places = ["lib/modules", "usr/lib/modules", "modules/lib/modules", "modules", ""];
    let named = places.into_iter().map(|place| base.join(place).join(version)).find(|dir| is_tree(dir));
    let itself = || {
        let is_named = base.file_name().is_some_and(|name| name == version);
        // A build tree has them all over.
        let built = fs::read_to_string(base.join("include/config/kernel.release"));
        let is_built = built.is_ok_and(|release| release.trim() == version);
        ((is_named || is_built) && is_tree(base)).then(|| base.to_owned())
    };
    named.or_else(itself)
}

fn is_tree(dir: &Path) -> bool {
    dir.join("kernel").is_dir() && dir.join("modules.builtin").exists()
}

/// Where the header of a bzImage has the offset of the version string, less 0x200 (boot.rst, kernel_version).
const KERNEL_VERSION: u64 = 0x20e;

fn version_of_bzimage(image: &mut File) -> io::Result<Option<String>> {
    let mut offset = [0; 2];
    image.seek(SeekFrom::Start(KERNEL_VERSION))?;
    image.read_exact(&mut offset)?;
    let offset = u64::from(u16::from_le_bytes(offset));
    if offset == 0 {
        return Ok(None);
    }
    let mut text = Vec::new();
    image.seek(SeekFrom::Start(offset + 0x200))?;
    image.take(MAX_VERSION).read_to_end(&mut text)?;
    Ok(first_word(&text))
}

/// Bytes in which a version string ends.
const MAX_VERSION: u64 = 256;
/// What the kernel prints first (init/version.c, linux_banner).
const BANNER: &[u8] = b"Linux version ";

fn version_of_elf(image: &mut File) -> io::Result<Option<String>> {
    const STEP: usize = 1 << 20;
    image.rewind()?;
    let mut bytes = Vec::new();
    loop {
        // What a version at the end of the last step may have left over is looked at again.
        let kept = bytes.len().min(MAX_VERSION as usize);
        bytes.drain(..bytes.len() - kept);
        if image.take(STEP as u64).read_to_end(&mut bytes)? == 0 {
            return Ok(None);
        }
        let mut banners = memchr::memmem::find_iter(&bytes, BANNER).map(|at| &bytes[at + BANNER.len()..]);
        if let Some(version) = banners.find_map(first_word) {
            return Ok(Some(version));
        }
    }
}

/// The word that `text` begins with, if it is a version that ends there.
fn first_word(text: &[u8]) -> Option<String> {
    let end = text.iter().position(|byte| matches!(byte, b' ' | b'\n' | 0))?;
    let word = std::str::from_utf8(&text[..end]).ok()?;
    word.starts_with(|c: char| c.is_ascii_digit()).then(|| word.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    fn files(names: &[&str]) -> TempDir {
        let dir = TempDir::new().unwrap();
        for name in names {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        dir
    }

    fn bzimage(version: &str) -> Vec<u8> {
        let mut image = vec![0; 0x400];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x20e..0x210].copy_from_slice(&0x100u16.to_le_bytes());
        image[0x300..0x300 + version.len()].copy_from_slice(version.as_bytes());
        image
    }

    #[test]
    fn directories_of_all_sorts_have_one_image() {
        for (names, image) in [
            (&["vmlinuz", "vmlinux", "config"][..], "vmlinuz"),
            (&["arch/x86/boot/bzImage", "vmlinux", "Makefile"], "arch/x86/boot/bzImage"),
            (&["boot/vmlinuz-6.1", "boot/config-6.1"], "boot/vmlinuz-6.1"),
            (&["lib/modules/6.1/vmlinuz", "lib/modules/6.1/modules.builtin"], "lib/modules/6.1/vmlinuz"),
            (&["vmlinux-6.1"], "vmlinux-6.1"),
        ] {
            let dir = files(names);
            assert_eq!(image_in(dir.path()).unwrap(), dir.path().join(image), "{names:?}");
        }
        let dir = files(&["boot/vmlinuz-6.1", "boot/vmlinuz-6.2"]);
        let error = image_in(dir.path()).unwrap_err().to_string();
        assert!(error.contains("boot/vmlinuz-6.1, boot/vmlinuz-6.2"), "{error}");
        assert!(matches!(image_in(files(&["README"]).path()), Err(KernelError::NoImage(_))));
    }

    #[test]
    fn the_running_kernel_is_where_distributions_have_it() {
        for name in ["boot/vmlinuz-6.1", "lib/modules/6.1/vmlinuz"] {
            let dir = files(&[name]);
            assert_eq!(running(dir.path(), "6.1").unwrap(), dir.path().join(name));
        }
        let error = running(files(&["boot/vmlinuz-6.2"]).path(), "6.1").unwrap_err().to_string();
        assert!(error.contains("vmlinuz-6.1") && error.contains("apt download"), "{error}");
    }

    #[test]
    fn what_is_no_kernel_is_named() {
        let error = Kernel::find(Some(Path::new("/no/such/kernel"))).unwrap_err().to_string();
        assert!(error.contains("--kernel /no/such/kernel") && error.contains("dpkg -x"), "{error}");
        let dir = files(&["vmlinuz"]);
        assert!(matches!(Kernel::find(Some(dir.path())), Err(KernelError::Image(_))));
    }

    #[test]
    fn images_tell_their_version() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("vmlinuz");
        fs::write(&path, bzimage("6.1.0-9-cloud-amd64 (builder@host) #1 SMP")).unwrap();
        let kernel = Kernel::find(Some(&path)).unwrap();
        assert_eq!(kernel.version.as_deref(), Some("6.1.0-9-cloud-amd64"));

        // The banner lies across two steps, behind a format that only looks like it.
        let mut elf = vec![0; (1 << 20) - 7];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[100..118].copy_from_slice(b"Linux version %s (");
        elf.extend(b"Linux version 6.12.1 (builder@host)");
        fs::write(&path, elf).unwrap();
        assert_eq!(Kernel::find(Some(&path)).unwrap().version.as_deref(), Some("6.12.1"));
    }

    #[test]
    fn modules_are_found_beside_the_kernel_by_its_version() {
        for (image, modules) in [
            ("boot/vmlinuz-6.1", "lib/modules/6.1"),
            ("vmlinuz", "modules/lib/modules/6.1"),
            ("lib/modules/6.1/vmlinuz", "lib/modules/6.1"),
            ("vmlinuz", "modules/6.1"),
        ] {
            let dir = files(&[
                image,
                &format!("{modules}/modules.builtin"),
                &format!("{modules}/kernel/a.ko"),
                "lib/modules/6.2/kernel/a.ko",
            ]);
            let kernel =
                |version: &str| Kernel { image: dir.path().join(image), version: Some(version.to_owned()) };
            let tree = kernel("6.1").modules(None).unwrap();
            assert_eq!(tree.unwrap().version(), "6.1", "{image}, {modules}");
            assert!(kernel("6.3").modules(None).unwrap().is_none());
            let given = kernel("6.1").modules(Some(dir.path())).unwrap();
            assert_eq!(given.unwrap().version(), "6.1", "{modules}");
        }
    }

    #[test]
    fn a_build_tree_has_its_modules_all_over() {
        let dir = files(&[
            "arch/x86/boot/bzImage",
            "modules.builtin",
            "kernel/fork.o",
            "fs/overlayfs/overlay.ko",
            "include/config/kernel.release",
        ]);
        fs::write(dir.path().join("include/config/kernel.release"), "6.9.0-rc1\n").unwrap();
        let image = dir.path().join("arch/x86/boot/bzImage");
        let kernel = Kernel { image: image.clone(), version: Some("6.9.0-rc1".into()) };
        assert!(kernel.modules(None).unwrap().is_some());
        assert!(Kernel { image, version: Some("6.9.0".into()) }.modules(None).unwrap().is_none());
    }

    #[test]
    fn modules_of_another_kernel_are_refused() {
        let dir = files(&["lib/modules/6.2/kernel/a.ko", "lib/modules/6.2/modules.builtin"]);
        let kernel = Kernel { image: "/nonexistent".into(), version: Some("6.1".into()) };
        let error = kernel.modules(Some(dir.path())).unwrap_err().to_string();
        assert!(error.contains("modules of 6.2, and the kernel is 6.1"), "{error}");
        // Named itself, it is taken: whoever unpacks modules may call the directory what they like.
        assert!(kernel.modules(Some(&dir.path().join("lib/modules/6.2"))).unwrap().is_some());
    }
}
