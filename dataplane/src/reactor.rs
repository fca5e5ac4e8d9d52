//! One core's work: poll the queues, run what they hold, answer.
//!
//! [`Reactor::turn`] is the life of a request in order. The reactor is called by its core only, never blocks, and never
//! allocates once its queues are started; system calls, time and other threads are behind [`System`], so the same code runs
//! pinned on a core, in a fuzzer and in a simulation.
// UNSAFETY: reaches slot bodies by raw pointer, because a body may be lent to the helper thread while its neighbours are used.
#![expect(
    unsafe_code,
    reason = "slot bodies are lent to helper threads one by one"
)]

use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU32, Ordering};

use ferry_shared::errno::Errno;
use ferry_shared::limits::{MAX_DATA_BUFFER, SLOT_INPUT, SLOT_OUTPUT};

use crate::dispatch::{self, FIRST, Incoming, Malformed, Outcome};
use crate::fsdev::null::Null;
use crate::fsdev::{FsDev, IoOp, Pin};
use crate::fuse::abi::{FUSE_DESTROY, FUSE_INIT};
use crate::fuse::session::Session;
use crate::id::{CoreEvent, DeviceId, QueueIdx, QueueKind};
use crate::mem::{GuestMap, IoVec, Segments};
use crate::pool::{DataBuffer, DataPool, Slab};
use crate::slot::{SlotBody, SlotMeta, Stage, Transfer};
use crate::virtio::queue::{Queue, QueueState};

/// Requests that one queue may start in a turn before the next queue's turn.
const BUDGET: u32 = 32;
/// INTERRUPTs remembered that came before the request that they mean.
const EARLY_INTERRUPTS: usize = 64;

/// What a core serves: the backends' enum in the data plane, one backend in tests.
pub trait Backend: Send + Sync + 'static {
    /// Runs one request; see [`dispatch::execute`].
    fn execute(&self, session: &Session, rq: Incoming<'_>) -> Outcome;
    /// Answers a transfer; see [`dispatch::finish_io`].
    fn finish_io(&self, input: &[u8], reply: Segments<'_>, done: (IoOp, Pin, i32)) -> u32;
    /// See [`FsDev::may_block`].
    fn may_block(&self, opcode: u32) -> bool;
    /// See [`FsDev::lock_epoch`].
    fn lock_epoch(&self) -> u64;
    /// See [`Session::reset`].
    fn reset(&self, session: &Session);
}

impl<F: FsDev + 'static> Backend for F {
    fn execute(&self, session: &Session, rq: Incoming<'_>) -> Outcome {
        dispatch::execute(Some(self), session, rq)
    }

    fn finish_io(&self, input: &[u8], reply: Segments<'_>, done: (IoOp, Pin, i32)) -> u32 {
        let (op, pin, result) = done;
        dispatch::finish_io(self, input, reply, op, pin, result)
    }

    fn may_block(&self, opcode: u32) -> bool {
        FsDev::may_block(self, opcode)
    }

    fn lock_epoch(&self) -> u64 {
        FsDev::lock_epoch(self)
    }

    fn reset(&self, session: &Session) {
        session.reset(self);
    }
}

/// What all cores share of a device.
#[derive(Debug)]
pub struct DeviceShared<B> {
    /// The FUSE session.
    pub session: Session,
    backend: spin::RwLock<Option<Arc<B>>>,
    epoch: AtomicU32,
}

impl<B> DeviceShared<B> {
    /// A device that nobody has mounted.
    pub fn new(session: Session, backend: Option<Arc<B>>) -> DeviceShared<B> {
        DeviceShared {
            session,
            backend: spin::RwLock::new(backend),
            epoch: AtomicU32::new(1),
        }
    }

    /// Replaces the backend; only while no session is mounted.
    pub fn set_backend(&self, backend: Option<Arc<B>>) {
        *self.backend.write() = backend;
        // Release: a core that sees the new epoch (Acquire in `CoreDevice::refresh`) sees the new backend.
        self.epoch.fetch_add(1, Ordering::Release);
    }

    /// The backend, if its fsdev exists.
    pub fn backend(&self) -> Option<Arc<B>> {
        self.backend.read().clone()
    }
}

/// What the reactor asks of the world around it.
pub trait System<B> {
    /// Interrupts a driver.
    type Call: Send;

    /// Interrupts the driver.
    fn interrupt(&mut self, call: &Self::Call);
    /// Puts an operation on the ring; `iovecs` stays where it is until the completion. `false` when the ring is full.
    fn submit(&mut self, slot: u32, op: IoOp, iovecs: &[IoVec]) -> bool;
    /// Has a request run on the helper thread, which then hands the outcome to [`Reactor::offload_done`].
    fn offload(&mut self, slot: u32, job: Job<B>);
    /// Tells the management thread.
    fn report(&mut self, event: CoreEvent);
    /// Tells every other core that a request of this device is to be interrupted.
    fn spread_interrupt(&mut self, device: DeviceId, unique: u64);
}

/// A request on its way to the helper thread.
#[derive(Debug)]
pub struct Job<B> {
    run: Run,
    shared: Arc<DeviceShared<B>>,
    backend: Option<Arc<B>>,
}

// SAFETY: the pointers in `run` name a slot body and buffers that the core does not touch until the outcome has come back.
unsafe impl<B: Send + Sync> Send for Job<B> {}

impl<B: Backend> Job<B> {
    /// Runs the request.
    pub fn run(self) -> Outcome {
        // SAFETY: the job is the only user of the slot until its outcome is handed back, see `Reactor::run`.
        unsafe {
            self.run
                .execute(self.backend.as_deref(), &self.shared.session)
        }
    }
}

/// Where a request's bytes are.
#[derive(Clone, Copy, Debug)]
struct Run {
    body: NonNull<SlotBody>,
    map: NonNull<GuestMap>,
    input: NonNull<[u8]>,
    scratch: NonNull<[u8]>,
}

impl Run {
    /// Runs the request where it is.
    ///
    /// # Safety
    ///
    /// The caller is the only user of the slot's body and buffers until this returns, and the queue that the request came
    /// from goes on holding the guest map.
    unsafe fn execute<B: Backend>(self, backend: Option<&B>, session: &Session) -> Outcome {
        // SAFETY: exclusive by the contract; only the chain is borrowed from the body, and only shared, so that it does not
        // overlap `input` and `scratch`, which lie in other fields or in buffers.
        let chain = unsafe { &(*self.body.as_ptr()).chain };
        // SAFETY: exclusive by the contract, and initialised memory.
        let (input, scratch) = unsafe { (self.input.as_ref(), &mut *self.scratch.as_ptr()) };
        // SAFETY: the queue holds the map while the request touches it.
        let map = unsafe { self.map.as_ref() };
        let rq = Incoming {
            input,
            data: chain.readable(map).after(input.len()),
            reply: chain.writable(map),
            scratch,
        };
        match backend {
            Some(backend) => backend.execute(session, rq),
            None => dispatch::execute::<Null>(None, session, rq),
        }
    }
}

/// The guest map of a queue that has a request in hand: neither the queue nor its map goes away before that request does.
/// Spares the request path the reference count.
struct HeldMap(NonNull<GuestMap>);

impl core::ops::Deref for HeldMap {
    type Target = GuestMap;

    fn deref(&self) -> &GuestMap {
        // SAFETY: a queue leaves the core only with nothing in flight, and its map is replaced only in `check_memory`,
        // between requests; values of this type do not outlive the method that made them.
        unsafe { self.0.as_ref() }
    }
}

/// A device as one core sees it.
struct CoreDevice<B> {
    id: DeviceId,
    shared: Arc<DeviceShared<B>>,
    backend: Option<Arc<B>>,
    epoch: u32,
    /// The map that replaces the present one as soon as nothing in flight uses that.
    next_map: Option<Arc<GuestMap>>,
    /// The last seen value of the backend's lock epoch.
    lock_epoch: u64,
}

impl<B: Backend> CoreDevice<B> {
    fn refresh(&mut self) {
        // Acquire: pairs with the Release in `DeviceShared::set_backend`.
        let epoch = self.shared.epoch.load(Ordering::Acquire);
        if epoch != self.epoch {
            self.backend = self.shared.backend();
            self.epoch = epoch;
        }
    }
}

/// How a queue ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// Not at all: it runs.
    Runs,
    /// What is in flight is completed first.
    Stop,
    /// What waits is dropped.
    Reset,
}

/// A queue in the hands of this core.
struct RunQueue<C> {
    device: DeviceId,
    index: QueueIdx,
    kind: QueueKind,
    queue: Queue,
    call: Option<C>,
    ending: Ending,
    /// Requests that hold a slot.
    in_flight: u32,
    /// Those of them that may touch guest memory at any moment: on the ring or on the helper thread.
    touching: u32,
    /// Something was given back since the last publication.
    dirty: bool,
}

/// Everything a core needs to begin serving a queue.
pub struct StartQueue<B, C> {
    /// The device.
    pub device: DeviceId,
    /// Which of its queues.
    pub index: QueueIdx,
    /// What travels on it.
    pub kind: QueueKind,
    /// The queue, checked against the map.
    pub queue: Queue,
    /// Interrupts the driver.
    pub call: Option<C>,
    /// What the cores share of the device.
    pub shared: Arc<DeviceShared<B>>,
}

/// Counters of one core, for its operator; written by the core only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Requests taken from queues.
    pub requests: u64,
    /// Times that a request found no data buffer and waited.
    pub buffer_waits: u64,
    /// Times that a queue was left alone because no slot was free.
    pub slot_waits: u64,
}

/// One core's queues, slots and buffers.
pub struct Reactor<B, S: System<B>> {
    devices: Vec<CoreDevice<B>>,
    queues: Vec<Option<RunQueue<S::Call>>>,
    bodies: Slab<SlotBody>,
    slots: Vec<SlotMeta>,
    free: Vec<u32>,
    pool: DataPool,
    /// Requests that wait for data buffers, oldest first.
    need_buffers: VecDeque<u32>,
    /// Requests that wait for room on the ring, oldest first.
    unsubmitted: VecDeque<u32>,
    /// SETLKW requests that wait for a lock.
    waiting: Vec<u32>,
    early_interrupts: heapless::Deque<(DeviceId, u64), EARLY_INTERRUPTS>,
    counters: Counters,
}

impl<B: Backend, S: System<B>> Reactor<B, S> {
    /// A core with its memory. `queues` is the most that it will serve at a time.
    pub fn new(bodies: Slab<SlotBody>, pool: DataPool, queues: usize) -> Self {
        let n = bodies.len();
        let cap = n as usize;
        Reactor {
            devices: Vec::with_capacity(queues),
            queues: Vec::with_capacity(queues),
            slots: (0..n).map(|_| SlotMeta::free()).collect(),
            free: (0..n).rev().collect(),
            bodies,
            pool,
            need_buffers: VecDeque::with_capacity(cap),
            unsubmitted: VecDeque::with_capacity(cap),
            waiting: Vec::with_capacity(cap),
            early_interrupts: heapless::Deque::new(),
            counters: Counters::default(),
        }
    }

    /// The counters.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Whether a request is on the ring, so that completions are to be looked for.
    pub fn has_unsubmitted(&self) -> bool {
        !self.unsubmitted.is_empty()
    }

    /// Whether a SETLKW request waits, so that the core must not sleep for long.
    pub fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Begins to serve a queue.
    pub fn start(&mut self, start: StartQueue<B, S::Call>, sys: &mut S) {
        if !self.devices.iter().any(|d| d.id == start.device) {
            let mut device = CoreDevice {
                id: start.device,
                shared: start.shared,
                backend: None,
                epoch: 0,
                next_map: None,
                lock_epoch: 0,
            };
            device.refresh();
            self.devices.push(device);
        }
        if let Some(call) = &start.call {
            // What was published before this start may not have been announced.
            sys.interrupt(call);
        }
        let mut queue = RunQueue {
            device: start.device,
            index: start.index,
            kind: start.kind,
            queue: start.queue,
            call: start.call,
            ending: Ending::Runs,
            in_flight: 0,
            touching: 0,
            dirty: false,
        };
        queue.queue.disable_kicks();
        match self.queues.iter_mut().find(|q| q.is_none()) {
            Some(place) => *place = Some(queue),
            None => self.queues.push(Some(queue)),
        }
    }

    /// Stops a queue, or drops what it holds (`reset`); reports [`CoreEvent::QueueStopped`] when done.
    pub fn stop(&mut self, device: DeviceId, index: QueueIdx, reset: bool, sys: &mut S) {
        let Some(at) = self.find(device, index) else {
            return;
        };
        if let Some(q) = self.queue_mut(at) {
            q.ending = if reset { Ending::Reset } else { Ending::Stop };
        }
        for slot in 0..self.bodies.len() {
            let Some(meta) = self
                .meta(slot)
                .filter(|m| m.queue == at && m.stage != Stage::Free)
            else {
                continue;
            };
            let stage = meta.stage;
            meta.discard |= reset;
            match stage {
                Stage::Waiting | Stage::NeedsBuffers => {
                    self.need_buffers.retain(|&s| s != slot);
                    self.waiting.retain(|&s| s != slot);
                    if reset {
                        self.release(slot, None, sys)
                    } else {
                        self.give_back(slot, sys)
                    }
                }
                Stage::Unsubmitted if reset => {
                    self.unsubmitted.retain(|&s| s != slot);
                    self.end_transfer(slot, -Errno::ECANCELED.raw(), sys);
                }
                Stage::Free | Stage::Offloaded | Stage::Unsubmitted | Stage::Submitted => {}
            }
        }
        if reset {
            self.forget_interrupts(device);
        }
        self.check_stopped(at, sys);
    }

    /// Changes where a queue's interrupts go.
    pub fn set_call(
        &mut self,
        device: DeviceId,
        index: QueueIdx,
        call: Option<S::Call>,
        sys: &mut S,
    ) {
        if let Some(call) = &call {
            sys.interrupt(call);
        }
        if let Some(q) = self.find(device, index).and_then(|at| self.queue_mut(at)) {
            q.call = call;
        }
    }

    /// Replaces a device's guest memory; reports [`CoreEvent::MemoryReplaced`] when the old one is out of use here.
    pub fn set_memory(&mut self, device: DeviceId, map: Arc<GuestMap>, sys: &mut S) {
        match self.devices.iter_mut().find(|d| d.id == device) {
            Some(d) => {
                d.next_map = Some(map);
                self.check_memory(device, sys);
            }
            None => sys.report(CoreEvent::MemoryReplaced { device }),
        }
    }

    /// Interrupts a waiting request of this core; another core has seen the INTERRUPT.
    pub fn interrupt_request(&mut self, device: DeviceId, unique: u64, sys: &mut S) {
        let found = self
            .waiting
            .iter()
            .copied()
            .find(|&slot| self.is_request(slot, device, unique));
        match found {
            Some(slot) => {
                self.waiting.retain(|&s| s != slot);
                self.fail(slot, Errno::EINTR, sys);
            }
            None => {
                if self.early_interrupts.is_full() {
                    self.early_interrupts.pop_front();
                }
                let _ = self.early_interrupts.push_back((device, unique));
            }
        }
    }

    /// One round over everything; returns whether there was something to do.
    pub fn turn(&mut self, sys: &mut S) -> bool {
        let mut worked = self.retry(sys);
        let queues = u32::try_from(self.queues.len()).unwrap_or(u32::MAX);
        for at in 0..queues {
            worked |= self.serve(at, sys);
        }
        for at in 0..queues {
            self.publish(at, sys);
        }
        worked
    }

    /// Tries waiting locks again although no local release was seen; for locks that other processes hold.
    pub fn poll_locks(&mut self, sys: &mut S) {
        let mut at = 0;
        while let Some(&slot) = self.waiting.get(at) {
            // A request that still waits is appended again, so that each is tried once in this call.
            let before = self.waiting.len();
            self.waiting.remove(at);
            self.run(slot, sys);
            if self.waiting.len() == before {
                if let Some(again) = self.waiting.pop() {
                    self.waiting.insert(at, again);
                }
                at = at.saturating_add(1);
            }
        }
    }

    /// Asks all drivers for notifications; `false` when there is work already, and the core must not sleep.
    pub fn arm(&mut self) -> bool {
        let mut quiet = true;
        let slots = !self.free.is_empty();
        for q in self.queues.iter_mut().flatten() {
            if q.ending == Ending::Runs && q.kind != QueueKind::Notification {
                quiet &= !(q.queue.enable_kicks() && slots);
            }
        }
        quiet
    }

    /// Tells all drivers to save their notifications.
    pub fn disarm(&mut self) {
        for q in self.queues.iter_mut().flatten() {
            q.queue.disable_kicks();
        }
    }

    /// The outcome of a request that ran on the helper thread.
    pub fn offload_done(&mut self, slot: u32, outcome: Outcome, sys: &mut S) {
        let Some(at) = self
            .meta(slot)
            .filter(|m| m.stage == Stage::Offloaded)
            .map(|m| m.queue)
        else {
            return;
        };
        self.touches(at, false);
        self.finish(slot, outcome, sys);
        self.settle(at, sys);
    }

    /// The result of an operation on the ring: bytes or a negative error number.
    pub fn io_done(&mut self, slot: u32, result: i32, sys: &mut S) {
        let Some(meta) = self.meta(slot).filter(|m| m.stage == Stage::Submitted) else {
            return;
        };
        let at = meta.queue;
        let again = meta.transfer.as_mut().is_some_and(|t| t.advance(result));
        let total = meta.transfer.map_or(result, |t| t.total(result));
        self.touches(at, false);
        let discard = self.meta(slot).is_some_and(|m| m.discard);
        if again && !discard {
            self.submit(slot, sys);
        } else {
            self.end_transfer(slot, total, sys);
        }
        self.settle(at, sys);
    }

    // ---- one request ----

    /// Takes requests from a queue.
    fn serve(&mut self, at: u32, sys: &mut S) -> bool {
        let mut worked = false;
        for _ in 0..BUDGET {
            let Some(q) = self.queues.get_mut(at as usize).and_then(Option::as_mut) else {
                break;
            };
            if q.ending != Ending::Runs || q.kind == QueueKind::Notification || !q.queue.has_work()
            {
                break;
            }
            if self
                .devices
                .iter()
                .any(|d| d.id == q.device && d.next_map.is_some())
            {
                break;
            }
            let Some(slot) = self.free.pop() else {
                self.counters.slot_waits = self.counters.slot_waits.wrapping_add(1);
                break;
            };
            let Some(mut body) = self.bodies.get(slot) else {
                break;
            };
            // SAFETY: the slot was free, so nobody else uses its body.
            let chain = unsafe { &mut body.as_mut().chain };
            match q.queue.pop(chain) {
                Ok(Some(popped)) => {
                    q.in_flight = q.in_flight.saturating_add(1);
                    worked = true;
                    self.counters.requests = self.counters.requests.wrapping_add(1);
                    if let Some(meta) = self.slots.get_mut(slot as usize) {
                        meta.queue = at;
                        meta.head = Some(popped.head);
                    }
                    self.take_in(slot, popped.fault.is_some(), sys);
                }
                Ok(None) => {
                    self.free.push(slot);
                    break;
                }
                Err(_) => {
                    let (device, index) = (q.device, q.index);
                    self.free.push(slot);
                    sys.report(CoreEvent::QueueFailed { device, index });
                    break;
                }
            }
        }
        worked
    }

    /// Copies a request in and gets its buffers.
    fn take_in(&mut self, slot: u32, faulty: bool, sys: &mut S) {
        let Some(body) = self.bodies.get(slot) else {
            return;
        };
        // SAFETY: the slot has just been taken, nobody else uses its body. Chain and input are different fields.
        let (chain, input) = unsafe { (&(*body.as_ptr()).chain, &mut (*body.as_ptr()).input) };
        let Some(map) = self.map_of(slot) else { return };
        let readable = chain.readable(&map);
        let first = input
            .get_mut(..FIRST)
            .map_or(0, |first| readable.read(first));
        let seen = input.get(..first).unwrap_or_default();
        match dispatch::intake(seen, readable.len()) {
            Err(Malformed {
                errno,
                unique: Some(unique),
            }) => {
                self.set_unique(slot, unique);
                self.fail(slot, errno, sys);
            }
            Err(Malformed { unique: None, .. }) => self.release(slot, Some(0), sys),
            Ok(intake) => {
                self.set_unique(slot, dispatch::unique(seen));
                if faulty {
                    return self.fail(slot, Errno::EFAULT, sys);
                }
                let Ok(input_len) = u32::try_from(intake.input) else {
                    return self.fail(slot, Errno::E2BIG, sys);
                };
                if input_len > MAX_DATA_BUFFER {
                    return self.fail(slot, Errno::E2BIG, sys);
                }
                if let Some(rest) = input.get_mut(first..intake.input.min(SLOT_INPUT)) {
                    readable.after(first).read(rest);
                }
                if let Some(meta) = self.meta(slot) {
                    meta.input_len = input_len;
                }
                self.get_buffers(slot, sys);
            }
        }
    }

    /// Takes the data buffers that a request needs, all or none, and runs it.
    fn get_buffers(&mut self, slot: u32, sys: &mut S) {
        let (Some(body), Some(map)) = (self.bodies.get(slot), self.map_of(slot)) else {
            return;
        };
        let Some(meta) = self.slots.get_mut(slot as usize) else {
            return;
        };
        let input_len = meta.input_len as usize;
        let long_input = input_len > SLOT_INPUT;
        // SAFETY: the slot is the core's, as in `take_in`; shared access to two fields.
        let (chain, input) = unsafe { (&(*body.as_ptr()).chain, &(*body.as_ptr()).input) };
        let room = chain.writable(&map).len();
        let scratch = dispatch::scratch_needed(
            input.get(..input_len.min(SLOT_INPUT)).unwrap_or_default(),
            room,
        );
        let long_reply = scratch > SLOT_OUTPUT;
        let needed = usize::from(long_input) + usize::from(long_reply);
        if self.pool.available() < needed
            || (needed > 0 && self.need_buffers.front().is_some_and(|&s| s != slot))
        {
            // In order of arrival, so that a request that needs two buffers is not overtaken for ever.
            if meta.stage != Stage::NeedsBuffers {
                self.counters.buffer_waits = self.counters.buffer_waits.wrapping_add(1);
                meta.stage = Stage::NeedsBuffers;
                self.need_buffers.push_back(slot);
            }
            return;
        }
        if meta.stage == Stage::NeedsBuffers {
            self.need_buffers.pop_front();
        }
        meta.scratch_len =
            u32::try_from(scratch.min(MAX_DATA_BUFFER as usize)).unwrap_or(MAX_DATA_BUFFER);
        meta.output_buffer = if long_reply { self.pool.take() } else { None };
        if long_input && let Some(buffer) = self.pool.take() {
            // SAFETY: the buffer was free, so nobody else uses its bytes.
            let long = unsafe { &mut *self.pool.bytes(&buffer).as_ptr() };
            // What has been looked at already is taken from the copy: guest memory may have changed since.
            if let Some((seen, rest)) = long
                .get_mut(..input_len)
                .and_then(|l| l.split_at_mut_checked(SLOT_INPUT))
            {
                seen.copy_from_slice(input);
                chain.readable(&map).after(SLOT_INPUT).read(rest);
            }
            meta.input_buffer = Some(buffer);
        }
        self.run(slot, sys);
    }

    /// Runs a request here, or sends it to the helper thread.
    fn run(&mut self, slot: u32, sys: &mut S) {
        let Some(run) = self.locate(slot) else { return };
        // SAFETY: the slot is the core's; nobody else writes its input.
        let input = unsafe { run.input.as_ref() };
        let opcode = dispatch::opcode(input);
        let Some(meta) = self.slots.get_mut(slot as usize) else {
            return;
        };
        let at = meta.queue;
        let Some(device) = self
            .queues
            .get(at as usize)
            .and_then(Option::as_ref)
            .map(|q| q.device)
        else {
            return;
        };
        let Some(device) = self.devices.iter_mut().find(|d| d.id == device) else {
            return;
        };
        device.refresh();
        if device.backend.as_ref().is_some_and(|b| b.may_block(opcode)) {
            meta.stage = Stage::Offloaded;
            let job = Job {
                run,
                shared: Arc::clone(&device.shared),
                backend: device.backend.clone(),
            };
            self.touches(at, true);
            return sys.offload(slot, job);
        }
        // SAFETY: the slot is the core's and stays so until this returns; the queue holds the map.
        let outcome = unsafe { run.execute(device.backend.as_deref(), &device.shared.session) };
        self.finish(slot, outcome, sys);
    }

    /// What comes after a request has run.
    fn finish(&mut self, slot: u32, outcome: Outcome, sys: &mut S) {
        match outcome {
            Outcome::Done(written) => {
                self.note_mount(slot, sys);
                self.release(slot, Some(written), sys);
            }
            Outcome::Submit { op, pin } => {
                if let Some(meta) = self.meta(slot) {
                    meta.transfer = Some(Transfer { op, pin, done: 0 });
                }
                self.submit(slot, sys);
            }
            Outcome::Wait => self.wait(slot, sys),
            Outcome::Interrupt { unique } => {
                let device = self.device_of(slot);
                self.release(slot, Some(0), sys);
                if let Some(device) = device {
                    self.interrupt_request(device, unique, sys);
                    sys.spread_interrupt(device, unique);
                }
            }
        }
    }

    /// Has a SETLKW request wait.
    fn wait(&mut self, slot: u32, sys: &mut S) {
        let (Some(device), Some(meta)) = (self.device_of(slot), self.meta(slot)) else {
            return;
        };
        if meta.discard {
            return self.release(slot, None, sys);
        }
        let unique = meta.unique;
        meta.stage = Stage::Waiting;
        let at = meta.queue;
        if self.early_interrupts.iter().any(|&e| e == (device, unique)) {
            self.early_interrupts.retain(|&e| e != (device, unique));
            return self.fail(slot, Errno::EINTR, sys);
        }
        if self.queue_mut(at).is_some_and(|q| q.ending != Ending::Runs) {
            return self.give_back(slot, sys);
        }
        self.waiting.push(slot);
    }

    /// Puts a transfer, or the rest of it, on the ring.
    fn submit(&mut self, slot: u32, sys: &mut S) {
        let (Some(mut body), Some(map)) = (self.bodies.get(slot), self.map_of(slot)) else {
            return;
        };
        let Some(meta) = self.slots.get_mut(slot as usize) else {
            return;
        };
        let Some(transfer) = meta.transfer else {
            return;
        };
        let input_len = meta.input_len as usize;
        // SAFETY: the slot is the core's; `chain` and `iovecs` are different fields.
        let body = unsafe { body.as_mut() };
        let (op, count) = transfer.rest(&body.chain, &map, input_len, &mut body.iovecs);
        let accepted = sys.submit(slot, op, body.iovecs.get(..count).unwrap_or_default());
        let at = meta.queue;
        if accepted {
            meta.stage = Stage::Submitted;
            self.touches(at, true);
        } else {
            meta.stage = Stage::Unsubmitted;
            self.unsubmitted.push_back(slot);
        }
    }

    /// Answers a transfer.
    fn end_transfer(&mut self, slot: u32, result: i32, sys: &mut S) {
        let Some(run) = self.locate(slot) else { return };
        let Some(meta) = self.slots.get_mut(slot as usize) else {
            return;
        };
        let Some(transfer) = meta.transfer.take() else {
            return;
        };
        let discard = meta.discard;
        let Some(device) = self
            .device_of(slot)
            .and_then(|id| self.devices.iter().find(|d| d.id == id))
        else {
            return;
        };
        // SAFETY: the slot is the core's again; chain and input are not written meanwhile.
        let (chain, input) = unsafe { (&(*run.body.as_ptr()).chain, run.input.as_ref()) };
        // SAFETY: the queue holds the map.
        let map = unsafe { run.map.as_ref() };
        let reply = if discard {
            Segments::empty()
        } else {
            chain.writable(map)
        };
        // The backend may have been taken away from the device, but not from a transfer that pins a file of it.
        let written = device.backend.as_ref().map_or(0, |backend| {
            backend.finish_io(input, reply, (transfer.op, transfer.pin, result))
        });
        self.release(slot, Some(written), sys);
    }

    /// Answers a request with an error.
    fn fail(&mut self, slot: u32, errno: Errno, sys: &mut S) {
        let (Some(body), Some(map)) = (self.bodies.get(slot), self.map_of(slot)) else {
            return;
        };
        let unique = self.meta(slot).map_or(0, |m| m.unique);
        // SAFETY: the slot is the core's.
        let chain = unsafe { &(*body.as_ptr()).chain };
        let written = dispatch::fail(unique, chain.writable(&map), errno);
        self.release(slot, Some(written), sys);
    }

    /// Gives a finished request back to its queue (unless it is to be dropped: `None`) and frees its slot.
    fn release(&mut self, slot: u32, written: Option<u32>, sys: &mut S) {
        let Some((at, head, discard)) = self.free_slot(slot) else {
            return;
        };
        if let Some(q) = self.queue_mut(at) {
            match written.filter(|_| !discard) {
                Some(written) => {
                    q.queue.push_used(head, written);
                    q.dirty = true;
                }
                None => q.queue.abandon(head),
            }
            q.in_flight = q.in_flight.saturating_sub(1);
        }
        self.check_stopped(at, sys);
    }

    /// Puts a request that has not run back, for the queue's next start.
    fn give_back(&mut self, slot: u32, sys: &mut S) {
        let Some(body) = self.bodies.get(slot) else {
            return;
        };
        let Some((at, head, _)) = self.free_slot(slot) else {
            return;
        };
        if let Some(q) = self.queue_mut(at) {
            // SAFETY: the slot is the core's; it is taken again by a later `pop` only.
            q.queue.requeue(head, unsafe { &(*body.as_ptr()).chain });
            q.in_flight = q.in_flight.saturating_sub(1);
        }
        self.check_stopped(at, sys);
    }

    fn free_slot(&mut self, slot: u32) -> Option<(u32, crate::virtio::queue::Head, bool)> {
        let meta = self.slots.get_mut(slot as usize)?;
        let head = meta.head.take()?;
        let meta = core::mem::replace(meta, SlotMeta::free());
        self.put_buffer(meta.input_buffer);
        self.put_buffer(meta.output_buffer);
        self.free.push(slot);
        Some((meta.queue, head, meta.discard))
    }

    fn put_buffer(&mut self, buffer: Option<DataBuffer>) {
        if let Some(buffer) = buffer {
            self.pool.put(buffer);
        }
    }

    // ---- queues and devices ----

    /// Runs what had to wait.
    fn retry(&mut self, sys: &mut S) -> bool {
        let mut worked = false;
        for _ in 0..self.unsubmitted.len() {
            let Some(slot) = self.unsubmitted.pop_front() else {
                break;
            };
            self.submit(slot, sys);
            if self.unsubmitted.back() == Some(&slot) {
                self.unsubmitted.rotate_right(1);
                break;
            }
            worked = true;
        }
        while let Some(&slot) = self.need_buffers.front() {
            self.get_buffers(slot, sys);
            if self.need_buffers.front() == Some(&slot) {
                break;
            }
            worked = true;
        }
        if !self.waiting.is_empty() {
            let mut released = false;
            for device in &mut self.devices {
                let epoch = device.backend.as_ref().map_or(0, |b| b.lock_epoch());
                released |= epoch != device.lock_epoch;
                device.lock_epoch = epoch;
            }
            if released {
                self.poll_locks(sys);
            }
        }
        worked
    }

    /// Makes what a queue has given back visible, and interrupts the driver if it wants that.
    fn publish(&mut self, at: u32, sys: &mut S) {
        let Some(q) = self.queues.get_mut(at as usize).and_then(Option::as_mut) else {
            return;
        };
        if core::mem::take(&mut q.dirty)
            && q.queue.publish()
            && let Some(call) = &q.call
        {
            sys.interrupt(call);
        }
    }

    /// After something has stopped touching guest memory: goes on with what waited for that.
    fn settle(&mut self, at: u32, sys: &mut S) {
        let Some(device) = self.queue_mut(at).map(|q| q.device) else {
            return;
        };
        if self
            .devices
            .iter()
            .any(|d| d.id == device && d.next_map.is_some())
        {
            self.check_memory(device, sys);
        }
    }

    /// Replaces a device's map once nothing uses the old one.
    fn check_memory(&mut self, device: DeviceId, sys: &mut S) {
        if self
            .queues
            .iter()
            .flatten()
            .any(|q| q.device == device && q.touching > 0)
        {
            return;
        }
        let Some(map) = self
            .devices
            .iter_mut()
            .find(|d| d.id == device)
            .and_then(|d| d.next_map.take())
        else {
            return;
        };
        for at in 0..self.queues.len() {
            let Some(q) = self
                .queues
                .get_mut(at)
                .and_then(Option::as_mut)
                .filter(|q| q.device == device)
            else {
                continue;
            };
            if q.queue.remap(&map).is_err() {
                let index = q.index;
                sys.report(CoreEvent::QueueFailed { device, index });
            }
        }
        for slot in 0..self.bodies.len() {
            if self.device_of(slot) != Some(device) {
                continue;
            }
            if let Some(mut body) = self.bodies.get(slot) {
                // SAFETY: nothing of this device is on the ring or on the helper thread, so its slots are the core's.
                // A descriptor that is gone shortens the request; its operation then fails like any short one.
                let _ = unsafe { body.as_mut() }.chain.retranslate(&map);
            }
        }
        sys.report(CoreEvent::MemoryReplaced { device });
    }

    /// Reports a queue that was asked to stop and has nothing in flight any more.
    fn check_stopped(&mut self, at: u32, sys: &mut S) {
        let ready = |q: &&mut RunQueue<S::Call>| q.ending != Ending::Runs && q.in_flight == 0;
        let Some(q) = self.queue_mut(at).filter(|q| ready(&q)) else {
            return;
        };
        let (device, index, reset) = (q.device, q.index, q.ending == Ending::Reset);
        if !reset {
            self.publish(at, sys);
        }
        let Some(mut q) = self.queues.get_mut(at as usize).and_then(Option::take) else {
            return;
        };
        // Whoever serves the ring next looks at it first; until then the driver may kick as it likes.
        let _ = q.queue.enable_kicks();
        let state = if reset {
            QueueState::default()
        } else {
            q.queue.into_state()
        };
        let last = !self.queues.iter().flatten().any(|q| q.device == device);
        if last {
            if self
                .devices
                .iter()
                .any(|d| d.id == device && d.next_map.is_some())
            {
                sys.report(CoreEvent::MemoryReplaced { device });
            }
            self.devices.retain(|d| d.id != device);
        }
        sys.report(CoreEvent::QueueStopped {
            device,
            index,
            state,
        });
    }

    /// Tells the management thread when INIT or DESTROY has changed whether the device is mounted.
    fn note_mount(&mut self, slot: u32, sys: &mut S) {
        let Some(run) = self.locate(slot) else { return };
        // SAFETY: the slot is the core's.
        let opcode = dispatch::opcode(unsafe { run.input.as_ref() });
        if opcode != FUSE_INIT && opcode != FUSE_DESTROY {
            return;
        }
        let Some(device) = self
            .device_of(slot)
            .and_then(|id| self.devices.iter().find(|d| d.id == id))
        else {
            return;
        };
        sys.report(CoreEvent::Mounted {
            device: device.id,
            mounted: device.shared.session.mounted(),
        });
    }

    fn forget_interrupts(&mut self, device: DeviceId) {
        self.early_interrupts.retain(|&(d, _)| d != device);
    }

    /// Where a slot's bytes are.
    fn locate(&self, slot: u32) -> Option<Run> {
        let body = self.bodies.get(slot)?;
        let meta = self.slots.get(slot as usize)?;
        // SAFETY: takes addresses of fields only.
        let (input, output) = unsafe {
            (
                &raw mut (*body.as_ptr()).input,
                &raw mut (*body.as_ptr()).output,
            )
        };
        let input = match &meta.input_buffer {
            Some(buffer) => self.pool.bytes(buffer).cast::<u8>(),
            None => NonNull::new(input.cast::<u8>())?,
        };
        let scratch = match &meta.output_buffer {
            Some(buffer) => NonNull::slice_from_raw_parts(
                self.pool.bytes(buffer).cast(),
                meta.scratch_len as usize,
            ),
            None => NonNull::slice_from_raw_parts(NonNull::new(output.cast::<u8>())?, SLOT_OUTPUT),
        };
        let limit = if meta.input_buffer.is_some() {
            MAX_DATA_BUFFER as usize
        } else {
            SLOT_INPUT
        };
        let input = NonNull::slice_from_raw_parts(input, (meta.input_len as usize).min(limit));
        let map = NonNull::from(&**self.queues.get(meta.queue as usize)?.as_ref()?.queue.map());
        Some(Run {
            body,
            map,
            input,
            scratch,
        })
    }

    /// The guest memory of the slot's request.
    fn map_of(&self, slot: u32) -> Option<HeldMap> {
        let at = self.slots.get(slot as usize)?.queue;
        Some(HeldMap(NonNull::from(
            &**self.queues.get(at as usize)?.as_ref()?.queue.map(),
        )))
    }

    fn find(&self, device: DeviceId, index: QueueIdx) -> Option<u32> {
        let at = self.queues.iter().position(|q| {
            q.as_ref()
                .is_some_and(|q| q.device == device && q.index == index)
        })?;
        u32::try_from(at).ok()
    }

    fn queue_mut(&mut self, at: u32) -> Option<&mut RunQueue<S::Call>> {
        self.queues.get_mut(at as usize)?.as_mut()
    }

    fn meta(&mut self, slot: u32) -> Option<&mut SlotMeta> {
        self.slots.get_mut(slot as usize)
    }

    fn set_unique(&mut self, slot: u32, unique: u64) {
        if let Some(meta) = self.meta(slot) {
            meta.unique = unique;
        }
    }

    fn touches(&mut self, at: u32, yes: bool) {
        if let Some(q) = self.queue_mut(at) {
            q.touching = if yes {
                q.touching.saturating_add(1)
            } else {
                q.touching.saturating_sub(1)
            };
        }
    }

    /// The device whose request holds the slot.
    fn device_of(&self, slot: u32) -> Option<DeviceId> {
        let meta = self.slots.get(slot as usize).filter(|m| m.head.is_some())?;
        self.queues
            .get(meta.queue as usize)?
            .as_ref()
            .map(|q| q.device)
    }

    fn is_request(&self, slot: u32, device: DeviceId, unique: u64) -> bool {
        self.device_of(slot) == Some(device)
            && self
                .slots
                .get(slot as usize)
                .is_some_and(|m| m.unique == unique)
    }
}

#[cfg(test)]
mod tests;
