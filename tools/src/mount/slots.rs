//! The buffers of requests in flight: one for each request that a queue can hold, all made before the first request.

use ferry_dataplane::fuse::abi::{fuse_in_header, fuse_write_in};

use super::request::{FUSE_PAGE, IN_HEADER, OUT_HEADER};
use crate::driver::{DmaMemory, DmaSlice};

/// A request begins here, so that the data of a WRITE, behind its header and arguments, begins on a page of its own.
const REQUEST_AT: usize = FUSE_PAGE - IN_HEADER - size_of::<fuse_write_in>();
/// Room for the largest request that is not a transfer of data (SETXATTR with a name and 64 KiB), and for its reply.
const LEAST_ROOM: usize = 128 * 1024;

/// A slot's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SlotIdx(u32);

impl SlotIdx {
    /// As a cookie for the driver.
    pub(super) fn cookie(self) -> u64 {
        u64::from(self.0)
    }
}

/// What is known of the request in a slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Pending {
    /// The kernel's number for it; 0: there will be no reply.
    pub(super) unique: u64,
    /// Where its reply will be.
    pub(super) reply: Option<DmaSlice>,
}

/// The slots of one queue.
#[derive(Debug)]
pub(super) struct Slots {
    buffers: Box<[DmaSlice]>,
    pending: Box<[Pending]>,
    /// Last in, first out: a buffer that was used a moment ago is in the cache.
    free: Vec<SlotIdx>,
}

impl Slots {
    /// Bytes of memory of `count` slots for transfers of up to `transfer` bytes.
    pub(super) fn memory_needed(count: usize, transfer: usize) -> usize {
        count * slot_len(transfer) + FUSE_PAGE
    }

    /// Makes `count` slots; `None` when the memory is too small.
    pub(super) fn new(memory: &DmaMemory, count: usize, transfer: usize) -> Option<Slots> {
        let buffers: Option<Box<[DmaSlice]>> = (0..count)
            .map(|_| memory.alloc(slot_len(transfer), FUSE_PAGE))
            .collect();
        let last = u32::try_from(count).ok()?;
        Some(Slots {
            buffers: buffers?,
            pending: vec![Pending::default(); count].into_boxed_slice(),
            free: (0..last).rev().map(SlotIdx).collect(),
        })
    }

    /// Whether [`Slots::take`] would find one.
    pub(super) fn has_free(&self) -> bool {
        !self.free.is_empty()
    }

    /// Takes a free slot.
    pub(super) fn take(&mut self) -> Option<SlotIdx> {
        self.free.pop()
    }

    /// Gives a slot back.
    pub(super) fn give(&mut self, slot: SlotIdx) {
        self.free.push(slot);
    }

    /// Where the kernel's request goes.
    pub(super) fn request(&self, slot: SlotIdx) -> DmaSlice {
        self.buffers[slot.0 as usize].after(REQUEST_AT)
    }

    /// Where a reply of up to `room` bytes goes, behind a request of `len` bytes: a long one so that its data begins on a
    /// page. `None` when there is not that much room.
    pub(super) fn reply(&self, slot: SlotIdx, len: usize, room: usize) -> Option<DmaSlice> {
        let end = REQUEST_AT + len;
        let at = if room >= FUSE_PAGE {
            (end + OUT_HEADER).next_multiple_of(FUSE_PAGE) - OUT_HEADER
        } else {
            end.next_multiple_of(8)
        };
        let reply = self.buffers[slot.0 as usize].part(at, room);
        (reply.len() == room).then_some(reply)
    }

    /// Notes what is expected for a slot that goes to the device.
    pub(super) fn expect(&mut self, slot: SlotIdx, pending: Pending) {
        self.pending[slot.0 as usize] = pending;
    }

    /// The slot that a completion is for, and what was expected; the cookie is one that was given to the driver.
    pub(super) fn finished(&mut self, cookie: u64) -> (SlotIdx, Pending) {
        let slot = SlotIdx(cookie as u32);
        (slot, std::mem::take(&mut self.pending[slot.0 as usize]))
    }
}

fn slot_len(transfer: usize) -> usize {
    // The page with the request's header, the data, and the end of the reply's header page.
    let data = transfer.max(LEAST_ROOM).next_multiple_of(FUSE_PAGE);
    2 * FUSE_PAGE + data
}

const _: () = assert!(size_of::<fuse_in_header>() == IN_HEADER);

#[cfg(test)]
mod tests {
    use super::{FUSE_PAGE, Slots};
    use crate::driver::{DmaMemory, Pages};

    const TRANSFER: usize = 256 * 1024;

    #[test]
    fn data_of_reads_and_writes_begins_on_a_page() {
        let memory =
            DmaMemory::new(Slots::memory_needed(2, TRANSFER), Pages::Normal).expect("memory");
        let mut slots = Slots::new(&memory, 2, TRANSFER).expect("room");
        let slot = slots.take().expect("a free slot");
        let request = slots.request(slot);
        assert_eq!((memory.iova(request) + 80) % FUSE_PAGE as u64, 0);
        let reply = slots.reply(slot, 80, 16 + TRANSFER).expect("room");
        assert_eq!((memory.iova(reply) + 16) % FUSE_PAGE as u64, 0);
        assert!(memory.iova(reply) >= memory.iova(request) + 80);
    }

    #[test]
    fn the_largest_write_has_room_for_its_reply_and_no_more_than_that() {
        let memory =
            DmaMemory::new(Slots::memory_needed(1, TRANSFER), Pages::Normal).expect("memory");
        let mut slots = Slots::new(&memory, 1, TRANSFER).expect("room");
        let slot = slots.take().expect("a free slot");
        assert!(slots.reply(slot, 80 + TRANSFER, 512).is_some());
        assert!(slots.reply(slot, 80 + TRANSFER, 2 * FUSE_PAGE).is_none());
        assert!(slots.take().is_none());
        slots.give(slot);
        assert_eq!(slots.take(), Some(slot));
    }
}
