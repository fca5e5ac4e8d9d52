//! Emulated PCIe functions behind vfio-user sockets.
//!
//! [`wire`] is the protocol as bytes, without any logic. `config` holds a function's configuration space.

mod config;
mod dma;
mod handshake;
mod irq;
pub mod wire;
