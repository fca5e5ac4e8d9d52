//! Deadlocks between lock owners that wait for one another.
//!
//! The host's kernel keeps the guests' locks as those of open file descriptions, among which it looks for no deadlock. So
//! the requests that wait are kept here, for all devices of the process, and one that would close a circle gets
//! `EDEADLK`, as Linux does it among the processes of one machine. What an owner holds is asked of the kernel, and only
//! while somebody waits already: an uncontended lock never comes here.
//!
//! Processes of the host take no part: nothing says what they wait for.

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use ferry_shared::errno::Errno;
use heapless::Vec as Bounded;

use super::lock::Locks;
use super::sys::{FileId, RangeLock};

/// Requests whose waiting is known; one beyond them waits unnoticed.
const MAX_WAITS: usize = 1024;
/// Owners that one search looks at; a longer circle is not found.
const MAX_OWNERS: usize = 64;
/// Devices that it looks at.
const MAX_DEVICES: usize = 512;

/// A lock owner of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Party {
    device: u64,
    owner: u64,
}

/// What somebody wants to lock.
#[derive(Clone, Copy, Debug)]
struct Wish {
    party: Party,
    file: FileId,
    lock: RangeLock,
}

/// A request that waits.
#[derive(Clone, Copy, Debug)]
struct Wait {
    unique: u64,
    wish: Wish,
    /// [`TAKEN`] when a circle was looked for.
    searched: u64,
}

struct Graph {
    waits: Bounded<Wait, MAX_WAITS>,
    devices: Vec<Weak<Locks>>,
}

static GRAPH: Mutex<Graph> = Mutex::new(Graph {
    waits: Bounded::new(),
    devices: Vec::new(),
});

/// How many requests wait.
static WAITING: AtomicU64 = AtomicU64::new(0);

/// Counts the locks that were taken while somebody waited: each may have closed a circle.
static TAKEN: AtomicU64 = AtomicU64::new(0);

fn graph() -> MutexGuard<'static, Graph> {
    GRAPH.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lets a device's owners be found.
pub(super) fn enlist(locks: &Arc<Locks>) {
    let mut graph = graph();
    graph.devices.retain(|device| device.strong_count() > 0);
    graph.devices.push(Arc::downgrade(locks));
}

/// Says that an owner has got a lock.
pub(super) fn taken() {
    if WAITING.load(Acquire) != 0 {
        TAKEN.fetch_add(1, AcqRel);
    }
}

/// Request `unique` of a device waits for a lock; `EDEADLK` when it would wait for itself.
pub(super) fn wait(
    device: &Locks,
    owner: u64,
    unique: u64,
    file: FileId,
    lock: RangeLock,
) -> Result<(), Errno> {
    let device = device.number();
    let party = Party { device, owner };
    let wish = Wish { party, file, lock };
    let taken = TAKEN.load(Acquire);
    let mut graph = graph();
    let known = graph
        .waits
        .iter()
        .position(|wait| wait.wish.party.device == device && wait.unique == unique);
    if known.is_some_and(|at| graph.waits.get(at).is_some_and(|w| w.searched == taken)) {
        return Ok(());
    }
    // What was looked at is let go of after the graph: the last user of a table ends its owners.
    let (circle, _held) = graph.closes_circle(&wish);
    if let Some(at) = known {
        graph.waits.swap_remove(at);
    }
    if !circle {
        // One too many waits unnoticed.
        let _ = graph.waits.push(Wait {
            unique,
            wish,
            searched: taken,
        });
    }
    graph.count();
    drop(graph);
    if circle { Err(Errno::EDEADLK) } else { Ok(()) }
}

/// Request `unique` of a device waits no longer.
pub(super) fn end(device: &Locks, unique: u64) {
    if WAITING.load(Relaxed) != 0 {
        let device = device.number();
        graph().keep(|wait| wait.wish.party.device != device || wait.unique != unique);
    }
}

/// No request of a device waits any longer.
pub(super) fn end_all(device: &Locks) {
    if WAITING.load(Relaxed) != 0 {
        let device = device.number();
        graph().keep(|wait| wait.wish.party.device != device);
    }
}

/// The devices that a search has looked at, to be let go of when the graph is free again.
type Held = Bounded<Arc<Locks>, MAX_DEVICES>;

impl Graph {
    fn count(&self) {
        WAITING.store(self.waits.len() as u64, Relaxed);
    }

    fn keep(&mut self, wanted: impl FnMut(&Wait) -> bool) {
        self.waits.retain(wanted);
        self.count();
    }

    /// Whether somebody in the way of this wish waits, perhaps through others, for who has it.
    fn closes_circle(&self, wish: &Wish) -> (bool, Held) {
        let mut held = Held::new();
        if self.waits.is_empty() {
            return (false, held);
        }
        for device in &self.devices {
            if let Some(locks) = device.upgrade() {
                // A device too many is not searched.
                let _ = held.push(locks);
            }
        }
        let mut seen: Bounded<Party, MAX_OWNERS> = Bounded::new();
        let mut open: Bounded<Wish, MAX_OWNERS> = Bounded::new();
        let _ = open.push(*wish);
        let mut circle = false;
        while let Some(next) = open.pop() {
            for locks in &held {
                let device = locks.number();
                locks.holders(next.file, &next.lock, |owner| {
                    let holder = Party { device, owner };
                    circle |= holder == wish.party && next.party != wish.party;
                    if holder == next.party || seen.contains(&holder) {
                        return;
                    }
                    let _ = seen.push(holder);
                    for wait in self.waits.iter().filter(|wait| wait.wish.party == holder) {
                        let _ = open.push(wait.wish);
                    }
                });
            }
            if circle {
                break;
            }
        }
        (circle, held)
    }
}
