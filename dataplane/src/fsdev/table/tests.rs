use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;

use super::{Missing, Probe, Record, Table};
use zerocopy::FromBytes;

/// Remembers, in place of closing, how often each of its descriptors was retired.
#[derive(FromBytes)]
#[repr(C)]
struct Counted {
    key: AtomicU64,
    retired: AtomicU64,
}

impl Record for Counted {
    fn retire(&self, _: i32) {
        self.retired.fetch_add(1, Relaxed);
    }
}

fn table(capacity: u32) -> Table<Counted> {
    Table::new(capacity, capacity).unwrap()
}

#[test]
fn ids_begin_with_one_and_are_refused_before_and_after_their_life() {
    let t = table(4);
    assert_eq!(t.pin(1).err(), Some(Missing::Never));
    let first = t.reserve().unwrap().publish(Some(7));
    let id = first.id();
    assert_eq!((id, first.fd()), (1, Some(7)));
    for invented in [0, 2, 5, 1 << 32, u64::MAX] {
        assert!(t.pin(invented).is_err(), "{invented}");
    }
    first.kill();
    assert_eq!(t.pin(id).err(), Some(Missing::Gone));
    assert_eq!(first.record().retired.load(Relaxed), 0);
    drop(first);
    let second = t.reserve().unwrap().publish(None);
    assert_eq!(second.id() as u32, 1);
    assert_ne!(second.id(), id);
    assert_eq!(second.record().retired.load(Relaxed), 1);
    assert_eq!(t.pin(id).err(), Some(Missing::Gone));
}

#[test]
fn a_full_table_takes_no_more_and_recovers() {
    let t = table(3);
    let kept: Vec<_> = (0..3).map(|_| t.reserve().unwrap().publish(None)).collect();
    assert!(t.reserve().is_none());
    for pin in &kept {
        assert!(pin.kill());
        assert!(!pin.kill());
    }
    assert!(t.reserve().is_none(), "still pinned");
    drop(kept);
    assert_eq!(t.live(), 0);
    let again: Vec<_> = (0..3).map(|_| t.reserve().unwrap()).collect();
    assert!(t.reserve().is_none());
    drop(again);
    assert!(t.reserve().is_some());
}

#[test]
fn a_chilled_descriptor_is_retired_by_the_last_user_and_can_be_replaced() {
    let t = table(1);
    let a = t.reserve().unwrap().publish(Some(0));
    let b = t.pin(a.id()).unwrap();
    a.chill();
    assert_eq!(b.fd(), Some(0));
    drop(a);
    assert_eq!(b.record().retired.load(Relaxed), 0);
    let (id, record) = (b.id(), b.record());
    drop(b);
    assert_eq!(record.retired.load(Relaxed), 1);
    let c = t.pin(id).unwrap();
    assert_eq!(c.fd(), None);
    assert!(c.install(9));
    assert!(!c.install(10));
    drop(c);
    assert_eq!(t.pin(id).unwrap().fd(), Some(9));
}

#[test]
fn the_clock_sees_use_once() {
    let t = table(1);
    let a = t.reserve().unwrap().publish(Some(3));
    let id = a.id();
    assert_eq!(t.probe(id), Probe::InUse);
    drop(a);
    assert_eq!(t.probe(id), Probe::Idle);
    drop(t.pin(id).unwrap());
    assert_eq!(t.probe(id), Probe::InUse);
    assert_eq!(t.probe(id), Probe::Idle);
    t.pin_quietly(id).unwrap().chill();
    assert_eq!(t.probe(id), Probe::Cold);
}

#[test]
fn chains_find_what_was_linked_and_nothing_else() {
    let t: Table<Counted> = Table::new(64, 4).unwrap();
    let pins: Vec<_> = (0..64u64)
        .map(|key| {
            let vacant = t.reserve().unwrap();
            vacant.record().key.store(key, Relaxed);
            let pin = vacant.publish(None);
            t.lock(key).link(&pin);
            pin
        })
        .collect();
    let find = |key| {
        let shard = t.lock(key);
        shard.find(|r| r.key.load(Relaxed) == key).map(|l| l.id())
    };
    for (key, pin) in pins.iter().enumerate().filter(|(key, _)| key % 3 == 0) {
        let shard = t.lock(key as u64);
        assert!(shard.remove(pin));
        assert!(!shard.unlink(pin));
    }
    for (key, pin) in pins.iter().enumerate() {
        let expected = (key % 3 != 0).then(|| pin.id());
        assert_eq!(find(key as u64), expected);
    }
}

#[test]
fn threads_that_pin_kill_and_reuse_retire_every_descriptor_once() {
    const ROUNDS: u64 = 20_000;
    let t = table(8);
    let latest = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..ROUNDS {
                    let Some(vacant) = t.reserve() else { continue };
                    vacant.record().key.fetch_add(1, Relaxed);
                    let pin = vacant.publish(Some(5));
                    latest.store(pin.id(), Relaxed);
                    assert!(pin.kill());
                }
            });
        }
        scope.spawn(|| {
            for _ in 0..ROUNDS {
                if let Ok(pin) = t.pin(latest.load(Relaxed)) {
                    assert_eq!(pin.fd(), Some(5));
                }
            }
        });
    });
    assert_eq!(t.live(), 0);
    // Each record has counted its own lives.
    let slots: Vec<_> = (0..8).map_while(|_| t.reserve()).collect();
    let sums = slots.iter().fold((0, 0), |(lives, retired), v| {
        let r = v.record();
        (
            lives + r.key.load(Relaxed),
            retired + r.retired.load(Relaxed),
        )
    });
    assert_eq!(sums.0, sums.1);
}
