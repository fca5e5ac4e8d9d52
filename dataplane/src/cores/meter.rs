//! What a core counts of its own time.

use std::time::Instant;

use ferry_shared::counters::{CoreCounter, CoreCounters};

use crate::reactor::Counters;

/// Splits a core's time into busy and idle, one reading of the clock a turn.
pub(super) struct Meter {
    counters: CoreCounters,
    last: Instant,
}

impl Meter {
    pub(super) fn new(counters: CoreCounters) -> Meter {
        Meter {
            counters,
            last: Instant::now(),
        }
    }

    fn lap(&mut self, counter: CoreCounter) {
        let now = Instant::now();
        let nanos = now.duration_since(self.last).as_nanos();
        self.counters
            .add(counter, u64::try_from(nanos).unwrap_or(u64::MAX));
        self.last = now;
    }

    /// A turn is over, which has worked or found nothing.
    pub(super) fn turned(&mut self, worked: bool, reactor: &Counters) {
        self.counters.add(CoreCounter::Turns, 1);
        if worked {
            self.counters.add(CoreCounter::BusyTurns, 1);
            self.lap(CoreCounter::Busy);
        } else {
            self.lap(CoreCounter::Idle);
        }
        let Counters {
            requests,
            buffers,
            buffer_waits,
            slot_waits,
            free_slots,
            free_buffers,
        } = *reactor;
        self.counters.set(CoreCounter::Requests, requests);
        self.counters.set(CoreCounter::BufferTakes, buffers);
        self.counters.set(CoreCounter::BufferWaits, buffer_waits);
        self.counters.set(CoreCounter::SlotWaits, slot_waits);
        self.counters.set(CoreCounter::FreeSlots, free_slots);
        self.counters.set(CoreCounter::FreeBuffers, free_buffers);
    }

    /// The core has slept.
    pub(super) fn slept(&mut self) {
        self.counters.add(CoreCounter::Sleeps, 1);
        self.lap(CoreCounter::Idle);
    }
}
