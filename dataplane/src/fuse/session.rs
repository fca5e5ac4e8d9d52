//! A FUSE session: from INIT to DESTROY.
//!
//! Owns what INIT negotiates and whether the device is mounted. Shared by the cores that serve the device's queues: the
//! request path reads one atomic word, INIT and DESTROY exclude each other with a lock that nobody waits for. Never
//! touches guest memory; [`crate::dispatch`] calls it.
//!
//! What a mount agreed on is noted in a record that may outlive the process, before the guest hears of it; a later process
//! goes on with it ([`Session::resume`]). The record's first word says whether there is a mount, and is written last when
//! one begins and first when it ends.

use core::sync::atomic::{AtomicU64, Ordering};

use ferry_shared::errno::Errno;
use ferry_shared::limits::{MAX_DATA_BUFFER, MIN_XFER_SIZE};
use ferry_shared::msg::Platform;

use super::abi::{
    FUSE_ALLOW_IDMAP, FUSE_ASYNC_DIO, FUSE_ASYNC_READ, FUSE_ATOMIC_O_TRUNC, FUSE_AUTO_INVAL_DATA,
    FUSE_BIG_WRITES, FUSE_CACHE_SYMLINKS, FUSE_CREATE_SUPP_GROUP, FUSE_DIRECT_IO_ALLOW_MMAP,
    FUSE_DO_READDIRPLUS, FUSE_DONT_MASK, FUSE_EXPLICIT_INVAL_DATA, FUSE_EXPORT_SUPPORT,
    FUSE_FLOCK_LOCKS, FUSE_HANDLE_KILLPRIV, FUSE_HANDLE_KILLPRIV_V2, FUSE_HAS_IOCTL_DIR,
    FUSE_INIT_EXT, FUSE_KERNEL_MINOR_VERSION, FUSE_KERNEL_VERSION, FUSE_MAX_PAGES,
    FUSE_MIN_MINOR_VERSION, FUSE_NO_EXPORT_SUPPORT, FUSE_NO_OPENDIR_SUPPORT, FUSE_PARALLEL_DIROPS,
    FUSE_POSIX_ACL, FUSE_POSIX_LOCKS, FUSE_READDIRPLUS_AUTO, FUSE_SECURITY_CTX, FUSE_SETXATTR_EXT,
    FUSE_SUBMOUNTS, FUSE_WRITEBACK_CACHE, fuse_init_out,
};
use super::parse::{Init, InitWishes, Protocol};
use crate::fsdev::{FsDev, Negotiated, Offer};
use crate::recovery::placed::Placed;

/// INIT flags whose promise this module, [`super::parse`] and [`crate::dispatch`] keep for every backend; granted to
/// whoever asks.
pub const SESSION_FLAGS: u64 = FUSE_ASYNC_READ
    | FUSE_BIG_WRITES
    | FUSE_DO_READDIRPLUS
    | FUSE_READDIRPLUS_AUTO
    | FUSE_ASYNC_DIO
    | FUSE_PARALLEL_DIROPS
    | FUSE_HAS_IOCTL_DIR
    | FUSE_MAX_PAGES
    | FUSE_CACHE_SYMLINKS
    | FUSE_SETXATTR_EXT
    | FUSE_INIT_EXT;

/// INIT flags whose promise a backend keeps; granted when it offers them. Any other flag in an offer is disregarded:
/// Ferry has no DAX window, passes no pages or files through, and keeps its own request numbers.
pub const BACKEND_FLAGS: u64 = FUSE_POSIX_LOCKS
    | FUSE_FLOCK_LOCKS
    | FUSE_ATOMIC_O_TRUNC
    | FUSE_EXPORT_SUPPORT
    | FUSE_NO_EXPORT_SUPPORT
    | FUSE_DONT_MASK
    | FUSE_AUTO_INVAL_DATA
    | FUSE_EXPLICIT_INVAL_DATA
    | FUSE_WRITEBACK_CACHE
    | FUSE_HANDLE_KILLPRIV
    | FUSE_HANDLE_KILLPRIV_V2
    | FUSE_POSIX_ACL
    | FUSE_NO_OPENDIR_SUPPORT
    | FUSE_SUBMOUNTS
    | FUSE_SECURITY_CTX
    | FUSE_CREATE_SUPP_GROUP
    | FUSE_DIRECT_IO_ALLOW_MMAP
    | FUSE_ALLOW_IDMAP;

/// Requests that the guest may keep in the background, such as read-ahead; the ring's size is the real limit.
const MAX_BACKGROUND: u16 = u16::MAX;
/// From so many on, the guest regards the device as congested.
const CONGESTION_THRESHOLD: u16 = MAX_BACKGROUND / 4 * 3;
/// The page that `max_pages` counts in.
const PAGE: u32 = 4_096;

/// The state of a device's FUSE session, shared by the cores.
#[derive(Debug, Default)]
pub struct Session {
    platform: Platform,
    /// [`Word`], so that a request sees one consistent state.
    word: AtomicU64,
    /// What the mount agreed on; held while a mount begins or ends.
    mount: spin::Mutex<Option<Negotiated>>,
    /// What a later process needs to know of it.
    record: Option<Placed<AtomicU64>>,
}

/// The session's state as the request path reads it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Word {
    mounted: bool,
    protocol: Protocol,
    epoch: u32,
}

impl Word {
    /// Where the flags of [`Protocol::FLAGS`] are kept, from bit 1 on.
    const KEPT: [u64; 4] = [
        FUSE_SETXATTR_EXT,
        FUSE_SECURITY_CTX,
        FUSE_CREATE_SUPP_GROUP,
        FUSE_EXPORT_SUPPORT,
    ];

    fn pack(self) -> u64 {
        let flags = Word::KEPT.iter().rev().fold(0, |bits, flag| {
            bits << 1 | u64::from(self.protocol.flags & flag != 0)
        });
        u64::from(self.mounted)
            | flags << 1
            | u64::from(self.protocol.minor & 0xff) << 8
            | u64::from(self.epoch) << 32
    }

    fn unpack(word: u64) -> Word {
        let flags = Word::KEPT
            .iter()
            .zip(1u32..)
            .filter(|&(_, bit)| word >> bit & 1 != 0)
            .fold(0, |flags, (flag, _)| flags | flag);
        let [_, minor, _, _, epoch @ ..] = word.to_le_bytes();
        Word {
            mounted: word & 1 != 0,
            protocol: Protocol {
                minor: u32::from(minor),
                flags,
            },
            epoch: u32::from_le_bytes(epoch),
        }
    }
}

impl Session {
    /// A session that waits for INIT, of a guest of this architecture.
    pub fn new(platform: Platform) -> Session {
        Session {
            platform,
            ..Session::default()
        }
    }

    /// Words of a record.
    pub const RECORD: usize = 3;

    /// As [`Session::new`], with a record of [`Session::RECORD`] words.
    pub fn recorded(platform: Platform, record: Option<Placed<AtomicU64>>) -> Session {
        Session {
            platform,
            record,
            ..Session::default()
        }
    }

    /// Goes on with the mount that the record tells of, if there is one. Called before any request.
    pub fn resume<F: FsDev>(&self, fs: &F) {
        let Some([mounted, flags, sizes]) = self.record.as_deref() else {
            return;
        };
        let found = mounted.load(Ordering::Acquire);
        if found & 1 == 0 {
            return;
        }
        let [minor, max_write] = [0, 32].map(|at| sizes.load(Ordering::Relaxed) >> at);
        let negotiated = Negotiated {
            minor: minor as u32,
            // Nothing that this version would not have agreed to.
            flags: flags.load(Ordering::Relaxed) & (SESSION_FLAGS | BACKEND_FLAGS),
            max_write: (max_write as u32).clamp(MIN_XFER_SIZE, MAX_DATA_BUFFER),
        };
        fs.resume(negotiated);
        *self.mount.lock() = Some(negotiated);
        self.publish(true, negotiated, (found >> 32) as u32);
    }

    fn note(&self, mounted: bool, negotiated: &Negotiated, epoch: u32) {
        let Some([word, flags, sizes]) = self.record.as_deref() else {
            return;
        };
        let count = u64::from(epoch) << 32;
        put(word, count);
        if mounted {
            let size = u64::from(negotiated.minor) | u64::from(negotiated.max_write) << 32;
            put(flags, negotiated.flags);
            put(sizes, size);
            put(word, count | 1);
        }
    }

    /// Forgets what an earlier process has noted.
    pub fn forget_record(&self) {
        self.note(false, &Negotiated::default(), self.next_epoch());
    }

    /// The guest's architecture.
    pub fn platform(&self) -> Platform {
        self.platform
    }

    /// Whether a file system is mounted.
    pub fn mounted(&self) -> bool {
        self.load().mounted
    }

    /// Counts the times that a mount has begun or ended; wraps.
    pub fn epoch(&self) -> u32 {
        (self.word.load(Ordering::Acquire) >> 32) as u32
    }

    /// How requests are to be decoded; `None` while nothing is mounted.
    pub fn protocol(&self) -> Option<Protocol> {
        let word = self.load();
        word.mounted.then_some(word.protocol)
    }

    /// What the mount agreed on; `None` while nothing is mounted.
    pub fn negotiated(&self) -> Option<Negotiated> {
        *self.mount.lock()
    }

    /// INIT: ends the mount that there may be, and begins one on the backend.
    pub fn init<F: FsDev>(&self, fs: &F, init: &Init) -> Result<fuse_init_out, Errno> {
        let mut mount = self.mount.try_lock().ok_or(Errno::EBUSY)?;
        self.end(fs, &mut mount);
        if init.major > FUSE_KERNEL_VERSION {
            // Only our version is of interest; the guest sends INIT again if it can speak it.
            return Ok(fuse_init_out {
                major: FUSE_KERNEL_VERSION,
                minor: FUSE_KERNEL_MINOR_VERSION,
                ..fuse_init_out::default()
            });
        }
        if init.major < FUSE_KERNEL_VERSION || init.minor < FUSE_MIN_MINOR_VERSION {
            return Err(Errno::EPROTO);
        }
        let wishes = init.wishes.ok_or(Errno::EINVAL)?;
        let offer = fs.offer();
        let negotiated = negotiate(init.minor, &wishes, &offer);
        fs.mount(negotiated)?;
        *mount = Some(negotiated);
        self.change(true, negotiated);
        Ok(init_out(&negotiated, &wishes, &offer))
    }

    /// DESTROY: ends the mount.
    pub fn destroy<F: FsDev>(&self, fs: &F) -> Result<(), Errno> {
        let mut mount = self.mount.try_lock().ok_or(Errno::EBUSY)?;
        self.end(fs, &mut mount);
        Ok(())
    }

    /// A device reset or a hang-up: ends the mount, if there is one. No request of the device may be running.
    pub fn reset<F: FsDev>(&self, fs: &F) {
        self.end(fs, &mut self.mount.lock());
    }

    fn end<F: FsDev>(&self, fs: &F, mount: &mut Option<Negotiated>) {
        if mount.take().is_some() {
            // First, so that no new request enters the backend while it tidies up.
            self.change(false, Negotiated::default());
            fs.unmount();
        }
    }

    fn load(&self) -> Word {
        // Pairs with the release in `change`: who sees a mount sees what the backend did to begin it.
        Word::unpack(self.word.load(Ordering::Acquire))
    }

    /// Notes and publishes a new state; only under the lock.
    fn change(&self, mounted: bool, negotiated: Negotiated) {
        let epoch = self.next_epoch();
        self.note(mounted, &negotiated, epoch);
        self.publish(mounted, negotiated, epoch);
    }

    /// Goes on with the count of an earlier process, so that no two mounts of a device have the same number.
    fn next_epoch(&self) -> u32 {
        let noted = self.record.as_deref().and_then(|record| record.first());
        let noted = noted.map_or(0, |word| (word.load(Ordering::Relaxed) >> 32) as u32);
        noted.max(self.load().epoch).wrapping_add(1)
    }

    fn publish(&self, mounted: bool, negotiated: Negotiated, epoch: u32) {
        let word = Word {
            mounted,
            protocol: Protocol {
                minor: negotiated.minor,
                flags: negotiated.flags & Protocol::FLAGS,
            },
            epoch,
        };
        self.word.store(word.pack(), Ordering::Release);
    }
}

/// Stores a word of the record. In the simulation the process may die here.
fn put(word: &AtomicU64, value: u64) {
    #[cfg(test)]
    crate::sim::fate::store();
    word.store(value, Ordering::Release);
}

fn negotiate(minor: u32, wishes: &InitWishes, offer: &Offer) -> Negotiated {
    Negotiated {
        minor: minor.min(FUSE_KERNEL_MINOR_VERSION),
        flags: wishes.flags & (SESSION_FLAGS | offer.flags & BACKEND_FLAGS),
        max_write: offer.max_write.clamp(MIN_XFER_SIZE, MAX_DATA_BUFFER),
    }
}

fn init_out(granted: &Negotiated, wishes: &InitWishes, offer: &Offer) -> fuse_init_out {
    // Rounded down, because it bounds READ too and a READ must not exceed what the backend takes either.
    let max_pages = match granted.flags & FUSE_MAX_PAGES {
        0 => 0,
        _ => u16::try_from(granted.max_write / PAGE).unwrap_or(u16::MAX),
    };
    let [low @ .., h0, h1, h2, h3] = granted.flags.to_le_bytes();
    fuse_init_out {
        major: FUSE_KERNEL_VERSION,
        minor: granted.minor,
        max_readahead: wishes.max_readahead.min(offer.max_readahead),
        flags: u32::from_le_bytes(low),
        max_background: MAX_BACKGROUND,
        congestion_threshold: CONGESTION_THRESHOLD,
        max_write: granted.max_write,
        time_gran: 1,
        max_pages,
        flags2: u32::from_le_bytes([h0, h1, h2, h3]),
        ..fuse_init_out::default()
    }
}

#[cfg(test)]
mod tests;
