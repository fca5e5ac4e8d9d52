//! One virtqueue: taking requests and giving them back.
//!
//! What both ring formats share: in-flight accounting, the latched error, requests put back. The formats themselves are in
//! `split` and `packed`, invisible outside. A queue never waits, allocates while it runs, or knows who notifies whom: the
//! reactor of the core that owns it calls everything here.

use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;

use ferry_shared::limits::MAX_RING_SIZE;
use serde::{Deserialize, Serialize};

use super::chain::{Chain, ChainFault, Range};
use super::inflight::Inflight;
use super::packed::PackedRing;
use super::split::SplitRing;
use crate::mem::{Fault, GuestMap, Iova};

/// What the driver has programmed for a queue when it is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueConfig {
    /// Descriptors.
    pub size: u16,
    /// Descriptor table (split) or descriptor ring (packed).
    pub desc: Iova,
    /// Available ring (split) or driver event suppression (packed).
    pub avail: Iova,
    /// Used ring (split) or device event suppression (packed).
    pub used: Iova,
    /// `VIRTIO_F_RING_PACKED` is negotiated.
    pub packed: bool,
    /// `VIRTIO_F_EVENT_IDX` is negotiated.
    pub event_idx: bool,
    /// `VIRTIO_F_INDIRECT_DESC` is negotiated.
    pub indirect: bool,
    /// Where to go on.
    pub state: QueueState,
}

/// Where a queue stands between two runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Split: the next available index to look at. Packed: ring position in bits 0 to 14, wrap counter in bit 15.
    pub avail: u16,
    /// The same for what is given back next.
    pub used: u16,
    /// Requests that were popped and put back; they come first when the queue runs again.
    pub parked: Vec<Parked>,
}

impl QueueState {
    /// Where a queue stands that has never run.
    pub fn fresh(packed: bool) -> QueueState {
        let start = if packed { WRAP } else { 0 };
        QueueState {
            avail: start,
            used: start,
            parked: Vec::new(),
        }
    }
}

/// Packed positions: the bit that holds the wrap counter.
pub(super) const WRAP: u16 = 1 << 15;

/// A request that was popped and put back. Its descriptors may be gone from the ring (packed rings overwrite them), so
/// what they said is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parked {
    id: u16,
    count: u16,
    /// Its entry in the in-flight record, which another process looks up itself.
    #[serde(skip)]
    entry: u16,
    ranges: Vec<Range>,
    readable: usize,
}

/// Why a queue cannot run, or cannot run on. The first one is reported; after that the queue takes no more requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The size is 0, above the limit, or (split) not a power of two.
    #[error("queue size {size} is not allowed")]
    Size {
        /// The size.
        size: u16,
    },
    /// A ring is not in guest memory.
    #[error("a ring is out of reach: {0}")]
    Ring(Fault),
    /// The position to start at is not one that this ring can have.
    #[error("ring position {avail:#x}, used {used:#x} is impossible for size {size}")]
    Position {
        /// Next available position.
        avail: u16,
        /// Next used position.
        used: u16,
        /// Queue size.
        size: u16,
    },
    /// The available index is further ahead than the ring is long.
    #[error("available index {idx} is more than {size} past {next}")]
    AvailIndex {
        /// What the driver wrote.
        idx: u16,
        /// What has been popped.
        next: u16,
        /// Queue size.
        size: u16,
    },
    /// A descriptor index is outside its table.
    #[error("descriptor {index} is outside the table of {entries}")]
    DescIndex {
        /// The index.
        index: u16,
        /// Entries of the table.
        entries: u32,
    },
    /// The driver has made a chain available that has not been given back yet.
    #[error("descriptor {head} is made available while its request is in flight")]
    HeadInFlight {
        /// Head of the chain.
        head: u16,
    },
    /// More requests than the ring has descriptors.
    #[error("more requests in flight than the ring of {size} can hold")]
    Overcommitted {
        /// Queue size.
        size: u16,
    },
    /// The chain does not end.
    #[error("the descriptor chain at {head} is a loop")]
    Loop {
        /// Head of the chain.
        head: u16,
    },
    /// More descriptors than `MAX_CHAIN`.
    #[error(
        "the descriptor chain is longer than {}",
        ferry_shared::limits::MAX_CHAIN
    )]
    ChainTooLong,
    /// The buffers add up to 4 GiB or more.
    #[error("the descriptor chain holds 4 GiB or more")]
    ChainTooLarge,
    /// A readable buffer after a writable one.
    #[error("a readable descriptor follows a writable one")]
    ReadableAfterWritable,
    /// An indirect descriptor, and `VIRTIO_F_INDIRECT_DESC` is not negotiated.
    #[error("indirect descriptor without the feature")]
    IndirectNotNegotiated,
    /// An indirect descriptor inside an indirect table.
    #[error("indirect descriptor inside an indirect table")]
    IndirectNested,
    /// An indirect descriptor that says that the chain goes on.
    #[error("indirect descriptor with a next one")]
    IndirectNext,
    /// The length of an indirect table is 0 or not a multiple of 16.
    #[error("indirect table of {len} bytes")]
    IndirectLength {
        /// The length in bytes.
        len: u32,
    },
}

/// A popped request's claim to be given back: consumed by [`Queue::push_used`], [`Queue::requeue`] or [`Queue::abandon`].
#[must_use = "a popped request must be given back"]
#[derive(Debug, PartialEq, Eq)]
pub struct Head {
    /// Split: index of the head. Packed: buffer id.
    pub(super) id: u16,
    /// Ring descriptors that the request takes (1 for split).
    pub(super) count: u16,
    /// Packed: the request's entry in the in-flight record, if there is one.
    pub(super) entry: u16,
}

impl Head {
    /// What no other request in flight on the queue has: the head's index, or the buffer id.
    pub fn id(&self) -> u16 {
        self.id
    }
}

/// A request taken off the ring; its buffers are in the chain that was given to [`Queue::pop`].
#[must_use = "a popped request must be given back"]
#[derive(Debug)]
pub struct Popped {
    /// To give the request back.
    pub head: Head,
    /// The buffers are not all usable: the request must fail, and the chain holds what comes before the fault.
    pub fault: Option<ChainFault>,
}

#[derive(Debug)]
enum Ring {
    Split(SplitRing),
    Packed(PackedRing),
}

/// A running virtqueue.
#[derive(Debug)]
pub struct Queue {
    ring: Ring,
    map: Arc<GuestMap>,
    config: QueueConfig,
    parked: VecDeque<Parked>,
    in_flight: u16,
    failed: bool,
}

impl Queue {
    /// Starts a queue where `config` says. Requests that `inflight` records as popped by an earlier run are popped first;
    /// they take the place of the parked ones.
    pub fn new(
        mut config: QueueConfig,
        map: &Arc<GuestMap>,
        inflight: Option<Inflight>,
    ) -> Result<Queue, QueueError> {
        let size = config.size;
        if size == 0 || u32::from(size) > MAX_RING_SIZE {
            return Err(QueueError::Size { size });
        }
        let mut parked: VecDeque<Parked> = core::mem::take(&mut config.state.parked).into();
        if inflight.is_some() {
            parked.clear();
        }
        let ring = match (config.packed, inflight) {
            (true, Some(Inflight::Packed(record))) => {
                Ring::Packed(PackedRing::new(&config, map, Some(record))?)
            }
            (true, _) => Ring::Packed(PackedRing::new(&config, map, None)?),
            (false, inflight) => {
                let record = match inflight {
                    Some(Inflight::Split(record)) => Some(record),
                    Some(Inflight::Packed(_)) | None => None,
                };
                let heads = parked.iter().map(|p| p.id);
                Ring::Split(SplitRing::new(&config, map, record, heads)?)
            }
        };
        Ok(Queue {
            ring,
            map: Arc::clone(map),
            config,
            parked,
            in_flight: 0,
            failed: false,
        })
    }

    /// The guest memory in use; what [`Chain::readable`] and [`Chain::writable`] of popped requests want.
    #[inline]
    pub fn map(&self) -> &Arc<GuestMap> {
        &self.map
    }

    /// Descriptors of the ring.
    pub fn size(&self) -> u16 {
        self.config.size
    }

    /// Goes on in other guest memory. Chains popped before must be retranslated, or finished with the old map. On an
    /// error the queue is failed, and what is in flight can only be abandoned.
    pub fn remap(&mut self, map: &Arc<GuestMap>) -> Result<(), QueueError> {
        self.map = Arc::clone(map);
        let done = match &mut self.ring {
            Ring::Split(ring) => ring.remap(&self.config, map),
            Ring::Packed(ring) => ring.remap(&self.config, map),
        };
        if done.is_err() {
            self.failed = true;
        }
        done
    }

    /// Takes the next request off the ring. A request with unusable buffers is returned with its fault; a broken ring is
    /// an error, reported once: after it there are no more requests, but those in flight can still be given back.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<Option<Popped>, QueueError> {
        chain.reset();
        if self.failed {
            return Ok(None);
        }
        let popped = self.take(chain);
        match &popped {
            Ok(Some(_)) => self.in_flight = self.in_flight.saturating_add(1),
            Ok(None) => {}
            Err(_) => {
                chain.reset();
                self.failed = true;
            }
        }
        popped
    }

    #[inline]
    fn take(&mut self, chain: &mut Chain) -> Result<Option<Popped>, QueueError> {
        if let Some(parked) = self.parked.pop_front() {
            return Queue::take_parked(&parked, &self.map, chain).map(Some);
        }
        let popped = match &mut self.ring {
            Ring::Split(ring) => ring.pop(&self.config, &self.map, chain)?,
            Ring::Packed(ring) => ring.pop(&self.config, &self.map, chain)?,
        };
        Ok(popped.map(|(head, walk)| {
            let fault = match chain.is_translated(&self.map) {
                true => None,
                false => chain.translate(&self.map),
            };
            Popped {
                head,
                fault: walk.map(ChainFault::Memory).or(fault),
            }
        }))
    }

    #[cold]
    fn take_parked(
        parked: &Parked,
        map: &GuestMap,
        chain: &mut Chain,
    ) -> Result<Popped, QueueError> {
        for (i, &range) in parked.ranges.iter().enumerate() {
            chain.push(range, i >= parked.readable)?;
        }
        let fault = chain.translate(map);
        let head = Head {
            id: parked.id,
            count: parked.count,
            entry: parked.entry,
        };
        Ok(Popped { head, fault })
    }

    /// Gives a request back, `written` bytes of its writable buffers filled. The driver sees it after the next
    /// [`publish`](Self::publish).
    #[inline]
    pub fn push_used(&mut self, head: Head, written: u32) {
        self.in_flight = self.in_flight.saturating_sub(1);
        match &mut self.ring {
            Ring::Split(ring) => ring.push_used(&self.config, head.id, written),
            Ring::Packed(ring) => ring.push_used(&self.config, &head, written),
        }
    }

    /// Puts a popped request back: the next [`pop`](Self::pop), of this run or a later one, returns it again.
    pub fn requeue(&mut self, head: Head, chain: &Chain) {
        self.in_flight = self.in_flight.saturating_sub(1);
        let Head { id, count, entry } = head;
        let (ranges, readable) = chain.ranges();
        self.parked.push_back(Parked {
            id,
            count,
            entry,
            ranges: ranges.to_vec(),
            readable,
        });
    }

    /// Forgets a popped request without an answer: the queue is being reset.
    pub fn abandon(&mut self, head: Head) {
        let Head {
            id: _,
            count: _,
            entry: _,
        } = head;
        self.in_flight = self.in_flight.saturating_sub(1);
    }

    /// Shows the driver what has been given back since the last time. Whether it must be interrupted.
    #[must_use = "the driver may have to be interrupted"]
    pub fn publish(&mut self) -> bool {
        match &mut self.ring {
            Ring::Split(ring) => ring.publish(&self.config),
            Ring::Packed(ring) => ring.publish(&self.config),
        }
    }

    /// Asks the driver for a kick when it adds a request. True when there are some already, for which no kick may come.
    #[must_use = "requests that are there already get no kick"]
    pub fn enable_kicks(&mut self) -> bool {
        match &mut self.ring {
            Ring::Split(ring) => ring.enable_kicks(&self.config),
            Ring::Packed(ring) => ring.enable_kicks(&self.config),
        }
        // The fence in `enable_kicks` of the ring comes before this look at what is available.
        self.has_work()
    }

    /// Tells the driver that kicks are not needed: the ring is being polled.
    pub fn disable_kicks(&mut self) {
        match &mut self.ring {
            Ring::Split(ring) => ring.disable_kicks(&self.config),
            Ring::Packed(ring) => ring.disable_kicks(),
        }
    }

    /// Whether [`pop`](Self::pop) has something to return.
    #[inline]
    pub fn has_work(&self) -> bool {
        if self.failed {
            return false;
        }
        !self.parked.is_empty()
            || match &self.ring {
                Ring::Split(ring) => ring.has_work(),
                Ring::Packed(ring) => ring.has_work(),
            }
    }

    /// Requests popped and not given back, put back or abandoned.
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// Whether the ring was found broken.
    pub fn failed(&self) -> bool {
        self.failed
    }

    /// Where the queue stands; it is over. What is still in flight is lost unless there is an in-flight record.
    pub fn into_state(self) -> QueueState {
        let (avail, used) = match &self.ring {
            Ring::Split(ring) => ring.position(),
            Ring::Packed(ring) => ring.position(),
        };
        QueueState {
            avail,
            used,
            parked: self.parked.into(),
        }
    }
}

/// Whether the other side asked to be told about one of the entries `old..new`: it wants to hear of entry `event`
/// (section 2.7.7.2). Positions wrap at 2^16.
pub(super) fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests;
