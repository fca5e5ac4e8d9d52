//! Emulated PCIe functions behind vfio-user sockets.
//!
//! [`wire`] is the protocol as bytes, without any logic. `config` holds a function's configuration space.

mod common;
mod config;
mod dma;
mod frame;
mod handshake;
mod irq;
pub mod wire;
