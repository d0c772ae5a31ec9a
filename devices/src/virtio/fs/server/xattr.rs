//! Extended attributes, passed through to the host.
//!
//! POSIX ACLs are left out: the guest's kernel does not enforce them here, and a guest that could set what it does not
//! obey would deceive its users. So is the attribute that holds the DAX hint where the host has no flag for it: the guest
//! sees and sets the flag.

use std::ffi::CStr;
use std::io;

use fuse_backend_rs::abi::fuse_abi::{GetxattrIn, GetxattrOut, SetxattrIn};
use fuse_backend_rs::api::filesystem::{GetxattrReply, ListxattrReply};

use super::Server;
use super::message::{NAME_MAX, Reply, Request, errno, string};
use super::names::NO_NAME;
use crate::virtio::fs::hint;

/// The largest value, and the largest list of names, in bytes (XATTR_SIZE_MAX, XATTR_LIST_MAX).
pub(super) const SIZE_MAX: u32 = 64 << 10;

const POSIX_ACL: &[u8] = b"system.posix_acl_";

/// The attribute that the guest reaches as a flag and not by its name.
const HINT: &[u8] = hint::ATTRIBUTE.to_bytes();

impl Server {
    pub(super) fn getxattr(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let GetxattrIn { size, .. } = request.arg()?;
        let mut name = NO_NAME;
        let name = check_attribute(string(request.rest(&mut name, libc::ERANGE)?)?, libc::ENODATA)?;
        let size = size.min(SIZE_MAX);
        match self.fs.getxattr(&self.context(request), request.header.nodeid, name, size)? {
            GetxattrReply::Value(value) => reply.send(&[&value]),
            GetxattrReply::Count(size) => reply.object(&GetxattrOut { size, ..Default::default() }),
        }
    }

    pub(super) fn listxattr(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let GetxattrIn { size, .. } = request.arg()?;
        let size = size.min(SIZE_MAX);
        match self.fs.listxattr(&self.context(request), request.header.nodeid, size)? {
            ListxattrReply::Names(mut names) => {
                hide_names(&mut names);
                reply.send(&[&names])
            }
            // May count names that the list will leave out: the client takes it as an upper limit.
            ListxattrReply::Count(size) => reply.object(&GetxattrOut { size, ..Default::default() }),
        }
    }

    pub(super) fn setxattr(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let SetxattrIn { size, flags } = request.arg()?;
        let most = NAME_MAX + 1 + SIZE_MAX as usize;
        let mut buffer = vec![0; request.left().min(most)];
        let bytes = request.rest(&mut buffer, libc::E2BIG)?;
        let name = CStr::from_bytes_until_nul(bytes).map_err(|_| errno(libc::EINVAL))?;
        let value = &bytes[name.count_bytes() + 1..];
        if value.len() != size as usize {
            return Err(errno(libc::EINVAL));
        }
        let name = check_attribute(name, libc::EPERM)?;
        self.fs.setxattr(&self.context(request), request.header.nodeid, name, value, flags)?;
        reply.empty()
    }

    pub(super) fn removexattr(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let mut name = NO_NAME;
        let name = check_attribute(string(request.rest(&mut name, libc::ERANGE)?)?, libc::EPERM)?;
        self.fs.removexattr(&self.context(request), request.header.nodeid, name)?;
        reply.empty()
    }
}

/// Refuses the names that are not passed through: ACLs with EOPNOTSUPP, the hint with `hidden`.
fn check_attribute(name: &CStr, hidden: i32) -> io::Result<&CStr> {
    match name.to_bytes() {
        HINT => Err(errno(hidden)),
        bytes if bytes.starts_with(POSIX_ACL) => Err(errno(libc::EOPNOTSUPP)),
        _ => Ok(name),
    }
}

/// Removes what is not passed through from a list of names that each end with NUL.
fn hide_names(names: &mut Vec<u8>) {
    let is_hidden = |name: &[u8]| name.starts_with(POSIX_ACL) || name.strip_suffix(b"\0") == Some(HINT);
    if names.split_inclusive(|byte| *byte == 0).any(is_hidden) {
        let kept = names.split_inclusive(|byte| *byte == 0).filter(|name| !is_hidden(name));
        *names = kept.flatten().copied().collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_given_without_acls_and_the_hint() {
        for (list, expected) in [
            (&b""[..], &b""[..]),
            (b"user.a\0user.b\0", b"user.a\0user.b\0"),
            (b"user.a\0system.posix_acl_access\0user.b\0system.posix_acl_default\0", b"user.a\0user.b\0"),
            (b"user.system.posix_acl_access\0", b"user.system.posix_acl_access\0"),
            (b"user.a\0user.daxvm.dax\0user.b\0", b"user.a\0user.b\0"),
            (b"user.daxvm.dax2\0auser.daxvm.dax\0", b"user.daxvm.dax2\0auser.daxvm.dax\0"),
        ] {
            let mut names = list.to_vec();
            hide_names(&mut names);
            assert_eq!(names, expected);
        }
    }
}
