//! Trace points: what the cores write down while an operator watches, in memory that others can read.
//!
//! One ring of records per core, written by that core only. While a point is off it costs a load of the mask. The data
//! plane makes the memory; whoever may open its file (see `trace_get_info`) maps it read-only and reads while the cores
//! write: records that are overwritten meanwhile are left out.

use core::sync::atomic::{AtomicU64, Ordering, fence};

const PAGE: usize = 4096 / 8;
const MAGIC: u64 = u64::from_le_bytes(*b"FerryTrc");
/// Words of a record: time, place, two arguments.
const RECORD: usize = 4;
/// Records that a core keeps.
pub const RECORDS: usize = 16 * 1024;
const CORE: usize = PAGE + RECORDS * RECORD;
/// Points of a group, at most; the mask has as many bits for each.
pub const POINTS_PER_GROUP: usize = 16;

const MASK_WORD: usize = 2;
const ORIGIN_WORD: usize = 3;
const BEGUN_WORD: usize = 0;
const DONE_WORD: usize = 8;

/// Bytes of the traces of so many cores.
pub const fn bytes(cores: usize) -> usize {
    (PAGE + cores * CORE) * 8
}

/// Points that belong together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// Its name.
    pub name: &'static str,
    /// Names of its points and of their arguments.
    pub points: &'static [(&'static str, [&'static str; 2])],
}

/// The groups, by the bits of the group mask.
pub const GROUPS: [Group; 4] = [
    Group {
        name: "virtio",
        points: &[
            ("VIRTIO_REQUEST_TAKEN", ["slot", ""]),
            ("VIRTIO_REQUEST_RETURNED", ["unique", "written"]),
            ("VIRTIO_INTERRUPT", ["", ""]),
            ("VIRTIO_QUEUE_STARTED", ["thread", ""]),
            ("VIRTIO_QUEUE_STOPPED", ["", ""]),
        ],
    },
    Group {
        name: "fuse",
        points: &[
            ("FUSE_REQUEST_START", ["unique", "opcode"]),
            ("FUSE_REQUEST_DONE", ["unique", "ns"]),
        ],
    },
    Group {
        name: "fsdev",
        points: &[
            ("FSDEV_IO_SUBMIT", ["unique", ""]),
            ("FSDEV_IO_DONE", ["unique", "result"]),
            ("FSDEV_OFFLOAD", ["unique", ""]),
            ("FSDEV_OFFLOAD_DONE", ["unique", ""]),
        ],
    },
    Group {
        name: "reactor",
        points: &[("REACTOR_SLEEP", ["", ""]), ("REACTOR_WAKE", ["", ""])],
    },
];

/// A point; the number is its bit in the mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Point {
    /// A request was taken from its queue.
    RequestTaken = 0,
    /// A request was given back.
    RequestReturned = 1,
    /// The driver was interrupted.
    Interrupt = 2,
    /// A core was given a queue.
    QueueStarted = 3,
    /// A core has given a queue up.
    QueueStopped = 4,
    /// A FUSE request begins to run.
    FuseStart = 16,
    /// A FUSE request is answered.
    FuseDone = 17,
    /// A transfer was put on the ring.
    IoSubmit = 32,
    /// A transfer has come back from the ring.
    IoDone = 33,
    /// A request went to a helper thread.
    Offload = 34,
    /// A request has come back from a helper thread.
    OffloadDone = 35,
    /// The core goes to sleep.
    Sleep = 48,
    /// The core is awake.
    Wake = 49,
}

/// The bits of a group's points.
pub fn group_mask(group: usize) -> u64 {
    let points = GROUPS.get(group).map_or(0, |group| group.points.len());
    let bits = 1u64.checked_shl(points as u32).unwrap_or(0).wrapping_sub(1);
    bits.checked_shl((group * POINTS_PER_GROUP) as u32)
        .unwrap_or(0)
}

/// All points.
pub fn all_points() -> u64 {
    (0..GROUPS.len()).fold(0, |mask, group| mask | group_mask(group))
}

fn load(words: &[AtomicU64], at: usize) -> u64 {
    words.get(at).map_or(0, |word| word.load(Ordering::Relaxed))
}

fn store(words: &[AtomicU64], at: usize, value: u64) {
    if let Some(word) = words.get(at) {
        word.store(value, Ordering::Relaxed);
    }
}

/// Writes the beginning of fresh memory: the number of cores, and what clock the times are counted against, in
/// nanoseconds of real time.
pub fn format(words: &[AtomicU64], cores: usize, origin: u64) {
    store(words, 1, cores as u64);
    store(words, ORIGIN_WORD, origin);
    store(words, 0, MAGIC);
}

/// Turns points on and others off.
pub fn set_mask(words: &[AtomicU64], mask: u64) {
    store(words, MASK_WORD, mask & all_points());
}

/// The points that are on.
pub fn mask(words: &[AtomicU64]) -> u64 {
    load(words, MASK_WORD)
}

/// What happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Nanoseconds since the origin.
    pub ns: u64,
    /// The point's number.
    pub point: u8,
    /// The device's id.
    pub device: u32,
    /// The queue.
    pub queue: u16,
    /// What the point tells.
    pub args: [u64; 2],
}

/// Where one core writes.
#[derive(Clone, Copy, Debug)]
pub struct CoreTrace {
    mask: &'static AtomicU64,
    core: &'static [AtomicU64],
}

impl CoreTrace {
    /// The ring of a core; `None` if the memory is too small.
    pub fn new(words: &'static [AtomicU64], core: usize) -> Option<CoreTrace> {
        let from = PAGE.checked_add(core.checked_mul(CORE)?)?;
        Some(CoreTrace {
            mask: words.get(MASK_WORD)?,
            core: words.get(from..from.checked_add(CORE)?)?,
        })
    }

    /// Whether a point is on.
    #[inline]
    pub fn on(&self, point: Point) -> bool {
        self.mask.load(Ordering::Relaxed) & (1 << point as u8) != 0
    }

    /// Writes a record down; the oldest one is lost.
    #[cold]
    pub fn write(&self, point: Point, record: &Record) {
        let number = load(self.core, DONE_WORD);
        let next = number.wrapping_add(1);
        store(self.core, BEGUN_WORD, next);
        // Pairs with the fence in `Traces::records`: who sees any of what follows sees that the old record is spoilt.
        fence(Ordering::Release);
        let at = PAGE + (number % RECORDS as u64) as usize * RECORD;
        let place =
            u64::from(point as u8) | u64::from(record.queue) << 16 | u64::from(record.device) << 32;
        store(self.core, at, record.ns);
        store(self.core, at + 1, place);
        store(self.core, at + 2, record.args[0]);
        store(self.core, at + 3, record.args[1]);
        if let Some(done) = self.core.get(DONE_WORD) {
            done.store(next, Ordering::Release);
        }
    }
}

#[cfg(all(feature = "std", not(loom)))]
mod mapping;
#[cfg(all(feature = "std", not(loom)))]
pub use mapping::Traces;

#[cfg(all(test, feature = "std", not(loom)))]
mod tests;
