//! Virtqueues and the virtio-fs device model, free of any transport, thread or notification mechanism.

pub mod inflight;
pub mod queue;
