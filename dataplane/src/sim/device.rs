//! The device's side of the simulation: cores, and the system that they see.
// UNSAFETY: makes a data pool, and plays the kernel that transfers data.
#![expect(unsafe_code, reason = "plays the kernel that transfers data")]

use core::ptr::NonNull;
use std::collections::BTreeSet;

use super::files::Files;
use super::{Rng, between, fate};
use crate::fsdev::IoOp;
use crate::id::CoreEvent;
use crate::mem::{IoVec, Segments};
use crate::pool::{DATA_BUFFER_STRIDE, DataPool, Slab};
use crate::reactor::{Interrupted, Job, Reactor, System};
use crate::slot::SlotBody;

/// A transfer on a core's ring.
pub(super) struct Flight {
    slot: u32,
    op: IoOp,
    pieces: Vec<IoVec>,
}

/// The world of one core.
#[derive(Default)]
pub(super) struct World {
    pub(super) ring: Vec<Flight>,
    ring_room: usize,
    pub(super) jobs: Vec<(u32, Job<Files>)>,
    pub(super) events: Vec<CoreEvent>,
    pub(super) spread: Vec<Interrupted>,
    /// Queues whose guest was interrupted.
    pub(super) interrupted: BTreeSet<usize>,
}

impl System<Files> for World {
    type Call = usize;

    fn interrupt(&mut self, queue: &usize) {
        fate::store();
        self.interrupted.insert(*queue);
    }
    fn submit(&mut self, slot: u32, op: IoOp, iovecs: &[IoVec]) -> bool {
        let room = self.ring.len() < self.ring_room;
        if room {
            let pieces = iovecs.to_vec();
            self.ring.push(Flight { slot, op, pieces });
        }
        room
    }
    fn offload(&mut self, slot: u32, job: Job<Files>) {
        self.jobs.push((slot, job));
    }
    fn report(&mut self, event: CoreEvent) {
        self.events.push(event);
    }
    fn spread_interrupt(&mut self, interrupted: Interrupted) {
        self.spread.push(interrupted);
    }
}

pub(super) struct Core {
    pub(super) reactor: Reactor<Files, World>,
    pub(super) world: World,
    pub(super) asleep: bool,
    /// What the pool consists of; dropped after the reactor.
    _memory: Vec<u8>,
}

impl Core {
    pub(super) fn new(rng: &mut Rng) -> Core {
        let (slots, buffers) = (between(rng, 2, 16) as u32, between(rng, 1, 3) as u32);
        let mut memory = vec![0u8; buffers as usize * DATA_BUFFER_STRIDE];
        let base = NonNull::new(memory.as_mut_ptr()).expect("not empty");
        // SAFETY: it has room for `buffers` buffers, lives as long as the core, and nothing else refers to it.
        let pool = unsafe { DataPool::new(base, buffers, None) };
        let bodies = Slab::on_heap((0..slots).map(|_| SlotBody::new()));
        Core {
            reactor: Reactor::new(bodies, pool, 8),
            world: World {
                ring_room: between(rng, 1, 8) as usize,
                ..Default::default()
            },
            asleep: false,
            _memory: memory,
        }
    }

    pub(super) fn wake(&mut self) {
        if core::mem::take(&mut self.asleep) {
            self.reactor.disarm();
        }
    }

    /// One thing that can happen on this core.
    pub(super) fn step(&mut self, rng: &mut Rng, files: &Files) {
        match rng.below(6) {
            0 if !self.world.ring.is_empty() => {
                let at = rng.below(self.world.ring.len() as u64) as usize;
                let flight = self.world.ring.swap_remove(at);
                let result = carry_out(files, &flight);
                self.wake();
                self.reactor.io_done(flight.slot, result, &mut self.world);
            }
            1 if !self.world.jobs.is_empty() => {
                let at = rng.below(self.world.jobs.len() as u64) as usize;
                let (slot, job) = self.world.jobs.swap_remove(at);
                let outcome = job.run();
                self.wake();
                self.reactor.offload_done(slot, outcome, &mut self.world);
            }
            2 if self.reactor.has_waiting() => {
                self.wake();
                self.reactor.poll_locks(&mut self.world);
            }
            _ if self.asleep => {}
            _ => {
                let worked = self.reactor.turn(&mut self.world);
                if !worked && !self.reactor.has_unsubmitted() {
                    self.asleep = self.reactor.arm();
                    if !self.asleep {
                        self.reactor.disarm();
                    }
                }
            }
        }
    }
}

/// What the kernel does with a transfer.
pub(super) fn carry_out(files: &Files, flight: &Flight) -> i32 {
    // SAFETY: the pieces lie in guest memory, which the queue holds until the completion.
    let all = unsafe { Segments::new(&flight.pieces) };
    let mut segments: Vec<&mut [u8]> = all
        .iter()
        // SAFETY: nobody else touches them until then.
        .map(|(base, len)| unsafe { core::slice::from_raw_parts_mut(base.as_ptr(), len) })
        .collect();
    files.transfer(flight.op, &mut segments)
}
