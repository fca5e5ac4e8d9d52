//! The split ring format (virtio 1.3, section 2.7). Used by `queue` only.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{Ordering, fence};

use zerocopy::IntoBytes;

use ferry_shared::limits::MAX_RING_SIZE;

use super::area::Area;
use super::chain::{Chain, IndirectTable, Range};
use super::inflight::InflightQueue;
use super::queue::{Head, QueueConfig, QueueError, need_event};
use super::spec::{AVAIL_F_NO_INTERRUPT, DESC_SIZE, Desc, DescFlags, USED_F_NO_NOTIFY, UsedElem};
use crate::mem::{Fault, GuestMap, Iova};

/// Both rings begin with `flags`, then `idx`.
const FLAGS: usize = 0;
const IDX: usize = 2;
const RING: usize = 4;

/// Pieces of a request that are fetched before it is popped: header, arguments, the reply's header and payload.
const LOOK_AHEAD_PIECES: u32 = 4;

/// One bit per descriptor.
type Bits = [u64; MAX_RING_SIZE as usize / 64];

/// The three parts of a split ring.
#[derive(Debug)]
struct Areas {
    desc: Area,
    avail: Area,
    used: Area,
}

impl Areas {
    fn new(config: &QueueConfig, map: &Arc<GuestMap>) -> Result<Areas, QueueError> {
        let n = usize::from(config.size);
        let area = |iova, head, each: usize, align, write| {
            let len = each.saturating_mul(n).saturating_add(head);
            Area::new(map, iova, len, align, write).map_err(QueueError::Ring)
        };
        Ok(Areas {
            desc: area(config.desc, 0, DESC_SIZE, 16, false)?,
            avail: area(config.avail, 6, 2, 2, false)?,
            used: area(config.used, 6, 8, 4, true)?,
        })
    }
}

#[derive(Debug)]
pub(super) struct SplitRing {
    /// `None` once the rings have left guest memory.
    areas: Option<Areas>,
    /// Next available entry to pop, and the driver's index when it was last read.
    next_avail: u16,
    seen_avail: u16,
    /// Next used entry to write, and the index that the driver has been shown.
    next_used: u16,
    shown_used: u16,
    /// Heads that are popped, or parked, and not given back.
    busy: Bits,
    /// Heads that an earlier process popped and never gave back, the next one last.
    resubmit: Vec<u16>,
    inflight: Option<InflightQueue>,
}

/// Byte offset of entry `index` of a ring with entries of `each` bytes.
fn entry(config: &QueueConfig, index: u16, each: usize) -> usize {
    let slot = usize::from(index) & usize::from(config.size).wrapping_sub(1);
    slot.saturating_mul(each).saturating_add(RING)
}

impl SplitRing {
    pub(super) fn new(
        config: &QueueConfig,
        map: &Arc<GuestMap>,
        mut inflight: Option<InflightQueue>,
        parked: impl Iterator<Item = u16>,
    ) -> Result<SplitRing, QueueError> {
        if !config.size.is_power_of_two() {
            return Err(QueueError::Size { size: config.size });
        }
        let areas = Areas::new(config, map)?;
        let resubmit = match &mut inflight {
            Some(record) => {
                record.recover(config.size, areas.used.load_u16(IDX, Ordering::Acquire))
            }
            None => Vec::new(),
        };
        let mut ring = SplitRing {
            areas: Some(areas),
            next_avail: config.state.avail,
            seen_avail: config.state.avail,
            next_used: config.state.used,
            shown_used: config.state.used,
            busy: [0; _],
            resubmit,
            inflight,
        };
        for head in parked {
            ring.claim(config, head)?;
        }
        for i in 0..ring.resubmit.len() {
            if let Some(&head) = ring.resubmit.get(i) {
                ring.claim(config, head)?;
            }
        }
        Ok(ring)
    }

    pub(super) fn remap(
        &mut self,
        config: &QueueConfig,
        map: &Arc<GuestMap>,
    ) -> Result<(), QueueError> {
        // The old areas must not survive a failure: they keep the old memory alive.
        self.areas = None;
        self.areas = Some(Areas::new(config, map)?);
        Ok(())
    }

    #[inline]
    fn avail_idx(&self) -> u16 {
        // Acquire pairs with the driver's write barrier between filling an entry and moving the index.
        self.areas.as_ref().map_or(self.next_avail, |a| {
            a.avail.load_u16(IDX, Ordering::Acquire)
        })
    }

    #[inline]
    pub(super) fn has_work(&self) -> bool {
        // The driver's index is in a cache line that its processor writes: it is not looked at while there is work anyway.
        self.seen_avail != self.next_avail
            || !self.resubmit.is_empty()
            || self.avail_idx() != self.next_avail
    }

    /// Marks a head as being in flight.
    #[inline]
    fn claim(&mut self, config: &QueueConfig, head: u16) -> Result<(), QueueError> {
        let size = config.size;
        let word = self.busy.get_mut(usize::from(head / 64));
        let Some(word) = word.filter(|_| head < size) else {
            return Err(QueueError::DescIndex {
                index: head,
                entries: u32::from(size),
            });
        };
        let bit = 1u64 << (head % 64);
        if *word & bit != 0 {
            return Err(QueueError::HeadInFlight { head });
        }
        *word |= bit;
        Ok(())
    }

    /// Takes the next request: its head, and the fault that cut the walk short.
    #[inline]
    pub(super) fn pop(
        &mut self,
        config: &QueueConfig,
        map: &GuestMap,
        chain: &mut Chain,
    ) -> Result<Option<(Head, Option<Fault>)>, QueueError> {
        let head = match self.resubmit.pop() {
            Some(head) => head,
            None => match self.next_head(config)? {
                Some(head) => head,
                None => return Ok(None),
            },
        };
        let Some(areas) = &self.areas else {
            return Ok(None);
        };
        self.look_ahead(areas, config, map);
        let fault = walk(&areas.desc, config, map, head, chain)?;
        if let Some(record) = &mut self.inflight {
            record.popped(head);
        }
        let (id, count, entry) = (head, 1, 0);
        Ok(Some((Head { id, count, entry }, fault)))
    }

    /// Has the processor fetch what the next requests consist of: another processor has just written it, and the fetches of
    /// several requests overlap where one after the other would be waited for. What is read here decides nothing.
    #[inline]
    fn look_ahead(&self, areas: &Areas, config: &QueueConfig, map: &GuestMap) {
        let known = self.seen_avail.wrapping_sub(self.next_avail);
        if known < 2 {
            return;
        }
        let desc_at = |n: u16| {
            let at = entry(config, self.next_avail.wrapping_add(n), 2);
            let head = areas.avail.load_u16(at, Ordering::Relaxed);
            usize::from(head).saturating_mul(DESC_SIZE)
        };
        if known > 3 {
            areas.desc.prefetch(desc_at(3));
        }
        if known > 2 {
            let desc: Desc = zerocopy::transmute!(areas.desc.read::<DESC_SIZE>(desc_at(2)));
            map.prefetch(Iova(desc.addr.get()));
        }
        let desc: Desc = zerocopy::transmute!(areas.desc.read::<DESC_SIZE>(desc_at(1)));
        let flags = DescFlags::from_bits_retain(desc.flags.get());
        let range = Range {
            iova: Iova(desc.addr.get()),
            len: desc.len.get(),
        };
        if flags.contains(DescFlags::INDIRECT)
            && let Ok(table) = IndirectTable::new(map, range)
        {
            table.look_ahead(LOOK_AHEAD_PIECES);
        }
    }

    #[inline]
    fn next_head(&mut self, config: &QueueConfig) -> Result<Option<u16>, QueueError> {
        if self.seen_avail == self.next_avail {
            self.seen_avail = self.avail_idx();
            let (idx, next, size) = (self.seen_avail, self.next_avail, config.size);
            if idx.wrapping_sub(next) > size {
                return Err(QueueError::AvailIndex { idx, next, size });
            }
            if idx == next {
                return Ok(None);
            }
        }
        let Some(areas) = &self.areas else {
            return Ok(None);
        };
        let at = entry(config, self.next_avail, 2);
        let head = areas.avail.load_u16(at, Ordering::Relaxed);
        self.claim(config, head)?;
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(Some(head))
    }

    #[inline]
    pub(super) fn push_used(&mut self, config: &QueueConfig, head: u16, written: u32) {
        if let Some(word) = self.busy.get_mut(usize::from(head / 64)) {
            *word &= !(1u64 << (head % 64));
        }
        if let Some(areas) = &self.areas {
            let elem = UsedElem {
                id: u32::from(head).into(),
                len: written.into(),
            };
            areas
                .used
                .write(entry(config, self.next_used, 8), elem.as_bytes());
        }
        if let Some(record) = &mut self.inflight {
            record.staged(head);
        }
        self.next_used = self.next_used.wrapping_add(1);
    }

    pub(super) fn publish(&mut self, config: &QueueConfig) -> bool {
        let (old, new) = (self.shown_used, self.next_used);
        let Some(areas) = self.areas.as_ref().filter(|_| old != new) else {
            return false;
        };
        // Release pairs with the driver's read barrier between the index and the entries.
        areas.used.store_u16(IDX, new, Ordering::Release);
        self.shown_used = new;
        if let Some(record) = &mut self.inflight {
            record.published(new);
        }
        // Pairs with the driver's full barrier between asking for an interrupt (`used_event`, or the flag) and looking at
        // the index again: one of the two sees the other's write.
        fence(Ordering::SeqCst);
        if config.event_idx {
            let event = areas
                .avail
                .load_u16(entry_end(config, 2), Ordering::Relaxed);
            need_event(event, new, old)
        } else {
            areas.avail.load_u16(FLAGS, Ordering::Relaxed) & AVAIL_F_NO_INTERRUPT == 0
        }
    }

    pub(super) fn enable_kicks(&mut self, config: &QueueConfig) {
        if let Some(areas) = &self.areas {
            if config.event_idx {
                let at = entry_end(config, 8);
                areas.used.store_u16(at, self.next_avail, Ordering::Relaxed);
            } else {
                areas.used.store_u16(FLAGS, 0, Ordering::Relaxed);
            }
        }
        // Pairs with the driver's full barrier between moving the available index and reading what was just written.
        fence(Ordering::SeqCst);
    }

    pub(super) fn disable_kicks(&mut self, config: &QueueConfig) {
        // With EVENT_IDX the event index that the driver has passed stays behind it, which is as quiet as it gets.
        if let Some(areas) = self.areas.as_ref().filter(|_| !config.event_idx) {
            areas
                .used
                .store_u16(FLAGS, USED_F_NO_NOTIFY, Ordering::Relaxed);
        }
    }

    /// Available and used index.
    pub(super) fn position(&self) -> (u16, u16) {
        (self.next_avail, self.next_used)
    }
}

/// Byte offset of the event index behind a ring with entries of `each` bytes.
fn entry_end(config: &QueueConfig, each: usize) -> usize {
    usize::from(config.size)
        .saturating_mul(each)
        .saturating_add(RING)
}

/// Follows a chain. A table out of reach cuts it short; that is the request's problem, a broken chain is the queue's.
fn walk(
    desc: &Area,
    config: &QueueConfig,
    map: &GuestMap,
    head: u16,
    chain: &mut Chain,
) -> Result<Option<Fault>, QueueError> {
    let mut table: Option<IndirectTable<'_>> = None;
    let mut index = head;
    let mut left = u32::from(config.size);
    loop {
        let entries = table
            .as_ref()
            .map_or(u32::from(config.size), |t| t.entries());
        if u32::from(index) >= entries {
            return Err(QueueError::DescIndex { index, entries });
        }
        left = left.checked_sub(1).ok_or(QueueError::Loop { head })?;
        let bytes = match &table {
            None => desc.read(usize::from(index).saturating_mul(DESC_SIZE)),
            Some(table) => match table.read(u32::from(index)) {
                Ok(bytes) => bytes,
                Err(fault) => return Ok(Some(fault)),
            },
        };
        let desc: Desc = zerocopy::transmute!(bytes);
        let flags = DescFlags::from_bits_retain(desc.flags.get());
        let range = Range {
            iova: Iova(desc.addr.get()),
            len: desc.len.get(),
        };
        if flags.contains(DescFlags::INDIRECT) {
            if table.is_some() {
                return Err(QueueError::IndirectNested);
            }
            let next = open_indirect(config, map, flags, range)?;
            if chain.fill(&next) {
                return Ok(None);
            }
            left = next.entries();
            table = Some(next);
            index = 0;
            continue;
        }
        chain.push(range, flags.contains(DescFlags::WRITE))?;
        if !flags.contains(DescFlags::NEXT) {
            return Ok(None);
        }
        index = desc.next.get();
    }
}

/// Checks an indirect descriptor of either ring format and opens its table.
pub(super) fn open_indirect<'m>(
    config: &QueueConfig,
    map: &'m GuestMap,
    flags: DescFlags,
    range: Range,
) -> Result<IndirectTable<'m>, QueueError> {
    if !config.indirect {
        return Err(QueueError::IndirectNotNegotiated);
    }
    if flags.contains(DescFlags::NEXT) {
        return Err(QueueError::IndirectNext);
    }
    IndirectTable::new(map, range)
}
