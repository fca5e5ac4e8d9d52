//! What the cores count, in memory that the control plane can read.
//!
//! One block per core, written by that core only with plain loads and stores, so counting costs no synchronisation and
//! reading costs the writer nothing. A table at the beginning says which device counts in which place; the management
//! thread writes it. The data plane creates the memory, the control plane maps it read-only; a reader may see one
//! counter newer than another.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::limits;

/// Devices that are counted at a time: as many as there can be, since each has two queues at least.
pub const DEVICES: usize = limits::MAX_QUEUES_PER_SERVICE as usize / 2;
/// Queues that a core can serve at a time.
pub const QUEUES: usize = limits::MAX_QUEUES_PER_SERVICE as usize;
/// CPUs that a mask can name.
pub const MASK_CPUS: usize = 1024;
/// Operation codes with counters of their own; larger ones share the last.
pub const OPCODES: usize = 64;
/// Buckets of a latency histogram. Bucket `i` holds what took less than `2^(i + FIRST_BUCKET)` ns, the last one the rest.
pub const BUCKETS: usize = 28;
/// The exponent of the first bucket's limit.
pub const FIRST_BUCKET: u32 = 9;

const PAGE: usize = 4096 / 8;
const MAGIC: u64 = u64::from_le_bytes(*b"FerryCnt");
const NAME_WORDS: usize = 30;
/// Per device: its id, the length of its name, the name.
const ENTRY: usize = 2 + NAME_WORDS;
const TABLE: usize = PAGE;
const TABLE_WORDS: usize = (DEVICES * ENTRY).next_multiple_of(PAGE);
const CORES: usize = TABLE + TABLE_WORDS;
/// Per operation: requests, errors, sum of the latencies in ns, the histogram.
const OP: usize = 4 + BUCKETS;
const DEVICE: usize = 8 + OPCODES * OP;
const CORE: usize = (DEVICES_AT + DEVICES * DEVICE).next_multiple_of(PAGE);
/// Per queue: see [`QueueWord`], the mask of the CPUs that it may be served on, and the histogram of its latencies.
const QUEUE: usize = 64;
const QUEUES_AT: usize = PAGE;
const DEVICES_AT: usize = QUEUES_AT + (QUEUES * QUEUE).next_multiple_of(PAGE);
const MASK_WORDS: usize = MASK_CPUS / 64;

/// The words of a queue's entry.
#[derive(Clone, Copy)]
enum QueueWord {
    /// Its number among the threads; 0: there is no queue here.
    Thread,
    Device,
    Index,
    Requests,
    Rounds,
    /// What the core had counted when it was given the queue.
    Busy,
    Idle,
    CoreRequests,
    Turns,
    Errors,
    Read,
    Written,
    Nanos,
    SlotWaits,
    BufferWaits,
    Mask,
}

/// Where its histogram is.
const QUEUE_BUCKETS: usize = QueueWord::Mask as usize + MASK_WORDS;
const _: () = assert!(QUEUE_BUCKETS + BUCKETS <= QUEUE);

/// What a queue waits for when it cannot go on: back-pressure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueWait {
    /// A slot for its next request.
    Slot,
    /// Data buffers for a request.
    Buffers,
}

/// CPUs by their numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuSet([u64; MASK_WORDS]);

impl CpuSet {
    /// The set of these CPUs; numbers beyond [`MASK_CPUS`] are left out.
    pub fn of(cpus: impl IntoIterator<Item = u32>) -> CpuSet {
        let mut set = CpuSet::default();
        for cpu in cpus {
            if let Some(word) = set.0.get_mut(cpu as usize / 64) {
                *word |= 1 << (cpu % 64);
            }
        }
        set
    }

    /// Whether a CPU is in it.
    pub fn has(&self, cpu: u32) -> bool {
        let word = self.0.get(cpu as usize / 64);
        word.is_some_and(|word| word & (1 << (cpu % 64)) != 0)
    }
}

#[cfg(feature = "std")]
impl core::fmt::LowerHex for CpuSet {
    /// As a mask, without leading zeros.
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let digits: String = self
            .0
            .iter()
            .rev()
            .map(|word| format!("{word:016x}"))
            .collect();
        let digits = digits.trim_start_matches('0');
        f.write_str(if digits.is_empty() { "0" } else { digits })
    }
}

/// Bytes of the counters of so many cores.
pub const fn bytes(cores: usize) -> usize {
    (CORES + cores * CORE) * 8
}

/// What is counted of a core itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CoreCounter {
    /// Nanoseconds with work.
    Busy = 0,
    /// Nanoseconds without, asleep or polling.
    Idle = 1,
    /// Rounds over the queues.
    Turns = 2,
    /// Those of them that found work.
    BusyTurns = 3,
    /// Times that it slept.
    Sleeps = 4,
    /// Requests taken from queues.
    Requests = 5,
    /// Times that a request waited for data buffers.
    BufferWaits = 6,
    /// Times that a queue waited for a slot.
    SlotWaits = 7,
    /// The CPU that it is pinned to.
    Cpu = 8,
    /// The id of its thread.
    Thread = 9,
    /// Slots that it has.
    Slots = 10,
    /// Data buffers that it has.
    Buffers = 11,
    /// Data buffers taken from its pool.
    BufferTakes = 12,
    /// Slots that are free.
    FreeSlots = 13,
    /// Data buffers that are free.
    FreeBuffers = 14,
    /// Places of its queues that have been used so far.
    QueuePlaces = 15,
    /// Times that its thread gave the CPU up; written by the management thread, if it counts them.
    VoluntarySwitches = 16,
    /// Times that the CPU was taken from its thread; as above.
    InvoluntarySwitches = 17,
}

fn load(words: &[AtomicU64], at: usize) -> u64 {
    words.get(at).map_or(0, |word| word.load(Ordering::Relaxed))
}

fn store(words: &[AtomicU64], at: usize, value: u64) {
    if let Some(word) = words.get(at) {
        word.store(value, Ordering::Relaxed);
    }
}

/// There is one writer, so nothing is lost between the load and the store.
fn add(words: &[AtomicU64], at: usize, value: u64) {
    store(words, at, load(words, at).wrapping_add(value));
}

fn place(id: u32) -> usize {
    id as usize % DEVICES
}

/// The bucket of a latency in ns.
fn bucket(ns: u64) -> usize {
    let bits = u64::BITS.saturating_sub(ns.leading_zeros());
    (bits.saturating_sub(FIRST_BUCKET) as usize).min(BUCKETS - 1)
}

/// Writes the beginning of fresh memory for so many cores.
pub fn format(words: &[AtomicU64], cores: usize) {
    store(words, 1, cores as u64);
    store(words, 0, MAGIC);
}

/// Whether a device with this id would get a place of its own.
pub fn is_free(words: &[AtomicU64], id: u32) -> bool {
    load(words, TABLE + place(id) * ENTRY) == 0
}

/// Gives a device its place, if that is free, with all counters at zero. For the management thread, before any core
/// counts for the device. Ids begin with 1.
pub fn register(words: &[AtomicU64], id: u32, name: &str) {
    if !is_free(words, id) {
        return;
    }
    let cores = usize::try_from(load(words, 1)).unwrap_or(0);
    for core in 0..cores {
        let from = CORES + core * CORE + DEVICES_AT + place(id) * DEVICE;
        let used = words.get(from..from + DEVICE).unwrap_or_default();
        // What has never been written need not take up memory.
        let used = used.iter().filter(|word| word.load(Ordering::Relaxed) != 0);
        used.for_each(|word| word.store(0, Ordering::Relaxed));
    }
    let entry = TABLE + place(id) * ENTRY;
    let name = name.as_bytes();
    let length = name.len().min(NAME_WORDS * 8);
    for (at, part) in name.chunks(8).take(NAME_WORDS).enumerate() {
        let mut word = [0; 8];
        word.iter_mut().zip(part).for_each(|(to, from)| *to = *from);
        store(words, entry + 2 + at, u64::from_le_bytes(word));
    }
    store(words, entry + 1, length as u64);
    if let Some(word) = words.get(entry) {
        // Release: whoever sees the id sees the name.
        word.store(u64::from(id), Ordering::Release);
    }
}

/// Takes a device's place away; for the management thread, when no core serves the device any more.
pub fn unregister(words: &[AtomicU64], id: u32) {
    let entry = TABLE + place(id) * ENTRY;
    if load(words, entry) == u64::from(id) {
        store(words, entry, 0);
    }
}

/// Where one core counts.
#[derive(Clone, Copy, Debug)]
pub struct CoreCounters {
    table: &'static [AtomicU64],
    core: &'static [AtomicU64],
}

/// A queue that a core has been given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueuePlace {
    /// Its number among the threads; the cores have the first ones.
    pub thread: u32,
    /// The device's id.
    pub device: u32,
    /// Which of its queues.
    pub index: u16,
    /// CPUs that it may be served on.
    pub allowed: CpuSet,
}

/// One finished request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Finished {
    /// Its operation.
    pub opcode: u32,
    /// Whether it was answered with an error.
    pub error: bool,
    /// Bytes read by the guest.
    pub read: u64,
    /// Bytes written by the guest.
    pub written: u64,
    /// From being taken from the queue to being given back.
    pub ns: u64,
}

impl CoreCounters {
    /// The block of a core.
    pub fn new(words: &'static [AtomicU64], core: usize) -> CoreCounters {
        let from = CORES + core * CORE;
        CoreCounters {
            table: words.get(..CORES).unwrap_or_default(),
            core: words.get(from..from + CORE).unwrap_or_default(),
        }
    }

    /// Adds to a counter of the core.
    pub fn add(&self, counter: CoreCounter, value: u64) {
        add(self.core, counter as usize, value);
    }

    /// Sets a counter of the core.
    pub fn set(&self, counter: CoreCounter, value: u64) {
        store(self.core, counter as usize, value);
    }

    fn queue_word(&self, at: usize, word: QueueWord) -> usize {
        QUEUES_AT + at.min(QUEUES - 1) * QUEUE + word as usize
    }

    /// Takes note of a queue in the core's place `at`.
    pub fn queue_placed(&self, at: usize, place: &QueuePlace) {
        if at >= QUEUES {
            return;
        }
        let set = |word, value| store(self.core, self.queue_word(at, word), value);
        let own = |counter: CoreCounter| load(self.core, counter as usize);
        set(QueueWord::Device, u64::from(place.device));
        set(QueueWord::Index, u64::from(place.index));
        for word in [
            QueueWord::Requests,
            QueueWord::Rounds,
            QueueWord::Errors,
            QueueWord::Read,
            QueueWord::Written,
            QueueWord::Nanos,
            QueueWord::SlotWaits,
            QueueWord::BufferWaits,
        ] {
            set(word, 0);
        }
        let buckets = self.queue_word(at, QueueWord::Thread) + QUEUE_BUCKETS;
        (buckets..buckets + BUCKETS).for_each(|word| store(self.core, word, 0));
        set(QueueWord::Busy, own(CoreCounter::Busy));
        set(QueueWord::Idle, own(CoreCounter::Idle));
        set(QueueWord::CoreRequests, own(CoreCounter::Requests));
        set(QueueWord::Turns, own(CoreCounter::Turns));
        let mask = self.queue_word(at, QueueWord::Mask);
        for (word, value) in (mask..).zip(place.allowed.0) {
            store(self.core, word, value);
        }
        let places = own(CoreCounter::QueuePlaces).max(at as u64 + 1);
        store(self.core, CoreCounter::QueuePlaces as usize, places);
        if let Some(word) = self.core.get(self.queue_word(at, QueueWord::Thread)) {
            // Release: whoever sees the number sees the rest.
            word.store(u64::from(place.thread), Ordering::Release);
        }
    }

    /// Takes note of requests taken from the queue in place `at` in one round.
    pub fn queue_served(&self, at: usize, requests: u64) {
        add(
            self.core,
            self.queue_word(at, QueueWord::Requests),
            requests,
        );
        add(self.core, self.queue_word(at, QueueWord::Rounds), 1);
    }

    /// Takes note that the queue in place `at` has to wait.
    pub fn queue_waits(&self, at: usize, what: QueueWait) {
        let word = match what {
            QueueWait::Slot => QueueWord::SlotWaits,
            QueueWait::Buffers => QueueWord::BufferWaits,
        };
        add(self.core, self.queue_word(at, word), 1);
    }

    /// Takes note that the queue in place `at` has gone.
    pub fn queue_gone(&self, at: usize) {
        store(self.core, self.queue_word(at, QueueWord::Thread), 0);
    }

    /// Whether a device has a place.
    pub fn counts(&self, id: u32) -> bool {
        load(self.table, TABLE + place(id) * ENTRY) == u64::from(id)
    }

    /// Counts a request of a device that has a place, from the queue in place `at`.
    pub fn finished(&self, id: u32, at: usize, request: Finished) {
        let Finished {
            opcode,
            error,
            read,
            written,
            ns,
        } = request;
        let device = DEVICES_AT + place(id) * DEVICE;
        add(self.core, device, read);
        add(self.core, device + 1, written);
        let op = device + 8 + (opcode as usize).min(OPCODES - 1) * OP;
        add(self.core, op, 1);
        add(self.core, op + 1, u64::from(error));
        add(self.core, op + 2, ns);
        let bucket = bucket(ns);
        add(self.core, op + 4 + bucket, 1);
        let queue = self.queue_word(at, QueueWord::Thread);
        add(self.core, queue + QueueWord::Nanos as usize, ns);
        add(self.core, queue + QUEUE_BUCKETS + bucket, 1);
        for (word, value) in [
            (QueueWord::Errors, u64::from(error)),
            (QueueWord::Read, read),
            (QueueWord::Written, written),
        ] {
            if value > 0 {
                add(self.core, queue + word as usize, value);
            }
        }
    }
}

/// What has been counted of one operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpTotals {
    /// Requests.
    pub requests: u64,
    /// Those of them that were answered with an error.
    pub errors: u64,
    /// Sum of the latencies, in ns.
    pub ns: u64,
    /// The histogram of the latencies.
    pub buckets: [u64; BUCKETS],
}

/// A queue that a core serves. What the core counts of its own time is split among its queues by their requests.
#[cfg(feature = "std")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CountedQueue {
    /// Which one.
    pub place: QueuePlace,
    /// Requests taken from it here.
    pub requests: u64,
    /// What has been answered of them, whatever the operation.
    pub answered: OpTotals,
    /// Bytes read by the guest.
    pub read: u64,
    /// Bytes written by the guest.
    pub written: u64,
    /// Times that it waited for a slot.
    pub slot_waits: u64,
    /// Times that a request of it waited for data buffers.
    pub buffer_waits: u64,
    /// Rounds of the core that found requests in it.
    pub rounds: u64,
    /// Rounds of the core since it was given the queue.
    pub turns: u64,
    /// Nanoseconds of the core's work that are the queue's share, since it was given the queue.
    pub busy: u64,
    /// Other nanoseconds since then.
    pub idle: u64,
}

/// A device that is counted.
#[cfg(feature = "std")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counted {
    /// Its id, by which its counters are found.
    pub id: u32,
    /// Its name.
    pub name: String,
}

/// The counters, to read.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a>(&'a [AtomicU64]);

impl<'a> Reader<'a> {
    /// Checks that the memory holds counters.
    pub fn new(words: &'a [AtomicU64]) -> Option<Reader<'a>> {
        let reader = Reader(words);
        let fits = words.len().checked_mul(8)? == bytes(reader.cores());
        (load(words, 0) == MAGIC && fits).then_some(reader)
    }

    /// Number of cores.
    pub fn cores(&self) -> usize {
        // More than any machine has means that this is something else.
        usize::try_from(load(self.0, 1)).unwrap_or(0).min(1 << 16)
    }

    /// A counter of a core.
    pub fn core(&self, core: usize, counter: CoreCounter) -> u64 {
        load(self.0, CORES + core * CORE + counter as usize)
    }

    fn device_at(&self, core: usize, id: u32) -> usize {
        CORES + core * CORE + DEVICES_AT + place(id) * DEVICE
    }

    /// Bytes that a device's guest has read and written through a core.
    pub fn bytes(&self, core: usize, id: u32) -> (u64, u64) {
        let at = self.device_at(core, id);
        (load(self.0, at), load(self.0, at + 1))
    }

    /// What a core has counted of one operation of a device.
    pub fn op(&self, core: usize, id: u32, opcode: usize) -> OpTotals {
        let at = self.device_at(core, id) + 8 + opcode.min(OPCODES - 1) * OP;
        OpTotals {
            requests: load(self.0, at),
            errors: load(self.0, at + 1),
            ns: load(self.0, at + 2),
            buckets: core::array::from_fn(|bucket| load(self.0, at + 4 + bucket)),
        }
    }

    /// The queues that a core serves.
    #[cfg(feature = "std")]
    pub fn queues(&self, core: usize) -> Vec<CountedQueue> {
        let places = self.core(core, CoreCounter::QueuePlaces);
        let places = usize::try_from(places).unwrap_or(0).min(QUEUES);
        (0..places).filter_map(|at| self.queue(core, at)).collect()
    }

    #[cfg(feature = "std")]
    fn queue(&self, core: usize, at: usize) -> Option<CountedQueue> {
        let entry = CORES + core * CORE + QUEUES_AT + at * QUEUE;
        // Acquire: pairs with the Release in `queue_placed`.
        let thread = self.0.get(entry)?.load(Ordering::Acquire);
        let thread = u32::try_from(thread).ok().filter(|thread| *thread != 0)?;
        let word = |word: QueueWord| load(self.0, entry + word as usize);
        let since = |counter, before| self.core(core, counter).saturating_sub(word(before));
        let mask = entry + QueueWord::Mask as usize;
        let requests = word(QueueWord::Requests);
        let (busy, idle) = (
            since(CoreCounter::Busy, QueueWord::Busy),
            since(CoreCounter::Idle, QueueWord::Idle),
        );
        let of = since(CoreCounter::Requests, QueueWord::CoreRequests).max(requests);
        let share = u128::from(busy) * u128::from(requests) / u128::from(of.max(1));
        let share = u64::try_from(share).unwrap_or(busy);
        let buckets = entry + QUEUE_BUCKETS;
        let buckets = core::array::from_fn(|at| load(self.0, buckets + at));
        Some(CountedQueue {
            place: QueuePlace {
                thread,
                device: u32::try_from(word(QueueWord::Device)).unwrap_or(0),
                index: u16::try_from(word(QueueWord::Index)).unwrap_or(0),
                allowed: CpuSet(core::array::from_fn(|at| load(self.0, mask + at))),
            },
            requests,
            answered: OpTotals {
                requests: buckets
                    .iter()
                    .fold(0, |sum, count| sum.wrapping_add(*count)),
                errors: word(QueueWord::Errors),
                ns: word(QueueWord::Nanos),
                buckets,
            },
            read: word(QueueWord::Read),
            written: word(QueueWord::Written),
            slot_waits: word(QueueWord::SlotWaits),
            buffer_waits: word(QueueWord::BufferWaits),
            rounds: word(QueueWord::Rounds),
            turns: since(CoreCounter::Turns, QueueWord::Turns),
            busy: share,
            idle: busy.saturating_add(idle).saturating_sub(share),
        })
    }

    /// The devices that are counted.
    #[cfg(feature = "std")]
    pub fn devices(&self) -> Vec<Counted> {
        let mut all = Vec::new();
        for entry in (0..DEVICES).map(|at| TABLE + at * ENTRY) {
            // Acquire: pairs with the Release in `register`.
            let id = self
                .0
                .get(entry)
                .map_or(0, |word| word.load(Ordering::Acquire));
            let Some(id) = u32::try_from(id).ok().filter(|id| *id != 0) else {
                continue;
            };
            let length = usize::try_from(load(self.0, entry + 1)).unwrap_or(0);
            let bytes: Vec<u8> = (0..NAME_WORDS)
                .flat_map(|at| load(self.0, entry + 2 + at).to_le_bytes())
                .take(length)
                .collect();
            let name = String::from_utf8_lossy(&bytes).into_owned();
            all.push(Counted { id, name });
        }
        all
    }
}

#[cfg(all(feature = "std", not(loom)))]
mod mapping;
#[cfg(all(feature = "std", not(loom)))]
pub use mapping::{Counters, MapError};

#[cfg(all(test, feature = "std", not(loom)))]
mod tests;
