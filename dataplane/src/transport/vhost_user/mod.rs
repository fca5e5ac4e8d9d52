//! The vhost-user transport: a device behind a socket that a VMM connects to.

pub mod wire;
