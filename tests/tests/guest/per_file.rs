//! Per-file DAX: guests whose shares differ in nothing but their policies and what the guest may keep.
//!
//! Every check says what the device should have counted for it. When the guest has been powered off the report must say
//! the same of each share, and nothing of those that were not used.

use std::error::Error;
use std::fs;
use std::io;
use std::path::Path;

use rustix::fs::XattrFlags;
use rustix::io::Errno;
use tests::guest::Op;
use tests::inode_flags::{self, XFLAG_DAX};
use tests::vm::{Kernel, Share, Vm};

use crate::harness::{Checks, LastCheck, Outcome, Places, ensure, ensure_ended, ensure_eq};
use crate::ledger::{Expected, Ledger};
use crate::{hints, negotiation, per_file_life, per_file_room, per_file_table};

/// The attribute that stands for the flag where a file system has none.
pub const ATTRIBUTE: &str = "user.daxvm.dax";

/// The rule file of the share `-rules`.
const RULES: &str = r#"
version = 1
default = "size:64K"

[[rule]]
name = "marked"
hint = true
dax = "allow"

[[rule]]
name = "small ones that are listed"
path = "*/listing/*"
size.max = "32K"
dax = "allow"

[[rule]]
name = "those with two names"
path = "*/link/*"
dax = "deny"
"#;

/// The shares of the first boot: directory, policy, window, cache.
const SHARES: [(&str, &str, &str, &str); 23] = [
    ("-never", "never", "256M", "auto"),
    ("-always", "always", "256M", "auto"),
    ("-inode", "inode", "512M", "auto"),
    ("-size", "size", "256M", "auto"),
    ("-size64k", "size:64K", "256M", "auto"),
    ("-auto", "auto", "256M", "auto"),
    ("-rules", "RULES", "512M", "auto"),
    ("-keep-never", "inode", "32M", "never"),
    ("-keep-auto", "inode", "32M", "auto"),
    ("-keep-metadata", "inode", "32M", "metadata"),
    ("-keep-always", "inode", "32M", "always"),
    ("-chattr", "inode", "32M", "auto"),
    ("-stay", "always", "32M", "auto"),
    ("-stay-never", "inode", "32M", "never"),
    ("-grow", "size:32K", "32M", "always"),
    ("-forced", "inode", "32M", "auto"),
    ("-refused", "inode", "32M", "auto"),
    ("-bare", "inode", "0", "auto"),
    ("-names", "inode", "32M", "auto"),
    ("-over", "inode", "32M", "auto"),
    ("-room", "auto", "32M", "auto"),
    ("-free", "ROOM", "32M", "auto"),
    ("-set-id", "auto", "64M", "auto"),
];

/// The same of the second boot.
const SHARES_AGAIN: [(&str, &str, &str, &str); 2] =
    [("-chattr", "inode", "32M", "auto"), ("-race", "inode", "32M", "auto")];

/// What is checked in the first boot.
pub fn checks() -> Checks {
    [
        per_file_table::checks(),
        hints::checks(),
        per_file_life::checks(),
        per_file_room::checks(),
        negotiation::checks(),
    ]
    .concat()
}

/// What is checked in the second boot.
pub fn checks_after_reboot() -> Checks {
    [hints::checks_after_reboot(), per_file_life::checks_with_processors()].concat()
}

/// What ends both.
pub fn last_checks(place: &'static str) -> Vec<(&'static str, LastCheck)> {
    match place {
        "ext4" => vec![("ext4/per-file/counts-and-power-off", counts)],
        "xfs" => vec![("xfs/per-file/counts-and-power-off", counts)],
        _ => vec![("tmpfs/per-file/counts-and-power-off", counts)],
    }
}

/// Boots with directories that are empty.
pub fn first_boot(kernel: Kernel, cpus: u32, place: &str, dir: &Path) -> Result<Vm, Box<dyn Error>> {
    match fs::remove_dir_all(dir.join("per-file")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    boot(kernel.module("overlay"), cpus, place, dir, &SHARES)
}

/// Boots with what the first boot has left.
pub fn second_boot(kernel: Kernel, cpus: u32, place: &str, dir: &Path) -> Result<Vm, Box<dyn Error>> {
    boot(kernel, cpus, place, dir, &SHARES_AGAIN)
}

fn boot(
    kernel: Kernel,
    cpus: u32,
    place: &str,
    dir: &Path,
    shares: &[(&str, &str, &str, &str)],
) -> Result<Vm, Box<dyn Error>> {
    let dir = dir.join("per-file");
    fs::create_dir_all(&dir)?;
    let rules = write_rules(&dir, "rules.toml", RULES)?;
    let room = write_rules(&dir, "room.toml", per_file_room::RULES)?;
    let mut builder = Vm::builder(&kernel).cpus(cpus).memory("768M");
    let mut add = |suffix: &str, dir: &Path, policy: &str, window, cache, read_only| {
        fs::create_dir_all(dir)?;
        let policy = match policy {
            "RULES" => &rules,
            "ROOM" => &room,
            named => named,
        };
        let share = Share::new(&format!("{place}{suffix}"), dir).dax(policy).window(window).cache(cache);
        let share = if read_only { share.read_only() } else { share };
        builder = builder.clone().share(share);
        Ok::<_, io::Error>(())
    };
    for &(suffix, policy, window, cache) in shares {
        add(suffix, &dir.join(&suffix[1..]), policy, window, cache, false)?;
    }
    add("-ro", &dir.join("chattr"), "inode", "32M", "auto", true)?;
    Ok(builder.boot()?)
}

fn write_rules(dir: &Path, name: &str, rules: &str) -> Result<String, Box<dyn Error>> {
    let path = dir.join(name);
    fs::write(&path, rules)?;
    Ok(path.into_os_string().into_string().map_err(|_| "the scratch directory's name is not text")?)
}

/// Whether the file system keeps the flag itself.
pub fn has_flag(place: &str) -> bool {
    place != "tmpfs"
}

/// Gives a file or directory of the host the hint, or takes it away, as a user of the host would.
pub fn mark(place: &str, path: &Path, hint: bool) -> io::Result<()> {
    if has_flag(place) {
        let mut attributes = inode_flags::get_extended(path)?;
        attributes.xflags = if hint { attributes.xflags | XFLAG_DAX } else { attributes.xflags & !XFLAG_DAX };
        return inode_flags::set_extended(path, attributes);
    }
    match hint {
        true => Ok(rustix::fs::setxattr(path, ATTRIBUTE, b"1", XattrFlags::empty())?),
        false => match rustix::fs::removexattr(path, ATTRIBUTE) {
            Ok(()) | Err(Errno::NODATA) => Ok(()),
            Err(errno) => Err(errno.into()),
        },
    }
}

/// What the host says of a hint: its own flag, and the attribute's value.
pub fn marks(path: &Path) -> io::Result<(bool, Option<Vec<u8>>)> {
    let flag = inode_flags::get(path)? & inode_flags::DAX != 0;
    let mut value = vec![0; 64];
    match rustix::fs::getxattr(path, ATTRIBUTE, &mut value[..]) {
        Ok(len) => value.truncate(len),
        Err(Errno::NODATA) => return Ok((flag, None)),
        Err(errno) => return Err(errno.into()),
    }
    Ok((flag, Some(value)))
}

/// The hint must be there, and only where it belongs on this file system.
pub fn ensure_marked(place: &str, path: &Path, hint: bool) -> Outcome {
    let expected = (hint && has_flag(place), (hint && !has_flag(place)).then(|| b"1".to_vec()));
    ensure_eq!(marks(path)?, expected, "the hint of {} on the host", path.display());
    Ok(())
}

/// Powers the guest off, and compares what the device has counted with what the checks expect.
fn counts(mut vm: Vm, _: &Places, ledger: &Ledger) -> Outcome {
    let complaints: Vec<String> = ["BUG:", "WARNING:", "Oops", "virtio_fs: "]
        .into_iter()
        .map(|text| vm.call::<Vec<String>>(&Op::KernelLog(text.into())))
        .collect::<Result<Vec<_>, _>>()?
        .concat();
    let ended = vm.power_off()?;
    ensure_ended(&ended, 0, "power-off")?;
    ensure_eq!(complaints, Vec::<String>::new(), "the guest's kernel complained");
    let mut wrong = Vec::new();
    for tag in ended.report.tags() {
        let expected = ledger.get(tag).copied().unwrap_or_default();
        let (window, dax) =
            (ended.report.window(tag).unwrap_or_default(), ended.report.dax(tag).unwrap_or_default());
        let found = Expected {
            setups: Some(window.setup_mappings),
            // Those that the window refused and those that did not come so far.
            failed_setups: Some(ended.report.requests(tag, "SETUPMAPPING") - window.setup_mappings),
            removes: Some(window.remove_mappings),
            granted: Some(dax.dax_granted),
            denied: Some(dax.dax_denied),
            reincarnations: Some(dax.reincarnations),
            hint_queries: Some(dax.hint_queries),
            saved_queries: 0,
        };
        if !expected.allows(&found) {
            wrong.push(format!("{tag}: {found:?}, expected {expected:?}"));
        }
        ensure_eq!(window.mapped_chunks, 0, "{tag}: chunks still mapped");
    }
    ensure!(wrong.is_empty(), "what the device counted:\n{}", wrong.join("\n"));
    Ok(())
}
