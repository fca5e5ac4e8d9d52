//! The FUSE protocol: wire ABI, operations, parsing, sessions, replies. Knows nothing of virtio or of any backend.
#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::unwrap_used
    )
)]

pub mod abi;
pub mod open_flags;
pub mod ops;
pub mod parse;
pub mod reply;
pub mod session;
