//! The memory that the cores work in: hugepages, or normal pages where there are none.
// UNSAFETY: maps anonymous memory and constructs slots in it.
#![expect(unsafe_code, reason = "maps memory and places slabs in it")]

use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::pool::{DATA_BUFFER_STRIDE, DataPool, Slab};

/// Size of the hugepages that are asked for.
const HUGE_2M: usize = 2 << 20;
/// Alignment of what is placed in the arena.
const ALIGN: usize = 4096;

/// Which pages an arena has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// Hugepages of 2 MiB.
    Huge,
    /// Normal pages.
    Normal,
}

/// Memory whose parts are given away from the front. It lives as long as any of them.
#[derive(Debug)]
pub struct Arena {
    mapping: Arc<Mapping>,
    used: usize,
    pages: Pages,
}

#[derive(Debug)]
struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping itself is only unmapped; its bytes belong to the parts.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and the parts that lie in it hold a reference to it, so none is left.
        let unmapped = unsafe { munmap(self.base.cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "munmap of an own mapping: {unmapped:?}");
    }
}

impl Arena {
    /// Maps `len` bytes, all of them present. With `huge`, hugepages are tried first.
    pub fn new(len: usize, huge: bool) -> Result<Arena, Errno> {
        let len = len.next_multiple_of(HUGE_2M);
        if huge {
            let flags = MapFlags::MAP_HUGETLB | MapFlags::MAP_HUGE_2MB;
            if let Ok(base) = map(len, flags) {
                return Ok(Arena {
                    mapping: Arc::new(Mapping { base, len }),
                    used: 0,
                    pages: Pages::Huge,
                });
            }
        }
        let base = map(len, MapFlags::empty())?;
        Ok(Arena {
            mapping: Arc::new(Mapping { base, len }),
            used: 0,
            pages: Pages::Normal,
        })
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> usize {
        self.mapping.len
    }

    /// Which pages it has.
    pub fn pages(&self) -> Pages {
        self.pages
    }

    /// Bytes that `count` elements take.
    pub fn room_for<T>(count: u32) -> usize {
        (size_of::<T>() * count as usize).next_multiple_of(ALIGN)
    }

    /// Bytes that a pool of `count` buffers takes.
    pub fn room_for_pool(count: u32) -> usize {
        count as usize * DATA_BUFFER_STRIDE
    }

    fn take(&mut self, len: usize) -> Option<NonNull<u8>> {
        let end = self.used.checked_add(len)?.next_multiple_of(ALIGN);
        if end > self.mapping.len {
            return None;
        }
        // SAFETY: `used` <= `len`, so the result lies inside (or at the end of) the mapping.
        let base = unsafe { self.mapping.base.add(self.used) };
        self.used = end;
        Some(base)
    }

    /// Places `count` elements; `None` when the arena is too small.
    pub fn slab<T>(&mut self, count: u32, mut make: impl FnMut() -> T) -> Option<Slab<T>> {
        const { assert!(align_of::<T>() <= ALIGN) }
        let base = self.take(Self::room_for::<T>(count))?.cast::<T>();
        for i in 0..count as usize {
            // SAFETY: `take` gave room for `count` elements, page-aligned, that nobody else uses.
            unsafe { base.add(i).write(make()) };
        }
        let keeper = Arc::clone(&self.mapping);
        // SAFETY: initialised just now; the mapping lives as long as the keeper.
        Some(unsafe { Slab::in_arena(base, count, keeper) })
    }

    /// Places a pool of `count` data buffers; `None` when the arena is too small.
    pub fn pool(&mut self, count: u32) -> Option<DataPool> {
        let base = self.take(Self::room_for_pool(count))?;
        let keeper = Arc::clone(&self.mapping);
        // SAFETY: `take` gave that many bytes, zeroed by the kernel, to nobody else; the mapping lives as long as the keeper.
        Some(unsafe { DataPool::new(base, count, Some(keeper)) })
    }
}

fn map(len: usize, extra: MapFlags) -> Result<NonNull<u8>, Errno> {
    let len = NonZeroUsize::new(len).ok_or(Errno::EINVAL)?;
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_POPULATE | extra;
    // SAFETY: an anonymous mapping at an address of the kernel's choice replaces nothing.
    let base = unsafe {
        mmap_anonymous(
            None,
            len,
            ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
            flags,
        )
    }?;
    Ok(base.cast())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_arena_refuses_what_does_not_fit() {
        let mut arena = Arena::new(HUGE_2M, false).expect("2 MiB of normal pages");
        assert_eq!(arena.pages(), Pages::Normal);
        assert!(arena.slab(4, || 7u64).is_some());
        assert!(arena.pool(9).is_none());
        let pool = arena.pool(7).expect("7 buffers fit the rest");
        assert_eq!(pool.available(), 7);
    }
}
