//! The packed ring format (virtio 1.3, section 2.8). Used by `queue` only.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{Ordering, fence};

use super::area::Area;
use super::chain::{Chain, Range};
use super::inflight::PackedInflight;
use super::queue::{Head, QueueConfig, QueueError, WRAP, need_event};
use super::spec::{
    DESC_SIZE, DescFlags, EVENT_FLAGS_DESC, EVENT_FLAGS_DISABLE, EVENT_FLAGS_ENABLE, PackedDesc,
};
use super::split::open_indirect;
use crate::mem::{Fault, GuestMap, Iova};

/// Byte offsets within a descriptor.
const LEN: usize = 8;
const ID: usize = 12;
const FLAGS: usize = 14;

/// The three parts of a packed ring.
#[derive(Debug)]
struct Areas {
    ring: Area,
    /// Written by the driver: when it wants interrupts.
    driver: Area,
    /// Written by the device: when it wants kicks.
    device: Area,
}

impl Areas {
    fn new(config: &QueueConfig, map: &Arc<GuestMap>) -> Result<Areas, QueueError> {
        let len = usize::from(config.size).saturating_mul(DESC_SIZE);
        let area = |iova, len, align, write| {
            Area::new(map, iova, len, align, write).map_err(QueueError::Ring)
        };
        Ok(Areas {
            ring: area(config.desc, len, 16, true)?,
            driver: area(config.avail, 4, 4, false)?,
            device: area(config.used, 4, 4, true)?,
        })
    }
}

/// A place in the ring, and how often it has been round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cursor {
    at: u16,
    wrap: bool,
}

impl Cursor {
    fn from_raw(raw: u16) -> Cursor {
        Cursor {
            at: raw & !WRAP,
            wrap: raw & WRAP != 0,
        }
    }

    fn raw(self) -> u16 {
        self.at | if self.wrap { WRAP } else { 0 }
    }

    /// The place `n` descriptors further, `n` at most `size`.
    fn advance(self, n: u16, size: u16) -> Cursor {
        let at = self.at.wrapping_add(n);
        if at >= size {
            Cursor {
                at: at.wrapping_sub(size),
                wrap: !self.wrap,
            }
        } else {
            Cursor { at, ..self }
        }
    }

    /// How far this is ahead of `behind`, if it is at most one round.
    fn ahead_of(self, behind: Cursor, size: u16) -> Option<u16> {
        if self.wrap == behind.wrap {
            self.at.checked_sub(behind.at)
        } else {
            self.at
                .checked_add(size)
                .and_then(|n| n.checked_sub(behind.at))
                .filter(|&n| n <= size)
        }
    }
}

/// Used descriptors that the driver cannot see yet, because the flags of the first are not written.
#[derive(Clone, Copy, Debug)]
struct Staged {
    first: Cursor,
    flags: DescFlags,
    /// Ring descriptors given back.
    count: u16,
}

#[derive(Debug)]
pub(super) struct PackedRing {
    /// `None` once the rings have left guest memory.
    areas: Option<Areas>,
    avail: Cursor,
    used: Cursor,
    staged: Option<Staged>,
    /// Heads in the record that an earlier process popped and never gave back, the next one last.
    resubmit: Vec<u16>,
    inflight: Option<PackedInflight>,
}

fn offset(at: u16, field: usize) -> usize {
    usize::from(at)
        .saturating_mul(DESC_SIZE)
        .saturating_add(field)
}

impl PackedRing {
    pub(super) fn new(
        config: &QueueConfig,
        map: &Arc<GuestMap>,
        mut inflight: Option<PackedInflight>,
    ) -> Result<PackedRing, QueueError> {
        let mut avail = Cursor::from_raw(config.state.avail);
        let mut used = Cursor::from_raw(config.state.used);
        let size = config.size;
        let areas = Areas::new(config, map)?;
        let mut resubmit = Vec::new();
        if let Some(record) = &mut inflight {
            let found = record.recover(
                size,
                config.state.used,
                |at| Cursor::from_raw(at).at < size && is_used(&areas, Cursor::from_raw(at)),
                |old, new| Cursor::from_raw(new).ahead_of(Cursor::from_raw(old), size),
            );
            used = Cursor::from_raw(found.used);
            avail = used.advance(found.count.min(size), size);
            resubmit = found.heads;
        }
        if avail.at >= size || used.at >= size || avail.ahead_of(used, size).is_none() {
            return Err(QueueError::Position {
                avail: avail.raw(),
                used: used.raw(),
                size,
            });
        }
        if inflight.is_some() {
            hide_used(&areas, used, avail, size);
        }
        Ok(PackedRing {
            areas: Some(areas),
            avail,
            used,
            staged: None,
            resubmit,
            inflight,
        })
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

    pub(super) fn has_work(&self) -> bool {
        !self.resubmit.is_empty() || self.is_available()
    }

    fn is_available(&self) -> bool {
        let Some(areas) = &self.areas else {
            return false;
        };
        // Acquire pairs with the driver's write barrier between a chain and the flags of its first descriptor.
        let flags = areas
            .ring
            .load_u16(offset(self.avail.at, FLAGS), Ordering::Acquire);
        let flags = DescFlags::from_bits_retain(flags);
        flags.contains(DescFlags::AVAIL) == self.avail.wrap
            && flags.contains(DescFlags::USED) != self.avail.wrap
    }

    /// Takes the next request: its head, and the fault that cut the walk short.
    pub(super) fn pop(
        &mut self,
        config: &QueueConfig,
        map: &GuestMap,
        chain: &mut Chain,
    ) -> Result<Option<(Head, Option<Fault>)>, QueueError> {
        if let Some(head) = self.resubmit.pop() {
            return self.pop_again(config, map, chain, head);
        }
        if !self.is_available() {
            return Ok(None);
        }
        let Some(areas) = &self.areas else {
            return Ok(None);
        };
        let size = config.size;
        let taken = self.avail.ahead_of(self.used, size).unwrap_or(size);
        let free = size.saturating_sub(taken);
        let mut count: u16 = 0;
        let mut cursor = self.avail;
        let (id, fault) = loop {
            if count >= free {
                return Err(QueueError::Overcommitted { size });
            }
            let bytes: [u8; DESC_SIZE] = areas.ring.read(offset(cursor.at, 0));
            let desc: PackedDesc = zerocopy::transmute!(bytes);
            count = count.saturating_add(1);
            cursor = cursor.advance(1, size);
            if let Some(record) = &mut self.inflight {
                record.took(&desc);
            }
            if let Some(fault) = add(config, map, &desc, chain)? {
                // The buffer id is that of the last descriptor (section 2.8.6).
                break (desc.id.get(), fault);
            }
        };
        self.avail = cursor;
        let entry = self.inflight.as_mut().map_or(0, PackedInflight::popped);
        Ok(Some((Head { id, count, entry }, fault)))
    }

    /// Takes a request that an earlier process has popped: the ring may not have its descriptors any more.
    fn pop_again(
        &self,
        config: &QueueConfig,
        map: &GuestMap,
        chain: &mut Chain,
        entry: u16,
    ) -> Result<Option<(Head, Option<Fault>)>, QueueError> {
        let Some(record) = &self.inflight else {
            return Ok(None);
        };
        let (mut id, mut count, mut fault) = (0, 0u16, None);
        for (_, desc) in record.entries(entry) {
            id = desc.id.get();
            count = count.saturating_add(1);
            if let Some(end) = add(config, map, &desc, chain)? {
                fault = end;
            }
        }
        Ok(Some((Head { id, count, entry }, fault)))
    }

    pub(super) fn push_used(&mut self, config: &QueueConfig, head: &Head, written: u32) {
        let mut flags = DescFlags::empty();
        flags.set(DescFlags::AVAIL | DescFlags::USED, self.used.wrap);
        flags.set(DescFlags::WRITE, written > 0);
        if let Some(areas) = &self.areas {
            let at = self.used.at;
            areas.ring.write(offset(at, LEN), &written.to_le_bytes());
            areas
                .ring
                .store_u16(offset(at, ID), head.id, Ordering::Relaxed);
            if self.staged.is_some() {
                // Hidden behind the first one, whose flags come last.
                areas
                    .ring
                    .store_u16(offset(at, FLAGS), flags.bits(), Ordering::Relaxed);
            }
        }
        let staged = self.staged.get_or_insert(Staged {
            first: self.used,
            flags,
            count: 0,
        });
        staged.count = staged.count.saturating_add(head.count);
        self.used = self.used.advance(head.count, config.size);
        if let Some(record) = &mut self.inflight {
            record.staged(head.entry, self.used.raw());
        }
    }

    pub(super) fn publish(&mut self, config: &QueueConfig) -> bool {
        let Some(staged) = self.staged.take() else {
            return false;
        };
        let Some(areas) = &self.areas else {
            return false;
        };
        // Release pairs with the driver's read barrier between the flags and the rest, here and in the staged ones behind.
        areas.ring.store_u16(
            offset(staged.first.at, FLAGS),
            staged.flags.bits(),
            Ordering::Release,
        );
        if let Some(record) = &mut self.inflight {
            record.published(self.used.raw());
        }
        // Pairs with the driver's full barrier between writing its event suppression and looking at the ring again.
        fence(Ordering::SeqCst);
        let event = areas.driver.load_u32(0, Ordering::Relaxed);
        let (off_wrap, flags) = (event as u16, (event >> 16) as u16);
        match flags & 3 {
            EVENT_FLAGS_DISABLE => false,
            EVENT_FLAGS_DESC if config.event_idx => {
                let event = Cursor::from_raw(off_wrap);
                let mut at = event.at;
                if event.wrap != self.used.wrap {
                    at = at.wrapping_sub(config.size);
                }
                let new = self.used.at;
                need_event(at, new, new.wrapping_sub(staged.count))
            }
            _ => true,
        }
    }

    pub(super) fn enable_kicks(&mut self, config: &QueueConfig) {
        let event = if config.event_idx {
            u32::from(self.avail.raw()) | u32::from(EVENT_FLAGS_DESC) << 16
        } else {
            u32::from(EVENT_FLAGS_ENABLE) << 16
        };
        if let Some(areas) = &self.areas {
            areas.device.store_u32(0, event, Ordering::Relaxed);
        }
        // Pairs with the driver's full barrier between making a chain available and reading what was just written.
        fence(Ordering::SeqCst);
    }

    pub(super) fn disable_kicks(&mut self) {
        if let Some(areas) = &self.areas {
            let event = u32::from(EVENT_FLAGS_DISABLE) << 16;
            areas.device.store_u32(0, event, Ordering::Relaxed);
        }
    }

    /// Next available and next used place.
    pub(super) fn position(&self) -> (u16, u16) {
        (self.avail.raw(), self.used.raw())
    }
}

/// Whether the driver sees a used descriptor at this place.
fn is_used(areas: &Areas, cursor: Cursor) -> bool {
    let flags = areas
        .ring
        .load_u16(offset(cursor.at, FLAGS), Ordering::Acquire);
    let flags = DescFlags::from_bits_retain(flags);
    [DescFlags::AVAIL, DescFlags::USED].map(|flag| flags.contains(flag)) == [cursor.wrap; 2]
}

/// Used descriptors that an earlier process wrote behind one that it did not show become available ones again.
fn hide_used(areas: &Areas, used: Cursor, avail: Cursor, size: u16) {
    let mut at = used;
    while at != avail {
        if is_used(areas, at) {
            let flags = if at.wrap {
                DescFlags::AVAIL
            } else {
                DescFlags::USED
            };
            areas
                .ring
                .store_u16(offset(at.at, FLAGS), flags.bits(), Ordering::Relaxed);
        }
        at = at.advance(1, size);
    }
    // The driver must not see the next used descriptor before these are gone.
    fence(Ordering::SeqCst);
}

/// Adds a ring descriptor to the chain. `None` if another one follows; otherwise the fault that cut the walk short.
fn add(
    config: &QueueConfig,
    map: &GuestMap,
    desc: &PackedDesc,
    chain: &mut Chain,
) -> Result<Option<Option<Fault>>, QueueError> {
    let flags = DescFlags::from_bits_retain(desc.flags.get());
    let range = Range {
        iova: Iova(desc.addr.get()),
        len: desc.len.get(),
    };
    if flags.contains(DescFlags::INDIRECT) {
        return walk_indirect(config, map, flags, range, chain).map(Some);
    }
    chain.push(range, flags.contains(DescFlags::WRITE))?;
    Ok((!flags.contains(DescFlags::NEXT)).then_some(None))
}

/// Takes all descriptors of an indirect table, in order; their NEXT flags mean nothing (section 2.8.7).
fn walk_indirect(
    config: &QueueConfig,
    map: &GuestMap,
    flags: DescFlags,
    range: Range,
    chain: &mut Chain,
) -> Result<Option<Fault>, QueueError> {
    let table = open_indirect(config, map, flags, range)?;
    for index in 0..table.entries() {
        let bytes = match table.read(index) {
            Ok(bytes) => bytes,
            Err(fault) => return Ok(Some(fault)),
        };
        let desc: PackedDesc = zerocopy::transmute!(bytes);
        let flags = DescFlags::from_bits_retain(desc.flags.get());
        if flags.contains(DescFlags::INDIRECT) {
            return Err(QueueError::IndirectNested);
        }
        let range = Range {
            iova: Iova(desc.addr.get()),
            len: desc.len.get(),
        };
        chain.push(range, flags.contains(DescFlags::WRITE))?;
    }
    Ok(None)
}
