//! The persistent hint: chattr in the guest, what the host sees of it, and when a change shows.

use std::error::Error;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::io::Errno;
use tests::guest::data::{Content, fill};
use tests::guest::{Bytes, Op, OpenHow, Stat};
use tests::inode_flags::{DAX, Extended, XFLAG_DAX};

use crate::harness::{Checks, Outcome, Scene, ensure, ensure_eq, ensure_errno};
use crate::per_file::{ATTRIBUTE, ensure_marked, mark, marks};

const FILE: Content = Content { seed: 3, len: 3 << 20 };

pub fn checks() -> Checks {
    vec![
        ("chattr-on-files", chattr_files),
        ("chattr-on-directories", chattr_directories),
        ("chattr-refuses-other-flags", chattr_others),
        ("chattr-in-every-mount", chattr_mounts),
        ("hint-changes-with-cache-never", |scene| changes(scene, "-keep-never")),
        ("hint-changes-with-cache-auto", |scene| changes(scene, "-keep-auto")),
        ("hint-changes-with-cache-metadata", |scene| changes(scene, "-keep-metadata")),
        ("hint-changes-with-cache-always", |scene| changes(scene, "-keep-always")),
    ]
}

pub fn checks_after_reboot() -> Checks {
    vec![("hints-survive-a-reboot", after_reboot)]
}

fn flags(scene: &mut Scene, path: &str) -> Result<u32, Box<dyn Error>> {
    Ok(scene.vm.call(&Op::Flags(path.into()))?)
}

/// chattr +x or -x, which opens the file and sets what it was with the one flag changed.
fn chattr(scene: &mut Scene, path: &str, hint: bool) -> Outcome {
    let now = flags(scene, path)?;
    let wanted = if hint { now | DAX } else { now & !DAX };
    Ok(scene.vm.run(Op::SetFlags(path.into(), wanted))?)
}

/// Opens a file; the handle, and whether it is DAX.
fn open(scene: &mut Scene, path: &str, how: OpenHow) -> Result<(u32, bool), Box<dyn Error>> {
    let handle = scene.vm.open(path, how)?;
    let stat: Stat = scene.vm.call(&Op::StatHandle(handle))?;
    Ok((handle, stat.dax))
}

/// Whether a file is DAX when it is opened.
fn opens_as(scene: &mut Scene, path: &str) -> Result<bool, Box<dyn Error>> {
    let (handle, dax) = open(scene, path, OpenHow::default())?;
    scene.vm.run(Op::Close(handle))?;
    Ok(dax)
}

const CREATE: OpenHow =
    OpenHow { write: true, create_new: true, append: false, truncate: false, unnamed: false };

/// What is counted about the share of the chattr checks: how many files it knew depends on the names that were asked for.
fn expect_changes(scene: &mut Scene, reincarnations: u64) {
    let counts = scene.expect("-chattr");
    (counts.granted, counts.denied, counts.hint_queries) = (None, None, None);
    (counts.setups, counts.removes) = (None, None);
    counts.reincarnations = counts.reincarnations.map(|count| count + reincarnations);
}

fn chattr_files(scene: &mut Scene) -> Outcome {
    let host = scene.share_dir("-chattr").join("file");
    FILE.write_to(&host)?;
    expect_changes(scene, 2);
    scene.mounted("-chattr", "dax=inode", |scene, mnt| {
        let path = format!("{mnt}/file");
        ensure!(!scene.vm.stat(path.as_str())?.dax, "a file without the hint is DAX");
        let before = flags(scene, &path)?;
        ensure_eq!(before & DAX, 0, "the flag of a new file");

        // FS_IOC_SETFLAGS.
        scene.vm.run(Op::SetFlags(path.as_str().into(), before | DAX))?;
        ensure_marked(scene.place, &host, true)?;
        ensure!(!scene.vm.stat(path.as_str())?.dax, "stat says DAX before the file was opened again");
        ensure!(opens_as(scene, &path)?, "opened after chattr +x it is not DAX");
        ensure!(scene.vm.stat(path.as_str())?.dax, "stat does not say what the file was opened as");
        ensure_eq!(flags(scene, &path)?, before | DAX, "the flags");
        ensure_eq!(scene.vm.verify(&[(&path, FILE)], 1, true)?.differs, vec![], "as DAX");
        // The attribute is nobody's business in the guest.
        let names: Vec<String> = scene.vm.call(&Op::ListXattr(path.as_str().into()))?;
        ensure!(!names.iter().any(|name| name == ATTRIBUTE), "the hint's attribute is listed: {names:?}");
        let get = scene.vm.call::<Bytes>(&Op::GetXattr(path.as_str().into(), ATTRIBUTE.into()));
        ensure_errno(get, &[Errno::NODATA.raw_os_error()], "the hint's attribute")?;
        let set = scene.vm.run(Op::SetXattr(path.as_str().into(), ATTRIBUTE.into(), Bytes(b"0".to_vec())));
        ensure_errno(set, &[Errno::PERM.raw_os_error()], "setting the hint's attribute")?;

        // FS_IOC_FSSETXATTR.
        let attributes: Extended = scene.vm.call(&Op::Extended(path.as_str().into()))?;
        ensure_eq!(attributes.xflags & XFLAG_DAX, XFLAG_DAX, "FS_XFLAG_DAX");
        let without = Extended { xflags: attributes.xflags & !XFLAG_DAX, ..attributes };
        scene.vm.run(Op::SetExtended(path.as_str().into(), without))?;
        ensure_marked(scene.place, &host, false)?;
        ensure!(scene.vm.stat(path.as_str())?.dax, "stat says not DAX before the file was opened again");
        ensure!(!opens_as(scene, &path)?, "opened after the flag was cleared it is DAX");
        ensure_eq!(flags(scene, &path)?, before, "the flags");
        ensure_eq!(scene.vm.verify(&[(&path, FILE)], 1, true)?.differs, vec![], "as not DAX");
        Ok(())
    })
}

/// New files and directories take the hint from their directory when they are made.
fn chattr_directories(scene: &mut Scene) -> Outcome {
    let host = scene.share_dir("-chattr").join("directory");
    fs::create_dir(&host)?;
    expect_changes(scene, 0);
    scene.mounted("-chattr", "", |scene, mnt| {
        let top = format!("{mnt}/directory");
        chattr(scene, &top, true)?;
        ensure_marked(scene.place, &host, true)?;
        ensure_eq!(flags(scene, &top)? & DAX, DAX, "the directory's flag");
        ensure!(!scene.vm.stat(top.as_str())?.dax, "a directory says DAX");
        scene.vm.run(Op::Mkdir(format!("{top}/sub").into()))?;
        ensure_marked(scene.place, &host.join("sub"), true)?;
        for name in ["new", "sub/new"] {
            let (handle, dax) = open(scene, &format!("{top}/{name}"), CREATE)?;
            scene.vm.run(Op::Close(handle))?;
            ensure!(dax, "{name}, made in a directory with the hint, is not DAX");
            ensure_marked(scene.place, &host.join(name), true)?;
        }
        let unnamed = OpenHow { write: true, unnamed: true, ..OpenHow::default() };
        let (handle, dax) = open(scene, &top, unnamed)?;
        ensure!(dax, "a file without a name, made in a directory with the hint, is not DAX");
        scene.vm.run(Op::LinkHandle(handle, format!("{top}/named").into()))?;
        scene.vm.run(Op::Close(handle))?;
        ensure!(scene.vm.stat(format!("{top}/named"))?.dax, "it is not DAX under its name");
        ensure_marked(scene.place, &host.join("named"), true)?;

        chattr(scene, &top, false)?;
        ensure_marked(scene.place, &host, false)?;
        let (handle, dax) = open(scene, &format!("{top}/later"), CREATE)?;
        scene.vm.run(Op::Close(handle))?;
        ensure!(!dax, "a file is DAX though its directory has lost the hint");
        ensure_marked(scene.place, &host.join("later"), false)?;
        ensure!(opens_as(scene, &format!("{top}/new"))?, "a file lost its hint with its directory");
        Ok(())
    })
}

fn chattr_others(scene: &mut Scene) -> Outcome {
    let host = scene.share_dir("-chattr").join("others");
    FILE.write_to(&host)?;
    let unsupported = [Errno::OPNOTSUPP.raw_os_error()];
    expect_changes(scene, 0);
    let before = (tests::inode_flags::get(&host)?, tests::inode_flags::get_extended(&host)?);
    scene.mounted("-chattr", "", |scene, mnt| {
        let path = format!("{mnt}/others");
        let now = flags(scene, &path)?;
        ensure_eq!(now, before.0, "the flags, in the guest and on the host");
        let attributes: Extended = scene.vm.call(&Op::Extended(path.as_str().into()))?;
        ensure_eq!(attributes, before.1, "the attributes, in the guest and on the host");
        // Immutable, append only, no dump, no access time, synchronous; each also with the hint.
        for bit in [0x10, 0x20, 0x40, 0x80, 0x8] {
            for more in [0, DAX] {
                let set = scene.vm.run(Op::SetFlags(path.as_str().into(), now ^ (bit | more)));
                ensure_errno(set, &unsupported, &format!("SETFLAGS {bit:#x} {more:#x}"))?;
            }
        }
        for wanted in [
            Extended { projid: attributes.projid + 7, ..attributes },
            Extended { xflags: attributes.xflags ^ 0x8, ..attributes },
            Extended { xflags: attributes.xflags ^ (0x80 | XFLAG_DAX), ..attributes },
        ] {
            let set = scene.vm.run(Op::SetExtended(path.as_str().into(), wanted));
            ensure_errno(set, &unsupported, &format!("FSSETXATTR {wanted:?}"))?;
        }
        // What changes nothing is no error.
        scene.vm.run(Op::SetFlags(path.as_str().into(), now))?;
        scene.vm.run(Op::SetExtended(path.as_str().into(), attributes))?;
        Ok(())
    })?;
    let after = (tests::inode_flags::get(&host)?, tests::inode_flags::get_extended(&host)?);
    ensure_eq!(after, before, "the host's flags afterwards");
    ensure_eq!(marks(&host)?, (false, None));
    Ok(())
}

/// The hint can be set and is kept whatever the mount says of DAX; but for read-only shares.
fn chattr_mounts(scene: &mut Scene) -> Outcome {
    let dir = scene.share_dir("-chattr");
    let host = dir.join("kept");
    FILE.write_to(&host)?;
    fs::create_dir(dir.join("kept-directory"))?;
    expect_changes(scene, 0);
    for (options, dax) in [("dax=never", false), ("dax=always", true), ("", true), ("dax=inode", true)] {
        scene.mounted("-chattr", options, |scene, mnt| {
            let (path, directory) = (format!("{mnt}/kept"), format!("{mnt}/kept-directory"));
            for path in [&path, &directory] {
                if dax {
                    ensure_eq!(flags(scene, path)? & DAX, DAX, "{path} after a remount with {options:?}");
                }
                // Last as it was first.
                chattr(scene, path, true)?;
                ensure_eq!(flags(scene, path)? & DAX, DAX, "{path} with {options:?}");
            }
            ensure_marked(scene.place, &host, true)?;
            ensure_marked(scene.place, &dir.join("kept-directory"), true)?;
            ensure_eq!(scene.vm.stat(path.as_str())?.dax, dax, "STATX_ATTR_DAX with {options:?}");
            ensure_eq!(scene.vm.verify(&[(&path, FILE)], 1, true)?.differs, vec![], "{options:?}");
            Ok(())
        })?;
    }
    let counts = scene.expect("-ro");
    (counts.granted, counts.setups, counts.hint_queries) = (Some(1), Some(2), Some(1));
    scene.mounted("-ro", "dax=inode", |scene, mnt| {
        let path = format!("{mnt}/kept");
        ensure!(scene.vm.stat(path.as_str())?.dax, "not DAX on the read-only share");
        let now = flags(scene, &path)?;
        ensure_eq!(now & DAX, DAX, "the flag on the read-only share");
        let attributes: Extended = scene.vm.call(&Op::Extended(path.as_str().into()))?;
        let read_only = [Errno::ROFS.raw_os_error()];
        let set = scene.vm.run(Op::SetFlags(path.as_str().into(), now & !DAX));
        ensure_errno(set, &read_only, "SETFLAGS on a read-only share")?;
        let without = Extended { xflags: attributes.xflags & !XFLAG_DAX, ..attributes };
        let set = scene.vm.run(Op::SetExtended(path.as_str().into(), without));
        ensure_errno(set, &read_only, "FSSETXATTR on a read-only share")?;
        ensure_eq!(scene.vm.verify(&[(&path, FILE)], 1, true)?.differs, vec![]);
        Ok(())
    })?;
    ensure_marked(scene.place, &host, true)
}

fn after_reboot(scene: &mut Scene) -> Outcome {
    let dir = scene.share_dir("-chattr");
    ensure!(dir.join("kept").exists(), "run chattr-in-every-mount of the boot before this, too");
    expect_changes(scene, 0);
    scene.mounted("-chattr", "dax=inode", |scene, mnt| {
        let path = format!("{mnt}/kept");
        ensure!(scene.vm.stat(path.as_str())?.dax, "the file is not DAX after a reboot");
        for path in [&path, &format!("{mnt}/kept-directory")] {
            ensure_eq!(flags(scene, path)? & DAX, DAX, "the flag of {path} after a reboot");
        }
        ensure_eq!(scene.vm.verify(&[(&path, FILE)], 1, true)?.differs, vec![]);
        let new = format!("{mnt}/kept-directory/after-reboot");
        let (handle, dax) = open(scene, &new, CREATE)?;
        scene.vm.run(Op::Close(handle))?;
        ensure!(dax, "the directory does not pass its hint on after a reboot");
        ensure_marked(scene.place, &dir.join("kept-directory/after-reboot"), true)?;
        // As the file that had it taken away is still without it.
        ensure!(!scene.vm.stat(format!("{mnt}/file"))?.dax, "a hint that was cleared is back");
        Ok(())
    })
}

/// Who changes a hint, and what keeps the file open meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Guest,
    Host,
    /// The host, while the guest has the file mapped and no descriptor of it.
    HostWhileMapped,
}

/// No change while the file is open anywhere; the first open after the last close sees it.
fn changes(scene: &mut Scene, share: &str) -> Outcome {
    scene.mounted(share, "dax=inode", |scene, mnt| {
        for by in [By::Guest, By::Host, By::HostWhileMapped] {
            let name = format!("{by:?}");
            let host = scene.share_dir(share).join(&name);
            FILE.write_to(&host)?;
            let path = format!("{mnt}/{name}");
            let mut marker = vec![0; 8];
            fill(FILE.seed, 96, &mut marker);
            for hint in [true, false] {
                let forgets = share == "-keep-never";
                change(scene, by, &path, &host, hint, forgets)
                    .and_then(|()| check_content(scene, &path, &host, hint, &mut marker))
                    .map_err(|error| format!("{by:?} to {hint}: {error}"))?;
            }
            let counts = scene.expect(share);
            counts.hint_queries = None;
            let add = |count: &mut Option<u64>, more: u64| *count = count.map(|count| count + more);
            // As DAX: two chunks, the first of them once more to be written. They go when the inode does.
            add(&mut counts.setups, 3);
            add(&mut counts.removes, 2);
            if share == "-keep-never" {
                // The guest forgets a file when it closes it, and gets to know it anew.
                (counts.granted, counts.denied) = (None, None);
            } else {
                add(&mut counts.reincarnations, 2);
                add(&mut counts.granted, 1);
                add(&mut counts.denied, 2);
            }
        }
        Ok(())
    })
}

/// Whether the guest can map a file shared that is not DAX: before Linux 6.6 not in the modes that cache no contents.
fn maps_without_dax(scene: &Scene, path: &str) -> bool {
    let is_direct = path.contains("-keep-never") || path.contains("-keep-metadata");
    !(is_direct && scene.boot.kernel.starts_with("6.1-"))
}

/// `forgets`: a file that is closed is looked up anew, and so is what it is.
fn change(scene: &mut Scene, by: By, path: &str, host: &Path, hint: bool, forgets: bool) -> Outcome {
    let (first, is_mapped) = match by {
        By::HostWhileMapped if hint && !maps_without_dax(scene, path) => {
            let mapped = scene.vm.map(path, 0, 4096, false);
            ensure_errno(mapped, &[Errno::NODEV.raw_os_error()], "a shared mapping without a page cache")?;
            (open(scene, path, OpenHow::default())?.0, false)
        }
        By::HostWhileMapped => (scene.vm.map(path, 0, 4096, false)?, true),
        _ => (open(scene, path, OpenHow::default())?.0, false),
    };
    ensure_eq!(scene.vm.stat(path)?.dax, !hint, "before the change");
    match by {
        By::Guest => chattr(scene, path, hint)?,
        By::Host | By::HostWhileMapped => mark(scene.place, host, hint)?,
    }
    ensure_marked(scene.place, host, hint)?;
    // The guest's lsattr sees it at once.
    ensure_eq!(flags(scene, path)? & DAX != 0, hint, "the flag");
    ensure_eq!(scene.vm.stat(path)?.dax, !hint, "while it is open");
    let (second, dax) = open(scene, path, OpenHow { write: true, ..OpenHow::default() })?;
    ensure_eq!(dax, !hint, "opened while it was open");
    scene.vm.run(if is_mapped { Op::Unmap(first) } else { Op::Close(first) })?;
    ensure_eq!(opens_as(scene, path)?, !hint, "opened while the second handle was open");
    scene.vm.run(Op::Close(second))?;
    ensure_eq!(scene.vm.stat(path)?.dax, hint == forgets, "closed, and not opened yet");
    ensure_eq!(opens_as(scene, path)?, hint, "the first open after the last close");
    ensure_eq!(scene.vm.stat(path)?.dax, hint, "after that");
    Ok(())
}

/// What was written in one state is there in the other, in the guest and on the host.
fn check_content(scene: &mut Scene, path: &str, host: &Path, hint: bool, marker: &mut Vec<u8>) -> Outcome {
    let (handle, dax) = open(scene, path, OpenHow { write: true, ..OpenHow::default() })?;
    ensure_eq!(dax, hint);
    let Bytes(found) = scene.vm.call(&Op::ReadAt(handle, 96, 8))?;
    ensure_eq!(&found, marker, "what was there");
    let mut far = vec![0; 8];
    fill(FILE.seed, 2 << 20, &mut far);
    ensure_eq!(scene.vm.call::<Bytes>(&Op::ReadAt(handle, 2 << 20, 8))?.0, far, "the second chunk");
    for byte in marker.iter_mut() {
        *byte = byte.wrapping_add(1);
    }
    scene.vm.run(Op::WriteAt(handle, 96, Bytes(marker.clone())))?;
    let mut found = vec![0; 8];
    File::open(host)?.read_exact_at(&mut found, 96)?;
    scene.vm.run(Op::Close(handle))?;
    ensure_eq!(&found, marker, "on the host");
    Ok(())
}
