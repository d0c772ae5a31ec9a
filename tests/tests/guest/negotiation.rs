//! Clients without per-file DAX cost a share no question to the host, and a window that nobody can use is spoken of.

use rustix::io::Errno;
use tests::guest::Op;
use tests::guest::data::Content;

use crate::harness::{Checks, Outcome, Scene, ensure, ensure_eq, ensure_errno};
use crate::per_file::{ensure_marked, mark};

const FILE: Content = Content { seed: 12, len: 3 << 20 };

pub fn checks() -> Checks {
    vec![
        ("nothing-is-asked-with-dax-always", |scene| unasked(scene, "-forced", "dax=always")),
        ("nothing-is-asked-with-dax-never", |scene| unasked(scene, "-refused", "dax=never")),
        ("nothing-is-asked-without-a-window", |scene| unasked(scene, "-bare", "dax=inode")),
    ]
}

/// How often the program has warned that a share's window is of no use, and the last of these lines.
fn warnings(scene: &Scene, share: &str) -> (usize, String) {
    let console = scene.vm.console();
    let tag = format!("{}{share}", scene.place);
    let is_one = |line: &&str| {
        line.contains("can be DAX, though it has a window")
            && line.split(|c: char| !c.is_ascii_alphanumeric() && c != '-').any(|word| word == tag)
    };
    let lines: Vec<_> = console.lines().filter(is_one).collect();
    (lines.len(), lines.last().map(ToString::to_string).unwrap_or_default())
}

/// All that makes a client know files, twice; the policy would ask for hints.
fn unasked(scene: &mut Scene, share: &str, options: &str) -> Outcome {
    let dir = scene.share_dir(share);
    for name in ["plain", "marked"] {
        FILE.write_to(&dir.join(name))?;
    }
    mark(scene.place, &dir.join("marked"), true)?;
    std::fs::create_dir(dir.join("directory"))?;
    mark(scene.place, &dir.join("directory"), true)?;
    let dax = options == "dax=always";
    // Each mount maps two chunks of two files. All other counts stay at nothing.
    // They are removed when the caches are dropped.
    let counts = scene.expect(share);
    counts.setups = Some(if dax { 8 } else { 0 });
    counts.removes = counts.setups;
    for round in 0..2 {
        scene.mounted(share, options, |scene, mnt| {
            let files = [format!("{mnt}/plain"), format!("{mnt}/marked")];
            ensure_eq!(scene.vm.read_dir(mnt)?.len(), 3);
            for file in &files {
                ensure_eq!(scene.vm.stat(file.as_str())?.dax, dax, "STATX_ATTR_DAX of {file}");
                ensure_eq!(scene.vm.verify(&[(file, FILE)], 1, false)?.differs, vec![]);
            }
            let new = format!("{mnt}/directory/new-{round}");
            scene.vm.create(new.as_str())?;
            ensure_eq!(scene.vm.stat(new.as_str())?.dax, dax, "STATX_ATTR_DAX of a new file");
            let linked = format!("{mnt}/directory/linked-{round}");
            scene.vm.run(Op::Link(new.into(), linked.into()))?;
            scene.vm.drop_caches()?;
            ensure_eq!(scene.vm.read_dir(format!("{mnt}/directory"))?.len(), 2 * (round + 1));
            Ok(())
        })?;
    }
    ensure_marked(scene.place, &dir.join("marked"), true)?;
    let (count, line) = warnings(scene, share);
    match share {
        "-refused" => {
            ensure_eq!(count, 1, "warnings of a window that is of no use\n{}", scene.vm.console());
            for part in ["WARN", "dax=never", "mount it with `-o dax=inode`", "window=0"] {
                ensure!(line.contains(part), "the warning does not say {part:?}: {line}");
            }
        }
        _ => ensure_eq!(count, 0, "warnings of a window that is of no use: {line}"),
    }
    if share == "-bare" {
        let tag = format!("{}{share}", scene.place);
        let mounted = scene.vm.mount(&tag, "/mnt/bare-always", "dax=always");
        ensure_errno(mounted, &[Errno::INVAL.raw_os_error()], "dax=always without a window")?;
    }
    Ok(())
}
