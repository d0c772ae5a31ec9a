//! Names: many, deep, long, odd; links, fifos; and files that are mostly holes.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::PathBuf;

use rustix::io::Errno;
use tests::guest::data::Content;
use tests::guest::{GuestPath, Op, OpenHow, RenameHow, SmallFilesPhase};

use crate::harness::{Checks, Outcome, Scene, ensure, ensure_eq, ensure_errno};

pub fn checks() -> Checks {
    vec![
        ("a-thousand-small-files", |scene| small_files(scene, 1_000)),
        ("sparse-file-of-4-gib", sparse),
        ("deep-tree", deep_tree),
        ("names-long-and-odd", names),
        ("links-and-fifos", links),
        ("renames", renames),
        ("unlinked-and-unnamed-files", unlinked),
        ("rm-rf", remove_all),
    ]
}

/// What takes an emulated host a quarter of an hour a file system.
pub fn long_checks() -> Checks {
    vec![("ten-thousand-small-files", |scene| small_files(scene, 10_000))]
}

fn small_files(scene: &mut Scene, count: u32) -> Outcome {
    let host = scene.fresh_dir("small")?;
    scene.mounted("", "dax=inode", |scene, mnt| {
        let dir = format!("{mnt}/small");
        let on_host = |prefix: &str| -> std::io::Result<usize> {
            let names = fs::read_dir(&host)?.collect::<Result<Vec<_>, _>>()?;
            Ok(names.iter().filter(|name| name.file_name().as_bytes().starts_with(prefix.as_bytes())).count())
        };
        scene.vm.small_files(&dir, count, SmallFilesPhase::Create)?;
        ensure_eq!(on_host("file-")?, count as usize, "files on the host");
        scene.vm.drop_caches()?;
        scene.vm.small_files(&dir, count, SmallFilesPhase::Read)?;
        scene.vm.small_files(&dir, count, SmallFilesPhase::Rename)?;
        ensure_eq!(on_host("renamed-")?, count as usize, "renamed files on the host");
        ensure_eq!(scene.vm.read_dir(dir.as_str())?.len(), count as usize, "names in the guest");
        scene.vm.small_files(&dir, count, SmallFilesPhase::Remove)?;
        ensure_eq!(on_host("")?, 0, "files left on the host");
        Ok(())
    })
}

fn sparse(scene: &mut Scene) -> Outcome {
    const GIB: u64 = 1 << 30;
    let host = scene.fresh_dir("sparse")?.join("file");
    let file = File::create(&host)?;
    file.set_len(4 * GIB)?;
    file.write_all_at(b"begin", 0)?;
    file.write_all_at(b"middle", 2 * GIB + 12345)?;
    file.write_all_at(b"end", 4 * GIB - 3)?;
    scene.mounted("", "dax=always", |scene, mnt| {
        let path = format!("{mnt}/sparse/file");
        let stat = scene.vm.stat(path.as_str())?;
        ensure_eq!(stat.size, 4 * GIB);
        ensure!(stat.blocks < 8 * 1024, "{} blocks are not sparse", stat.blocks);
        for (offset, text) in [(0, &b"begin"[..]), (2 * GIB + 12345, b"middle"), (4 * GIB - 3, b"end")] {
            ensure_eq!(scene.vm.read_bytes(path.as_str(), offset, text.len())?, text, "at {offset}");
        }
        let map = scene.vm.map(path.as_str(), 0, 4 * GIB as usize, true)?;
        ensure_eq!(scene.vm.map_read(map, 3 * GIB, 16)?, [0; 16], "a hole");
        scene.vm.map_write(map, 3 * GIB + 5, b"written into a hole")?;
        scene.vm.run(Op::MapSync(map))?;
        scene.vm.run(Op::Unmap(map))?;
        let mut found = [0; 19];
        File::open(&host)?.read_exact_at(&mut found, 3 * GIB + 5)?;
        ensure_eq!(&found, b"written into a hole");
        let runs: Vec<(u64, u64)> = scene.vm.call(&Op::DataRuns(path.as_str().into()))?;
        let data: u64 = runs.iter().map(|(from, to)| to - from).sum();
        ensure!(runs.len() >= 4 && data < 64 << 20, "runs of data: {runs:?}");
        Ok(())
    })?;
    ensure!(fs::metadata(&host)?.blocks() < 128 * 1024, "the file is not sparse any more");
    Ok(fs::remove_file(&host)?)
}

fn deep_tree(scene: &mut Scene) -> Outcome {
    let host = scene.fresh_dir("deep")?;
    let levels: PathBuf = (0..200).map(|level| format!("level-{level:03}")).collect();
    scene.mounted("", "dax=inode", |scene, mnt| {
        let bottom = GuestPath::from(&format!("{mnt}/deep")).join(&levels);
        scene.vm.run(Op::MkdirAll(bottom.clone()))?;
        scene.vm.create(bottom.join("leaf"))?;
        scene.vm.pwrite(bottom.join("leaf"), 0, b"down here")?;
        scene.vm.drop_caches()?;
        ensure_eq!(scene.vm.read_bytes(bottom.join("leaf"), 0, 100)?, b"down here");
        ensure_eq!(fs::read(host.join(&levels).join("leaf"))?, b"down here");
        scene.vm.run(Op::RemoveAll(format!("{mnt}/deep/level-000").into()))?;
        ensure_eq!(fs::read_dir(&host)?.count(), 0, "entries left on the host");
        Ok(())
    })
}

fn names(scene: &mut Scene) -> Outcome {
    let host = scene.fresh_dir("names")?;
    let mut names: Vec<OsString> = vec![
        "n".repeat(255).into(),
        OsString::from_vec(vec![0xff; 255]),
        OsString::from_vec((1..=255).filter(|&byte| byte != b'/').collect()),
        "\u{1f980} über".into(),
        "new\nline".into(),
        " ".into(),
        "...".into(),
        "-rf".into(),
    ];
    names.sort();
    scene.mounted("", "dax=inode", |scene, mnt| {
        let dir = GuestPath::from(&format!("{mnt}/names"));
        for name in &names {
            scene.vm.create(dir.join(name))?;
            scene.vm.pwrite(dir.join(name), 0, name.as_bytes())?;
        }
        let too_long = scene.vm.create(dir.join("n".repeat(256)));
        ensure_errno(too_long, &[Errno::NAMETOOLONG.raw_os_error()], "256 bytes")?;
        scene.vm.drop_caches()?;
        let found = scene.vm.read_dir(dir.clone())?;
        let mut expected: Vec<GuestPath> = names.iter().map(GuestPath::from).collect();
        expected.sort();
        ensure_eq!(found, expected, "names in the guest");
        for name in &names {
            ensure_eq!(scene.vm.read_bytes(dir.join(name), 0, 300)?, name.as_bytes(), "the file {name:?}");
            ensure_eq!(fs::read(host.join(name))?, name.as_bytes(), "the file {name:?} on the host");
            scene.vm.run(Op::Unlink(dir.join(name)))?;
        }
        ensure_eq!(fs::read_dir(&host)?.count(), 0, "entries left on the host");
        Ok(())
    })
}

fn links(scene: &mut Scene) -> Outcome {
    let host = scene.fresh_dir("links")?;
    scene.mounted("", "dax=always", |scene, mnt| {
        let path = |name: &str| GuestPath::from(&format!("{mnt}/links/{name}"));
        scene.vm.create(path("file"))?;
        scene.vm.run(Op::Link(path("file"), path("second")))?;
        let (first, second) = (scene.vm.stat(path("file"))?, scene.vm.stat(path("second"))?);
        ensure_eq!(first.ino, second.ino, "inodes of two names of a file");
        ensure_eq!(second.nlink, 2);
        scene.vm.pwrite(path("file"), 0, b"both")?;
        ensure_eq!(scene.vm.read_bytes(path("second"), 0, 10)?, b"both");
        scene.vm.run(Op::Unlink(path("file")))?;
        ensure_eq!(scene.vm.stat(path("second"))?.nlink, 1);

        scene.vm.run(Op::Symlink("second".into(), path("symlink")))?;
        ensure_eq!(scene.vm.call::<GuestPath>(&Op::ReadLink(path("symlink")))?, GuestPath::from("second"));
        ensure_eq!(scene.vm.read_bytes(path("symlink"), 0, 10)?, b"both", "through a link");
        ensure_eq!(fs::read_link(host.join("symlink"))?, PathBuf::from("second"));
        let long = "t".repeat(4000);
        scene.vm.run(Op::Symlink(long.as_str().into(), path("long")))?;
        ensure_eq!(scene.vm.call::<GuestPath>(&Op::ReadLink(path("long")))?, GuestPath::from(&long));
        // A link that leads out of the share leads nowhere on the host: the guest follows it in its own tree.
        scene.vm.run(Op::Symlink("/proc/version".into(), path("out")))?;
        ensure!(scene.vm.read_bytes(path("out"), 0, 5)? == b"Linux", "a link out of the share");

        scene.vm.run(Op::Mkfifo(path("fifo")))?;
        ensure_eq!(scene.vm.stat(path("fifo"))?.mode & 0o170_000, 0o010_000, "type of a fifo");
        ensure!(fs::metadata(host.join("fifo"))?.file_type().is_fifo(), "no fifo on the host");
        // A fifo is the guest's own: both ends in the guest talk to each other.
        let fifo = scene.vm.open(path("fifo"), OpenHow { write: true, ..OpenHow::default() })?;
        scene.vm.run(Op::Close(fifo))?;
        Ok(())
    })
}

fn renames(scene: &mut Scene) -> Outcome {
    scene.fresh_dir("renames")?;
    scene.mounted("", "dax=inode", |scene, mnt| {
        let path = |name: &str| GuestPath::from(&format!("{mnt}/renames/{name}"));
        for name in ["a", "b"] {
            scene.vm.create(path(name))?;
            scene.vm.pwrite(path(name), 0, name.as_bytes())?;
        }
        let taken = scene.vm.run(Op::Rename(path("a"), path("b"), RenameHow::NoReplace));
        ensure_errno(taken, &[Errno::EXIST.raw_os_error()], "a rename to a name that is taken")?;
        scene.vm.run(Op::Rename(path("a"), path("b"), RenameHow::Exchange))?;
        ensure_eq!(scene.vm.read_bytes(path("a"), 0, 2)?, b"b", "after an exchange");
        scene.vm.rename(path("a"), path("b"))?;
        ensure_eq!(scene.vm.read_bytes(path("b"), 0, 2)?, b"b", "after a replacement");
        ensure_errno(scene.vm.stat(path("a")), &[Errno::NOENT.raw_os_error()], "the old name")?;
        // A directory with something in it moves below another.
        scene.vm.run(Op::MkdirAll(path("from/inner")))?;
        scene.vm.run(Op::MkdirAll(path("to")))?;
        scene.vm.rename(path("b"), path("from/inner/b"))?;
        scene.vm.rename(path("from"), path("to/from"))?;
        ensure_eq!(scene.vm.read_bytes(path("to/from/inner/b"), 0, 2)?, b"b", "a moved tree");
        let loop_ = scene.vm.rename(path("to"), path("to/from/to"));
        ensure_errno(loop_, &[Errno::INVAL.raw_os_error()], "a directory into itself")?;
        ensure_errno(
            scene.vm.run(Op::Rmdir(path("to"))),
            &[Errno::NOTEMPTY.raw_os_error()],
            "rmdir of a directory with something in it",
        )
    })
}

fn unlinked(scene: &mut Scene) -> Outcome {
    let host = scene.fresh_dir("unlinked")?;
    scene.mounted("", "dax=always", |scene, mnt| {
        let dir = GuestPath::from(&format!("{mnt}/unlinked"));
        let how = OpenHow { write: true, create_new: true, ..OpenHow::default() };
        let file = scene.vm.open(dir.join("file"), how)?;
        scene.vm.run(Op::WriteAt(file, 0, tests::guest::Bytes(b"still here".to_vec())))?;
        let map = scene.vm.map(dir.join("file"), 0, 4096, true)?;
        scene.vm.run(Op::Unlink(dir.join("file")))?;
        ensure_eq!(fs::read_dir(&host)?.count(), 0, "names on the host");
        ensure_eq!(scene.vm.map_read(map, 0, 10)?, b"still here", "a mapping of a file without a name");
        scene.vm.map_write(map, 0, b"STILL")?;
        let read = scene.vm.call::<tests::guest::Bytes>(&Op::ReadAt(file, 0, 10))?;
        ensure_eq!(read.0, b"STILL here", "a handle of a file without a name");
        ensure_eq!(scene.vm.call::<tests::guest::Stat>(&Op::StatHandle(file))?.nlink, 0);
        scene.vm.run(Op::Unmap(map))?;
        scene.vm.run(Op::Close(file))?;
        Ok(())
    })
}

/// A tree of every kind of thing, removed from its top, and a host that has nothing left of it.
fn remove_all(scene: &mut Scene) -> Outcome {
    let host = scene.fresh_dir("rm-rf")?;
    for dir in 0..20 {
        let dir = host.join(format!("tree/dir-{dir}"));
        fs::create_dir_all(dir.join("inner"))?;
        for file in 0..20 {
            Content { seed: file, len: file * 500 }.write_to(&dir.join(format!("file-{file}")))?;
        }
        std::os::unix::fs::symlink("nowhere", dir.join("inner/dangling"))?;
    }
    scene.mounted("", "dax=inode", |scene, mnt| {
        ensure_eq!(scene.vm.read_dir(format!("{mnt}/rm-rf/tree"))?.len(), 20);
        scene.vm.run(Op::RemoveAll(format!("{mnt}/rm-rf/tree").into()))?;
        ensure_eq!(fs::read_dir(&host)?.count(), 0, "entries left on the host");
        ensure_eq!(scene.vm.read_dir(format!("{mnt}/rm-rf"))?.len(), 0, "entries left in the guest");
        Ok(())
    })
}
