//! The cores: pinned threads that run a [`crate::reactor::Reactor`] each, their helper threads, and the management thread's handle on them.
//!
//! The management thread talks to a core through its mailbox and hears from it through [`CoreSet::take_event`]. A core
//! never waits for the management thread, and the other way round.

mod balance;
mod crew;
mod helpers;
mod meter;
mod placement;
mod thread;
mod tune;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ferry_shared::counters::{self, Counters};
use ferry_shared::trace::Traces;

use crate::dispatch::Outcome;
use crate::engine::{Cores, QueueStart};
use crate::id::{CoreEvent, DeviceId, QueueIdx};
use crate::mailbox::Mailbox;
use crate::mem::GuestMap;
use crate::os::arena::{Arena, Pages};
use crate::os::eventfd::EventFd;
use crate::reactor::{Backend, DeviceShared, Interrupted, StartQueue};
use crate::slot::SlotBody;
use crate::virtio::queue::{Queue, QueueState};
use crew::{Crew, Ground};
use placement::Placement;
pub use placement::QueueName;
use tune::LoadMeter;

/// Request slots of a core when the operator names no number: requests that it can have in flight.
pub const DEFAULT_SLOTS_PER_CORE: u32 = 256;
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
    Interrupt(Interrupted),
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
    /// Request slots of each core.
    pub slots: u32,
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
    options: CoreOptions,
    crew: Crew<B>,
    ground: Ground,
    /// Bytes and pages of the memory that the cores work in.
    memory: (usize, Pages),
    local: VecDeque<CoreEvent>,
    /// What [`CoreSet::take_event`] has looked at already.
    settled: VecDeque<CoreEvent>,
    devices: HashMap<DeviceId, DeviceEntry<B>>,
    placement: Placement,
    /// Where queues go that have been told to move.
    moving: HashMap<QueueName, usize>,
    loads: LoadMeter,
    counters_file: OwnedFd,
    trace_file: OwnedFd,
}

/// Bytes that one core's slots and buffers take.
pub fn core_memory(slots: u32, buffers: u32) -> usize {
    Arena::room_for::<SlotBody>(slots) + Arena::room_for_pool(buffers)
}

impl<B: Backend> CoreSet<B> {
    /// Starts the cores, whose memory comes from `arena`.
    pub fn start(options: &CoreOptions, arena: &mut Arena) -> io::Result<CoreSet<B>> {
        let count = options.cpus.len();
        let (counters, counters_file) = Counters::create(count).map_err(io::Error::other)?;
        let origin = Instant::now();
        let (traces, trace_file) = Traces::create(count).map_err(io::Error::other)?;
        // The cores count and trace as long as the process lives.
        let ground = Ground {
            events: Arc::new(Mailbox::new(MAILBOX)?),
            counters: Box::leak(Box::new(counters)),
            traces: Box::leak(Box::new(traces)),
            origin,
        };
        Ok(CoreSet {
            crew: Crew::start(options, arena, &ground)?,
            memory: (arena.bytes(), arena.pages()),
            local: VecDeque::new(),
            settled: VecDeque::new(),
            devices: HashMap::new(),
            placement: Placement::new(options.cpus.clone()),
            moving: HashMap::new(),
            loads: LoadMeter::default(),
            counters_file,
            trace_file,
            options: options.clone(),
            ground,
        })
    }

    /// The file of the counters, for a control plane to read.
    pub fn counters_file(&self) -> BorrowedFd<'_> {
        self.counters_file.as_fd()
    }

    /// Whether every core has got as far as to answer the last [`CoreSet::ping`].
    pub fn all_answered(&self) -> bool {
        self.crew.all_answered()
    }

    /// Asks every core for a sign of life.
    pub fn ping(&self) {
        self.crew.ping();
    }

    /// Whether a device with this id would be counted.
    pub fn would_count(&self, device: DeviceId) -> bool {
        counters::is_free(self.ground.counters.words(), device.0)
    }

    /// Makes a device known, before its queues are started.
    pub fn attach(&mut self, device: DeviceId, name: &str, shared: Arc<DeviceShared<B>>) {
        counters::register(self.ground.counters.words(), device.0, name);
        self.crew.helpers.attach(device);
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
        counters::unregister(self.ground.counters.words(), device.0);
        self.crew.helpers.detach(device);
        self.devices.remove(&device);
        self.placement.forget(device);
        self.moving.retain(|(moving, _), _| *moving != device);
    }

    /// What the cores share of a device.
    pub fn shared(&self, device: DeviceId) -> Option<&Arc<DeviceShared<B>>> {
        self.devices.get(&device).map(|d| &d.shared)
    }

    /// The management thread is about to sleep on [`CoreSet::event_fd`]; `false` when there are events.
    pub fn prepare_sleep(&self) -> bool {
        self.local.is_empty() && self.settled.is_empty() && self.ground.events.prepare_sleep()
    }

    /// The management thread is awake again.
    pub fn awake(&self) {
        self.ground.events.awake();
        self.ground.events.drain();
    }

    /// Readable when a core has something to say to a sleeping management thread.
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        self.ground.events.as_fd()
    }

    /// The next thing that the cores have to say.
    pub fn take_event(&mut self) -> Option<CoreEvent> {
        if let Some(event) = self.settled.pop_front() {
            return Some(event);
        }
        loop {
            let event = self
                .local
                .pop_front()
                .or_else(|| self.ground.events.take())?;
            match &event {
                CoreEvent::QueueStopped { device, index, .. } => {
                    self.placement.gone((*device, *index));
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
        self.crew.end();
    }

    fn post(&self, core: usize, message: CoreMessage<B>) {
        if let Some(mailbox) = self.crew.mailboxes.get(core) {
            mailbox.post(message);
        }
    }

    fn stop(&mut self, device: DeviceId, index: QueueIdx, reset: bool) {
        match self.placement.core_of((device, index)) {
            Some(core) => self.post(
                core,
                CoreMessage::Stop {
                    device,
                    index,
                    reset,
                },
            ),
            None => self.local.push_back(CoreEvent::QueueStopped {
                device,
                index,
                state: QueueState::default(),
            }),
        }
    }
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
        let wanted = self.moving.remove(&(device, index));
        let (core, place) = self.placement.place((device, index), wanted);
        let to_core = StartQueue {
            device,
            index,
            kind: start.kind,
            queue,
            call: start.call,
            shared: Arc::clone(&entry.shared),
            place,
        };
        self.post(core, CoreMessage::Start(Box::new(to_core), start.kick));
    }

    fn stop_queue(&mut self, device: DeviceId, index: QueueIdx) {
        self.stop(device, index, false);
    }

    fn reset_queue(&mut self, device: DeviceId, index: QueueIdx) {
        self.stop(device, index, true);
    }

    fn set_call(&mut self, device: DeviceId, index: QueueIdx, call: Option<Arc<EventFd>>) {
        if let Some(core) = self.placement.core_of((device, index)) {
            let message = CoreMessage::SetCall {
                device,
                index,
                call,
            };
            self.post(core, message);
        }
    }

    fn set_memory(&mut self, device: DeviceId, map: Arc<GuestMap>) {
        let cores = self.placement.cores_of(device);
        let Some(entry) = self.devices.get_mut(&device) else {
            return;
        };
        entry.maps_pending += cores.len().max(1);
        entry.maps_asked += 1;
        if cores.is_empty() {
            self.local.push_back(CoreEvent::MemoryReplaced { device });
        }
        for core in cores {
            let map = Arc::clone(&map);
            self.post(core, CoreMessage::SetMemory { device, map });
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
