//! The record of requests in flight for packed rings.
//!
//! A packed ring keeps nothing of a request that was taken from it: the device overwrites its descriptors with used ones of
//! other requests, and the ring has no index that tells how far the device was. So the record has both: an entry for each ring
//! descriptor in flight, with what the driver wrote into it, and where the used descriptors stand. The layout is the protocol's
//! for packed rings, except that a place in the ring is one number, its wrap counter in bit 15, so that one store changes
//! both, and that which entries are free is found out by every process anew.
//!
//! # What a crash leaves
//!
//! A batch becomes visible to the driver with one store, of the flags of its first used descriptor. Before that store the record
//! names the batch and where the ring stands after it; after that store the entries' marks are cleared, and only then is the old
//! place given up. So the flags at the old place tell whether the batch named in the record was shown: if not, all of it is in
//! flight; if so, none of it is. Used descriptors that were written behind a first one that was not shown must disappear, because
//! the driver would find them as soon as another one is shown before them.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{Ordering, compiler_fence};

use super::super::area::Area;
use super::super::spec::PackedDesc;
use crate::mem::{Fault, GuestMap, Iova};
#[cfg(test)]
use crate::sim::fate::{self, Bug};

/// Byte offsets of the header's fields.
const VERSION: usize = 8;
const DESC_NUM: usize = 10;
/// Head of the batch that is about to be shown.
const BATCH: usize = 12;
/// Where the ring stands after that batch, and before it.
const USED: usize = 16;
const OLD_USED: usize = 18;
const HEADER: usize = 32;
/// Byte offsets within an entry. An entry is in flight if it is the first of a request that is.
const INFLIGHT: usize = 0;
/// The next entry of the request; of its last, the head that was staged before this one.
const NEXT: usize = 2;
const LAST: usize = 4;
const COUNT: usize = 6;
const ORDER: usize = 8;
const ID: usize = 16;
const FLAGS: usize = 18;
const LEN: usize = 20;
const ADDR: usize = 24;
const ENTRY: usize = 32;

/// Bytes that the record of one queue takes; each begins on a cache line.
pub(super) fn queue_record_len(queue_size: u16) -> usize {
    usize::from(queue_size)
        .saturating_mul(ENTRY)
        .saturating_add(HEADER)
        .next_multiple_of(64)
}

/// The part of the record that belongs to one packed queue.
#[derive(Clone, Debug)]
pub struct PackedInflight {
    area: Area,
    size: u16,
    order: u64,
    /// Entries that no request has, and those that the request which is being taken has got.
    free: Vec<u16>,
    taken: Vec<u16>,
    /// Heads given back since the driver was last shown something.
    batch: Vec<u16>,
}

/// Where a packed ring goes on.
#[derive(Debug, PartialEq, Eq)]
pub(in super::super) struct Recovered {
    /// Ring position, with the wrap counter in bit 15.
    pub(in super::super) used: u16,
    /// Ring descriptors of the requests in flight.
    pub(in super::super) count: u16,
    /// Heads in flight, the oldest last.
    pub(in super::super) heads: Vec<u16>,
}

impl PackedInflight {
    pub(super) fn new(
        record: &Arc<GuestMap>,
        index: u16,
        queue_size: u16,
    ) -> Result<PackedInflight, Fault> {
        let len = queue_record_len(queue_size);
        let at = (len as u64).saturating_mul(u64::from(index));
        Ok(PackedInflight {
            area: Area::new(record, Iova(at), len, 8, true)?,
            size: queue_size,
            order: 0,
            free: Vec::new(),
            taken: Vec::new(),
            batch: Vec::new(),
        })
    }

    fn get16(&self, at: usize) -> u16 {
        u16::from_ne_bytes(self.area.read(at))
    }

    fn put16(&self, at: usize, value: u16) {
        self.area.write(at, &value.to_ne_bytes());
    }

    fn at(entry: u16, field: usize) -> usize {
        usize::from(entry)
            .saturating_mul(ENTRY)
            .saturating_add(HEADER)
            .saturating_add(field)
    }

    fn in_flight(&self, head: u16) -> bool {
        let [flag] = self.area.read(Self::at(head, INFLIGHT));
        flag != 0
    }

    fn set_in_flight(&self, head: u16, flag: bool) {
        self.area.write(Self::at(head, INFLIGHT), &[u8::from(flag)]);
    }

    fn order(&self, head: u16) -> u64 {
        u64::from_ne_bytes(self.area.read(Self::at(head, ORDER)))
    }

    /// Forgets everything: the queue begins anew.
    pub(super) fn clear(&self) {
        self.put16(VERSION, 0);
        compiler_fence(Ordering::SeqCst);
        for head in 0..self.size {
            self.set_in_flight(head, false);
        }
        compiler_fence(Ordering::SeqCst);
    }

    /// Brings the record up to date with the ring, which begins at `used` if it has never run. `shown` tells whether the
    /// driver can see a used descriptor at a place of the ring, and `distance` how far the second place is after the first.
    pub(in super::super) fn recover(
        &mut self,
        queue_size: u16,
        used: u16,
        shown: impl Fn(u16) -> bool,
        distance: impl Fn(u16, u16) -> Option<u16>,
    ) -> Recovered {
        self.size = self.size.min(queue_size);
        for list in [&mut self.free, &mut self.taken, &mut self.batch] {
            list.clear();
            list.reserve(usize::from(self.size));
        }
        if self.get16(VERSION) == 0 {
            // New memory: zeros.
            self.put16(DESC_NUM, self.size);
            self.put16(USED, used);
            self.put16(OLD_USED, used);
            compiler_fence(Ordering::SeqCst);
            self.put16(VERSION, 1);
        }
        let (old, new) = (self.get16(OLD_USED), self.get16(USED));
        if old != new && shown(old) {
            self.drop_batch(distance(old, new).unwrap_or(0));
            compiler_fence(Ordering::SeqCst);
            self.put16(OLD_USED, new);
        } else {
            self.put16(USED, old);
        }
        let used = self.get16(OLD_USED);
        let mut heads: Vec<u16> = (0..self.size).filter(|&h| self.in_flight(h)).collect();
        heads.sort_by_key(|&h| core::cmp::Reverse(self.order(h)));
        self.order = heads.first().map_or(0, |&h| self.order(h));
        let mut count: u16 = 0;
        let mut busy = alloc::vec![false; usize::from(self.size)];
        for &head in &heads {
            for (entry, _) in self.entries(head) {
                if let Some(busy) = busy.get_mut(usize::from(entry)) {
                    *busy = true;
                }
                count = count.saturating_add(1);
            }
        }
        let free = (0..self.size)
            .rev()
            .zip(busy.iter().rev())
            .filter(|(_, busy)| !**busy);
        self.free.extend(free.map(|(entry, _)| entry));
        Recovered { used, count, heads }
    }

    /// The batch that the record names has been shown: `count` ring descriptors.
    fn drop_batch(&self, count: u16) {
        let mut head = self.get16(BATCH);
        let mut left = count;
        while left > 0 && head < self.size {
            self.set_in_flight(head, false);
            // A request has at least one descriptor, whatever the memory says.
            left = left.saturating_sub(self.get16(Self::at(head, COUNT)).max(1));
            let last = self.get16(Self::at(head, LAST));
            if last >= self.size {
                break;
            }
            head = self.get16(Self::at(last, NEXT));
        }
    }

    /// The ring descriptors of a request, with their entries.
    pub(in super::super) fn entries(&self, head: u16) -> impl Iterator<Item = (u16, PackedDesc)> {
        let mut left = self.get16(Self::at(head, COUNT)).min(self.size).max(1);
        let mut next = Some(head).filter(|&head| head < self.size);
        core::iter::from_fn(move || {
            let entry = next.filter(|_| left > 0)?;
            left = left.saturating_sub(1);
            next = Some(self.get16(Self::at(entry, NEXT))).filter(|&next| next < self.size);
            Some((entry, self.desc(entry)))
        })
    }

    fn desc(&self, entry: u16) -> PackedDesc {
        PackedDesc {
            addr: u64::from_ne_bytes(self.area.read(Self::at(entry, ADDR))).into(),
            len: u32::from_ne_bytes(self.area.read(Self::at(entry, LEN))).into(),
            id: self.get16(Self::at(entry, ID)).into(),
            flags: self.get16(Self::at(entry, FLAGS)).into(),
        }
    }

    /// A ring descriptor was read; it belongs to the request that is being taken.
    pub(in super::super) fn took(&mut self, desc: &PackedDesc) {
        if let Some(entry) = self.free.pop() {
            self.put16(Self::at(entry, ID), desc.id.get());
            self.put16(Self::at(entry, FLAGS), desc.flags.get());
            self.area
                .write(Self::at(entry, LEN), &desc.len.get().to_ne_bytes());
            self.area
                .write(Self::at(entry, ADDR), &desc.addr.get().to_ne_bytes());
            self.taken.push(entry);
        }
    }

    /// A request was taken off the ring, with the descriptors of which [`took`](Self::took) was told; its head.
    pub(in super::super) fn popped(&mut self) -> u16 {
        let (Some(&head), Some(&last)) = (self.taken.first(), self.taken.last()) else {
            return 0;
        };
        for pair in self.taken.windows(2) {
            if let [entry, next] = *pair {
                self.put16(Self::at(entry, NEXT), next);
            }
        }
        self.put16(Self::at(head, LAST), last);
        self.put16(Self::at(head, COUNT), self.taken.len() as u16);
        self.order = self.order.wrapping_add(1);
        self.area
            .write(Self::at(head, ORDER), &self.order.to_ne_bytes());
        self.taken.clear();
        compiler_fence(Ordering::SeqCst);
        #[cfg(test)]
        if fate::has_rarely(Bug::EntrySkipped) {
            return head;
        }
        self.set_in_flight(head, true);
        compiler_fence(Ordering::SeqCst);
        head
    }

    /// A request's used descriptor is written; the ring then stands at `used`.
    pub(in super::super) fn staged(&mut self, head: u16, used: u16) {
        if head >= self.size || self.batch.len() >= usize::from(self.size) {
            return;
        }
        let last = self
            .get16(Self::at(head, LAST))
            .min(self.size.saturating_sub(1));
        self.put16(Self::at(last, NEXT), self.get16(BATCH));
        compiler_fence(Ordering::SeqCst);
        self.put16(BATCH, head);
        self.put16(USED, used);
        compiler_fence(Ordering::SeqCst);
        self.batch.push(head);
        #[cfg(test)]
        if fate::has(Bug::ClearedEarly) {
            self.set_in_flight(head, false);
        }
    }

    /// The driver has been shown the used descriptors up to `used`.
    pub(in super::super) fn published(&mut self, used: u16) {
        compiler_fence(Ordering::SeqCst);
        for &head in &self.batch {
            self.set_in_flight(head, false);
        }
        compiler_fence(Ordering::SeqCst);
        self.put16(OLD_USED, used);
        while let Some(head) = self.batch.pop() {
            let count = self.get16(Self::at(head, COUNT)).min(self.size);
            let mut entry = head;
            for _ in 0..count {
                if entry >= self.size || self.free.len() >= usize::from(self.size) {
                    break;
                }
                self.free.push(entry);
                entry = self.get16(Self::at(entry, NEXT));
            }
        }
    }
}
