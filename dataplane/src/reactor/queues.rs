//! A core's queues: started, stopped, published, moved to other guest memory.
// UNSAFETY: translates the chains of waiting requests again, in slot bodies that are reached by raw pointer.
#![expect(
    unsafe_code,
    reason = "slot bodies are lent to helper threads one by one"
)]

use alloc::sync::Arc;

use ferry_shared::errno::Errno;
use ferry_shared::trace::Point;

use super::{Backend, CoreDevice, Ending, Reactor, RunQueue, StartQueue, System};
use crate::id::{CoreEvent, DeviceId, QueueIdx};
use crate::mem::GuestMap;
use crate::slot::Stage;
use crate::virtio::queue::QueueState;

impl<B: Backend, S: System<B>> Reactor<B, S> {
    /// Begins to serve a queue.
    pub fn start(&mut self, start: StartQueue<B, S::Call>, sys: &mut S) {
        if !self.devices.iter().any(|d| d.id == start.device) {
            let mut device = CoreDevice {
                id: start.device,
                shared: start.shared,
                backend: None,
                epoch: 0,
                next_map: None,
                maps_asked: 0,
                lock_epoch: 0,
            };
            device.refresh();
            self.devices.push(device);
        }
        if let Some(call) = &start.call {
            // What was published before this start may not have been announced.
            sys.interrupt(call);
        }
        let place = self.devices.iter().position(|d| d.id == start.device);
        let mut queue = RunQueue {
            device: start.device,
            place: place.unwrap_or(usize::MAX),
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
        let at = match self.queues.iter().position(Option::is_none) {
            Some(at) => at,
            None => {
                self.queues.push(None);
                self.queues.len().saturating_sub(1)
            }
        };
        if let Some(free) = self.queues.get_mut(at) {
            *free = Some(queue);
        }
        if let Some(counters) = &self.count_in {
            counters.queue_placed(at, &start.place);
        }
        if let Ok(at) = u32::try_from(at) {
            let thread = u64::from(start.place.thread);
            self.trace(Point::QueueStarted, at, [thread, 0], sys);
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
                d.maps_asked = d.maps_asked.saturating_add(1);
                self.check_memory(device, sys);
            }
            None => sys.report(CoreEvent::MemoryReplaced { device }),
        }
    }

    /// Runs what had to wait.
    pub(super) fn retry(&mut self, sys: &mut S) -> bool {
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
            worked |= released && self.poll_locks(sys);
        }
        worked
    }

    /// Makes what a queue has given back visible, and interrupts the driver if it wants that.
    pub(super) fn publish(&mut self, at: u32, sys: &mut S) {
        let Some(q) = self.queues.get_mut(at as usize).and_then(Option::as_mut) else {
            return;
        };
        if core::mem::take(&mut q.dirty)
            && q.queue.publish()
            && let Some(call) = &q.call
        {
            sys.interrupt(call);
            self.trace(Point::Interrupt, at, [0; 2], sys);
        }
    }

    /// After something has stopped touching guest memory: goes on with what waited for that.
    pub(super) fn settle(&mut self, at: u32, sys: &mut S) {
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
    pub(super) fn check_memory(&mut self, device: DeviceId, sys: &mut S) {
        if self
            .queues
            .iter()
            .flatten()
            .any(|q| q.device == device && q.touching > 0)
        {
            return;
        }
        let Some(d) = self.devices.iter_mut().find(|d| d.id == device) else {
            return;
        };
        let asked = core::mem::take(&mut d.maps_asked);
        let Some(map) = d.next_map.take() else {
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
        for _ in 0..asked {
            sys.report(CoreEvent::MemoryReplaced { device });
        }
    }

    /// Reports a queue that was asked to stop and has nothing in flight any more.
    pub(super) fn check_stopped(&mut self, at: u32, sys: &mut S) {
        let ready = |q: &RunQueue<S::Call>| q.ending != Ending::Runs && q.in_flight == 0;
        let Some(q) = self.queue_mut(at).filter(|q| ready(q)) else {
            return;
        };
        let (device, index, reset) = (q.device, q.index, q.ending == Ending::Reset);
        if !reset {
            self.publish(at, sys);
        }
        self.trace(Point::QueueStopped, at, [0; 2], sys);
        self.count_finished(sys);
        if let Some(counters) = &self.count_in {
            counters.queue_gone(at as usize);
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
            let asked = self.devices.iter().find(|d| d.id == device);
            for _ in 0..asked.map_or(0, |d| d.maps_asked) {
                sys.report(CoreEvent::MemoryReplaced { device });
            }
            self.devices.retain(|d| d.id != device);
            for q in self.queues.iter_mut().flatten() {
                let place = self.devices.iter().position(|d| d.id == q.device);
                q.place = place.unwrap_or(usize::MAX);
            }
        }
        sys.report(CoreEvent::QueueStopped {
            device,
            index,
            state,
        });
    }

    pub(super) fn forget_interrupts(&mut self, device: DeviceId) {
        self.early_interrupts.retain(|early| early.device != device);
    }

    pub(super) fn touches(&mut self, at: u32, yes: bool) {
        if let Some(q) = self.queue_mut(at) {
            q.touching = if yes {
                q.touching.saturating_add(1)
            } else {
                q.touching.saturating_sub(1)
            };
        }
    }
}
