//! Extended attributes.
//!
//! They are reached through `/proc/self/fd/N`, which ends at the inode itself even when that is a symbolic link. A device
//! created without them answers `ENOSYS`, which makes a guest stop asking.

use core::ffi::CStr;

use ferry_shared::errno::Errno;

use super::Passthrough;
use super::sys::{self, ProcPath};
use crate::fuse::abi::{FUSE_POSIX_ACL, FUSE_SETXATTR_ACL_KILL_SGID};

const ACL_PREFIX: &[u8] = b"system.posix_acl_";

impl Passthrough {
    fn expect_xattr(&self) -> Result<(), Errno> {
        if self.spec.enable_xattr {
            Ok(())
        } else {
            Err(Errno::ENOSYS)
        }
    }

    /// ACLs exist only for guests that have agreed to check them.
    fn expect_name(&self, name: &CStr) -> Result<(), Errno> {
        if name.to_bytes().starts_with(ACL_PREFIX) && !self.has(FUSE_POSIX_ACL) {
            return Err(Errno::EOPNOTSUPP);
        }
        Ok(())
    }

    pub(super) fn do_setxattr(
        &self,
        nodeid: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
        setxattr_flags: u32,
    ) -> Result<(), Errno> {
        self.expect_xattr()?;
        self.expect_name(name)?;
        let node = self.inodes.get(nodeid)?;
        sys::set_xattr(ProcPath::new(node.fd()).path(), name, value, flags)?;
        if setxattr_flags & FUSE_SETXATTR_ACL_KILL_SGID != 0 {
            let mode = u32::from(sys::stat_fd(node.fd())?.stx_mode);
            if mode & libc::S_ISGID != 0 {
                sys::chmod(node.fd(), mode & !libc::S_ISGID)?;
            }
        }
        Ok(())
    }

    pub(super) fn do_getxattr(
        &self,
        nodeid: u64,
        name: &CStr,
        out: &mut [u8],
    ) -> Result<usize, Errno> {
        self.expect_xattr()?;
        self.expect_name(name)?;
        let node = self.inodes.get(nodeid)?;
        sys::get_xattr(ProcPath::new(node.fd()).path(), name, out)
    }

    pub(super) fn do_listxattr(&self, nodeid: u64, out: &mut [u8]) -> Result<usize, Errno> {
        self.expect_xattr()?;
        let node = self.inodes.get(nodeid)?;
        sys::list_xattr(ProcPath::new(node.fd()).path(), out)
    }

    pub(super) fn do_removexattr(&self, nodeid: u64, name: &CStr) -> Result<(), Errno> {
        self.expect_xattr()?;
        self.expect_name(name)?;
        let node = self.inodes.get(nodeid)?;
        sys::remove_xattr(ProcPath::new(node.fd()).path(), name)
    }
}
