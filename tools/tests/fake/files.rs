//! A file system of one file, in the bytes of the FUSE protocol (7.31).

use super::{u32_at, u64_at};

/// The file's name and its content.
pub(crate) const NAME: &str = "hello";
pub(crate) const CONTENT: &[u8] = b"read through a virtqueue\n";
/// Looking up this name makes the device die.
pub(crate) const DEADLY: &str = "die";

const ENOENT: i32 = 2;
const ENOSYS: i32 = 38;

/// Answers one request.
pub(crate) fn answer(request: &[u8]) -> Vec<u8> {
    let (len, opcode) = (u32_at(request, 0) as usize, u32_at(request, 4));
    assert_eq!(len, request.len(), "the header's length");
    let (unique, node) = (u64_at(request, 8), u64_at(request, 16));
    let args = &request[40..];
    let body = match opcode {
        // FORGET and BATCH_FORGET have no reply.
        2 | 42 => return Vec::new(),
        // LOOKUP
        1 => lookup(args),
        // GETATTR: the attributes and how long they are valid.
        3 => Ok([&[0; 16][..], &attr(node)].concat()),
        // READ, from the start; the whole file fits.
        15 => Ok(CONTENT[u64_at(args, 8) as usize..].to_vec()),
        // STATFS
        17 => Ok(vec![0; 80]),
        // INIT
        26 => Ok(init(args)),
        // OPEN, RELEASE, FLUSH, DESTROY
        14 => Ok(vec![0; 16]),
        18 | 25 | 38 => Ok(Vec::new()),
        _ => Err(ENOSYS),
    };
    let (error, body) = match body {
        Ok(body) => (0, body),
        Err(errno) => (-errno, Vec::new()),
    };
    let mut reply = (16 + body.len() as u32).to_le_bytes().to_vec();
    reply.extend(error.to_le_bytes());
    reply.extend(unique.to_le_bytes());
    reply.extend(body);
    reply
}

/// Refuses to begin a session.
pub(crate) fn refuse_everything(request: &[u8]) -> Vec<u8> {
    let mut reply = 16u32.to_le_bytes().to_vec();
    reply.extend((-107i32).to_le_bytes());
    reply.extend(&request[8..16]);
    reply
}

fn lookup(name: &[u8]) -> Result<Vec<u8>, i32> {
    let name = name.strip_suffix(&[0]).expect("names end with a NUL");
    assert_ne!(name, DEADLY.as_bytes(), "dies, as the test wants");
    if name != NAME.as_bytes() {
        return Err(ENOENT);
    }
    let mut entry = 2u64.to_le_bytes().to_vec();
    entry.extend([0; 32]);
    entry.extend(attr(2));
    Ok(entry)
}

/// Node 1 is the root, node 2 the file.
fn attr(node: u64) -> Vec<u8> {
    let (mode, links, size) = match node {
        1 => (0o040_755u32, 2u32, 0),
        _ => (0o100_644, 1, CONTENT.len() as u64),
    };
    let mut attr = Vec::new();
    for word in [node, size, 0, 0, 0, 0] {
        attr.extend(word.to_le_bytes());
    }
    for half in [0, 0, 0, mode, links, 0, 0, 0, 4096, 0] {
        attr.extend(u32::to_le_bytes(half));
    }
    attr
}

fn init(args: &[u8]) -> Vec<u8> {
    assert_eq!(u32_at(args, 0), 7, "the protocol's major version");
    const MAX_PAGES: u32 = 1 << 22;
    const IMPOSSIBLE: u32 = 1 << 26;
    assert_eq!(u32_at(args, 12) & IMPOSSIBLE, 0, "no DAX over a socket");
    let mut out = Vec::new();
    for word in [7, 31, 65_536, MAX_PAGES, 0x0010_0010, 131_072, 1, 32] {
        out.extend(u32::to_le_bytes(word));
    }
    out.resize(64, 0);
    out
}
