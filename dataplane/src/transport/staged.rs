//! Cores that are told only after a message's effect has been saved.
//!
//! A queue that ran before the record said so would be started from the beginning by the next process, and execute what
//! has been executed. So the first start of a queue, and everything after it, waits for [`Staged::release`].

use std::sync::Arc;

use crate::engine::{Cores, DeviceId, QueueIdx, QueueStart};
use crate::mem::GuestMap;
use crate::os::eventfd::EventFd;

enum Call {
    Start(Box<QueueStart>),
    Stop(DeviceId, QueueIdx),
    Reset(DeviceId, QueueIdx),
    Redirect(DeviceId, QueueIdx, Option<Arc<EventFd>>),
    SetMemory(DeviceId, Arc<GuestMap>),
    EndSession(DeviceId),
}

/// Holds back what must not happen before the state is saved.
pub(crate) struct Staged<'a> {
    cores: &'a mut dyn Cores,
    held: Vec<Call>,
}

impl<'a> Staged<'a> {
    pub(crate) fn new(cores: &'a mut dyn Cores) -> Staged<'a> {
        Staged {
            cores,
            held: Vec::new(),
        }
    }

    /// The state is saved: tells the cores.
    pub(crate) fn release(self) {
        let Staged { cores, held } = self;
        for call in held {
            match call {
                Call::Start(start) => cores.start_queue(*start),
                Call::Stop(device, index) => cores.stop_queue(device, index),
                Call::Reset(device, index) => cores.reset_queue(device, index),
                Call::Redirect(device, index, call) => cores.set_call(device, index, call),
                Call::SetMemory(device, map) => cores.set_memory(device, map),
                Call::EndSession(device) => cores.end_session(device),
            }
        }
    }

    /// Does a call now, or later if something is held back that must come first.
    fn pass(&mut self, call: Call, now: impl FnOnce(&mut dyn Cores)) {
        if self.held.is_empty() {
            now(self.cores);
        } else {
            self.held.push(call);
        }
    }
}

impl Cores for Staged<'_> {
    fn start_queue(&mut self, start: QueueStart) {
        self.held.push(Call::Start(Box::new(start)));
    }

    fn stop_queue(&mut self, device: DeviceId, index: QueueIdx) {
        self.pass(Call::Stop(device, index), |c| c.stop_queue(device, index));
    }

    fn reset_queue(&mut self, device: DeviceId, index: QueueIdx) {
        self.pass(Call::Reset(device, index), |c| c.reset_queue(device, index));
    }

    fn set_call(&mut self, device: DeviceId, index: QueueIdx, call: Option<Arc<EventFd>>) {
        let held = Call::Redirect(device, index, call.clone());
        self.pass(held, |c| c.set_call(device, index, call));
    }

    fn set_memory(&mut self, device: DeviceId, map: Arc<GuestMap>) {
        let held = Call::SetMemory(device, Arc::clone(&map));
        self.pass(held, |c| c.set_memory(device, map));
    }

    fn end_session(&mut self, device: DeviceId) {
        self.pass(Call::EndSession(device), |c| c.end_session(device));
    }
}
