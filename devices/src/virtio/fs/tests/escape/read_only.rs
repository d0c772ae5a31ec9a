//! A share that may only be read.

use fuse_backend_rs::abi::fuse_abi::{CreateIn, OpenIn};
use tempfile::TempDir;

use super::{Yard, bytes, copy_to, link_to, parts, with_handle, without_handle};
use crate::virtio::fs::abi::opcode;
use crate::virtio::fs::testing::{READ, ROOT, WRITE, nul};

#[test]
fn nothing_changes_whatever_is_asked() {
    let mut yard = Yard::with(TempDir::new().unwrap(), true);
    let (file, directory) = (yard.file, yard.directory);
    let fh = yard.guest.open(file, libc::O_RDONLY).unwrap().fh;
    let before = listing(&yard);
    for node in [ROOT, file, directory] {
        for (what, code, ask) in without_handle().into_iter().chain(with_handle(fh)) {
            let outcome = yard.guest.call(code, node, &parts(&ask));
            let changes = [
                opcode::SETATTR,
                opcode::SYMLINK,
                opcode::MKNOD,
                opcode::MKDIR,
                opcode::UNLINK,
                opcode::RMDIR,
                opcode::RENAME,
                opcode::RENAME2,
                opcode::CREATE,
                opcode::TMPFILE,
                opcode::WRITE,
                opcode::FALLOCATE,
                opcode::SETXATTR,
                opcode::REMOVEXATTR,
            ];
            let writes = what.ends_with("to write") || what.ends_with("to truncate");
            if changes.contains(&code) || writes {
                assert_eq!(outcome, Err(libc::EROFS), "{what} on {node:#x}");
            }
            assert_eq!(listing(&yard), before, "{what}");
        }
    }
    yard.attempt("LINK", libc::EROFS, opcode::LINK, ROOT, &[&link_to(file), &nul("new")]);
    let copy = copy_to(1, file, 1);
    yard.attempt("COPY_FILE_RANGE", libc::EROFS, opcode::COPY_FILE_RANGE, file, &[&copy]);
    // With every flag that there is.
    for bit in 0..32 {
        let flags = 1u32 << bit;
        let is_read = flags & (libc::O_ACCMODE | libc::O_TRUNC) as u32 == 0;
        let errno = if is_read { 0 } else { libc::EROFS };
        let ask = bytes(&OpenIn { flags, fuse_flags: u32::MAX });
        yard.attempt(&format!("OPEN {flags:#x}"), errno, opcode::OPEN, file, &[&ask]);
        let ask = bytes(&CreateIn { flags, mode: 0o644, ..Default::default() });
        yard.attempt("CREATE", libc::EROFS, opcode::CREATE, ROOT, &[&ask, &nul("file")]);
    }
    // The DAX hint and every other flag.
    for (cmd, size) in [(0x4008_6602u32, 4u32), (0x401c_5820, 28)] {
        for handle_flags in [0u32, 1 << 4] {
            let ask = [
                &fh.to_le_bytes()[..],
                &handle_flags.to_le_bytes(),
                &cmd.to_le_bytes(),
                &[0; 8],
                &size.to_le_bytes(),
                &[0; 4],
            ]
            .concat();
            let value = vec![0xff; size as usize];
            yard.attempt("IOCTL", libc::EROFS, opcode::IOCTL, file, &[&ask, &value]);
        }
    }
    assert_eq!(listing(&yard), before);
}

#[test]
fn no_mapping_of_it_can_be_written() {
    let mut yard = Yard::with(TempDir::new().unwrap(), true);
    let file = yard.file;
    for flags in [WRITE, READ | WRITE] {
        assert_eq!(yard.guest.setupmapping(file, 0, 0, flags), Err(libc::EROFS));
    }
    for flags in [0, 4, READ | 4, u64::MAX, 1 << 63] {
        assert_eq!(yard.guest.setupmapping(file, 0, 0, flags), Err(libc::EINVAL));
    }
    yard.guest.setupmapping(file, 0, 0, READ).unwrap();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let path = yard.share("file");
    let lines: Vec<_> = maps.lines().filter(|line| line.contains(path.to_str().unwrap())).collect();
    assert!(!lines.is_empty() && lines.iter().all(|line| line.contains(" r--s ")), "{lines:?}");
    yard.check("mappings");
}

/// All of the share, with what can be changed of it.
fn listing(yard: &Yard) -> Vec<String> {
    use std::os::unix::fs::MetadataExt;
    let mut list = Vec::new();
    for name in ["", "file", "directory", "directory/inner", "directory/below"] {
        let path = yard.share(name);
        let stat = path.metadata().unwrap();
        let mut names = [0; 256];
        let names_len = rustix::fs::llistxattr(&path, &mut names).unwrap_or(0);
        list.push(format!(
            "{name} {:o} {} {} {} {} {:?} {:?}",
            stat.mode(),
            stat.uid(),
            stat.nlink(),
            stat.ctime_nsec(),
            stat.mtime_nsec(),
            std::fs::read(&path).ok(),
            &names[..names_len]
        ));
    }
    list
}
