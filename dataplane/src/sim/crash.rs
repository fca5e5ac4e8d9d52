//! The end of a simulated process, and the next one's beginning.
// UNSAFETY: makes records in memory that outlives the simulated process.
#![expect(unsafe_code, reason = "records in memory that outlives the process")]

use core::ptr::NonNull;
use core::sync::atomic::AtomicU64;
use std::sync::Arc;

use ferry_shared::limits::MAX_QUEUES_PER_DEVICE;
use ferry_shared::msg::Platform;

use super::device::{Core, carry_out};
use super::files::Files;
use super::{Sim, fate};
use crate::fuse::session::Session;
use crate::reactor::DeviceShared;
use crate::recovery::journal::Lines;
use crate::recovery::placed::{Keep, Placed};
use crate::virtio::inflight::{Inflight, queue_record_len};
use crate::virtio::testmem::Ram;

/// Queues that have a record, and descriptors of the largest.
const QUEUES: usize = 4;
const LARGEST: u16 = 64;
/// The stores of one life after which a process may die.
const MOST_STORES: u64 = 400;

/// The recovery memory.
pub(super) struct Kept {
    session: Arc<[AtomicU64]>,
    lines: Arc<[AtomicU64]>,
    inflight: Ram,
    life: u64,
}

fn words(count: usize) -> Arc<[AtomicU64]> {
    (0..count).map(|_| AtomicU64::new(0)).collect()
}

fn placed(words: &Arc<[AtomicU64]>) -> Placed<AtomicU64> {
    let keep: Keep = Arc::new(Arc::clone(words));
    // SAFETY: the words live as long as `keep`, and are atomics.
    unsafe { Placed::new(NonNull::from(&**words), keep) }
}

impl Kept {
    pub(super) fn new() -> Kept {
        let largest = queue_record_len(LARGEST, true).max(queue_record_len(LARGEST, false));
        Kept {
            session: words(Session::RECORD),
            lines: words(QUEUES * Lines::WORDS / MAX_QUEUES_PER_DEVICE as usize),
            inflight: Ram::new(&[(0, QUEUES * largest)]),
            life: 1,
        }
    }

    /// The in-flight record of a queue.
    pub(super) fn record(&self, queue: usize, packed: bool) -> Inflight {
        let record = Inflight::new(&self.inflight.map(), queue as u16, LARGEST, packed);
        record.expect("there is room for it")
    }
}

/// The device as a process has it that is the `life`th.
pub(super) fn shared(
    kept: Option<&Kept>,
    files: &Arc<Files>,
    life: u64,
) -> Arc<DeviceShared<Files>> {
    let session = Session::recorded(Platform::default(), kept.map(|kept| placed(&kept.session)));
    session.resume(&**files);
    let lines = kept.map(|kept| Lines::new(placed(&kept.lines), life));
    Arc::new(DeviceShared::new(session, Some(Arc::clone(files))).noting(lines))
}

impl Sim {
    /// Something that the process does, and in which it may die.
    pub(super) fn or_die(&mut self, what: impl FnOnce(&mut Sim)) {
        if fate::survive(|| what(self)).is_none() {
            self.crash();
        }
    }

    /// Decides when the process dies: at once, or in the middle of something.
    pub(super) fn choose_an_end(&mut self) {
        match self.rng.below(4) {
            0 => self.crash(),
            _ => fate::arm(1 + self.rng.below(MOST_STORES)),
        }
    }

    /// The process is dead: another one takes over, which may die while it does.
    fn crash(&mut self) {
        loop {
            fate::arm(0);
            self.bury();
            if self.rng.one_in(4) {
                fate::arm(1 + self.rng.below(20));
            }
            if fate::survive(|| self.take_over()).is_some() {
                return;
            }
        }
    }

    /// Drops what the process had. What the kernel and helper threads had in hand may still be done.
    fn bury(&mut self) {
        for core in &mut self.cores {
            for flight in core::mem::take(&mut core.world.ring) {
                if self.rng.one_in(2) {
                    let _ = carry_out(&self.files, &flight);
                }
            }
            for (_, job) in core::mem::take(&mut core.world.jobs) {
                if self.rng.one_in(2) {
                    let _ = job.run();
                }
            }
        }
        let signalled = self.cores.iter().flat_map(|core| &core.world.interrupted);
        let signalled = signalled.copied().collect();
        let count = self.cores.len();
        self.cores = (0..count).map(|_| Core::new(&mut self.rng)).collect();
        // An interrupt that was sent arrives.
        self.cores[0].world.interrupted = signalled;
        self.files.crash();
    }

    fn take_over(&mut self) {
        let Some(kept) = &mut self.kept else { return };
        kept.life += 1;
        self.shared = shared(Some(kept), &self.files, kept.life);
        for at in 0..self.queues.len() {
            let queue = &mut self.queues[at];
            let mut config = queue.driver.config.clone();
            let used = queue.driver.ram.get16(config.used.0 + 2);
            config.state = kept.record(at, config.packed).resume(config.size, used);
            queue.stopping = false;
            queue.at = Err(config);
        }
        for at in 0..self.queues.len() {
            self.start(at);
        }
    }
}
