//! Virtqueues and the virtio-fs device model, free of any transport, thread or notification mechanism.
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]

mod area;
pub mod chain;
pub mod device;
pub mod inflight;
mod packed;
pub mod queue;
pub mod spec;
mod split;
#[cfg(test)]
pub(crate) mod testmem;
