//! The recovery memory: what a data plane that starts after a crash, an upgrade or a restart needs to go on.
//!
//! One memfd, named [`FD_NAME`] in the service manager's fd store, holds everything: *cells* ([`cells`]), small records that the
//! management thread writes (specifications, device registers, connections), and *areas* ([`region`]), in which the request
//! path keeps its tables in place, so that there is nothing to copy. It outlives the process, not the machine.
//!
//! # What a crash leaves
//!
//! The process can end between any two stores. Stores of one thread become visible in program order up to that point, and
//! nothing after it, so order alone is enough: no flush, no barrier stronger than a compiler's. Every writer here is made so
//! that each prefix of its stores is the old state or the new one, or can be told from both and repaired.
//!
//! # Who is believed
//!
//! The memory comes back from the fd store, so it was ours; but it may be a newer version's, or damaged. It is checked as if
//! it were hostile before anything is taken from it, and refused as a whole when it does not hold together.

pub mod journal;
pub mod placed;

#[cfg(feature = "std")]
pub mod cells;
#[cfg(feature = "std")]
pub mod region;

/// The name of the region's descriptor in the fd store.
pub const FD_NAME: &str = "recovery";
