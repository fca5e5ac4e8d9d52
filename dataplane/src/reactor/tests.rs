//! The reactor, stepped by hand over a model driver and a world that does nothing by itself.
// UNSAFETY: makes a data pool over leaked memory.
#![expect(unsafe_code, reason = "makes a data pool over leaked memory")]

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::ffi::CStr;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use zerocopy::{FromBytes, IntoBytes};

use ferry_shared::errno::Errno;
use ferry_shared::limits::MAX_DATA_BUFFER;

use super::*;
use crate::fsdev::{Caller, FsDev, Io, IoOp, IoResult, Negotiated, Offer, Pin};
use crate::fuse::abi::*;
use crate::fuse::session::Session;
use crate::id::CoreEvent;
use crate::mem::{IoVec, Segments};
use crate::pool::DATA_BUFFER_STRIDE;
use crate::virtio::queue::QueueState;
use crate::virtio::testmem::{Buf, Driver, Ram};
use ferry_shared::counters::QueuePlace;

const DEVICE: DeviceId = DeviceId(7);
const QUEUE: QueueIdx = QueueIdx(1);

/// A backend whose answers the test chooses.
#[derive(Default)]
struct Model {
    locked: AtomicBool,
    epoch: AtomicU64,
    offload: AtomicBool,
    unpinned: AtomicU32,
    attempts: AtomicU32,
    given_up: AtomicU64,
}

impl FsDev for Model {
    fn offer(&self) -> Offer {
        Offer {
            flags: FUSE_POSIX_LOCKS,
            max_write: MAX_DATA_BUFFER,
            max_readahead: 0,
        }
    }
    fn mount(&self, _: Negotiated) -> Result<(), Errno> {
        Ok(())
    }
    fn unmount(&self) {}
    fn may_block(&self, opcode: u32) -> bool {
        matches!(opcode, FUSE_STATFS | FUSE_GETXATTR) && self.offload.load(Ordering::Relaxed)
    }
    fn unpin(&self, _: Pin, _: IoOp, _: i32) {
        self.unpinned.fetch_add(1, Ordering::Relaxed);
    }
    fn lock_epoch(&self) -> u64 {
        self.epoch.load(Ordering::Relaxed)
    }
    fn wait_ended(&self, unique: u64) {
        self.given_up.fetch_add(unique, Ordering::Relaxed);
    }
    fn statfs(&self, _: &Caller<'_>, _: u64) -> Result<fuse_kstatfs, Errno> {
        Ok(fuse_kstatfs {
            bsize: 4096,
            ..Default::default()
        })
    }
    fn read(&self, _: &Caller<'_>, _: u64, arg: &fuse_read_in, _: Segments<'_>) -> IoResult {
        let op = IoOp::Read {
            fd: 5,
            offset: arg.offset,
            len: arg.size,
        };
        Ok(Io::Submit { op, pin: Pin(9) })
    }
    fn setlk(&self, _: &Caller<'_>, _: u64, _: &fuse_lk_in, _: bool) -> Result<(), Errno> {
        self.attempts.fetch_add(1, Ordering::Relaxed);
        if self.locked.load(Ordering::Relaxed) {
            Err(Errno::EAGAIN)
        } else {
            Ok(())
        }
    }
    fn getxattr(&self, _: &Caller<'_>, _: u64, _: &CStr, out: &mut [u8]) -> Result<usize, Errno> {
        out.fill(b'x');
        Ok(out.len())
    }
}

/// The world: remembers what it was asked for.
#[derive(Default)]
struct World {
    interrupts: u32,
    ring: Vec<(u32, IoOp, usize)>,
    ring_is_full: bool,
    jobs: Vec<(u32, Job<Model>)>,
    events: Vec<CoreEvent>,
    spread: Vec<Interrupted>,
}

impl System<Model> for World {
    type Call = ();

    fn interrupt(&mut self, (): &()) {
        self.interrupts += 1;
    }
    fn submit(&mut self, slot: u32, op: IoOp, iovecs: &[IoVec]) -> bool {
        if !self.ring_is_full {
            self.ring
                .push((slot, op, iovecs.iter().map(IoVec::len).sum()));
        }
        !self.ring_is_full
    }
    fn offload(&mut self, slot: u32, job: Job<Model>) {
        self.jobs.push((slot, job));
    }
    fn report(&mut self, event: CoreEvent) {
        self.events.push(event);
    }
    fn spread_interrupt(&mut self, interrupted: Interrupted) {
        self.spread.push(interrupted);
    }
}

/// One core, one queue, one driver.
struct Rig {
    core: Reactor<Model, World>,
    world: World,
    driver: Driver,
    shared: Arc<DeviceShared<Model>>,
    model: Arc<Model>,
    replies: Vec<(u16, u64)>,
}

impl Rig {
    fn new(slots: u32, buffers: u32) -> Rig {
        let memory = Box::leak(vec![0u8; buffers as usize * DATA_BUFFER_STRIDE].into_boxed_slice());
        // SAFETY: the leaked box has room for `buffers` buffers, and nothing else refers to it.
        let pool = unsafe { DataPool::new(NonNull::from(memory).cast(), buffers, None) };
        let mut core = Reactor::new(Slab::on_heap((0..slots).map(|_| SlotBody::new())), pool, 4);
        let driver = Driver::new(Ram::simple(), 32, false, false);
        let model = Arc::new(Model::default());
        let shared = Arc::new(DeviceShared::new(
            Session::default(),
            Some(Arc::clone(&model)),
        ));
        let mut world = World::default();
        let rig_driver = driver.clone();
        rig_driver.set_interrupts(true);
        core.start(start(&driver, &shared), &mut world);
        let mut rig = Rig {
            core,
            world,
            driver: rig_driver,
            shared,
            model,
            replies: Vec::new(),
        };
        rig.mount();
        rig.world = World::default();
        rig
    }

    fn mount(&mut self) {
        let init = fuse_init_in {
            major: 7,
            minor: 45,
            flags: u32::MAX,
            ..Default::default()
        };
        self.send(FUSE_INIT, 1, init.as_bytes(), 80);
        self.turn();
        assert_eq!(self.reply_errors(), [(1, 0)]);
        assert!(self.shared.session.mounted());
    }

    /// Makes a request available, with room for `room` bytes of reply.
    fn send(&mut self, opcode: u32, unique: u64, arg: &[u8], room: u32) {
        let len = u32::try_from(size_of::<fuse_in_header>() + arg.len()).expect("short");
        let header = fuse_in_header {
            len,
            opcode,
            unique,
            nodeid: 1,
            ..Default::default()
        };
        let request = self.driver.ram.alloc(len as usize);
        self.driver.ram.write(request, header.as_bytes());
        self.driver.ram.write(request + 40, arg);
        let reply = self.driver.ram.alloc(room as usize);
        let mut bufs = vec![Buf {
            addr: request,
            len,
            write: false,
        }];
        if room > 0 {
            bufs.push(Buf {
                addr: reply,
                len: room,
                write: true,
            });
        }
        let head = self.driver.add(&bufs, bufs.len());
        self.replies.push((head, reply));
    }

    fn turn(&mut self) {
        self.core.turn(&mut self.world);
    }

    /// The answers given back so far: number and error of each.
    fn reply_errors(&mut self) -> Vec<(u64, i32)> {
        let mut out = Vec::new();
        while let Some((head, written)) = self.driver.take_used() {
            let at = self
                .replies
                .iter()
                .position(|r| r.0 == head)
                .expect("a head that was offered");
            let (_, reply) = self.replies.remove(at);
            if written == 0 {
                out.push((0, 0));
                continue;
            }
            let bytes = self.driver.ram.read(reply, 16);
            let header = fuse_out_header::read_from_bytes(&bytes).expect("16 bytes");
            assert_eq!(header.len, written);
            out.push((header.unique, header.error));
        }
        out
    }

    fn send_lock(&mut self, unique: u64) {
        self.send(FUSE_SETLKW, unique, fuse_lk_in::default().as_bytes(), 16);
    }

    fn stopped_state(&mut self) -> Option<QueueState> {
        self.world.events.drain(..).find_map(|event| match event {
            CoreEvent::QueueStopped { state, .. } => Some(state),
            _ => None,
        })
    }
}

fn start(driver: &Driver, shared: &Arc<DeviceShared<Model>>) -> StartQueue<Model, ()> {
    let queue = Queue::new(driver.config.clone(), &driver.ram.map(), None).expect("a good ring");
    StartQueue {
        device: DEVICE,
        index: QUEUE,
        kind: QueueKind::Request,
        queue,
        call: Some(()),
        shared: Arc::clone(shared),
        place: QueuePlace::default(),
    }
}

#[test]
fn a_request_is_answered_in_the_same_turn_with_one_interrupt() {
    let mut rig = Rig::new(8, 2);
    for unique in 2..6 {
        rig.send(FUSE_STATFS, unique, &[], 200);
    }
    rig.turn();
    assert_eq!(rig.reply_errors(), [(2, 0), (3, 0), (4, 0), (5, 0)]);
    assert_eq!(rig.world.interrupts, 1);
}

#[test]
fn requests_beyond_the_slots_stay_in_the_ring_and_are_served_later() {
    let mut rig = Rig::new(2, 2);
    let read = fuse_read_in {
        size: 4096,
        ..Default::default()
    };
    for unique in 2..7 {
        rig.send(FUSE_READ, unique, read.as_bytes(), 16 + 4096);
    }
    let mut answered = Vec::new();
    while answered.len() < 5 {
        rig.turn();
        assert!(rig.world.ring.len() <= 2 && !rig.world.ring.is_empty());
        for (slot, op, room) in core::mem::take(&mut rig.world.ring) {
            assert!(matches!(op, IoOp::Read { len: 4096, .. }) && room == 4096);
            rig.core.io_done(slot, 4096, &mut rig.world);
        }
        rig.turn();
        answered.extend(rig.reply_errors());
    }
    assert_eq!(answered, [(2, 0), (3, 0), (4, 0), (5, 0), (6, 0)]);
    assert_eq!(rig.model.unpinned.load(Ordering::Relaxed), 5);
}

#[test]
fn requests_that_need_a_data_buffer_wait_for_one_in_order() {
    let mut rig = Rig::new(8, 1);
    rig.model.offload.store(true, Ordering::Relaxed);
    let ask = fuse_getxattr_in {
        size: 60_000,
        ..Default::default()
    };
    let arg = [ask.as_bytes(), b"user.a\0"].concat();
    for unique in 2..5 {
        rig.send(FUSE_GETXATTR, unique, &arg, 16 + 60_000);
    }
    let mut answered = Vec::new();
    for _ in 0..3 {
        rig.turn();
        assert_eq!(rig.world.jobs.len(), 1, "there is one buffer");
        let (slot, job) = rig.world.jobs.pop().expect("offloaded");
        let outcome = job.run();
        rig.core.offload_done(slot, outcome, &mut rig.world);
        rig.turn();
        answered.extend(rig.reply_errors());
    }
    assert_eq!(answered, [(2, 0), (3, 0), (4, 0)]);
    assert_eq!(rig.core.counters().buffer_waits, 2);
}

#[test]
fn a_short_read_is_continued_until_nothing_more_comes() {
    let mut rig = Rig::new(4, 1);
    let read = fuse_read_in {
        size: 4096,
        offset: 100,
        ..Default::default()
    };
    rig.send(FUSE_READ, 2, read.as_bytes(), 16 + 4096);
    rig.turn();
    let (slot, ..) = rig.world.ring.pop().expect("submitted");
    rig.core.io_done(slot, 1000, &mut rig.world);
    let (slot, op, room) = rig.world.ring.pop().expect("the rest");
    assert!(
        matches!(
            op,
            IoOp::Read {
                offset: 1100,
                len: 3096,
                ..
            }
        ) && room == 3096
    );
    rig.core.io_done(slot, -Errno::EINTR.raw(), &mut rig.world);
    let (slot, op, _) = rig.world.ring.pop().expect("tried again");
    assert!(matches!(op, IoOp::Read { offset: 1100, .. }));
    rig.core.io_done(slot, 0, &mut rig.world);
    rig.turn();
    let (head, written) = rig.driver.take_used().expect("answered");
    assert_eq!(
        (rig.replies.iter().any(|r| r.0 == head), written),
        (true, 16 + 1000)
    );
}

#[test]
fn a_full_ring_delays_a_transfer_and_loses_nothing() {
    let mut rig = Rig::new(4, 1);
    rig.world.ring_is_full = true;
    let read = fuse_read_in {
        size: 512,
        ..Default::default()
    };
    rig.send(FUSE_READ, 2, read.as_bytes(), 16 + 512);
    rig.send(FUSE_READ, 3, read.as_bytes(), 16 + 512);
    rig.turn();
    rig.turn();
    assert!(rig.world.ring.is_empty() && rig.core.has_unsubmitted());
    rig.world.ring_is_full = false;
    rig.turn();
    assert_eq!(rig.world.ring.len(), 2);
    for (slot, ..) in core::mem::take(&mut rig.world.ring) {
        rig.core.io_done(slot, 512, &mut rig.world);
    }
    rig.turn();
    assert_eq!(rig.reply_errors(), [(2, 0), (3, 0)]);
}

#[test]
fn an_offloaded_request_is_answered_when_its_outcome_comes_back() {
    let mut rig = Rig::new(4, 1);
    rig.model.offload.store(true, Ordering::Relaxed);
    rig.send(FUSE_STATFS, 2, &[], 200);
    rig.turn();
    assert_eq!(rig.reply_errors(), []);
    let (slot, job) = rig.world.jobs.pop().expect("offloaded");
    let outcome = job.run();
    rig.core.offload_done(slot, outcome, &mut rig.world);
    rig.turn();
    assert_eq!(rig.reply_errors(), [(2, 0)]);
}

#[test]
fn a_lock_waits_until_it_is_released() {
    let mut rig = Rig::new(4, 1);
    rig.model.locked.store(true, Ordering::Relaxed);
    rig.send_lock(2);
    rig.turn();
    rig.turn();
    let attempts = rig.model.attempts.load(Ordering::Relaxed);
    rig.turn();
    assert_eq!(
        rig.model.attempts.load(Ordering::Relaxed),
        attempts,
        "nothing was released, so nothing is tried"
    );
    assert!(rig.core.has_waiting());
    rig.model.locked.store(false, Ordering::Relaxed);
    rig.model.epoch.fetch_add(1, Ordering::Relaxed);
    rig.turn();
    assert_eq!(rig.reply_errors(), [(2, 0)]);
    assert!(!rig.core.has_waiting());
}

#[test]
fn a_lock_that_polling_gets_is_work_to_be_published() {
    let mut rig = Rig::new(4, 1);
    rig.model.locked.store(true, Ordering::Relaxed);
    rig.send_lock(2);
    rig.turn();
    assert!(!rig.core.poll_locks(&mut rig.world));
    rig.model.locked.store(false, Ordering::Relaxed);
    assert!(rig.core.poll_locks(&mut rig.world));
    rig.turn();
    assert_eq!(rig.reply_errors(), [(2, 0)]);
}

#[test]
fn an_interrupt_ends_a_waiting_lock_whichever_comes_first() {
    let mut rig = Rig::new(4, 1);
    rig.model.locked.store(true, Ordering::Relaxed);
    rig.send_lock(2);
    rig.turn();
    rig.send(
        FUSE_INTERRUPT,
        0,
        fuse_interrupt_in { unique: 2 }.as_bytes(),
        0,
    );
    rig.turn();
    let spread: Vec<_> = rig.world.spread.iter().map(|i| i.unique).collect();
    assert_eq!(spread, [2]);
    assert_eq!(rig.model.given_up.load(Ordering::Relaxed), 2);
    rig.send(
        FUSE_INTERRUPT,
        0,
        fuse_interrupt_in { unique: 3 }.as_bytes(),
        0,
    );
    rig.turn();
    rig.send_lock(3);
    rig.turn();
    let mut answers = rig.reply_errors();
    answers.retain(|a| a.0 != 0);
    assert_eq!(
        answers,
        [(2, -Errno::EINTR.raw()), (3, -Errno::EINTR.raw())]
    );
    assert_eq!(rig.model.given_up.load(Ordering::Relaxed), 5);
}

#[test]
fn an_interrupt_of_one_mount_means_no_request_of_the_next() {
    let mut rig = Rig::new(4, 1);
    rig.model.locked.store(true, Ordering::Relaxed);
    let interrupt = fuse_interrupt_in { unique: 3 };
    rig.send(FUSE_INTERRUPT, 0, interrupt.as_bytes(), 0);
    rig.send(FUSE_DESTROY, 2, &[], 16);
    rig.turn();
    assert_eq!(rig.reply_errors(), [(0, 0), (2, 0)]);
    rig.mount();
    rig.send_lock(3);
    rig.turn();
    assert_eq!(rig.reply_errors(), []);
    assert!(rig.core.has_waiting());
}

#[test]
fn stopping_answers_what_is_in_flight_and_keeps_what_waits() {
    let mut rig = Rig::new(4, 1);
    rig.model.locked.store(true, Ordering::Relaxed);
    let read = fuse_read_in {
        size: 512,
        ..Default::default()
    };
    rig.send_lock(2);
    rig.send(FUSE_READ, 3, read.as_bytes(), 16 + 512);
    rig.turn();
    rig.core.stop(DEVICE, QUEUE, false, &mut rig.world);
    assert!(
        rig.stopped_state().is_none(),
        "a transfer is still on the ring"
    );
    let (slot, ..) = rig.world.ring.pop().expect("submitted");
    rig.core.io_done(slot, 512, &mut rig.world);
    let state = rig.stopped_state().expect("stopped");
    assert_eq!(rig.reply_errors(), [(3, 0)]);
    rig.send(FUSE_STATFS, 4, &[], 200);
    rig.turn();
    assert_eq!(rig.reply_errors(), [], "a stopped queue is not served");

    rig.model.locked.store(false, Ordering::Relaxed);
    rig.driver.config.state = state;
    rig.core
        .start(start(&rig.driver, &rig.shared), &mut rig.world);
    rig.turn();
    assert_eq!(rig.reply_errors(), [(2, 0), (4, 0)]);
}

#[test]
fn a_reset_drops_what_waits_and_waits_for_what_touches_memory() {
    let mut rig = Rig::new(4, 1);
    rig.model.locked.store(true, Ordering::Relaxed);
    let read = fuse_read_in {
        size: 512,
        ..Default::default()
    };
    rig.send_lock(2);
    rig.send(FUSE_READ, 3, read.as_bytes(), 16 + 512);
    rig.turn();
    rig.core.stop(DEVICE, QUEUE, true, &mut rig.world);
    assert!(rig.stopped_state().is_none());
    let (slot, ..) = rig.world.ring.pop().expect("submitted");
    rig.core.io_done(slot, 100, &mut rig.world);
    assert_eq!(rig.stopped_state(), Some(QueueState::default()));
    assert_eq!(rig.reply_errors(), []);
    assert_eq!(rig.model.unpinned.load(Ordering::Relaxed), 1);
}

#[test]
fn new_memory_is_taken_when_no_transfer_uses_the_old_one() {
    let mut rig = Rig::new(4, 1);
    rig.model.locked.store(true, Ordering::Relaxed);
    let read = fuse_read_in {
        size: 512,
        ..Default::default()
    };
    rig.send_lock(2);
    rig.send(FUSE_READ, 3, read.as_bytes(), 16 + 512);
    rig.turn();
    for _ in 0..2 {
        let map = rig.driver.ram.map();
        rig.core.set_memory(DEVICE, map, &mut rig.world);
    }
    assert_eq!(rig.world.events, []);
    rig.send(FUSE_STATFS, 4, &[], 200);
    rig.turn();
    assert_eq!(rig.reply_errors(), [], "nothing is started meanwhile");
    let (slot, ..) = rig.world.ring.pop().expect("submitted");
    rig.core.io_done(slot, 512, &mut rig.world);
    let replaced = CoreEvent::MemoryReplaced { device: DEVICE };
    assert_eq!(rig.world.events, [replaced.clone(), replaced]);
    rig.model.locked.store(false, Ordering::Relaxed);
    rig.model.epoch.fetch_add(1, Ordering::Relaxed);
    rig.turn();
    let mut answers = rig.reply_errors();
    answers.sort_unstable();
    assert_eq!(answers, [(2, 0), (3, 0), (4, 0)]);
}

#[test]
fn a_broken_ring_is_reported_once_and_disturbs_nobody() {
    let mut rig = Rig::new(4, 1);
    rig.driver.offer_split(500);
    for _ in 0..3 {
        rig.turn();
    }
    assert_eq!(
        rig.world.events,
        [CoreEvent::QueueFailed {
            device: DEVICE,
            index: QUEUE
        }]
    );
}
