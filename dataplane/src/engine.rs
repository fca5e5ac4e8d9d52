//! The seam between the management thread, which owns devices and sockets, and the cores, which own running queues.
//!
//! A transport asks through [`Cores`]; the cores answer with [`CoreEvent`]s, which the management thread hands to the device
//! they name. Nothing here waits: a queue is stopped when its event has arrived.

use std::sync::Arc;

pub use crate::id::{CoreEvent, DeviceId, QueueIdx, QueueKind};
use crate::mem::GuestMap;
use crate::os::eventfd::EventFd;
use crate::virtio::queue::QueueConfig;

/// Everything a core needs to serve a queue.
#[derive(Debug)]
pub struct QueueStart {
    /// The device that it belongs to.
    pub device: DeviceId,
    /// Which of its queues.
    pub index: QueueIdx,
    /// What travels on it.
    pub kind: QueueKind,
    /// Its rings.
    pub config: QueueConfig,
    /// The guest's memory.
    pub map: Arc<GuestMap>,
    /// Becomes readable when the driver notifies the queue.
    pub kick: Arc<EventFd>,
    /// Interrupts the driver; `None` while the driver takes no interrupts for this queue.
    pub call: Option<Arc<EventFd>>,
    /// vhost-user's in-flight record of the queue, when the front end keeps one.
    pub inflight: Option<crate::virtio::inflight::Inflight>,
}

/// What a transport may ask of the cores. Each call returns at once.
pub trait Cores {
    /// Starts serving a queue that is not running.
    fn start_queue(&mut self, start: QueueStart);
    /// Stops a running queue: nothing more is popped, what is in flight is completed (a waiting lock is put back into
    /// the ring, so that a later start finds it again). Answered by [`CoreEvent::QueueStopped`].
    fn stop_queue(&mut self, device: DeviceId, index: QueueIdx);
    /// Stops a running queue for a reset: what waits is dropped without an answer. Answered by
    /// [`CoreEvent::QueueStopped`] when nothing can touch guest memory any more.
    fn reset_queue(&mut self, device: DeviceId, index: QueueIdx);
    /// Changes where a running queue's interrupts go. The driver gets one interrupt at once, so that none is lost.
    fn set_call(&mut self, device: DeviceId, index: QueueIdx, call: Option<Arc<EventFd>>);
    /// Replaces the guest memory of the device's running queues. Answered by [`CoreEvent::MemoryReplaced`] when no core
    /// uses the old map any more.
    fn set_memory(&mut self, device: DeviceId, map: Arc<GuestMap>);
    /// Ends the device's FUSE session, if there is one; called when all its queues are stopped by a reset or a hang-up.
    fn end_session(&mut self, device: DeviceId);
}
