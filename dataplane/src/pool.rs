//! Fixed memory: everything a core uses while serving is taken from here, and it is all there before a queue starts.
//!
//! Exhaustion is an answer (`None`), never an allocation: the caller leaves the request where it is and comes back.
// UNSAFETY: hands out parts of one long-lived arena by index.
#![expect(
    unsafe_code,
    reason = "slabs are parts of one arena, addressed by index"
)]

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::any::Any;
use core::ptr::NonNull;

use ferry_shared::limits::MAX_DATA_BUFFER;

/// What memory belongs to; the memory is there as long as this is.
pub type Keeper = Arc<dyn Any + Send + Sync>;

/// A run of equal elements at a fixed place: in an arena, or on the heap.
///
/// Elements are reached through raw pointers ([`Slab::get`]), because one element at a time may be lent to another thread
/// while its neighbours are used here.
#[derive(Debug)]
pub struct Slab<T> {
    base: NonNull<T>,
    len: u32,
    heap: bool,
    /// Keeps an arena's memory.
    _keeper: Option<Keeper>,
}

// SAFETY: a slab owns its elements; who may use an element is the holder's bookkeeping, see `get`.
unsafe impl<T: Send> Send for Slab<T> {}

impl<T> Slab<T> {
    /// A slab on the heap.
    pub fn on_heap(elements: impl IntoIterator<Item = T>) -> Slab<T> {
        let boxed: Box<[T]> = elements.into_iter().collect();
        let len = u32::try_from(boxed.len()).unwrap_or(u32::MAX);
        let base = NonNull::from(Box::leak(boxed)).cast();
        Slab {
            base,
            len,
            heap: true,
            _keeper: None,
        }
    }

    /// A slab in an arena.
    ///
    /// # Safety
    ///
    /// `base` must be aligned for `T`, point to `len` initialised elements that nothing else uses, and stay valid as long
    /// as `keeper` exists.
    pub unsafe fn in_arena(base: NonNull<T>, len: u32, keeper: Keeper) -> Slab<T> {
        Slab {
            base,
            len,
            heap: false,
            _keeper: Some(keeper),
        }
    }

    /// Number of elements.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where element `index` is; `None` past the end. The pointer stays valid while the slab exists.
    pub fn get(&self, index: u32) -> Option<NonNull<T>> {
        if index >= self.len {
            return None;
        }
        // SAFETY: `index` < `len`, so the element lies inside the slab.
        Some(unsafe { self.base.add(index as usize) })
    }
}

impl<T> Drop for Slab<T> {
    fn drop(&mut self) {
        if self.heap {
            let slice = NonNull::slice_from_raw_parts(self.base, self.len as usize);
            // SAFETY: `on_heap` leaked a box of exactly this slice, and nothing uses a slab's elements after the slab.
            drop(unsafe { Box::from_raw(slice.as_ptr()) });
        }
    }
}

/// Bytes between two data buffers: the next multiple of a page.
pub const DATA_BUFFER_STRIDE: usize = (MAX_DATA_BUFFER as usize).next_multiple_of(4096);

/// A data buffer taken from a [`DataPool`]; goes back through [`DataPool::put`].
#[derive(Debug)]
#[must_use = "a buffer that is not put back is lost"]
pub struct DataBuffer(u32);

/// The data buffers of one core, each of [`MAX_DATA_BUFFER`] bytes.
#[derive(Debug)]
pub struct DataPool {
    base: NonNull<u8>,
    free: Vec<u32>,
    count: u32,
    /// Keeps an arena's memory.
    _keeper: Option<Keeper>,
}

// SAFETY: the pool owns its memory; a buffer is used by whoever holds its `DataBuffer`.
unsafe impl Send for DataPool {}

impl DataPool {
    /// A pool over `count` buffers, [`DATA_BUFFER_STRIDE`] apart.
    ///
    /// # Safety
    ///
    /// `base` must point to `count * DATA_BUFFER_STRIDE` initialised bytes that nothing else uses and that stay valid as
    /// long as `keeper` exists, or for ever if there is none.
    pub unsafe fn new(base: NonNull<u8>, count: u32, keeper: Option<Keeper>) -> DataPool {
        DataPool {
            base,
            free: (0..count).rev().collect(),
            count,
            _keeper: keeper,
        }
    }

    /// Buffers in all.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Buffers that are free.
    pub fn available(&self) -> usize {
        self.free.len()
    }

    /// Takes a buffer.
    pub fn take(&mut self) -> Option<DataBuffer> {
        self.free.pop().map(DataBuffer)
    }

    /// Gives a buffer back.
    pub fn put(&mut self, buffer: DataBuffer) {
        self.free.push(buffer.0);
    }

    /// Where the buffer's [`MAX_DATA_BUFFER`] bytes are.
    pub fn bytes(&self, buffer: &DataBuffer) -> NonNull<[u8]> {
        // SAFETY: a `DataBuffer`'s index is below `count`, so the buffer lies inside the pool.
        let base = unsafe { self.base.add(buffer.0 as usize * DATA_BUFFER_STRIDE) };
        NonNull::slice_from_raw_parts(base, MAX_DATA_BUFFER as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slab_gives_each_index_once_and_nothing_past_the_end() {
        let slab = Slab::on_heap([10u8, 11, 12]);
        assert_eq!(slab.len(), 3);
        let places: Vec<_> = (0..3).filter_map(|i| slab.get(i)).collect();
        assert_eq!(places.len(), 3);
        assert!(places.windows(2).all(|w| w[0] != w[1]));
        assert!(slab.get(3).is_none());
    }

    #[test]
    fn an_empty_pool_says_so_and_serves_again_after_a_return() {
        let memory = Box::leak(alloc::vec![0u8; 2 * DATA_BUFFER_STRIDE].into_boxed_slice());
        // SAFETY: the leaked box is 2 strides long and nothing else refers to it.
        let mut pool = unsafe { DataPool::new(NonNull::from(memory).cast(), 2, None) };
        let (a, b) = (pool.take().expect("first"), pool.take().expect("second"));
        assert_ne!(pool.bytes(&a).cast::<u8>(), pool.bytes(&b).cast::<u8>());
        assert!(pool.take().is_none());
        pool.put(a);
        assert_eq!(pool.available(), 1);
        let again = pool.take().expect("returned");
        pool.put(again);
        pool.put(b);
    }
}
