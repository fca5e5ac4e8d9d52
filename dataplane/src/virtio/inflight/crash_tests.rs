//! A back end that dies anywhere: every request is given back once, with rings of both formats.

use std::collections::BTreeMap;

use super::{Inflight, queue_record_len};
use crate::virtio::chain::Chain;
use crate::virtio::queue::{Popped, Queue};
use crate::virtio::testmem::{Buf, Driver, Ram};

const SIZE: u16 = 8;
const ROUNDS: u32 = 60;

struct Rig {
    driver: Driver,
    record: Ram,
    queue: Queue,
    held: Vec<(Popped, u64)>,
    /// What the driver waits for, by head or buffer id: where its first buffer is.
    waiting: BTreeMap<u16, u64>,
    numbers: u64,
    crashes: u32,
}

fn start(driver: &Driver, record: &Ram, resumes: bool) -> Queue {
    let mut config = driver.config.clone();
    let mut inflight = Inflight::new(&record.map(), 0, SIZE, config.packed).unwrap();
    if resumes {
        let used = driver.ram.get16(config.used.0 + 2);
        config.state = inflight.resume(SIZE, used);
    }
    Queue::new(config, &driver.ram.map(), Some(inflight)).unwrap()
}

impl Rig {
    fn new(seed: u64, packed: bool) -> Rig {
        let mut ram = Ram::new(&[(0x10_0000, 1 << 20)]);
        ram.alloc(64);
        let driver = Driver::new(ram, SIZE, packed, seed.is_multiple_of(2));
        let record = Ram::new(&[(0, 4096)]);
        let queue = start(&driver, &record, false);
        Rig {
            driver,
            record,
            queue,
            held: Vec::new(),
            waiting: BTreeMap::new(),
            numbers: seed,
            crashes: 0,
        }
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.numbers = self
            .numbers
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.numbers >> 33) % limit
    }

    fn ask(&mut self) {
        let count = 1 + self.below(4) as usize;
        if self.driver.room() < count {
            return;
        }
        let bufs: Vec<Buf> = (0..count)
            .map(|_| Buf {
                addr: self.driver.ram.alloc(16),
                len: 16,
                write: true,
            })
            .collect();
        let direct = self.below(count as u64 + 1) as usize;
        let head = self.driver.add(&bufs, direct);
        assert!(self.waiting.insert(head, bufs[0].addr).is_none());
    }

    fn pop(&mut self) {
        let mut chain = Chain::new();
        if let Some(popped) = self.queue.pop(&mut chain).unwrap() {
            let at = chain.ranges().0[0].iova.0;
            assert_eq!(self.waiting.get(&popped.head.id()), Some(&at));
            self.held.push((popped, at));
        }
    }

    fn look(&mut self) {
        while let Some((head, written)) = self.driver.take_used() {
            let at = self.waiting.remove(&head).expect("given back twice");
            assert_eq!(u64::from(written), at & 0xffff, "another request's result");
        }
    }

    /// The device does one thing, and may die in the middle of it: what it has written to the record since `behind` is lost.
    fn step(&mut self) {
        let behind = self.record.read(0, queue_record_len(SIZE, true));
        match self.below(4) {
            0 | 1 => self.pop(),
            2 if !self.held.is_empty() => {
                let which = self.below(self.held.len() as u64) as usize;
                let (popped, at) = self.held.swap_remove(which);
                self.queue.push_used(popped.head, (at & 0xffff) as u32);
            }
            _ => {
                let _ = self.queue.publish();
            }
        }
        if self.below(4) == 0 {
            if self.below(2) == 0 {
                self.record.write(0, &behind);
            }
            self.crash();
        }
        if self.below(3) == 0 {
            self.look();
        }
    }

    fn crash(&mut self) {
        self.crashes += 1;
        self.held.clear();
        // What a process that died at once has left is the same.
        drop(start(&self.driver, &self.record, true));
        self.queue = start(&self.driver, &self.record, true);
    }

    fn finish(&mut self) {
        let mut steps = 0;
        while !self.waiting.is_empty() {
            self.pop();
            while let Some((popped, at)) = self.held.pop() {
                self.queue.push_used(popped.head, (at & 0xffff) as u32);
            }
            let _ = self.queue.publish();
            self.look();
            steps += 1;
            assert!(steps < 1000, "a request is lost");
        }
        assert!(!self.queue.has_work());
    }
}

fn dies_anywhere(packed: bool) {
    let mut crashes = 0;
    for seed in 0..2000 {
        let mut rig = Rig::new(seed, packed);
        for _ in 0..ROUNDS {
            rig.ask();
            rig.step();
        }
        rig.finish();
        crashes += rig.crashes;
    }
    assert!(crashes > 1000);
}

#[test]
fn a_device_that_dies_anywhere_gives_every_request_of_a_split_ring_back_once() {
    dies_anywhere(false);
}

#[test]
fn a_device_that_dies_anywhere_gives_every_request_of_a_packed_ring_back_once() {
    dies_anywhere(true);
}

#[test]
fn a_scrambled_record_of_a_packed_ring_is_as_harmless_as_a_broken_ring() {
    for seed in 0..=255u8 {
        let mut rig = Rig::new(1, true);
        rig.ask();
        let noise: Vec<u8> = (0..4096u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8 ^ seed)
            .collect();
        rig.record.write(0, &noise);
        let config = rig.driver.config.clone();
        let inflight = Inflight::new(&rig.record.map(), 0, SIZE, true).unwrap();
        let Ok(mut queue) = Queue::new(config, &rig.driver.ram.map(), Some(inflight)) else {
            continue;
        };
        let mut chain = Chain::new();
        for _ in 0..2 * SIZE {
            match queue.pop(&mut chain) {
                Ok(Some(popped)) => queue.push_used(popped.head, 0),
                Ok(None) => break,
                Err(_) => assert!(queue.failed()),
            }
            let _ = queue.publish();
        }
    }
}
