//! vhost-user's record of requests in flight: here for split rings, in [`packed`] for packed ones.
//!
//! It lies in memory that the front end keeps, so that a back end that starts after a crash learns which requests were popped
//! and never given back. Layout and order of the writes are those of the protocol ("Inflight I/O tracking"). The front end
//! could write to it at any time: nothing in it is believed beyond what a broken ring could say as well.
//!
//! Numbers are in the host's byte order. The writes need only be in program order, for the reader comes after this process;
//! compiler fences see to that.

#[cfg(test)]
mod crash_tests;
mod packed;

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{Ordering, compiler_fence};

use super::area::Area;
use super::queue::QueueState;
use crate::mem::{Fault, GuestMap, Iova};
#[cfg(test)]
use crate::sim::fate::{self, Bug};

pub use packed::PackedInflight;

/// Byte offsets of the header's fields.
const VERSION: usize = 8;
const DESC_NUM: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;
const HEADER: usize = 16;
/// Byte offsets within a descriptor's entry.
const INFLIGHT: usize = 0;
const NEXT: usize = 6;
const COUNTER: usize = 8;
const ENTRY: usize = 16;

/// Bytes that the record of one queue takes; each begins on a cache line.
pub fn queue_record_len(queue_size: u16, packed: bool) -> usize {
    if packed {
        return packed::queue_record_len(queue_size);
    }
    usize::from(queue_size)
        .saturating_mul(ENTRY)
        .saturating_add(HEADER)
        .next_multiple_of(64)
}

/// The part of the in-flight record that belongs to one queue, in its ring's format.
#[derive(Clone, Debug)]
pub enum Inflight {
    /// Of a split ring.
    Split(InflightQueue),
    /// Of a packed ring.
    Packed(PackedInflight),
}

impl Inflight {
    /// The record of queue number `index` in shared memory that `record` maps at address 0.
    pub fn new(
        record: &Arc<GuestMap>,
        index: u16,
        queue_size: u16,
        packed: bool,
    ) -> Result<Inflight, Fault> {
        Ok(if packed {
            Inflight::Packed(PackedInflight::new(record, index, queue_size)?)
        } else {
            Inflight::Split(InflightQueue::new(record, index, queue_size)?)
        })
    }

    /// Forgets everything: the queue begins anew.
    pub fn clear(&self) {
        match self {
            Inflight::Split(record) => record.clear(),
            Inflight::Packed(record) => record.clear(),
        }
    }

    /// Where a queue goes on that an earlier process served. A split used ring stands at `used_idx`; a packed ring's record
    /// knows itself where its ring stands, and says so when the queue starts.
    pub fn resume(&mut self, queue_size: u16, used_idx: u16) -> QueueState {
        match self {
            Inflight::Split(record) => record.resume(queue_size, used_idx),
            Inflight::Packed(_) => QueueState::fresh(true),
        }
    }
}

/// The part of the in-flight record that belongs to one split queue.
#[derive(Clone, Debug)]
pub struct InflightQueue {
    area: Area,
    size: u16,
    counter: u64,
    /// Heads given back since the driver was last shown the used index.
    batch: Vec<u16>,
}

impl InflightQueue {
    fn new(record: &Arc<GuestMap>, index: u16, queue_size: u16) -> Result<InflightQueue, Fault> {
        let len = queue_record_len(queue_size, false);
        let at = (len as u64).saturating_mul(u64::from(index));
        Ok(InflightQueue {
            area: Area::new(record, Iova(at), len, 8, true)?,
            size: queue_size,
            counter: 0,
            batch: Vec::new(),
        })
    }

    fn get16(&self, at: usize) -> u16 {
        u16::from_ne_bytes(self.area.read(at))
    }

    fn put16(&self, at: usize, value: u16) {
        self.area.write(at, &value.to_ne_bytes());
    }

    fn entry(head: u16, field: usize) -> usize {
        usize::from(head)
            .saturating_mul(ENTRY)
            .saturating_add(HEADER)
            .saturating_add(field)
    }

    fn in_flight(&self, head: u16) -> bool {
        let [flag] = self.area.read(Self::entry(head, INFLIGHT));
        flag != 0
    }

    fn set_in_flight(&self, head: u16, flag: bool) {
        self.area
            .write(Self::entry(head, INFLIGHT), &[u8::from(flag)]);
    }

    fn order(&self, head: u16) -> u64 {
        u64::from_ne_bytes(self.area.read(Self::entry(head, COUNTER)))
    }

    /// Forgets everything: the queue begins anew.
    fn clear(&self) {
        self.put16(VERSION, 0);
        compiler_fence(Ordering::SeqCst);
        for head in 0..self.size {
            self.set_in_flight(head, false);
        }
        self.put16(LAST_BATCH_HEAD, 0);
        compiler_fence(Ordering::SeqCst);
    }

    /// Where a queue goes on that an earlier process served: its used ring stands at `used_idx`, and what is recorded as
    /// in flight has been popped besides.
    fn resume(&mut self, queue_size: u16, used_idx: u16) -> QueueState {
        let heads = self.recover(queue_size, used_idx).len() as u16;
        QueueState {
            avail: used_idx.wrapping_add(heads),
            used: used_idx,
            parked: Vec::new(),
        }
    }

    /// Brings the record up to date with the ring and returns the heads in flight, the oldest last.
    pub(super) fn recover(&mut self, queue_size: u16, used_idx: u16) -> Vec<u16> {
        self.size = self.size.min(queue_size);
        self.batch.clear();
        self.batch.reserve(usize::from(self.size));
        if self.get16(VERSION) == 0 {
            // New memory: zeros.
            self.put16(DESC_NUM, self.size);
            self.put16(USED_IDX, used_idx);
            self.put16(VERSION, 1);
            return Vec::new();
        }
        // The predecessor may have died after it moved the used index and before it cleared the batch's marks.
        let unfinished = used_idx.wrapping_sub(self.get16(USED_IDX)).min(self.size);
        let mut head = self.get16(LAST_BATCH_HEAD);
        for _ in 0..unfinished {
            if head >= self.size {
                break;
            }
            self.set_in_flight(head, false);
            head = self.get16(Self::entry(head, NEXT));
        }
        compiler_fence(Ordering::SeqCst);
        self.put16(USED_IDX, used_idx);

        let mut heads: Vec<u16> = (0..self.size).filter(|&h| self.in_flight(h)).collect();
        heads.sort_by_key(|&h| core::cmp::Reverse(self.order(h)));
        self.counter = heads.first().map_or(0, |&h| self.order(h));
        heads
    }

    /// A request was taken off the ring.
    pub(super) fn popped(&mut self, head: u16) {
        if head >= self.size || self.in_flight(head) {
            return;
        }
        #[cfg(test)]
        if fate::has_rarely(Bug::EntrySkipped) {
            return;
        }
        self.counter = self.counter.wrapping_add(1);
        self.area
            .write(Self::entry(head, COUNTER), &self.counter.to_ne_bytes());
        compiler_fence(Ordering::SeqCst);
        self.set_in_flight(head, true);
        compiler_fence(Ordering::SeqCst);
    }

    /// A request's used entry is written.
    pub(super) fn staged(&mut self, head: u16) {
        if head >= self.size || self.batch.len() >= usize::from(self.size) {
            return;
        }
        self.put16(Self::entry(head, NEXT), self.get16(LAST_BATCH_HEAD));
        compiler_fence(Ordering::SeqCst);
        self.put16(LAST_BATCH_HEAD, head);
        compiler_fence(Ordering::SeqCst);
        self.batch.push(head);
        #[cfg(test)]
        if fate::has(Bug::ClearedEarly) {
            self.set_in_flight(head, false);
        }
    }

    /// The driver has been shown the used entries up to `used_idx`.
    pub(super) fn published(&mut self, used_idx: u16) {
        compiler_fence(Ordering::SeqCst);
        for &head in &self.batch {
            self.set_in_flight(head, false);
        }
        self.batch.clear();
        compiler_fence(Ordering::SeqCst);
        self.put16(USED_IDX, used_idx);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::chain::Chain;
    use crate::virtio::queue::{Queue, QueueState};
    use crate::virtio::testmem::{Buf, Driver, Ram};

    const SIZE: u16 = 8;

    struct Rig {
        driver: Driver,
        record: Ram,
        buf: Buf,
    }

    impl Rig {
        fn new() -> Rig {
            let mut driver = Driver::new(Ram::simple(), SIZE, false, false);
            let addr = driver.ram.alloc(16);
            Rig {
                driver,
                record: Ram::new(&[(0, 4096)]),
                buf: Buf {
                    addr,
                    len: 16,
                    write: true,
                },
            }
        }

        /// A back end that starts as the front end tells it after a reconnection: at the used index.
        fn start(&self, avail: u16) -> Queue {
            let mut config = self.driver.config.clone();
            config.state = QueueState {
                avail,
                used: self.driver.ram.get16(config.used.0 + 2),
                parked: Vec::new(),
            };
            let record = InflightQueue::new(&self.record.map(), 1, SIZE).unwrap();
            Queue::new(
                config,
                &self.driver.ram.map(),
                Some(Inflight::Split(record)),
            )
            .unwrap()
        }
    }

    fn pop(queue: &mut Queue) -> crate::virtio::queue::Popped {
        queue.pop(&mut Chain::new()).unwrap().unwrap()
    }

    #[test]
    fn what_a_dead_back_end_had_popped_is_popped_again_in_the_same_order() {
        let mut rig = Rig::new();
        let mut queue = rig.start(0);
        let heads: Vec<u16> = (0..4).map(|_| rig.driver.add(&[rig.buf], 1)).collect();
        let mut popped: Vec<_> = (0..3).map(|_| pop(&mut queue)).collect();
        queue.push_used(popped.remove(1).head, 1);
        assert!(queue.publish());
        assert_eq!(rig.driver.take_used(), Some((heads[1], 1)));
        // It dies here, with the first and the third in flight and the fourth in the ring.
        let mut queue = rig.start(3);
        assert!(queue.has_work());
        for &want in [heads[0], heads[2], heads[3]].iter() {
            let popped = pop(&mut queue);
            assert_eq!(popped.head.id, want);
            queue.push_used(popped.head, 2);
        }
        assert!(!queue.has_work());
        assert!(queue.publish());
        assert_eq!(core::iter::from_fn(|| rig.driver.take_used()).count(), 3);
        assert!(!rig.start(4).has_work());
    }

    #[test]
    fn a_queue_goes_on_where_its_record_and_its_used_ring_say() {
        let mut rig = Rig::new();
        let mut queue = rig.start(0);
        let heads: Vec<u16> = (0..4).map(|_| rig.driver.add(&[rig.buf], 1)).collect();
        let mut popped: Vec<_> = (0..3).map(|_| pop(&mut queue)).collect();
        queue.push_used(popped.remove(1).head, 1);
        assert!(queue.publish());
        let record = || InflightQueue::new(&rig.record.map(), 1, SIZE).unwrap();
        let resume = || {
            let mut config = rig.driver.config.clone();
            let used = rig.driver.ram.get16(config.used.0 + 2);
            config.state = record().resume(SIZE, used);
            let map = rig.driver.ram.map();
            Queue::new(config, &map, Some(Inflight::Split(record()))).unwrap()
        };
        // A process that dies before it has done anything changes nothing.
        drop(resume());
        let mut queue = resume();
        for &want in [heads[0], heads[2], heads[3]].iter() {
            let popped = pop(&mut queue);
            assert_eq!(popped.head.id, want);
            queue.push_used(popped.head, 2);
        }
        assert!(!queue.has_work());
        record().clear();
        assert_eq!(record().resume(SIZE, 7).avail, 7);
    }

    #[test]
    fn a_batch_that_the_driver_has_seen_is_not_run_again() {
        let mut rig = Rig::new();
        let mut queue = rig.start(0);
        let heads: Vec<u16> = (0..3).map(|_| rig.driver.add(&[rig.buf], 1)).collect();
        let popped: Vec<_> = (0..3).map(|_| pop(&mut queue)).collect();
        for popped in popped.into_iter().take(2) {
            queue.push_used(popped.head, 0);
        }
        // It dies right after it moved the used index: the marks are still there.
        let used = rig.driver.config.used.0;
        rig.driver.ram.put16(used + 2, 2);
        let mut queue = rig.start(3);
        assert_eq!(pop(&mut queue).head.id, heads[2]);
        assert!(!queue.has_work());
    }

    #[test]
    fn entries_staged_but_never_shown_are_run_again() {
        let mut rig = Rig::new();
        let mut queue = rig.start(0);
        let head = rig.driver.add(&[rig.buf], 1);
        let popped = pop(&mut queue);
        queue.push_used(popped.head, 0);
        let mut queue = rig.start(1);
        assert_eq!(pop(&mut queue).head.id, head);
    }

    #[test]
    fn a_scrambled_record_is_as_harmless_as_a_broken_ring() {
        let mut rig = Rig::new();
        rig.driver.add(&[rig.buf], 1);
        for seed in 0..=255u8 {
            let noise: Vec<u8> = (0..4096u32)
                .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8 ^ seed)
                .collect();
            rig.record.write(0, &noise);
            let mut queue = rig.start(0);
            let mut chain = Chain::new();
            for _ in 0..2 * SIZE {
                match queue.pop(&mut chain) {
                    Ok(Some(popped)) => queue.push_used(popped.head, 0),
                    Ok(None) => break,
                    Err(_) => assert!(queue.failed()),
                }
            }
            let _ = queue.publish();
        }
    }

    #[test]
    fn a_record_too_short_for_its_queues_is_refused() {
        let record = Ram::new(&[(0, 4096)]).map();
        let per_queue = queue_record_len(SIZE, false) as u64;
        let last = (4096 / per_queue - 1) as u16;
        assert!(InflightQueue::new(&record, last, SIZE).is_ok());
        assert!(InflightQueue::new(&record, last + 1, SIZE).is_err());
    }
}
