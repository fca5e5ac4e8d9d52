//! What the reactor sees of the world: backends, devices that cores share, the system, and requests on their way to helpers.
// UNSAFETY: a job carries pointers to a slot that the core lends to a helper thread.
#![expect(
    unsafe_code,
    reason = "slot bodies are lent to helper threads one by one"
)]

use alloc::sync::Arc;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU32, Ordering};

use crate::dispatch::{self, Incoming, Outcome};
use crate::fsdev::null::Null;
use crate::fsdev::{FsDev, IoOp, Pin};
use crate::fuse::session::Session;
use crate::id::{CoreEvent, DeviceId};
use crate::mem::{GuestMap, IoVec, Segments};
use crate::recovery::journal::Lines;
use crate::slot::SlotBody;

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
    /// See [`FsDev::wait_ended`].
    fn wait_ended(&self, unique: u64);
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

    fn wait_ended(&self, unique: u64) {
        FsDev::wait_ended(self, unique);
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
    /// Where requests note what they do.
    lines: Option<Lines>,
    backend: spin::RwLock<Option<Arc<B>>>,
    pub(super) epoch: AtomicU32,
}

impl<B> DeviceShared<B> {
    /// A device that nobody has mounted.
    pub fn new(session: Session, backend: Option<Arc<B>>) -> DeviceShared<B> {
        DeviceShared {
            session,
            lines: None,
            backend: spin::RwLock::new(backend),
            epoch: AtomicU32::new(1),
        }
    }

    /// The same device, whose requests note what they do in these lines.
    pub fn noting(self, lines: Option<Lines>) -> DeviceShared<B> {
        DeviceShared { lines, ..self }
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

/// An INTERRUPT: the request that it means may be on any core, and may still be to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interrupted {
    /// Whose request it is.
    pub device: DeviceId,
    /// The number of the request.
    pub unique: u64,
    /// The session's epoch: a later mount counts its requests from the start again.
    pub epoch: u32,
}

/// What the reactor asks of the world around it.
pub trait System<B> {
    /// Interrupts a driver.
    type Call: Send;

    /// Interrupts the driver.
    fn interrupt(&mut self, call: &Self::Call);
    /// Puts an operation on the ring; `iovecs` stays where it is until the completion. `false` when the ring is full.
    fn submit(&mut self, slot: u32, op: IoOp, iovecs: &[IoVec]) -> bool;
    /// Has a request run on the helper thread, which then hands the outcome to [`super::Reactor::offload_done`].
    fn offload(&mut self, slot: u32, job: Job<B>);
    /// Tells the management thread.
    fn report(&mut self, event: CoreEvent);
    /// Tells every other core that a request is to be interrupted.
    fn spread_interrupt(&mut self, interrupted: Interrupted);
    /// Nanoseconds since some moment, for the counters; a world without time has none to count.
    fn now(&self) -> u64 {
        0
    }
}

/// A request on its way to the helper thread.
#[derive(Debug)]
pub struct Job<B> {
    pub(super) run: Run,
    pub(super) device: DeviceId,
    pub(super) shared: Arc<DeviceShared<B>>,
    pub(super) backend: Option<Arc<B>>,
}

// SAFETY: the pointers in `run` name a slot body and buffers that the core does not touch until the outcome has come back.
unsafe impl<B: Send + Sync> Send for Job<B> {}

impl<B: Backend> Job<B> {
    /// The device whose request it is.
    pub fn device(&self) -> DeviceId {
        self.device
    }

    /// Runs the request.
    pub fn run(self) -> Outcome {
        // SAFETY: the job is the only user of the slot until its outcome is handed back, see `Reactor::run`.
        unsafe { self.run.execute(self.backend.as_deref(), &self.shared) }
    }
}

/// Where a request's bytes are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    pub(super) body: NonNull<SlotBody>,
    pub(super) map: NonNull<GuestMap>,
    pub(super) input: NonNull<[u8]>,
    pub(super) scratch: NonNull<[u8]>,
    /// Queue and head, which say where the request's notes are.
    pub(super) place: (u16, u16),
}

impl Run {
    /// Runs the request where it is.
    ///
    /// # Safety
    ///
    /// The caller is the only user of the slot's body and buffers until this returns, and the queue that the request came
    /// from goes on holding the guest map.
    pub(super) unsafe fn execute<B: Backend>(
        self,
        backend: Option<&B>,
        shared: &DeviceShared<B>,
    ) -> Outcome {
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
            line: shared.lines.as_ref().and_then(|lines| {
                let (queue, head) = self.place;
                lines.line(queue, head)
            }),
        };
        let session = &shared.session;
        match backend {
            Some(backend) => backend.execute(session, rq),
            None => dispatch::execute::<Null>(None, session, rq),
        }
    }
}

/// The guest map of a queue that has a request in hand: neither the queue nor its map goes away before that request does.
/// Spares the request path the reference count.
pub(super) struct HeldMap(pub(super) NonNull<GuestMap>);

impl core::ops::Deref for HeldMap {
    type Target = GuestMap;

    fn deref(&self) -> &GuestMap {
        // SAFETY: a queue leaves the core only with nothing in flight, and its map is replaced only in `check_memory`,
        // between requests; values of this type do not outlive the method that made them.
        unsafe { self.0.as_ref() }
    }
}
