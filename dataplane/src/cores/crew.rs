//! The threads of all cores and their helpers: begun together, ended together.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use ferry_shared::counters::{CoreCounters, Counters};
use ferry_shared::trace::{CoreTrace, Traces};

use super::helpers::Helpers;
use super::thread::CoreSeed;
use super::{CoreMailbox, CoreMessage, CoreOptions, HELPERS_PER_CORE, MAILBOX};
use crate::id::CoreEvent;
use crate::mailbox::Mailbox;
use crate::os::arena::Arena;
use crate::reactor::Backend;
use crate::slot::SlotBody;

/// What outlives a crew.
pub(super) struct Ground {
    pub(super) events: Arc<Mailbox<CoreEvent>>,
    pub(super) counters: &'static Counters,
    pub(super) traces: &'static Traces,
    /// What the clock is read against.
    pub(super) origin: Instant,
}

/// The running threads.
pub(super) struct Crew<B: Backend> {
    pub(super) mailboxes: Vec<Arc<CoreMailbox<B>>>,
    pub(super) helpers: Arc<Helpers<B>>,
    /// Whether each core has answered the last ping.
    answered: Vec<Arc<AtomicBool>>,
    cores: Vec<JoinHandle<()>>,
}

impl<B: Backend> Crew<B> {
    /// Starts the threads, whose memory comes from `arena`.
    pub(super) fn start(
        options: &CoreOptions,
        arena: &mut Arena,
        ground: &Ground,
    ) -> io::Result<Crew<B>> {
        let count = options.cpus.len();
        let slots = options.slots as usize;
        let mut mailboxes = Vec::with_capacity(count);
        for _ in 0..count {
            mailboxes.push(Arc::new(Mailbox::new(MAILBOX.max(2 * slots))?));
        }
        let mut crew = Crew {
            helpers: Helpers::start(count * slots, count * HELPERS_PER_CORE)?,
            mailboxes,
            answered: (0..count)
                .map(|_| Arc::new(AtomicBool::new(true)))
                .collect(),
            cores: Vec::new(),
        };
        match crew.begin(options, arena, ground) {
            Ok(()) => Ok(crew),
            Err(error) => {
                crew.end();
                Err(error)
            }
        }
    }

    fn begin(
        &mut self,
        options: &CoreOptions,
        arena: &mut Arena,
        ground: &Ground,
    ) -> io::Result<()> {
        let places = options.cpus.iter().zip(&self.mailboxes).zip(&self.answered);
        for (number, ((&cpu, own), answered)) in places.enumerate() {
            let bodies = arena
                .slab(options.slots, SlotBody::new)
                .ok_or(io::ErrorKind::OutOfMemory)?;
            let pool = arena
                .pool(options.buffers)
                .ok_or(io::ErrorKind::OutOfMemory)?;
            let others = self
                .mailboxes
                .iter()
                .filter(|other| !Arc::ptr_eq(other, own));
            let seed = CoreSeed {
                number,
                cpu,
                mode: options.mode,
                bodies,
                pool,
                own: Arc::clone(own),
                others: others.map(Arc::clone).collect(),
                helpers: Arc::clone(&self.helpers),
                events: Arc::clone(&ground.events),
                answered: Arc::clone(answered),
                counters: CoreCounters::new(ground.counters.words(), number),
                trace: CoreTrace::new(ground.traces.words(), number),
                origin: ground.origin,
            };
            self.cores.push(seed.spawn()?);
        }
        Ok(())
    }

    /// Whether every core has got as far as to answer the last [`Crew::ping`].
    pub(super) fn all_answered(&self) -> bool {
        self.answered
            .iter()
            .all(|core| core.load(Ordering::Relaxed))
    }

    /// Asks every core for a sign of life.
    pub(super) fn ping(&self) {
        for (core, mailbox) in self.answered.iter().zip(&self.mailboxes) {
            core.store(false, Ordering::Relaxed);
            mailbox.post(CoreMessage::Ping);
        }
    }

    /// Ends all threads; the devices must be closed.
    pub(super) fn end(self) {
        for mailbox in &self.mailboxes {
            mailbox.post(CoreMessage::Quit);
        }
        for thread in self.cores {
            let _ = thread.join();
        }
        self.helpers.close();
    }
}
