//! A window of 32 MiB for a file of 64 MiB, and many readers and writers at once: the guest must give chunks back all the
//! time, and no byte may be lost.

use tests::guest::data::Content;
use tests::guest::{Access, Random};

use crate::harness::{BIG, Checks, Outcome, Scene, ensure_content, ensure_eq};

const AT_ONCE: usize = 8;

pub fn checks() -> Checks {
    vec![
        ("small-window-read", read),
        ("small-window-mmap", mmap),
        ("small-window-random-read", random_read),
        ("small-window-random-mmap", random_mmap),
        ("small-window-mmap-write", mmap_write),
        ("small-window-pwrite", pwrite),
    ]
}

fn verify(scene: &mut Scene, mmap: bool) -> Outcome {
    scene.mounted("-small", "dax=always", |scene, mnt| {
        let found = scene.vm.verify(&[(&format!("{mnt}/big"), BIG)], AT_ONCE, mmap)?;
        ensure_eq!(found.differs, vec![], "bytes that are not the host's");
        ensure_eq!(found.bytes, BIG.len * AT_ONCE as u64, "bytes read");
        Ok(())
    })
}

fn read(scene: &mut Scene) -> Outcome {
    verify(scene, false)
}

fn mmap(scene: &mut Scene) -> Outcome {
    verify(scene, true)
}

fn random(scene: &mut Scene, how: fn(Random) -> Access) -> Outcome {
    // Nearly each of them makes the guest give a chunk back. Readers that find none wait for one by spinning, and so
    // several processors make no progress on the one CPU of an emulated host but by the time slice.
    let count = if scene.boot.cpus == 1 { 4000 } else { 500 };
    let random = Random { seed: 8, count };
    scene.mounted("-small", "dax=always", |scene, mnt| {
        let digests = scene.vm.sha256_at_once(&format!("{mnt}/big"), how(random), AT_ONCE)?;
        ensure_eq!(digests.len(), AT_ONCE);
        for (reader, digest) in (0..).zip(digests) {
            ensure_eq!(
                digest.sha256,
                BIG.random_sha256(random.seed + reader, random.count),
                "reader {reader}"
            );
        }
        Ok(())
    })
}

fn random_read(scene: &mut Scene) -> Outcome {
    random(scene, Access::RandomRead)
}

fn random_mmap(scene: &mut Scene) -> Outcome {
    random(scene, Access::RandomMmap)
}

/// Chunks that are given back are dirty here, and mapped read-only before they are written.
fn write(scene: &mut Scene, mmap: bool) -> Outcome {
    let (old, new) = (Content { seed: 9, len: 48 << 20 }, Content { seed: 10, len: 48 << 20 });
    let host = scene.fresh_dir("pressed")?.join("file");
    old.write_to(&host)?;
    scene.mounted("-small", "dax=always", |scene, mnt| {
        let path = format!("{mnt}/pressed/file");
        ensure_eq!(scene.vm.verify(&[(&path, old)], 1, true)?.differs, vec![], "before");
        scene.vm.write_content(&path, 0, new, mmap, AT_ONCE)?;
        ensure_content(&host, new)?;
        ensure_eq!(scene.vm.verify(&[(&path, new)], AT_ONCE, mmap)?.differs, vec![], "after");
        Ok(())
    })
}

fn mmap_write(scene: &mut Scene) -> Outcome {
    write(scene, true)
}

fn pwrite(scene: &mut Scene) -> Outcome {
    write(scene, false)
}
