//! What the cores count, in memory that the control plane can read.
//!
//! One block per core, written by that core only with plain loads and stores, so counting costs no synchronisation and
//! reading costs the writer nothing. A table at the beginning says which device counts in which place; the management
//! thread writes it. The data plane creates the memory, the control plane maps it read-only; a reader may see one
//! counter newer than another.

use core::sync::atomic::{AtomicU64, Ordering};

/// Devices that are counted at a time; further ones are served and not counted.
pub const DEVICES: usize = 128;
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
const CORE: usize = (PAGE + DEVICES * DEVICE).next_multiple_of(PAGE);

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
        let from = CORES + core * CORE + PAGE + place(id) * DEVICE;
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

    /// Whether a device has a place.
    pub fn counts(&self, id: u32) -> bool {
        load(self.table, TABLE + place(id) * ENTRY) == u64::from(id)
    }

    /// Counts a request of a device that has a place.
    pub fn finished(&self, id: u32, request: Finished) {
        let Finished {
            opcode,
            error,
            read,
            written,
            ns,
        } = request;
        let device = PAGE + place(id) * DEVICE;
        add(self.core, device, read);
        add(self.core, device + 1, written);
        let op = device + 8 + (opcode as usize).min(OPCODES - 1) * OP;
        add(self.core, op, 1);
        add(self.core, op + 1, u64::from(error));
        add(self.core, op + 2, ns);
        add(self.core, op + 4 + bucket(ns), 1);
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
        CORES + core * CORE + PAGE + place(id) * DEVICE
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
