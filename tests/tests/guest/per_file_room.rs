//! Per-file DAX where there is not room for all: what `auto` promises of a window, what rules make of its free part, and
//! set-id files, which never are DAX by themselves.

use std::error::Error;
use std::fs;
use std::os::unix::fs::PermissionsExt;

use rustix::fs::XattrFlags;
use tests::guest::data::Content;
use tests::guest::{Op, OpenHow, Stat};

use crate::harness::{Checks, Outcome, Scene, ensure, ensure_eq};

/// Rules of the share `-free`: its window has 16 chunks of 6.25 % each.
pub const RULES: &str = r#"
version = 1
default = "deny"

[[rule]]
name = "while there is room"
window_free.min = 55
dax = "allow"
"#;

const MIB: u64 = 1 << 20;

pub fn checks() -> Checks {
    vec![
        ("auto-promises-no-more-than-the-window-has", promises),
        ("rules-see-the-free-part-of-the-window", free_part),
        ("set-id-files-and-those-with-capabilities", set_id),
    ]
}

fn write(scene: &Scene, share: &str, name: &str, mib: u64) -> Outcome {
    Content { seed: mib, len: mib * MIB }.write_to(&scene.share_dir(share).join(name))?;
    Ok(())
}

fn open(scene: &mut Scene, path: String) -> Result<(u32, bool), Box<dyn Error>> {
    let handle = scene.vm.open(path.as_str(), OpenHow::default())?;
    let stat: Stat = scene.vm.call(&Op::StatHandle(handle))?;
    Ok((handle, stat.dax))
}

fn opens_as(scene: &mut Scene, path: String) -> Result<bool, Box<dyn Error>> {
    let (handle, dax) = open(scene, path)?;
    scene.vm.run(Op::Close(handle))?;
    Ok(dax)
}

/// Nothing is said of what the device counts: how often a file is asked about is the guest's affair here.
fn uncounted(scene: &mut Scene, share: &str) {
    let counts = scene.expect(share);
    (counts.granted, counts.denied, counts.reincarnations) = (None, None, None);
    (counts.setups, counts.removes, counts.hint_queries) = (None, None, None);
}

/// Of 16 chunks 13 are promised to open files; who has been granted DAX keeps it within all 16.
fn promises(scene: &mut Scene) -> Outcome {
    uncounted(scene, "-room");
    for (name, mib) in [("ten", 20), ("three", 6), ("four", 8), ("five", 10), ("fourteen", 28)] {
        write(scene, "-room", name, mib)?;
    }
    scene.mounted("-room", "dax=inode", |scene, mnt| {
        let path = |name: &str| format!("{mnt}/{name}");
        ensure!(!opens_as(scene, path("fourteen"))?, "a file is DAX that needs more than the guest can use");
        let (ten, dax) = open(scene, path("ten"))?;
        ensure!(dax, "10 of 13 chunks");
        ensure!(!opens_as(scene, path("four"))?, "14 of 13 chunks");
        let (three, dax) = open(scene, path("three"))?;
        ensure!(dax, "13 of 13 chunks");
        scene.vm.run(Op::Close(three))?;
        scene.vm.run(Op::Truncate(path("three").as_str().into(), 10 * MIB))?;
        ensure!(opens_as(scene, path("three"))?, "it has grown to 5, 15 in all, and was DAX");
        ensure!(!opens_as(scene, path("five"))?, "as large, and was not DAX");
        scene.vm.run(Op::Truncate(path("three").as_str().into(), 14 * MIB))?;
        ensure!(!opens_as(scene, path("three"))?, "17 of all 16 chunks");
        scene.vm.run(Op::Close(ten))?;
        ensure!(opens_as(scene, path("four"))?, "4 of 13 chunks, when the large file is closed");
        Ok(())
    })
}

/// Below 55 % free no file becomes DAX, and below 50 % none stays it.
fn free_part(scene: &mut Scene) -> Outcome {
    uncounted(scene, "-free");
    for (name, mib) in [("seven", 14), ("one", 2), ("another", 2), ("known", 1), ("new", 1), ("late", 1)] {
        write(scene, "-free", name, mib)?;
    }
    scene.mounted("-free", "dax=inode", |scene, mnt| {
        let path = |name: &str| format!("{mnt}/{name}");
        let map = |scene: &mut Scene, name: &str, mib: u64| -> Outcome {
            let file = (path(name), Content { seed: mib, len: mib * MIB });
            ensure_eq!(scene.vm.verify(&[(&file.0, file.1)], 1, true)?.differs, vec![], "{name}");
            Ok(())
        };
        let (one, _) = open(scene, path("one"))?;
        let (another, dax) = open(scene, path("another"))?;
        ensure!(dax, "in an empty window");
        map(scene, "seven", 14)?;
        ensure!(opens_as(scene, path("known"))?, "56 % free");
        map(scene, "one", 2)?;
        ensure!(!opens_as(scene, path("new"))?, "50 % free, and was not known");
        ensure!(opens_as(scene, path("known"))?, "50 % free, and was DAX");
        map(scene, "another", 2)?;
        ensure!(!opens_as(scene, path("known"))?, "43 % free, and was DAX");
        ensure!(!opens_as(scene, path("late"))?, "43 % free");
        for handle in [one, another] {
            scene.vm.run(Op::Close(handle))?;
        }
        Ok(())
    })
}

/// A write through the window would not take the bit away, nor the capabilities.
fn set_id(scene: &mut Scene) -> Outcome {
    uncounted(scene, "-set-id");
    let dir = scene.share_dir("-set-id");
    for name in ["plain", "set-user-id", "set-group-id", "mandatory-lock", "capable"] {
        write(scene, "-set-id", name, 4)?;
    }
    for (name, mode) in [("set-user-id", 0o4755), ("set-group-id", 0o2755), ("mandatory-lock", 0o2644)] {
        fs::set_permissions(dir.join(name), fs::Permissions::from_mode(mode))?;
    }
    // VFS_CAP_REVISION_2 with CAP_NET_RAW permitted (linux/capability.h).
    let capability = [0, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    rustix::fs::setxattr(dir.join("capable"), "security.capability", &capability, XattrFlags::empty())?;
    scene.mounted("-set-id", "dax=inode", |scene, mnt| {
        let path = |name: &str| format!("{mnt}/{name}");
        // Without the group's execute bit the set-group-ID bit means something else.
        for (name, expected) in [
            ("plain", true),
            ("set-user-id", false),
            ("set-group-id", false),
            ("mandatory-lock", true),
            ("capable", false),
        ] {
            ensure_eq!(opens_as(scene, path(name))?, expected, "{name}");
        }
        scene.vm.run(Op::Chmod(path("plain").as_str().into(), 0o4755))?;
        ensure!(!opens_as(scene, path("plain"))?, "it is a set-id file now");
        scene.vm.run(Op::Chmod(path("set-user-id").as_str().into(), 0o755))?;
        ensure!(opens_as(scene, path("set-user-id"))?, "it is no set-id file any more");
        scene.vm.run(Op::RemoveXattr(path("capable").as_str().into(), "security.capability".into()))?;
        ensure!(opens_as(scene, path("capable"))?, "it has no capabilities any more");
        Ok(())
    })
}
