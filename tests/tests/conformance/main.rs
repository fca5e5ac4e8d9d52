//! Conformance of the virtqueues and of their two transports to virtio 1.3, by a driver in user space against the running
//! service: every ring format and feature, number and size of queues, and number of vectors that a driver may choose.
//!
//! A part of all combinations runs always, and in it every value of one choice meets every value of each other choice;
//! `FERRY_CONFORMANCE_FULL=1` runs them all. [`requests`] puts load on a device that was started with one combination and
//! checks what comes back.

mod matrix;
mod ports;
mod requests;
mod resets;
mod rig;
