//! One virtqueue: taking requests and giving them back.

use crate::mem::Iova;

/// What the driver has programmed for a queue when it is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueConfig {
    /// Descriptors.
    pub size: u16,
    /// Descriptor table (split) or descriptor ring (packed).
    pub desc: Iova,
    /// Available ring (split) or driver event suppression (packed).
    pub avail: Iova,
    /// Used ring (split) or device event suppression (packed).
    pub used: Iova,
    /// `VIRTIO_F_RING_PACKED` is negotiated.
    pub packed: bool,
    /// `VIRTIO_F_EVENT_IDX` is negotiated.
    pub event_idx: bool,
    /// `VIRTIO_F_INDIRECT_DESC` is negotiated.
    pub indirect: bool,
    /// Where to go on.
    pub state: QueueState,
}

/// Where a queue stands between two runs; all zero for a fresh split queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueState {
    /// Split: the next available index to look at. Packed: ring position in bits 0 to 14, wrap counter in bit 15.
    pub avail: u16,
    /// The same for what is given back next.
    pub used: u16,
}
