//! Ferry's data plane: virtqueues in, file operations out.
//!
//! # The life of one request
//!
//! A core's [`reactor`] polls its queues. A queue *pops* a validated chain of descriptors ([`virtio`]); the FUSE headers
//! and arguments are copied once into the request's [`slot`], because guest memory may change while it is read;
//! [`fuse::parse`] turns the copy into a typed operation; [`dispatch`] calls the [`fsdev`]; the reply goes into the guest's
//! segments, and used entries are published, and the guest is interrupted, once per queue and turn.
//!
//! # Who may be hostile
//!
//! A guest (ring and request bytes), a VMM peer (socket messages), the control plane (ring frames), and the content
//! of the exported directory. Each is checked where it enters: [`virtio`], [`fuse::parse`], `transport`, `control`.
//!
//! The request path is `no_std`; the operating system enters through traits. What needs it is behind the feature `std`.
#![cfg_attr(not(feature = "std"), no_std)]

extern crate alloc;

pub mod dispatch;
pub mod fsdev;
pub mod fuse;
pub mod id;
pub mod mem;
pub mod pool;
pub mod reactor;
pub mod recovery;
#[cfg(test)]
mod sim;
pub mod slot;
pub mod virtio;

#[cfg(feature = "std")]
pub mod control;
#[cfg(feature = "std")]
pub mod cores;
#[cfg(feature = "std")]
pub mod engine;
#[cfg(feature = "std")]
pub mod keeper;
#[cfg(feature = "std")]
pub mod mailbox;
#[cfg(feature = "std")]
pub mod os;
#[cfg(feature = "std")]
pub mod platform;
#[cfg(feature = "std")]
pub mod service;
#[cfg(feature = "std")]
pub mod transport;
