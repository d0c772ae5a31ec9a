//! Extended attributes, passed through to the host.
//!
//! POSIX ACLs are left out: the guest's kernel does not enforce them here, and a guest that could set what it does not
//! obey would deceive its users.

use std::ffi::CStr;
use std::io;

use fuse_backend_rs::abi::fuse_abi::{GetxattrIn, GetxattrOut, SetxattrIn};
use fuse_backend_rs::api::filesystem::{FileSystem, GetxattrReply, ListxattrReply};

use super::Server;
use super::message::{NAME_MAX, Reply, Request, errno, string};
use super::names::NO_NAME;

/// The largest value, and the largest list of names, in bytes (XATTR_SIZE_MAX, XATTR_LIST_MAX).
const SIZE_MAX: u32 = 64 << 10;

const POSIX_ACL: &[u8] = b"system.posix_acl_";

impl Server {
    pub(super) fn getxattr(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let GetxattrIn { size, .. } = request.arg()?;
        let mut name = NO_NAME;
        let name = check_attribute(string(request.rest(&mut name, libc::ERANGE)?)?)?;
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
                without_acls(&mut names);
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
        let name = check_attribute(name)?;
        self.fs.setxattr(&self.context(request), request.header.nodeid, name, value, flags)?;
        reply.empty()
    }

    pub(super) fn removexattr(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> io::Result<u32> {
        let mut name = NO_NAME;
        let name = check_attribute(string(request.rest(&mut name, libc::ERANGE)?)?)?;
        self.fs.removexattr(&self.context(request), request.header.nodeid, name)?;
        reply.empty()
    }
}

fn check_attribute(name: &CStr) -> io::Result<&CStr> {
    if name.to_bytes().starts_with(POSIX_ACL) { Err(errno(libc::EOPNOTSUPP)) } else { Ok(name) }
}

/// Removes the names of POSIX ACLs from a list of names that each end with NUL.
fn without_acls(names: &mut Vec<u8>) {
    if names.windows(POSIX_ACL.len()).any(|window| window == POSIX_ACL) {
        let kept = names.split_inclusive(|byte| *byte == 0).filter(|name| !name.starts_with(POSIX_ACL));
        *names = kept.flatten().copied().collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_given_without_acls() {
        for (list, expected) in [
            (&b""[..], &b""[..]),
            (b"user.a\0user.b\0", b"user.a\0user.b\0"),
            (b"user.a\0system.posix_acl_access\0user.b\0system.posix_acl_default\0", b"user.a\0user.b\0"),
            (b"user.system.posix_acl_access\0", b"user.system.posix_acl_access\0"),
        ] {
            let mut names = list.to_vec();
            without_acls(&mut names);
            assert_eq!(names, expected);
        }
    }
}
