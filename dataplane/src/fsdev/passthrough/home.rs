//! Where a device's tables lie: on the heap, or in an area of recovery memory, from which a later process takes them over.
//!
//! An area begins with a page that says how large the tables are; they follow in the order in which [`Layout`] lists them.
// UNSAFETY: places the tables in the area; each range is that of one table.
#![expect(unsafe_code, reason = "places tables in recovery memory")]

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use ferry_shared::errno::Errno;

use super::Capacity;
use super::handle::Handle;
use super::inode::{Inode, Tail};
use super::lock::Owner;
use crate::fsdev::table::{Slot, Table};
use crate::recovery::placed::Placed;
use crate::recovery::region::Area;

const PAGE: u64 = 4096;
/// Says that the header is complete, and which layout follows.
const MAGIC: u64 = 0x4665_7266_7330_3031 ^ LAYOUT;
/// Words of the header: the magic, and the sizes of the tables of inodes, handles and lock owners.
const HEADER: usize = 4;

/// The sizes of what lies in the area.
const LAYOUT: u64 = {
    let numbers = [
        size_of::<Slot<Inode>>(),
        size_of::<Tail>(),
        size_of::<Slot<Handle>>(),
        size_of::<Slot<Owner>>(),
    ];
    let mut hash = 1u64;
    let mut i = 0;
    while i < numbers.len() {
        hash = hash.wrapping_mul(0x0000_0100_0000_01b3) ^ numbers[i] as u64;
        i += 1;
    }
    hash
};

/// The memory of a device's tables.
pub(super) struct Home {
    pub(super) inodes: Placed<Slot<Inode>>,
    pub(super) tails: Placed<Tail>,
    pub(super) handles: Placed<Slot<Handle>>,
    pub(super) owners: Placed<Slot<Owner>>,
    /// It outlives the process.
    pub(super) lasting: bool,
}

/// Where each table begins, in bytes, and the end.
struct Layout {
    inodes: (u64, usize),
    tails: (u64, usize),
    handles: (u64, usize),
    owners: (u64, usize),
    end: u64,
}

impl Layout {
    fn new(inodes: u32, handles: u32, owners: u32) -> Option<Layout> {
        let mut end = PAGE;
        let mut next = |count: Option<usize>, each: usize| {
            let count = count?;
            let at = end;
            end = (each as u64)
                .checked_mul(count as u64)?
                .checked_add(at)?
                .checked_next_multiple_of(PAGE)?;
            Some((at, count))
        };
        let slots = Table::<Inode>::slots(inodes);
        Some(Layout {
            inodes: next(slots, size_of::<Slot<Inode>>())?,
            tails: next(slots, size_of::<Tail>())?,
            handles: next(Table::<Handle>::slots(handles), size_of::<Slot<Handle>>())?,
            owners: next(Table::<Owner>::slots(owners), size_of::<Slot<Owner>>())?,
            end,
        })
    }

    fn of(capacity: &Capacity) -> Option<Layout> {
        Layout::new(capacity.inodes, capacity.handles, capacity.lock_owners)
    }
}

/// Bytes of an area for tables of these sizes.
pub(super) fn area_len(capacity: &Capacity) -> Option<u64> {
    Layout::of(capacity).map(|layout| layout.end)
}

impl Home {
    /// Tables of these sizes on the heap.
    pub(super) fn on_heap(capacity: &Capacity) -> Option<Home> {
        let layout = Layout::of(capacity)?;
        Some(Home {
            inodes: Placed::on_heap(layout.inodes.1)?,
            tails: Placed::on_heap(layout.tails.1)?,
            handles: Placed::on_heap(layout.handles.1)?,
            owners: Placed::on_heap(layout.owners.1)?,
            lasting: false,
        })
    }

    /// Tables in an area: those that are there, or new ones of these sizes in an area that is all zero.
    pub(super) fn in_area(area: &Area, capacity: &Capacity) -> Result<Home, Errno> {
        let broken = |_| Errno::EIO;
        let header = area.words(0, HEADER).map_err(broken)?;
        let [magic, inodes, handles, owners] = &*header else {
            return Err(Errno::EIO);
        };
        let layout = match magic.load(Acquire) {
            0 => {
                inodes.store(capacity.inodes.into(), Relaxed);
                handles.store(capacity.handles.into(), Relaxed);
                owners.store(capacity.lock_owners.into(), Relaxed);
                // Last: an area with it is one to be taken over.
                magic.store(MAGIC, Release);
                Layout::of(capacity)
            }
            MAGIC => {
                let size = |word: &AtomicU64| u32::try_from(word.load(Relaxed)).ok();
                let sizes = (|| Some((size(inodes)?, size(handles)?, size(owners)?)))();
                sizes.and_then(|(i, h, o)| Layout::new(i, h, o))
            }
            _ => None,
        };
        let layout = layout
            .filter(|layout| layout.end <= area.len())
            .ok_or(Errno::EIO)?;
        // SAFETY: records of atomics, each over a range of its own: the layout's ranges follow each other.
        unsafe {
            Ok(Home {
                inodes: area
                    .place(layout.inodes.0, layout.inodes.1)
                    .map_err(broken)?,
                tails: area.place(layout.tails.0, layout.tails.1).map_err(broken)?,
                handles: area
                    .place(layout.handles.0, layout.handles.1)
                    .map_err(broken)?,
                owners: area
                    .place(layout.owners.0, layout.owners.1)
                    .map_err(broken)?,
                lasting: true,
            })
        }
    }
}
