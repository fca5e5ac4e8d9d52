//! A stretch of guest memory that stays translated while a queue runs: a ring, or its part of the in-flight record.
//!
//! Every access is checked against its length, so the ring code above needs no `unsafe`. It keeps its map alive.
// UNSAFETY: makes atomics out of guest memory; the range and alignment are checked in `Area::at`.
#![expect(unsafe_code, reason = "atomic accesses to guest memory")]

use alloc::sync::Arc;
use core::ptr::NonNull;
use core::sync::atomic::Ordering;

use crate::mem::{Fault, GuestMap, Iova, atomic_u16, atomic_u32, copy_in, copy_out, prefetch};

/// A contiguous, mapped stretch of guest memory.
#[derive(Clone, Debug)]
pub(crate) struct Area {
    host: NonNull<u8>,
    len: usize,
    /// Keeps `host` mapped.
    _map: Arc<GuestMap>,
}

// SAFETY: an address of memory that `_map` keeps mapped, accessed only by copies and atomics.
unsafe impl Send for Area {}
// SAFETY: as above.
unsafe impl Sync for Area {}

impl Area {
    pub(crate) fn new(
        map: &Arc<GuestMap>,
        iova: Iova,
        len: usize,
        align: u64,
        write: bool,
    ) -> Result<Area, Fault> {
        let host = map.translate(iova, len as u64, align, write)?;
        Ok(Area {
            host,
            len,
            _map: Arc::clone(map),
        })
    }

    /// The address of `size` bytes at `offset`, if they lie inside and are aligned.
    #[inline]
    fn at(&self, offset: usize, size: usize, align: usize) -> Option<NonNull<u8>> {
        let end = offset.checked_add(size)?;
        if end > self.len {
            return None;
        }
        let host = NonNull::new(self.host.as_ptr().wrapping_add(offset))?;
        host.addr().get().is_multiple_of(align).then_some(host)
    }

    /// Copies `N` bytes in; zeros if they do not lie inside.
    #[inline]
    pub(crate) fn read<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut out = [0; N];
        if let Some(host) = self.at(offset, N, 1) {
            copy_in(host, &mut out);
        }
        out
    }

    /// Has the processor fetch what is at `offset`, for a [`read`](Self::read) to come.
    #[inline]
    pub(crate) fn prefetch(&self, offset: usize) {
        if let Some(host) = self.at(offset, 1, 1) {
            prefetch(host);
        }
    }

    /// Copies bytes out, if they lie inside.
    #[inline]
    pub(crate) fn write(&self, offset: usize, src: &[u8]) {
        #[cfg(test)]
        crate::sim::fate::store();
        if let Some(host) = self.at(offset, src.len(), 1) {
            copy_out(src, host);
        }
    }

    /// Loads a little-endian number; 0 if it does not lie inside.
    #[inline]
    pub(crate) fn load_u16(&self, offset: usize, order: Ordering) -> u16 {
        let Some(host) = self.at(offset, 2, 2) else {
            return 0;
        };
        // SAFETY: `at` checked the range and the alignment, and `_map` lives as long as `self`.
        let atomic = unsafe { atomic_u16(host) };
        u16::from_le(atomic.load(order))
    }

    /// Stores a little-endian number.
    #[inline]
    pub(crate) fn store_u16(&self, offset: usize, value: u16, order: Ordering) {
        #[cfg(test)]
        crate::sim::fate::store();
        if let Some(host) = self.at(offset, 2, 2) {
            // SAFETY: as in `load_u16`.
            let atomic = unsafe { atomic_u16(host) };
            atomic.store(value.to_le(), order);
        }
    }

    /// Loads a little-endian number; 0 if it does not lie inside.
    #[inline]
    pub(crate) fn load_u32(&self, offset: usize, order: Ordering) -> u32 {
        let Some(host) = self.at(offset, 4, 4) else {
            return 0;
        };
        // SAFETY: as in `load_u16`, with 4 bytes.
        let atomic = unsafe { atomic_u32(host) };
        u32::from_le(atomic.load(order))
    }

    /// Stores a little-endian number.
    #[inline]
    pub(crate) fn store_u32(&self, offset: usize, value: u32, order: Ordering) {
        #[cfg(test)]
        crate::sim::fate::store();
        if let Some(host) = self.at(offset, 4, 4) {
            // SAFETY: as in `load_u32`.
            let atomic = unsafe { atomic_u32(host) };
            atomic.store(value.to_le(), order);
        }
    }
}
