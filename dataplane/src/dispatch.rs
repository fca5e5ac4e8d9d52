//! From a request's bytes to the backend and back to a reply.
//!
//! One exhaustive match over the operations. Every error becomes one error reply here and nowhere else.

use crate::fsdev::{FsDev, IoOp, Pin};
use crate::fuse::session::Session;
use crate::mem::Segments;

/// How much of a request must be at hand before [`execute`] can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Intake {
    /// Bytes to copy out of guest memory: headers, arguments and names; all of the request but WRITE's data.
    pub input: usize,
}

/// A request as the core hands it over.
pub struct Incoming<'a> {
    /// The copied part, [`Intake::input`] bytes.
    pub input: &'a [u8],
    /// The guest's bytes after that: WRITE's data.
    pub data: Segments<'a>,
    /// Where the reply goes.
    pub reply: Segments<'a>,
    /// Room to assemble the reply in, at least as long as [`scratch_needed`] says.
    pub scratch: &'a mut [u8],
}

/// What has become of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Finished: so many bytes are in the reply segments (0 for operations without a reply).
    Done(u32),
    /// The core performs this and then calls [`finish_io`].
    Submit {
        /// What to submit.
        op: IoOp,
        /// Goes back to the backend afterwards.
        pin: Pin,
    },
    /// SETLKW met a conflicting lock: run the request again when a lock may have been released.
    Wait,
    /// INTERRUPT: the request with this number should end with `EINTR` if it waits; this one is finished, without a reply.
    Interrupt {
        /// The number of the request to interrupt.
        unique: u64,
    },
}
