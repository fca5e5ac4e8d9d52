//! The FUSE protocol: wire ABI, operations, parsing, sessions, replies. Knows nothing of virtio or of any backend.

pub mod abi;
pub mod session;
