//! The buffers of one request: what the descriptors named, checked, and where it is in this process.
//!
//! A chain lives in a request's slot and is used again and again; it allocates when it is made and never after that. Only
//! the ring code fills it. It never reads guest memory itself.
// UNSAFETY: `Segments` are made from pieces that this module translated with the map that it is given again.
#![expect(
    unsafe_code,
    reason = "hands translated pieces to `Segments`, after checking that they came from the caller's map"
)]

use alloc::boxed::Box;
use alloc::vec;
use core::ptr::NonNull;

use ferry_shared::limits::MAX_CHAIN;
use serde::{Deserialize, Serialize};

use super::queue::QueueError;
use super::spec::{DESC_SIZE, Desc, DescFlags};
use crate::mem::{Fault, GuestMap, IoVec, Iova, Region, Segments, copy_in};

/// Most pieces that a chain has: one per descriptor, and some for descriptors that cross the boundary of two regions.
pub const MAX_PIECES: usize = MAX_CHAIN + 64;

/// One buffer as a descriptor names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range {
    /// First guest address.
    pub iova: Iova,
    /// Length in bytes.
    pub len: u32,
}

/// Why a request's buffers cannot be used as they are. It fails the request, not the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainFault {
    /// A buffer, or the table that should name it, is not in guest memory.
    #[error(transparent)]
    Memory(#[from] Fault),
    /// The buffers cross the boundaries of memory regions too often.
    #[error("the buffers of the request lie in more than {MAX_PIECES} pieces")]
    TooManyPieces,
}

/// The buffers of one request.
#[derive(Debug)]
pub struct Chain {
    ranges: Box<[Range]>,
    pieces: Box<[IoVec]>,
    /// Ranges in use, and how many of them, from the first, are readable.
    ranges_len: usize,
    ranges_readable: usize,
    /// The same for the pieces.
    pieces_len: usize,
    pieces_readable: usize,
    /// Bytes of the readable pieces, and of the others.
    readable: usize,
    writable: usize,
    /// Sum of the lengths that the descriptors said.
    total: u32,
    /// The map that the pieces were translated by.
    map: u64,
}

impl Default for Chain {
    fn default() -> Chain {
        Chain::new()
    }
}

impl Chain {
    /// An empty chain with room for the longest one.
    pub fn new() -> Chain {
        let none = Range {
            iova: Iova(0),
            len: 0,
        };
        Chain {
            ranges: vec![none; MAX_CHAIN].into_boxed_slice(),
            pieces: vec![IoVec::EMPTY; MAX_PIECES].into_boxed_slice(),
            ranges_len: 0,
            ranges_readable: 0,
            pieces_len: 0,
            pieces_readable: 0,
            readable: 0,
            writable: 0,
            total: 0,
            map: 0,
        }
    }

    /// Forgets the request.
    #[inline]
    pub fn reset(&mut self) {
        let Chain {
            ranges: _,
            pieces: _,
            ranges_len,
            ranges_readable,
            pieces_len,
            pieces_readable,
            readable,
            writable,
            total,
            map,
        } = self;
        *ranges_len = 0;
        *ranges_readable = 0;
        *pieces_len = 0;
        *pieces_readable = 0;
        *readable = 0;
        *writable = 0;
        *total = 0;
        *map = 0;
    }

    /// What the device may read. `map` must be the one that translated the chain, that is the queue's map when it was
    /// popped or the one given to [`retranslate`](Self::retranslate); with another one the result is empty.
    #[inline]
    pub fn readable<'a>(&'a self, map: &'a GuestMap) -> Segments<'a> {
        let pieces = self.pieces.get(..self.pieces_readable).unwrap_or(&[]);
        self.segments(pieces, self.readable, map)
    }

    /// What the device may write; see [`readable`](Self::readable).
    #[inline]
    pub fn writable<'a>(&'a self, map: &'a GuestMap) -> Segments<'a> {
        let pieces = self
            .pieces
            .get(self.pieces_readable..self.pieces_len)
            .unwrap_or(&[]);
        self.segments(pieces, self.writable, map)
    }

    #[inline]
    fn segments<'a>(&'a self, pieces: &'a [IoVec], len: usize, map: &'a GuestMap) -> Segments<'a> {
        if map.id() != self.map {
            return Segments::empty();
        }
        // SAFETY: the ids are equal, so `map` is the one that `translate` took the pieces from, those after
        // `pieces_readable` with write access; it is borrowed for 'a. `len` was added up from them.
        unsafe { Segments::of_len(pieces, len) }
    }

    /// What the descriptors named, readable ones first, and how many those are.
    pub fn ranges(&self) -> (&[Range], usize) {
        let ranges = self.ranges.get(..self.ranges_len).unwrap_or(&[]);
        (ranges, self.ranges_readable)
    }

    /// Translates again, after guest memory has changed. On a fault the chain keeps what comes before it.
    pub fn retranslate(&mut self, map: &GuestMap) -> Result<(), ChainFault> {
        self.translate(map).map_or(Ok(()), Err)
    }

    /// Adds a descriptor's buffer.
    #[inline]
    pub(super) fn push(&mut self, range: Range, write: bool) -> Result<(), QueueError> {
        let slot = self
            .ranges
            .get_mut(self.ranges_len)
            .ok_or(QueueError::ChainTooLong)?;
        let total = self
            .total
            .checked_add(range.len)
            .ok_or(QueueError::ChainTooLarge)?;
        if !write && self.ranges_readable != self.ranges_len {
            return Err(QueueError::ReadableAfterWritable);
        }
        *slot = range;
        self.total = total;
        self.ranges_len = self.ranges_len.saturating_add(1);
        if !write {
            self.ranges_readable = self.ranges_len;
        }
        Ok(())
    }

    /// Takes in a table as Linux writes it: in one region, its descriptors in order, each buffer in one region and not empty.
    /// Looks at each descriptor once and translates it at once. `false`: it is another table, a bad one, or not the beginning of
    /// the chain, and nothing has been taken.
    #[inline]
    pub(super) fn fill(&mut self, table: &IndirectTable<'_>) -> bool {
        if self.ranges_len != 0 {
            return false;
        }
        let filled = self.try_fill(table).is_some();
        if !filled {
            self.reset();
        }
        filled
    }

    #[inline]
    fn try_fill(&mut self, table: &IndirectTable<'_>) -> Option<()> {
        let host = table.host?;
        let mut pieces = Pieces {
            out: &mut self.pieces,
            len: 0,
            last: None,
            bytes: 0,
        };
        let mut region: Option<&Region> = None;
        let mut total = 0u32;
        for (index, slot) in (0..table.entries).zip(self.ranges.iter_mut()) {
            let mut bytes = [0; DESC_SIZE];
            let offset = (index as usize).wrapping_mul(DESC_SIZE);
            // SAFETY: `index` < `entries`, so the descriptor lies in the table, all of which is at `host`.
            copy_in(unsafe { host.add(offset) }, &mut bytes);
            let desc: Desc = zerocopy::transmute!(bytes);
            let flags = DescFlags::from_bits_retain(desc.flags.get());
            let range = Range {
                iova: Iova(desc.addr.get()),
                len: desc.len.get(),
            };
            let write = flags.contains(DescFlags::WRITE);
            let inside = |r: &Region| r.host_of(range.iova, u64::from(range.len), write);
            let mut at = region.and_then(inside);
            if at.is_none() {
                region = table.map.region(range.iova);
                at = region.and_then(inside);
            }
            if flags.contains(DescFlags::INDIRECT) || range.len == 0 {
                return None;
            }
            if write && self.ranges_readable == self.ranges_len {
                // The first one that is writable.
                self.pieces_readable = pieces.len;
                self.readable = core::mem::take(&mut pieces.bytes);
                pieces.last = None;
            } else if !write && self.ranges_readable != self.ranges_len {
                return None;
            }
            *slot = range;
            total = total.checked_add(range.len)?;
            pieces.add(at?, range.len as usize).ok()?;
            self.ranges_len = self.ranges_len.saturating_add(1);
            if !write {
                self.ranges_readable = self.ranges_len;
            }
            if !flags.contains(DescFlags::NEXT) {
                if !write {
                    self.pieces_readable = pieces.len;
                    self.readable = core::mem::take(&mut pieces.bytes);
                }
                self.writable = pieces.bytes;
                self.pieces_len = pieces.len;
                self.total = total;
                self.map = table.map.id();
                return Some(());
            }
            if u32::from(desc.next.get()) != index.wrapping_add(1) {
                return None;
            }
        }
        None
    }

    /// Whether the pieces behind the ranges are known.
    #[inline]
    pub(super) fn is_translated(&self, map: &GuestMap) -> bool {
        self.map != 0 && self.map == map.id()
    }

    /// Finds the pieces behind the ranges. Both halves are tried, so that an error reply can be written when a readable
    /// buffer is bad; the first fault is returned.
    pub(super) fn translate(&mut self, map: &GuestMap) -> Option<ChainFault> {
        self.pieces_len = 0;
        self.map = map.id();
        let (readable, first) = self.translate_half(map, 0, self.ranges_readable, false);
        self.readable = readable;
        self.pieces_readable = self.pieces_len;
        let (writable, second) =
            self.translate_half(map, self.ranges_readable, self.ranges_len, true);
        self.writable = writable;
        first.or(second)
    }

    /// The bytes of the pieces found, and what stopped the search.
    #[inline]
    fn translate_half(
        &mut self,
        map: &GuestMap,
        from: usize,
        to: usize,
        write: bool,
    ) -> (usize, Option<ChainFault>) {
        let mut pieces = Pieces {
            out: &mut self.pieces,
            len: self.pieces_len,
            last: None,
            bytes: 0,
        };
        // Neighbouring buffers mostly lie in the same region.
        let mut region = None;
        let mut fault = None;
        for range in self.ranges.get(from..to).unwrap_or(&[]) {
            let len = u64::from(range.len);
            let inside = |r: &Region| r.host_of(range.iova, len, write);
            let mut host = region.and_then(inside);
            if host.is_none() {
                region = map.region(range.iova);
                host = region.and_then(inside);
            }
            let done = match host {
                Some(host) => pieces.add(host, range.len as usize),
                None => pieces.add_split(map, *range, write),
            };
            if let Err(found) = done {
                fault = Some(found);
                break;
            }
        }
        self.pieces_len = pieces.len;
        (pieces.bytes, fault)
    }
}

/// Pieces that are being put together.
struct Pieces<'a> {
    out: &'a mut [IoVec],
    len: usize,
    /// The last one: neighbours in this process become one, which keeps the kernel's iovecs short.
    last: Option<(NonNull<u8>, usize)>,
    bytes: usize,
}

impl Pieces<'_> {
    #[inline]
    fn add(&mut self, host: NonNull<u8>, n: usize) -> Result<(), ChainFault> {
        if n == 0 {
            return Ok(());
        }
        let (base, len) = match self.last {
            Some((base, len)) if base.as_ptr().wrapping_add(len) == host.as_ptr() => {
                self.len = self.len.saturating_sub(1);
                (base, len.saturating_add(n))
            }
            _ => (host, n),
        };
        let slot = self
            .out
            .get_mut(self.len)
            .ok_or(ChainFault::TooManyPieces)?;
        *slot = IoVec::new(base, len);
        self.len = self.len.saturating_add(1);
        self.last = Some((base, len));
        self.bytes = self.bytes.saturating_add(n);
        Ok(())
    }

    /// A range that is empty, lies in several regions, or in none.
    #[cold]
    fn add_split(&mut self, map: &GuestMap, range: Range, write: bool) -> Result<(), ChainFault> {
        let mut at = range.iova;
        let mut left = u64::from(range.len);
        while left > 0 {
            let (host, n) = map.translate_some(at, left, write)?;
            self.add(host, n as usize)?;
            left = left.saturating_sub(n);
            if left > 0 {
                at = at.checked_add(n).ok_or(Fault::Unmapped {
                    iova: at.0,
                    len: left,
                })?;
            }
        }
        Ok(())
    }
}

/// A table of descriptors in guest memory that an indirect descriptor names.
pub(super) struct IndirectTable<'m> {
    map: &'m GuestMap,
    iova: Iova,
    entries: u32,
    /// Where it is, when it lies in one region.
    host: Option<NonNull<u8>>,
}

impl<'m> IndirectTable<'m> {
    /// Checks what the descriptor says about the table.
    #[inline]
    pub(super) fn new(map: &'m GuestMap, range: Range) -> Result<IndirectTable<'m>, QueueError> {
        if range.len == 0 || !(range.len as usize).is_multiple_of(DESC_SIZE) {
            return Err(QueueError::IndirectLength { len: range.len });
        }
        let region = map.region(range.iova);
        Ok(IndirectTable {
            map,
            iova: range.iova,
            entries: (range.len as usize / DESC_SIZE) as u32,
            host: region.and_then(|r| r.host_of(range.iova, u64::from(range.len), false)),
        })
    }

    #[inline]
    pub(super) fn entries(&self) -> u32 {
        self.entries
    }

    /// Has the processor fetch the first buffers that the table names.
    #[inline]
    pub(super) fn look_ahead(&self, buffers: u32) {
        let Some(host) = self.host else { return };
        for index in 0..self.entries.min(buffers) as usize {
            let mut addr = [0; 8];
            // SAFETY: `index` < `entries`, so the descriptor, whose first 8 bytes are the address, lies in the table.
            copy_in(
                unsafe { host.add(index.wrapping_mul(DESC_SIZE)) },
                &mut addr,
            );
            self.map.prefetch(Iova(u64::from_le_bytes(addr)));
        }
    }

    /// Copies one descriptor in.
    #[inline]
    pub(super) fn read(&self, index: u32) -> Result<[u8; DESC_SIZE], Fault> {
        match self.host.filter(|_| index < self.entries) {
            Some(host) => {
                let mut out = [0; DESC_SIZE];
                let offset = (index as usize).wrapping_mul(DESC_SIZE);
                // SAFETY: `index` < `entries`, so the descriptor lies in the table, all of which is at `host`.
                copy_in(unsafe { host.add(offset) }, &mut out);
                Ok(out)
            }
            None => self.read_split(index),
        }
    }

    /// The same from a table that lies in several regions, or in none.
    #[cold]
    fn read_split(&self, index: u32) -> Result<[u8; DESC_SIZE], Fault> {
        let mut out = [0; DESC_SIZE];
        let offset = u64::from(index).saturating_mul(DESC_SIZE as u64);
        let outside = Fault::Unmapped {
            iova: self.iova.0,
            len: offset,
        };
        if index >= self.entries {
            return Err(outside);
        }
        let iova = self.iova.checked_add(offset).ok_or(outside)?;
        self.map.read(iova, &mut out)?;
        Ok(out)
    }
}
