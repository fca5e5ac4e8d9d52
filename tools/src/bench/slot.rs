//! The memory of one request in flight, divided as a Linux guest does it: the header, the arguments, the data, the reply's
//! header and its payload are a piece each.

use ferry_dataplane::fuse::abi::{fuse_in_header, fuse_out_header};
use zerocopy::{FromBytes, IntoBytes};

use crate::driver::{DmaMemory, DmaSlice, Queue, SubmitError};

const ARGS_AT: usize = 64;
const ARGS_LEN: usize = 448;
const REPLY_AT: usize = ARGS_AT + ARGS_LEN;
const PAYLOAD_AT: usize = REPLY_AT + 64;
const PAYLOAD_LEN: usize = 512;
const PAGE: usize = 4096;

/// Where the reply's payload goes, and how long it may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// There is no reply at all.
    None,
    /// A structure.
    Fixed(u32),
    /// Data.
    Data(u32),
}

/// One request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request<'a> {
    pub(super) opcode: u32,
    pub(super) nodeid: u64,
    pub(super) args: &'a [u8],
    /// Bytes of the slot's data that follow the arguments.
    pub(super) data: u32,
    pub(super) answer: Answer,
}

impl<'a> Request<'a> {
    /// A request without a reply.
    pub(super) fn new(opcode: u32, nodeid: u64, args: &'a [u8]) -> Request<'a> {
        Request {
            opcode,
            nodeid,
            args,
            data: 0,
            answer: Answer::None,
        }
    }

    /// The same, answered with a `T`.
    pub(super) fn answered<T>(self) -> Request<'a> {
        let answer = Answer::Fixed(size_of::<T>() as u32);
        Request { answer, ..self }
    }
}

/// Memory for one request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    fixed: DmaSlice,
    data: DmaSlice,
    number: u32,
}

impl Slot {
    /// Bytes of memory that slots for transfers of `block` bytes take.
    pub(super) fn memory_needed(count: usize, block: u32) -> usize {
        count * (PAGE + (block as usize).next_multiple_of(PAGE)) + PAGE
    }

    pub(super) fn new(memory: &DmaMemory, number: u32, block: u32) -> Option<Slot> {
        let all = memory.alloc(Slot::memory_needed(1, block) - PAGE, PAGE)?;
        Some(Slot {
            fixed: all.part(0, PAGE),
            data: all.after(PAGE),
            number,
        })
    }

    pub(super) fn data_len(&self) -> u32 {
        self.data.len() as u32
    }

    /// Puts a request into the ring; its cookie is the slot's number.
    pub(super) fn send(
        &self,
        memory: &DmaMemory,
        queue: &mut Queue,
        request: &Request<'_>,
        tag: u64,
    ) -> Result<(), SubmitError> {
        let header_len = size_of::<fuse_in_header>();
        let header = fuse_in_header {
            len: (header_len + request.args.len()) as u32 + request.data,
            opcode: request.opcode,
            // The kernel's numbers are even, and never 0.
            unique: ((tag << 32) | (u64::from(self.number) + 1)) << 1,
            nodeid: request.nodeid,
            ..fuse_in_header::default()
        };
        memory.write(self.fixed, header.as_bytes());
        memory.write(self.fixed.part(ARGS_AT, ARGS_LEN), request.args);
        let readable = [
            self.fixed.part(0, header_len),
            self.fixed.part(ARGS_AT, request.args.len()),
            self.data.part(0, request.data as usize),
        ];
        let readable = match (request.args.len(), request.data) {
            (0, _) => &readable[..1],
            (_, 0) => &readable[..2],
            _ => &readable[..],
        };
        let reply = self.fixed.part(REPLY_AT, size_of::<fuse_out_header>());
        let writable = match request.answer {
            Answer::None | Answer::Fixed(0) => [reply, reply],
            Answer::Fixed(len) => [reply, self.fixed.part(PAYLOAD_AT, len as usize)],
            Answer::Data(len) => [reply, self.data.part(0, len as usize)],
        };
        let writable = match request.answer {
            Answer::None => &[],
            Answer::Fixed(0) => &writable[..1],
            _ => &writable[..],
        };
        queue.submit(readable, writable, u64::from(self.number))
    }

    /// The reply's header.
    pub(super) fn header(&self, memory: &DmaMemory) -> fuse_out_header {
        let mut header = fuse_out_header::default();
        memory.read(self.fixed.after(REPLY_AT), header.as_mut_bytes());
        header
    }

    /// The structure that the reply consists of.
    pub(super) fn payload<T: FromBytes + IntoBytes>(&self, memory: &DmaMemory) -> T {
        let mut payload = T::new_zeroed();
        let bytes = payload.as_mut_bytes();
        memory.read(self.fixed.part(PAYLOAD_AT, PAYLOAD_LEN), bytes);
        payload
    }

    /// Copies data of a reply out.
    pub(super) fn read_data(&self, memory: &DmaMemory, out: &mut [u8]) {
        memory.read(self.data, out);
    }
}
