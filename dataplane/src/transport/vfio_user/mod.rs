//! Emulated PCIe functions behind vfio-user sockets.
//!
//! [`wire`] is the protocol as bytes, without any logic. `frame` and `handshake` make messages of it; `dma` and `irq` hold what
//! the client has handed over. `config` and `common` lay out the function's registers, `pci` is the function, `serve`
//! carries out commands on it, and `conn` is the way in and out.

mod common;
mod config;
mod conn;
mod dma;
mod frame;
mod handshake;
mod irq;
mod pci;
mod serve;
pub mod wire;

pub use conn::VfioUser;
