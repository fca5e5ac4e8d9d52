//! A guest without a kernel: sends requests as bytes, in any pieces, and checks the rules that hold for every reply.
// UNSAFETY: stands in for guest memory, which the code under test reaches through raw pointers only.
#![expect(unsafe_code, reason = "builds segments over memory of the test's own")]
#![allow(dead_code, reason = "each test binary uses its part")]

pub(crate) mod cases;
pub(crate) mod scripted;
pub(crate) mod wire;

use std::ptr::NonNull;

use ferry_dataplane::dispatch::{
    self, FIRST, Incoming, Malformed, Outcome, execute, fail, finish_io, intake, scratch_needed,
};
use ferry_dataplane::fsdev::{FsDev, IoOp};
use ferry_dataplane::fuse::session::Session;
use ferry_dataplane::mem::{IoVec, Segments};

/// What fills reply memory that nobody has written.
pub(crate) const UNTOUCHED: u8 = 0xee;
/// What fills scratch, as an earlier request of another guest might have.
const STALE: u8 = 0x5a;
/// Bytes of a reply's header.
pub(crate) const HEADER: usize = 16;

/// Guest memory in pieces.
pub(crate) struct Pieces {
    raw: Vec<*mut [u8]>,
    iovecs: Vec<IoVec>,
}

impl Pieces {
    /// Spreads bytes over pieces of the given lengths; what is left over makes one more piece.
    pub(crate) fn new(bytes: &[u8], lengths: &[usize]) -> Pieces {
        let mut pieces = Pieces {
            raw: Vec::new(),
            iovecs: Vec::new(),
        };
        let mut rest = bytes;
        for length in lengths.iter().copied().chain([bytes.len()]) {
            let (now, later) = rest.split_at(length.min(rest.len()));
            pieces.push(now);
            rest = later;
        }
        pieces
    }

    fn push(&mut self, bytes: &[u8]) {
        let raw = Box::into_raw(Box::<[u8]>::from(bytes));
        self.raw.push(raw);
        let base = NonNull::new(raw.cast::<u8>()).expect("a box has an address");
        self.iovecs.push(IoVec::new(base, bytes.len()));
    }

    pub(crate) fn segments(&self) -> Segments<'_> {
        // SAFETY: every piece is an allocation of its own that lives as long as `self` and has no Rust reference to it.
        unsafe { Segments::new(&self.iovecs) }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.segments().len()];
        self.segments().read(&mut bytes);
        bytes
    }
}

impl Drop for Pieces {
    fn drop(&mut self) {
        for raw in self.raw.drain(..) {
            // SAFETY: made by `Box::into_raw` in `push`, and dropped once.
            drop(unsafe { Box::from_raw(raw) });
        }
    }
}

/// What came of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// The reply's bytes; none for an operation without a reply.
    Reply(Vec<u8>),
    /// SETLKW waits.
    Waits,
    /// INTERRUPT of this request.
    Interrupts(u64),
}

impl Answer {
    /// The error number of a reply, positive; 0 for success.
    pub(crate) fn errno(&self) -> i32 {
        match self {
            Answer::Reply(bytes) if bytes.len() >= HEADER => -wire::i32_at(bytes, 4),
            other => panic!("no reply: {other:?}"),
        }
    }

    /// What follows the header of a reply.
    pub(crate) fn payload(&self) -> &[u8] {
        match self {
            Answer::Reply(bytes) if bytes.len() >= HEADER => &bytes[HEADER..],
            other => panic!("no reply: {other:?}"),
        }
    }

    pub(crate) fn is_silent(&self) -> bool {
        *self == Answer::Reply(Vec::new())
    }
}

/// Bytes that a submitted READ "finds" in the file, at most.
pub(crate) const FILE: &[u8] = b"from the ring";

/// Takes a request through all the steps of a core.
pub(crate) fn exchange<F: FsDev>(
    fs: Option<&F>,
    session: &Session,
    request: &Pieces,
    reply: &Pieces,
) -> Answer {
    let readable = request.segments();
    let mut input = vec![0; FIRST.min(readable.len())];
    readable.read(&mut input);
    let outcome = match intake(&input, readable.len()) {
        Err(Malformed { errno, unique }) => Outcome::Done(match unique {
            Some(unique) => fail(unique, reply.segments(), errno),
            None => 0,
        }),
        Ok(taken) => {
            assert!(taken.input <= readable.len());
            input.resize(taken.input, 0);
            readable.read(&mut input);
            let room = scratch_needed(&input, reply.segments().len());
            execute(
                fs,
                session,
                Incoming {
                    input: &input,
                    data: readable.after(taken.input),
                    reply: reply.segments(),
                    scratch: &mut vec![STALE; room],
                    line: None,
                },
            )
        }
    };
    let used = match outcome {
        Outcome::Done(used) => used,
        Outcome::Wait => return Answer::Waits,
        Outcome::Interrupt { unique } => return Answer::Interrupts(unique),
        Outcome::Submit { op, pin } => {
            let data = readable.after(input.len());
            let result = perform(op, data, reply.segments().after(HEADER));
            let fs = fs.expect("only a backend submits");
            finish_io(fs, &input, reply.segments(), op, pin, result)
        }
    };
    checked(&input, reply, used as usize)
}

/// Carries out a submitted operation as a ring would on a file that holds [`FILE`].
fn perform(op: IoOp, data: Segments<'_>, dst: Segments<'_>) -> i32 {
    match op {
        IoOp::Read {
            offset: u64::MAX, ..
        } => -5,
        IoOp::Read { len, .. } => {
            assert!(len as usize <= dst.len());
            dst.first(len as usize).write(FILE) as i32
        }
        IoOp::Write { len, .. } => {
            assert!(len as usize <= data.len());
            len as i32
        }
        IoOp::Fsync { .. } => 0,
        IoOp::Fallocate { .. } => -28,
    }
}

/// The rules that hold for every reply.
fn checked(input: &[u8], reply: &Pieces, used: usize) -> Answer {
    let bytes = reply.bytes();
    assert!(used <= bytes.len(), "used {used} of {}", bytes.len());
    assert!(used == 0 || used >= HEADER);
    if used > 0 {
        assert_eq!(wire::u32_at(&bytes, 0) as usize, used, "length in header");
        assert_eq!(wire::u64_at(&bytes, 8), wire::u64_at(input, 8), "unique");
        let error = wire::i32_at(&bytes, 4);
        assert!((-511..=0).contains(&error), "error {error}");
        assert!(error == 0 || used == HEADER, "an error has no payload");
        // A refused READ may have data where the ring has put it; everything else stays as it was.
        if error == 0 {
            assert!(bytes[used..].iter().all(|&b| b == UNTOUCHED));
        }
    } else {
        assert!(bytes.iter().all(|&b| b == UNTOUCHED));
    }
    Answer::Reply(bytes[..used].to_vec())
}

/// A guest that has sent INIT and sends whole requests.
pub(crate) struct Guest<F> {
    pub(crate) fs: F,
    pub(crate) session: Session,
}

impl<F: FsDev> Guest<F> {
    /// A guest that has sent nothing.
    pub(crate) fn new(fs: F) -> Guest<F> {
        Guest {
            fs,
            session: Session::default(),
        }
    }

    /// A guest with protocol 7.45 and every flag that it can get.
    pub(crate) fn mounted(fs: F) -> Guest<F> {
        let guest = Guest::new(fs);
        let answer = guest.send(&cases::init(7, 45, u64::MAX));
        assert_eq!(answer.errno(), 0, "INIT");
        guest
    }

    /// Sends a request that has room for any reply.
    pub(crate) fn send(&self, request: &[u8]) -> Answer {
        self.send_for(request, 256 * 1024)
    }

    /// Sends a request with so much room for the reply.
    pub(crate) fn send_for(&self, request: &[u8], room: usize) -> Answer {
        self.send_split(request, &[], room, &[])
    }

    /// Sends a request in pieces.
    pub(crate) fn send_split(
        &self,
        request: &[u8],
        request_pieces: &[usize],
        room: usize,
        reply_pieces: &[usize],
    ) -> Answer {
        let request = Pieces::new(request, request_pieces);
        let reply = Pieces::new(&vec![UNTOUCHED; room], reply_pieces);
        exchange(Some(&self.fs), &self.session, &request, &reply)
    }
}

/// The opcode as the reactor sees it.
pub(crate) fn opcode(request: &[u8]) -> u32 {
    dispatch::opcode(request)
}
