//! One request: copied in, given its buffers, run, transferred, answered.
// UNSAFETY: reaches slot bodies by raw pointer, because a body may be lent to a helper thread while its neighbours are used.
#![expect(
    unsafe_code,
    reason = "slot bodies are lent to helper threads one by one"
)]

use alloc::sync::Arc;
use core::mem::offset_of;
use core::ptr::NonNull;

use ferry_shared::counters::{CoreCounters, Finished, QueueWait};
use ferry_shared::errno::Errno;
use ferry_shared::limits::{MAX_DATA_BUFFER, SLOT_INPUT, SLOT_OUTPUT};
use ferry_shared::trace::Point;

use super::world::{HeldMap, Run};
use super::{BUDGET, Backend, Ending, Interrupted, Job, Reactor, System};
use crate::dispatch::{self, FIRST, Malformed, Outcome};
use crate::fuse::abi::{FUSE_DESTROY, FUSE_INIT, FUSE_READ, FUSE_WRITE, fuse_out_header};
use crate::fuse::reply::HEADER;
use crate::id::{CoreEvent, DeviceId, QueueKind};
use crate::mem::Segments;
use crate::slot::{Freed, Stage, Transfer};
use crate::virtio::queue::Head;

impl<B: Backend, S: System<B>> Reactor<B, S> {
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
        self.trace_slot(Point::OffloadDone, slot, 0, sys);
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
        self.trace_slot(Point::IoDone, slot, result as u32 as u64, sys);
        let discard = self.meta(slot).is_some_and(|m| m.discard);
        if again && !discard {
            self.submit(slot, sys);
        } else {
            self.end_transfer(slot, total, sys);
        }
        self.settle(at, sys);
    }

    /// Takes requests from a queue.
    pub(super) fn serve(&mut self, at: u32, sys: &mut S) -> bool {
        let (mut taken, mut began) = (0u64, 0);
        for _ in 0..BUDGET {
            let Some(q) = self.queues.get_mut(at as usize).and_then(Option::as_mut) else {
                break;
            };
            if q.ending != Ending::Runs || q.kind == QueueKind::Notification || !q.queue.has_work()
            {
                break;
            }
            let device = self.devices.get(q.place);
            if device.is_some_and(|d| d.next_map.is_some()) {
                break;
            }
            if taken == 0 {
                began = sys.now();
            }
            let Some(slot) = self.free.pop() else {
                self.counters.slot_waits = self.counters.slot_waits.wrapping_add(1);
                if let Some(counters) = &self.count_in {
                    counters.queue_waits(at as usize, QueueWait::Slot);
                }
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
                    taken = taken.wrapping_add(1);
                    self.counters.requests = self.counters.requests.wrapping_add(1);
                    if let Some(meta) = self.slots.get_mut(slot as usize) {
                        meta.queue = at;
                        meta.began = began;
                        meta.unique = 0;
                        meta.head = Some(popped.head);
                    }
                    self.trace(Point::RequestTaken, at, [u64::from(slot), 0], sys);
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
        if let (Some(counters), 1..) = (&self.count_in, taken) {
            counters.queue_served(at as usize, taken);
        }
        taken > 0
    }

    /// Copies a request in and gets its buffers.
    pub(super) fn take_in(&mut self, slot: u32, faulty: bool, sys: &mut S) {
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
                // A request whose buffers are out of reach looks short.
                self.fail(slot, if faulty { Errno::EFAULT } else { errno }, sys);
            }
            Err(Malformed { unique: None, .. }) => self.release(slot, Some(0), sys),
            Ok(intake) => {
                if let Some(meta) = self.meta(slot) {
                    (meta.opcode, meta.unique) = dispatch::identity(seen);
                }
                if faulty {
                    return self.fail(slot, Errno::EFAULT, sys);
                }
                let Ok(input_len) = u32::try_from(intake.input) else {
                    return self.fail(slot, Errno::E2BIG, sys);
                };
                if input_len > MAX_DATA_BUFFER {
                    return self.fail(slot, Errno::E2BIG, sys);
                }
                if intake.input > first
                    && let Some(rest) = input.get_mut(first..intake.input.min(SLOT_INPUT))
                {
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
    pub(super) fn get_buffers(&mut self, slot: u32, sys: &mut S) {
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
        if needed == 0 && meta.stage != Stage::NeedsBuffers {
            meta.scratch_len = scratch as u32;
            return self.run(slot, sys);
        }
        if self.pool.available() < needed
            || (needed > 0 && self.need_buffers.front().is_some_and(|&s| s != slot))
        {
            // In order of arrival, so that a request that needs two buffers is not overtaken for ever.
            if meta.stage != Stage::NeedsBuffers {
                self.counters.buffer_waits = self.counters.buffer_waits.wrapping_add(1);
                if let Some(counters) = &self.count_in {
                    counters.queue_waits(meta.queue as usize, QueueWait::Buffers);
                }
                meta.stage = Stage::NeedsBuffers;
                self.need_buffers.push_back(slot);
            }
            return;
        }
        if meta.stage == Stage::NeedsBuffers {
            self.need_buffers.pop_front();
        }
        self.counters.buffers = self.counters.buffers.wrapping_add(needed as u64);
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
    pub(super) fn run(&mut self, slot: u32, sys: &mut S) {
        let Some(run) = self.locate(slot) else { return };
        let opcode = self.slots.get(slot as usize).map_or(0, |m| m.opcode);
        self.trace_slot(Point::FuseStart, slot, u64::from(opcode), sys);
        let Some(meta) = self.slots.get_mut(slot as usize) else {
            return;
        };
        let at = meta.queue;
        let queue = self.queues.get(at as usize).and_then(Option::as_ref);
        let Some(device) = queue.and_then(|q| self.devices.get_mut(q.place)) else {
            return;
        };
        device.refresh();
        if device.backend.as_ref().is_some_and(|b| b.may_block(opcode)) {
            meta.stage = Stage::Offloaded;
            let job = Job {
                run,
                device: device.id,
                shared: Arc::clone(&device.shared),
                backend: device.backend.clone(),
            };
            self.touches(at, true);
            self.trace_slot(Point::Offload, slot, 0, sys);
            return sys.offload(slot, job);
        }
        // SAFETY: the slot is the core's and stays so until this returns; the queue holds the map.
        let outcome = unsafe { run.execute(device.backend.as_deref(), &device.shared) };
        self.finish(slot, outcome, sys);
    }

    /// What comes after a request has run.
    pub(super) fn finish(&mut self, slot: u32, outcome: Outcome, sys: &mut S) {
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
                let interrupted = self.interrupted(slot, unique);
                self.release(slot, Some(0), sys);
                if let Some(interrupted) = interrupted {
                    self.interrupt_request(interrupted, sys);
                    sys.spread_interrupt(interrupted);
                }
            }
        }
    }

    /// Has a SETLKW request wait.
    pub(super) fn wait(&mut self, slot: u32, sys: &mut S) {
        let (Some(device), Some(meta)) = (self.device_of(slot), self.meta(slot)) else {
            return;
        };
        if meta.discard {
            return self.release(slot, None, sys);
        }
        let unique = meta.unique;
        meta.stage = Stage::Waiting;
        let at = meta.queue;
        let early = self.interrupted(slot, unique);
        if self.early_interrupts.iter().any(|&e| Some(e) == early) {
            self.early_interrupts.retain(|&e| Some(e) != early);
            return self.give_up_wait(slot, device, unique, Errno::EINTR, sys);
        }
        if self.queue_mut(at).is_some_and(|q| q.ending != Ending::Runs) {
            return self.give_back(slot, sys);
        }
        // The one who is to unlock needs a slot too, and so do the other devices of this core.
        if self.waiting.len() >= self.slots.len() / 2 {
            return self.give_up_wait(slot, device, unique, Errno::ENOLCK, sys);
        }
        self.waiting.push(slot);
    }

    /// Puts a transfer, or the rest of it, on the ring.
    pub(super) fn submit(&mut self, slot: u32, sys: &mut S) {
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
            self.trace_slot(Point::IoSubmit, slot, 0, sys);
        } else {
            meta.stage = Stage::Unsubmitted;
            self.unsubmitted.push_back(slot);
        }
    }

    /// Answers a transfer.
    pub(super) fn end_transfer(&mut self, slot: u32, result: i32, sys: &mut S) {
        let Some(run) = self.locate(slot) else { return };
        let Some(meta) = self.slots.get_mut(slot as usize) else {
            return;
        };
        let Some(transfer) = meta.transfer.take() else {
            return;
        };
        let (discard, at) = (meta.discard, meta.queue);
        let queue = self.queues.get(at as usize).and_then(Option::as_ref);
        let Some(device) = queue.and_then(|q| self.devices.get(q.place)) else {
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
    pub(super) fn fail(&mut self, slot: u32, errno: Errno, sys: &mut S) {
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
    pub(super) fn release(&mut self, slot: u32, written: Option<u32>, sys: &mut S) {
        if let (Some(counters), Some(written)) = (self.count_in, written) {
            self.count(slot, written, &counters, sys);
        }
        if self.trace.is_some() {
            self.trace_release(slot, written, sys);
        }
        let Some(Freed {
            queue: at,
            head,
            discard,
            ..
        }) = self.free_slot(slot)
        else {
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
            if q.ending != Ending::Runs {
                self.check_stopped(at, sys);
            }
        }
    }

    /// Traces a request that is answered, or dropped.
    fn trace_release(&self, slot: u32, written: Option<u32>, sys: &S) {
        let on = |point| self.trace.as_ref().is_some_and(|trace| trace.on(point));
        if on(Point::FuseDone)
            && let Some(meta) = self.slots.get(slot as usize)
        {
            let ns = sys.now().saturating_sub(meta.began);
            self.trace_slot(Point::FuseDone, slot, ns, sys);
        }
        self.trace_slot(
            Point::RequestReturned,
            slot,
            written.map_or(0, u64::from),
            sys,
        );
    }

    /// Notes a request that is answered with so many bytes, to be counted at the end of the turn.
    fn count(&mut self, slot: u32, written: u32, counters: &CoreCounters, sys: &S) {
        let Some(device) = self.device_of(slot).filter(|id| counters.counts(id.0)) else {
            return;
        };
        let Some(meta) = self.slots.get(slot as usize) else {
            return;
        };
        let (opcode, began, queue) = (meta.opcode, meta.began, meta.queue);
        let mut request = Finished {
            opcode,
            ..Finished::default()
        };
        // What is read back from the reply the guest may have changed already: it spoils its own count.
        let error = offset_of!(fuse_out_header, error);
        request.error = written as usize == HEADER && self.reply_word(slot, error) != 0;
        if !request.error && opcode == FUSE_READ {
            request.read = u64::from(written).saturating_sub(HEADER as u64);
        } else if !request.error && opcode == FUSE_WRITE {
            request.written = u64::from(self.reply_word(slot, HEADER).min(MAX_DATA_BUFFER));
        }
        if self.finished.is_full() {
            self.count_finished(sys);
        }
        let _ = self.finished.push((device, queue, began, request));
    }

    /// Counts the requests that have been answered since the last time. The guest sees all of them from now on, so one look at
    /// the clock is the end of all of them.
    pub(super) fn count_finished(&mut self, sys: &S) {
        if let (Some(counters), false) = (&self.count_in, self.finished.is_empty()) {
            let now = sys.now();
            for (device, queue, began, request) in &self.finished {
                let ns = now.saturating_sub(*began);
                let request = Finished { ns, ..*request };
                counters.finished(device.0, *queue as usize, request);
            }
        }
        self.finished.clear();
    }

    /// A word of a reply that has been written.
    fn reply_word(&self, slot: u32, at: usize) -> u32 {
        let (Some(body), Some(map)) = (self.bodies.get(slot), self.map_of(slot)) else {
            return 0;
        };
        let mut word = [0; 4];
        // SAFETY: the slot is the core's; nobody writes its chain.
        let chain = unsafe { &(*body.as_ptr()).chain };
        chain.writable(&map).after(at).read(&mut word);
        u32::from_ne_bytes(word)
    }

    /// Puts a request that has not run back, for the queue's next start.
    pub(super) fn give_back(&mut self, slot: u32, sys: &mut S) {
        let Some(body) = self.bodies.get(slot) else {
            return;
        };
        let Some(Freed {
            queue: at, head, ..
        }) = self.free_slot(slot)
        else {
            return;
        };
        if let Some(q) = self.queue_mut(at) {
            // SAFETY: the slot is the core's; it is taken again by a later `pop` only.
            q.queue.requeue(head, unsafe { &(*body.as_ptr()).chain });
            q.in_flight = q.in_flight.saturating_sub(1);
        }
        self.check_stopped(at, sys);
    }

    pub(super) fn free_slot(&mut self, slot: u32) -> Option<Freed> {
        let mut freed = self.slots.get_mut(slot as usize)?.end()?;
        for buffer in &mut freed.buffers {
            if let Some(buffer) = buffer.take() {
                self.pool.put(buffer);
            }
        }
        self.free.push(slot);
        Some(freed)
    }

    /// Tells the management thread when INIT or DESTROY has changed whether the device is mounted.
    pub(super) fn note_mount(&mut self, slot: u32, sys: &mut S) {
        let opcode = self.slots.get(slot as usize).map_or(0, |m| m.opcode);
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

    /// Where a slot's bytes are.
    pub(super) fn locate(&self, slot: u32) -> Option<Run> {
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
        let queue = self.queues.get(meta.queue as usize)?.as_ref()?;
        let head = meta.head.as_ref().map_or(u16::MAX, Head::id);
        Some(Run {
            body,
            map: NonNull::from(&**queue.queue.map()),
            input,
            scratch,
            place: (queue.index.0, head),
        })
    }

    /// The guest memory of the slot's request.
    pub(super) fn map_of(&self, slot: u32) -> Option<HeldMap> {
        let at = self.slots.get(slot as usize)?.queue;
        Some(HeldMap(NonNull::from(
            &**self.queues.get(at as usize)?.as_ref()?.queue.map(),
        )))
    }

    pub(super) fn set_unique(&mut self, slot: u32, unique: u64) {
        if let Some(meta) = self.meta(slot) {
            meta.unique = unique;
        }
    }

    /// The device whose request holds the slot.
    pub(super) fn device_of(&self, slot: u32) -> Option<DeviceId> {
        let meta = self.slots.get(slot as usize).filter(|m| m.head.is_some())?;
        self.queues
            .get(meta.queue as usize)?
            .as_ref()
            .map(|q| q.device)
    }

    pub(super) fn is_request(&self, slot: u32, device: DeviceId, unique: u64) -> bool {
        self.device_of(slot) == Some(device)
            && self
                .slots
                .get(slot as usize)
                .is_some_and(|m| m.unique == unique)
    }

    /// The INTERRUPT that would mean request `unique` in the present mount of the slot's device.
    fn interrupted(&self, slot: u32, unique: u64) -> Option<Interrupted> {
        let id = self.device_of(slot)?;
        let device = self.devices.iter().find(|d| d.id == id)?;
        Some(Interrupted {
            device: id,
            unique,
            epoch: device.shared.session.epoch(),
        })
    }

    /// Interrupts a waiting request of this core; another core has seen the INTERRUPT.
    pub fn interrupt_request(&mut self, interrupted: Interrupted, sys: &mut S) {
        let Interrupted { device, unique, .. } = interrupted;
        let found = self
            .waiting
            .iter()
            .copied()
            .find(|&slot| self.is_request(slot, device, unique));
        match found {
            Some(slot) => {
                self.waiting.retain(|&s| s != slot);
                self.give_up_wait(slot, device, unique, Errno::EINTR, sys);
            }
            None => {
                if self.early_interrupts.is_full() {
                    self.early_interrupts.pop_front();
                }
                let _ = self.early_interrupts.push_back(interrupted);
            }
        }
    }

    /// Ends a request that waited for a lock, without the lock.
    fn give_up_wait(
        &mut self,
        slot: u32,
        device: DeviceId,
        unique: u64,
        errno: Errno,
        sys: &mut S,
    ) {
        let device = self.devices.iter().find(|d| d.id == device);
        if let Some(backend) = device.and_then(|d| d.backend.as_ref()) {
            backend.wait_ended(unique);
        }
        self.fail(slot, errno, sys);
    }

    /// Tries waiting locks again although no local release was seen; for locks that other processes hold. True when one waits
    /// no longer: its driver is told at the end of the next turn.
    pub fn poll_locks(&mut self, sys: &mut S) -> bool {
        let all = self.waiting.len();
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
        self.waiting.len() < all
    }
}
