//! Guest memory: the map from guest addresses to host memory, and bounds-checked copies.
//!
//! The only code that touches guest bytes. Guest memory is shared with a running guest, so it is never seen through a
//! Rust reference: bytes are copied in and out through raw pointers, atomics serve ring indexes, and nothing that has been
//! read is read a second time and expected to be the same.
// UNSAFETY: dereferences host addresses of mapped guest memory, each bounds-checked against the region it lies in.
#![expect(
    unsafe_code,
    reason = "copies to and from guest memory through raw pointers"
)]

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::marker::PhantomData;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use ferry_shared::limits::MAX_MEMORY_REGIONS;
use serde::{Deserialize, Serialize};

/// An address as the guest's driver writes it into rings and descriptors: guest-physical, or an IOMMU's virtual one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Iova(pub u64);

impl Iova {
    /// The address `offset` bytes further, if it exists.
    pub fn checked_add(self, offset: u64) -> Option<Iova> {
        self.0.checked_add(offset).map(Iova)
    }
}

/// A stretch of guest memory that is mapped here.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// First guest address.
    pub iova: Iova,
    /// Length in bytes, not 0.
    pub len: u64,
    /// Where it is mapped here.
    pub host: NonNull<u8>,
    /// Whether the device may write to it.
    pub writable: bool,
}

impl Region {
    /// Where `len` bytes at `iova` are, if all of them lie in this region and may be used in this way.
    #[inline]
    pub(crate) fn host_of(&self, iova: Iova, len: u64, write: bool) -> Option<NonNull<u8>> {
        let offset = iova.0.wrapping_sub(self.iova.0);
        let fits = offset < self.len && len <= self.len.wrapping_sub(offset);
        if !fits || (write && !self.writable) {
            return None;
        }
        // SAFETY: `offset` < `self.len`, so the result lies inside the region's host range.
        Some(unsafe { self.host.add(offset as usize) })
    }
}

/// Why an access to guest memory is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// No region holds the whole range.
    #[error("guest address {iova:#x} + {len} is not mapped")]
    Unmapped {
        /// First address of the range.
        iova: u64,
        /// Length of the range in bytes.
        len: u64,
    },
    /// The region is read-only for the device.
    #[error("guest address {iova:#x} + {len} is read-only")]
    ReadOnly {
        /// First address of the range.
        iova: u64,
        /// Length of the range in bytes.
        len: u64,
    },
    /// The address does not have the alignment that the specification asks for.
    #[error("guest address {iova:#x} is not aligned to {align}")]
    Misaligned {
        /// The address.
        iova: u64,
        /// The alignment asked for, in bytes.
        align: u64,
    },
}

/// Why a set of regions is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// More regions than [`MAX_MEMORY_REGIONS`].
    #[error("{0} memory regions, at most {MAX_MEMORY_REGIONS}")]
    TooMany(usize),
    /// A region of length 0, or one that wraps around the address space.
    #[error("memory region {iova:#x} + {len} is empty or wraps around")]
    BadRange {
        /// First address of the region.
        iova: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// Two regions overlap.
    #[error("memory regions overlap at {0:#x}")]
    Overlap(u64),
}

/// So many regions are looked through one by one, which is faster than halving.
const FEW_REGIONS: usize = 8;

/// The guest memory of one device: an immutable, sorted set of regions. A change makes a new map.
#[derive(Debug, Default)]
pub struct GuestMap {
    regions: Box<[Region]>,
    /// Tells this map from every other one that has regions; 0 for the empty map.
    id: u64,
    /// Keeps the mappings alive for as long as somebody can translate through this map.
    _mappings: Vec<Box<dyn Mapping>>,
}

/// Something that keeps host memory mapped while it exists (an `mmap` guard, a test's buffer).
pub trait Mapping: Send + Sync + core::fmt::Debug {}

// SAFETY: the regions are plain addresses of memory that `_mappings` (Send + Sync) keeps mapped; the accessors below only
// make copies and atomic accesses, which are sound from any thread.
unsafe impl Send for GuestMap {}
// SAFETY: as above; a shared `GuestMap` is never changed.
unsafe impl Sync for GuestMap {}

impl GuestMap {
    /// Builds a map.
    ///
    /// # Safety
    ///
    /// Each region's host range must be readable (and writable if the region says so) for as long as the `mappings`
    /// live, and nothing in this process may hold a Rust reference into it.
    pub unsafe fn new(
        mut regions: Vec<Region>,
        mappings: Vec<Box<dyn Mapping>>,
    ) -> Result<GuestMap, MapError> {
        if regions.len() > MAX_MEMORY_REGIONS {
            return Err(MapError::TooMany(regions.len()));
        }
        regions.sort_by_key(|r| r.iova);
        let mut end = None;
        for r in &regions {
            let last = r.len.checked_sub(1).and_then(|n| r.iova.0.checked_add(n));
            let Some(last) = last else {
                return Err(MapError::BadRange {
                    iova: r.iova.0,
                    len: r.len,
                });
            };
            if end.is_some_and(|e| r.iova.0 <= e) {
                return Err(MapError::Overlap(r.iova.0));
            }
            end = Some(last);
        }
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        Ok(GuestMap {
            regions: regions.into_boxed_slice(),
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            _mappings: mappings,
        })
    }

    /// Tells this map from every other one; what has been translated by one map is never used with another.
    #[inline]
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// The regions, in the order of their addresses.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Translates the start of a range: where it is here, and how many bytes of it (at least one, at most `len`) lie in
    /// the same region. A range that spans regions takes several calls.
    pub fn translate_some(
        &self,
        iova: Iova,
        len: u64,
        write: bool,
    ) -> Result<(NonNull<u8>, u64), Fault> {
        let unmapped = Fault::Unmapped { iova: iova.0, len };
        let region = self.region(iova).filter(|_| len > 0).ok_or(unmapped)?;
        let offset = iova.0.wrapping_sub(region.iova.0);
        let now = len.min(region.len.wrapping_sub(offset));
        match region.host_of(iova, now, write) {
            Some(host) => Ok((host, now)),
            None => Err(Fault::ReadOnly { iova: iova.0, len }),
        }
    }

    /// The region that an address lies in.
    #[inline]
    pub(crate) fn region(&self, iova: Iova) -> Option<&Region> {
        let holds = |r: &&Region| iova.0.wrapping_sub(r.iova.0) < r.len;
        if self.regions.len() <= FEW_REGIONS {
            return self.regions.iter().find(holds);
        }
        let after = self.regions.partition_point(|r| r.iova <= iova);
        self.regions.get(after.wrapping_sub(1)).filter(holds)
    }

    /// Has the processor fetch what is at an address, if that is in guest memory.
    #[inline]
    pub(crate) fn prefetch(&self, iova: Iova) {
        let host = self.region(iova).and_then(|r| r.host_of(iova, 1, false));
        if let Some(host) = host {
            prefetch(host);
        }
    }

    /// Translates a range that must lie in one region, such as a ring.
    pub fn translate(
        &self,
        iova: Iova,
        len: u64,
        align: u64,
        write: bool,
    ) -> Result<NonNull<u8>, Fault> {
        let (host, got) = self.translate_some(iova, len, write)?;
        if got < len {
            return Err(Fault::Unmapped { iova: iova.0, len });
        }
        if iova.0 & (align.wrapping_sub(1)) != 0
            || !host.addr().get().is_multiple_of(align as usize)
        {
            return Err(Fault::Misaligned {
                iova: iova.0,
                align,
            });
        }
        Ok(host)
    }

    /// Copies guest memory in; the range may span regions.
    pub fn read(&self, iova: Iova, dst: &mut [u8]) -> Result<(), Fault> {
        let mut at = iova;
        let mut rest = dst;
        while !rest.is_empty() {
            let (host, n) = self.translate_some(at, rest.len() as u64, false)?;
            let (now, later) = rest.split_at_mut(n as usize);
            copy_in(host, now);
            at = at
                .checked_add(n)
                .ok_or(Fault::Unmapped { iova: at.0, len: n })?;
            rest = later;
        }
        Ok(())
    }
}

/// Copies `dst.len()` bytes of guest memory in.
///
/// Private to the crate: `src` comes from [`GuestMap::translate_some`] with at least that length.
#[inline]
pub(crate) fn copy_in(src: NonNull<u8>, dst: &mut [u8]) {
    // SAFETY: the caller got `src` for `dst.len()` bytes from a `GuestMap`, whose regions are readable; `dst` is a Rust
    // slice and so does not overlap guest memory.
    unsafe { core::ptr::copy_nonoverlapping(src.as_ptr(), dst.as_mut_ptr(), dst.len()) }
}

/// Copies bytes out to guest memory; the counterpart of [`copy_in`].
#[inline]
pub(crate) fn copy_out(src: &[u8], dst: NonNull<u8>) {
    // SAFETY: the caller got `dst` for `src.len()` bytes from a `GuestMap` with write access; no overlap as above.
    unsafe { core::ptr::copy_nonoverlapping(src.as_ptr(), dst.as_ptr(), src.len()) }
}

/// Has the processor begin to fetch the cache line at `host`; only a hint, and nothing is read.
#[inline]
pub(crate) fn prefetch(host: NonNull<u8>) {
    #[cfg(target_arch = "x86_64")]
    {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch never faults, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(host.as_ptr().cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = host;
}

/// A 16-bit ring field shared with the guest.
///
/// # Safety
///
/// `host` must come from [`GuestMap::translate`] with length and alignment of at least 2, and the map must outlive `'a`.
#[inline]
pub(crate) unsafe fn atomic_u16<'a>(host: NonNull<u8>) -> &'a AtomicU16 {
    // SAFETY: valid, aligned and alive by the contract; the guest's accesses are those of another agent, for which atomics
    // are the right model.
    unsafe { AtomicU16::from_ptr(host.as_ptr().cast()) }
}

/// A 32-bit ring field shared with the guest.
///
/// # Safety
///
/// As [`atomic_u16`], with 4 bytes.
#[inline]
pub(crate) unsafe fn atomic_u32<'a>(host: NonNull<u8>) -> &'a AtomicU32 {
    // SAFETY: as above.
    unsafe { AtomicU32::from_ptr(host.as_ptr().cast()) }
}

/// One contiguous piece of host memory that backs part of a guest buffer; laid out as `struct iovec`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct IoVec {
    base: *mut u8,
    len: usize,
}

impl IoVec {
    /// A piece of zero bytes.
    pub const EMPTY: IoVec = IoVec {
        base: core::ptr::null_mut(),
        len: 0,
    };

    /// A piece that begins at `base`.
    pub fn new(base: NonNull<u8>, len: usize) -> IoVec {
        IoVec {
            base: base.as_ptr(),
            len,
        }
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

// SAFETY: an `IoVec` is an address and a length; what makes access sound is the map it came from, which the holder keeps.
unsafe impl Send for IoVec {}

/// A guest buffer in pieces, in order. It borrows the pieces from a request's slot, whose guest map outlives it.
#[derive(Clone, Copy, Debug)]
pub struct Segments<'a> {
    pieces: &'a [IoVec],
    /// Bytes of the first piece that do not belong to the buffer.
    skip: usize,
    len: usize,
    _map: PhantomData<&'a GuestMap>,
}

impl<'a> Segments<'a> {
    /// The buffer that consists of all the pieces.
    ///
    /// # Safety
    ///
    /// Each piece must come from [`GuestMap::translate_some`] (or be memory of this process that nothing else refers to),
    /// with write access if it will be written, and that map must outlive `'a`.
    pub unsafe fn new(pieces: &'a [IoVec]) -> Segments<'a> {
        let len = pieces.iter().fold(0usize, |n, p| n.saturating_add(p.len));
        // SAFETY: by the contract; the length is that of the pieces.
        unsafe { Segments::of_len(pieces, len) }
    }

    /// As [`Segments::new`], of pieces whose lengths add up to no less than `len`.
    ///
    /// # Safety
    ///
    /// As for [`Segments::new`].
    #[inline]
    pub(crate) unsafe fn of_len(pieces: &'a [IoVec], len: usize) -> Segments<'a> {
        Segments {
            pieces,
            skip: 0,
            len,
            _map: PhantomData,
        }
    }

    /// A buffer of no bytes.
    pub const fn empty() -> Segments<'static> {
        Segments {
            pieces: &[],
            skip: 0,
            len: 0,
            _map: PhantomData,
        }
    }

    /// Length in bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The same buffer without its first `n` bytes (empty if there are fewer).
    #[inline]
    pub fn after(&self, n: usize) -> Segments<'a> {
        if n >= self.len {
            return Segments {
                pieces: &[],
                skip: 0,
                len: 0,
                _map: PhantomData,
            };
        }
        let mut skip = self.skip.saturating_add(n);
        let mut pieces = self.pieces;
        while let Some((first, rest)) = pieces.split_first() {
            if skip < first.len {
                break;
            }
            skip = skip.saturating_sub(first.len);
            pieces = rest;
        }
        Segments {
            pieces,
            skip,
            len: self.len.saturating_sub(n),
            _map: PhantomData,
        }
    }

    /// The same buffer, cut to at most `n` bytes.
    #[inline]
    pub fn first(&self, n: usize) -> Segments<'a> {
        Segments {
            len: self.len.min(n),
            ..*self
        }
    }

    /// Where the first `n` bytes are, if they lie in one piece.
    #[inline]
    fn start(&self, n: usize) -> Option<NonNull<u8>> {
        let first = self.pieces.first()?;
        if n > self.len || n > first.len.saturating_sub(self.skip) {
            return None;
        }
        // SAFETY: `skip + n` does not exceed the piece's length, so the result is inside the piece or at its end.
        NonNull::new(unsafe { first.base.add(self.skip) })
    }

    /// The pieces, trimmed to this buffer; none is empty.
    pub fn iter(&self) -> impl Iterator<Item = (NonNull<u8>, usize)> + use<'a> {
        let mut left = self.len;
        let mut skip = self.skip;
        let pieces = self.pieces;
        pieces.iter().filter_map(move |p| {
            let usable = p.len.saturating_sub(skip).min(left);
            let offset = skip;
            skip = skip.saturating_sub(p.len);
            left = left.saturating_sub(usable);
            if usable == 0 {
                return None;
            }
            // SAFETY: `offset` < `p.len`, so the result is inside the piece.
            let base = unsafe { NonNull::new(p.base)?.add(offset) };
            Some((base, usable))
        })
    }

    /// Copies the buffer's first bytes in, as many as both hold; returns how many.
    #[inline]
    pub fn read(&self, dst: &mut [u8]) -> usize {
        if let Some(base) = self.start(dst.len()) {
            copy_in(base, dst);
            return dst.len();
        }
        self.read_pieces(dst)
    }

    fn read_pieces(&self, dst: &mut [u8]) -> usize {
        let mut done = 0;
        for (base, n) in self.iter() {
            let Some(rest) = dst.get_mut(done..).filter(|r| !r.is_empty()) else {
                break;
            };
            let n = n.min(rest.len());
            if let Some(now) = rest.get_mut(..n) {
                copy_in(base, now);
            }
            done = done.saturating_add(n);
        }
        done
    }

    /// Copies bytes out to the start of the buffer, as many as both hold; returns how many.
    #[inline]
    pub fn write(&self, src: &[u8]) -> usize {
        if let Some(base) = self.start(src.len()) {
            copy_out(src, base);
            return src.len();
        }
        self.write_pieces(src)
    }

    fn write_pieces(&self, src: &[u8]) -> usize {
        let mut done = 0;
        for (base, n) in self.iter() {
            let Some(rest) = src.get(done..).filter(|r| !r.is_empty()) else {
                break;
            };
            let n = n.min(rest.len());
            if let Some(now) = rest.get(..n) {
                copy_out(now, base);
            }
            done = done.saturating_add(n);
        }
        done
    }

    /// Fills `out` with the buffer as an iovec array for the kernel; returns how many entries it took. `out` must have
    /// room for as many pieces as the chain has.
    pub fn to_iovecs(&self, out: &mut [IoVec]) -> usize {
        let mut n = 0;
        for ((base, len), slot) in self.iter().zip(out.iter_mut()) {
            *slot = IoVec::new(base, len);
            n += 1;
        }
        n
    }
}
