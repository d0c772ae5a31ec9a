//! Mounts that come and go, devices that are taken away, and what is left of them.

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use tests::guest::data::Content;
use tests::guest::{Access, Op, OpenHow, Verified};
use tests::vm::{Holdings, Kernel, Share, Vm, WindowCounts};

use crate::harness::{
    BIG, BIG_SHA256, Checks, LastCheck, Outcome, PLACES, Places, Scene, ensure, ensure_content, ensure_ended,
    ensure_eq, ensure_errno,
};
use crate::ledger::Ledger;

pub fn checks() -> Checks {
    vec![
        ("remount-sees-the-host", remount),
        ("two-shares-at-once", two_shares),
        ("nothing-is-left-of-a-mount", no_leaks),
        ("device-is-taken-away-and-comes-back", rebind),
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
fn settled(vm: &Vm, shared: &Path) -> Result<Holdings, Box<dyn std::error::Error>> {
    let mut before = vm.host().holdings(shared)?;
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        std::thread::sleep(Duration::from_millis(300));
        let now = vm.host().holdings(shared)?;
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
            scene.vm.verify(&[(&format!("{mnt}/big"), BIG)], 1, true)?;
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
    let first = settled(scene.vm, &scene.dir)?;
    ensure_eq!((first.share_mappings, first.share_resident), (0, 0), "mappings after an unmount");
    for _ in 0..3 {
        cycle(scene)?;
    }
    let last = settled(scene.vm, &scene.dir)?;
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

/// The driver lets go of the device between two mounts: what it finds afterwards is a new one.
fn rebind(scene: &mut Scene) -> Outcome {
    let tag = format!("{}-small", scene.place);
    let index = scene.boot.share_tags().position(|other| other == tag).ok_or("no such share")?;
    let device = scene.vm.virtio_fs_devices()?.get(index).cloned().ok_or("the device is not there")?;
    let read = |scene: &mut Scene| {
        scene.mounted("-small", "dax=always", |scene, mnt| {
            let found = scene.vm.verify(&[(&format!("{mnt}/big"), BIG)], 1, true)?;
            ensure_eq!(found.differs, vec![]);
            Ok(())
        })
    };
    for _ in 0..2 {
        read(scene)?;
        scene.vm.unbind(&device)?;
        let mounted = scene.vm.mount(&tag, "/mnt/gone", "dax=always");
        ensure_errno(mounted, &[Errno::INVAL.raw_os_error()], "a mount of a share without a driver")?;
        scene.vm.bind(&device)?;
    }
    read(scene)
}

/// The driver lets go of devices that are mounted and whose files a program has mapped, and takes them again.
///
/// It has a guest of its own, and leaves the dead mounts alone: stock kernels free the window's page structures with the
/// device and look at them when they drop the inodes, which ends in an oops whatever the device does.
pub fn unbind_with_mappings_live(kernel: &Kernel, places: &Places) -> Outcome {
    let content = Content { seed: 30, len: 8 << 20 };
    let mut builder = Vm::builder(kernel).cpus(2);
    for place in PLACES {
        let dir = places.dir(place).join("unbound");
        std::fs::create_dir_all(&dir)?;
        content.write_to(&dir.join("file"))?;
        builder = builder.share(Share::new(place, dir).window("32M").dax("always"));
    }
    let mut vm = builder.boot()?;
    let devices = vm.virtio_fs_devices()?;
    ensure_eq!(devices.len(), PLACES.len(), "virtio-fs devices");
    for (place, device) in PLACES.into_iter().zip(&devices) {
        let dir = places.dir(place).join("unbound");
        let (target, host) = (format!("/mnt/{place}"), dir.join("file"));
        vm.mount(place, &target, "dax=always")?;
        let file = format!("{target}/file");
        // Open to the end, so that the inode stays.
        vm.open(file.as_str(), OpenHow::default())?;
        let map = vm.map(file.as_str(), 0, content.len as usize, true)?;
        ensure_eq!(vm.call::<Option<u64>>(&Op::MapVerify(map, content.seed))?, None);
        ensure!(vm.host().holdings(&dir)?.share_mappings > 0, "{place}: nothing is mapped");
        vm.unbind(device)?;
        ensure_eq!(
            settled(&vm, &dir)?.share_mappings,
            0,
            "{place}: mappings after the device was taken away"
        );

        // What the guest still has mapped is nothing now: an error or zeros, never the file; and writes go nowhere.
        let mut expected = vec![0; 64];
        tests::guest::data::fill(content.seed, 4096, &mut expected);
        match vm.map_read(map, 4096, 64) {
            Ok(found) => {
                ensure!(found != expected, "{place}: the file is seen through a device that is gone")
            }
            Err(error) => ensure!(error.errno().is_some(), "{error}"),
        }
        if let Err(error) = vm.map_write(map, 4096, &[0xee; 64]) {
            ensure!(error.errno().is_some(), "{error}");
        }
        ensure_content(&host, content)?;

        vm.bind(device)?;
        let again = format!("/mnt/{place}-again");
        vm.mount(place, &again, "dax=always")?;
        let verified = vm.verify(&[(&format!("{again}/file"), content)], 1, true)?;
        ensure_eq!(verified.differs, vec![], "{place}: after the device is back");
        ensure_content(&host, content)?;
    }
    ensure_ended(&vm.power_off()?, 0, "power-off")
}

/// The share that nobody has used yet: what the device counted is what was done here.
fn counts_and_power_off(mut vm: Vm, places: &Places, _: &Ledger) -> Outcome {
    let chunk = 2 << 20;
    for place in PLACES {
        vm.mount(&format!("{place}-counts"), "/mnt/counts", "dax=always")?;
        let digest = vm.sha256("/mnt/counts/big", Access::Mmap)?;
        ensure_eq!(digest.sha256, *BIG_SHA256);
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
            // As much as the host had in memory: the checks of `prefault` say how much that is.
            prefaults: counts.prefaults,
            prefault_bytes: counts.prefault_bytes,
            ..WindowCounts::default()
        };
        ensure!(
            counts.prefaults <= counts.setup_mappings && counts.prefault_bytes <= counts.prefaults * chunk,
            "{place}: more is prefaulted than mapped: {counts:?}"
        );
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
