//! The caller's identity on this thread, for the length of one system call.
//!
//! Linux keeps file-system user and group, supplementary groups and (after `unshare(CLONE_FS)`) the file mode mask per
//! thread, so nothing here is seen by another thread. [`Identity`] restores all of it when dropped, on every path.

use core::cell::Cell;

use ferry_shared::errno::Errno;

use super::sys;
use crate::fsdev::Caller;

std::thread_local! {
    static PREPARED: Cell<bool> = const { Cell::new(false) };
}

/// Gives this thread a mode mask of its own, which is 0 between operations, and no supplementary groups: a caller must not
/// profit from those of the service.
fn prepare_thread() -> Result<(), Errno> {
    if PREPARED.get() {
        return Ok(());
    }
    sys::unshare_fs()?;
    sys::set_groups(&[])?;
    sys::set_umask(0);
    PREPARED.set(true);
    Ok(())
}

/// While it exists, this thread acts as the caller.
pub(super) struct Identity {
    uid: Option<u32>,
    gid: Option<u32>,
    groups: bool,
    umask: bool,
}

impl Identity {
    /// Becomes the caller. `umask` applies to what is created meanwhile, unless the directory has a default ACL: the
    /// kernel knows.
    pub(super) fn assume(caller: &Caller<'_>, umask: u32) -> Result<Identity, Errno> {
        if caller.uid == u32::MAX || caller.gid == u32::MAX {
            return Err(Errno::EINVAL);
        }
        prepare_thread()?;
        let mut identity = Identity {
            uid: None,
            gid: None,
            groups: false,
            umask: false,
        };
        if umask & 0o777 != 0 {
            sys::set_umask(umask);
            identity.umask = true;
        }
        if let Some(group) = caller.supplementary_group {
            sys::set_groups(&[group])?;
            identity.groups = true;
        }
        if caller.gid != 0 {
            identity.gid = Some(sys::set_fs_gid(caller.gid));
            if sys::set_fs_gid(u32::MAX) != caller.gid {
                return Err(Errno::EPERM);
            }
        }
        // Last, because it drops the capabilities that make everything allowed.
        if caller.uid != 0 {
            identity.uid = Some(sys::set_fs_uid(caller.uid));
            if sys::set_fs_uid(u32::MAX) != caller.uid {
                return Err(Errno::EPERM);
            }
        }
        Ok(identity)
    }
}

impl Drop for Identity {
    fn drop(&mut self) {
        if let Some(uid) = self.uid {
            sys::set_fs_uid(uid);
        }
        if let Some(gid) = self.gid {
            sys::set_fs_gid(gid);
        }
        if self.groups && sys::set_groups(&[]).is_err() {
            // Cannot fail for a thread that could set one group before; try everything again at the next use.
            PREPARED.set(false);
        }
        if self.umask {
            sys::set_umask(0);
        }
    }
}
