//! What a file has beside its content: owner, permissions, times, extended attributes, locks, allocation.

use std::fs;
use std::os::unix::fs::MetadataExt;

use rustix::io::Errno;
use tests::guest::data::Content;
use tests::guest::{Bytes, FallocateHow, GuestPath, LockKind, Op, OpenHow};

use crate::harness::{Checks, Outcome, Scene, ensure, ensure_content, ensure_eq, ensure_errno};

pub fn checks() -> Checks {
    vec![
        ("owner-permissions-and-times", ownership),
        ("extended-attributes", xattrs),
        ("locks", locks),
        ("allocation-and-holes", allocation),
        ("copy-file-range", copy),
    ]
}

fn ownership(scene: &mut Scene) -> Outcome {
    let host = scene.fresh_dir("attributes")?.join("file");
    scene.mounted("", "dax=inode", |scene, mnt| {
        let path = GuestPath::from(&format!("{mnt}/attributes/file"));
        scene.vm.create(path.clone())?;
        scene.vm.run(Op::Chmod(path.clone(), 0o640))?;
        scene.vm.run(Op::Chown(path.clone(), 12, 34))?;
        scene.vm.run(Op::SetMtime(path.clone(), 1_000_000_000, 123_456_789))?;
        let (stat, on_host) = (scene.vm.stat(path.clone())?, fs::metadata(&host)?);
        ensure_eq!((stat.mode & 0o7777, on_host.mode() & 0o7777), (0o640, 0o640), "permissions");
        ensure_eq!((stat.uid, stat.gid), (12, 34));
        ensure_eq!((on_host.uid(), on_host.gid()), (12, 34), "the owner on the host");
        ensure_eq!(stat.mtime, (1_000_000_000, 123_456_789));
        ensure_eq!((on_host.mtime(), on_host.mtime_nsec()), (1_000_000_000, 123_456_789), "time on the host");
        ensure!(stat.dax, "the state was lost with an attribute");
        Ok(())
    })
}

fn xattrs(scene: &mut Scene) -> Outcome {
    let host = scene.fresh_dir("xattrs")?.join("file");
    scene.mounted("", "dax=inode", |scene, mnt| {
        let path = GuestPath::from(&format!("{mnt}/xattrs/file"));
        scene.vm.create(path.clone())?;
        let value = Bytes((0..=255).collect());
        scene.vm.run(Op::SetXattr(path.clone(), "user.one".into(), value.clone()))?;
        scene.vm.run(Op::SetXattr(path.clone(), "user.two".into(), Bytes(Vec::new())))?;
        ensure_eq!(scene.vm.call::<Bytes>(&Op::GetXattr(path.clone(), "user.one".into()))?, value);
        let mut on_host = [0; 300];
        let len = rustix::fs::getxattr(&host, "user.one", &mut on_host[..])?;
        ensure_eq!(&on_host[..len], &value.0[..], "the value on the host");
        let mut names: Vec<String> = scene.vm.call(&Op::ListXattr(path.clone()))?;
        names.retain(|name| name.starts_with("user."));
        ensure_eq!(names, ["user.one", "user.two"]);
        scene.vm.run(Op::RemoveXattr(path.clone(), "user.one".into()))?;
        let gone = scene.vm.call::<Bytes>(&Op::GetXattr(path.clone(), "user.one".into()));
        ensure_errno(gone, &[Errno::NODATA.raw_os_error()], "an attribute that was removed")
    })
}

fn locks(scene: &mut Scene) -> Outcome {
    scene.fresh_dir("locks")?;
    scene.mounted("", "dax=inode", |scene, mnt| {
        let path = GuestPath::from(&format!("{mnt}/locks/file"));
        scene.vm.create(path.clone())?;
        let how = OpenHow { write: true, ..OpenHow::default() };
        let (one, two) = (scene.vm.open(path.clone(), how)?, scene.vm.open(path, how)?);
        let flock = |file| Op::TryLock(file, LockKind::Flock);
        ensure!(scene.vm.call::<bool>(&flock(one))?, "the first flock");
        ensure!(!scene.vm.call::<bool>(&flock(two))?, "two had the same flock");
        scene.vm.run(Op::Unlock(one, LockKind::Flock))?;
        ensure!(scene.vm.call::<bool>(&flock(two))?, "flock after it was given back");
        ensure!(scene.vm.call::<bool>(&Op::TryLock(one, LockKind::Posix))?, "a posix lock");
        scene.vm.run(Op::Unlock(one, LockKind::Posix))?;
        scene.vm.run(Op::Close(one))?;
        Ok(scene.vm.run(Op::Close(two))?)
    })
}

fn allocation(scene: &mut Scene) -> Outcome {
    const MIB: u64 = 1 << 20;
    let content = Content { seed: 11, len: 4 * MIB };
    let host = scene.fresh_dir("allocation")?.join("file");
    scene.mounted("", "dax=inode", |scene, mnt| {
        let path = GuestPath::from(&format!("{mnt}/allocation/file"));
        scene.vm.create(path.clone())?;
        scene.vm.run(Op::Fallocate(path.clone(), FallocateHow::Allocate, 0, content.len))?;
        ensure_eq!(scene.vm.stat(path.clone())?.size, content.len, "the size after fallocate");
        ensure!(fs::metadata(&host)?.blocks() * 512 >= content.len, "nothing was allocated on the host");
        scene.vm.run(Op::Fallocate(path.clone(), FallocateHow::KeepSize, content.len, MIB))?;
        ensure_eq!(fs::metadata(&host)?.len(), content.len, "the size after fallocate beyond the end");
        scene.vm.write_content(&path.to_string(), 0, content, false, 1)?;
        ensure_content(&host, content)?;
        scene.vm.run(Op::Fallocate(path.clone(), FallocateHow::PunchHole, MIB, MIB))?;
        let runs: Vec<(u64, u64)> = scene.vm.call(&Op::DataRuns(path.clone()))?;
        ensure_eq!(runs, [(0, MIB), (2 * MIB, 4 * MIB)], "runs of data around a hole");
        ensure_eq!(fs::read(&host)?[MIB as usize..2 * MIB as usize], vec![0; MIB as usize], "the hole");
        Ok(())
    })
}

fn copy(scene: &mut Scene) -> Outcome {
    let content = Content { seed: 12, len: (3 << 20) + 77 };
    let host = scene.fresh_dir("copies")?;
    content.write_to(&host.join("from"))?;
    scene.mounted("", "dax=inode", |scene, mnt| {
        let path = |name: &str| GuestPath::from(&format!("{mnt}/copies/{name}"));
        let copied: u64 = scene.vm.call(&Op::CopyFileRange(path("from"), path("to")))?;
        ensure_eq!(copied, content.len);
        ensure_content(&host.join("to"), content)
    })
}
