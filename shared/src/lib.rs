//! What Ferry's two processes agree on: limits, errors, messages, and the shared-memory rings that carry them.
//!
//! `no_std`: the request path and the control path use the same definitions.
#![cfg_attr(not(any(test, feature = "std", loom)), no_std)]

extern crate alloc;

/// Exit status of a control plane that an operator has asked by RPC to end, and with it the whole service.
pub const EXIT_ASKED: u8 = 3;

#[cfg(all(feature = "std", not(loom)))]
pub mod affinity;
pub mod counters;
#[cfg(feature = "std")]
pub mod cpumask;
pub mod errno;
pub mod export;
#[cfg(all(feature = "std", not(loom)))]
pub mod handshake;
pub mod limits;
#[cfg(all(feature = "std", not(loom)))]
pub mod logging;
pub mod msg;
pub mod region;
pub mod ring;
#[cfg(all(feature = "std", not(loom)))]
mod sealed;
pub mod trace;
pub mod tuning;
