use std::os::fd::OwnedFd;

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::*;

fn leaked(cores: usize) -> (&'static Counters, OwnedFd) {
    let (counters, file) = Counters::create(cores).unwrap();
    (Box::leak(Box::new(counters)), file)
}

#[test]
fn what_cores_count_is_read_through_the_file() {
    let (counters, file) = leaked(2);
    let words = counters.words();
    register(words, 7, "vfsdev0");
    register(words, 7 + DEVICES as u32, "same place");
    let reading = Counters::open(&file).unwrap();
    let reader = reading.reader();
    assert_eq!(reader.cores(), 2);
    let devices = reader.devices();
    assert_eq!(devices.len(), 1);
    assert_eq!((devices[0].id, devices[0].name.as_str()), (7, "vfsdev0"));

    let core = CoreCounters::new(words, 1);
    assert!(core.counts(7) && !core.counts(7 + DEVICES as u32) && !core.counts(8));
    let request = Finished {
        opcode: 15,
        error: false,
        read: 4096,
        written: 0,
        ns: 1000,
    };
    core.finished(7, 0, request);
    core.finished(
        7,
        0,
        Finished {
            error: true,
            ..request
        },
    );
    core.finished(
        7,
        0,
        Finished {
            opcode: 4096,
            ns: u64::MAX,
            ..request
        },
    );
    core.add(CoreCounter::Busy, 5);
    let op = reader.op(1, 7, 15);
    assert_eq!((op.requests, op.errors, op.ns), (2, 1, 2000));
    assert_eq!(op.buckets[1], 2, "1000 ns is less than 1024 ns");
    let other = reader.op(1, 7, OPCODES - 1);
    assert_eq!((other.requests, other.buckets[BUCKETS - 1]), (1, 1));
    assert_eq!(reader.bytes(1, 7), (3 * 4096, 0));
    assert_eq!(reader.core(1, CoreCounter::Busy), 5);
    assert_eq!(reader.op(0, 7, 15), OpTotals::default());

    unregister(words, 7);
    assert!(reader.devices().is_empty());
    register(words, 7, "again");
    assert_eq!(reader.op(1, 7, 15), OpTotals::default());
    assert_eq!(reader.bytes(1, 7), (0, 0));
}

#[test]
fn a_queue_has_the_share_of_its_requests_in_what_its_core_has_counted_since() {
    let (counters, file) = leaked(1);
    let core = CoreCounters::new(counters.words(), 0);
    let own = |busy, idle, requests| {
        core.set(CoreCounter::Busy, busy);
        core.set(CoreCounter::Idle, idle);
        core.set(CoreCounter::Requests, requests);
    };
    own(1000, 1000, 100);
    let allowed = CpuSet::of([0, 5, 64]);
    let place = QueuePlace {
        thread: 4,
        device: 9,
        index: 2,
        allowed,
    };
    core.queue_placed(3, &place);
    core.queue_served(3, 30);
    core.queue_served(3, 10);
    own(1800, 2000, 200);
    let reading = Counters::open(&file).unwrap();
    let queues = reading.reader().queues(0);
    let expected = CountedQueue {
        place,
        requests: 40,
        rounds: 2,
        turns: 0,
        busy: 320,
        idle: 1480,
        ..CountedQueue::default()
    };
    assert_eq!(queues, [expected]);
    core.queue_gone(3);
    assert!(reading.reader().queues(0).is_empty());
    core.queue_placed(QUEUES, &place);
    assert!(reading.reader().queues(0).is_empty());
}

#[test]
fn a_queue_is_counted_by_itself_and_anew_where_it_is_moved_to() {
    let (counters, file) = leaked(1);
    let core = CoreCounters::new(counters.words(), 0);
    let place = QueuePlace {
        thread: 4,
        device: 9,
        ..QueuePlace::default()
    };
    core.queue_placed(0, &place);
    core.queue_placed(2, &QueuePlace { thread: 5, ..place });
    let read = Finished {
        opcode: 15,
        read: 4096,
        ns: 1000,
        ..Finished::default()
    };
    core.finished(9, 2, read);
    core.finished(
        9,
        2,
        Finished {
            error: true,
            read: 0,
            written: 7,
            ..read
        },
    );
    core.queue_waits(2, QueueWait::Slot);
    core.queue_waits(2, QueueWait::Slot);
    core.queue_waits(2, QueueWait::Buffers);
    let reading = Counters::open(&file).unwrap();
    let queues = reading.reader().queues(0);
    assert_eq!(queues[0].answered, OpTotals::default());
    let queue = queues[1];
    let answered = queue.answered;
    assert_eq!(
        (answered.requests, answered.errors, answered.ns),
        (2, 1, 2000)
    );
    assert_eq!(answered.buckets[1], 2);
    assert_eq!((queue.read, queue.written), (4096, 7));
    assert_eq!((queue.slot_waits, queue.buffer_waits), (2, 1));
    core.queue_placed(2, &place);
    let again = reading.reader().queues(0)[1];
    assert_eq!(again.answered, OpTotals::default());
    assert_eq!(
        (
            again.read,
            again.written,
            again.slot_waits,
            again.buffer_waits
        ),
        (0, 0, 0, 0)
    );
}

#[test]
fn cpu_sets_are_written_as_masks() {
    assert_eq!(format!("{:x}", CpuSet::of([0, 3, 5])), "29");
    assert_eq!(format!("{:x}", CpuSet::of([64])), "10000000000000000");
    assert_eq!(format!("{:x}", CpuSet::of([MASK_CPUS as u32])), "0");
    assert!(CpuSet::of([70]).has(70) && !CpuSet::of([70]).has(6));
}

#[test]
fn every_latency_has_a_bucket_that_is_above_it_and_no_more_than_twice() {
    for shift in 0..64 {
        for ns in [1u64 << shift, (1u64 << shift) - 1] {
            let at = bucket(ns);
            assert!(at < BUCKETS);
            if at < BUCKETS - 1 {
                let limit = 1u64 << (at as u32 + FIRST_BUCKET);
                assert!(ns < limit, "{ns} is in the bucket below {limit}");
                assert!(
                    at == 0 || ns >= limit / 2,
                    "{ns} is not in the bucket below {limit}"
                );
            }
        }
    }
}

#[test]
fn memory_that_may_shrink_or_holds_something_else_is_refused() {
    let file = memfd_create("test", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
    assert!(matches!(Counters::open(&file), Err(MapError::Unsealed(_))));
    let (counters, file) = leaked(1);
    let word = &counters.words()[1];
    word.store(3, Ordering::Relaxed);
    assert!(matches!(Counters::open(&file), Err(MapError::Form)));
}

#[test]
fn nobody_else_can_write_the_counters() {
    let (_, file) = leaked(1);
    assert_eq!(
        nix::unistd::write(&file, b"x"),
        Err(nix::errno::Errno::EPERM)
    );
}
