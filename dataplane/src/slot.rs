//! Request slots: one per request in flight, all there before a queue starts.
//!
//! A slot's *body* (bytes and descriptors) may be lent to the helper thread while the operation runs there; its *meta* data
//! stays with the core.

use ferry_shared::errno::Errno;
use ferry_shared::limits::{SLOT_INPUT, SLOT_OUTPUT};

use crate::fsdev::{IoOp, Pin};
use crate::fuse::reply::HEADER;
use crate::mem::{GuestMap, IoVec};
use crate::pool::DataBuffer;
use crate::virtio::chain::Chain;
use crate::virtio::queue::Head;

/// Most pieces that one system call takes (`UIO_MAXIOV`); a longer transfer is made in several.
pub const MAX_IOVECS: usize = 1024;

/// What the operation itself works on.
#[derive(Debug)]
pub struct SlotBody {
    /// The request's descriptors.
    pub chain: Chain,
    /// The pieces of the transfer that is on the ring.
    pub iovecs: [IoVec; MAX_IOVECS],
    /// The copy of the request's headers and arguments.
    pub input: [u8; SLOT_INPUT],
    /// Room for the reply.
    pub output: [u8; SLOT_OUTPUT],
}

impl SlotBody {
    /// An unused body.
    pub fn new() -> SlotBody {
        SlotBody {
            chain: Chain::new(),
            iovecs: [IoVec::EMPTY; MAX_IOVECS],
            input: [0; SLOT_INPUT],
            output: [0; SLOT_OUTPUT],
        }
    }
}

impl Default for SlotBody {
    fn default() -> Self {
        Self::new()
    }
}

/// Where a request stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The slot is free.
    Free,
    /// Waits for data buffers; nothing has run yet.
    NeedsBuffers,
    /// Runs on the helper thread.
    Offloaded,
    /// Waits for room on the ring.
    Unsubmitted,
    /// Is on the ring.
    Submitted,
    /// SETLKW waits for a lock.
    Waiting,
}

/// A transfer in progress.
#[derive(Clone, Copy, Debug)]
pub struct Transfer {
    /// As the backend gave it.
    pub op: IoOp,
    /// Goes back to the backend.
    pub pin: Pin,
    /// Bytes done so far.
    pub done: u32,
}

impl Transfer {
    /// Takes a result into account; returns whether the rest is to be submitted.
    ///
    /// A file system may transfer less than it was asked for before the end of the file; FUSE would take that for the end,
    /// so the rest is asked for until nothing more comes.
    pub fn advance(&mut self, result: i32) -> bool {
        if result == -Errno::EINTR.raw() || result == -Errno::EAGAIN.raw() {
            return true;
        }
        let (IoOp::Read { len, .. } | IoOp::Write { len, .. }) = self.op else {
            return false;
        };
        let Ok(bytes) = u32::try_from(result) else {
            return false;
        };
        self.done = self.done.saturating_add(bytes).min(len);
        bytes > 0 && self.done < len
    }

    /// The result of the whole. A guest takes a short READ for the end of the file, so an error there counts whatever was
    /// transferred before it; a short WRITE it continues, and then meets the error.
    pub fn total(&self, last: i32) -> i32 {
        match self.op {
            IoOp::Read { .. } if last >= 0 => self.done_so_far(),
            IoOp::Write { .. } if last >= 0 || self.done > 0 => self.done_so_far(),
            IoOp::Read { .. }
            | IoOp::Write { .. }
            | IoOp::Fsync { .. }
            | IoOp::Fallocate { .. } => last,
        }
    }

    fn done_so_far(&self) -> i32 {
        i32::try_from(self.done).unwrap_or(i32::MAX)
    }

    /// What is left to submit, with its pieces in `iovecs`; returns how many pieces.
    pub fn rest(
        &self,
        chain: &Chain,
        map: &GuestMap,
        input_len: usize,
        iovecs: &mut [IoVec],
    ) -> (IoOp, usize) {
        let done = self.done as usize;
        match self.op {
            IoOp::Read { fd, offset, len } => {
                let data = chain.writable(map).after(HEADER);
                let count = data.first(len as usize).after(done).to_iovecs(iovecs);
                (
                    IoOp::Read {
                        fd,
                        offset: offset.saturating_add(u64::from(self.done)),
                        len: len.saturating_sub(self.done),
                    },
                    count,
                )
            }
            IoOp::Write { fd, offset, len } => {
                let data = chain.readable(map).after(input_len);
                let count = data.first(len as usize).after(done).to_iovecs(iovecs);
                (
                    IoOp::Write {
                        fd,
                        offset: offset.saturating_add(u64::from(self.done)),
                        len: len.saturating_sub(self.done),
                    },
                    count,
                )
            }
            op @ (IoOp::Fsync { .. } | IoOp::Fallocate { .. }) => (op, 0),
        }
    }
}

/// The core's side of a slot.
#[derive(Debug)]
pub struct SlotMeta {
    /// Where the request stands.
    pub stage: Stage,
    /// Index of its queue on this core.
    pub queue: u32,
    /// The queue's token; there while the slot is not free.
    pub head: Option<Head>,
    /// Its FUSE number.
    pub unique: u64,
    /// Its operation; 0, which is none, if it is too short to have one.
    pub opcode: u32,
    /// Bytes of the copied input.
    pub input_len: u32,
    /// Bytes that the reply may need.
    pub scratch_len: u32,
    /// A buffer for an input that does not fit the slot.
    pub input_buffer: Option<DataBuffer>,
    /// A buffer for a reply that does not fit the slot.
    pub output_buffer: Option<DataBuffer>,
    /// The transfer on the ring.
    pub transfer: Option<Transfer>,
    /// The queue was reset: finish without an answer.
    pub discard: bool,
    /// When it was taken from its queue.
    pub began: u64,
}

/// What a slot gives back when its request is over.
#[derive(Debug)]
pub struct Freed {
    /// Index of the queue on this core.
    pub queue: u32,
    /// The queue's token.
    pub head: Head,
    /// The queue was reset.
    pub discard: bool,
    /// Data buffers to give back.
    pub buffers: [Option<DataBuffer>; 2],
}

impl SlotMeta {
    /// A free slot.
    pub const fn free() -> SlotMeta {
        SlotMeta {
            stage: Stage::Free,
            queue: 0,
            head: None,
            unique: 0,
            opcode: 0,
            input_len: 0,
            scratch_len: 0,
            input_buffer: None,
            output_buffer: None,
            transfer: None,
            discard: false,
            began: 0,
        }
    }

    /// Ends the request; `None` if there is none. What the next one sets before it is read stays as it is.
    #[inline]
    pub fn end(&mut self) -> Option<Freed> {
        let head = self.head.take()?;
        self.stage = Stage::Free;
        self.opcode = 0;
        self.input_len = 0;
        self.transfer = None;
        Some(Freed {
            queue: self.queue,
            head,
            discard: core::mem::take(&mut self.discard),
            buffers: [self.input_buffer.take(), self.output_buffer.take()],
        })
    }
}
