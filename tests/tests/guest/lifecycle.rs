//! Mounts that come and go, devices that are taken away, and what is left of them.

use std::time::{Duration, Instant};

use tests::guest::data::Content;
use tests::guest::{Access, Op, Verified};
use tests::vm::{Holdings, Vm, WindowCounts};

use crate::harness::{
    BIG, Checks, LastCheck, Outcome, PLACES, Places, Scene, ensure, ensure_content, ensure_ended, ensure_eq,
};

pub fn checks() -> Checks {
    vec![
        ("remount-sees-the-host", remount),
        ("two-shares-at-once", two_shares),
        ("nothing-is-left-of-a-mount", no_leaks),
        ("device-is-taken-away-with-mappings-live", unbind),
    ]
}

/// What ends a boot, in this order.
pub fn last_checks() -> Vec<(&'static str, LastCheck)> {
    vec![("counts-and-power-off", counts_and_power_off)]
}

fn remount(scene: &mut Scene) -> Outcome {
    let host = scene.fresh_dir("remount")?.join("file");
    for seed in 20..24 {
        let content = Content { seed, len: (2 << 20) + seed };
        content.write_to(&host)?;
        scene.mounted("", "dax=always", |scene, mnt| {
            let path = format!("{mnt}/remount/file");
            ensure_eq!(scene.vm.verify(&[(&path, content)], 1, true)?.differs, vec![], "mount {seed}");
            Ok(())
        })?;
    }
    Ok(())
}

/// This file system's share and the other's, each with its own window, used at the same time.
fn two_shares(scene: &mut Scene) -> Outcome {
    let other = PLACES.into_iter().find(|place| *place != scene.place).ok_or("there is only one place")?;
    scene.mounted("", "dax=always", |scene, mnt| {
        scene.vm.mount(other, "/mnt/other", "dax=always")?;
        let (mine, others) = (format!("{mnt}/big"), "/mnt/other/big".to_owned());
        let found: Result<Verified, _> = scene.vm.verify(&[(&mine, BIG), (&others, BIG)], 2, true);
        scene.vm.umount("/mnt/other")?;
        let found = found?;
        ensure_eq!(found.differs, vec![]);
        ensure_eq!(found.bytes, BIG.len * 4);
        Ok(())
    })
}

/// What the process holds, once it has become quiet: descriptors of forgotten files are closed a moment later.
fn settled(scene: &Scene) -> Result<Holdings, Box<dyn std::error::Error>> {
    let mut before = scene.vm.host().holdings(&scene.dir)?;
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        std::thread::sleep(Duration::from_millis(300));
        let now = scene.vm.host().holdings(&scene.dir)?;
        if now == before || Instant::now() > end {
            return Ok(now);
        }
        before = now;
    }
}

/// Mounts, reads by mapping and by lookup, unmounts: again and again nothing may be left.
fn no_leaks(scene: &mut Scene) -> Outcome {
    let host = scene.fresh_dir("leaks")?;
    for number in 0..300 {
        Content { seed: number, len: 100 }.write_to(&host.join(format!("file-{number}")))?;
    }
    let cycle = |scene: &mut Scene| {
        scene.mounted("", "dax=always", |scene, mnt| {
            scene.vm.sha256(&format!("{mnt}/big"), Access::Mmap)?;
            let files: Vec<String> = (0..300).map(|number| format!("{mnt}/leaks/file-{number}")).collect();
            for (number, file) in files.iter().enumerate().step_by(10) {
                let content = Content { seed: number as u64, len: 100 };
                ensure_eq!(scene.vm.verify(&[(file, content)], 1, true)?.differs, vec![]);
            }
            ensure_eq!(scene.vm.read_dir(format!("{mnt}/leaks"))?.len(), 300);
            let held = scene.vm.host().holdings(&scene.dir)?;
            ensure!(held.share_mappings >= 1, "nothing of the share is mapped while it is read: {held:?}");
            Ok(())
        })
    };
    // The first time grows pools and heaps; what counts is that the next times do not.
    cycle(scene)?;
    let first = settled(scene)?;
    ensure_eq!((first.share_mappings, first.share_resident), (0, 0), "mappings after an unmount");
    for _ in 0..3 {
        cycle(scene)?;
    }
    let last = settled(scene)?;
    ensure_eq!((last.share_mappings, last.share_resident), (0, 0), "mappings after more unmounts");
    ensure_eq!(last.descriptors, first.descriptors, "descriptors");
    ensure!(
        last.own_resident <= first.own_resident + 512,
        "the process has grown from {} to {} KiB",
        first.own_resident,
        last.own_resident
    );
    Ok(())
}

/// The driver lets go of the device while a program has a file mapped, then takes it again.
fn unbind(scene: &mut Scene) -> Outcome {
    let content = Content { seed: 30, len: 8 << 20 };
    let host = scene.fresh_dir("unbound")?.join("file");
    content.write_to(&host)?;
    // The share's device: five a place, the small one is the second.
    let index = PLACES.iter().position(|place| *place == scene.place).ok_or("no such place")? * 5 + 1;
    let tag = format!("{}-small", scene.place);
    let device = scene.vm.virtio_fs_devices()?.get(index).cloned().ok_or("the device is not there")?;

    scene.vm.mount(&tag, "/mnt/unbound", "dax=always")?;
    let map = scene.vm.map("/mnt/unbound/unbound/file", 0, content.len as usize, true)?;
    ensure_eq!(scene.vm.call::<Option<u64>>(&Op::MapVerify(map, content.seed))?, None);
    ensure!(scene.vm.host().holdings(&scene.dir)?.share_mappings > 0, "nothing is mapped");
    scene.vm.unbind(&device)?;
    ensure_eq!(settled(scene)?.share_mappings, 0, "mappings on the host after the device was taken away");

    // What the guest still has mapped is nothing now: an error or zeros, never the file, and writes go nowhere.
    let mut expected = vec![0; 64];
    tests::guest::data::fill(content.seed, 4096, &mut expected);
    match scene.vm.map_read(map, 4096, 64) {
        Ok(found) => ensure!(found != expected, "the file can still be read through a device that is gone"),
        Err(error) => ensure!(error.errno().is_some(), "{error}"),
    }
    if let Err(error) = scene.vm.map_write(map, 4096, &[0xee; 64]) {
        ensure!(error.errno().is_some(), "{error}");
    }
    scene.vm.run(Op::Unmap(map))?;
    ensure_content(&host, content)?;
    scene.vm.umount("/mnt/unbound")?;

    scene.vm.bind(&device)?;
    scene.mounted("-small", "dax=always", |scene, mnt| {
        let path = format!("{mnt}/unbound/file");
        ensure_eq!(
            scene.vm.verify(&[(&path, content)], 1, true)?.differs,
            vec![],
            "after the device is back"
        );
        Ok(())
    })
}

/// The share that nobody has used yet: what the device counted is what was done here.
fn counts_and_power_off(mut vm: Vm, places: &Places) -> Outcome {
    let chunk = 2 << 20;
    for place in PLACES {
        vm.mount(&format!("{place}-counts"), "/mnt/counts", "dax=always")?;
        let digest = vm.sha256("/mnt/counts/big", Access::Mmap)?;
        ensure_eq!(digest.sha256, BIG.sha256());
        let held = vm.host().holdings(&places.dir(place).join("counts"))?;
        ensure!(held.share_mappings > 0, "the host has mapped nothing of the share: {held:?}");
        // Two chunks that are mapped for reading become writable.
        vm.write_content("/mnt/counts/big", 0, Content { len: 2 * chunk, ..BIG }, true, 1)?;
        vm.umount("/mnt/counts")?;
    }
    let complaints: Vec<String> = ["BUG:", "WARNING:", "Oops", "virtio_fs: "]
        .into_iter()
        .map(|text| vm.call::<Vec<String>>(&Op::KernelLog(text.into())))
        .collect::<Result<Vec<_>, _>>()?
        .concat();
    let console = vm.console();
    let ended = vm.power_off()?;
    ensure_ended(&ended, 0, "power-off")?;
    for place in PLACES {
        let counts = ended.report.window(&format!("{place}-counts")).ok_or("no window in the report")?;
        let all = BIG.len / chunk;
        let expected = WindowCounts {
            mapped_chunks: 0,
            peak_mapped_chunks: all,
            mapped_bytes: 0,
            setup_mappings: all + 2,
            failed_setup_mappings: 0,
            // The guest unmounts without them: the end of the session gives everything back.
            remove_mappings: 0,
            // What may be written is mapped writable at once: a second request for it changes nothing.
            upgraded_chunks: 0,
            cleared_chunks: all,
        };
        ensure_eq!(counts, expected, "{place}");

        let small = ended.report.window(&format!("{place}-small")).ok_or("no window in the report")?;
        ensure_eq!(small.mapped_chunks, 0, "{place}-small: {small:?}");
        ensure!(small.peak_mapped_chunks <= 16, "{place}-small: more chunks than the window has: {small:?}");
        let never = ended.report.window(&format!("{place}-never")).ok_or("no window in the report")?;
        ensure_eq!(never.setup_mappings, 0, "{place}-never: {never:?}");
    }
    ensure_eq!(complaints, Vec::<String>::new(), "the guest's kernel complained\n{console}");
    Ok(())
}
