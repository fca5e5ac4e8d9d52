//! Every interleaving of a producer and a consumer, under loom's memory model.

use alloc::sync::Arc;
use alloc::vec::Vec;

use loom::sync::{Condvar, Mutex};
use loom::thread;

use super::{Consumer, Doorbell, Producer, PushError};
use crate::region::{AtomicU32, Region, RingLayout};

/// Four words: two frames of one word, so three frames wrap the ring.
const TINY: RingLayout = RingLayout::new(0, RingLayout::CONTROL_BYTES, 16);

fn ring() -> (Producer, Consumer) {
    let memory: Vec<AtomicU32> = (0..RingLayout::CONTROL_BYTES / 4 + 4)
        .map(|_| AtomicU32::new(0))
        .collect();
    let region = Region::over(Arc::new(memory));
    (
        Producer::new(region.clone(), TINY).unwrap(),
        Consumer::new(region, TINY).unwrap(),
    )
}

/// A doorbell that stays rung until somebody waits for it. One that never comes is a deadlock, which loom reports.
#[derive(Clone)]
struct Bell(Arc<(Mutex<bool>, Condvar)>);

impl Bell {
    fn new() -> Bell {
        Bell(Arc::new((Mutex::new(false), Condvar::new())))
    }

    fn answer(&self, doorbell: Doorbell) {
        if doorbell == Doorbell::Needed {
            *self.0.0.lock().unwrap() = true;
            self.0.1.notify_one();
        }
    }

    fn wait(&self) {
        let mut rung = self.0.0.lock().unwrap();
        while !*rung {
            rung = self.0.1.wait(rung).unwrap();
        }
        *rung = false;
    }
}

#[test]
fn frames_arrive_whole_and_in_order_across_the_wrap() {
    loom::model(|| {
        let (mut producer, mut consumer) = ring();
        let writer = thread::spawn(move || {
            for value in [0x0101_0101_u32, 0x0202_0202, 0x0303_0303] {
                while producer.push(&value.to_le_bytes()).is_err() {
                    thread::yield_now();
                }
            }
        });
        for value in [0x0101_0101_u32, 0x0202_0202, 0x0303_0303] {
            loop {
                if let Some((frame, _)) = consumer.pop().unwrap() {
                    assert_eq!(frame, value.to_le_bytes());
                    break;
                }
                thread::yield_now();
            }
        }
        assert!(consumer.pop().unwrap().is_none());
        writer.join().unwrap();
    });
}

#[test]
fn a_sleeping_consumer_always_gets_a_doorbell() {
    loom::model(|| {
        let (mut producer, mut consumer) = ring();
        let bell = Bell::new();
        let writer = {
            let bell = bell.clone();
            thread::spawn(move || {
                for value in [1_u8, 2] {
                    let needed = producer.push(&[value]).unwrap();
                    bell.answer(needed);
                }
            })
        };
        for value in [1_u8, 2] {
            loop {
                if let Some((frame, _)) = consumer.pop().unwrap() {
                    assert_eq!(frame, [value]);
                    break;
                }
                if consumer.prepare_sleep().unwrap() {
                    bell.wait();
                }
            }
        }
        writer.join().unwrap();
    });
}

#[test]
fn a_producer_that_met_a_full_ring_always_gets_a_doorbell() {
    loom::model(|| {
        let (mut producer, mut consumer) = ring();
        assert_eq!(producer.push(&[1]), Ok(Doorbell::Suppressed));
        assert_eq!(producer.push(&[2]), Ok(Doorbell::Suppressed));
        let bell = Bell::new();
        let reader = {
            let bell = bell.clone();
            thread::spawn(move || {
                let (frame, needed) = consumer.pop().unwrap().unwrap();
                assert_eq!(frame, [1]);
                bell.answer(needed);
                consumer
            })
        };
        loop {
            match producer.push(&[3]) {
                Ok(_) => break,
                Err(PushError::Full) => bell.wait(),
                Err(error) => panic!("{error}"),
            }
        }
        let mut consumer = reader.join().unwrap();
        assert_eq!(consumer.pop().unwrap().unwrap().0, [2]);
        assert_eq!(consumer.pop().unwrap().unwrap().0, [3]);
    });
}
