//! Extended attributes.
//!
//! They are reached through `/proc/self/fd/N`, which ends at the inode itself even when that is a symbolic link. A device
//! created without them answers `ENOSYS`, which makes a guest stop asking. Names may differ between guest and host by
//! rules ([`ferry_shared::export::XattrMap`]); a name that the guest does not have is answered as by a file system
//! without such names.

use core::ffi::CStr;

use ferry_shared::errno::Errno;
use ferry_shared::export::{XATTR_NAME_MAX, XattrName};

use super::ids::MAX_ACL;
use super::sys::{self, ProcPath};
use super::{Passthrough, once};
use crate::fsdev::Caller;
use crate::fuse::abi::{FUSE_POSIX_ACL, FUSE_SETXATTR_ACL_KILL_SGID};

const ACL_PREFIX: &[u8] = b"system.posix_acl_";
const TRUSTED_PREFIX: &[u8] = b"trusted.";
/// Longest list of names that the kernel gives.
const LIST_MAX: usize = 64 * 1024;

/// A name for the host's kernel.
pub(super) struct HostName {
    bytes: [u8; XATTR_NAME_MAX + 1],
}

impl HostName {
    fn new(name: &XattrName) -> HostName {
        let mut bytes = [0; XATTR_NAME_MAX + 1];
        for (to, from) in bytes.iter_mut().zip(name.bytes()) {
            *to = *from;
        }
        HostName { bytes }
    }

    pub(super) fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.bytes).unwrap_or_default()
    }
}

fn is_acl(name: &CStr) -> bool {
    name.to_bytes().starts_with(ACL_PREFIX)
}

impl Passthrough {
    fn expect_xattr(&self) -> Result<(), Errno> {
        if self.spec.enable_xattr {
            Ok(())
        } else {
            Err(Errno::ENOSYS)
        }
    }

    /// The host's name of an attribute.
    pub(super) fn xattr_name(&self, name: &CStr) -> Result<HostName, Errno> {
        // ACLs exist only for guests that have agreed to check them.
        if is_acl(name) && !self.has(FUSE_POSIX_ACL) {
            return Err(Errno::EOPNOTSUPP);
        }
        if name.count_bytes() > XATTR_NAME_MAX {
            return Err(Errno::ERANGE);
        }
        let host = self.spec.export.xattr_map.to_host(name.to_bytes());
        host.as_ref().map(HostName::new).ok_or(Errno::EOPNOTSUPP)
    }

    pub(super) fn do_setxattr(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
        setxattr_flags: u32,
    ) -> Result<(), Errno> {
        self.expect_xattr()?;
        self.expect_writable()?;
        let host = self.xattr_name(name)?;
        let node = self.inodes.get(nodeid)?;
        let path = ProcPath::new(node.fd());
        let creates = flags & libc::XATTR_CREATE as u32 != 0;
        if creates && once::is_set(caller, path.path(), host.as_c_str(), value) {
            return Ok(());
        }
        let _caller = self.act_if_squashed(caller)?;
        if is_acl(name) && self.maps_ids() {
            let mut acl = [0; MAX_ACL];
            let acl = acl.get_mut(..value.len()).ok_or(Errno::E2BIG)?;
            acl.copy_from_slice(value);
            self.map_acl(acl, true)?;
            sys::set_xattr(path.path(), host.as_c_str(), acl, flags)?;
        } else {
            sys::set_xattr(path.path(), host.as_c_str(), value, flags)?;
        }
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
        caller: &Caller<'_>,
        nodeid: u64,
        name: &CStr,
        out: &mut [u8],
    ) -> Result<usize, Errno> {
        self.expect_xattr()?;
        let host = self.xattr_name(name)?;
        let node = self.inodes.get(nodeid)?;
        let _caller = self.act_if_squashed(caller)?;
        let len = sys::get_xattr(ProcPath::new(node.fd()).path(), host.as_c_str(), out)?;
        if is_acl(name)
            && self.maps_ids()
            && let Some(acl) = out.get_mut(..len)
        {
            self.map_acl(acl, false)?;
        }
        Ok(len)
    }

    pub(super) fn do_listxattr(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        out: &mut [u8],
    ) -> Result<usize, Errno> {
        self.expect_xattr()?;
        let node = self.inodes.get(nodeid)?;
        let path = ProcPath::new(node.fd());
        // A guest checks who reads such an attribute, but leaves it to the file system who sees that it is there.
        let hidden = if caller.uid == 0 || self.is_untold(caller) {
            None
        } else {
            Some(TRUSTED_PREFIX)
        };
        if hidden.is_none() && self.spec.export.xattr_map.is_identity() {
            sys::list_xattr(path.path(), out)
        } else {
            self.list_chosen(&path, hidden, out)
        }
    }

    /// The names as the guest knows them, without those that begin with `hidden`. Its own function, so that only who needs the large buffer has it on the stack.
    #[inline(never)]
    fn list_chosen(
        &self,
        path: &ProcPath,
        hidden: Option<&[u8]>,
        out: &mut [u8],
    ) -> Result<usize, Errno> {
        let mut names = [0; LIST_MAX];
        let len = sys::list_xattr(path.path(), &mut names)?;
        let names = names.get(..len).unwrap_or_default();
        let mut used = 0usize;
        for name in names.split(|b| *b == 0).filter(|name| !name.is_empty()) {
            let Some(guest) = self.spec.export.xattr_map.to_guest(name) else {
                continue;
            };
            let guest = guest.bytes();
            if hidden.is_some_and(|prefix| guest.starts_with(prefix)) {
                continue;
            }
            let start = used;
            used = used
                .checked_add(guest.len())
                .and_then(|end| end.checked_add(1))
                .ok_or(Errno::E2BIG)?;
            if out.is_empty() {
                continue;
            }
            let place = out.get_mut(start..used).ok_or(Errno::ERANGE)?;
            let (nul, text) = place.split_last_mut().ok_or(Errno::ERANGE)?;
            text.copy_from_slice(guest);
            *nul = 0;
        }
        if used > LIST_MAX {
            return Err(Errno::E2BIG);
        }
        Ok(used)
    }

    pub(super) fn do_removexattr(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        name: &CStr,
    ) -> Result<(), Errno> {
        self.expect_xattr()?;
        self.expect_writable()?;
        let host = self.xattr_name(name)?;
        let node = self.inodes.get(nodeid)?;
        let path = ProcPath::new(node.fd());
        if once::is_unset(caller, path.path(), host.as_c_str()) {
            return Ok(());
        }
        let _caller = self.act_if_squashed(caller)?;
        sys::remove_xattr(path.path(), host.as_c_str())
    }
}
