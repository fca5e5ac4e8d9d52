//! What lets inodes outlive the process.
//!
//! A later process opens the root by its path, which must still be the same directory, and every other inode by its file
//! handle when it is used for the first time. An inode without a name goes to the fd store before its last name does. Where
//! the file system has no file handles, all but the root is stale after a restart.

use core::ffi::CStr;
use core::sync::atomic::Ordering::Relaxed;

use ferry_shared::errno::Errno;

use super::{Inode, Inodes, KEPT, Key, Node, count_of, refused};
use crate::fsdev::passthrough::attr;
use crate::fsdev::passthrough::mounts::{self, Present};
use crate::fsdev::passthrough::sys::{self, Fd, Stat};
use crate::fsdev::passthrough::vault::Kind;
use crate::fsdev::table::Pinned;
use crate::fuse::abi::FUSE_ROOT_ID;

impl Inodes {
    /// Whether the root is open; it is not while the inodes of an earlier process wait for [`Inodes::take_over`].
    pub(in crate::fsdev::passthrough) fn has_root(&self) -> bool {
        let root = self.table.pin_quietly(FUSE_ROOT_ID);
        root.is_ok_and(|root| root.fd().is_some())
    }

    /// An inode that this process cannot find again.
    pub(in crate::fsdev::passthrough) fn lost(&self, pin: &Pinned<'_, Inode>) -> Errno {
        if !self.told.swap(true, Relaxed) {
            let inode = pin.record().key();
            tracing::warn!(
                ino = inode.ino,
                "an inode that a guest uses could not be found again after the restart, for its file system has no file \
                 handles or its mount is gone: it is answered with ESTALE, and so will others be"
            );
        }
        Errno::ESTALE
    }

    /// Gives up what the fd store has of an inode that is gone.
    pub(in crate::fsdev::passthrough) fn unkeep(&self, pin: &Pinned<'_, Inode>) {
        if pin.record().flags.load(Relaxed) & KEPT != 0 {
            self.vault.remove(Kind::Inode, pin.id());
        }
    }

    /// Has the fd store keep an inode that is about to lose its last name, or never had one.
    fn keep(&self, node: &Node<'_>) {
        let flags = &node.pin.record().flags;
        if flags.load(Relaxed) & KEPT == 0 && self.vault.put(Kind::Inode, node.pin.id(), node.fd())
        {
            flags.fetch_or(KEPT, Relaxed);
        }
    }

    /// A new inode without a name.
    pub(in crate::fsdev::passthrough) fn keep_nameless(&self, nodeid: u64) {
        if let Ok(node) = self.get(nodeid) {
            self.keep(&node);
        }
    }

    /// The name is about to go, perhaps the last one of an inode that the guest still uses: files that are open, and
    /// directories, in which processes can stand without opening them. `found`: what the name was just seen to be.
    pub(in crate::fsdev::passthrough) fn keep_doomed(
        &self,
        dir: i32,
        name: &CStr,
        found: Option<Stat>,
    ) {
        if !self.vault.is_active() {
            return;
        }
        let Ok(stat) = found.map_or_else(|| sys::stat_at(dir, name), Ok) else {
            return;
        };
        let is_dir = attr::kind(&stat) == libc::S_IFDIR;
        if !is_dir && stat.stx_nlink > 1 {
            return;
        }
        let key = Key::of(&stat);
        let found = {
            let shard = self.table.lock(key.hash());
            let found = shard.find(|inode| inode.key() == key);
            found.and_then(|linked| linked.pin().ok())
        };
        let used = |pin: &Pinned<'_, Inode>| is_dir || pin.record().opens.load(Relaxed) > 0;
        if let Some(pin) = found.filter(used)
            && let Ok(node) = self.get(pin.id())
        {
            self.keep(&node);
        }
    }

    /// Counts an open file of an inode, or one less.
    pub(in crate::fsdev::passthrough) fn count_open(&self, nodeid: u64, more: bool) {
        if let Ok(pin) = self.table.pin_quietly(nodeid) {
            let opens = &pin.record().opens;
            if more {
                opens.fetch_add(1, Relaxed);
            } else {
                let _ = opens.try_update(Relaxed, Relaxed, |n| n.checked_sub(1));
            }
        }
    }

    /// Goes on with what an earlier process has left: the root must be the same directory.
    pub(in crate::fsdev::passthrough) fn take_over(
        &self,
        root: Fd,
        path: &str,
    ) -> Result<(), Errno> {
        let stat = sys::stat_fd(root.raw())?;
        let now = Key::of(&stat);
        let pin = self.table.pin_quietly(FUSE_ROOT_ID).map_err(refused)?;
        let then = pin.record().key();
        if (now.dev, now.ino) != (then.dev, then.ino) {
            return Err(Errno::ESTALE);
        }
        self.mounts.meet(now.mnt, root.raw(), libc::S_IFDIR);
        if !pin.install(root.raw()) {
            return Err(Errno::EIO);
        }
        root.into_raw();
        let present = mounts::below(path).unwrap_or_default();
        // By number and device as they were: the number now.
        let mut found = alloc::vec![((then.mnt, then.dev), now.mnt)];
        self.table.relink(|inode| {
            let key = inode.key();
            let was = (key.mnt, key.dev);
            let known = found.iter().find(|(from, _)| *from == was);
            let mnt = known.map(|&(_, mnt)| mnt).unwrap_or_else(|| {
                let mnt = self.find_mount(was, &now, &present);
                found.push((was, mnt));
                mnt
            });
            inode.mnt.store(mnt, Relaxed);
            inode.opens.store(0, Relaxed);
            inode.spare.store(0, Relaxed);
            Some(inode.key().hash())
        });
        Ok(())
    }

    /// Takes back the descriptor of an inode without a name; `false` when there is no such inode.
    pub(in crate::fsdev::passthrough) fn take_back(&self, id: u64, fd: Fd) -> bool {
        let (Ok(pin), Ok(stat)) = (self.table.pin_quietly(id), sys::stat_fd(fd.raw())) else {
            return false;
        };
        let (now, then) = (Key::of(&stat), pin.record().key());
        if (now.dev, now.ino) != (then.dev, then.ino) {
            return false;
        }
        pin.record().flags.fetch_or(KEPT, Relaxed);
        if pin.install(fd.raw()) {
            fd.into_raw();
        }
        true
    }

    /// Completes what the earlier process was about to do, and says what is lost.
    pub(in crate::fsdev::passthrough) fn sweep(&self) {
        for index in self.table.indexes() {
            let Some(pin) = self.table.pin_index(index) else {
                continue;
            };
            let inode = pin.record();
            if pin.id() != FUSE_ROOT_ID && count_of(inode) == 0 {
                // Forgotten, or about to go: it stays if a file handle in the guest could still be answered with it.
                self.forget(pin.id(), 0, self.handle_of(&pin).is_some());
            } else if inode.flags.load(Relaxed) & KEPT != 0 && pin.fd().is_none() {
                self.lost(&pin);
            }
        }
    }

    /// The number that a mount has now: the same one if it is there, or one of the same device, for the numbers are others
    /// in another mount namespace.
    fn find_mount(&self, (id, dev): (u64, u64), root: &Key, present: &[Present]) -> u64 {
        let same = present.iter().find(|m| m.id == id && m.dev == dev);
        match same.or_else(|| present.iter().find(|m| m.dev == dev)) {
            Some(mount) => {
                self.mounts.meet(mount.id, mount.root.raw(), libc::S_IFDIR);
                mount.id
            }
            None if dev == root.dev => root.mnt,
            None => id,
        }
    }
}
