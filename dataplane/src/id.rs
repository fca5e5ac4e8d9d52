//! Names of devices and queues, and what the cores report about them.

use crate::virtio::queue::QueueState;

/// Names a started device for as long as the process lives; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceId(pub u32);

/// Number of a virtqueue within its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QueueIdx(pub u16);

/// What travels on a queue (virtio 1.3, section 5.11.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueKind {
    /// FORGET, BATCH_FORGET and INTERRUPT.
    HighPriority,
    /// Messages from the device to the driver.
    Notification,
    /// Everything else.
    Request,
}

/// What the cores report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CoreEvent {
    /// A queue is stopped; nothing of the device touches its rings any more.
    QueueStopped {
        /// The device.
        device: DeviceId,
        /// The queue.
        index: QueueIdx,
        /// Where it stands.
        state: QueueState,
    },
    /// The old guest memory is out of use.
    MemoryReplaced {
        /// The device.
        device: DeviceId,
    },
    /// The driver broke the rules of the ring: the queue takes no more requests until it is reset, and the device should
    /// say `DEVICE_NEEDS_RESET`. Reported once.
    QueueFailed {
        /// The device.
        device: DeviceId,
        /// The queue.
        index: QueueIdx,
    },
    /// A FUSE session began or ended.
    Mounted {
        /// The device.
        device: DeviceId,
        /// Whether it is mounted now.
        mounted: bool,
    },
}
