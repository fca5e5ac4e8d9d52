//! The split ring format (virtio 1.3, section 2.7).

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use ferry_dataplane::virtio::spec::{
    AVAIL_F_NO_INTERRUPT, DESC_SIZE, Desc, DescFlags, USED_F_NO_NOTIFY, UsedElem,
};
use zerocopy::{FromZeros, IntoBytes};

use super::{
    ALIGN, Completion, InFlight, RingAreas, RingError, RingFeatures, SubmitError, alloc_tables,
    in_order, need_event, table, take,
};
use crate::driver::memory::{DmaMemory, DmaSlice};

#[cfg(test)]
mod tests;

const USED_ELEM_SIZE: usize = size_of::<UsedElem>();
/// Offset of the first entry in the available and in the used ring.
const RING_START: usize = 4;
/// Offset of the index in both.
const RING_IDX: usize = 2;

/// A split ring; its methods are those of [`super::Ring`].
#[derive(Debug)]
pub(in crate::driver) struct SplitRing {
    memory: Arc<DmaMemory>,
    areas: RingAreas,
    /// One table for each descriptor, if indirect descriptors are used.
    tables: Option<DmaSlice>,
    size: u16,
    event_idx: bool,
    /// Successor of each descriptor: in its chain, or in the list of free ones.
    next: Box<[u16]>,
    in_flight: Box<[InFlight]>,
    requests: u16,
    free_head: u16,
    free: u16,
    /// Index of the next available entry, ahead of what is published.
    avail_idx: u16,
    /// The available index when the device was last notified, or found not to want it.
    notified_idx: u16,
    /// Index of the next used entry to take.
    used_idx: u16,
    /// The device's used index when it was last read.
    used_seen: u16,
    interrupts: bool,
}

impl SplitRing {
    /// Bytes of memory without the indirect tables.
    pub(super) fn memory_needed(size: u16) -> usize {
        let entry = DESC_SIZE + size_of::<u16>() + USED_ELEM_SIZE;
        usize::from(size) * entry + 2 * (RING_START + 2) + 3 * ALIGN
    }

    pub(super) fn new(
        memory: Arc<DmaMemory>,
        size: u16,
        features: RingFeatures,
    ) -> Option<SplitRing> {
        let n = usize::from(size);
        let areas = RingAreas {
            desc: memory.alloc(n * DESC_SIZE, ALIGN)?,
            avail: memory.alloc(RING_START + 2 * n + 2, ALIGN)?,
            used: memory.alloc(RING_START + USED_ELEM_SIZE * n + 2, ALIGN)?,
        };
        let tables = alloc_tables(&memory, size, features)?;
        let mut ring = SplitRing {
            memory,
            areas,
            tables,
            size,
            event_idx: features.event_idx,
            next: (1..=size).collect(),
            in_flight: vec![InFlight::default(); n].into_boxed_slice(),
            requests: 0,
            free_head: 0,
            free: size,
            avail_idx: 0,
            notified_idx: 0,
            used_idx: 0,
            used_seen: 0,
            interrupts: true,
        };
        ring.disable_interrupts();
        Some(ring)
    }

    pub(super) fn areas(&self) -> RingAreas {
        self.areas
    }

    pub(super) fn size(&self) -> u16 {
        self.size
    }

    pub(super) fn in_flight(&self) -> u16 {
        self.requests
    }

    pub(super) fn depth(&self, pieces: u16) -> u16 {
        match self.tables {
            Some(_) => self.size,
            None => self.size / pieces.max(1),
        }
    }

    pub(super) fn submit(
        &mut self,
        readable: &[DmaSlice],
        writable: &[DmaSlice],
        cookie: u64,
    ) -> Result<(), SubmitError> {
        let pieces = readable.len() + writable.len();
        let table = self.tables.filter(|_| pieces > 1);
        let wanted = if table.is_some() { 1 } else { pieces as u16 };
        if wanted > self.free {
            return Err(SubmitError::Full);
        }
        let head = self.free_head;
        let tail = match table {
            Some(tables) => self.fill_table(tables, head, readable, writable),
            None => self.fill_chain(head, readable, writable),
        };
        self.free_head = self.next[usize::from(tail)];
        self.free -= wanted;
        self.requests += 1;
        self.in_flight[usize::from(head)] = InFlight::new(cookie, writable, wanted);
        let entry = RING_START + 2 * usize::from(self.avail_idx % self.size);
        self.avail(entry).store(head, Ordering::Relaxed);
        self.avail_idx = self.avail_idx.wrapping_add(1);
        Ok(())
    }

    pub(super) fn publish(&mut self) {
        // Release: the descriptors and the entries are written before the index that makes them valid.
        self.avail(RING_IDX)
            .store(self.avail_idx, Ordering::Release);
    }

    pub(super) fn needs_kick(&mut self) -> bool {
        let old = std::mem::replace(&mut self.notified_idx, self.avail_idx);
        let new = self.avail_idx;
        if old == new {
            return false;
        }
        // Pairs with the device's barrier between writing its wish and looking at the available index once more.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let at = RING_START + USED_ELEM_SIZE * usize::from(self.size);
            need_event(self.used(at).load(Ordering::Relaxed), new, old)
        } else {
            self.used(0).load(Ordering::Relaxed) & USED_F_NO_NOTIFY == 0
        }
    }

    pub(super) fn position(&self) -> u16 {
        self.avail_idx
    }

    pub(super) fn pop(&mut self) -> Result<Option<Completion>, RingError> {
        if self.used_idx == self.used_seen && !self.look()? {
            return Ok(None);
        }
        let at = RING_START + USED_ELEM_SIZE * usize::from(self.used_idx % self.size);
        let mut elem = UsedElem::new_zeroed();
        self.memory.read(
            self.areas.used.part(at, USED_ELEM_SIZE),
            elem.as_mut_bytes(),
        );
        let (id, len) = (elem.id.get(), elem.len.get());
        let request = take(&mut self.in_flight, id)?;
        self.release(id as u16, request.descriptors);
        self.used_idx = self.used_idx.wrapping_add(1);
        self.requests -= 1;
        request.completion(len).map(Some)
    }

    pub(super) fn enable_interrupts(&mut self) -> bool {
        self.interrupts = true;
        if self.event_idx {
            let at = RING_START + 2 * usize::from(self.size);
            self.avail(at).store(self.used_idx, Ordering::Relaxed);
        } else {
            self.avail(0).store(0, Ordering::Relaxed);
        }
        // Pairs with the device's barrier between writing the used index and reading our wish.
        fence(Ordering::SeqCst);
        self.used(RING_IDX).load(Ordering::Acquire) != self.used_idx
    }

    pub(super) fn disable_interrupts(&mut self) {
        if !std::mem::replace(&mut self.interrupts, false) {
            return;
        }
        if self.event_idx {
            // An index that has just passed is reached again only after all 65,536.
            let at = RING_START + 2 * usize::from(self.size);
            self.avail(at)
                .store(self.used_idx.wrapping_sub(1), Ordering::Relaxed);
        } else {
            self.avail(0).store(AVAIL_F_NO_INTERRUPT, Ordering::Relaxed);
        }
    }

    /// Reads the device's used index; true if there is something to take.
    fn look(&mut self) -> Result<bool, RingError> {
        // Acquire: entries and data are read after the index that makes them valid.
        let seen = self.used(RING_IDX).load(Ordering::Acquire);
        let completed = seen.wrapping_sub(self.used_idx);
        if completed > self.requests {
            return Err(RingError::TooMany {
                completed,
                in_flight: self.requests,
            });
        }
        self.used_seen = seen;
        Ok(completed > 0)
    }

    /// Writes the pieces to the table that belongs to descriptor `head`, and lets that refer to it. Returns `head`.
    fn fill_table(
        &mut self,
        tables: DmaSlice,
        head: u16,
        readable: &[DmaSlice],
        writable: &[DmaSlice],
    ) -> u16 {
        let pieces = readable.len() + writable.len();
        let table = table(tables, head, pieces);
        for (i, (piece, write)) in in_order(readable, writable).enumerate() {
            let more = i + 1 < pieces;
            let next = more.then_some(i as u16 + 1);
            let desc = self.descriptor(piece, write, next);
            self.memory
                .write(table.part(i * DESC_SIZE, DESC_SIZE), desc.as_bytes());
        }
        let mut desc = self.descriptor(table, false, None);
        desc.flags = DescFlags::INDIRECT.bits().into();
        self.write_desc(head, &desc);
        head
    }

    /// Writes the pieces to free descriptors from `head` on. Returns the last one.
    fn fill_chain(&mut self, head: u16, readable: &[DmaSlice], writable: &[DmaSlice]) -> u16 {
        let pieces = readable.len() + writable.len();
        let mut at = head;
        let mut last = head;
        for (i, (piece, write)) in in_order(readable, writable).enumerate() {
            let more = i + 1 < pieces;
            let next = self.next[usize::from(at)];
            let desc = self.descriptor(piece, write, more.then_some(next));
            self.write_desc(at, &desc);
            last = at;
            at = next;
        }
        last
    }

    fn descriptor(&self, piece: DmaSlice, write: bool, next: Option<u16>) -> Desc {
        let mut flags = DescFlags::empty();
        flags.set(DescFlags::WRITE, write);
        flags.set(DescFlags::NEXT, next.is_some());
        Desc {
            addr: self.memory.iova(piece).into(),
            len: (piece.len() as u32).into(),
            flags: flags.bits().into(),
            next: next.unwrap_or(0).into(),
        }
    }

    fn write_desc(&self, index: u16, desc: &Desc) {
        let at = usize::from(index) * DESC_SIZE;
        self.memory
            .write(self.areas.desc.part(at, DESC_SIZE), desc.as_bytes());
    }

    /// Gives the `n` descriptors of a chain back to the free list.
    fn release(&mut self, head: u16, n: u16) {
        let mut last = head;
        for _ in 1..n {
            last = self.next[usize::from(last)];
        }
        self.next[usize::from(last)] = self.free_head;
        self.free_head = head;
        self.free += n;
    }

    fn avail(&self, at: usize) -> &AtomicU16 {
        self.memory.field(self.areas.avail, at)
    }

    fn used(&self, at: usize) -> &AtomicU16 {
        self.memory.field(self.areas.used, at)
    }
}
