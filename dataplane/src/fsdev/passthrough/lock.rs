//! Locks on byte ranges.
//!
//! Every pair of inode and lock owner has an open file description of its own, and the locks are those of the
//! description (`F_OFD_SETLK`). So the host's kernel keeps them, and owners conflict wherever they are: in one guest, in
//! guests of other devices on the same export, or in the host. Closing the description drops all its locks at once, so it
//! goes to the fd store before the guest hears that it has the first one.

use core::sync::atomic::AtomicI32;
use core::sync::atomic::AtomicU32;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use ferry_shared::errno::Errno;
use zerocopy::FromBytes;

use super::sys::{self, Fd, FileId, RangeLock};
use super::vault::{Kind, Vault};
use super::{deadlock, fdinfo};
use crate::fsdev::table::{Pinned, Record, Slot, Table};
use crate::fuse::abi::{fuse_file_lock, fuse_lk_in};
use crate::recovery::placed::Placed;

/// Counts the occasions on which a lock may have been released, in any device.
static EPOCH: AtomicU64 = AtomicU64::new(0);

/// Says that a lock may have been released.
pub(super) fn released() {
    EPOCH.fetch_add(1, Release);
}

/// Changes whenever a lock may have been released: a request that waits for one need not try again while it is the same.
pub(super) fn epoch() -> u64 {
    EPOCH.load(Acquire)
}

/// Locks end at the largest offset when they cover whatever the file grows to.
const END_OF_FILE: u64 = i64::MAX as u64;

#[derive(FromBytes)]
#[repr(C)]
pub(super) struct Owner {
    nodeid: AtomicU64,
    owner: AtomicU64,
    /// The open file through which it locked last.
    fh: AtomicU64,
    /// The process in the guest that locked last.
    pid: AtomicI32,
    /// 1 once the fd store has its description.
    kept: AtomicU32,
}

impl Record for Owner {
    fn retire(&self, fd: i32) {
        sys::close(fd);
        released();
    }
}

impl Owner {
    fn is(&self, nodeid: u64, owner: u64) -> bool {
        self.nodeid.load(Relaxed) == nodeid && self.owner.load(Relaxed) == owner
    }
}

fn hash(nodeid: u64, owner: u64) -> u64 {
    let h = (nodeid ^ owner.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    h ^ (h >> 32)
}

/// A lock request in the kernel's terms.
pub(super) fn to_range(lock: &fuse_file_lock) -> Result<RangeLock, Errno> {
    let kind = i32::try_from(lock.type_).map_err(|_| Errno::EINVAL)?;
    if ![libc::F_RDLCK, libc::F_WRLCK, libc::F_UNLCK].contains(&kind) {
        return Err(Errno::EINVAL);
    }
    let start = i64::try_from(lock.start).map_err(|_| Errno::EINVAL)?;
    let len = if lock.end >= END_OF_FILE {
        0
    } else {
        let last = lock.end.checked_sub(lock.start).ok_or(Errno::EINVAL)?;
        i64::try_from(last)
            .map_err(|_| Errno::EINVAL)?
            .saturating_add(1)
    };
    Ok(RangeLock {
        kind,
        start,
        len,
        pid: 0,
    })
}

/// Numbers the devices of this process.
static DEVICES: AtomicU64 = AtomicU64::new(0);

/// All lock owners of a device.
pub(super) struct Locks {
    table: Table<Owner>,
    vault: Vault,
    number: u64,
}

impl Locks {
    /// The owners in `slots`.
    pub(super) fn new(slots: Placed<Slot<Owner>>, vault: Vault) -> Result<Locks, Errno> {
        let buckets = u32::try_from(slots.len()).unwrap_or(u32::MAX);
        let table = Table::over(slots, buckets).ok_or(Errno::ENOMEM)?;
        let number = DEVICES.fetch_add(1, Relaxed);
        Ok(Locks {
            table,
            vault,
            number,
        })
    }

    /// The device's number in this process.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// Goes on with the owners of an earlier process. Those whose descriptions are gone have lost their locks.
    pub(super) fn take_over(&self) {
        self.table
            .relink(|o| Some(hash(o.nodeid.load(Relaxed), o.owner.load(Relaxed))));
        for index in self.table.indexes() {
            let Some(pin) = self.table.pin_index(index) else {
                continue;
            };
            if pin.fd().is_some() {
                continue;
            }
            // One that was never kept was never granted a lock that the guest has heard of.
            if pin.record().kept.load(Relaxed) != 0 {
                tracing::warn!(
                    nodeid = pin.record().nodeid.load(Relaxed),
                    "the POSIX locks of an owner in a guest are lost with the restart: the service manager has not kept \
                     their description"
                );
            }
            self.end(&pin);
        }
    }

    /// Takes back the description of an owner; `false` when there is no such owner.
    pub(super) fn take_back(&self, id: u64, fd: Fd) -> bool {
        let Ok(pin) = self.table.pin_quietly(id) else {
            return false;
        };
        pin.record().kept.store(1, Relaxed);
        if pin.install(fd.raw()) {
            fd.into_raw();
        }
        true
    }

    /// Ends an owner.
    fn end(&self, pin: &Pinned<'_, Owner>) {
        let owner = pin.record();
        let key = hash(owner.nodeid.load(Relaxed), owner.owner.load(Relaxed));
        if self.table.lock(key).remove(pin) {
            self.unlock(pin);
            self.unkeep(pin);
        }
    }

    /// Drops the locks now. The fd store may have the description too, and closes it later.
    fn unlock(&self, pin: &Pinned<'_, Owner>) {
        if pin.record().kept.load(Relaxed) != 0
            && let Some(fd) = pin.fd()
        {
            let all = RangeLock {
                kind: libc::F_UNLCK,
                start: 0,
                len: 0,
                pid: 0,
            };
            // It cannot fail but for a file system that is gone, and the locks with it.
            let _ = sys::set_range_lock(fd, all);
            released();
        }
    }

    fn unkeep(&self, pin: &Pinned<'_, Owner>) {
        if pin.record().kept.load(Relaxed) != 0 {
            self.vault.remove(Kind::Owner, pin.id());
        }
    }

    pub(super) fn live(&self) -> u32 {
        self.table.live()
    }

    fn find(&self, nodeid: u64, owner: u64) -> Option<Pinned<'_, Owner>> {
        if self.table.live() == 0 {
            return None;
        }
        let shard = self.table.lock(hash(nodeid, owner));
        shard.find(|o| o.is(nodeid, owner))?.pin().ok()
    }

    fn find_or_add(
        &self,
        nodeid: u64,
        owner: u64,
        open: impl FnOnce() -> Result<Fd, Errno>,
    ) -> Result<Pinned<'_, Owner>, Errno> {
        if let Some(found) = self.find(nodeid, owner) {
            return Ok(found);
        }
        let fd = open()?;
        let shard = self.table.lock(hash(nodeid, owner));
        if let Some(found) = shard.find(|o| o.is(nodeid, owner)) {
            let found = found.pin().map_err(|_| Errno::ENOLCK);
            drop(shard);
            return found;
        }
        let vacant = self.table.reserve().ok_or(Errno::ENOLCK)?;
        vacant.record().nodeid.store(nodeid, Relaxed);
        vacant.record().owner.store(owner, Relaxed);
        vacant.record().fh.store(0, Relaxed);
        vacant.record().pid.store(0, Relaxed);
        vacant.record().kept.store(0, Relaxed);
        let pin = vacant.publish(Some(fd.into_raw()));
        shard.link(&pin);
        Ok(pin)
    }

    /// Takes or drops a lock, without waiting. `open` gives a new description of the file.
    pub(super) fn set(
        &self,
        nodeid: u64,
        arg: &fuse_lk_in,
        lock: RangeLock,
        open: impl FnOnce() -> Result<Fd, Errno>,
    ) -> Result<(), Errno> {
        let owner = arg.owner;
        if lock.kind == libc::F_UNLCK {
            let Some(found) = self.find(nodeid, owner) else {
                return Ok(());
            };
            sys::set_range_lock(found.fd().ok_or(Errno::ENOLCK)?, lock)?;
            released();
            if lock.start == 0 && lock.len == 0 {
                self.drop_if_unused(found);
            }
            return Ok(());
        }
        let found = self.find_or_add(nodeid, owner, open)?;
        sys::set_range_lock(found.fd().ok_or(Errno::ENOLCK)?, lock)?;
        found.record().fh.store(arg.fh, Relaxed);
        found.record().pid.store(arg.lk.pid as i32, Relaxed);
        let kept = &found.record().kept;
        if kept.load(Relaxed) == 0
            && let Some(fd) = found.fd()
            && self.vault.put(Kind::Owner, found.id(), fd)
        {
            kept.store(1, Relaxed);
        }
        deadlock::taken();
        Ok(())
    }

    /// Gives up the description of an owner that holds no lock any more, unless somebody is about to use it: pins are
    /// taken under the same lock.
    fn drop_if_unused(&self, found: Pinned<'_, Owner>) {
        let owner = found.record();
        let shard = self
            .table
            .lock(hash(owner.nodeid.load(Relaxed), owner.owner.load(Relaxed)));
        if found.is_sole() && shard.remove(&found) {
            drop(shard);
            self.unkeep(&found);
        }
    }

    /// The lock in the way of `lock`, or one with `F_UNLCK`. `fd` is a description that holds no range locks. Its process
    /// is one of this guest; 0 stands for any other, whose number would mean nothing here.
    pub(super) fn get(
        &self,
        nodeid: u64,
        owner: u64,
        lock: RangeLock,
        fd: i32,
    ) -> Result<RangeLock, Errno> {
        let own = self.find(nodeid, owner);
        let fd = own.as_ref().and_then(Pinned::fd).unwrap_or(fd);
        let mut found = sys::get_range_lock(fd, lock)?;
        if found.kind != libc::F_UNLCK {
            found.pid = self.pid_behind(nodeid, owner, &found);
        }
        Ok(found)
    }

    /// The guest's process that holds exactly this lock; 0 when there is none.
    fn pid_behind(&self, nodeid: u64, owner: u64, lock: &RangeLock) -> i32 {
        let mut pid = 0;
        self.each(|other, fd| {
            if pid != 0 || other.nodeid.load(Relaxed) != nodeid || other.is(nodeid, owner) {
                return;
            }
            fdinfo::locks_of(fd, |held| {
                if (held.kind, held.start, held.len) == (lock.kind, lock.start, lock.len) {
                    pid = other.pid.load(Relaxed);
                }
            });
        });
        pid
    }

    /// Calls `visit` with every owner that holds a lock of this file in the way of `lock`.
    pub(super) fn holders(&self, file: FileId, lock: &RangeLock, mut visit: impl FnMut(u64)) {
        self.each(|owner, fd| {
            if FileId::of(fd) != Ok(file) {
                return;
            }
            let mut in_the_way = false;
            fdinfo::locks_of(fd, |held| in_the_way |= held.conflicts(lock));
            if in_the_way {
                visit(owner.owner.load(Relaxed));
            }
        });
    }

    fn each(&self, mut visit: impl FnMut(&Owner, i32)) {
        if self.table.live() == 0 {
            return;
        }
        for index in self.table.indexes() {
            if let Some(pin) = self.table.pin_index(index)
                && let Some(fd) = pin.fd()
            {
                visit(pin.record(), fd);
            }
        }
    }

    /// Drops all locks of an owner on an inode.
    pub(super) fn drop_owner(&self, nodeid: u64, owner: u64) {
        if let Some(found) = self.find(nodeid, owner) {
            self.end(&found);
        }
    }

    /// Drops what was locked through an open file that goes away. Locks of processes have ended by then, with FLUSH;
    /// those of open file descriptions (`F_OFD_SETLK` in the guest) end here.
    pub(super) fn drop_handle(&self, nodeid: u64, fh: u64) {
        self.sweep(|owner| owner.nodeid.load(Relaxed) == nodeid && owner.fh.load(Relaxed) == fh);
    }

    /// Drops all locks on an inode.
    pub(super) fn drop_node(&self, nodeid: u64) {
        if self.table.live() != 0 {
            self.sweep(|owner| owner.nodeid.load(Relaxed) == nodeid);
        }
    }

    /// Drops all locks.
    pub(super) fn clear(&self) {
        self.sweep(|_| true);
    }

    fn sweep(&self, wanted: impl Fn(&Owner) -> bool) {
        for index in self.table.indexes() {
            let Some(pin) = self.table.pin_index(index) else {
                continue;
            };
            if wanted(pin.record()) {
                self.end(&pin);
            }
        }
    }
}

impl Drop for Locks {
    fn drop(&mut self) {
        self.clear();
    }
}
