//! The packed ring format (virtio 1.3, section 2.8).

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use ferry_dataplane::virtio::spec::{
    DESC_SIZE, DescFlags, EVENT_FLAGS_DESC, EVENT_FLAGS_DISABLE, EVENT_FLAGS_ENABLE, PackedDesc,
};
use zerocopy::{FromZeros, IntoBytes};

use super::{
    ALIGN, Completion, InFlight, RingAreas, RingError, RingFeatures, SubmitError, alloc_tables,
    in_order, need_event, table, take,
};
use crate::driver::memory::{DmaMemory, DmaSlice};

#[cfg(test)]
mod tests;

/// Bytes of an event suppression structure.
const EVENT_SIZE: usize = 4;
/// Offset of the flags in a descriptor; they are written last.
const FLAGS: usize = std::mem::offset_of!(PackedDesc, flags);
/// The bit of a position that holds the wrap counter.
const WRAP: u16 = 1 << 15;

/// A place in the ring, and whether its round is an odd one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cursor {
    at: u16,
    wrap: bool,
}

impl Cursor {
    const START: Cursor = Cursor { at: 0, wrap: true };

    fn advance(self, n: u16, size: u16) -> Cursor {
        let at = self.at + n;
        if at >= size {
            Cursor {
                at: at - size,
                wrap: !self.wrap,
            }
        } else {
            Cursor { at, ..self }
        }
    }

    /// As event suppression structures have it.
    fn position(self) -> u16 {
        self.at | if self.wrap { WRAP } else { 0 }
    }

    /// The flags that make a descriptor available in this round.
    fn available(self) -> DescFlags {
        if self.wrap {
            DescFlags::AVAIL
        } else {
            DescFlags::USED
        }
    }

    /// Whether flags say that the device has used a descriptor in this round.
    fn is_used(self, flags: DescFlags) -> bool {
        flags.contains(DescFlags::USED) == self.wrap
            && flags.contains(DescFlags::AVAIL) == self.wrap
    }
}

/// A packed ring; its methods are those of [`super::Ring`].
#[derive(Debug)]
pub(in crate::driver) struct PackedRing {
    memory: Arc<DmaMemory>,
    areas: RingAreas,
    /// One table for each request, if indirect descriptors are used.
    tables: Option<DmaSlice>,
    size: u16,
    event_idx: bool,
    in_flight: Box<[InFlight]>,
    free_ids: Vec<u16>,
    requests: u16,
    /// Descriptors that are not in use.
    free: u16,
    avail: Cursor,
    used: Cursor,
    /// The first descriptor that the device does not see yet, and its flags: all behind it wait for it.
    staged: Option<(u16, DescFlags)>,
    /// Descriptors published since the device was last notified, or found not to want it.
    added: u16,
    interrupts: bool,
}

impl PackedRing {
    /// Bytes of memory without the indirect tables.
    pub(super) fn memory_needed(size: u16) -> usize {
        usize::from(size) * DESC_SIZE + 2 * EVENT_SIZE + 3 * ALIGN
    }

    pub(super) fn new(
        memory: Arc<DmaMemory>,
        size: u16,
        features: RingFeatures,
    ) -> Option<PackedRing> {
        let areas = RingAreas {
            desc: memory.alloc(usize::from(size) * DESC_SIZE, ALIGN)?,
            avail: memory.alloc(EVENT_SIZE, ALIGN)?,
            used: memory.alloc(EVENT_SIZE, ALIGN)?,
        };
        let tables = alloc_tables(&memory, size, features)?;
        let mut ring = PackedRing {
            memory,
            areas,
            tables,
            size,
            event_idx: features.event_idx,
            in_flight: vec![InFlight::default(); size.into()].into_boxed_slice(),
            free_ids: (0..size).rev().collect(),
            requests: 0,
            free: size,
            avail: Cursor::START,
            used: Cursor::START,
            staged: None,
            added: 0,
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
        let tables = self.tables.filter(|_| pieces > 1);
        let wanted = if tables.is_some() { 1 } else { pieces as u16 };
        if wanted > self.free {
            return Err(SubmitError::Full);
        }
        let id = self.free_ids.pop().ok_or(SubmitError::Full)?;
        match tables {
            Some(tables) => {
                let table = self.fill_table(table(tables, id, pieces), readable, writable);
                self.put(0, table, id, DescFlags::INDIRECT);
            }
            None => {
                for (i, (piece, write)) in in_order(readable, writable).enumerate() {
                    let mut flags = DescFlags::empty();
                    flags.set(DescFlags::WRITE, write);
                    flags.set(DescFlags::NEXT, i + 1 < pieces);
                    self.put(i as u16, piece, id, flags);
                }
            }
        }
        self.avail = self.avail.advance(wanted, self.size);
        self.free -= wanted;
        self.added += wanted;
        self.requests += 1;
        self.in_flight[usize::from(id)] = InFlight::new(cookie, writable, wanted);
        Ok(())
    }

    pub(super) fn publish(&mut self) {
        if let Some((at, flags)) = self.staged.take() {
            // Release: all descriptors are written before the flags that make the first of them available.
            let place = usize::from(at) * DESC_SIZE + FLAGS;
            self.memory
                .field(self.areas.desc, place)
                .store(flags.bits(), Ordering::Release);
        }
    }

    pub(super) fn needs_kick(&mut self) -> bool {
        let added = std::mem::take(&mut self.added);
        if added == 0 {
            return false;
        }
        // Pairs with the device's barrier between writing its wish and looking at the next descriptor once more.
        fence(Ordering::SeqCst);
        let event = self
            .event(self.areas.used)
            .load(Ordering::Relaxed)
            .to_le_bytes();
        let position = u16::from_le_bytes([event[0], event[1]]);
        match u16::from_le_bytes([event[2], event[3]]) {
            EVENT_FLAGS_DISABLE => false,
            EVENT_FLAGS_DESC if self.event_idx => {
                let (new, old) = (self.avail.at, self.avail.at.wrapping_sub(added));
                let event = position & !WRAP;
                let this_round = (position & WRAP != 0) == self.avail.wrap;
                let event = if this_round {
                    event
                } else {
                    event.wrapping_sub(self.size)
                };
                need_event(event, new, old)
            }
            _ => true,
        }
    }

    pub(super) fn position(&self) -> u16 {
        self.avail.position()
    }

    pub(super) fn pop(&mut self) -> Result<Option<Completion>, RingError> {
        if !self.has_used() {
            return Ok(None);
        }
        let place = usize::from(self.used.at) * DESC_SIZE;
        let mut desc = PackedDesc::new_zeroed();
        self.memory
            .read(self.areas.desc.part(place, DESC_SIZE), desc.as_mut_bytes());
        let id = desc.id.get();
        let request = take(&mut self.in_flight, id.into())?;
        self.free_ids.push(id);
        self.used = self.used.advance(request.descriptors, self.size);
        self.free += request.descriptors;
        self.requests -= 1;
        request.completion(desc.len.get()).map(Some)
    }

    pub(super) fn enable_interrupts(&mut self) -> bool {
        self.interrupts = true;
        if self.event_idx {
            self.ask(self.used.position(), EVENT_FLAGS_DESC);
        } else {
            self.ask(0, EVENT_FLAGS_ENABLE);
        }
        // Pairs with the device's barrier between writing a used descriptor and reading our wish.
        fence(Ordering::SeqCst);
        self.has_used()
    }

    pub(super) fn disable_interrupts(&mut self) {
        if std::mem::replace(&mut self.interrupts, false) {
            self.ask(0, EVENT_FLAGS_DISABLE);
        }
    }

    /// Whether the device has given the next descriptor back.
    fn has_used(&self) -> bool {
        let place = usize::from(self.used.at) * DESC_SIZE + FLAGS;
        // Acquire: the rest of the descriptor and the data are read after the flags that make them valid.
        let flags = self
            .memory
            .field(self.areas.desc, place)
            .load(Ordering::Acquire);
        self.used.is_used(DescFlags::from_bits_retain(flags))
    }

    /// Writes the pieces to an indirect table, and returns it.
    fn fill_table(
        &self,
        table: DmaSlice,
        readable: &[DmaSlice],
        writable: &[DmaSlice],
    ) -> DmaSlice {
        for (i, (piece, write)) in in_order(readable, writable).enumerate() {
            let mut flags = DescFlags::empty();
            flags.set(DescFlags::WRITE, write);
            let desc = self.descriptor(piece, 0, flags);
            self.memory
                .write(table.part(i * DESC_SIZE, DESC_SIZE), desc.as_bytes());
        }
        table
    }

    /// Writes the `n`th descriptor of a request. The first one that the device has not seen stays unavailable.
    fn put(&mut self, n: u16, piece: DmaSlice, id: u16, flags: DescFlags) {
        let cursor = self.avail.advance(n, self.size);
        let flags = flags | cursor.available();
        let staged = self.staged.is_some();
        let visible = if staged {
            flags
        } else {
            self.staged = Some((cursor.at, flags));
            // What the descriptor had when it was used, which is not available in this round.
            self.current_flags(cursor)
        };
        let desc = self.descriptor(piece, id, visible);
        let place = usize::from(cursor.at) * DESC_SIZE;
        self.memory
            .write(self.areas.desc.part(place, DESC_SIZE), desc.as_bytes());
    }

    fn current_flags(&self, cursor: Cursor) -> DescFlags {
        let place = usize::from(cursor.at) * DESC_SIZE + FLAGS;
        let flags = self.memory.field(self.areas.desc, place);
        DescFlags::from_bits_retain(flags.load(Ordering::Relaxed))
    }

    fn descriptor(&self, piece: DmaSlice, id: u16, flags: DescFlags) -> PackedDesc {
        PackedDesc {
            addr: self.memory.iova(piece).into(),
            len: (piece.len() as u32).into(),
            id: id.into(),
            flags: flags.bits().into(),
        }
    }

    /// Tells the device when to interrupt.
    fn ask(&self, position: u16, flags: u16) {
        let [a, b] = position.to_le_bytes();
        let [c, d] = flags.to_le_bytes();
        self.event(self.areas.avail)
            .store(u32::from_le_bytes([a, b, c, d]), Ordering::Release);
    }

    fn event(&self, area: DmaSlice) -> &AtomicU32 {
        self.memory.field32(area)
    }
}
