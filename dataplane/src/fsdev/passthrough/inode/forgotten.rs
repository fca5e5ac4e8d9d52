//! Inodes that the guest's kernel has forgotten, but whose file handles an NFS server in the guest may still hold.
//!
//! Such a handle is the node id, and Linux asks for it by LOOKUP of `.`; so the id must go on naming its inode. A forgotten
//! inode stays in the table with a lookup count of 0, cold, as long as there is room: the clock of this module ends those
//! that must make way. It also outlives the mount, because the server's clients outlive a reboot of the server.

use core::sync::atomic::AtomicU32;
use core::sync::atomic::Ordering::Relaxed;

use super::{Inode, Inodes};
use crate::fsdev::table::Pinned;
use crate::fuse::abi::FUSE_ROOT_ID;

/// Most forgotten inodes; fewer in a small table.
const MOST: u32 = 1 << 16;
/// How many make way at once.
const BATCH: u32 = 32;

/// How many there are, and who makes way next.
pub(super) struct Forgotten {
    count: AtomicU32,
    most: u32,
    hand: AtomicU32,
}

impl Forgotten {
    /// For a table of so many inodes.
    pub(super) fn new(capacity: u32) -> Forgotten {
        Forgotten {
            count: AtomicU32::new(0),
            most: MOST.min(capacity / 2),
            hand: AtomicU32::new(0),
        }
    }

    pub(super) fn count(&self) -> u32 {
        self.count.load(Relaxed)
    }

    /// One inode more is forgotten; under the lock of its chain, like the two below.
    pub(super) fn add(&self) {
        self.count.fetch_add(1, Relaxed);
    }

    /// An inode with so many lookups is looked up, or goes.
    pub(super) fn leave(&self, lookups: u64) {
        if lookups == 0 {
            self.count.fetch_sub(1, Relaxed);
        }
    }
}

impl Inodes {
    /// Makes an inode fit to be forgotten without being lost; `false` when it cannot be found again later.
    pub(super) fn prepare_to_forget(&self, pin: &Pinned<'_, Inode>) -> bool {
        if self.forgotten.count() >= self.forgotten.most {
            self.make_way();
        }
        self.forgotten.most > 0 && self.cool(pin)
    }

    /// Ends some forgotten inodes; `false` when there are none.
    pub(super) fn make_way(&self) -> bool {
        let mut ended = 0;
        let indexes = self.table.indexes();
        for _ in indexes.clone() {
            if self.forgotten.count() == 0 || ended == BATCH {
                break;
            }
            let next = |hand: u32| hand.saturating_add(1);
            let hand = self.forgotten.hand.update(Relaxed, Relaxed, |hand| {
                if indexes.contains(&next(hand)) {
                    next(hand)
                } else {
                    indexes.start
                }
            });
            let Some(pin) = self.table.pin_index(hand) else {
                continue;
            };
            let inode = pin.record();
            if inode.lookups.load(Relaxed) != 0 {
                continue;
            }
            let shard = self.table.lock(inode.key().hash());
            let gone = inode.lookups.load(Relaxed) == 0 && shard.remove(&pin);
            drop(shard);
            if gone {
                self.forgotten.leave(0);
                self.unkeep(&pin);
                ended += 1;
            }
        }
        ended > 0
    }

    /// Counts those that an earlier process has left.
    pub(super) fn recount_forgotten(&self) {
        let left = self
            .table
            .indexes()
            .filter_map(|at| self.table.pin_index(at));
        for pin in left {
            if pin.id() != FUSE_ROOT_ID && pin.record().lookups.load(Relaxed) == 0 {
                self.forgotten.add();
            }
        }
    }
}
