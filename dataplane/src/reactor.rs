//! One core's work: poll the queues, run what they hold, answer.
//!
//! [`Reactor::turn`] is the life of a request in order. The reactor is called by its core only, never blocks, and never
//! allocates once its queues are started; system calls, time and other threads are behind [`System`], so the same code runs
//! pinned on a core, in a fuzzer and in a simulation.
//!
//! # What a request costs
//!
//! Instructions of a GETATTR on the `null` file system, four buffers in an indirect table of a split ring, counted with
//! callgrind (`tools/instructions` holds every operation to its budget):
//!
//! | part | instructions | what is left of it |
//! | --- | --- | --- |
//! | taking from the ring (`Queue::pop`) | 850 | 506 for the table, read and translated in one pass; the rest looks ahead, to hide cache misses |
//! | copying in (`take_in`), the turn's own work | 260 | the copy from two buffers; one publication a turn |
//! | finding slot, buffers, queue and device (`get_buffers`, `run`) | 310 | each step finds them again, which keeps every access checked |
//! | parsing, running, replying (`dispatch::execute`) | 460 | 130 for a reply that the guest may have scattered; decoded operations are moved twice |
//! | giving back (`release`) | 120 | one entry in the used ring |
//!
//! Time is not counted for each request: the clock is read when a queue's requests are taken, and when all of a turn are
//! answered, which is when the guest sees them.
//!
//! Instructions are not time: most of the latter goes to cache lines that the guest's processor has just written, which is
//! why requests are fetched before they are popped (`SplitRing::look_ahead`).

mod queues;
mod request;
mod world;

use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

pub use world::{Backend, DeviceShared, Interrupted, Job, System};

use ferry_shared::counters::{CoreCounters, Finished, QueuePlace};
use ferry_shared::trace::{CoreTrace, Point, Record};

use crate::id::{DeviceId, QueueIdx, QueueKind};
use crate::mem::GuestMap;
use crate::pool::{DataPool, Slab};
use crate::slot::{SlotBody, SlotMeta};
use crate::virtio::queue::Queue;

/// Requests that one queue may start in a turn before the next queue's turn.
const BUDGET: u32 = 32;
/// Answered requests that are counted together.
const FINISHED: usize = 64;
/// INTERRUPTs remembered that came before the request that they mean.
const EARLY_INTERRUPTS: usize = 64;

/// A device as one core sees it.
struct CoreDevice<B> {
    id: DeviceId,
    shared: Arc<DeviceShared<B>>,
    backend: Option<Arc<B>>,
    epoch: u32,
    /// The map that replaces the present one as soon as nothing in flight uses that.
    next_map: Option<Arc<GuestMap>>,
    /// How often a new map was asked for since the last was put into use; each wants its report.
    maps_asked: u32,
    /// The last seen value of the backend's lock epoch.
    lock_epoch: u64,
}

impl<B: Backend> CoreDevice<B> {
    fn refresh(&mut self) {
        // Acquire: pairs with the Release in `DeviceShared::set_backend`.
        let epoch = self.shared.epoch.load(Ordering::Acquire);
        if epoch != self.epoch {
            self.backend = self.shared.backend();
            self.epoch = epoch;
        }
    }
}

/// How a queue ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// Not at all: it runs.
    Runs,
    /// What is in flight is completed first.
    Stop,
    /// What waits is dropped.
    Reset,
}

/// A queue in the hands of this core.
struct RunQueue<C> {
    device: DeviceId,
    /// Where the device is among the core's.
    place: usize,
    index: QueueIdx,
    kind: QueueKind,
    queue: Queue,
    call: Option<C>,
    ending: Ending,
    /// Requests that hold a slot.
    in_flight: u32,
    /// Those of them that may touch guest memory at any moment: on the ring or on the helper thread.
    touching: u32,
    /// Something was given back since the last publication.
    dirty: bool,
}

/// Everything a core needs to begin serving a queue.
pub struct StartQueue<B, C> {
    /// The device.
    pub device: DeviceId,
    /// Which of its queues.
    pub index: QueueIdx,
    /// What travels on it.
    pub kind: QueueKind,
    /// The queue, checked against the map.
    pub queue: Queue,
    /// Interrupts the driver.
    pub call: Option<C>,
    /// What the cores share of the device.
    pub shared: Arc<DeviceShared<B>>,
    /// The queue as the counters name it.
    pub place: QueuePlace,
}

/// Counters of one core, for its operator; written by the core only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Requests taken from queues.
    pub requests: u64,
    /// Data buffers taken from the pool.
    pub buffers: u64,
    /// Times that a request found no data buffer and waited.
    pub buffer_waits: u64,
    /// Times that a queue was left alone because no slot was free.
    pub slot_waits: u64,
    /// Slots that are free.
    pub free_slots: u64,
    /// Data buffers that are free.
    pub free_buffers: u64,
}

/// One core's queues, slots and buffers.
pub struct Reactor<B, S: System<B>> {
    devices: Vec<CoreDevice<B>>,
    queues: Vec<Option<RunQueue<S::Call>>>,
    bodies: Slab<SlotBody>,
    slots: Vec<SlotMeta>,
    free: Vec<u32>,
    pool: DataPool,
    /// Requests that wait for data buffers, oldest first.
    need_buffers: VecDeque<u32>,
    /// Requests that wait for room on the ring, oldest first.
    unsubmitted: VecDeque<u32>,
    /// SETLKW requests that wait for a lock.
    waiting: Vec<u32>,
    early_interrupts: heapless::Deque<Interrupted, EARLY_INTERRUPTS>,
    counters: Counters,
    /// Requests that are answered but not counted yet: device and queue, when it began, and what it was.
    finished: heapless::Vec<(DeviceId, u32, u64, Finished), FINISHED>,
    /// Where finished requests are counted for others to see.
    count_in: Option<CoreCounters>,
    /// Where traces are written.
    trace: Option<CoreTrace>,
}

impl<B: Backend, S: System<B>> Reactor<B, S> {
    /// A core with its memory. `queues` is the most that it will serve at a time.
    pub fn new(bodies: Slab<SlotBody>, pool: DataPool, queues: usize) -> Self {
        let n = bodies.len();
        let cap = n as usize;
        Reactor {
            devices: Vec::with_capacity(queues),
            queues: Vec::with_capacity(queues),
            slots: (0..n).map(|_| SlotMeta::free()).collect(),
            free: (0..n).rev().collect(),
            bodies,
            pool,
            need_buffers: VecDeque::with_capacity(cap),
            unsubmitted: VecDeque::with_capacity(cap),
            waiting: Vec::with_capacity(cap),
            early_interrupts: heapless::Deque::new(),
            counters: Counters::default(),
            finished: heapless::Vec::new(),
            count_in: None,
            trace: None,
        }
    }

    /// Counts finished requests there from now on.
    pub fn count_in(&mut self, counters: CoreCounters) {
        self.count_in = Some(counters);
    }

    /// Traces there from now on.
    pub fn trace_in(&mut self, trace: CoreTrace) {
        self.trace = Some(trace);
    }

    /// Writes a trace record about the queue at `at`, if the point is on.
    #[inline]
    fn trace(&self, point: Point, at: u32, args: [u64; 2], sys: &S) {
        if let Some(trace) = &self.trace
            && trace.on(point)
        {
            let queue = self.queues.get(at as usize).and_then(Option::as_ref);
            let record = Record {
                ns: sys.now(),
                device: queue.map_or(0, |q| q.device.0),
                queue: queue.map_or(0, |q| q.index.0),
                args,
                ..Record::default()
            };
            trace.write(point, &record);
        }
    }

    /// The same about the request in a slot, by its FUSE number.
    #[inline]
    fn trace_slot(&self, point: Point, slot: u32, arg: u64, sys: &S) {
        if self.trace.as_ref().is_some_and(|trace| trace.on(point))
            && let Some(meta) = self.slots.get(slot as usize)
        {
            self.trace(point, meta.queue, [meta.unique, arg], sys);
        }
    }

    /// The counters.
    pub fn counters(&self) -> Counters {
        Counters {
            free_slots: self.free.len() as u64,
            free_buffers: self.pool.available() as u64,
            ..self.counters
        }
    }

    /// Whether a request is on the ring, so that completions are to be looked for.
    pub fn has_unsubmitted(&self) -> bool {
        !self.unsubmitted.is_empty()
    }

    /// Whether a SETLKW request waits, so that the core must not sleep for long.
    pub fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// One round over everything; returns whether there was something to do.
    pub fn turn(&mut self, sys: &mut S) -> bool {
        let mut worked = self.retry(sys);
        let queues = u32::try_from(self.queues.len()).unwrap_or(u32::MAX);
        for at in 0..queues {
            worked |= self.serve(at, sys);
        }
        self.count_finished(sys);
        for at in 0..queues {
            self.publish(at, sys);
        }
        worked
    }

    /// Asks all drivers for notifications; `false` when there is work already, and the core must not sleep.
    pub fn arm(&mut self) -> bool {
        let mut quiet = true;
        let slots = !self.free.is_empty();
        for q in self.queues.iter_mut().flatten() {
            if q.ending == Ending::Runs && q.kind != QueueKind::Notification {
                quiet &= !(q.queue.enable_kicks() && slots);
            }
        }
        quiet
    }

    /// Tells all drivers to save their notifications.
    pub fn disarm(&mut self) {
        for q in self.queues.iter_mut().flatten() {
            q.queue.disable_kicks();
        }
    }

    fn find(&self, device: DeviceId, index: QueueIdx) -> Option<u32> {
        let at = self.queues.iter().position(|q| {
            q.as_ref()
                .is_some_and(|q| q.device == device && q.index == index)
        })?;
        u32::try_from(at).ok()
    }

    fn queue_mut(&mut self, at: u32) -> Option<&mut RunQueue<S::Call>> {
        self.queues.get_mut(at as usize)?.as_mut()
    }

    fn meta(&mut self, slot: u32) -> Option<&mut SlotMeta> {
        self.slots.get_mut(slot as usize)
    }
}

#[cfg(test)]
mod tests;
