//! The driver's side of one virtqueue, in memory shared with the device, in either ring format.
//!
//! It has no notifications and makes no system calls; [`super::queue`] adds them. What the device writes is checked before
//! it is used as an index; a device that breaks the rules gives a [`RingError`]. Everything is allocated by [`Ring::new`].

mod packed;
mod split;

use std::sync::Arc;

use ferry_dataplane::virtio::spec::DESC_SIZE;

use super::memory::{DmaMemory, DmaSlice};
use packed::PackedRing;
use split::SplitRing;

/// Pieces of one request; an indirect table has room for so many.
pub const MAX_PIECES: usize = 16;
/// The parts of a ring begin on a cache line.
const ALIGN: usize = 64;

/// What the driver and the device agreed on that concerns rings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct RingFeatures {
    /// `VIRTIO_F_EVENT_IDX`.
    pub(super) event_idx: bool,
    /// `VIRTIO_F_INDIRECT_DESC`: a request of several pieces takes one descriptor.
    pub(super) indirect: bool,
    /// `VIRTIO_F_RING_PACKED`.
    pub(super) packed: bool,
}

/// Why a request did not go into the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The ring has no room for it now.
    #[error("the virtqueue is full")]
    Full,
    /// It has no pieces at all, or more than [`MAX_PIECES`].
    #[error("a request has 1 to {MAX_PIECES} pieces, not {0}")]
    Pieces(usize),
}

/// How the device broke the rules of the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// A used entry names a request that is not in flight.
    #[error("the device completed request {0}, which is not in flight")]
    NotInFlight(u32),
    /// A used entry has more bytes than the request had room for.
    #[error("the device wrote {len} bytes to a buffer of {room}")]
    TooLong {
        /// What the device says that it wrote.
        len: u32,
        /// What there was room for.
        room: u32,
    },
    /// The used index went ahead of what was submitted.
    #[error("the device completed {completed} requests, but {in_flight} are in flight")]
    TooMany {
        /// Requests completed since the last look.
        completed: u16,
        /// Requests that were in flight.
        in_flight: u16,
    },
}

/// One finished request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// What [`super::Queue::submit`] was given for it.
    pub cookie: u64,
    /// Bytes that the device wrote to its writable pieces.
    pub len: u32,
}

/// Where the parts of a ring are.
#[derive(Clone, Copy, Debug)]
pub(super) struct RingAreas {
    /// The descriptor table, or the packed ring.
    pub(super) desc: DmaSlice,
    /// The available ring, or the driver's event suppression.
    pub(super) avail: DmaSlice,
    /// The used ring, or the device's event suppression.
    pub(super) used: DmaSlice,
}

/// A ring of either format.
#[derive(Debug)]
pub(super) enum Ring {
    Split(SplitRing),
    Packed(PackedRing),
}

/// The same method of either format.
macro_rules! either {
    ($self:ident, $ring:ident => $call:expr) => {
        match $self {
            Ring::Split($ring) => $call,
            Ring::Packed($ring) => $call,
        }
    };
}

impl Ring {
    /// Bytes of memory that [`Ring::new`] takes at most, alignment included.
    pub(super) fn memory_needed(size: u16, indirect: bool) -> usize {
        let tables = if indirect { tables_len(size) } else { 0 };
        SplitRing::memory_needed(size).max(PackedRing::memory_needed(size)) + tables + ALIGN
    }

    /// A new ring, empty, with interrupts off. `size` is a power of two; `None` when the memory is too small.
    pub(super) fn new(memory: Arc<DmaMemory>, size: u16, features: RingFeatures) -> Option<Ring> {
        Some(match features.packed {
            true => Ring::Packed(PackedRing::new(memory, size, features)?),
            false => Ring::Split(SplitRing::new(memory, size, features)?),
        })
    }

    /// Where its parts are, to tell the device.
    pub(super) fn areas(&self) -> RingAreas {
        either!(self, ring => ring.areas())
    }

    /// Number of descriptors.
    pub(super) fn size(&self) -> u16 {
        either!(self, ring => ring.size())
    }

    /// Whether its format is the packed one.
    pub(super) fn is_packed(&self) -> bool {
        matches!(self, Ring::Packed(_))
    }

    /// Requests that have been submitted and not yet taken back.
    pub(super) fn in_flight(&self) -> u16 {
        either!(self, ring => ring.in_flight())
    }

    /// How many requests of `pieces` pieces fit an empty ring.
    pub(super) fn depth(&self, pieces: u16) -> u16 {
        either!(self, ring => ring.depth(pieces))
    }

    /// Puts a request into the ring, its readable pieces first. The device does not see it before [`Ring::publish`].
    pub(super) fn submit(
        &mut self,
        readable: &[DmaSlice],
        writable: &[DmaSlice],
        cookie: u64,
    ) -> Result<(), SubmitError> {
        let pieces = readable.len() + writable.len();
        if pieces == 0 || pieces > MAX_PIECES {
            return Err(SubmitError::Pieces(pieces));
        }
        either!(self, ring => ring.submit(readable, writable, cookie))
    }

    /// Shows the device what has been submitted.
    pub(super) fn publish(&mut self) {
        either!(self, ring => ring.publish());
    }

    /// Whether the device wants to be told of what was published since the last call.
    pub(super) fn needs_kick(&mut self) -> bool {
        either!(self, ring => ring.needs_kick())
    }

    /// Where the next request will go, as a notification with data says it (virtio 1.3, section 2.9).
    pub(super) fn position(&self) -> u16 {
        either!(self, ring => ring.position())
    }

    /// Takes the next finished request.
    pub(super) fn pop(&mut self) -> Result<Option<Completion>, RingError> {
        either!(self, ring => ring.pop())
    }

    /// Asks the device for an interrupt at the next completion. True: there is one already, and no interrupt may come.
    pub(super) fn enable_interrupts(&mut self) -> bool {
        either!(self, ring => ring.enable_interrupts())
    }

    /// Tells the device that completions will be found without interrupts. One may still come.
    pub(super) fn disable_interrupts(&mut self) {
        either!(self, ring => ring.disable_interrupts());
    }
}

/// A request that the device has, by the number under which it will come back.
#[derive(Clone, Copy, Debug, Default)]
struct InFlight {
    cookie: u64,
    /// Bytes of the writable pieces.
    room: u32,
    /// Descriptors taken from the ring; 0: not in flight.
    descriptors: u16,
}

impl InFlight {
    fn new(cookie: u64, writable: &[DmaSlice], descriptors: u16) -> InFlight {
        InFlight {
            cookie,
            room: writable.iter().map(|piece| piece.len() as u32).sum(),
            descriptors,
        }
    }

    /// What to say of a request that came back with `len` bytes.
    fn completion(&self, len: u32) -> Result<Completion, RingError> {
        if len > self.room {
            return Err(RingError::TooLong {
                len,
                room: self.room,
            });
        }
        Ok(Completion {
            cookie: self.cookie,
            len,
        })
    }
}

/// Takes request `id` out, if there is such a one.
fn take(in_flight: &mut [InFlight], id: u32) -> Result<InFlight, RingError> {
    match in_flight.get_mut(id as usize) {
        Some(request) if request.descriptors > 0 => Ok(std::mem::take(request)),
        _ => Err(RingError::NotInFlight(id)),
    }
}

fn tables_len(size: u16) -> usize {
    usize::from(size) * MAX_PIECES * DESC_SIZE
}

/// One indirect table for each of `size` requests, if the device takes them.
fn alloc_tables(memory: &DmaMemory, size: u16, features: RingFeatures) -> Option<Option<DmaSlice>> {
    match features.indirect {
        true => Some(Some(memory.alloc(tables_len(size), ALIGN)?)),
        false => Some(None),
    }
}

/// The part of table `index` that a request of `pieces` pieces uses.
fn table(tables: DmaSlice, index: u16, pieces: usize) -> DmaSlice {
    let bytes = MAX_PIECES * DESC_SIZE;
    tables.part(usize::from(index) * bytes, pieces * DESC_SIZE)
}

/// Whether somebody who asked to be told at `event` is to be told of a move from `old` to `new` (virtio 1.3, 2.7.7.2).
fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// The pieces of a request in the order of the chain, with whether the device writes them.
fn in_order<'a>(
    readable: &'a [DmaSlice],
    writable: &'a [DmaSlice],
) -> impl Iterator<Item = (DmaSlice, bool)> + use<'a> {
    let readable = readable.iter().map(|&piece| (piece, false));
    readable.chain(writable.iter().map(|&piece| (piece, true)))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{MAX_PIECES, Ring, RingFeatures, SubmitError};
    use crate::driver::memory::{DmaMemory, Pages};

    #[test]
    fn a_request_without_pieces_or_with_too_many_is_refused_in_either_format() {
        for packed in [false, true] {
            let features = RingFeatures {
                packed,
                ..RingFeatures::default()
            };
            let memory = DmaMemory::new(1 << 20, Pages::Normal).expect("memory");
            let memory = Arc::new(memory);
            let mut ring = Ring::new(Arc::clone(&memory), 64, features).expect("room");
            let piece = memory.alloc(8, 8).expect("room");
            assert_eq!(ring.submit(&[], &[], 0), Err(SubmitError::Pieces(0)));
            let many = [piece; MAX_PIECES + 1];
            let error = SubmitError::Pieces(MAX_PIECES + 1);
            assert_eq!(ring.submit(&many, &[], 0), Err(error));
            assert_eq!(ring.submit(&many[1..], &[], 0), Ok(()));
        }
    }

    #[test]
    fn the_memory_that_is_said_to_be_needed_is_enough() {
        for (size, indirect, packed) in [(2, false, false), (1024, true, false), (1024, true, true)]
        {
            let features = RingFeatures {
                packed,
                indirect,
                event_idx: true,
            };
            let memory = DmaMemory::new(4 << 20, Pages::Normal).expect("memory");
            let needed = Ring::memory_needed(size, indirect);
            // What is left after this is exactly as much, badly aligned.
            memory.alloc(memory.size() - needed, 1).expect("room");
            assert!(Ring::new(Arc::new(memory), size, features).is_some());
        }
    }
}
