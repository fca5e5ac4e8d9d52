//! Arrays of records that lie where they are told to: on the heap, or in an area of the recovery memory.
//!
//! A table does not care which; the same code runs on both, at the same cost.
// UNSAFETY: makes a slice of mapped memory; the range is checked by whoever makes it, see `Placed::new`.
#![expect(unsafe_code, reason = "records in memory that outlives the process")]

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::any::Any;
use core::fmt;
use core::ptr::NonNull;

use zerocopy::FromZeros;

/// What keeps the memory under a [`Placed`] where it is.
pub type Keep = Arc<dyn Any + Send + Sync>;

/// A fixed number of records.
pub struct Placed<T> {
    records: NonNull<[T]>,
    /// `None`: a box.
    keep: Option<Keep>,
}

// SAFETY: it owns its records, or shares them with nobody else in this process, see `Placed::new`.
unsafe impl<T: Send> Send for Placed<T> {}
// SAFETY: gives out shared references only.
unsafe impl<T: Sync> Sync for Placed<T> {}

impl<T: FromZeros> Placed<T> {
    /// Zeroed records on the heap; `None` when there is no memory for them.
    pub fn on_heap(count: usize) -> Option<Placed<T>> {
        let boxed = <[T]>::new_box_zeroed_with_elems(count).ok()?;
        Some(Placed {
            records: NonNull::from(Box::leak(boxed)),
            keep: None,
        })
    }
}

impl<T> Placed<T> {
    /// Records that lie in memory which `keep` keeps.
    ///
    /// # Safety
    ///
    /// `records` must be aligned, hold valid values (whatever bytes they are, for types that come from hostile memory), stay
    /// mapped while `keep` lives, and be changed by nobody but through the interior mutability of `T`.
    pub unsafe fn new(records: NonNull<[T]>, keep: Keep) -> Placed<T> {
        Placed {
            records,
            keep: Some(keep),
        }
    }
}

impl<T> core::ops::Deref for Placed<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        // SAFETY: by the contract of `new`, or a box that only `drop` gives up.
        unsafe { self.records.as_ref() }
    }
}

impl<T> Drop for Placed<T> {
    fn drop(&mut self) {
        if self.keep.is_none() {
            // SAFETY: `on_heap` leaked a box of exactly this slice.
            drop(unsafe { Box::from_raw(self.records.as_ptr()) });
        }
    }
}

impl<T> fmt::Debug for Placed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = if self.keep.is_some() { "area" } else { "heap" };
        write!(f, "Placed({} in {place})", self.records.len())
    }
}
