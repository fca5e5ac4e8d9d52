//! Cores that only write down what they are asked, for tests of the transports.

use std::sync::Arc;

use crate::engine::{CoreEvent, Cores, DeviceId, QueueIdx, QueueStart};
use crate::mem::GuestMap;
use crate::os::eventfd::EventFd;
use crate::virtio::queue::QueueState;

/// One call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    Start(u16),
    Stop(u16),
    Reset(u16),
    SetCall(u16, bool),
    SetMemory,
    EndSession,
}

#[derive(Debug, Default)]
pub(crate) struct FakeCores {
    pub(crate) calls: Vec<Asked>,
    /// Every start, in order.
    pub(crate) started: Vec<QueueStart>,
}

impl FakeCores {
    /// The calls since the last time.
    pub(crate) fn take(&mut self) -> Vec<Asked> {
        std::mem::take(&mut self.calls)
    }
}

impl Cores for FakeCores {
    fn start_queue(&mut self, start: QueueStart) {
        self.calls.push(Asked::Start(start.index.0));
        self.started.push(start);
    }

    fn stop_queue(&mut self, _device: DeviceId, index: QueueIdx) {
        self.calls.push(Asked::Stop(index.0));
    }

    fn reset_queue(&mut self, _device: DeviceId, index: QueueIdx) {
        self.calls.push(Asked::Reset(index.0));
    }

    fn set_call(&mut self, _device: DeviceId, index: QueueIdx, call: Option<Arc<EventFd>>) {
        self.calls.push(Asked::SetCall(index.0, call.is_some()));
    }

    fn set_memory(&mut self, _device: DeviceId, _map: Arc<GuestMap>) {
        self.calls.push(Asked::SetMemory);
    }

    fn end_session(&mut self, _device: DeviceId) {
        self.calls.push(Asked::EndSession);
    }
}

/// The device of these tests.
pub(crate) const DEVICE: DeviceId = DeviceId(1);

/// A queue that has stopped.
pub(crate) fn stopped(index: u16, avail: u16, used: u16) -> CoreEvent {
    CoreEvent::QueueStopped {
        device: DEVICE,
        index: QueueIdx(index),
        state: QueueState {
            avail,
            used,
            parked: Vec::new(),
        },
    }
}
