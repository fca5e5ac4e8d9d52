use proptest::prelude::*;

use super::super::spec::DescFlags;
use super::super::testmem::{Buf, Driver, Ram};
use super::*;

fn queue(driver: &Driver) -> Queue {
    Queue::new(driver.config.clone(), &driver.ram.map(), None).unwrap()
}

fn both() -> [Driver; 2] {
    [false, true].map(|packed| Driver::new(Ram::simple(), 8, packed, false))
}

fn readable(addr: u64, len: u32) -> Buf {
    Buf {
        addr,
        len,
        write: false,
    }
}

fn writable(addr: u64, len: u32) -> Buf {
    Buf {
        addr,
        len,
        write: true,
    }
}

/// Pops the next request, which must be there.
fn pop(queue: &mut Queue, chain: &mut Chain) -> Popped {
    queue.pop(chain).unwrap().expect("a request")
}

fn complete(queue: &mut Queue, popped: Popped, written: u32) {
    queue.push_used(popped.head, written);
}

fn bytes(queue: &Queue, chain: &Chain) -> Vec<u8> {
    let mut out = vec![0; chain.readable(queue.map()).len()];
    chain.readable(queue.map()).read(&mut out);
    out
}

#[test]
fn an_event_is_wanted_exactly_when_it_lies_between_old_and_new() {
    for old in [0u16, 1, 5, 32767, 65530, 65535] {
        for n in 0u16..=9 {
            let new = old.wrapping_add(n);
            for event in 0..=u16::MAX {
                let inside = event.wrapping_sub(old) < n;
                assert_eq!(need_event(event, new, old), inside, "{event} {new} {old}");
            }
        }
    }
}

#[test]
fn a_request_goes_to_the_device_and_back_in_both_formats() {
    for mut driver in both() {
        let a = driver.ram.alloc(64);
        driver.ram.write(a, b"hello, device");
        let mut queue = queue(&driver);
        let mut chain = Chain::new();
        assert!(!queue.has_work());
        assert!(queue.pop(&mut chain).unwrap().is_none());
        let id = driver.add(
            &[readable(a, 7), readable(a + 7, 6), writable(a + 32, 8)],
            3,
        );
        assert!(queue.has_work());
        let popped = pop(&mut queue, &mut chain);
        assert_eq!(popped.fault, None);
        assert_eq!(queue.in_flight(), 1);
        assert_eq!(bytes(&queue, &chain), b"hello, device");
        assert_eq!(chain.writable(queue.map()).write(b"hello, driver"), 8);
        complete(&mut queue, popped, 8);
        assert_eq!(driver.take_used(), None, "not published yet");
        assert!(queue.publish());
        assert!(!queue.publish(), "nothing new to publish");
        assert_eq!(driver.take_used(), Some((id, 8)));
        assert_eq!(driver.ram.read(a + 32, 8), b"hello, d");
        assert_eq!(queue.in_flight(), 0);
    }
}

#[test]
fn neighbouring_buffers_become_one_piece() {
    for mut driver in both() {
        let a = driver.ram.alloc(64);
        let mut queue = queue(&driver);
        let mut chain = Chain::new();
        driver.add(
            &[readable(a, 16), readable(a + 16, 16), writable(a + 32, 16)],
            1,
        );
        let popped = pop(&mut queue, &mut chain);
        assert_eq!(chain.readable(queue.map()).iter().count(), 1);
        assert_eq!(chain.writable(queue.map()).iter().count(), 1);
        complete(&mut queue, popped, 0);
    }
}

#[test]
fn a_chain_shows_nothing_through_a_map_that_did_not_translate_it() {
    let mut driver = both().into_iter().next().unwrap();
    let a = driver.ram.alloc(64);
    let mut queue = queue(&driver);
    let mut chain = Chain::new();
    driver.add(&[readable(a, 16)], 1);
    let popped = pop(&mut queue, &mut chain);
    let other = driver.ram.map();
    assert!(chain.readable(&other).is_empty());
    chain.retranslate(&other).unwrap();
    assert_eq!(chain.readable(&other).len(), 16);
    assert!(chain.readable(queue.map()).is_empty());
    complete(&mut queue, popped, 0);
}

#[test]
fn a_buffer_may_cross_regions_but_not_leave_memory() {
    for packed in [false, true] {
        let ram = Ram::new(&[(0x1_0000, 0x1_0000), (0x2_0000, 0x1000)]);
        let mut driver = Driver::new(ram, 8, packed, false);
        driver.ram.write(0x1_fffc, b"abcd");
        driver.ram.write(0x2_0000, b"efgh");
        let reply = driver.ram.alloc(16);
        let mut queue = queue(&driver);
        let mut chain = Chain::new();
        driver.add(&[readable(0x1_fffc, 8)], 1);
        let popped = pop(&mut queue, &mut chain);
        assert_eq!(popped.fault, None);
        assert_eq!(bytes(&queue, &chain), b"abcdefgh");
        complete(&mut queue, popped, 0);

        driver.add(&[readable(0x2_0ffc, 8), writable(reply, 16)], 2);
        let popped = pop(&mut queue, &mut chain);
        assert!(matches!(
            popped.fault,
            Some(ChainFault::Memory(Fault::Unmapped { .. }))
        ));
        assert_eq!(chain.readable(queue.map()).len(), 4);
        assert_eq!(chain.writable(queue.map()).len(), 16);
        complete(&mut queue, popped, 16);

        driver.add(&[writable(reply, 16), writable(0x100, 4)], 2);
        let popped = pop(&mut queue, &mut chain);
        assert!(popped.fault.is_some());
        assert_eq!(chain.writable(queue.map()).len(), 16);
        complete(&mut queue, popped, 16);
        assert!(!queue.failed());
        assert!(queue.publish());
        assert_eq!(core::iter::from_fn(|| driver.take_used()).count(), 3);
    }
}

#[test]
fn a_lost_indirect_table_fails_its_request_only() {
    let mut driver = Driver::new(Ram::simple(), 8, false, false);
    let mut queue = queue(&driver);
    let mut chain = Chain::new();
    let head = driver.add(&[readable(0x100, 32)], 1);
    let at = driver.config.desc.0 + 16 * u64::from(head);
    driver.ram.put16(at + 12, DescFlags::INDIRECT.bits());
    let popped = pop(&mut queue, &mut chain);
    assert!(popped.fault.is_some());
    assert!(chain.ranges().0.is_empty());
    complete(&mut queue, popped, 0);
    assert!(!queue.failed());
}

type Damage = Box<dyn FnOnce(&mut Driver)>;

/// Makes a request of two readable buffers available and then damages the ring.
fn broken(packed: bool, damage: impl FnOnce(&mut Driver)) -> QueueError {
    let mut driver = Driver::new(Ram::simple(), 8, packed, false);
    let a = driver.ram.alloc(64);
    let mut queue = queue(&driver);
    let mut chain = Chain::new();
    driver.add(&[readable(a, 8), readable(a, 8)], 2);
    damage(&mut driver);
    let error = queue.pop(&mut chain).unwrap_err();
    assert!(queue.failed());
    assert!(!queue.has_work());
    assert!(!queue.enable_kicks());
    assert!(queue.pop(&mut chain).unwrap().is_none(), "reported twice");
    error
}

fn set_flags(driver: &Driver, index: u64, flags: u16) {
    driver
        .ram
        .put16(driver.config.desc.0 + 16 * index + 12, flags);
}

fn set_len(driver: &Driver, index: u64, len: u32) {
    driver
        .ram
        .write(driver.config.desc.0 + 16 * index + 8, &len.to_le_bytes());
}

#[test]
fn each_way_to_break_a_split_ring_is_named_and_reported_once() {
    use QueueError::*;
    let next = |d: &Driver, i: u64, n: u16| d.ram.put16(d.config.desc.0 + 16 * i + 14, n);
    let cases: Vec<(Damage, QueueError)> = vec![
        (
            Box::new(|d| d.ram.put16(d.config.avail.0 + 2, 9)),
            AvailIndex {
                idx: 9,
                next: 0,
                size: 8,
            },
        ),
        (
            Box::new(|d| d.ram.put16(d.config.avail.0 + 2, 0xffff)),
            AvailIndex {
                idx: 0xffff,
                next: 0,
                size: 8,
            },
        ),
        (
            Box::new(|d| d.ram.put16(d.config.avail.0 + 4, 8)),
            DescIndex {
                index: 8,
                entries: 8,
            },
        ),
        (
            Box::new(move |d| next(d, 0, 800)),
            DescIndex {
                index: 800,
                entries: 8,
            },
        ),
        (Box::new(move |d| next(d, 0, 0)), Loop { head: 0 }),
        (Box::new(|d| set_flags(d, 0, 4 | 1)), IndirectNext),
        (
            Box::new(|d| {
                set_flags(d, 0, 4);
                set_len(d, 0, 0);
            }),
            IndirectLength { len: 0 },
        ),
        (
            Box::new(|d| {
                set_flags(d, 0, 4);
                set_len(d, 0, 24);
            }),
            IndirectLength { len: 24 },
        ),
        (Box::new(|d| set_flags(d, 0, 2 | 1)), ReadableAfterWritable),
        (
            Box::new(|d| {
                set_len(d, 0, u32::MAX);
                set_len(d, 1, 1);
            }),
            ChainTooLarge,
        ),
        (
            // The table is the descriptor ring itself, whose first entry is indirect.
            Box::new(|d| {
                d.ram.write(d.config.desc.0, &d.config.desc.0.to_le_bytes());
                set_len(d, 0, 32);
                set_flags(d, 0, 4);
            }),
            IndirectNested,
        ),
    ];
    for (damage, want) in cases {
        assert_eq!(broken(false, damage), want);
    }
}

#[test]
fn each_way_to_break_a_packed_ring_is_named_and_reported_once() {
    use QueueError::*;
    let flags = |d: &Driver, i: u64, f: u16| d.ram.put16(d.config.desc.0 + 16 * i + 14, f);
    let avail = DescFlags::AVAIL.bits();
    let cases: Vec<(Damage, QueueError)> = vec![
        (
            Box::new(move |d| (0..8).for_each(|i| flags(d, i, avail | 1))),
            Overcommitted { size: 8 },
        ),
        (Box::new(move |d| flags(d, 0, avail | 5)), IndirectNext),
        (
            Box::new(move |d| flags(d, 0, avail | 3)),
            ReadableAfterWritable,
        ),
        (
            Box::new(move |d| {
                set_len(d, 0, 8);
                flags(d, 0, avail | 4);
            }),
            IndirectLength { len: 8 },
        ),
    ];
    for (damage, want) in cases {
        assert_eq!(broken(true, damage), want);
    }
}

#[test]
fn an_indirect_table_needs_the_feature_and_room_in_a_chain() {
    for packed in [false, true] {
        let mut driver = Driver::new(Ram::simple(), 8, packed, false);
        let a = driver.ram.alloc(16);
        let mut chain = Chain::new();
        driver.add(&[readable(a, 1); 1024], 0);
        driver.add(&[readable(a, 1); 1025], 0);
        let mut queue = queue(&driver);
        let popped = pop(&mut queue, &mut chain);
        assert_eq!(chain.readable(queue.map()).len(), 1024);
        assert_eq!(queue.pop(&mut chain).unwrap_err(), QueueError::ChainTooLong);
        assert!(chain.ranges().0.is_empty());
        complete(&mut queue, popped, 0);

        driver.config.indirect = false;
        let mut queue = Queue::new(driver.config.clone(), &driver.ram.map(), None).unwrap();
        assert_eq!(
            queue.pop(&mut chain).unwrap_err(),
            QueueError::IndirectNotNegotiated
        );
    }
}

#[test]
fn what_is_in_flight_can_be_given_back_after_the_ring_broke() {
    for mut driver in both() {
        let a = driver.ram.alloc(16);
        let mut queue = queue(&driver);
        let mut chain = Chain::new();
        let id = driver.add(&[writable(a, 16)], 1);
        let popped = pop(&mut queue, &mut chain);
        driver.add(&[writable(a, 8), readable(a, 8)], 2);
        assert!(queue.pop(&mut chain).is_err());
        complete(&mut queue, popped, 16);
        assert!(queue.publish());
        assert_eq!(driver.take_used(), Some((id, 16)));
    }
}

#[test]
fn a_head_made_available_twice_breaks_a_split_ring() {
    let mut driver = Driver::new(Ram::simple(), 8, false, false);
    let a = driver.ram.alloc(16);
    let mut queue = queue(&driver);
    let mut chain = Chain::new();
    let head = driver.add(&[readable(a, 1)], 1);
    driver.offer_split(head);
    let first = pop(&mut queue, &mut chain);
    assert_eq!(
        queue.pop(&mut chain).unwrap_err(),
        QueueError::HeadInFlight { head }
    );
    complete(&mut queue, first, 0);
}

#[test]
fn a_queue_of_a_bad_size_or_position_or_out_of_memory_does_not_start() {
    let driver = Driver::new(Ram::simple(), 8, false, false);
    let map = driver.ram.map();
    let start = |change: &dyn Fn(&mut QueueConfig)| {
        let mut config = driver.config.clone();
        change(&mut config);
        Queue::new(config, &map, None).err()
    };
    for size in [0, 7, 12, 2048] {
        assert_eq!(start(&|c| c.size = size), Some(QueueError::Size { size }));
    }
    assert_eq!(start(&|_| ()), None);
    let misplaced = [
        start(&|c| c.desc = Iova(0)),
        start(&|c| c.desc.0 += 8),
        start(&|c| c.avail = Iova(u64::MAX - 1)),
        start(&|c| c.used = Iova((0x10_0000 + (1 << 20)) - 8)),
    ];
    for error in misplaced {
        assert!(matches!(error, Some(QueueError::Ring(_))), "{error:?}");
    }
    let packed = |avail, used| {
        start(&|c| {
            c.packed = true;
            c.state.avail = avail;
            c.state.used = used;
        })
    };
    assert_eq!(packed(0x8000, 0x8000), None);
    assert_eq!(packed(0x0000, 0x8000), None, "a full ring");
    for (avail, used) in [(0x8008, 0x8000), (0x8000, 0x8001), (0x0001, 0x8000)] {
        assert!(packed(avail, used).is_some(), "{avail:#x} {used:#x}");
    }
}

#[test]
fn interrupts_follow_the_flags_and_the_event_index() {
    for packed in [false, true] {
        for event_idx in [false, true] {
            let mut driver = Driver::new(Ram::simple(), 4, packed, event_idx);
            let a = driver.ram.alloc(16);
            let mut queue = queue(&driver);
            let mut chain = Chain::new();
            let mut turn = |driver: &mut Driver, n: u16| {
                for _ in 0..n {
                    driver.add(&[writable(a, 16)], 1);
                    let popped = pop(&mut queue, &mut chain);
                    complete(&mut queue, popped, 1);
                }
                let interrupt = queue.publish();
                while driver.take_used().is_some() {}
                interrupt
            };
            // Enough turns to go round the ring several times.
            for _ in 0..9 {
                if event_idx {
                    driver.want_event(0);
                    assert!(turn(&mut driver, 1));
                    driver.want_event(1);
                    assert!(!turn(&mut driver, 1));
                    assert!(turn(&mut driver, 1));
                    driver.want_event(2);
                    assert!(turn(&mut driver, 3));
                    driver.want_event(3);
                    assert!(!turn(&mut driver, 3));
                } else {
                    driver.set_interrupts(true);
                    assert!(turn(&mut driver, 3));
                    driver.set_interrupts(false);
                    assert!(!turn(&mut driver, 2));
                }
            }
        }
    }
}

#[test]
fn kicks_are_asked_for_without_losing_a_request() {
    for packed in [false, true] {
        for event_idx in [false, true] {
            let mut driver = Driver::new(Ram::simple(), 4, packed, event_idx);
            let a = driver.ram.alloc(16);
            let mut queue = queue(&driver);
            let mut chain = Chain::new();
            for _ in 0..9 {
                assert!(!queue.enable_kicks());
                driver.add(&[writable(a, 16)], 1);
                assert!(driver.must_kick(1), "the first request after arming");
                assert!(queue.enable_kicks(), "a request is there already");
                queue.disable_kicks();
                let popped = pop(&mut queue, &mut chain);
                complete(&mut queue, popped, 0);
                driver.add(&[writable(a, 16)], 1);
                driver.add(&[writable(a, 16)], 1);
                if !event_idx || packed {
                    assert!(!driver.must_kick(2), "polling needs no kicks");
                }
                for _ in 0..2 {
                    let popped = pop(&mut queue, &mut chain);
                    complete(&mut queue, popped, 0);
                }
                let _ = queue.publish();
                while driver.take_used().is_some() {}
            }
        }
    }
}

#[test]
fn a_request_put_back_comes_first_in_the_next_run_even_when_others_overtook_it() {
    for mut driver in both() {
        let a = driver.ram.alloc(64);
        driver.ram.write(a, b"lock");
        let map = driver.ram.map();
        let mut first = queue(&driver);
        let mut chain = Chain::new();
        let lock = driver.add(&[readable(a, 4), writable(a + 16, 16)], 2);
        let waiting = pop(&mut first, &mut chain);
        let mut other = Chain::new();
        // Others overtake the waiting one; in a packed ring their used entries overwrite its descriptors.
        for _ in 0..3 {
            driver.add(&[writable(a + 32, 4)], 1);
            let popped = pop(&mut first, &mut other);
            complete(&mut first, popped, 4);
            assert!(first.publish());
            assert!(driver.take_used().is_some());
        }
        first.requeue(waiting.head, &chain);
        assert_eq!(first.in_flight(), 0);
        assert!(first.has_work());
        let mut config = driver.config.clone();
        config.state = first.into_state();
        assert_eq!(config.state.parked.len(), 1);

        let mut second = Queue::new(config, &map, None).unwrap();
        let next = driver.add(&[readable(a, 1)], 1);
        assert!(second.has_work());
        let popped = pop(&mut second, &mut chain);
        assert_eq!(bytes(&second, &chain), b"lock");
        assert_eq!(chain.writable(second.map()).len(), 16);
        complete(&mut second, popped, 16);
        let popped = pop(&mut second, &mut chain);
        complete(&mut second, popped, 0);
        assert!(second.publish());
        assert_eq!(driver.take_used(), Some((lock, 16)));
        assert_eq!(driver.take_used(), Some((next, 0)));
        assert!(second.into_state().parked.is_empty());
    }
}

#[test]
fn a_queue_follows_its_memory_and_fails_when_the_rings_leave_it() {
    for mut driver in both() {
        let a = driver.ram.alloc(16);
        let mut queue = queue(&driver);
        let mut chain = Chain::new();
        let first = driver.add(&[writable(a, 16)], 1);
        let popped = pop(&mut queue, &mut chain);
        let map = driver.ram.map();
        queue.remap(&map).unwrap();
        chain.retranslate(queue.map()).unwrap();
        assert_eq!(chain.writable(queue.map()).len(), 16);
        complete(&mut queue, popped, 16);
        let second = driver.add(&[writable(a, 16)], 1);
        let popped = pop(&mut queue, &mut chain);
        complete(&mut queue, popped, 16);
        assert!(queue.publish());
        assert_eq!(driver.take_used(), Some((first, 16)));
        assert_eq!(driver.take_used(), Some((second, 16)));

        driver.add(&[writable(a, 16)], 1);
        let popped = pop(&mut queue, &mut chain);
        let elsewhere = Ram::new(&[(0x9000_0000, 4096)]).map();
        assert!(matches!(queue.remap(&elsewhere), Err(QueueError::Ring(_))));
        assert!(queue.failed());
        complete(&mut queue, popped, 16);
        assert!(!queue.publish());
        assert_eq!(driver.take_used(), None, "the old memory is not touched");
        assert!(queue.pop(&mut chain).unwrap().is_none());
    }
}

#[test]
fn a_ring_runs_on_past_the_wrap_of_its_indexes() {
    for mut driver in both() {
        let a = driver.ram.alloc(16);
        let mut queue = queue(&driver);
        let mut chain = Chain::new();
        for i in 0..70_000u32 {
            let bufs = [writable(a, 4), writable(a, 4), writable(a, 4)];
            let n = 1 + (i % 3) as usize;
            let id = driver.add(&bufs[..n], n);
            let popped = pop(&mut queue, &mut chain);
            complete(&mut queue, popped, i);
            let _ = queue.publish();
            assert_eq!(driver.take_used(), Some((id, i)));
        }
    }
}

#[derive(Clone, Debug)]
struct Plan {
    readable: Vec<u16>,
    writable: Vec<u16>,
    direct: usize,
    /// Complete this many of those in flight afterwards, the newest first.
    complete: usize,
}

fn plan() -> impl Strategy<Value = Plan> {
    let lens = || proptest::collection::vec(0u16..300, 0..6);
    (lens(), lens(), 0usize..8, 0usize..4).prop_map(|(readable, writable, direct, complete)| Plan {
        readable,
        writable,
        direct,
        complete,
    })
}

/// Runs the plans and tells what the device saw and what the driver got back.
fn run(plans: &[Plan], packed: bool) -> (Vec<(Vec<Range>, usize)>, Vec<u32>) {
    let mut driver = Driver::new(Ram::simple(), 16, packed, false);
    let data = driver.ram.alloc(8192);
    let mut queue = queue(&driver);
    let mut chain = Chain::new();
    let (mut seen, mut lens) = (Vec::new(), Vec::new());
    let mut held = Vec::new();
    for (n, plan) in plans.iter().enumerate() {
        let mut at = data;
        let mut bufs = Vec::new();
        for (list, write) in [(&plan.readable, false), (&plan.writable, true)] {
            for &len in list {
                let len = u32::from(len);
                bufs.push(Buf {
                    addr: at,
                    len,
                    write,
                });
                at += u64::from(len);
            }
        }
        let ring = plan.direct.min(bufs.len()) + usize::from(plan.direct < bufs.len());
        if !bufs.is_empty() && ring <= driver.room() {
            driver.add(&bufs, plan.direct);
            let popped = pop(&mut queue, &mut chain);
            assert_eq!(popped.fault, None);
            let (ranges, readable) = chain.ranges();
            seen.push((ranges.to_vec(), readable));
            held.push((popped, n as u32));
        }
        for _ in 0..plan.complete {
            if let Some((popped, n)) = held.pop() {
                complete(&mut queue, popped, n);
            }
        }
        let _ = queue.publish();
        while let Some((_, len)) = driver.take_used() {
            lens.push(len);
        }
    }
    for (popped, _) in held {
        queue.abandon(popped.head);
    }
    assert_eq!(queue.in_flight(), 0);
    (seen, lens)
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Poke { at: u16, value: u8 },
    Add,
    Pop,
    Complete,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0u16..700, any::<u8>()).prop_map(|(at, value)| Step::Poke { at, value }),
        1 => Just(Step::Add),
        2 => Just(Step::Pop),
        1 => Just(Step::Complete),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn split_and_packed_rings_carry_the_same_requests(
        plans in proptest::collection::vec(plan(), 1..40)
    ) {
        prop_assert_eq!(run(&plans, false), run(&plans, true));
    }

    #[test]
    fn a_hostile_ring_neither_panics_nor_leads_outside_memory(
        packed: bool,
        event_idx: bool,
        steps in proptest::collection::vec(step(), 1..120)
    ) {
        let mut driver = Driver::new(Ram::new(&[(0, 1 << 16)]), 16, packed, event_idx);
        let rings = driver.config.desc.0;
        let data = driver.ram.alloc(64);
        let mut queue = queue(&driver);
        let mut chain = Chain::new();
        let mut held = Vec::new();
        let mut errors = 0;
        for step in steps {
            match step {
                Step::Poke { at, value } => driver.ram.write(rings + u64::from(at), &[value]),
                Step::Add if driver.room() > 1 => {
                    driver.add(&[readable(data, 8), writable(data, 8)], 1);
                }
                Step::Add => {}
                Step::Pop => match queue.pop(&mut chain) {
                    Ok(Some(popped)) => {
                        // Every byte that a chain shows can be read and written.
                        let n = chain.readable(queue.map()).len();
                        let mut buf = vec![0; n.min(1 << 16)];
                        chain.readable(queue.map()).read(&mut buf);
                        for (base, len) in chain.writable(queue.map()).iter() {
                            prop_assert!(len <= 1 << 16, "{base:?}");
                        }
                        held.push(popped);
                    }
                    Ok(None) => {}
                    Err(_) => errors += 1,
                },
                Step::Complete => {
                    if let Some(popped) = held.pop() {
                        complete(&mut queue, popped, 1);
                        let _ = queue.publish();
                        let _ = queue.enable_kicks();
                        queue.disable_kicks();
                    }
                }
            }
            prop_assert!(queue.in_flight() <= 16);
        }
        prop_assert!(errors <= 1);
        for popped in held {
            queue.abandon(popped.head);
        }
    }
}
