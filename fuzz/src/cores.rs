//! The cores that the fuzz targets of the transports start their queues on.

use std::collections::VecDeque;
use std::sync::Arc;

use ferry_dataplane::engine::{CoreEvent, Cores, DeviceId, QueueIdx, QueueStart};
use ferry_dataplane::mem::GuestMap;
use ferry_dataplane::os::eventfd::EventFd;
use ferry_dataplane::virtio::chain::Chain;
use ferry_dataplane::virtio::queue::Queue;

/// The device.
pub(crate) const DEVICE: DeviceId = DeviceId(0);

/// Cores that start every queue, look at its ring once, and answer everything that they are asked.
#[derive(Default)]
pub(crate) struct Obliging(pub(crate) VecDeque<CoreEvent>);

impl Obliging {
    fn stopped(&mut self, index: QueueIdx) {
        self.0.push_back(CoreEvent::QueueStopped {
            device: DEVICE,
            index,
            state: Default::default(),
        });
    }
}

impl Cores for Obliging {
    fn start_queue(&mut self, start: QueueStart) {
        let index = start.index;
        let failed = CoreEvent::QueueFailed {
            device: DEVICE,
            index,
        };
        match Queue::new(start.config, &start.map, start.inflight) {
            Ok(mut queue) => match queue.pop(&mut Chain::new()) {
                Ok(Some(popped)) => queue.push_used(popped.head, 0),
                Ok(None) => {}
                Err(_) => self.0.push_back(failed),
            },
            Err(_) => self.0.push_back(failed),
        }
    }

    fn stop_queue(&mut self, _device: DeviceId, index: QueueIdx) {
        self.stopped(index);
    }

    fn reset_queue(&mut self, _device: DeviceId, index: QueueIdx) {
        self.stopped(index);
    }

    fn set_call(&mut self, _device: DeviceId, _index: QueueIdx, _call: Option<Arc<EventFd>>) {}

    fn set_memory(&mut self, _device: DeviceId, _map: Arc<GuestMap>) {
        self.0
            .push_back(CoreEvent::MemoryReplaced { device: DEVICE });
    }

    fn end_session(&mut self, _device: DeviceId) {}
}
