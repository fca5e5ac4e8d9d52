use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::msg::{Command, ToDataplane};
use crate::region::{AtomicU32, COMMANDS, COMMANDS_BYTES, REGION_BYTES};

const SMALL_BYTES: usize = 256;
const SMALL: RingLayout = RingLayout::new(0, RingLayout::CONTROL_BYTES, SMALL_BYTES);

fn memory(bytes: usize) -> Arc<Vec<AtomicU32>> {
    Arc::new((0..bytes / WORD).map(|_| AtomicU32::new(0)).collect())
}

fn small() -> (Producer, Consumer, Arc<Vec<AtomicU32>>) {
    let memory = memory(RingLayout::CONTROL_BYTES + SMALL_BYTES);
    let region = Region::over(memory.clone());
    (
        Producer::new(region.clone(), SMALL).unwrap(),
        Consumer::new(region, SMALL).unwrap(),
        memory,
    )
}

fn popped(consumer: &mut Consumer) -> Option<Vec<u8>> {
    consumer.pop().unwrap().map(|(frame, _)| frame.to_vec())
}

#[test]
fn an_empty_ring_gives_nothing() {
    let (_, mut consumer, _) = small();
    assert_eq!(popped(&mut consumer), None);
}

#[test]
fn an_empty_frame_is_a_frame() {
    let (mut producer, mut consumer, _) = small();
    assert_eq!(producer.push(&[]), Ok(Doorbell::Suppressed));
    assert_eq!(popped(&mut consumer), Some(Vec::new()));
    assert_eq!(popped(&mut consumer), None);
}

#[test]
fn a_full_ring_refuses_and_then_asks_for_a_doorbell() {
    let (mut producer, mut consumer, _) = small();
    assert_eq!(producer.room(), Ok(Some(SMALL_BYTES - WORD)));
    assert_eq!(
        producer.push(&[7; SMALL_BYTES - WORD]),
        Ok(Doorbell::Suppressed)
    );
    assert_eq!(producer.room(), Ok(None));
    assert_eq!(producer.push(&[]), Err(PushError::Full));
    let (frame, doorbell) = consumer.pop().unwrap().unwrap();
    assert_eq!(
        (frame.len(), doorbell),
        (SMALL_BYTES - WORD, Doorbell::Needed)
    );
    assert_eq!(producer.push(&[]), Ok(Doorbell::Suppressed));
    assert_eq!(consumer.pop().unwrap().unwrap().1, Doorbell::Suppressed);
}

#[test]
fn a_frame_longer_than_the_ring_or_the_limit_is_refused_for_good() {
    let (mut producer, _, _) = small();
    assert_eq!(producer.push(&[0; SMALL_BYTES]), Err(PushError::TooLong));
    let region = Region::format(memory(REGION_BYTES)).unwrap();
    let mut producer = Producer::new(region, COMMANDS).unwrap();
    assert_eq!(
        producer.push(&vec![0; MAX_FRAME + 1]),
        Err(PushError::TooLong)
    );
    assert_eq!(producer.push(&vec![0; MAX_FRAME]), Ok(Doorbell::Suppressed));
}

#[test]
fn a_sleeping_consumer_gets_one_doorbell_and_an_awake_one_none() {
    let (mut producer, mut consumer, _) = small();
    assert_eq!(consumer.prepare_sleep(), Ok(true));
    assert_eq!(producer.push(&[1]), Ok(Doorbell::Needed));
    assert_eq!(producer.push(&[2]), Ok(Doorbell::Suppressed));
    assert_eq!(consumer.prepare_sleep(), Ok(false));
    assert_eq!(producer.push(&[3]), Ok(Doorbell::Suppressed));
    while popped(&mut consumer).is_some() {}
    assert_eq!(consumer.prepare_sleep(), Ok(true));
    consumer.awake();
    assert_eq!(producer.push(&[4]), Ok(Doorbell::Suppressed));
}

#[test]
fn messages_round_trip_and_trailing_bytes_are_refused() {
    let (mut producer, mut consumer, _) = small();
    let message = ToDataplane {
        seq: 9,
        command: Command::DeviceStop {
            name: String::from("fs0"),
        },
    };
    producer.send(&message).map(|_| ()).unwrap();
    assert_eq!(
        consumer.recv::<ToDataplane>().unwrap().map(|(got, _)| got),
        Some(message.clone())
    );
    let mut bytes = postcard::to_allocvec(&message).unwrap();
    bytes.push(0);
    producer.push(&bytes).map(|_| ()).unwrap();
    assert_eq!(
        consumer.recv::<ToDataplane>(),
        Err(RecvError::NotAMessage { len: bytes.len() })
    );
}

#[test]
fn a_message_that_fits_no_frame_is_refused() {
    let region = Region::format(memory(REGION_BYTES)).unwrap();
    let mut producer = Producer::new(region, COMMANDS).unwrap();
    let name = "x".repeat(MAX_FRAME);
    let message = ToDataplane {
        seq: 0,
        command: Command::DeviceStop { name },
    };
    assert_eq!(producer.send(&message), Err(PushError::TooLong));
    assert_eq!(producer.room(), Ok(Some(MAX_FRAME.min(COMMANDS_BYTES))));
}

#[test]
fn a_producer_position_beyond_the_ring_is_corrupt() {
    let (mut producer, mut consumer, memory) = small();
    producer.push(&[1]).map(|_| ()).unwrap();
    memory[SMALL.tail()].store(SMALL.capacity() + 1, Ordering::Relaxed);
    assert!(matches!(
        consumer.pop(),
        Err(Corrupt {
            what: "the producer's position",
            ..
        })
    ));
}

#[test]
fn a_producer_position_that_moves_back_is_corrupt() {
    let (mut producer, mut consumer, memory) = small();
    producer.push(&[1]).map(|_| ()).unwrap();
    producer.push(&[2]).map(|_| ()).unwrap();
    assert_eq!(consumer.prepare_sleep(), Ok(false));
    memory[SMALL.tail()].store(2, Ordering::Relaxed);
    assert!(matches!(consumer.pop(), Err(Corrupt { value: 2, .. })));
}

#[test]
fn a_consumer_position_that_moves_back_or_ahead_is_corrupt() {
    for hostile in [3, u32::MAX, 1 << 31] {
        let (mut producer, _, memory) = small();
        producer.push(&[1]).map(|_| ()).unwrap();
        memory[SMALL.head()].store(hostile, Ordering::Relaxed);
        assert!(
            matches!(producer.push(&[2]), Err(PushError::Corrupt(Corrupt { value, .. })) if value == hostile)
        );
    }
}

#[test]
fn a_length_beyond_the_limit_or_the_written_words_is_corrupt() {
    for hostile in [5, 8, MAX_FRAME as u32, MAX_FRAME as u32 + 1, u32::MAX] {
        let (mut producer, mut consumer, memory) = small();
        producer.push(&[1]).map(|_| ()).unwrap();
        memory[SMALL.slot(0)].store(hostile, Ordering::Relaxed);
        assert!(
            matches!(consumer.pop(), Err(Corrupt { value, .. }) if value == hostile),
            "{hostile}"
        );
    }
}

#[test]
fn positions_wrap_around_their_own_width() {
    let (mut producer, mut consumer, memory) = small();
    let start = u32::MAX - 5;
    (producer.tail, consumer.head) = (start, start);
    memory[SMALL.tail()].store(start, Ordering::Relaxed);
    memory[SMALL.head()].store(start, Ordering::Relaxed);
    for round in 0..20_u8 {
        producer.push(&[round; 9]).map(|_| ()).unwrap();
        assert_eq!(popped(&mut consumer), Some(vec![round; 9]));
    }
}

/// What a test does to a ring.
#[derive(Clone, Debug)]
enum Step {
    Push(Vec<u8>),
    Pop,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let push = proptest::collection::vec(any::<u8>(), 0..SMALL_BYTES).prop_map(Step::Push);
    proptest::collection::vec(prop_oneof![push, Just(Step::Pop)], 0..200)
}

proptest! {
    #[test]
    fn a_ring_is_a_bounded_queue(steps in steps()) {
        let (mut producer, mut consumer, _) = small();
        let mut queue = VecDeque::new();
        let mut used = 0;
        for step in steps {
            match step {
                Step::Push(bytes) => {
                    let need = WORD + bytes.len().next_multiple_of(WORD);
                    let pushed = producer.push(&bytes);
                    if used + need <= SMALL_BYTES {
                        prop_assert!(pushed.is_ok());
                        used += need;
                        queue.push_back(bytes);
                    } else if need <= SMALL_BYTES {
                        prop_assert_eq!(pushed, Err(PushError::Full));
                    } else {
                        prop_assert_eq!(pushed, Err(PushError::TooLong));
                    }
                }
                Step::Pop => {
                    let expected: Option<Vec<u8>> = queue.pop_front();
                    used -= expected.as_ref().map_or(0, |bytes| WORD + bytes.len().next_multiple_of(WORD));
                    prop_assert_eq!(popped(&mut consumer), expected);
                }
            }
        }
    }

    #[test]
    fn a_hostile_peer_causes_an_error_at_worst(
        steps in steps(),
        writes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<proptest::sample::Index>(), hostile()), 1..40),
    ) {
        let (mut producer, mut consumer, memory) = small();
        for (at, step) in steps.iter().enumerate() {
            for (when, word, value) in &writes {
                if when.index(steps.len()) == at {
                    memory[word.index(memory.len())].store(*value, Ordering::Relaxed);
                }
            }
            match step {
                Step::Push(bytes) => {
                    let _ = producer.push(bytes);
                }
                Step::Pop => {
                    let _ = consumer.recv::<ToDataplane>();
                }
            }
            let _ = (consumer.prepare_sleep(), producer.room());
        }
    }
}

/// Words that are likely to hurt.
fn hostile() -> impl Strategy<Value = u32> {
    prop_oneof![
        any::<u32>(),
        0..80_u32,
        (0..80_u32).prop_map(|n| n.wrapping_neg()),
        Just(MAX_FRAME as u32)
    ]
}
