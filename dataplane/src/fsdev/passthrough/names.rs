//! Operations on names: looking up, making, linking, renaming, removing.

use core::ffi::CStr;
use core::ops::ControlFlow;

use ferry_shared::errno::Errno;

use super::inode::Node;
use super::sys::{self, ProcPath, Stat};
use super::{Passthrough, attr, once, valid_for};
use crate::fsdev::Caller;
use crate::fuse::abi::{
    FUSE_ATTR_SUBMOUNT, FUSE_EXPORT_SUPPORT, FUSE_ROOT_ID, FUSE_SUBMOUNTS, fuse_attr_out,
    fuse_entry_out,
};

/// Deepest directory for which `..` is answered.
const MAX_DEPTH: u32 = 4096;

const RENAME_FLAGS: u32 = libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE | libc::RENAME_WHITEOUT;

impl Passthrough {
    /// The reply for a node whose lookup has been counted; `mnt` is the mount of the directory that it was found in.
    pub(super) fn entry(&self, nodeid: u64, stat: &Stat, mnt: u64) -> fuse_entry_out {
        let mut attr = self.attr(stat);
        if stat.stx_mnt_id != mnt && attr::kind(stat) == libc::S_IFDIR && self.has(FUSE_SUBMOUNTS) {
            attr.flags |= FUSE_ATTR_SUBMOUNT;
        }
        let (entry_valid, entry_valid_nsec) = valid_for(self.spec.export.entry_ms());
        let (attr_valid, attr_valid_nsec) = valid_for(self.spec.export.attr_ms());
        fuse_entry_out {
            nodeid,
            generation: 0,
            entry_valid,
            attr_valid,
            entry_valid_nsec,
            attr_valid_nsec,
            attr,
        }
    }

    pub(super) fn attr_out(&self, stat: &Stat) -> fuse_attr_out {
        let (attr_valid, attr_valid_nsec) = valid_for(self.spec.export.attr_ms());
        fuse_attr_out {
            attr_valid,
            attr_valid_nsec,
            dummy: 0,
            attr: self.attr(stat),
        }
    }

    /// Looks up and counts one component of the directory behind `fd`, which lies on mount `mnt`.
    pub(super) fn lookup_in(
        &self,
        fd: i32,
        mnt: u64,
        name: &CStr,
    ) -> Result<fuse_entry_out, Errno> {
        let session = self.session()?;
        let (nodeid, stat) = self.inodes.lookup(fd, name)?;
        self.found(nodeid, &stat, mnt, session)
    }

    /// As [`Passthrough::entry`]; takes the lookup back when the mount has ended meanwhile.
    fn found(
        &self,
        nodeid: u64,
        stat: &Stat,
        mnt: u64,
        session: u64,
    ) -> Result<fuse_entry_out, Errno> {
        if self.has_ended(session) {
            self.do_forget(nodeid, 1);
            return Err(Errno::ENOTCONN);
        }
        Ok(self.entry(nodeid, stat, mnt))
    }

    pub(super) fn do_lookup(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        name: &CStr,
    ) -> Result<fuse_entry_out, Errno> {
        let node = self.inodes.get(nodeid)?;
        match name.to_bytes() {
            b"." => self.lookup_self(&node),
            b".." => {
                node.expect_dir()?;
                self.lookup_parent(&node, nodeid)
            }
            _ => {
                node.expect_dir()?;
                self.demand(caller, node.fd(), libc::X_OK)?;
                match self.lookup_in(node.fd(), node.mnt(), name) {
                    Err(Errno::ENOENT) => self.absent(),
                    other => other,
                }
            }
        }
    }

    /// The answer for a name that does not exist: without a node, when the guest may remember it.
    fn absent(&self) -> Result<fuse_entry_out, Errno> {
        let (entry_valid, entry_valid_nsec) = valid_for(self.spec.export.negative_ms());
        if entry_valid == 0 && entry_valid_nsec == 0 {
            return Err(Errno::ENOENT);
        }
        Ok(fuse_entry_out {
            entry_valid,
            entry_valid_nsec,
            ..Default::default()
        })
    }

    fn expect_export(&self) -> Result<(), Errno> {
        if self.has(FUSE_EXPORT_SUPPORT) {
            Ok(())
        } else {
            Err(Errno::EINVAL)
        }
    }

    fn lookup_self(&self, node: &Node<'_>) -> Result<fuse_entry_out, Errno> {
        self.expect_export()?;
        let stat = sys::stat_fd(node.fd())?;
        let nodeid = self.inodes.count_again(node)?;
        Ok(self.entry(nodeid, &stat, stat.stx_mnt_id))
    }

    /// The parent of a directory; the root is its own. A directory may have been moved out of the export behind our back,
    /// so a parent is given only if the way up from it leads to the root.
    fn lookup_parent(&self, node: &Node<'_>, nodeid: u64) -> Result<fuse_entry_out, Errno> {
        self.expect_export()?;
        if nodeid == FUSE_ROOT_ID {
            return self.lookup_self(node);
        }
        let session = self.session()?;
        let parent = self.inodes.with_fds(|| sys::open_parent(node.fd()))?;
        let stat = sys::stat_fd(parent.raw())?;
        if !self.is_inside(parent.raw(), &stat)? {
            return Err(Errno::ESTALE);
        }
        let nodeid = self.inodes.intern(parent, &stat)?;
        self.found(nodeid, &stat, stat.stx_mnt_id, session)
    }

    fn is_inside(&self, dir: i32, stat: &Stat) -> Result<bool, Errno> {
        if self.inodes.is_root(stat) {
            return Ok(true);
        }
        let mut below = (stat.stx_ino, stat.stx_mnt_id);
        let mut at = self.inodes.with_fds(|| sys::open_parent(dir))?;
        for _ in 0..MAX_DEPTH {
            let stat = sys::stat_fd(at.raw())?;
            if self.inodes.is_root(&stat) {
                return Ok(true);
            }
            let here = (stat.stx_ino, stat.stx_mnt_id);
            if here == below {
                return Ok(false);
            }
            below = here;
            at = self.inodes.with_fds(|| sys::open_parent(at.raw()))?;
        }
        Ok(false)
    }

    pub(super) fn do_forget(&self, nodeid: u64, lookups: u64) {
        let remember = self.has(FUSE_EXPORT_SUPPORT);
        if self.inodes.forget(nodeid, lookups, remember) {
            self.locks.drop_node(nodeid);
        }
    }

    /// Makes something in a directory as the caller, and looks it up.
    pub(super) fn make(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        name: &CStr,
        umask: u32,
        make: impl FnOnce(i32) -> Result<(), Errno>,
    ) -> Result<fuse_entry_out, Errno> {
        self.expect_writable()?;
        let dir = self.inodes.get(nodeid)?;
        dir.expect_dir()?;
        if !once::is_made(caller, dir.fd(), name, None)? {
            let _caller = self.act_as(caller, umask)?;
            make(dir.fd())?;
        }
        let entry = self.lookup_in(dir.fd(), dir.mnt(), name)?;
        if caller.security_context.is_some() {
            let labelled = self
                .inodes
                .get(entry.nodeid)
                .and_then(|node| self.label(caller, node.fd()));
            if let Err(errno) = labelled {
                self.do_forget(entry.nodeid, 1);
                let is_dir = entry.attr.mode & libc::S_IFMT == libc::S_IFDIR;
                let flags = if is_dir { libc::AT_REMOVEDIR } else { 0 };
                // The error that counts is the first one.
                let _ = sys::unlink(dir.fd(), name, flags);
                return Err(errno);
            }
        }
        Ok(entry)
    }

    /// Puts the security label that came with a request on the new inode behind `fd`. An export that cannot store labels
    /// goes without.
    pub(super) fn label(&self, caller: &Caller<'_>, fd: i32) -> Result<(), Errno> {
        let Some((name, value)) = caller.security_context.filter(|_| self.spec.enable_xattr) else {
            return Ok(());
        };
        let set = || {
            let name = self.xattr_name(name)?;
            sys::set_xattr(ProcPath::new(fd).path(), name.as_c_str(), value, 0)
        };
        match set() {
            Err(Errno::EOPNOTSUPP) => Ok(()),
            other => other,
        }
    }

    pub(super) fn do_unlink(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        name: &CStr,
        flags: i32,
    ) -> Result<(), Errno> {
        self.expect_writable()?;
        let dir = self.inodes.get(nodeid)?;
        let found = match once::removal(caller, dir.fd(), name)? {
            ControlFlow::Break(()) => return Ok(()),
            ControlFlow::Continue(found) => found,
        };
        self.inodes.keep_doomed(dir.fd(), name, found);
        let _caller = self.act_if_squashed(caller)?;
        sys::unlink(dir.fd(), name, flags)
    }

    pub(super) fn do_rename(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        name: &CStr,
        newdir: u64,
        newname: &CStr,
        flags: u32,
    ) -> Result<(), Errno> {
        if flags & !RENAME_FLAGS != 0 {
            return Err(Errno::EINVAL);
        }
        self.expect_writable()?;
        let old = self.inodes.get(nodeid)?;
        let new = self.inodes.get(newdir)?;
        if once::is_renamed(caller, (old.fd(), name), (new.fd(), newname))? {
            return Ok(());
        }
        if flags & (libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE) == 0 {
            self.inodes.keep_doomed(new.fd(), newname, None);
        }
        let _caller = self.act_if_squashed(caller)?;
        sys::rename(old.fd(), name, new.fd(), newname, flags)
    }

    pub(super) fn do_link(
        &self,
        caller: &Caller<'_>,
        nodeid: u64,
        oldnodeid: u64,
        name: &CStr,
    ) -> Result<fuse_entry_out, Errno> {
        self.expect_writable()?;
        let dir = self.inodes.get(nodeid)?;
        let old = self.inodes.get(oldnodeid)?;
        let of = if caller.journal.is_on() {
            Some(sys::stat_fd(old.fd())?)
        } else {
            None
        };
        if !once::is_made(caller, dir.fd(), name, of.as_ref())? {
            let _caller = self.act_if_squashed(caller)?;
            sys::link(old.fd(), dir.fd(), name)?;
        }
        let stat = sys::stat_fd(old.fd())?;
        let nodeid = self.inodes.count_again(&old)?;
        Ok(self.entry(nodeid, &stat, dir.mnt()))
    }

    pub(super) fn do_readlink(&self, nodeid: u64, out: &mut [u8]) -> Result<usize, Errno> {
        let node = self.inodes.get(nodeid)?;
        match node.kind() {
            libc::S_IFLNK => sys::readlink(node.fd(), out),
            _ => Err(Errno::EINVAL),
        }
    }
}
