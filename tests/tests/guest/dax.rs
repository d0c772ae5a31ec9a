//! Which mount options and which policies give which files DAX, and what a read-only share allows.

use rustix::io::Errno;
use tests::guest::Op;

use crate::harness::{Checks, Outcome, Scene, ensure, ensure_eq, ensure_errno};

pub fn checks() -> Checks {
    vec![
        ("mount-always-is-dax", mount_always),
        ("mount-inode-with-policy-always-is-dax", mount_inode),
        ("mount-inode-with-policy-never-is-not-dax", mount_inode_never),
        ("mount-never-is-not-dax", mount_never),
        ("new-files-are-dax-like-old-ones", new_files),
        ("read-only-share-refuses-changes", read_only),
        ("unmapped-window-can-be-touched", touch_unmapped),
    ]
}

/// Mounts and looks at a regular file and a directory; DAX is for regular files only.
fn dax_of_big(scene: &mut Scene, suffix: &str, options: &str, expected: bool) -> Outcome {
    scene.mounted(suffix, options, |scene, mnt| {
        let file = scene.vm.stat(format!("{mnt}/big"))?;
        ensure_eq!(file.dax, expected, "STATX_ATTR_DAX with options {options:?}");
        ensure_eq!(file.size, crate::harness::BIG.len);
        ensure!(!scene.vm.stat(mnt)?.dax, "a directory says DAX");
        // Attributes are asked for again; they must say the same.
        scene.vm.drop_caches()?;
        ensure_eq!(scene.vm.stat(format!("{mnt}/big"))?.dax, expected, "after the caches were dropped");
        Ok(())
    })
}

fn mount_always(scene: &mut Scene) -> Outcome {
    dax_of_big(scene, "", "dax=always", true)
}

fn mount_inode(scene: &mut Scene) -> Outcome {
    dax_of_big(scene, "", "dax=inode", true)?;
    dax_of_big(scene, "", "", true)
}

fn mount_inode_never(scene: &mut Scene) -> Outcome {
    dax_of_big(scene, "-never", "dax=inode", false)?;
    dax_of_big(scene, "-never", "", false)
}

fn mount_never(scene: &mut Scene) -> Outcome {
    dax_of_big(scene, "", "dax=never", false)
}

/// A file gets its state when the guest first hears of it, whichever way that is.
fn new_files(scene: &mut Scene) -> Outcome {
    scene.fresh_dir("new-files")?;
    for (suffix, expected) in [("", true), ("-never", false)] {
        scene.mounted(suffix, "dax=inode", |scene, mnt| {
            let dir = format!("{mnt}/new-files");
            scene.vm.create(format!("{dir}/created"))?;
            ensure_eq!(scene.vm.stat(format!("{dir}/created"))?.dax, expected, "a created file");
            scene.vm.run(Op::Link(format!("{dir}/created").into(), format!("{dir}/linked").into()))?;
            ensure_eq!(scene.vm.stat(format!("{dir}/linked"))?.dax, expected, "a hard link");
            scene.vm.rename(format!("{dir}/linked"), format!("{dir}/renamed"))?;
            ensure_eq!(scene.vm.stat(format!("{dir}/renamed"))?.dax, expected, "a renamed file");
            scene.vm.drop_caches()?;
            // Listing fills the guest's cache with attributes, without a lookup of each name.
            ensure_eq!(scene.vm.read_dir(dir.as_str())?.len(), 2);
            ensure_eq!(scene.vm.stat(format!("{dir}/created"))?.dax, expected, "a listed file");
            Ok(scene
                .vm
                .run(Op::RemoveAll(dir.clone().into()))
                .and_then(|()| scene.vm.run(Op::Mkdir(dir.into())))?)
        })?;
    }
    Ok(())
}

/// No driver does it, but a guest can: the window is a BAR, which sysfs lets the super-user map when no driver has it.
/// What is written where no file is mapped goes nowhere, and nothing happens to the machine.
fn touch_unmapped(scene: &mut Scene) -> Outcome {
    let share = format!("{}-never", scene.place);
    let number = scene.boot.share_tags().position(|tag| tag == share).ok_or("no such share")?;
    let device = scene.vm.virtio_fs_devices()?.into_iter().nth(number).ok_or("no such device")?;
    scene.vm.unbind(&device)?;
    let sysfs = format!("/sys/bus/pci/devices/{}", device.address);
    scene.vm.run(Op::WriteText(format!("{sysfs}/enable").into(), "1".into()))?;
    let len = 32 << 20;
    let map = scene.vm.map(format!("{sysfs}/resource2"), 0, len, true)?;
    for chunk in 0..len as u64 >> 21 {
        scene.vm.map_write(map, (chunk << 21) + 4096 * chunk, b"stray")?;
    }
    ensure_eq!(scene.vm.map_read(map, 0, 5)?, b"stray".to_vec(), "what was written to a hole");
    scene.vm.run(Op::Unmap(map))?;
    scene.vm.bind(&device)?;
    // The next mount begins with a clean window, and files are what they were.
    dax_of_big(scene, "-never", "dax=inode", false)?;
    crate::harness::ensure_content(&scene.dir.join("big"), crate::harness::BIG)
}

fn read_only(scene: &mut Scene) -> Outcome {
    let refused = [Errno::ROFS.raw_os_error(), Errno::ACCESS.raw_os_error(), Errno::PERM.raw_os_error()];
    scene.mounted("-ro", "dax=always", |scene, mnt| {
        let big = format!("{mnt}/big");
        let found = scene.vm.verify(&[(&big, crate::harness::BIG)], 1, true)?;
        ensure_eq!(found.differs, vec![], "what was read");
        ensure_errno(scene.vm.pwrite(big.as_str(), 0, b"x"), &refused, "pwrite")?;
        ensure_errno(scene.vm.map(big.as_str(), 0, 4096, true), &refused, "a writable mapping")?;
        ensure_errno(scene.vm.create(format!("{mnt}/new")), &refused, "create")?;
        ensure_errno(scene.vm.run(Op::Mkdir(format!("{mnt}/new").into())), &refused, "mkdir")?;
        ensure_errno(scene.vm.run(Op::Unlink(big.as_str().into())), &refused, "unlink")?;
        ensure_errno(scene.vm.run(Op::Truncate(big.as_str().into(), 0)), &refused, "truncate")?;
        ensure_errno(scene.vm.run(Op::Chmod(big.as_str().into(), 0o777)), &refused, "chmod")?;
        ensure_errno(scene.vm.rename(big.as_str(), format!("{mnt}/new")), &refused, "rename")
    })?;
    crate::harness::ensure_content(&scene.dir.join("big"), crate::harness::BIG)
}
