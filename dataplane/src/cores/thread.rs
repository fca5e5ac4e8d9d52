//! One core's thread: its reactor, its ring, its mailbox, and when it sleeps.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use ferry_shared::counters::{CoreCounter, CoreCounters};
use ferry_shared::trace::{CoreTrace, Point, Record};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::{Pid, gettid};

use super::helpers::{HelperJob, Helpers};
use super::meter::Meter;
use super::{CoreMailbox, CoreMessage, LOCK_POLL, MAILBOX_TOKEN, PollMode, SPIN};
use crate::fsdev::IoOp;
use crate::id::{CoreEvent, DeviceId, QueueIdx};
use crate::mailbox::Mailbox;
use crate::mem::IoVec;
use crate::os::eventfd::EventFd;
use crate::os::uring::{Completion, Ring};
use crate::pool::{DataPool, Slab};
use crate::reactor::{Backend, Interrupted, Job, Reactor, System};
use crate::slot::SlotBody;

/// What a reactor sees of this process.
struct CoreSystem<B> {
    ring: Ring,
    own: Arc<CoreMailbox<B>>,
    others: Vec<Arc<CoreMailbox<B>>>,
    helpers: Arc<Helpers<B>>,
    events: Arc<Mailbox<CoreEvent>>,
    /// The watches of this core's queues, by token.
    watches: Vec<Option<Watch>>,
    /// What the clock is read against.
    origin: Instant,
}

struct Watch {
    device: DeviceId,
    index: QueueIdx,
    kick: Arc<EventFd>,
}

impl<B: Backend> System<B> for CoreSystem<B> {
    type Call = Arc<EventFd>;

    fn interrupt(&mut self, call: &Arc<EventFd>) {
        call.signal();
    }

    fn submit(&mut self, slot: u32, op: IoOp, iovecs: &[IoVec]) -> bool {
        self.ring.push(slot, op, iovecs)
    }

    fn offload(&mut self, slot: u32, job: Job<B>) {
        self.helpers.post(HelperJob {
            slot,
            job,
            core: Arc::clone(&self.own),
        });
    }

    fn report(&mut self, event: CoreEvent) {
        if let CoreEvent::QueueStopped { device, index, .. } = &event {
            self.unwatch(*device, *index);
        }
        self.events.post(event);
    }

    fn spread_interrupt(&mut self, interrupted: Interrupted) {
        for other in &self.others {
            other.post(CoreMessage::Interrupt(interrupted));
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

impl<B: Backend> CoreSystem<B> {
    fn watch(&mut self, device: DeviceId, index: QueueIdx, kick: Arc<EventFd>) {
        let free = self.watches.iter().position(Option::is_none);
        let token = free.unwrap_or_else(|| {
            self.watches.push(None);
            self.watches.len() - 1
        });
        if let Ok(number) = u32::try_from(token) {
            self.ring.watch(kick.as_raw_fd(), number);
        }
        self.watches[token] = Some(Watch {
            device,
            index,
            kick,
        });
    }

    fn unwatch(&mut self, device: DeviceId, index: QueueIdx) {
        let matches = |w: &Option<Watch>| {
            w.as_ref()
                .is_some_and(|w| w.device == device && w.index == index)
        };
        if let Some(token) = self.watches.iter().position(matches) {
            self.watches[token] = None;
            if let Ok(number) = u32::try_from(token) {
                self.ring.unwatch(number);
            }
        }
    }

    /// A counter was signalled. Takes the count, and sets the watch again if the kernel has dropped it.
    fn signalled(&mut self, token: u32, ended: bool) {
        let fd = if token == MAILBOX_TOKEN {
            self.own.drain();
            self.own.as_raw_fd()
        } else {
            let Some(Some(watch)) = self.watches.get(token as usize) else {
                return;
            };
            watch.kick.drain();
            watch.kick.as_raw_fd()
        };
        if ended {
            self.ring.watch(fd, token);
        }
    }
}

/// One core's thread.
struct Core<B: Backend> {
    reactor: Reactor<B, CoreSystem<B>>,
    sys: CoreSystem<B>,
    mode: PollMode,
    completions: Vec<Completion>,
    meter: Meter,
    /// Set to answer a ping.
    answered: Arc<AtomicBool>,
    trace: Option<CoreTrace>,
}

impl<B: Backend> Core<B> {
    /// Serves until told to quit.
    fn run(mut self) -> io::Result<()> {
        self.sys.ring.watch(self.sys.own.as_raw_fd(), MAILBOX_TOKEN);
        let mut idle_since: Option<Instant> = None;
        let mut locks_tried = Instant::now();
        loop {
            let mut worked = false;
            while let Some(message) = self.sys.own.take() {
                worked = true;
                if !self.handle(message) {
                    return Ok(());
                }
            }
            worked |= self.reactor.turn(&mut self.sys);
            self.sys.ring.turn(|c| self.completions.push(c))?;
            worked |= self.complete();
            if self.reactor.has_waiting() && locks_tried.elapsed() >= LOCK_POLL {
                worked |= self.reactor.poll_locks(&mut self.sys);
                locks_tried = Instant::now();
            }
            self.meter.turned(worked, &self.reactor.counters());
            if worked || self.reactor.has_unsubmitted() {
                idle_since = None;
                continue;
            }
            if self.may_sleep(&mut idle_since) {
                self.sleep()?;
            } else {
                core::hint::spin_loop();
            }
        }
    }

    fn may_sleep(&self, idle_since: &mut Option<Instant>) -> bool {
        match self.mode {
            PollMode::Busy => false,
            PollMode::Interrupt => true,
            PollMode::Adaptive => idle_since.get_or_insert_with(Instant::now).elapsed() >= SPIN,
        }
    }

    /// Sleeps until a driver, the kernel, a helper or the management thread has something.
    fn sleep(&mut self) -> io::Result<()> {
        if self.reactor.arm() && self.sys.own.prepare_sleep() {
            let limit = self.reactor.has_waiting().then_some(LOCK_POLL);
            self.trace(Point::Sleep);
            self.sys.ring.sleep(limit, |c| self.completions.push(c))?;
            self.sys.own.awake();
            self.trace(Point::Wake);
            self.meter.slept();
        }
        self.reactor.disarm();
        self.complete();
        Ok(())
    }

    fn trace(&self, point: Point) {
        if let Some(trace) = self.trace.as_ref().filter(|trace| trace.on(point)) {
            let record = Record {
                ns: self.sys.now(),
                ..Record::default()
            };
            trace.write(point, &record);
        }
    }

    /// Hands completions on.
    fn complete(&mut self) -> bool {
        let any = !self.completions.is_empty();
        for completion in self.completions.drain(..) {
            match completion {
                Completion::Slot { slot, result } => {
                    self.reactor.io_done(slot, result, &mut self.sys)
                }
                Completion::Watch { token, ended } => self.sys.signalled(token, ended),
            }
        }
        any
    }

    /// Handles a message; `false` ends the core.
    fn handle(&mut self, message: CoreMessage<B>) -> bool {
        let Core { reactor, sys, .. } = self;
        match message {
            CoreMessage::Start(start, kick) => {
                sys.watch(start.device, start.index, kick);
                reactor.start(*start, sys);
            }
            CoreMessage::Stop {
                device,
                index,
                reset,
            } => reactor.stop(device, index, reset, sys),
            CoreMessage::SetCall {
                device,
                index,
                call,
            } => reactor.set_call(device, index, call, sys),
            CoreMessage::SetMemory { device, map } => reactor.set_memory(device, map, sys),
            CoreMessage::Offloaded { slot, outcome } => reactor.offload_done(slot, outcome, sys),
            CoreMessage::Interrupt(interrupted) => reactor.interrupt_request(interrupted, sys),
            CoreMessage::Ping => self.answered.store(true, Ordering::Relaxed),
            CoreMessage::Quit => return false,
        }
        true
    }
}

/// Everything that a core's thread is made of; the ring itself must be made on the thread.
pub(super) struct CoreSeed<B> {
    pub(super) number: usize,
    pub(super) cpu: u32,
    pub(super) mode: PollMode,
    pub(super) bodies: Slab<SlotBody>,
    pub(super) pool: DataPool,
    pub(super) own: Arc<CoreMailbox<B>>,
    pub(super) others: Vec<Arc<CoreMailbox<B>>>,
    pub(super) helpers: Arc<Helpers<B>>,
    pub(super) events: Arc<Mailbox<CoreEvent>>,
    pub(super) answered: Arc<AtomicBool>,
    pub(super) counters: CoreCounters,
    pub(super) trace: Option<CoreTrace>,
    pub(super) origin: Instant,
}

impl<B: Backend> CoreSeed<B> {
    pub(super) fn spawn(self) -> io::Result<JoinHandle<()>> {
        let (ready, is_ready) = std::sync::mpsc::sync_channel(1);
        let builder = std::thread::Builder::new().name(format!("ferry-core-{}", self.number));
        let thread = builder.spawn(move || {
            let number = self.number;
            match self.build() {
                Ok(core) => {
                    let _ = ready.send(Ok(()));
                    if let Err(error) = core.run() {
                        // A core that cannot use its ring any more has lost its guests' requests; restarting is the only cure.
                        tracing::error!(core = number, %error, "io_uring failed; the data plane ends");
                        std::process::abort();
                    }
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            }
        })?;
        match is_ready.recv() {
            Ok(Ok(())) => Ok(thread),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(io::Error::other("the core's thread ended while it started")),
        }
    }

    fn build(self) -> io::Result<Core<B>> {
        let mut set = CpuSet::new();
        set.set(self.cpu as usize)?;
        sched_setaffinity(Pid::from_raw(0), &set).map_err(|e| {
            io::Error::other(format!(
                "cannot pin core {} to CPU {}: {e}",
                self.number, self.cpu
            ))
        })?;
        let queues = ferry_shared::limits::MAX_QUEUES_PER_SERVICE as usize;
        let slots = self.bodies.len();
        let watches = ferry_shared::limits::MAX_QUEUES_PER_SERVICE;
        let ring = Ring::new(slots, watches)
            .map_err(|e| io::Error::other(format!("cannot create an io_uring: {e}")))?;
        let sys = CoreSystem {
            ring,
            own: self.own,
            others: self.others,
            helpers: self.helpers,
            events: self.events,
            watches: Vec::with_capacity(queues),
            origin: self.origin,
        };
        let thread = u64::try_from(gettid().as_raw()).unwrap_or(0);
        self.counters.set(CoreCounter::Thread, thread);
        self.counters.set(CoreCounter::Cpu, u64::from(self.cpu));
        self.counters.set(CoreCounter::Slots, u64::from(slots));
        let buffers = self.pool.available() as u64;
        self.counters.set(CoreCounter::Buffers, buffers);
        let mut reactor = Reactor::new(self.bodies, self.pool, queues);
        reactor.count_in(self.counters);
        if let Some(trace) = self.trace {
            reactor.trace_in(trace);
        }
        Ok(Core {
            reactor,
            sys,
            mode: self.mode,
            completions: Vec::with_capacity(2 * slots as usize + queues),
            meter: Meter::new(self.counters),
            answered: self.answered,
            trace: self.trace,
        })
    }
}
