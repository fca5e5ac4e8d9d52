//! The operating system: the only place, with the backends and the transports' sockets, that makes system calls.

pub mod arena;
pub mod cpulock;
pub mod eventfd;
pub mod fdstore;
pub mod ledger;
pub mod mmap;
pub mod poller;
pub mod procfs;
mod sigbus;
pub mod signal;
pub mod socket;
pub mod uring;
