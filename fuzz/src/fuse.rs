//! The FUSE layer: the decoder alone, and whole requests over the null backend.
// UNSAFETY: stands in for guest memory, which the code under test reaches through raw pointers only.
#![expect(unsafe_code, reason = "builds segments over memory of its own")]

use std::ffi::CStr;
use std::ptr::NonNull;

use ferry_dataplane::dispatch::{self, FIRST, Incoming, Outcome};
use ferry_dataplane::fsdev::null::Null;
use ferry_dataplane::fuse::ops::Op;
use ferry_dataplane::fuse::parse::{self, Init, InitWishes, Name, Protocol};
use ferry_dataplane::fuse::session::Session;
use ferry_dataplane::mem::{IoVec, Segments};
use ferry_shared::limits::{MAX_DATA_BUFFER, NAME_MAX};

/// What fills reply memory that nobody has written.
const UNTOUCHED: u8 = 0xee;
/// Bytes of a reply's header.
const HEADER: usize = 16;

/// Decodes one request. The input is the protocol's minor version above 27, its flags (one bit each), and the request.
pub fn parse(data: &[u8]) {
    let [minor, bits, request @ ..] = data else {
        return;
    };
    let flags = (0..64)
        .map(|bit| 1u64 << bit)
        .filter(|flag| flag & Protocol::FLAGS != 0);
    let protocol = Protocol {
        minor: 27 + u32::from(minor % 19),
        flags: flags
            .zip(0u32..)
            .filter(|(_, place)| bits >> place & 1 != 0)
            .fold(0, |all, (flag, _)| all | flag),
    };
    let first = &request[..request.len().min(FIRST)];
    let Ok(taken) = dispatch::intake(first, request.len()) else {
        return;
    };
    let (input, data) = request.split_at(taken.input);
    let Ok(header) = parse::header(input) else {
        panic!("taken in without a header");
    };
    let Ok(request) = parse::request(header, input, data.len(), protocol) else {
        return;
    };
    match request.op {
        Op::Mknod { name, .. }
        | Op::Mkdir { name, .. }
        | Op::Unlink { name }
        | Op::Rmdir { name }
        | Op::Link { name, .. }
        | Op::Symlink { name, .. }
        | Op::Create { name, .. } => assert_component(name),
        Op::Rename { name, newname, .. } | Op::Rename2 { name, newname, .. } => {
            assert_component(name);
            assert_component(newname);
        }
        Op::Write { write } => assert!(write.arg.size as usize <= data.len()),
        Op::BatchForget { batch } => assert!(batch.count as usize <= data.len() / 16),
        _ => {}
    }
}

fn assert_component(Name(name): Name<'_>) {
    let bytes = CStr::to_bytes(name);
    assert!(!bytes.is_empty() && bytes.len() <= NAME_MAX);
    assert!(!bytes.contains(&b'/') && bytes != b"." && bytes != b"..");
}

/// Runs requests over the null backend. The input is a byte that says whether the session is mounted already, and then
/// for each request the room for its reply (16 bits), the length of the pieces that guest memory lies in (8 bits), the
/// request's length (16 bits) and the request.
pub fn ops(data: &[u8]) {
    let Some((mounted, mut rest)) = data.split_first() else {
        return;
    };
    let session = Session::default();
    if mounted & 1 != 0 {
        let init = Init {
            major: 7,
            minor: 45,
            wishes: Some(InitWishes {
                max_readahead: 0,
                flags: u64::MAX,
            }),
        };
        assert!(session.init(&Null, &init).is_ok());
    }
    while let [r0, r1, piece, l0, l1, tail @ ..] = rest {
        let room = usize::from(u16::from_le_bytes([*r0, *r1]));
        let len = usize::from(u16::from_le_bytes([*l0, *l1])).min(tail.len());
        let (request, later) = tail.split_at(len);
        rest = later;
        serve(&session, request, usize::from(*piece), room);
    }
}

fn serve(session: &Session, request: &[u8], piece: usize, room: usize) {
    let request = Memory::new(request, piece);
    let reply = Memory::new(&vec![UNTOUCHED; room], piece);
    let readable = request.segments();
    let mut input = vec![0; FIRST.min(readable.len())];
    readable.read(&mut input);
    let used = match dispatch::intake(&input, readable.len()) {
        Err(refused) => refused.unique.map_or(0, |unique| {
            dispatch::fail(unique, reply.segments(), refused.errno)
        }),
        Ok(taken) => {
            assert!(taken.input <= readable.len());
            input.resize(taken.input, 0);
            readable.read(&mut input);
            let scratch = dispatch::scratch_needed(&input, room);
            assert!(scratch <= MAX_DATA_BUFFER as usize);
            let rq = Incoming {
                input: &input,
                data: readable.after(taken.input),
                reply: reply.segments(),
                scratch: &mut vec![0x5a; scratch],
                line: None,
            };
            match dispatch::execute(Some(&Null), session, rq) {
                Outcome::Done(used) => used,
                Outcome::Interrupt { .. } => 0,
                Outcome::Submit { .. } | Outcome::Wait => panic!("null never waits"),
            }
        }
    };
    assert_reply(&reply.bytes(), used as usize);
}

fn assert_reply(bytes: &[u8], used: usize) {
    assert!(used == 0 || used >= HEADER);
    assert!(bytes[used..].iter().all(|&byte| byte == UNTOUCHED));
    if let [l0, l1, l2, l3, e0, e1, e2, e3, ..] = bytes[..used] {
        assert_eq!(u32::from_le_bytes([l0, l1, l2, l3]) as usize, used);
        let error = i32::from_le_bytes([e0, e1, e2, e3]);
        assert!((-511..=0).contains(&error));
        assert!(error == 0 || used == HEADER);
    }
}

/// Guest memory in pieces of one length; 0 is one piece.
struct Memory {
    raw: *mut [u8],
    iovecs: Vec<IoVec>,
}

impl Memory {
    fn new(bytes: &[u8], piece: usize) -> Memory {
        let raw = Box::into_raw(Box::<[u8]>::from(bytes));
        let start = NonNull::new(raw.cast::<u8>()).expect("a box has an address");
        let piece = if piece == 0 {
            bytes.len().max(1)
        } else {
            piece
        };
        let iovecs = (0..bytes.len())
            .step_by(piece)
            .map(|at| {
                // SAFETY: `at` is less than the length of the allocation.
                let base = unsafe { start.add(at) };
                IoVec::new(base, piece.min(bytes.len() - at))
            })
            .collect();
        Memory { raw, iovecs }
    }

    fn segments(&self) -> Segments<'_> {
        // SAFETY: the pieces lie side by side in one allocation that lives as long as `self` and has no Rust reference.
        unsafe { Segments::new(&self.iovecs) }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.segments().len()];
        self.segments().read(&mut bytes);
        bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: made by `Box::into_raw` in `new`, and dropped once.
        drop(unsafe { Box::from_raw(self.raw) });
    }
}
