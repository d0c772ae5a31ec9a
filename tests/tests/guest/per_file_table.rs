//! The table of per-file DAX: sizes around every threshold, policies, mount options, and ways to become known.
//!
//! What is expected follows from what the policies promise, and is worked out here without the device's code.

use std::fs::{self, File};
use std::path::Path;

use rustix::io::Errno;
use tests::guest::{Known, MakeKnown, Op, Way};

use crate::harness::{Checks, Outcome, Scene, ensure_eq};
use crate::per_file::{has_flag, mark};

const K: u64 = 1 << 10;
const M: u64 = 1 << 20;
const CHUNK: u64 = 2 * M;
const PAGE: u64 = 4 * K;
/// Page descriptors of a chunk: 64 bytes for each of its 512 pages.
const CHUNK_COST: u64 = 512 * 64;

const SIZES: [u64; 14] = [
    0,
    1,
    4095,
    4096,
    32 * K - 1,
    32 * K,
    32 * K + 1,
    64 * K - 1,
    64 * K,
    2 * M - 1,
    2 * M,
    2 * M + 1,
    4 * M,
    8 * M,
];

const WAYS: [(&str, Way); 5] = [
    ("lookup", Way::LookUp),
    ("listing", Way::Listing),
    ("create", Way::Create),
    ("link", Way::Link),
    ("unnamed", Way::Unnamed),
];

pub fn checks() -> Checks {
    vec![
        ("table-never", |scene| table(scene, "-never")),
        ("table-always", |scene| table(scene, "-always")),
        ("table-inode", |scene| table(scene, "-inode")),
        ("table-size", |scene| table(scene, "-size")),
        ("table-size64k", |scene| table(scene, "-size64k")),
        ("table-auto", |scene| table(scene, "-auto")),
        ("table-rules", |scene| table(scene, "-rules")),
    ]
}

/// What the share's policy promises for a file: of its size, with or without the hint, in the directory of this way.
fn promised(share: &str, size: u64, marked: bool, way: Way) -> bool {
    match share {
        "-never" => false,
        "-always" => true,
        "-inode" => marked,
        "-size" => size >= 32 * K,
        "-size64k" => size >= 64 * K,
        "-auto" => size.div_ceil(CHUNK) * CHUNK_COST < size.div_ceil(PAGE) * PAGE,
        // The rules, in their order.
        _ if marked => true,
        _ if way == Way::Listing && size <= 32 * K => true,
        _ if way == Way::Link => false,
        _ => size >= 64 * K,
    }
}

/// Whether the policy looks at hints.
fn asks_for_hints(share: &str) -> bool {
    matches!(share, "-inode" | "-rules")
}

fn table(scene: &mut Scene, share: &str) -> Outcome {
    let dir = scene.share_dir(share);
    let kinds: &[bool] = if asks_for_hints(share) { &[false, true] } else { &[false] };
    for &marked in kinds {
        prepare(scene.place, &dir, marked)?;
    }
    // Long enough ago that nothing was changed just now.
    std::thread::sleep(std::time::Duration::from_millis(100));
    for options in ["", "dax=inode", "dax=always", "dax=never"] {
        for &marked in kinds {
            empty(&dir.join(kind(marked)))?;
        }
        scene.mounted(share, options, |scene, mnt| {
            for &marked in kinds {
                for (name, way) in WAYS {
                    let dir = format!("{mnt}/{}/{name}", kind(marked)).as_str().into();
                    let ask = MakeKnown { dir, sizes: SIZES.to_vec(), way };
                    let found: Vec<Known> = scene.vm.call(&Op::MakeKnown(ask))?;
                    ensure_eq!(found.len(), SIZES.len());
                    for (size, found) in SIZES.into_iter().zip(found) {
                        let expected = expect(scene, share, options, size, marked, way);
                        ensure_eq!(found, expected, "{share} {options:?} {size} bytes {way:?} {marked}");
                    }
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}

fn kind(marked: bool) -> &'static str {
    if marked { "marked" } else { "plain" }
}

/// The files that are there before the guest looks.
fn prepare(place: &str, share: &Path, marked: bool) -> Outcome {
    let top = share.join(kind(marked));
    fs::create_dir(&top)?;
    for (name, way) in WAYS {
        let dir = top.join(name);
        fs::create_dir(&dir)?;
        mark(place, &dir, marked)?;
        let prefix = match way {
            Way::LookUp | Way::Listing => "",
            Way::Link => "first-",
            Way::Create | Way::Unnamed => continue,
        };
        for size in SIZES {
            let path = dir.join(format!("{prefix}{size}"));
            File::create_new(&path)?.set_len(size)?;
            mark(place, &path, marked)?;
        }
    }
    Ok(())
}

/// Removes what another mount has created.
fn empty(top: &Path) -> Outcome {
    for (name, way) in WAYS {
        if !matches!(way, Way::LookUp | Way::Listing) {
            for size in SIZES {
                let _ = fs::remove_file(top.join(name).join(size.to_string()));
            }
        }
    }
    Ok(())
}

/// What a file must be; what the device must count for it goes to the ledger.
fn expect(scene: &mut Scene, share: &str, options: &str, size: u64, marked: bool, way: Way) -> Known {
    let is_created = matches!(way, Way::Create | Way::Unnamed);
    let inherits_here = is_created && !has_flag(scene.place);
    let counts = scene.expect(share);
    let add = |count: &mut Option<u64>, more: u64| *count = count.map(|count| count + more);
    let chunks = size.div_ceil(CHUNK);
    match options {
        // Every file is DAX, and only what the policy forbids cannot be mapped.
        "dax=always" if share == "-never" && size > 0 => {
            add(&mut counts.failed_setups, 1);
            Known { known: true, opened: true, errno: Errno::PERM.raw_os_error() }
        }
        "dax=always" => {
            add(&mut counts.setups, chunks);
            Known { known: true, opened: true, errno: 0 }
        }
        "dax=never" => Known { known: false, opened: false, errno: 0 },
        _ => {
            // What is created is empty then.
            let first = if is_created { 0 } else { size };
            let known = promised(share, first, marked, way);
            let opened = promised(share, size, marked, way);
            for dax in
                [Some(known), (is_created && (known != opened || way == Way::Unnamed)).then_some(opened)]
            {
                match dax {
                    Some(true) => add(&mut counts.granted, 1),
                    Some(false) => add(&mut counts.denied, 1),
                    None => {}
                }
            }
            // A file without a name is another one to the guest than the one that it becomes.
            add(&mut counts.reincarnations, u64::from(way == Way::Create && known != opened));
            if opened {
                add(&mut counts.setups, chunks);
            }
            if asks_for_hints(share) {
                // When it becomes known; and when it is opened, if it has changed since.
                add(
                    &mut counts.hint_queries,
                    match way {
                        Way::LookUp | Way::Listing => 1,
                        Way::Link | Way::Create => 2,
                        Way::Unnamed => 3,
                    },
                );
            }
            // Nothing changes these between their last look-up and their open.
            let rests = way == Way::Unnamed || way == Way::Create && size == 0;
            counts.saved_queries += u64::from(rests && asks_for_hints(share));
            // The directory's.
            add(&mut counts.hint_queries, u64::from(inherits_here));
            Known { known, opened, errno: 0 }
        }
    }
}
