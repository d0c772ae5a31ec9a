//! Contents: what the guest reads is what the host has, and the other way around.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::sync::LazyLock;

use tests::guest::data::Content;
use tests::guest::{Access, DirectRead, FallocateHow, Op, Random};

use crate::harness::{BIG, BIG_SHA256, Checks, Outcome, Scene, ensure, ensure_content, ensure_eq};

const RANDOM: Random = Random { seed: 4000, count: 4000 };
static RANDOM_SHA256: LazyLock<String> = LazyLock::new(|| BIG.random_sha256(RANDOM.seed, RANDOM.count));

pub fn checks() -> Checks {
    vec![
        ("read-matches", read),
        ("mmap-matches", mmap),
        ("random-read-matches", random_read),
        ("random-mmap-matches", random_mmap),
        ("read-without-dax-matches", read_without_dax),
        ("mmap-write-reaches-host", mmap_write),
        ("pwrite-reaches-host", pwrite),
        ("growth-reaches-host", growth),
        ("host-write-is-seen", host_write),
        ("truncate-and-punch-under-a-mapping", truncate_mapped),
        ("direct-read-into-dax-buffer", direct_read),
        ("program-runs-from-dax", execute),
    ]
}

/// The digest of the big file, read in some way, through a fresh mount.
fn digest_matches(scene: &mut Scene, suffix: &str, options: &str, how: Access, expected: &str) -> Outcome {
    scene.mounted(suffix, options, |scene, mnt| {
        let digest = scene.vm.sha256(&format!("{mnt}/big"), how)?;
        ensure_eq!(digest.sha256, expected, "SHA-256 of {} bytes by {how:?}", digest.bytes);
        Ok(())
    })
}

fn read(scene: &mut Scene) -> Outcome {
    digest_matches(scene, "", "dax=always", Access::Read(128 << 10), &BIG_SHA256)
}

fn mmap(scene: &mut Scene) -> Outcome {
    digest_matches(scene, "", "dax=always", Access::Mmap, &BIG_SHA256)
}

fn random_read(scene: &mut Scene) -> Outcome {
    digest_matches(scene, "", "dax=always", Access::RandomRead(RANDOM), &RANDOM_SHA256)
}

fn random_mmap(scene: &mut Scene) -> Outcome {
    digest_matches(scene, "", "dax=always", Access::RandomMmap(RANDOM), &RANDOM_SHA256)
}

fn read_without_dax(scene: &mut Scene) -> Outcome {
    digest_matches(scene, "-never", "dax=inode", Access::Read(128 << 10), &BIG_SHA256)?;
    digest_matches(scene, "-never", "dax=inode", Access::RandomMmap(RANDOM), &RANDOM_SHA256)
}

fn mmap_write(scene: &mut Scene) -> Outcome {
    write_in_place(scene, true)
}

fn pwrite(scene: &mut Scene) -> Outcome {
    write_in_place(scene, false)
}

/// Replaces a file's content by another seed's: first at odd offsets, then everywhere.
fn write_in_place(scene: &mut Scene, mmap: bool) -> Outcome {
    let (old, new) = (Content { seed: 1, len: (8 << 20) + 5000 }, Content { seed: 2, len: (8 << 20) + 5000 });
    for (suffix, options) in [("", "dax=always"), ("", "dax=inode"), ("-never", "dax=inode")] {
        let host = scene.fresh_dir("written")?.join("file");
        old.write_to(&host)?;
        scene.mounted(suffix, options, |scene, mnt| {
            let path = format!("{mnt}/written/file");
            // Across a chunk's boundary, not on page boundaries.
            let (offset, len) = ((2 << 20) - 777, 5555);
            scene.vm.write_content(&path, offset, Content { len, ..new }, mmap, 1)?;
            let mut found = vec![0; len as usize + 2];
            File::open(&host)?.read_exact_at(&mut found, offset - 1)?;
            let mut expected = vec![0; len as usize + 2];
            tests::guest::data::fill(old.seed, offset - 1, &mut expected);
            tests::guest::data::fill(new.seed, offset, &mut expected[1..=len as usize]);
            ensure!(found == expected, "a write of {len} bytes at {offset} is not on the host ({options})");
            scene.vm.write_content(&path, 0, new, mmap, 1)?;
            ensure_content(&host, new)
        })?;
    }
    Ok(())
}

fn growth(scene: &mut Scene) -> Outcome {
    let content = Content { seed: 3, len: (4 << 20) + 1234 };
    let host = scene.fresh_dir("grown")?.join("file");
    scene.mounted("", "dax=always", |scene, mnt| {
        let path = format!("{mnt}/grown/file");
        scene.vm.create(path.as_str())?;
        // Mapped first and written beyond the end after: the chunk is there before the bytes are.
        let (part, len) = (3 << 20, content.len);
        scene.vm.write_content(&path, 0, Content { len: part, ..content }, false, 1)?;
        let map = scene.vm.map(path.as_str(), 0, part as usize, false)?;
        ensure_eq!(scene.vm.call::<Option<u64>>(&Op::MapVerify(map, content.seed))?, None);
        scene.vm.write_content(&path, part, Content { len: len - part, ..content }, false, 1)?;
        ensure_eq!(scene.vm.verify(&[(&path, content)], 1, true)?.differs, vec![]);
        scene.vm.run(Op::Unmap(map))?;
        ensure_content(&host, content)
    })
}

fn host_write(scene: &mut Scene) -> Outcome {
    let content = Content { seed: 5, len: 4 << 20 };
    let host = scene.fresh_dir("host-write")?.join("file");
    content.write_to(&host)?;
    scene.mounted("", "dax=always", |scene, mnt| {
        let path = format!("{mnt}/host-write/file");
        let map = scene.vm.map(path.as_str(), 0, content.len as usize, false)?;
        ensure_eq!(scene.vm.call::<Option<u64>>(&Op::MapVerify(map, content.seed))?, None);
        let file = File::options().write(true).open(&host)?;
        for (number, offset) in [0, 4095, (2 << 20) - 3, content.len - 8].into_iter().enumerate() {
            let bytes = [number as u8 + 1; 8];
            file.write_all_at(&bytes, offset)?;
            ensure_eq!(scene.vm.map_read(map, offset, 8)?, bytes, "the mapping at {offset}");
            ensure_eq!(scene.vm.read_bytes(path.as_str(), offset, 8)?, bytes, "read(2) at {offset}");
        }
        scene.vm.run(Op::Unmap(map))?;
        Ok(())
    })
}

fn truncate_mapped(scene: &mut Scene) -> Outcome {
    let content = Content { seed: 6, len: 6 << 20 };
    let host = scene.fresh_dir("truncated")?.join("file");
    content.write_to(&host)?;
    scene.mounted("", "dax=always", |scene, mnt| {
        let path = format!("{mnt}/truncated/file");
        let map = scene.vm.map(path.as_str(), 0, content.len as usize, true)?;
        ensure_eq!(scene.vm.call::<Option<u64>>(&Op::MapVerify(map, content.seed))?, None);
        scene.vm.run(Op::Fallocate(path.as_str().into(), FallocateHow::PunchHole, 1 << 20, 1 << 20))?;
        ensure_eq!(scene.vm.map_read(map, 1 << 20, 16)?, [0; 16], "a hole under a mapping");
        ensure_eq!(scene.vm.read_bytes(path.as_str(), (2 << 20) - 16, 16)?, [0; 16], "the hole's end");
        scene.vm.run(Op::Truncate(path.as_str().into(), 3 << 20))?;
        let beyond = scene.vm.map_read(map, 5 << 20, 16);
        crate::harness::ensure_errno(beyond, &[rustix::io::Errno::FAULT.raw_os_error()], "beyond the end")?;
        scene.vm.run(Op::Truncate(path.as_str().into(), content.len))?;
        ensure_eq!(scene.vm.map_read(map, 5 << 20, 16)?, [0; 16], "what was cut off and came back");
        scene.vm.map_write(map, 5 << 20, b"again")?;
        scene.vm.run(Op::MapSync(map))?;
        scene.vm.run(Op::Unmap(map))?;
        let mut found = [0; 5];
        File::open(&host)?.read_exact_at(&mut found, 5 << 20)?;
        ensure_eq!(&found, b"again");
        ensure_eq!(fs::metadata(&host)?.len(), content.len);
        Ok(())
    })
}

/// One share's file by read(2) with O_DIRECT into a mapping of another's: the device must find its own window, and the
/// other device's, among the memory that descriptors point to.
fn direct_read(scene: &mut Scene) -> Outcome {
    let len = 1 << 20;
    let host = scene.fresh_dir("direct")?.join("buffer");
    Content { seed: 7, len }.write_to(&host)?;
    scene.mounted("", "dax=always", |scene, mnt| {
        scene.mounted("-never", "dax=inode", |scene, plain| {
            let map = scene.vm.map(format!("{mnt}/direct/buffer"), 0, len as usize, true)?;
            let (path, offset) = (format!("{plain}/big").into(), 3 << 20);
            let read = DirectRead { path, offset, len: len as usize, map, at: 0 };
            ensure_eq!(scene.vm.call::<usize>(&Op::DirectReadIntoMap(read))?, len as usize, "bytes read");
            scene.vm.run(Op::MapSync(map))?;
            scene.vm.run(Op::Unmap(map))?;
            let found = fs::read(&host)?;
            let expected = {
                let mut bytes = vec![0; len as usize];
                tests::guest::data::fill(BIG.seed, offset, &mut bytes);
                bytes
            };
            ensure!(found == expected, "the buffer on the host has not what was read");
            Ok(())
        })
    })
}

fn execute(scene: &mut Scene) -> Outcome {
    let host = scene.fresh_dir("programs")?.join("agent");
    fs::copy(tests::vm::guest_init()?, host)?;
    scene.mounted("", "dax=always", |scene, mnt| {
        let path = format!("{mnt}/programs/agent");
        ensure!(scene.vm.stat(path.as_str())?.dax, "the program is not DAX");
        let output = scene.vm.command(&[&path], "@{\"Echo\":\"from DAX\"}\n")?;
        ensure_eq!(output.stdout, "@{\"Ok\":\"from DAX\"}\n", "{output:?}");
        ensure_eq!(output.status, Some(0));
        Ok(())
    })
}
