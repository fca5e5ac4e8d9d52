//! What the bridge has to know of FUSE: where a request goes, how long its reply may become, and which features of the
//! kernel's protocol cannot work across a virtqueue.

use ferry_dataplane::fuse::abi::{
    FUSE_BATCH_FORGET, FUSE_FORGET, FUSE_GETXATTR, FUSE_HAS_INODE_DAX, FUSE_INTERRUPT, FUSE_IOCTL,
    FUSE_IOCTL_MAX_IOV, FUSE_LISTXATTR, FUSE_MAP_ALIGNMENT, FUSE_MAX_PAGES, FUSE_NOTIFY_REPLY,
    FUSE_OVER_IO_URING, FUSE_PASSTHROUGH, FUSE_READ, FUSE_READDIR, FUSE_READDIRPLUS, FUSE_READLINK,
    fuse_batch_forget_in, fuse_forget_one, fuse_getxattr_in, fuse_in_header, fuse_init_in,
    fuse_init_out, fuse_ioctl_in, fuse_ioctl_iovec, fuse_ioctl_out, fuse_out_header, fuse_read_in,
};
use zerocopy::{FromBytes, IntoBytes};

#[cfg(test)]
mod tests;

/// Bytes of a request's header.
pub(super) const IN_HEADER: usize = size_of::<fuse_in_header>();
/// Bytes of a reply's header.
pub(super) const OUT_HEADER: usize = size_of::<fuse_out_header>();
/// Bytes of a request that are looked at: the header and the longest arguments that say how long the reply may become.
pub(super) const HEAD_LEN: usize = IN_HEADER + size_of::<fuse_read_in>();
/// Room for replies of a fixed length; the longest is that of STATX, with 304 bytes.
const SHORT_REPLY: usize = 512;
/// `PATH_MAX`.
const LONGEST_LINK: usize = 4096;
/// Pages are of this size in `max_pages`.
pub(super) const FUSE_PAGE: usize = 4096;
/// Pages of a request when the reply to INIT does not name a number.
const DEFAULT_PAGES: usize = 32;
/// Features that need memory or file descriptors of this host to reach the device, or requests to bypass `/dev/fuse`.
const IMPOSSIBLE: u64 =
    FUSE_MAP_ALIGNMENT | FUSE_HAS_INODE_DAX | FUSE_PASSTHROUGH | FUSE_OVER_IO_URING;

/// What the bridge does with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// To a request queue, with room for a reply of so many bytes.
    Request(usize),
    /// To a request queue; there will be no reply.
    Silent,
    /// To the high-priority queue.
    Hiprio,
}

/// The header of a request of which the first bytes, at most [`HEAD_LEN`], are given.
pub(super) fn header(head: &[u8]) -> Option<fuse_in_header> {
    Some(fuse_in_header::read_from_prefix(head).ok()?.0)
}

/// Decides about a request of which the first bytes are given.
pub(super) fn route(header: &fuse_in_header, head: &[u8]) -> Route {
    let args = head.get(IN_HEADER..).unwrap_or(&[]);
    let body = match header.opcode {
        FUSE_FORGET | FUSE_BATCH_FORGET | FUSE_INTERRUPT => return Route::Hiprio,
        FUSE_NOTIFY_REPLY => return Route::Silent,
        FUSE_READ | FUSE_READDIR | FUSE_READDIRPLUS => {
            fuse_read_in::read_from_prefix(args).map_or(0, |(read, _)| read.size as usize)
        }
        FUSE_GETXATTR | FUSE_LISTXATTR => {
            fuse_getxattr_in::read_from_prefix(args).map_or(0, |(get, _)| get.size as usize)
        }
        FUSE_READLINK => LONGEST_LINK,
        FUSE_IOCTL => {
            let out = fuse_ioctl_in::read_from_prefix(args).map_or(0, |(ioctl, _)| ioctl.out_size);
            let vectors = FUSE_IOCTL_MAX_IOV as usize * size_of::<fuse_ioctl_iovec>();
            size_of::<fuse_ioctl_out>() + vectors.max(out as usize)
        }
        _ => 0,
    };
    Route::Request(OUT_HEADER + body.max(SHORT_REPLY - OUT_HEADER))
}

/// A reply that only carries an error, a positive number.
pub(super) fn error_reply(unique: u64, errno: i32) -> fuse_out_header {
    fuse_out_header {
        len: OUT_HEADER as u32,
        error: -errno,
        unique,
    }
}

/// Takes features that cannot work away from the kernel's INIT, so that the device does not accept them.
pub(super) fn filter_init(request: &mut [u8]) {
    let Some(body) = request.get_mut(IN_HEADER..) else {
        return;
    };
    // Before 7.36 the structure ends after `flags`.
    let mut init = fuse_init_in::default();
    let n = body.len().min(size_of::<fuse_init_in>());
    init.as_mut_bytes()[..n].copy_from_slice(&body[..n]);
    init.flags &= !(IMPOSSIBLE as u32);
    init.flags2 &= !((IMPOSSIBLE >> 32) as u32);
    body[..n].copy_from_slice(&init.as_bytes()[..n]);
}

/// Takes the same features away from the device's reply, and lowers its limits to transfers of `room` bytes. Returns the
/// largest transfer that remains.
pub(super) fn filter_init_reply(reply: &mut [u8], room: usize) -> usize {
    let Some(body) = reply.get_mut(OUT_HEADER..) else {
        return 0;
    };
    let mut init = fuse_init_out::default();
    let n = body.len().min(size_of::<fuse_init_out>());
    init.as_mut_bytes()[..n].copy_from_slice(&body[..n]);
    init.flags &= !(IMPOSSIBLE as u32);
    init.flags2 &= !((IMPOSSIBLE >> 32) as u32);
    init.max_write = init.max_write.min(u32::try_from(room).unwrap_or(u32::MAX));
    let room_pages = u16::try_from(room / FUSE_PAGE).unwrap_or(u16::MAX);
    init.max_pages = init.max_pages.min(room_pages);
    let pages = if u64::from(init.flags) & FUSE_MAX_PAGES != 0 {
        usize::from(init.max_pages.max(1))
    } else {
        DEFAULT_PAGES
    };
    body[..n].copy_from_slice(&init.as_bytes()[..n]);
    // The kernel writes at least a page, whatever `max_write` says.
    let write = (init.max_write as usize).max(FUSE_PAGE);
    write.max(pages * FUSE_PAGE)
}

/// A BATCH_FORGET may be longer than the device likes its requests; this cuts it into several, none longer than `limit`.
#[derive(Clone, Copy, Debug)]
pub(super) struct ForgetPieces {
    header: fuse_in_header,
    total: u32,
    done: u32,
    per_piece: u32,
}

/// Bytes before the entries of a BATCH_FORGET.
pub(super) const BATCH_HEAD: usize = IN_HEADER + size_of::<fuse_batch_forget_in>();
const ENTRY: usize = size_of::<fuse_forget_one>();

impl ForgetPieces {
    /// `None` if the request is not a BATCH_FORGET, or short enough as it is.
    pub(super) fn new(header: &fuse_in_header, limit: usize) -> Option<ForgetPieces> {
        let len = header.len as usize;
        if header.opcode != FUSE_BATCH_FORGET || len <= limit {
            return None;
        }
        Some(ForgetPieces {
            header: *header,
            total: ((len - BATCH_HEAD) / ENTRY) as u32,
            done: 0,
            per_piece: ((limit - BATCH_HEAD) / ENTRY) as u32,
        })
    }

    /// The next piece: its first [`BATCH_HEAD`] bytes, and where in the request its entries begin and how many bytes they
    /// have. It is taken with [`ForgetPieces::advance`].
    pub(super) fn piece(&self) -> Option<([u8; BATCH_HEAD], usize, usize)> {
        let count = self.per_piece.min(self.total - self.done);
        if count == 0 {
            return None;
        }
        let bytes = count as usize * ENTRY;
        let header = fuse_in_header {
            len: (BATCH_HEAD + bytes) as u32,
            ..self.header
        };
        let batch = fuse_batch_forget_in { count, dummy: 0 };
        let mut head = [0u8; BATCH_HEAD];
        head[..IN_HEADER].copy_from_slice(header.as_bytes());
        head[IN_HEADER..].copy_from_slice(batch.as_bytes());
        Some((head, BATCH_HEAD + self.done as usize * ENTRY, bytes))
    }

    /// Goes on to the next piece.
    pub(super) fn advance(&mut self) {
        self.done += self.per_piece.min(self.total - self.done);
    }
}
