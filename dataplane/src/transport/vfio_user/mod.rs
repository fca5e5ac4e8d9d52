//! Emulated PCIe functions behind vfio-user sockets.
//!
//! [`wire`] is the protocol as bytes, without any logic. `frame` and `handshake` make messages of it; `dma` and `irq` hold what
//! the client has handed over. `config` and `common` lay out the function's registers, and `pci` is
//! the function.

mod common;
mod config;
mod dma;
mod frame;
mod handshake;
mod irq;
mod pci;
pub mod wire;
