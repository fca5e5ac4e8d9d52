//! Replies: headers, fixed structures, and directory listings.
//!
//! Whatever is written here is initialised: padding is zero, and nothing is taken from a buffer beyond what a backend
//! has filled. A reply that does not fit the guest's buffer becomes an error reply, and nothing at all where not even
//! that fits. The returned length is always the one in the reply's header.

use core::cell::Cell;
use core::ops::Range;

use ferry_shared::errno::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::abi::{fuse_dirent, fuse_direntplus, fuse_entry_out, fuse_open_out, fuse_out_header};
use crate::fsdev::DirSink;
use crate::mem::Segments;

/// Bytes of a reply's header.
pub const HEADER: usize = size_of::<fuse_out_header>();

/// Error numbers from here on are internal to the kernel, and Linux refuses them in a reply.
const FIRST_INTERNAL_ERRNO: i32 = 512;

/// The reply to CREATE and TMPFILE: an entry and an open file.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[expect(missing_docs, reason = "names are those of linux/fuse.h")]
pub struct fuse_created_out {
    pub entry: fuse_entry_out,
    pub open: fuse_open_out,
}

/// Where the reply to one request goes.
#[derive(Clone, Copy, Debug)]
pub struct Reply<'a> {
    unique: u64,
    to: Segments<'a>,
}

impl<'a> Reply<'a> {
    /// The reply to request `unique`.
    pub fn new(unique: u64, to: Segments<'a>) -> Reply<'a> {
        Reply { unique, to }
    }

    /// Bytes that the guest has left room for after the header.
    pub fn room(&self) -> usize {
        self.to.len().saturating_sub(HEADER)
    }

    /// Whether not even an error fits.
    pub fn is_hopeless(&self) -> bool {
        self.to.len() < HEADER
    }

    /// The guest's buffer after the header.
    #[inline]
    pub fn payload(&self) -> Segments<'a> {
        self.to.after(HEADER)
    }

    /// Writes an error; returns the bytes written.
    pub fn error(&self, errno: Errno) -> u32 {
        if self.is_hopeless() {
            return 0;
        }
        let raw = match errno.raw() {
            raw if raw < FIRST_INTERNAL_ERRNO => raw,
            _ => Errno::EIO.raw(),
        };
        self.header(raw.saturating_neg(), 0)
    }

    /// Writes a structure (`()` for a reply without one); returns the bytes written.
    #[inline]
    pub fn fixed<T: IntoBytes + Immutable>(&self, payload: &T) -> u32 {
        self.parts(payload.as_bytes(), &[])
    }

    /// Writes bytes; returns the bytes written, the header's included.
    pub fn bytes(&self, payload: &[u8]) -> u32 {
        self.parts(payload, &[])
    }

    /// Writes a payload in two parts; returns the bytes written.
    #[inline]
    pub fn parts(&self, first: &[u8], second: &[u8]) -> u32 {
        let len = first.len().saturating_add(second.len());
        if len > self.room() || self.is_hopeless() {
            return self.error(Errno::EIO);
        }
        let payload = self.payload();
        payload.write(first);
        if !second.is_empty() {
            payload.after(first.len()).write(second);
        }
        self.header(0, len)
    }

    /// Finishes a reply whose payload is in the guest's buffer already; returns the bytes written.
    pub fn in_place(&self, len: usize) -> u32 {
        if len > self.room() || self.is_hopeless() {
            return self.error(Errno::EIO);
        }
        self.header(0, len)
    }

    #[inline]
    fn header(&self, error: i32, payload: usize) -> u32 {
        // A chain of guest buffers can hold 4 GiB; a reply never does.
        let len = u32::try_from(payload.saturating_add(HEADER)).unwrap_or(u32::MAX);
        let header = fuse_out_header {
            len,
            error,
            unique: self.unique,
        };
        self.to.write(header.as_bytes());
        len
    }
}

/// A directory listing that is being packed.
#[derive(Debug)]
pub struct Listing<'a> {
    buffer: &'a mut [u8],
    used: usize,
    refused: Cell<bool>,
}

impl<'a> Listing<'a> {
    /// An empty listing of at most `buffer.len()` bytes.
    pub fn new(buffer: &'a mut [u8]) -> Listing<'a> {
        Listing {
            buffer,
            used: 0,
            refused: Cell::new(false),
        }
    }

    /// What has been packed; `EINVAL` when the buffer is too small for even one entry, because an empty listing would mean
    /// the end of the directory.
    pub fn finish(self) -> Result<&'a [u8], Errno> {
        if self.used == 0 && self.refused.get() {
            return Err(Errno::EINVAL);
        }
        let Listing { buffer, used, .. } = self;
        buffer.get(..used).ok_or(Errno::EIO)
    }

    /// The room of a record with a fixed part of this length, if it still fits.
    fn record(&self, fixed: usize, name: usize) -> Option<Range<usize>> {
        let end = fixed
            .checked_add(name)
            .and_then(|len| len.checked_next_multiple_of(8))
            .and_then(|len| self.used.checked_add(len))
            .filter(|&end| end <= self.buffer.len());
        if end.is_none() {
            self.refused.set(true);
        }
        Some(self.used..end?)
    }

    fn push<T: IntoBytes + Immutable>(&mut self, fixed: &T, name: &[u8]) -> bool {
        let fixed = fixed.as_bytes();
        let Some(room) = self.record(fixed.len(), name.len()) else {
            return false;
        };
        let Some(out) = self.buffer.get_mut(room.clone()) else {
            return false;
        };
        let (head, rest) = out.split_at_mut(fixed.len().min(out.len()));
        head.copy_from_slice(fixed);
        let (text, padding) = rest.split_at_mut(name.len().min(rest.len()));
        text.copy_from_slice(name);
        padding.fill(0);
        self.used = room.end;
        true
    }
}

fn dirent(name: &[u8], ino: u64, off: u64, kind: u32) -> Option<fuse_dirent> {
    Some(fuse_dirent {
        ino,
        off,
        namelen: u32::try_from(name.len()).ok()?,
        type_: kind,
    })
}

impl DirSink for Listing<'_> {
    fn entry(&mut self, name: &[u8], ino: u64, off: u64, kind: u32) -> bool {
        dirent(name, ino, off, kind).is_some_and(|fixed| self.push(&fixed, name))
    }

    fn fits_plus(&self, name_len: usize) -> bool {
        self.record(size_of::<fuse_direntplus>(), name_len)
            .is_some()
    }

    fn entry_plus(&mut self, name: &[u8], off: u64, kind: u32, entry: &fuse_entry_out) -> bool {
        dirent(name, entry.attr.ino, off, kind).is_some_and(|dirent| {
            let fixed = fuse_direntplus {
                entry_out: *entry,
                dirent,
            };
            self.push(&fixed, name)
        })
    }
}

#[cfg(test)]
mod tests;
