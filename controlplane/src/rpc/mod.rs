//! The RPC methods: one table that the server decodes by, `rpc_get_methods` lists and the command line is parsed by, and
//! one file of handlers per noun.

pub mod cli;
pub mod decode;
mod doca;
mod error;
mod framework;
mod fsdev;
mod log;
mod method;
mod notify;
mod params;
pub mod script;
pub mod stats;
pub mod table;
mod trace;
mod tune;
mod virtio_fs;

pub use error::RpcError;
pub use log::LogSettings;
pub use notify::Notifications;
pub use stats::Baselines;
