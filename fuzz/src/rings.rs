//! The control rings, with a peer that writes anything anywhere.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use ferry_shared::errno::Errno;
use ferry_shared::limits::NAME_LEN;
use ferry_shared::msg::{Command, Failure, ToControlplane, ToDataplane};
use ferry_shared::region::{Region, RingLayout};
use ferry_shared::ring::{Consumer, Producer, PushError, RecvError};

const BYTES: usize = 1024;
const IN: RingLayout = RingLayout::new(0, 256, BYTES);
const OUT: RingLayout = RingLayout::new(128, 256 + BYTES, BYTES);
const WORDS: usize = (256 + 2 * BYTES) / 4;

/// Checks the commands as the data plane does, which must not depend on what a control plane has checked.
fn check(command: Command) {
    match command {
        Command::FsdevCreate(spec) if spec.check().is_ok() => {
            assert!(!spec.name.is_empty() && spec.name.len() <= NAME_LEN);
        }
        Command::DeviceStart(spec) if spec.check().is_ok() => {
            assert!(!spec.name.is_empty() && spec.name.len() <= NAME_LEN);
        }
        _ => {}
    }
}

/// Takes every message that is there; `false` when the peer is to be cut off.
fn take_all(consumer: &mut Consumer) -> bool {
    // Every frame takes at least a word, and nobody writes meanwhile.
    for _ in 0..=BYTES / 4 {
        match consumer.recv::<ToDataplane>() {
            Ok(Some((message, _))) => check(message.command),
            Ok(None) => return true,
            Err(RecvError::Corrupt(_) | RecvError::NotAMessage { .. }) => return false,
        }
    }
    panic!("more frames than the ring has words");
}

/// A connection. The input is a row of steps. From 128 on the lowest bits name a word, with those of the next byte, that
/// is overwritten with the four bytes after it. Below, a step is a frame of that many bytes that the peer writes as it
/// should, or for 0 the data plane takes what is there, for 1 answers, for 2 sleeps.
pub fn control(data: &[u8]) {
    let memory: Arc<Vec<AtomicU32>> = Arc::new((0..WORDS).map(|_| AtomicU32::new(0)).collect());
    let region = Region::over(memory.clone());
    let mut consumer = Consumer::new(region.clone(), IN).expect("it fits");
    let mut answers = Producer::new(region.clone(), OUT).expect("it fits");
    let mut peer = Producer::new(region, IN).expect("it fits");
    let mut rest = data;
    while let [step, more @ ..] = rest {
        rest = more;
        let goes_on = match *step {
            0 => take_all(&mut consumer),
            1 => {
                let message = ToControlplane::Completion {
                    seq: 1,
                    result: Err(Failure::new(Errno::EINVAL, "no".to_owned())),
                };
                matches!(answers.send(&message), Ok(_) | Err(PushError::Full))
            }
            2 => {
                let slept = consumer.prepare_sleep();
                consumer.awake();
                slept.is_ok()
            }
            len @ 3..128 => {
                let (frame, next) = more.split_at(more.len().min(usize::from(len - 3)));
                rest = next;
                // What the peer sees of a ring that it has broken itself is its own affair.
                let _ = peer.push(frame);
                true
            }
            high => {
                let [low, a, b, c, d, next @ ..] = more else {
                    return;
                };
                rest = next;
                let word = usize::from(high & 3) << 8 | usize::from(*low);
                let value = u32::from_le_bytes([*a, *b, *c, *d]);
                if let Some(word) = memory.get(word) {
                    word.store(value, Ordering::Relaxed);
                }
                true
            }
        };
        if !goes_on {
            return;
        }
    }
    take_all(&mut consumer);
}
