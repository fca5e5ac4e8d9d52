//! The `ferry` tool's sub-commands, one module each, and the host-side virtio driver that they and the tests use.

pub mod bench;
pub mod completion;
pub mod driver;
pub mod fwconfig;
pub mod mount;
pub mod rpc;
pub mod top;
pub mod trace;
pub mod up;
