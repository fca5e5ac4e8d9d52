//! The inodes that the guest knows: node ids, lookup counts, and the descriptors behind them.
//!
//! An inode is *hot* while an `O_PATH` descriptor holds it and *cold* when only its kernel file handle is kept; a cold one
//! is reopened when it is used. A clock over the hot ones keeps their number within a budget. Inodes without
//! a usable handle (their file system has none, or they have no name left) stay hot.
//!
//! Known inodes are found by device, inode number and mount. A hot inode cannot lose its number to another one, because its
//! descriptor holds it. A cold one can, so meeting it again costs a comparison of file handles.
//!
//! A hot inode may also have a *spare* descriptor, open for reading, that a closed handle has left for the next one.
//!
//! Where the table outlives the process, the file handle is taken when an inode is met, and a later process finds all of them
//! cold (`recover`).

mod recover;

mod forgotten;

use alloc::boxed::Box;
use core::ffi::CStr;
use core::sync::atomic::AtomicBool;
use core::sync::atomic::AtomicI32;
use core::sync::atomic::AtomicU32;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

use ferry_shared::errno::Errno;
use spin::mutex::SpinMutex;
use zerocopy::{FromBytes, FromZeros};

use self::forgotten::Forgotten;
use super::attr;
use super::mounts::{MountFd, Mounts};
use super::sys::{self, Fd, FileHandle, Stat};
use super::vault::Vault;
use crate::fsdev::table::{Missing, Pinned, Probe, Record, Slot, Table, Vacant};
use crate::fuse::abi::FUSE_ROOT_ID;
use crate::recovery::placed::Placed;

/// What identifies an inode of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Key {
    dev: u64,
    ino: u64,
    mnt: u64,
}

impl Key {
    pub(super) fn of(stat: &Stat) -> Key {
        Key {
            dev: device(stat),
            ino: stat.stx_ino,
            mnt: stat.stx_mnt_id,
        }
    }

    fn hash(&self) -> u64 {
        let odd = 0x9e37_79b9_7f4a_7c15u64;
        let h = self.ino.wrapping_mul(odd) ^ self.dev.rotate_left(17).wrapping_mul(odd);
        let h = (h ^ self.mnt).wrapping_mul(odd);
        h ^ (h >> 32)
    }
}

/// The device that an inode lies on.
pub(super) fn device(stat: &Stat) -> u64 {
    (u64::from(stat.stx_dev_major) << 32) | u64::from(stat.stx_dev_minor)
}

#[derive(FromBytes)]
#[repr(C)]
pub(super) struct Inode {
    lookups: AtomicU64,
    dev: AtomicU64,
    ino: AtomicU64,
    mnt: AtomicU64,
    kind: AtomicU32,
    /// Length of the file handle; 0 while it has not been asked for.
    handle_bytes: AtomicU32,
    handle_kind: AtomicI32,
    flags: AtomicU32,
    /// Open files and directories of it.
    opens: AtomicU32,
    /// A descriptor open for reading that no handle uses now, plus one; 0 is none. There is one only while the record has
    /// its `O_PATH` descriptor, and it goes with that.
    spare: AtomicU32,
    handle: [AtomicU64; INLINE / 8],
}

/// Bytes of a file handle that are kept in the record: local file systems need no more.
const INLINE: usize = 32;

/// The rest of a long file handle, such as a network file system's.
pub(super) type Tail = [AtomicU64; (FileHandle::MAX - INLINE) / 8];

impl Record for Inode {
    fn retire(&self, fd: i32) {
        sys::close(fd);
        drop(self.take_spare());
    }
}

impl Inode {
    fn take_spare(&self) -> Option<Fd> {
        if self.spare.load(Relaxed) == 0 {
            return None;
        }
        let plus_one = self.spare.swap(0, AcqRel);
        let fd = i32::try_from(plus_one.checked_sub(1)?).ok()?;
        Some(Fd::from_raw(fd))
    }

    fn fill(&self, key: &Key, kind: u32) {
        self.lookups.store(1, Relaxed);
        self.dev.store(key.dev, Relaxed);
        self.ino.store(key.ino, Relaxed);
        self.mnt.store(key.mnt, Relaxed);
        self.kind.store(kind, Relaxed);
        self.handle_bytes.store(0, Relaxed);
        self.flags.store(0, Relaxed);
        self.opens.store(0, Relaxed);
        self.spare.store(0, Relaxed);
    }

    fn key(&self) -> Key {
        Key {
            dev: self.dev.load(Relaxed),
            ino: self.ino.load(Relaxed),
            mnt: self.mnt.load(Relaxed),
        }
    }

    fn handle(&self, tail: &Tail) -> Option<FileHandle> {
        let bytes = self.handle_bytes.load(Acquire);
        if bytes == 0 {
            return None;
        }
        let mut data = [0u8; FileHandle::MAX];
        let words = self.handle.iter().chain(tail);
        for (to, from) in data.chunks_exact_mut(8).zip(words).take(words_of(bytes)) {
            to.copy_from_slice(&from.load(Relaxed).to_ne_bytes());
        }
        Some(FileHandle {
            bytes,
            kind: self.handle_kind.load(Relaxed),
            data,
        })
    }

    fn set_handle(&self, handle: &FileHandle, tail: &Tail) {
        let words = self.handle.iter().chain(tail);
        let data = handle.data.as_chunks::<8>().0;
        for (to, from) in words.zip(data).take(words_of(handle.bytes)) {
            to.store(u64::from_ne_bytes(*from), Relaxed);
        }
        self.handle_kind.store(handle.kind, Relaxed);
        // Pairs with the acquire in `handle`.
        self.handle_bytes.store(handle.bytes, Release);
    }
}

/// In `flags`: its descriptor is in the fd store.
const KEPT: u32 = 1 << 0;

/// Lookups that the guest has to take back.
fn count_of(inode: &Inode) -> u64 {
    inode.lookups.load(Relaxed)
}

fn words_of(bytes: u32) -> usize {
    (bytes as usize).div_ceil(8)
}

/// An inode in use, and its descriptor.
pub(super) struct Node<'a> {
    pin: Pinned<'a, Inode>,
    fd: i32,
}

impl Node<'_> {
    /// Its `O_PATH` descriptor.
    pub(super) fn fd(&self) -> i32 {
        self.fd
    }

    /// Its type, as in `S_IFMT`.
    pub(super) fn kind(&self) -> u32 {
        self.pin.record().kind.load(Relaxed)
    }

    /// A descriptor of it that is open for reading, if an earlier handle has left one.
    pub(super) fn take_spare(&self) -> Option<Fd> {
        self.pin.record().take_spare()
    }

    /// The mount that it lies on.
    pub(super) fn mnt(&self) -> u64 {
        self.pin.record().mnt.load(Relaxed)
    }

    /// `ENOTDIR` unless it is a directory.
    pub(super) fn expect_dir(&self) -> Result<(), Errno> {
        match self.kind() {
            libc::S_IFDIR => Ok(()),
            _ => Err(Errno::ENOTDIR),
        }
    }
}

/// The hot inodes that could be made cold, for the clock.
struct Ring {
    slots: Box<[u64]>,
    hand: usize,
}

/// Where an inode found a place in the ring.
enum Place<'a> {
    Free,
    /// This one has lost its place and must become cold.
    TakenFrom(Pinned<'a, Inode>),
    /// Everybody is in use.
    None,
}

/// How many places the clock looks at before it gives up.
const CLOCK_STEPS: usize = 256;
/// How many descriptors are given up at once when the process has none left.
const SHRINK_BATCH: usize = 64;

impl Ring {
    fn claim<'a>(&mut self, table: &'a Table<Inode>, id: u64) -> Place<'a> {
        for _ in 0..CLOCK_STEPS {
            self.hand = self.hand.wrapping_add(1);
            if self.hand >= self.slots.len() {
                self.hand = 0;
            }
            let Some(slot) = self.slots.get_mut(self.hand) else {
                return Place::None;
            };
            match table.probe(*slot) {
                Probe::Cold => {
                    *slot = id;
                    return Place::Free;
                }
                Probe::Idle => {
                    if let Ok(victim) = table.pin_quietly(*slot) {
                        *slot = id;
                        return Place::TakenFrom(victim);
                    }
                }
                Probe::InUse => {}
            }
        }
        Place::None
    }

    fn give_up<'a>(&mut self, table: &'a Table<Inode>) -> Option<Pinned<'a, Inode>> {
        for _ in 0..self.slots.len().saturating_mul(2) {
            self.hand = self.hand.wrapping_add(1);
            if self.hand >= self.slots.len() {
                self.hand = 0;
            }
            let slot = self.slots.get_mut(self.hand)?;
            if table.probe(*slot) == Probe::Idle
                && let Ok(victim) = table.pin_quietly(*slot)
            {
                *slot = 0;
                return Some(victim);
            }
        }
        None
    }
}

/// What the table knows of an inode that was just looked at.
enum Known<'a> {
    No,
    /// Yes, and one more lookup is counted.
    Counted(u64),
    /// Perhaps: its number may have gone to another inode meanwhile.
    Cold(Pinned<'a, Inode>),
    /// The look is outdated.
    Outdated,
}

/// All inodes of a device.
pub(super) struct Inodes {
    table: Table<Inode>,
    /// By index of the table; those that are never written cost no memory.
    tails: Placed<Tail>,
    mounts: Mounts,
    ring: SpinMutex<Ring>,
    forgotten: Forgotten,
    vault: Vault,
    /// The table outlives the process.
    lasting: bool,
    /// The operator has been told that inodes are lost.
    told: AtomicBool,
}

/// The part of a device's memory that is about inodes.
pub(super) struct InodeHome {
    pub(super) slots: Placed<Slot<Inode>>,
    pub(super) tails: Placed<Tail>,
    pub(super) lasting: bool,
}

/// A node id that the table refuses.
fn refused(missing: Missing) -> Errno {
    match missing {
        Missing::Never => Errno::ENOENT,
        Missing::Gone => Errno::ESTALE,
        Missing::Busy => Errno::EBUSY,
    }
}

impl Inodes {
    /// The inodes in `home`, or, if it is new, the directory behind `root` alone.
    pub(super) fn new(root: Fd, home: InodeHome, hot: u32, vault: Vault) -> Result<Inodes, Errno> {
        let stat = sys::stat_fd(root.raw())?;
        let ring = <[u64]>::new_box_zeroed_with_elems(hot.max(1) as usize);
        let buckets = u32::try_from(home.slots.len()).unwrap_or(u32::MAX);
        let inodes = Inodes {
            table: Table::over(home.slots, buckets).ok_or(Errno::ENOMEM)?,
            tails: home.tails,
            mounts: Mounts::new(),
            ring: SpinMutex::new(Ring {
                slots: ring.map_err(|_| Errno::ENOMEM)?,
                hand: 0,
            }),
            forgotten: Forgotten::new(buckets),
            vault,
            lasting: home.lasting,
            told: AtomicBool::new(false),
        };
        let key = Key::of(&stat);
        if inodes.table.live() != 0 {
            inodes.recount_forgotten();
            return Ok(inodes);
        }
        inodes.mounts.meet(key.mnt, root.raw(), libc::S_IFDIR);
        let vacant = inodes.table.reserve().ok_or(Errno::ENOMEM)?;
        vacant.record().fill(&key, libc::S_IFDIR);
        let pin = vacant.publish(Some(root.into_raw()));
        inodes.table.lock(key.hash()).link(&pin);
        // The first record of a table has id 1, which is the id that FUSE gives to the root.
        let id = pin.id();
        drop(pin);
        if id == FUSE_ROOT_ID {
            Ok(inodes)
        } else {
            Err(Errno::EIO)
        }
    }

    /// Whether this is the root of the export.
    pub(super) fn is_root(&self, stat: &Stat) -> bool {
        self.table
            .pin_quietly(FUSE_ROOT_ID)
            .is_ok_and(|root| root.record().key() == Key::of(stat))
    }

    /// How many inodes the guest knows, the root included.
    pub(super) fn live(&self) -> u32 {
        self.table.live().saturating_sub(self.forgotten.count())
    }

    /// The inode with this node id, made hot if it is cold.
    pub(super) fn get(&self, nodeid: u64) -> Result<Node<'_>, Errno> {
        let pin = self.table.pin(nodeid).map_err(refused)?;
        let fd = match pin.fd() {
            Some(fd) => fd,
            None => self.warm(&pin)?,
        };
        Ok(Node { pin, fd })
    }

    /// Keeps a descriptor that is open for reading for the next handle that wants one, unless there is one already.
    pub(super) fn leave_spare(&self, nodeid: u64, fd: Fd) {
        // The pin keeps the record's own descriptor, which takes the spare one along when it goes.
        if let Ok(pin) = self.table.pin_quietly(nodeid)
            && pin.fd().is_some()
            && let Ok(raw) = u32::try_from(fd.raw())
        {
            let spare = &pin.record().spare;
            let put = spare.compare_exchange(0, raw.saturating_add(1), AcqRel, Relaxed);
            if put.is_ok() {
                fd.into_raw();
            }
        }
    }

    /// The mount of an inode.
    pub(super) fn mount_of(&self, node: &Node<'_>) -> Option<MountFd> {
        self.mounts.get(node.mnt())
    }

    fn warm(&self, pin: &Pinned<'_, Inode>) -> Result<i32, Errno> {
        let inode = pin.record();
        let handle = self.handle_of(pin).ok_or_else(|| self.lost(pin))?;
        let mount = self.mounts.get(inode.mnt.load(Relaxed));
        let mount = mount.ok_or_else(|| self.lost(pin))?;
        let fd = self.with_fds(|| sys::open_handle(mount.fd, &handle))?;
        self.install(pin, fd);
        pin.fd().ok_or(Errno::EMFILE)
    }

    fn install(&self, pin: &Pinned<'_, Inode>, fd: Fd) {
        if pin.install(fd.raw()) {
            fd.into_raw();
            self.admit(pin);
        }
    }

    /// Runs something that needs a descriptor, giving up some of ours when the process has none left.
    pub(super) fn with_fds<T>(&self, run: impl Fn() -> Result<T, Errno>) -> Result<T, Errno> {
        for _ in 0..8 {
            match run() {
                Err(Errno::EMFILE | Errno::ENFILE) if self.shrink() => {}
                other => return other,
            }
        }
        run()
    }

    fn shrink(&self) -> bool {
        let mut any = false;
        for _ in 0..SHRINK_BATCH {
            let victim = self.ring.lock().give_up(&self.table);
            match victim {
                Some(victim) => any |= self.cool(&victim),
                None => break,
            }
        }
        any
    }

    /// Finds a place in the budget for an inode that has become hot.
    fn admit(&self, pin: &Pinned<'_, Inode>) {
        let mount = self.mounts.get(pin.record().mnt.load(Relaxed));
        if !mount.is_some_and(|m| m.handles) {
            return;
        }
        let place = self.ring.lock().claim(&self.table, pin.id());
        match place {
            Place::Free => {}
            Place::TakenFrom(victim) => {
                self.cool(&victim);
            }
            Place::None => {
                self.cool(pin);
            }
        }
    }

    /// Makes an inode cold as soon as nobody uses it; `false` when it must stay hot.
    fn cool(&self, pin: &Pinned<'_, Inode>) -> bool {
        let Some(fd) = pin.fd() else { return true };
        // Without a name it would be gone with its last descriptor.
        if !sys::stat_fd(fd).is_ok_and(|stat| stat.stx_nlink > 0) {
            return false;
        }
        if self.handle_of(pin).is_none() {
            match (sys::file_handle(fd, c""), self.tail_of(pin)) {
                (Ok(handle), Some(tail)) => pin.record().set_handle(&handle, tail),
                _ => return false,
            }
        }
        pin.chill();
        true
    }

    fn tail_of(&self, pin: &Pinned<'_, Inode>) -> Option<&Tail> {
        self.tails.get(pin.index() as usize)
    }

    fn handle_of(&self, pin: &Pinned<'_, Inode>) -> Option<FileHandle> {
        pin.record().handle(self.tail_of(pin)?)
    }

    fn known(&self, key: &Key, kind: u32) -> Known<'_> {
        let shard = self.table.lock(key.hash());
        let Some(found) = shard.find(|inode| inode.key() == *key) else {
            return Known::No;
        };
        if !found.has_fd() {
            return found.pin().map_or(Known::Outdated, Known::Cold);
        }
        if found.record().kind.load(Relaxed) != kind {
            return Known::Outdated;
        }
        self.forgotten
            .leave(found.record().lookups.fetch_add(1, Relaxed));
        found.mark_recent();
        Known::Counted(found.id())
    }

    /// Counts a lookup of an inode that is still in its chain.
    fn count(&self, pin: &Pinned<'_, Inode>) -> bool {
        let inode = pin.record();
        let _shard = self.table.lock(inode.key().hash());
        if !pin.is_alive() {
            return false;
        }
        let before = inode
            .lookups
            .update(AcqRel, Relaxed, |n| n.saturating_add(1));
        self.forgotten.leave(before);
        true
    }

    /// Takes an inode out of its chain, because its number has gone to another one.
    fn detach(&self, pin: &Pinned<'_, Inode>) {
        let shard = self.table.lock(pin.record().key().hash());
        if pin.record().lookups.load(Relaxed) != 0 {
            shard.unlink(pin);
        } else if shard.remove(pin) {
            self.forgotten.leave(0);
        }
    }

    /// Looks up one component of a directory and counts it; gives the node id and the attributes.
    pub(super) fn lookup(&self, dir: i32, name: &CStr) -> Result<(u64, Stat), Errno> {
        for _ in 0..16 {
            let stat = sys::stat_at(dir, name)?;
            match self.known(&Key::of(&stat), attr::kind(&stat)) {
                Known::Counted(id) => return Ok((id, stat)),
                Known::Cold(pin) => {
                    let now = sys::file_handle(dir, name);
                    if now.is_ok() && now.ok() == self.handle_of(&pin) {
                        if self.count(&pin) {
                            return Ok((pin.id(), stat));
                        }
                    } else {
                        self.detach(&pin);
                    }
                }
                Known::No => {
                    let flags = libc::O_PATH;
                    let fd = self.with_fds(|| sys::open_beneath(dir, name, flags, 0))?;
                    let stat = sys::stat_fd(fd.raw())?;
                    return Ok((self.intern(fd, &stat)?, stat));
                }
                Known::Outdated => {}
            }
        }
        Err(Errno::ESTALE)
    }

    /// Counts a lookup of the object behind an `O_PATH` descriptor whose attributes are `stat`.
    pub(super) fn intern(&self, fd: Fd, stat: &Stat) -> Result<u64, Errno> {
        self.intern_at(fd, stat, None)
    }

    /// A place for an inode that is about to be made.
    pub(super) fn reserve(&self) -> Result<Vacant<'_, Inode>, Errno> {
        loop {
            if let Some(vacant) = self.table.reserve() {
                return Ok(vacant);
            }
            if !self.make_way() {
                return Err(Errno::ENFILE);
            }
        }
    }

    /// As [`Inodes::intern`], at a place that has been reserved.
    pub(super) fn intern_at<'a>(
        &'a self,
        fd: Fd,
        stat: &Stat,
        mut place: Option<Vacant<'a, Inode>>,
    ) -> Result<u64, Errno> {
        let (key, kind) = (Key::of(stat), attr::kind(stat));
        self.mounts.meet(key.mnt, fd.raw(), kind);
        let mut handle = None;
        for _ in 0..16 {
            match self.known(&key, kind) {
                Known::Counted(id) => return Ok(id),
                Known::Cold(pin) => {
                    let now = sys::file_handle(fd.raw(), c"");
                    if now.is_ok() && now.ok() == self.handle_of(&pin) {
                        if self.count(&pin) {
                            self.install(&pin, fd);
                            return Ok(pin.id());
                        }
                    } else {
                        self.detach(&pin);
                    }
                }
                Known::No => {
                    // Before the lock, because others may have to make way.
                    let vacant = place.take().map_or_else(|| self.reserve(), Ok)?;
                    if self.lasting && handle.is_none() {
                        // Before the lock, which must not wait for a file system.
                        handle = Some(sys::file_handle(fd.raw(), c""));
                    }
                    let shard = self.table.lock(key.hash());
                    if shard.find(|inode| inode.key() == key).is_some() {
                        place = Some(vacant);
                        continue;
                    }
                    vacant.record().fill(&key, kind);
                    if let (Some(Ok(handle)), Some(tail)) =
                        (&handle, self.tails.get(vacant.index() as usize))
                    {
                        vacant.record().set_handle(handle, tail);
                    }
                    let pin = vacant.publish(Some(fd.into_raw()));
                    shard.link(&pin);
                    drop(shard);
                    self.admit(&pin);
                    return Ok(pin.id());
                }
                Known::Outdated => {}
            }
        }
        Err(Errno::ESTALE)
    }

    /// Counts one more lookup of a known node.
    pub(super) fn count_again(&self, node: &Node<'_>) -> Result<u64, Errno> {
        if self.count(&node.pin) {
            Ok(node.pin.id())
        } else {
            Err(Errno::ESTALE)
        }
    }

    /// Takes back lookups; more than there are count as all. `true` when the guest no longer knows the inode; its node id
    /// goes on working for a while if it may come back (`remember`).
    pub(super) fn forget(&self, nodeid: u64, lookups: u64, remember: bool) -> bool {
        if nodeid == FUSE_ROOT_ID {
            return false;
        }
        let Ok(pin) = self.table.pin_quietly(nodeid) else {
            return false;
        };
        let count = &pin.record().lookups;
        let some_left = |n: u64| n.checked_sub(lookups).filter(|&left| left > 0);
        if count.try_update(AcqRel, Relaxed, some_left).is_ok() {
            return false;
        }
        let remembered = remember && self.prepare_to_forget(&pin);
        // Only under the lock can the count become 0, so that no lookup finds an inode that is about to go.
        let shard = self.table.lock(pin.record().key().hash());
        if count.try_update(AcqRel, Relaxed, some_left).is_ok() {
            return false;
        }
        let before = count.swap(0, Relaxed);
        if remembered && pin.is_alive() {
            // One too many changes nothing: the FORGETs of a mount may come after its end.
            if before != 0 {
                self.forgotten.add();
            }
            return before != 0;
        }
        let gone = shard.remove(&pin);
        drop(shard);
        if gone {
            self.forgotten.leave(before);
            self.unkeep(&pin);
        }
        gone
    }

    /// Takes back every lookup, as the end of a mount does; `remember` as in [`Inodes::forget`].
    pub(super) fn forget_all(&self, remember: bool) {
        for index in self.table.indexes() {
            let Some(pin) = self.table.pin_index(index) else {
                continue;
            };
            self.forget(pin.id(), u64::MAX, remember);
        }
    }

    /// Forgets everything but the root.
    fn clear(&self) {
        for index in self.table.indexes() {
            let Some(pin) = self.table.pin_index(index) else {
                continue;
            };
            if pin.id() != FUSE_ROOT_ID {
                let shard = self.table.lock(pin.record().key().hash());
                let before = pin.record().lookups.swap(0, Relaxed);
                let gone = shard.remove(&pin);
                drop(shard);
                if gone {
                    self.forgotten.leave(before);
                    self.unkeep(&pin);
                }
            }
        }
    }
}

impl Drop for Inodes {
    fn drop(&mut self) {
        self.clear();
        if let Ok(root) = self.table.pin_quietly(FUSE_ROOT_ID) {
            root.kill();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_handles_of_every_length_are_kept() {
        for bytes in [1, 8, 12, 31, 32, 33, 84, 128u32] {
            let mut handle = FileHandle {
                bytes,
                kind: 3,
                data: [0; FileHandle::MAX],
            };
            for (at, byte) in handle.data.iter_mut().enumerate().take(bytes as usize) {
                *byte = at as u8 + 1;
            }
            let inode = Inode::new_zeroed();
            let tail = Tail::new_zeroed();
            assert_eq!(inode.handle(&tail), None);
            inode.set_handle(&handle, &tail);
            assert_eq!(inode.handle(&tail), Some(handle));
            let untouched = bytes <= 32;
            assert_eq!(tail.iter().all(|word| word.load(Relaxed) == 0), untouched);
        }
    }
}
