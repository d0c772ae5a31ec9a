//! Names that are no names.

use fuse_backend_rs::abi::fuse_abi::{
    CreateIn, GetxattrIn, MkdirIn, MknodIn, Rename2In, RenameIn, SetxattrIn,
};

use super::{Yard, bytes, link_to};
use crate::virtio::fs::abi::opcode;
use crate::virtio::fs::testing::{ROOT, nul};

/// Names as they are sent, most with their NUL, and the errno that each must get.
fn bad_names(yard: &Yard) -> Vec<(Vec<u8>, i32)> {
    vec![
        (nul(""), libc::EINVAL),
        (nul("."), libc::EINVAL),
        (nul(".."), libc::EINVAL),
        (nul("/"), libc::EINVAL),
        (nul("../secret"), libc::EINVAL),
        (nul("directory/../../secret"), libc::EINVAL),
        (nul("./file"), libc::EINVAL),
        (nul("file/"), libc::EINVAL),
        (nul(&yard.secret()), libc::EINVAL),
        (nul("nul\0inside"), libc::EINVAL),
        (b"unterminated".to_vec(), libc::EINVAL),
        (vec![], libc::EINVAL),
        (nul(&"n".repeat(256)), libc::ENAMETOOLONG),
    ]
}

#[test]
fn no_operation_takes_a_name_that_leads_elsewhere() {
    let mut yard = Yard::new();
    let (file, directory) = (yard.file, yard.directory);
    let create = bytes(&CreateIn { flags: libc::O_RDWR as u32, mode: 0o644, ..Default::default() });
    let exclusive = bytes(&CreateIn {
        flags: (libc::O_RDWR | libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC) as u32,
        mode: 0o644,
        ..Default::default()
    });
    let mknod = |mode| bytes(&MknodIn { mode, ..Default::default() });
    let mkdir = bytes(&MkdirIn { mode: 0o755, umask: 0 });
    let rename = bytes(&RenameIn { newdir: ROOT });
    let rename2 = |flags| bytes(&Rename2In { newdir: ROOT, flags, padding: 0 });
    for parent in [ROOT, directory] {
        for (name, errno) in bad_names(&yard) {
            let what = format!("{:?}", String::from_utf8_lossy(&name));
            let is_string = name.iter().filter(|byte| **byte == 0).count() == 1 && name.ends_with(&[0]);
            let mut attempt = |operation: &str, code, parts: &[&[u8]]| {
                yard.attempt(&format!("{operation} {what}"), errno, code, parent, parts);
            };
            attempt("LOOKUP", opcode::LOOKUP, &[&name]);
            attempt("CREATE", opcode::CREATE, &[&create, &name]);
            attempt("CREATE, exclusive", opcode::CREATE, &[&exclusive, &name]);
            attempt("MKNOD of a file", opcode::MKNOD, &[&mknod(libc::S_IFREG | 0o644), &name]);
            attempt("MKNOD of a fifo", opcode::MKNOD, &[&mknod(libc::S_IFIFO | 0o644), &name]);
            attempt("MKDIR", opcode::MKDIR, &[&mkdir, &name]);
            attempt("LINK", opcode::LINK, &[&link_to(file), &name]);
            attempt("UNLINK", opcode::UNLINK, &[&name]);
            attempt("RMDIR", opcode::RMDIR, &[&name]);
            if is_string {
                attempt("SYMLINK", opcode::SYMLINK, &[&name, &nul("target")]);
                attempt("RENAME from", opcode::RENAME, &[&rename, &name, &nul("new")]);
                attempt("RENAME to", opcode::RENAME, &[&rename, &nul("file"), &name]);
                for flags in [0, libc::RENAME_NOREPLACE, libc::RENAME_EXCHANGE, libc::RENAME_WHITEOUT] {
                    let ask = rename2(flags);
                    attempt("RENAME2 from", opcode::RENAME2, &[&ask, &name, &nul("new")]);
                    attempt("RENAME2 to", opcode::RENAME2, &[&ask, &nul("file"), &name]);
                }
            }
        }
    }
    assert!(!yard.share("new").exists());
}

#[test]
fn two_names_are_two_strings() {
    let mut yard = Yard::new();
    let rename = bytes(&Rename2In { newdir: ROOT, ..Default::default() });
    for (code, ask) in
        [(opcode::RENAME, &ROOT.to_le_bytes()[..]), (opcode::RENAME2, &rename), (opcode::SYMLINK, &[])]
    {
        for text in [&b""[..], b"\0", b"file", b"file\0", b"file\0new", b"file\0new\0more\0", b"\0\0\0"] {
            yard.attempt(&format!("{text:?}"), libc::EINVAL, code, ROOT, &[ask, text]);
        }
        let long = nul(&"n".repeat(8_000));
        yard.attempt("a very long one", libc::ENAMETOOLONG, code, ROOT, &[ask, &nul("file"), &long]);
    }
    assert!(yard.share("file").exists() && !yard.share("new").exists());
}

#[test]
fn a_file_without_a_name_has_none_whatever_the_request_says() {
    let mut yard = Yard::new();
    let before = std::fs::read_dir(yard.share("")).unwrap().count();
    let ask = bytes(&CreateIn { flags: libc::O_RDWR as u32, mode: 0o100_644, ..Default::default() });
    for (name, _) in bad_names(&yard) {
        yard.attempt("TMPFILE", 0, opcode::TMPFILE, ROOT, &[&ask, &name]);
        assert_eq!(std::fs::read_dir(yard.share("")).unwrap().count(), before);
    }
    // Nor does it get one outside of the share.
    let reply = yard.guest.call(opcode::TMPFILE, ROOT, &[&ask, &nul("/")]).unwrap();
    let node = u64::from_le_bytes(reply[..8].try_into().unwrap());
    for (name, errno) in bad_names(&yard) {
        yard.attempt("LINK of an unnamed file", errno, opcode::LINK, ROOT, &[&link_to(node), &name]);
    }
}

#[test]
fn names_of_attributes_are_no_paths() {
    let mut yard = Yard::new();
    let file = yard.file;
    let long = nul(&format!("user.{}", "n".repeat(251)));
    let get = bytes(&GetxattrIn { size: 100, padding: 0 });
    let set = bytes(&SetxattrIn { size: 1, flags: 0 });
    for (name, errno) in [(nul(""), libc::ERANGE), (long, libc::ERANGE), (nul("../secret"), libc::EOPNOTSUPP)]
    {
        let what = String::from_utf8_lossy(&name).into_owned();
        yard.attempt(&format!("GETXATTR {what}"), errno, opcode::GETXATTR, file, &[&get, &name]);
        yard.attempt(&format!("SETXATTR {what}"), errno, opcode::SETXATTR, file, &[&set, &name, b"x"]);
        yard.attempt(&format!("REMOVEXATTR {what}"), errno, opcode::REMOVEXATTR, file, &[&name]);
    }
    for name in [&b"user.unterminated"[..], b""] {
        yard.attempt("GETXATTR", libc::EINVAL, opcode::GETXATTR, file, &[&get, name]);
        yard.attempt("SETXATTR", libc::EINVAL, opcode::SETXATTR, file, &[&set, name]);
        yard.attempt("REMOVEXATTR", libc::EINVAL, opcode::REMOVEXATTR, file, &[name]);
    }
    for size in [0u32, 2, u32::MAX] {
        let set = bytes(&SetxattrIn { size, flags: 0 });
        let parts: [&[u8]; 3] = [&set, b"user.test\0", b"x"];
        yard.attempt("SETXATTR of a wrong size", libc::EINVAL, opcode::SETXATTR, file, &parts);
    }
}
