//! The memory of the traces: made by the data plane, read by whoever may open its file.

use core::sync::atomic::{AtomicU64, Ordering, fence};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{SystemTime, UNIX_EPOCH};

use super::{
    BEGUN_WORD, CORE, DONE_WORD, MAGIC, ORIGIN_WORD, PAGE, RECORD, RECORDS, Record, bytes, format,
    load,
};
use crate::sealed::{MapError, Sealed};

/// Mapped traces, unmapped when dropped.
#[derive(Debug)]
pub struct Traces(Sealed);

impl Traces {
    /// Makes empty rings for so many cores, whose times count from now, and the file by which others can read them.
    pub fn create(cores: usize) -> Result<(Traces, OwnedFd), MapError> {
        let (memory, file) = Sealed::create("ferry-trace", bytes(cores))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let origin = now.map_or(0, |since| since.as_nanos());
        format(memory.words(), cores, u64::try_from(origin).unwrap_or(0));
        Ok((Traces(memory), file))
    }

    /// Maps what a data plane has made, to read.
    pub fn open(file: &impl AsFd) -> Result<Traces, MapError> {
        let traces = Traces(Sealed::open(file)?);
        let fits = traces.words().len().checked_mul(8) == Some(bytes(traces.cores()));
        if load(traces.words(), 0) == MAGIC && fits {
            Ok(traces)
        } else {
            Err(MapError::Form)
        }
    }

    /// The words, for the functions of the data plane.
    pub fn words(&self) -> &[AtomicU64] {
        self.0.words()
    }

    /// Number of cores.
    pub fn cores(&self) -> usize {
        // More than any machine has means that this is something else.
        usize::try_from(load(self.words(), 1))
            .unwrap_or(0)
            .min(1 << 16)
    }

    /// What the times count from, in nanoseconds of real time.
    pub fn origin(&self) -> u64 {
        load(self.words(), ORIGIN_WORD)
    }

    /// What a core has written down from record number `from` on, as far as it is still there, and the number of the
    /// next record.
    pub fn records(&self, core: usize, from: u64) -> (Vec<Record>, u64) {
        let base = PAGE + core * CORE;
        let ring = self.words().get(base..base + CORE).unwrap_or_default();
        // Acquire: pairs with the Release in `CoreTrace::write`.
        let done = ring.get(DONE_WORD);
        let done = done.map_or(0, |word| word.load(Ordering::Acquire));
        let first = from.max(done.saturating_sub(RECORDS as u64)).min(done);
        let read: Vec<Record> = (first..done).map(|number| record(ring, number)).collect();
        fence(Ordering::Acquire);
        let begun = load(ring, BEGUN_WORD);
        // The writer may have come round and spoilt the oldest ones while they were read.
        let whole = begun.saturating_sub(RECORDS as u64);
        let spoilt = usize::try_from(whole.saturating_sub(first)).unwrap_or(usize::MAX);
        (read.into_iter().skip(spoilt).collect(), done)
    }
}

fn record(ring: &[AtomicU64], number: u64) -> Record {
    let at = PAGE + (number % RECORDS as u64) as usize * RECORD;
    let place = load(ring, at + 1);
    Record {
        ns: load(ring, at),
        point: (place & 0xff) as u8,
        device: (place >> 32) as u32,
        queue: (place >> 16) as u16,
        args: [load(ring, at + 2), load(ring, at + 3)],
    }
}
