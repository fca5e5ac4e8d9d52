//! A single-producer, single-consumer ring of frames in a [`Region`], between two processes that do not trust each
//! other.
//!
//! A frame is a word with its length in bytes, then its bytes, padded to a word. Positions run freely modulo 2^32
//! words. Each side keeps its own position to itself and only publishes it: what it reads from the region is the other
//! side's position, the length and the bytes, and all of that is checked as hostile. A violation is [`Corrupt`] and
//! the owner drops the connection. Frames are copied out before they are decoded, since the peer may still write them.
//!
//! Doorbells are suppressed while the peer is awake. A side that is about to wait publishes a ticket, a number that it has
//! not used before, and gets one doorbell for it; every word of the region has one writer. Two pairs of fences make that safe; each is a store, a
//! sequentially consistent fence, then a load, on both sides, so that at least one side sees the other's store:
//! * A1 in [`Producer::push`] (tail, then `sleeping`) with A2 in [`Consumer::prepare_sleep`] (`sleeping`, then tail);
//! * B1 in [`Consumer::pop`] (head, then `waiting`) with B2 in [`Producer::push`] (`waiting`, then head).
//!
//! Used by both processes through the handshake's channel; it makes no system calls.

use alloc::boxed::Box;
use alloc::vec;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::limits::MAX_FRAME;
use crate::region::{Ordering, Region, RegionError, RingLayout, fence};

const WORD: usize = size_of::<u32>();

/// Something in the region that a correct peer never writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the peer has corrupted the ring: {what} is {value:#x}")]
pub struct Corrupt {
    /// Which value.
    pub what: &'static str,
    /// What it is.
    pub value: u32,
}

/// Whether the peer has to be woken.
#[must_use = "a peer that asked for a doorbell sleeps until it gets one"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doorbell {
    /// The peer sleeps: ring.
    Needed,
    /// The peer is awake and will look by itself.
    Suppressed,
}

/// Why a frame was not pushed; nothing was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PushError {
    /// No room now. A doorbell will come when there is some.
    #[error("the ring is full")]
    Full,
    /// The frame is longer than any ring accepts, or the message cannot be encoded.
    #[error("the message does not fit a frame of {MAX_FRAME} bytes")]
    TooLong,
    /// The peer is broken.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
}

/// Why no message was received; the connection is of no further use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecvError {
    /// The ring itself is broken.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
    /// The frame is not one whole message.
    #[error("the peer has sent a frame of {len} bytes that is not a message")]
    NotAMessage {
        /// Bytes of the frame.
        len: usize,
    },
}

/// A side's own requests for doorbells.
#[derive(Default)]
struct Tickets {
    last: u32,
}

impl Tickets {
    /// A ticket, never 0.
    fn draw(&mut self) -> u32 {
        self.last = self.last.checked_add(1).unwrap_or(1);
        self.last
    }
}

/// The peer's requests for doorbells, as this side answers them.
#[derive(Default)]
struct Answered {
    last: u32,
}

impl Answered {
    /// Decides on a doorbell for the ticket that the peer shows; 0 is no ticket.
    fn answer(&mut self, ticket: u32) -> Doorbell {
        if ticket == 0 || ticket == self.last {
            return Doorbell::Suppressed;
        }
        self.last = ticket;
        Doorbell::Needed
    }
}

/// Words that a frame of `len` bytes takes.
fn frame_words(len: usize) -> u32 {
    // `len` is at most MAX_FRAME, so this neither saturates nor truncates.
    len.div_ceil(WORD).saturating_add(1) as u32
}

/// The writing end of a ring. There must be only one per ring and region.
pub struct Producer {
    region: Region,
    layout: RingLayout,
    tail: u32,
    /// Words in use when the head was last read; only ever shrinks until the next push.
    used: u32,
    waits: Tickets,
    sleeps: Answered,
    scratch: Box<[u8]>,
}

impl Producer {
    /// The writing end of a ring that nothing has been written to.
    pub fn new(region: Region, layout: RingLayout) -> Result<Producer, RegionError> {
        region.check(layout)?;
        Ok(Producer {
            region,
            layout,
            tail: 0,
            used: 0,
            waits: Tickets::default(),
            sleeps: Answered::default(),
            scratch: vec![0; MAX_FRAME].into_boxed_slice(),
        })
    }

    /// Words free now.
    fn free(&mut self) -> Result<u32, Corrupt> {
        // Acquire pairs with the release store of the head in `Consumer::pop`: the peer is done with the words.
        let head = self.region.load(self.layout.head(), Ordering::Acquire);
        let used = self.tail.wrapping_sub(head);
        if used > self.used {
            return Err(Corrupt {
                what: "the consumer's position",
                value: head,
            });
        }
        self.used = used;
        Ok(self.layout.capacity().saturating_sub(used))
    }

    /// The longest frame that can be pushed now, in bytes; `None` when not even an empty one.
    pub fn room(&mut self) -> Result<Option<usize>, Corrupt> {
        let payload = self.free()?.checked_sub(1);
        Ok(payload.map(|words| (words as usize).saturating_mul(WORD).min(MAX_FRAME)))
    }

    /// Makes sure that a frame of `len` bytes fits, or asks the consumer for a doorbell once there is room.
    pub fn reserve(&mut self, len: usize) -> Result<(), PushError> {
        let need = if len <= MAX_FRAME {
            frame_words(len)
        } else {
            return Err(PushError::TooLong);
        };
        if need > self.layout.capacity() {
            return Err(PushError::TooLong);
        }
        if need <= self.free()? {
            return Ok(());
        }
        self.region
            .store(self.layout.waiting(), self.waits.draw(), Ordering::Relaxed);
        // B2, pairs with B1.
        fence(Ordering::SeqCst);
        if need > self.free()? {
            return Err(PushError::Full);
        }
        self.region
            .store(self.layout.waiting(), 0, Ordering::Relaxed);
        Ok(())
    }

    /// Appends one frame.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Doorbell, PushError> {
        self.reserve(bytes.len())?;
        let layout = self.layout;
        let mut at = self.tail;
        self.region
            .store(layout.slot(at), bytes.len() as u32, Ordering::Relaxed);
        for chunk in bytes.chunks(WORD) {
            let mut word = [0; WORD];
            word.iter_mut()
                .zip(chunk)
                .for_each(|(to, from)| *to = *from);
            at = at.wrapping_add(1);
            self.region
                .store(layout.slot(at), u32::from_le_bytes(word), Ordering::Relaxed);
        }
        let words = frame_words(bytes.len());
        self.tail = self.tail.wrapping_add(words);
        self.used = self.used.saturating_add(words);
        // Release pairs with the acquire load of the tail in `Consumer::available`: the frame is there.
        self.region
            .store(layout.tail(), self.tail, Ordering::Release);
        // A1, pairs with A2.
        fence(Ordering::SeqCst);
        Ok(self
            .sleeps
            .answer(self.region.load(layout.sleeping(), Ordering::Relaxed)))
    }

    /// Appends one message.
    pub fn send<T: Serialize>(&mut self, message: &T) -> Result<Doorbell, PushError> {
        let mut scratch = core::mem::take(&mut self.scratch);
        let pushed = match postcard::to_slice(message, &mut scratch) {
            Ok(bytes) => self.push(bytes),
            Err(_) => Err(PushError::TooLong),
        };
        self.scratch = scratch;
        pushed
    }
}

/// The reading end of a ring. There must be only one per ring and region.
pub struct Consumer {
    region: Region,
    layout: RingLayout,
    head: u32,
    /// Words known to be there when the tail was last read; only ever grows until the next pop.
    available: u32,
    sleeps: Tickets,
    waits: Answered,
    scratch: Box<[u8]>,
}

impl Consumer {
    /// The reading end of a ring that nothing has been read from.
    pub fn new(region: Region, layout: RingLayout) -> Result<Consumer, RegionError> {
        region.check(layout)?;
        Ok(Consumer {
            region,
            layout,
            head: 0,
            available: 0,
            sleeps: Tickets::default(),
            waits: Answered::default(),
            scratch: vec![0; MAX_FRAME].into_boxed_slice(),
        })
    }

    /// Words to read now.
    fn available(&mut self) -> Result<u32, Corrupt> {
        // Acquire pairs with the release store of the tail in `Producer::push`.
        let tail = self.region.load(self.layout.tail(), Ordering::Acquire);
        let available = tail.wrapping_sub(self.head);
        if available > self.layout.capacity() || available < self.available {
            return Err(Corrupt {
                what: "the producer's position",
                value: tail,
            });
        }
        self.available = available;
        Ok(available)
    }

    /// Copies the next frame out, if there is one, and gives its words back to the producer.
    pub fn pop(&mut self) -> Result<Option<(&[u8], Doorbell)>, Corrupt> {
        let Some((len, doorbell)) = self.take_frame()? else {
            return Ok(None);
        };
        Ok(Some((
            self.scratch.get(..len).unwrap_or_default(),
            doorbell,
        )))
    }

    /// Copies the next frame into the scratch buffer; gives its length.
    fn take_frame(&mut self) -> Result<Option<(usize, Doorbell)>, Corrupt> {
        if self.available()? == 0 {
            return Ok(None);
        }
        let layout = self.layout;
        // Read once: what is checked here is what is used.
        let value = self.region.load(layout.slot(self.head), Ordering::Relaxed);
        let Some(frame) = self.scratch.get_mut(..value as usize) else {
            return Err(Corrupt {
                what: "a frame's length",
                value,
            });
        };
        let words = frame_words(frame.len());
        let Some(left) = self.available.checked_sub(words) else {
            return Err(Corrupt {
                what: "a frame's length beyond what was written",
                value,
            });
        };
        let mut at = self.head;
        for chunk in frame.chunks_mut(WORD) {
            at = at.wrapping_add(1);
            let word = self
                .region
                .load(layout.slot(at), Ordering::Relaxed)
                .to_le_bytes();
            chunk.iter_mut().zip(word).for_each(|(to, from)| *to = from);
        }
        self.head = self.head.wrapping_add(words);
        self.available = left;
        // Release pairs with the acquire load of the head in `Producer::free`: the loads above are done.
        self.region
            .store(layout.head(), self.head, Ordering::Release);
        // B1, pairs with B2.
        fence(Ordering::SeqCst);
        let doorbell = self
            .waits
            .answer(self.region.load(layout.waiting(), Ordering::Relaxed));
        Ok(Some((value as usize, doorbell)))
    }

    /// Takes the next message, if there is one. Bytes after the message make the frame invalid.
    pub fn recv<T: DeserializeOwned>(&mut self) -> Result<Option<(T, Doorbell)>, RecvError> {
        let Some((frame, doorbell)) = self.pop()? else {
            return Ok(None);
        };
        match postcard::take_from_bytes(frame) {
            Ok((message, [])) => Ok(Some((message, doorbell))),
            Ok(_) | Err(_) => Err(RecvError::NotAMessage { len: frame.len() }),
        }
    }

    /// Asks the producer for a doorbell. True: nothing is there, wait for it. False: there is something to pop.
    pub fn prepare_sleep(&mut self) -> Result<bool, Corrupt> {
        self.region.store(
            self.layout.sleeping(),
            self.sleeps.draw(),
            Ordering::Relaxed,
        );
        // A2, pairs with A1.
        fence(Ordering::SeqCst);
        let empty = self.available()? == 0;
        if !empty {
            self.awake();
        }
        Ok(empty)
    }

    /// Tells the producer that doorbells are not needed for now.
    pub fn awake(&mut self) {
        self.region
            .store(self.layout.sleeping(), 0, Ordering::Relaxed);
    }
}

#[cfg(all(test, loom))]
mod model;
#[cfg(all(test, not(loom)))]
mod tests;
