//! Open files and directories.
//!
//! A handle is pinned while an operation on its descriptor is under way; RELEASE ends it, and the descriptor is closed
//! when the last pin goes.
//!
//! A handle of an earlier process has no descriptor: the first use opens the inode again with the flags of the file. A
//! directory goes on after the entry that the guest names. A file that was locked with flock(2) comes from the fd store,
//! because the lock is the description's.

use alloc::sync::Arc;
use core::sync::atomic::AtomicI32;
use core::sync::atomic::AtomicU32;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use ferry_shared::errno::Errno;
use zerocopy::FromBytes;

use super::inode::Inodes;
use super::lock;
use super::sys::{self, Fd};
use super::vault::{Kind, Vault};
use crate::fsdev::table::{Missing, Pinned, Record, Slot, Table, Vacant};
use crate::recovery::placed::Placed;

/// A directory.
pub(super) const DIR: u32 = 1 << 0;
/// Reads and writes bypass the page cache.
pub(super) const DIRECT: u32 = 1 << 1;
/// Was locked with flock(2).
pub(super) const FLOCKED: u32 = 1 << 2;
/// Ranges were locked through it.
pub(super) const LOCKED: u32 = 1 << 3;
/// Its descriptor is in the fd store.
const KEPT: u32 = 1 << 4;
/// Transfers through the page cache do not wait for long.
pub(super) const CALM: u32 = 1 << 5;
/// The file system has no way to read without waiting.
pub(super) const RING: u32 = 1 << 6;

/// The position of a directory that is not known.
const UNKNOWN: u64 = u64::MAX;

#[derive(FromBytes)]
#[repr(C)]
pub(super) struct Handle {
    nodeid: AtomicU64,
    /// Where the directory's descriptor stands.
    position: AtomicU64,
    flags: AtomicU32,
    /// What a `DIRECT` transfer must be aligned to, less one.
    alignment: AtomicU32,
    /// 1 while a listing uses the directory's position.
    listing: AtomicU32,
    /// What it is opened with again.
    open_flags: AtomicI32,
}

impl Record for Handle {
    fn retire(&self, fd: i32) {
        sys::close(fd);
        if self.has(FLOCKED) {
            lock::released();
        }
    }
}

impl Handle {
    pub(super) fn has(&self, flag: u32) -> bool {
        self.flags.load(Relaxed) & flag != 0
    }

    pub(super) fn set(&self, flag: u32) {
        self.flags.fetch_or(flag, Relaxed);
    }

    pub(super) fn clear(&self, flag: u32) {
        self.flags.fetch_and(!flag, Relaxed);
    }

    /// Whether every write goes to the end of the file.
    pub(super) fn appends(&self) -> bool {
        self.open_flags.load(Relaxed) & libc::O_APPEND != 0
    }

    pub(super) fn alignment(&self) -> u32 {
        self.alignment.load(Relaxed)
    }
}

/// An open file or directory in use.
pub(super) struct OpenFile<'a> {
    handles: &'a Handles,
    pin: Pinned<'a, Handle>,
    fd: i32,
}

impl<'a> OpenFile<'a> {
    pub(super) fn fd(&self) -> i32 {
        self.fd
    }

    pub(super) fn handle(&self) -> &'a Handle {
        self.pin.record()
    }

    /// Keeps it in use until [`Handles::unpin`].
    pub(super) fn keep(self) -> u64 {
        self.pin.keep()
    }

    /// Ends it.
    pub(super) fn close(self) {
        self.handles.end(&self.pin);
    }

    /// Ends it; a file that was only read, with the flags `plain`, leaves its descriptor to the next handle. Not one that was
    /// open for writing, because the host could neither run it nor mount its file system read-only meanwhile; and only on a
    /// file system of this machine, because others do at an opening what makes them coherent.
    pub(super) fn close_to_reuse(self, plain: i32) {
        let handle = self.handle();
        let clean = handle.flags.load(Relaxed) & !RING == CALM;
        if clean
            && handle.open_flags.load(Relaxed) == plain
            && let Some(fd) = self.pin.kill_sole()
        {
            let nodeid = handle.nodeid.load(Relaxed);
            self.handles.inodes.count_open(nodeid, false);
            self.handles.inodes.leave_spare(nodeid, Fd::from_raw(fd));
        } else {
            self.close();
        }
    }

    /// Has the fd store keep a file that is locked.
    pub(super) fn keep_locked(&self) {
        let handle = self.handle();
        if !handle.has(KEPT) && self.handles.vault.put(Kind::Handle, self.pin.id(), self.fd) {
            handle.set(KEPT);
        }
    }

    /// Takes the directory's position for one listing. Listings of one open directory come one at a time from a kernel;
    /// a second one here waits for the first.
    pub(super) fn list(&self) -> Listing<'_> {
        let listing = &self.handle().listing;
        while listing
            .compare_exchange_weak(0, 1, Acquire, Relaxed)
            .is_err()
        {
            std::thread::yield_now();
        }
        Listing { file: self }
    }
}

/// Exclusive use of a directory's position.
pub(super) struct Listing<'a> {
    file: &'a OpenFile<'a>,
}

impl Listing<'_> {
    /// Goes to the position after the entry with this cookie.
    pub(super) fn seek(&mut self, cookie: u64) -> Result<(), Errno> {
        let position = &self.file.handle().position;
        if position.load(Relaxed) != cookie {
            position.store(UNKNOWN, Relaxed);
            sys::seek(self.file.fd, cookie, libc::SEEK_SET as u32)?;
        }
        Ok(())
    }

    /// Says where the descriptor stands; `None` when what was read has not been used up.
    pub(super) fn stands_at(&mut self, cookie: Option<u64>) {
        self.file
            .handle()
            .position
            .store(cookie.unwrap_or(UNKNOWN), Relaxed);
    }
}

impl Drop for Listing<'_> {
    fn drop(&mut self) {
        self.file.handle().listing.store(0, Release);
    }
}

/// All open files and directories of a device.
pub(super) struct Handles {
    table: Table<Handle>,
    inodes: Arc<Inodes>,
    vault: Vault,
}

impl Handles {
    /// The handles in `slots`, of these inodes.
    pub(super) fn new(
        slots: Placed<Slot<Handle>>,
        inodes: &Arc<Inodes>,
        vault: Vault,
    ) -> Result<Handles, Errno> {
        Ok(Handles {
            table: Table::over(slots, 1).ok_or(Errno::ENOMEM)?,
            inodes: Arc::clone(inodes),
            vault,
        })
    }

    /// A place for a file that is about to be opened.
    pub(super) fn reserve(&self) -> Result<Vacant<'_, Handle>, Errno> {
        self.table.reserve().ok_or(Errno::ENFILE)
    }

    /// Adds an open file of inode `nodeid` at a place that has been reserved. It was opened with `open_flags`; `alignment` is
    /// for `DIRECT` ones.
    pub(super) fn add_at(
        &self,
        vacant: Vacant<'_, Handle>,
        (fd, open_flags): (Fd, i32),
        nodeid: u64,
        flags: u32,
        alignment: u32,
    ) -> u64 {
        let handle = vacant.record();
        handle.nodeid.store(nodeid, Relaxed);
        handle.position.store(0, Relaxed);
        handle.flags.store(flags, Relaxed);
        handle.alignment.store(alignment.wrapping_sub(1), Relaxed);
        handle.listing.store(0, Relaxed);
        handle.open_flags.store(open_flags, Relaxed);
        self.inodes.count_open(nodeid, true);
        vacant.publish(Some(fd.into_raw())).id()
    }

    /// Goes on with the handles of an earlier process.
    pub(super) fn take_over(&self) {
        for index in self.table.indexes() {
            let Some(pin) = self.table.pin_index(index) else {
                continue;
            };
            let handle = pin.record();
            handle.position.store(UNKNOWN, Relaxed);
            handle.listing.store(0, Relaxed);
            self.inodes.count_open(handle.nodeid.load(Relaxed), true);
            if handle.has(FLOCKED) && pin.fd().is_none() {
                tracing::warn!(
                    nodeid = handle.nodeid.load(Relaxed),
                    "an flock lock of a guest is lost with the restart: the service manager has not kept its file"
                );
                handle.clear(FLOCKED | KEPT);
            }
        }
    }

    /// Takes back a locked file; `false` when there is no such file.
    pub(super) fn take_back(&self, id: u64, fd: Fd) -> bool {
        let Ok(pin) = self.table.pin_quietly(id) else {
            return false;
        };
        pin.record().set(KEPT);
        if pin.install(fd.raw()) {
            fd.into_raw();
        }
        true
    }

    /// Opens a file of an earlier process again.
    fn warm(&self, pin: &Pinned<'_, Handle>) -> Result<i32, Errno> {
        let handle = pin.record();
        let node = self.inodes.get(handle.nodeid.load(Relaxed))?;
        // Those that act at the opening have acted.
        let lasting = libc::O_ACCMODE
            | libc::O_APPEND
            | libc::O_SYNC
            | libc::O_DSYNC
            | libc::O_NOATIME
            | libc::O_DIRECT;
        let mut flags = handle.open_flags.load(Relaxed) & lasting;
        if handle.has(DIR) {
            flags |= libc::O_DIRECTORY;
        } else if !handle.has(DIRECT) {
            flags &= !libc::O_DIRECT;
        }
        let fd = self.inodes.with_fds(|| sys::reopen(node.fd(), flags))?;
        if pin.install(fd.raw()) {
            fd.into_raw();
        }
        pin.fd().ok_or(Errno::EBADF)
    }

    fn end(&self, pin: &Pinned<'_, Handle>) {
        if pin.kill() {
            let handle = pin.record();
            self.inodes.count_open(handle.nodeid.load(Relaxed), false);
            if handle.has(KEPT) {
                // The fd store has the description too, and closes it later: its lock ends now.
                if handle.has(FLOCKED)
                    && let Some(fd) = pin.fd()
                    && sys::flock(fd, libc::LOCK_UN).is_ok()
                {
                    lock::released();
                }
                self.vault.remove(Kind::Handle, pin.id());
            }
        }
    }

    fn get(&self, fh: u64, nodeid: u64) -> Result<OpenFile<'_>, Errno> {
        let pin = self.table.pin(fh).map_err(|missing| match missing {
            Missing::Never | Missing::Gone => Errno::EBADF,
            Missing::Busy => Errno::EAGAIN,
        })?;
        if pin.record().nodeid.load(Relaxed) != nodeid {
            return Err(Errno::EBADF);
        }
        let fd = match pin.fd() {
            Some(fd) => fd,
            None => self.warm(&pin)?,
        };
        Ok(OpenFile {
            handles: self,
            pin,
            fd,
        })
    }

    /// The open file or directory `fh` of inode `nodeid`.
    pub(super) fn any(&self, fh: u64, nodeid: u64) -> Result<OpenFile<'_>, Errno> {
        self.get(fh, nodeid)
    }

    /// The open file `fh` of inode `nodeid`.
    pub(super) fn file(&self, fh: u64, nodeid: u64) -> Result<OpenFile<'_>, Errno> {
        self.get(fh, nodeid).and_then(|f| {
            if f.handle().has(DIR) {
                Err(Errno::EBADF)
            } else {
                Ok(f)
            }
        })
    }

    /// The open directory `fh` of inode `nodeid`.
    pub(super) fn dir(&self, fh: u64, nodeid: u64) -> Result<OpenFile<'_>, Errno> {
        self.get(fh, nodeid).and_then(|f| {
            if f.handle().has(DIR) {
                Ok(f)
            } else {
                Err(Errno::EBADF)
            }
        })
    }

    /// Whether inode `nodeid` is open for writing. Looks at every handle.
    pub(super) fn is_written(&self, nodeid: u64) -> bool {
        let mut pins = self.table.indexes().filter_map(|i| self.table.pin_index(i));
        pins.any(|pin| {
            let handle = pin.record();
            handle.nodeid.load(Relaxed) == nodeid
                && handle.open_flags.load(Relaxed) & libc::O_ACCMODE != libc::O_RDONLY
        })
    }

    /// Ends the use that [`OpenFile::keep`] has prolonged.
    pub(super) fn unpin(&self, kept: u64) {
        self.table.unpin(kept);
    }

    pub(super) fn live(&self) -> u32 {
        self.table.live()
    }

    /// Ends all of them; those in use are closed after their use.
    pub(super) fn clear(&self) {
        for index in self.table.indexes() {
            if let Some(pin) = self.table.pin_index(index) {
                self.end(&pin);
            }
        }
    }
}

impl Drop for Handles {
    fn drop(&mut self) {
        self.clear();
    }
}
