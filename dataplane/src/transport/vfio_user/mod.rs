//! Emulated PCIe functions behind vfio-user sockets.
//!
//! [`wire`] is the protocol as bytes, without any logic.

pub mod wire;
