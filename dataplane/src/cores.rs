//! The cores: pinned threads that run a [`crate::reactor::Reactor`] each, their helper threads, and the management thread's handle on them.
//!
//! The management thread talks to a core through its mailbox and hears from it through [`CoreSet::take_event`]. A core
//! never waits for the management thread, and the other way round.

mod helpers;
mod meter;
mod thread;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use ferry_shared::counters::{self, CoreCounters, Counters};

use crate::dispatch::Outcome;
use crate::engine::{Cores, QueueStart};
use crate::id::{CoreEvent, DeviceId, QueueIdx};
use crate::mailbox::Mailbox;
use crate::mem::GuestMap;
use crate::os::arena::Arena;
use crate::os::eventfd::EventFd;
use crate::reactor::{Backend, DeviceShared, StartQueue};
use crate::slot::SlotBody;
use crate::virtio::queue::{Queue, QueueState};
use helpers::Helpers;
use thread::CoreSeed;

/// Request slots of a core: requests that it can have in flight.
pub const SLOTS_PER_CORE: u32 = 256;
/// Fewest data buffers of a core: one request may need two.
pub const MIN_BUFFERS_PER_CORE: u32 = 2;
/// Data buffers of a core when the operator gives no memory size.
pub const DEFAULT_BUFFERS_PER_CORE: u32 = 32;
/// Helper threads per core, besides those that devices bring.
const HELPERS_PER_CORE: usize = 4;
/// How long an idle core goes on polling before it sleeps, when polling is adaptive.
const SPIN: Duration = Duration::from_micros(50);
/// How often locks that other processes may hold are tried again.
const LOCK_POLL: Duration = Duration::from_millis(5);
/// Messages that a mailbox has room for before it would grow: every slot's outcome, and what a burst of starts posts.
const MAILBOX: usize = 4096;
/// The watch on the core's own mailbox; queue watches count from 0.
const MAILBOX_TOKEN: u32 = u32::MAX;

/// When a core sleeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PollMode {
    /// After a short time without work.
    #[default]
    Adaptive,
    /// Never.
    Busy,
    /// At once.
    Interrupt,
}

/// What a core can be told.
enum CoreMessage<B> {
    Start(Box<StartQueue<B, Arc<EventFd>>>, Arc<EventFd>),
    Stop {
        device: DeviceId,
        index: QueueIdx,
        reset: bool,
    },
    SetCall {
        device: DeviceId,
        index: QueueIdx,
        call: Option<Arc<EventFd>>,
    },
    SetMemory {
        device: DeviceId,
        map: Arc<GuestMap>,
    },
    Offloaded {
        slot: u32,
        outcome: Outcome,
    },
    Interrupt {
        device: DeviceId,
        unique: u64,
    },
    Ping,
    Quit,
}

type CoreMailbox<B> = Mailbox<CoreMessage<B>>;

/// How the cores are set up.
#[derive(Clone, Debug)]
pub struct CoreOptions {
    /// CPU numbers, one core each.
    pub cpus: Vec<u32>,
    /// When they sleep.
    pub mode: PollMode,
    /// Data buffers of each core.
    pub buffers: u32,
}

/// What the management thread knows of a device's queues.
struct DeviceEntry<B> {
    shared: Arc<DeviceShared<B>>,
    /// Reports of cores that put a new guest map into use, still to come.
    maps_pending: usize,
    /// Maps that those reports are about. The cores report in no common order, so all count as replaced when the last
    /// report is there.
    maps_asked: usize,
}

/// All cores, in the hands of the management thread.
pub struct CoreSet<B: Backend> {
    mailboxes: Vec<Arc<CoreMailbox<B>>>,
    events: Arc<Mailbox<CoreEvent>>,
    local: VecDeque<CoreEvent>,
    /// What [`CoreSet::take_event`] has looked at already.
    settled: VecDeque<CoreEvent>,
    helpers: Arc<Helpers<B>>,
    threads: Vec<JoinHandle<()>>,
    devices: HashMap<DeviceId, DeviceEntry<B>>,
    /// Which core serves a queue.
    placed: HashMap<(DeviceId, QueueIdx), usize>,
    /// Queues per core.
    load: Vec<usize>,
    /// Whether each core has answered the last ping.
    answered: Vec<Arc<AtomicBool>>,
    counters: &'static Counters,
    counters_file: OwnedFd,
}

/// Bytes that one core's slots and buffers take.
pub fn core_memory(buffers: u32) -> usize {
    Arena::room_for::<SlotBody>(SLOTS_PER_CORE) + Arena::room_for_pool(buffers)
}

impl<B: Backend> CoreSet<B> {
    /// Starts the cores, whose memory comes from `arena`.
    pub fn start(options: &CoreOptions, arena: &mut Arena) -> io::Result<CoreSet<B>> {
        let count = options.cpus.len();
        let mut mailboxes = Vec::with_capacity(count);
        for _ in 0..count {
            mailboxes.push(Arc::new(Mailbox::new(MAILBOX)?));
        }
        let events = Arc::new(Mailbox::new(MAILBOX)?);
        let (counters, counters_file) = Counters::create(count).map_err(io::Error::other)?;
        // The cores count as long as the process lives.
        let counters: &'static Counters = Box::leak(Box::new(counters));
        let helpers = Helpers::start(count * SLOTS_PER_CORE as usize, count * HELPERS_PER_CORE)?;
        let mut threads = Vec::new();
        let answered: Vec<_> = (0..count)
            .map(|_| Arc::new(AtomicBool::new(true)))
            .collect();
        for (number, &cpu) in options.cpus.iter().enumerate() {
            let bodies = arena
                .slab(SLOTS_PER_CORE, SlotBody::new)
                .ok_or(io::ErrorKind::OutOfMemory)?;
            let pool = arena
                .pool(options.buffers)
                .ok_or(io::ErrorKind::OutOfMemory)?;
            let seed = CoreSeed {
                number,
                cpu,
                mode: options.mode,
                bodies,
                pool,
                own: Arc::clone(&mailboxes[number]),
                others: others(&mailboxes, number),
                helpers: Arc::clone(&helpers),
                events: Arc::clone(&events),
                answered: Arc::clone(&answered[number]),
                counters: CoreCounters::new(counters.words(), number),
            };
            threads.push(seed.spawn()?);
        }
        Ok(CoreSet {
            mailboxes,
            events,
            local: VecDeque::new(),
            settled: VecDeque::new(),
            helpers,
            threads,
            devices: HashMap::new(),
            placed: HashMap::new(),
            load: vec![0; count],
            answered,
            counters,
            counters_file,
        })
    }

    /// The file of the counters, for a control plane to read.
    pub fn counters_file(&self) -> BorrowedFd<'_> {
        self.counters_file.as_fd()
    }

    /// Whether every core has got as far as to answer the last [`CoreSet::ping`].
    pub fn all_answered(&self) -> bool {
        self.answered
            .iter()
            .all(|core| core.load(Ordering::Relaxed))
    }

    /// Asks every core for a sign of life.
    pub fn ping(&self) {
        for (core, mailbox) in self.answered.iter().zip(&self.mailboxes) {
            core.store(false, Ordering::Relaxed);
            mailbox.post(CoreMessage::Ping);
        }
    }

    /// Whether a device with this id would be counted.
    pub fn would_count(&self, device: DeviceId) -> bool {
        counters::is_free(self.counters.words(), device.0)
    }

    /// Makes a device known, before its queues are started.
    pub fn attach(&mut self, device: DeviceId, name: &str, shared: Arc<DeviceShared<B>>) {
        counters::register(self.counters.words(), device.0, name);
        self.helpers.attach(device);
        self.devices.insert(
            device,
            DeviceEntry {
                shared,
                maps_pending: 0,
                maps_asked: 0,
            },
        );
    }

    /// Forgets a device that has no queues any more.
    pub fn detach(&mut self, device: DeviceId) {
        counters::unregister(self.counters.words(), device.0);
        self.helpers.detach(device);
        self.devices.remove(&device);
    }

    /// What the cores share of a device.
    pub fn shared(&self, device: DeviceId) -> Option<&Arc<DeviceShared<B>>> {
        self.devices.get(&device).map(|d| &d.shared)
    }

    /// The management thread is about to sleep on [`CoreSet::event_fd`]; `false` when there are events.
    pub fn prepare_sleep(&self) -> bool {
        self.local.is_empty() && self.settled.is_empty() && self.events.prepare_sleep()
    }

    /// The management thread is awake again.
    pub fn awake(&self) {
        self.events.awake();
        self.events.drain();
    }

    /// Readable when a core has something to say to a sleeping management thread.
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    /// The next thing that the cores have to say.
    pub fn take_event(&mut self) -> Option<CoreEvent> {
        if let Some(event) = self.settled.pop_front() {
            return Some(event);
        }
        loop {
            let event = self.local.pop_front().or_else(|| self.events.take())?;
            match &event {
                CoreEvent::QueueStopped { device, index, .. } => {
                    if let Some(core) = self.placed.remove(&(*device, *index)) {
                        self.load[core] = self.load[core].saturating_sub(1);
                    }
                }
                CoreEvent::MemoryReplaced { device } => {
                    let Some(entry) = self.devices.get_mut(device) else {
                        continue;
                    };
                    entry.maps_pending = entry.maps_pending.saturating_sub(1);
                    if entry.maps_pending > 0 {
                        continue;
                    }
                    let more = std::mem::take(&mut entry.maps_asked).saturating_sub(1);
                    self.settled
                        .extend(std::iter::repeat_n(event.clone(), more));
                }
                CoreEvent::QueueFailed { .. } | CoreEvent::Mounted { .. } => {}
            }
            return Some(event);
        }
    }

    /// Ends all threads; the devices must be closed.
    pub fn shut_down(self) {
        for mailbox in &self.mailboxes {
            mailbox.post(CoreMessage::Quit);
        }
        for thread in self.threads {
            let _ = thread.join();
        }
        self.helpers.close();
    }

    /// The core with the fewest queues.
    fn pick_core(&self) -> usize {
        self.load
            .iter()
            .enumerate()
            .min_by_key(|&(_, load)| load)
            .map_or(0, |(core, _)| core)
    }

    fn stop(&mut self, device: DeviceId, index: QueueIdx, reset: bool) {
        match self.placed.get(&(device, index)) {
            Some(&core) => self.mailboxes[core].post(CoreMessage::Stop {
                device,
                index,
                reset,
            }),
            None => self.local.push_back(CoreEvent::QueueStopped {
                device,
                index,
                state: QueueState::default(),
            }),
        }
    }
}

fn others<B>(mailboxes: &[Arc<CoreMailbox<B>>], own: usize) -> Vec<Arc<CoreMailbox<B>>> {
    mailboxes
        .iter()
        .enumerate()
        .filter(|&(n, _)| n != own)
        .map(|(_, m)| Arc::clone(m))
        .collect()
}

impl<B: Backend> Cores for CoreSet<B> {
    fn start_queue(&mut self, start: QueueStart) {
        let (device, index) = (start.device, start.index);
        let Some(entry) = self.devices.get(&device) else {
            return;
        };
        let queue = match Queue::new(start.config, &start.map, start.inflight) {
            Ok(queue) => queue,
            Err(error) => {
                tracing::warn!(device = device.0, queue = index.0, %error, "the driver's rings are unusable");
                return self
                    .local
                    .push_back(CoreEvent::QueueFailed { device, index });
            }
        };
        let core = self.pick_core();
        self.load[core] += 1;
        self.placed.insert((device, index), core);
        let to_core = StartQueue {
            device,
            index,
            kind: start.kind,
            queue,
            call: start.call,
            shared: Arc::clone(&entry.shared),
        };
        self.mailboxes[core].post(CoreMessage::Start(Box::new(to_core), start.kick));
    }

    fn stop_queue(&mut self, device: DeviceId, index: QueueIdx) {
        self.stop(device, index, false);
    }

    fn reset_queue(&mut self, device: DeviceId, index: QueueIdx) {
        self.stop(device, index, true);
    }

    fn set_call(&mut self, device: DeviceId, index: QueueIdx, call: Option<Arc<EventFd>>) {
        if let Some(&core) = self.placed.get(&(device, index)) {
            self.mailboxes[core].post(CoreMessage::SetCall {
                device,
                index,
                call,
            });
        }
    }

    fn set_memory(&mut self, device: DeviceId, map: Arc<GuestMap>) {
        let mut cores: Vec<usize> = self
            .placed
            .iter()
            .filter(|((d, _), _)| *d == device)
            .map(|(_, &core)| core)
            .collect();
        cores.sort_unstable();
        cores.dedup();
        let Some(entry) = self.devices.get_mut(&device) else {
            return;
        };
        entry.maps_pending += cores.len().max(1);
        entry.maps_asked += 1;
        if cores.is_empty() {
            self.local.push_back(CoreEvent::MemoryReplaced { device });
        }
        for core in cores {
            self.mailboxes[core].post(CoreMessage::SetMemory {
                device,
                map: Arc::clone(&map),
            });
        }
    }

    fn end_session(&mut self, device: DeviceId) {
        let Some(entry) = self.devices.get(&device) else {
            return;
        };
        let was_mounted = entry.shared.session.mounted();
        if let Some(backend) = entry.shared.backend() {
            backend.reset(&entry.shared.session);
        }
        if was_mounted {
            self.local.push_back(CoreEvent::Mounted {
                device,
                mounted: false,
            });
        }
    }
}
