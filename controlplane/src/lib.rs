//! The unprivileged half of Ferry.
//!
//! It owns the RPC socket, the rules ([`model`]), the configuration ([`config`]) and the link to the data plane
//! ([`dataplane`]). Nothing here touches a guest or its files: killing this process never disturbs a request. The table of
//! methods ([`rpc::table`]) and the command line made from it ([`rpc::cli`]) are also what `ferry rpc` is built on.

pub mod app;
pub mod config;
pub mod dataplane;
pub mod framing;
pub mod model;
pub mod rpc;
pub mod server;
