//! Tables of live objects that are named by index and generation, never by address.
//!
//! A backend keeps its inodes, open files and lock owners in a [`Table`]. The table owns one optional file descriptor per
//! record and guarantees two things: an id that was never given out, or whose object is gone, is refused; and a
//! descriptor is retired only when nobody uses it. It makes no system calls and, once built, never allocates: slots begin
//! zeroed, so those that are never used cost no memory.
//!
//! # How it works
//!
//! Everything that must change together is in one 64-bit word per slot: generation, flags, descriptor, number of pins.
//! [`Table::pin`] compares the generation and adds a pin in one step, so a reader needs no lock and can never meet a slot
//! that has changed hands. While a record is pinned neither the slot nor the descriptor can go away; whoever drops the last
//! pin does what was put off meanwhile, that is frees a killed slot or retires a descriptor that [`Pinned::chill`] has
//! asked for.
//!
//! # After a crash
//!
//! Slots may lie in recovery memory. A later process takes the live ones over as they are: ids and records stay, pins and
//! descriptors are the dead process's and are dropped, and what links slots to each other is made anew. A slot that is not
//! alive gets the next generation, because ids of the present one may have been given out. A record is alive from the store
//! in [`Vacant::publish`] on, and dead from the one in [`Pinned::kill`] on; nothing in between.
//!
//! Records can be found by a key through chained buckets ([`Table::lock`]). A chain changes only under the lock of its
//! shard, and a record is killed only after it has left its chain, so what a chain holds is alive.

use core::marker::PhantomData;
use core::sync::atomic::AtomicU32;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

use spin::mutex::{SpinMutex, SpinMutexGuard};
use zerocopy::FromBytes;

use crate::recovery::placed::Placed;

/// What a table holds. Any bytes must be a valid record, and zeroes an empty one.
pub trait Record: FromBytes {
    /// Called with a record's descriptor when nothing uses it any more.
    fn retire(&self, fd: i32);
}

/// Why an id was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// The table has never given out such an id.
    Never,
    /// The object that it named is gone.
    Gone,
    /// More users at once than can be counted.
    Busy,
}

const PIN: u64 = 1;
const PINS: u64 = 0xffff;
const FD_SHIFT: u32 = 16;
/// The descriptor plus one, so that 0 stands for none.
const FD: u64 = 0xff_ffff << FD_SHIFT;
const RECENT: u64 = 1 << 40;
const LIVE: u64 = 1 << 41;
const CHILL: u64 = 1 << 42;
const GENERATION_SHIFT: u32 = 43;
const GENERATION: u64 = !0 << GENERATION_SHIFT;

/// The first descriptor number that a table cannot hold.
pub const FD_LIMIT: i32 = 0xff_ffff - 1;

const SHARDS: usize = 64;

/// A lock on its own cache line: cores that take different ones must not disturb each other.
#[repr(align(64))]
struct ShardLock(SpinMutex<()>);

fn fd_of(state: u64) -> Option<i32> {
    let plus_one = (state & FD) >> FD_SHIFT;
    i32::try_from(plus_one)
        .ok()?
        .checked_sub(1)
        .filter(|&fd| fd >= 0)
}

fn fd_bits(fd: Option<i32>) -> u64 {
    match fd {
        Some(fd) if (0..FD_LIMIT).contains(&fd) => ((fd as u64).wrapping_add(1)) << FD_SHIFT,
        _ => 0,
    }
}

fn id_of(index: u32, state: u64) -> u64 {
    ((state >> GENERATION_SHIFT) << 32) | u64::from(index)
}

/// One place of a table, and what is needed to keep a table elsewhere than on the heap.
#[derive(FromBytes)]
#[repr(C)]
pub struct Slot<R> {
    state: AtomicU64,
    /// Next in the bucket's chain; 0 ends it.
    chain: AtomicU32,
    /// Next free slot; 0 ends the list.
    free: AtomicU32,
    record: R,
}

/// A table with a fixed number of slots. Ids are never 0; the first one given out is 1.
pub struct Table<R> {
    /// The first one is never given out; its `chain` says how many were ever used, for the process that comes after.
    slots: Placed<Slot<R>>,
    buckets: Placed<AtomicU32>,
    shards: [ShardLock; SHARDS],
    /// Head of the list of freed slots, with a counter above it that defeats ABA.
    free: AtomicU64,
    /// The first slot that was never used.
    fresh: AtomicU32,
    live: AtomicU32,
}

impl<R: Record> Table<R> {
    /// A table for `capacity` records, with `buckets` chains to find them by (at least one).
    pub fn new(capacity: u32, buckets: u32) -> Option<Table<R>> {
        Table::over(Placed::on_heap(Table::<R>::slots(capacity)?)?, buckets)
    }

    /// How many slots a table for `capacity` records has.
    pub fn slots(capacity: u32) -> Option<usize> {
        usize::try_from(capacity).ok()?.checked_add(1)
    }

    /// A table over these slots, with what is alive in them; it is in no chain yet, see [`Table::relink`].
    pub fn over(slots: Placed<Slot<R>>, buckets: u32) -> Option<Table<R>> {
        let buckets = usize::try_from(buckets.max(1)).ok()?;
        let table = Table {
            slots,
            buckets: Placed::on_heap(buckets)?,
            shards: [const { ShardLock(SpinMutex::new(())) }; SHARDS],
            free: AtomicU64::new(0),
            fresh: AtomicU32::new(1),
            live: AtomicU32::new(0),
        };
        table.take_over();
        Some(table)
    }

    fn take_over(&self) {
        let used = self.slots.first().map_or(0, |s| s.chain.load(Relaxed));
        let limit = u32::try_from(self.slots.len()).unwrap_or(u32::MAX);
        let used = used.clamp(1, limit.max(1));
        // The lowest free index is given out first.
        for index in (1..used).rev() {
            let Some(slot) = self.slot(index) else {
                continue;
            };
            let state = slot.state.load(Relaxed);
            slot.chain.store(0, Relaxed);
            if state & LIVE != 0 {
                slot.state.store(state & (GENERATION | LIVE), Relaxed);
                self.live.fetch_add(1, Relaxed);
            } else {
                let next = (state & GENERATION).wrapping_add(1 << GENERATION_SHIFT);
                slot.state.store(next, Relaxed);
                self.push_free(index);
            }
        }
        self.fresh.store(used, Release);
    }

    /// Puts every live record for which `hash` has an answer into the chain of that hash.
    pub fn relink(&self, mut hash: impl FnMut(&R) -> Option<u64>) {
        for index in self.indexes() {
            if let Some(pin) = self.pin_index(index)
                && let Some(hash) = hash(pin.record())
            {
                self.lock(hash).link(&pin);
            }
        }
    }

    /// How many records are alive.
    pub fn live(&self) -> u32 {
        self.live.load(Relaxed)
    }

    fn slot(&self, index: u32) -> Option<&Slot<R>> {
        self.slots.get(index as usize)
    }

    /// Takes a slot that nobody else knows of, to be filled and published; `None` when the table is full.
    pub fn reserve(&self) -> Option<Vacant<'_, R>> {
        let index = self.pop_free().or_else(|| self.take_fresh())?;
        let slot = self.slot(index)?;
        Some(Vacant {
            table: self,
            slot,
            index,
        })
    }

    fn take_fresh(&self) -> Option<u32> {
        let limit = self.slots.len();
        let more = |n: u32| ((n as usize) < limit).then(|| n.wrapping_add(1));
        let index = self.fresh.try_update(AcqRel, Relaxed, more).ok()?;
        // Before the slot can come alive, so that the process that comes after looks at it.
        let used = &self.slots.first()?.chain;
        used.fetch_max(index.wrapping_add(1), Relaxed);
        Some(index)
    }

    fn pop_free(&self) -> Option<u32> {
        let mut head = self.free.load(Acquire);
        loop {
            let index = head as u32;
            let slot = self.slot(index).filter(|_| index != 0)?;
            let next = u64::from(slot.free.load(Relaxed));
            let tag = (head >> 32).wrapping_add(1) << 32;
            match self
                .free
                .compare_exchange_weak(head, tag | next, AcqRel, Acquire)
            {
                Ok(_) => return Some(index),
                Err(now) => head = now,
            }
        }
    }

    fn push_free(&self, index: u32) {
        let Some(slot) = self.slot(index) else { return };
        let mut head = self.free.load(Acquire);
        loop {
            slot.free.store(head as u32, Relaxed);
            let tag = (head >> 32).wrapping_add(1) << 32;
            let new = tag | u64::from(index);
            match self.free.compare_exchange_weak(head, new, AcqRel, Acquire) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }

    /// Pins a record: it and its descriptor stay until the result is dropped.
    pub fn pin(&self, id: u64) -> Result<Pinned<'_, R>, Missing> {
        self.pin_with(id, RECENT)
    }

    /// As [`Table::pin`], without counting as a use for [`Table::probe`].
    pub fn pin_quietly(&self, id: u64) -> Result<Pinned<'_, R>, Missing> {
        self.pin_with(id, 0)
    }

    fn pin_with(&self, id: u64, mark: u64) -> Result<Pinned<'_, R>, Missing> {
        let index = id as u32;
        if index == 0 || index >= self.fresh.load(Relaxed) {
            return Err(Missing::Never);
        }
        let slot = self.slot(index).ok_or(Missing::Never)?;
        let mut state = slot.state.load(Relaxed);
        loop {
            if state & LIVE == 0 || id_of(index, state) != id {
                return Err(Missing::Gone);
            }
            if state & PINS == PINS {
                return Err(Missing::Busy);
            }
            let new = state.wrapping_add(PIN) | mark;
            // Pairs with the release in `publish`: the record's fields are seen as they were filled in.
            match slot
                .state
                .compare_exchange_weak(state, new, AcqRel, Relaxed)
            {
                Ok(_) => break,
                Err(now) => state = now,
            }
        }
        Ok(Pinned {
            table: self,
            slot,
            index,
            id,
        })
    }

    /// Pins whatever lives in slot `index`, for sweeps; `None` when nothing does.
    pub fn pin_index(&self, index: u32) -> Option<Pinned<'_, R>> {
        let state = self.slot(index)?.state.load(Relaxed);
        self.pin_quietly(id_of(index, state)).ok()
    }

    /// One past the highest index ever used, for sweeps.
    pub fn indexes(&self) -> core::ops::Range<u32> {
        1..self.fresh.load(Acquire)
    }

    /// Drops a pin that was kept with [`Pinned::keep`]. An id that is not pinned is ignored.
    pub fn unpin(&self, id: u64) {
        let index = id as u32;
        let Some(slot) = self.slot(index) else { return };
        let state = slot.state.load(Relaxed);
        if state & PINS != 0 && id_of(index, state) == id {
            self.drop_pin(slot, index);
        }
    }

    fn drop_pin(&self, slot: &Slot<R>, index: u32) {
        let mut state = slot.state.load(Relaxed);
        loop {
            let last = state & PINS == PIN;
            let dead = last && state & LIVE == 0;
            let new = if dead {
                // The next life of the slot has the next generation, and nothing else.
                (state & GENERATION).wrapping_add(1 << GENERATION_SHIFT)
            } else if last && state & CHILL != 0 {
                state.wrapping_sub(PIN) & !(FD | CHILL)
            } else {
                state.wrapping_sub(PIN)
            };
            match slot
                .state
                .compare_exchange_weak(state, new, AcqRel, Relaxed)
            {
                Ok(_) => {
                    if let Some(fd) = fd_of(state).filter(|_| new & FD == 0) {
                        slot.record.retire(fd);
                    }
                    if dead {
                        self.live.fetch_sub(1, Relaxed);
                        self.push_free(index);
                    }
                    return;
                }
                Err(now) => state = now,
            }
        }
    }

    /// Looks at a record's descriptor for a clock that decides which one to retire; forgets a recent use.
    pub fn probe(&self, id: u64) -> Probe {
        let index = id as u32;
        let Some(slot) = self.slot(index) else {
            return Probe::Cold;
        };
        let state = slot.state.load(Relaxed);
        if state & LIVE == 0 || id_of(index, state) != id || state & FD == 0 || state & CHILL != 0 {
            return Probe::Cold;
        }
        if state & PINS != 0 {
            return Probe::InUse;
        }
        if state & RECENT != 0 {
            // Losing the race leaves the mark, which costs one more turn of the clock.
            let _ = slot
                .state
                .compare_exchange(state, state & !RECENT, AcqRel, Relaxed);
            return Probe::InUse;
        }
        Probe::Idle
    }

    /// Locks the chain that records with this hash are in.
    pub fn lock(&self, hash: u64) -> Shard<'_, R> {
        let bucket = (hash % self.buckets.len().max(1) as u64) as usize;
        Shard {
            table: self,
            bucket,
            _guard: self.shards[bucket % SHARDS].0.lock(),
        }
    }
}

/// What [`Table::probe`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// No such record, or one without a descriptor to retire.
    Cold,
    /// In use, or used since the last look.
    InUse,
    /// Not used since the last look.
    Idle,
}

/// A slot between [`Table::reserve`] and [`Vacant::publish`]; goes back when dropped.
pub struct Vacant<'a, R: Record> {
    table: &'a Table<R>,
    slot: &'a Slot<R>,
    index: u32,
}

impl<'a, R: Record> Vacant<'a, R> {
    /// Its index, which no live record has.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// The record to fill; it may hold what its last owner left.
    pub fn record(&self) -> &'a R {
        &self.slot.record
    }

    /// Makes the record alive. The descriptor belongs to the table from now on; one at or above [`FD_LIMIT`] must not be
    /// given.
    pub fn publish(self, fd: Option<i32>) -> Pinned<'a, R> {
        let (table, slot, index) = (self.table, self.slot, self.index);
        core::mem::forget(self);
        let generation = slot.state.load(Relaxed) & GENERATION;
        table.live.fetch_add(1, Relaxed);
        slot.chain.store(0, Relaxed);
        let state = generation | LIVE | fd_bits(fd) | PIN;
        slot.state.store(state, Release);
        Pinned {
            table,
            slot,
            index,
            id: id_of(index, state),
        }
    }
}

impl<R: Record> Drop for Vacant<'_, R> {
    fn drop(&mut self) {
        self.table.push_free(self.index);
    }
}

/// A record that cannot go away.
pub struct Pinned<'a, R: Record> {
    table: &'a Table<R>,
    slot: &'a Slot<R>,
    index: u32,
    id: u64,
}

impl<'a, R: Record> Pinned<'a, R> {
    /// Its id.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Its index, which no other live record has.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// The record.
    pub fn record(&self) -> &'a R {
        &self.slot.record
    }

    /// Its descriptor, which stays open as long as this pin.
    pub fn fd(&self) -> Option<i32> {
        fd_of(self.slot.state.load(Acquire))
    }

    /// Gives the record a descriptor; `false` when it has one already, and the caller keeps the new one.
    pub fn install(&self, fd: i32) -> bool {
        let bits = fd_bits(Some(fd));
        if bits == 0 {
            return false;
        }
        self.slot
            .state
            .try_update(AcqRel, Relaxed, |s| {
                (s & FD == 0).then_some((s & !CHILL) | bits)
            })
            .is_ok()
    }

    /// Asks for the descriptor to be retired when the last pin is dropped.
    pub fn chill(&self) {
        self.slot.state.fetch_or(CHILL, AcqRel);
    }

    /// Ends the record: its id is refused from now on, and the slot is freed when the last pin is dropped. A record that
    /// is in a chain must be taken out of it first, see [`Shard::remove`]. `false` when somebody else did so already.
    pub fn kill(&self) -> bool {
        self.slot.state.fetch_and(!LIVE, AcqRel) & LIVE != 0
    }

    /// Ends the record as [`Pinned::kill`] does and gives its descriptor to the caller, if nobody else has pinned it; if
    /// somebody has, or there is no descriptor, nothing changes.
    pub fn kill_sole(&self) -> Option<i32> {
        let alone = |s: u64| {
            let sole = s & LIVE != 0 && s & PINS == PIN && s & FD != 0;
            sole.then_some(s & !(LIVE | FD | CHILL))
        };
        let before = self.slot.state.try_update(AcqRel, Relaxed, alone);
        before.ok().and_then(fd_of)
    }

    /// Whether it has not been ended, see [`Pinned::kill`].
    pub fn is_alive(&self) -> bool {
        self.slot.state.load(Acquire) & LIVE != 0
    }

    /// Whether this is the only pin. Only a hint, unless all pins are taken under a lock that the caller holds.
    pub fn is_sole(&self) -> bool {
        self.slot.state.load(Acquire) & PINS == PIN
    }

    /// Keeps the pin beyond this value, until [`Table::unpin`] with the returned id.
    pub fn keep(self) -> u64 {
        let id = self.id;
        core::mem::forget(self);
        id
    }
}

impl<R: Record> Drop for Pinned<'_, R> {
    fn drop(&mut self) {
        self.table.drop_pin(self.slot, self.index);
    }
}

/// One chain, locked. Must not be held over anything that can wait.
pub struct Shard<'a, R> {
    table: &'a Table<R>,
    bucket: usize,
    _guard: SpinMutexGuard<'a, ()>,
}

/// A record in a locked chain: alive for as long as the lock is held.
pub struct Linked<'s, 'a, R> {
    _locked: PhantomData<&'s ()>,
    table: &'a Table<R>,
    slot: &'a Slot<R>,
    index: u32,
}

impl<'a, R: Record> Shard<'a, R> {
    fn head(&self) -> &'a AtomicU32 {
        &self.table.buckets[self.bucket]
    }

    /// The first record that `wanted` accepts.
    pub fn find(&self, mut wanted: impl FnMut(&R) -> bool) -> Option<Linked<'_, 'a, R>> {
        let mut index = self.head().load(Relaxed);
        while index != 0 {
            let slot = self.table.slot(index)?;
            if wanted(&slot.record) {
                return Some(Linked {
                    _locked: PhantomData,
                    table: self.table,
                    slot,
                    index,
                });
            }
            index = slot.chain.load(Relaxed);
        }
        None
    }

    /// Adds a record that is in no chain.
    pub fn link(&self, pinned: &Pinned<'_, R>) {
        pinned.slot.chain.store(self.head().load(Relaxed), Relaxed);
        self.head().store(pinned.index, Relaxed);
    }

    /// Takes a record out of the chain; `false` when it is not in it.
    pub fn unlink(&self, pinned: &Pinned<'_, R>) -> bool {
        let mut at = self.head();
        loop {
            let index = at.load(Relaxed);
            let Some(slot) = self.table.slot(index).filter(|_| index != 0) else {
                return false;
            };
            if index == pinned.index {
                at.store(slot.chain.load(Relaxed), Relaxed);
                return true;
            }
            at = &slot.chain;
        }
    }

    /// Takes a record out of the chain and ends it.
    pub fn remove(&self, pinned: &Pinned<'_, R>) -> bool {
        self.unlink(pinned);
        pinned.kill()
    }
}

impl<'a, R: Record> Linked<'_, 'a, R> {
    /// The record.
    pub fn record(&self) -> &'a R {
        &self.slot.record
    }

    /// Its id.
    pub fn id(&self) -> u64 {
        id_of(self.index, self.slot.state.load(Relaxed))
    }

    /// Whether it has a descriptor now.
    pub fn has_fd(&self) -> bool {
        self.slot.state.load(Acquire) & FD != 0
    }

    /// Pins it, so that it outlives the lock.
    pub fn pin(&self) -> Result<Pinned<'a, R>, Missing> {
        self.table.pin(self.id())
    }

    /// Counts as a use for [`Table::probe`].
    pub fn mark_recent(&self) {
        if self.slot.state.load(Relaxed) & RECENT == 0 {
            self.slot.state.fetch_or(RECENT, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests;
