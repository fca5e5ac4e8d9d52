//! The shared memory under the control rings: its header, where the rings lie, and what identifies the layout.
//!
//! A region is seen as a slice of atomic words, because the other process may write any of them at any time; nothing
//! here ever forms a reference to plain bytes of it. The data plane formats a region and never reads the header again:
//! it works with the constants below. The control plane attaches to it after checking the header. Called by the
//! handshake, which owns the mapping, and by tests, which use ordinary memory.

use alloc::sync::Arc;
use alloc::vec::Vec;

#[cfg(not(loom))]
pub use core::sync::atomic::{AtomicU32, Ordering, fence};
#[cfg(loom)]
pub use loom::sync::atomic::{AtomicU32, Ordering, fence};

use crate::limits;

/// Version of the handshake and of the layout of the region; raised when either changes.
pub const PROTOCOL_VERSION: u32 = 3;
/// Bytes of the command ring.
pub const COMMANDS_BYTES: usize = 256 * 1024;
/// Bytes of the ring of completions and events.
pub const REPLIES_BYTES: usize = 1024 * 1024;
/// Bytes of the header, which also holds the control words of both rings.
pub const HEADER_BYTES: usize = 4096;
/// Bytes of the whole region.
pub const REGION_BYTES: usize = HEADER_BYTES + COMMANDS_BYTES + REPLIES_BYTES;

const WORD: usize = size_of::<u32>();
const MAGIC: [u32; 2] = [u32::from_le_bytes(*b"Ferr"), u32::from_le_bytes(*b"yRng")];

/// Identifies the layout of the rings and of every message on them. Computed from the source of the messages, so that
/// any change of a definition changes it: two processes built from different definitions refuse each other.
pub const LAYOUT_HASH: u64 = {
    let mut hash = fnv1a(FNV_OFFSET, include_bytes!("msg.rs"));
    hash = fnv1a(hash, include_bytes!("errno.rs"));
    hash = fnv1a(hash, include_bytes!("export.rs"));
    hash = fnv1a(hash, include_bytes!("tuning.rs"));
    let numbers = [
        PROTOCOL_VERSION as usize,
        COMMANDS_BYTES,
        REPLIES_BYTES,
        HEADER_BYTES,
        limits::MAX_FRAME,
    ];
    let mut i = 0;
    while i < numbers.len() {
        hash = fnv1a(hash, &(numbers[i] as u64).to_le_bytes());
        i += 1;
    }
    hash
};

const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;

/// The FNV-1a hash of `bytes`, continued from `hash`.
const fn fnv1a(mut hash: u64, bytes: &[u8]) -> u64 {
    let mut i = 0;
    while i < bytes.len() {
        hash = (hash ^ bytes[i] as u64).wrapping_mul(0x0000_0100_0000_01b3);
        i += 1;
    }
    hash
}

/// Memory that holds the words of a region for as long as the value lives.
pub trait Memory: Send + Sync {
    /// The words; always the same slice.
    fn words(&self) -> &[AtomicU32];
}

impl Memory for Vec<AtomicU32> {
    fn words(&self) -> &[AtomicU32] {
        self
    }
}

/// Where one ring lies in a region, in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingLayout {
    control: usize,
    data: usize,
    capacity: u32,
}

/// The ring from the control plane to the data plane.
pub const COMMANDS: RingLayout = RingLayout::new(128, HEADER_BYTES, COMMANDS_BYTES);
/// The ring from the data plane to the control plane.
pub const REPLIES: RingLayout = RingLayout::new(256, HEADER_BYTES + COMMANDS_BYTES, REPLIES_BYTES);

impl RingLayout {
    /// Bytes of the control words: one cache line that the producer writes, one that the consumer writes.
    pub const CONTROL_BYTES: usize = 128;

    /// A ring whose control words begin at byte `control` and whose data lie at byte `data`.
    ///
    /// # Panics
    ///
    /// Unless `bytes` is a power of two and all three are multiples of a word. The layouts are constants, so a wrong
    /// one does not compile.
    pub const fn new(control: usize, data: usize, bytes: usize) -> RingLayout {
        assert!(
            bytes.is_power_of_two() && bytes >= WORD && bytes <= 1 << 30,
            "ring size"
        );
        assert!(
            control.is_multiple_of(WORD) && data.is_multiple_of(WORD),
            "ring alignment"
        );
        RingLayout {
            control: control / WORD,
            data: data / WORD,
            capacity: (bytes / WORD) as u32,
        }
    }

    /// Words of the ring.
    pub(crate) const fn capacity(&self) -> u32 {
        self.capacity
    }

    /// The word that belongs to the free-running position `at`.
    pub(crate) const fn slot(&self, at: u32) -> usize {
        self.data
            .wrapping_add((at & self.capacity.wrapping_sub(1)) as usize)
    }

    /// How far the producer has written; written by the producer.
    pub(crate) const fn tail(&self) -> usize {
        self.control
    }

    /// The ticket of a producer that wants a doorbell as soon as there is room, else 0; written by the producer.
    pub(crate) const fn waiting(&self) -> usize {
        self.control.wrapping_add(1)
    }

    /// How far the consumer has read; written by the consumer.
    pub(crate) const fn head(&self) -> usize {
        self.control.wrapping_add(16)
    }

    /// The ticket of a consumer that wants a doorbell for the next frame, else 0; written by the consumer.
    pub(crate) const fn sleeping(&self) -> usize {
        self.control.wrapping_add(17)
    }

    /// Index after the last word that the ring uses.
    const fn end(&self) -> usize {
        let control = self.control.saturating_add(Self::CONTROL_BYTES / WORD);
        let data = self.data.saturating_add(self.capacity as usize);
        if control > data { control } else { data }
    }
}

/// Why memory cannot be used as a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegionError {
    /// The memory is smaller than the layout.
    #[error("the shared memory has {have} bytes and the rings need {need}")]
    TooSmall {
        /// Bytes there.
        have: usize,
        /// Bytes needed.
        need: usize,
    },
    /// A word of the header is not what this build writes.
    #[error(
        "word {word} of the ring header is {found:#x} instead of {expected:#x}: the processes are different builds"
    )]
    Header {
        /// Index of the word.
        word: usize,
        /// What it holds.
        found: u32,
        /// What this build writes.
        expected: u32,
    },
}

/// The shared memory of one connection. Clones are views of the same memory.
#[derive(Clone)]
pub struct Region {
    memory: Arc<dyn Memory>,
}

/// What the header says: magic, version, layout hash, then offset and size of each ring, in bytes.
fn header() -> [u32; 9] {
    let bytes = |words: usize| words.saturating_mul(WORD) as u32;
    [
        MAGIC[0],
        MAGIC[1],
        PROTOCOL_VERSION,
        LAYOUT_HASH as u32,
        (LAYOUT_HASH >> 32) as u32,
        bytes(COMMANDS.data),
        bytes(COMMANDS.capacity as usize),
        bytes(REPLIES.data),
        bytes(REPLIES.capacity as usize),
    ]
}

impl Region {
    /// Views memory as a region whose header is of no interest; for rings of other sizes than the product's.
    pub fn over(memory: Arc<dyn Memory>) -> Region {
        Region { memory }
    }

    /// Checks that a ring lies inside the region.
    pub(crate) fn check(&self, layout: RingLayout) -> Result<(), RegionError> {
        let (have, need) = (self.memory.words().len(), layout.end());
        if need > have {
            let bytes = |words: usize| words.saturating_mul(WORD);
            return Err(RegionError::TooSmall {
                have: bytes(have),
                need: bytes(need),
            });
        }
        Ok(())
    }

    /// Writes the header into zeroed memory.
    pub fn format(memory: Arc<dyn Memory>) -> Result<Region, RegionError> {
        let region = Region::over(memory);
        region.check(REPLIES)?;
        for (word, value) in header().into_iter().enumerate() {
            region.store(word, value, Ordering::Release);
        }
        Ok(region)
    }

    /// Checks the header of memory that the data plane has formatted.
    pub fn attach(memory: Arc<dyn Memory>) -> Result<Region, RegionError> {
        let region = Region::over(memory);
        region.check(REPLIES)?;
        for (word, expected) in header().into_iter().enumerate() {
            let found = region.load(word, Ordering::Acquire);
            if found != expected {
                return Err(RegionError::Header {
                    word,
                    found,
                    expected,
                });
            }
        }
        Ok(region)
    }

    /// Loads a word; words outside the region read as 0 (every layout in use has been checked to fit).
    pub(crate) fn load(&self, word: usize, order: Ordering) -> u32 {
        self.memory
            .words()
            .get(word)
            .map_or(0, |atomic| atomic.load(order))
    }

    /// Stores a word.
    pub(crate) fn store(&self, word: usize, value: u32, order: Ordering) {
        if let Some(atomic) = self.memory.words().get(word) {
            atomic.store(value, order);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn zeroed(bytes: usize) -> Arc<Vec<AtomicU32>> {
        Arc::new((0..bytes / WORD).map(|_| AtomicU32::new(0)).collect())
    }

    #[test]
    fn a_formatted_region_can_be_attached() {
        let memory = zeroed(REGION_BYTES);
        assert!(Region::format(memory.clone()).is_ok());
        assert!(Region::attach(memory).is_ok());
    }

    #[test]
    fn any_changed_header_word_is_refused() {
        for word in 0..header().len() {
            let memory = zeroed(REGION_BYTES);
            Region::format(memory.clone()).map(|_| ()).unwrap();
            memory[word].fetch_xor(1, Ordering::Relaxed);
            let refusal = Region::attach(memory).map(|_| ()).unwrap_err();
            assert!(
                matches!(refusal, RegionError::Header { word: at, .. } if at == word),
                "{refusal}"
            );
        }
    }

    #[test]
    fn memory_that_is_too_small_is_refused() {
        assert!(matches!(
            Region::format(zeroed(REGION_BYTES - WORD)),
            Err(RegionError::TooSmall { .. })
        ));
    }

    #[test]
    fn the_rings_and_the_header_do_not_overlap() {
        let spans = [
            (0, header().len()),
            (
                COMMANDS.control,
                COMMANDS.control + RingLayout::CONTROL_BYTES / WORD,
            ),
            (
                REPLIES.control,
                REPLIES.control + RingLayout::CONTROL_BYTES / WORD,
            ),
            (COMMANDS.data, COMMANDS.data + COMMANDS.capacity as usize),
            (REPLIES.data, REPLIES.data + REPLIES.capacity as usize),
        ];
        for pair in spans.windows(2) {
            assert!(pair[0].1 <= pair[1].0, "{pair:?}");
        }
        assert_eq!(spans[4].1 * WORD, REGION_BYTES);
    }

    #[test]
    fn the_hash_is_that_of_the_published_algorithm() {
        assert_eq!(fnv1a(FNV_OFFSET, b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a(FNV_OFFSET, b"foobar"), 0x8594_4171_f739_67e8);
    }
}
