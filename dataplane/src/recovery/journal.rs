//! What a request has done so far, for the process that has to execute it again after a crash.
//!
//! A request that was taken off its ring and not given back is executed again by the next process. Where twice is not the
//! same as once, it notes in its *line* what it is about to do and what it has done; there is a line for every descriptor head
//! of every queue, which no other request can use before this one is given back. A line belongs to the request whose key is in
//! it, and was left by an earlier execution only if an earlier process wrote it: a driver that gives two requests the same number
//! is not taken for a crash. So nothing needs to be cleared.
//!
//! # Order
//!
//! 1. What was there before goes into the facts, then the phase is stored: from here on the act may have happened.
//! 2. The act, one system call.
//! 3. A node whose lookup was counted, and a handle that was opened, are noted right after.
//! 4. The reply is written, the used entry staged, the used index moved: now the guest knows, and the request is over.
//!
//! A crash before 1 leaves nothing to look at. Between 1 and 2, and between 2 and 4, the next process looks at what is there,
//! compares it with the facts and does what is missing; it takes back the lookup and the handle of 3 first, because it will
//! count and open again. A crash in the middle of 3 leaves a lookup or a handle too many, which costs memory until the guest
//! unmounts; it is never one too few. For the same reason a FORGET is noted before it is done.

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use super::placed::Placed;
#[cfg(test)]
use crate::sim::fate::{self, Bug};

/// Queues of a device that have lines.
const QUEUES: usize = ferry_shared::limits::MAX_QUEUES_PER_DEVICE as usize;
/// Heads of a queue that have lines.
const HEADS: usize = ferry_shared::limits::MAX_RING_SIZE as usize;
/// Words of a line: a cache line.
const WORDS: usize = 8;

const KEY: usize = 0;
const NODE: usize = 1;
const HANDLE: usize = 2;
const PHASE: usize = 3;
const FACTS: usize = 4;
/// Facts that a line has room for.
pub const FACT_WORDS: usize = WORDS - FACTS;

/// In the phase: the act may have happened. Above it is the number of the process that wrote the line.
const BEGUN: u64 = 1;

/// The lines of a device.
#[derive(Debug)]
pub struct Lines {
    words: Placed<AtomicU64>,
    life: u64,
}

/// The line of a descriptor head, and the number of this process.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The line.
    pub line: &'a Line,
    /// How many processes have used the recovery memory, this one included.
    pub life: u64,
}

impl Lines {
    /// Words that all lines take.
    pub const WORDS: usize = QUEUES * HEADS * WORDS;

    /// Lines in [`Lines::WORDS`] words, in the hands of process number `life`.
    pub fn new(words: Placed<AtomicU64>, life: u64) -> Lines {
        Lines { words, life }
    }

    /// The line of a descriptor head; `None` for a queue or head that no driver of a device has.
    pub fn line(&self, queue: u16, head: u16) -> Option<Place<'_>> {
        if usize::from(head) >= HEADS {
            return None;
        }
        let number = usize::from(queue)
            .checked_mul(HEADS)?
            .checked_add(usize::from(head))?;
        let line = self.words.as_chunks::<WORDS>().0.get(number)?;
        Some(Place {
            line,
            life: self.life,
        })
    }
}

/// Stores a word of a line. In the simulation the process may die here.
fn put(word: &AtomicU64, value: u64) {
    #[cfg(test)]
    fate::store();
    word.store(value, Release);
}

/// One request's notes.
pub type Line = [AtomicU64; WORDS];

/// The notes of the request that is being executed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Journal<'a> {
    place: Option<Place<'a>>,
    key: u64,
}

/// What an earlier execution of the request has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Before {
    /// Nothing: the act has not begun.
    Nothing,
    /// The act may have happened; this is what was there before it.
    Begun([u64; FACT_WORDS]),
}

impl<'a> Journal<'a> {
    /// The notes of request `unique` of mount number `epoch`, an operation `opcode`, on this line; `None`: nothing is noted.
    pub fn new(place: Option<Place<'a>>, epoch: u32, unique: u64, opcode: u32) -> Journal<'a> {
        let odd = 0x9e37_79b9_7f4a_7c15u64;
        let kind = u64::from(epoch) << 32 | u64::from(opcode);
        let key = (unique ^ kind.wrapping_mul(odd)).wrapping_mul(odd) | 1;
        let journal = Journal { place, key };
        if let Some(line) = journal.own()
            && !journal.is_resumed()
        {
            // Another request of this process had the same number.
            put(&line[KEY], 0);
        }
        journal
    }

    /// Whether anything is noted at all.
    pub fn is_on(&self) -> bool {
        self.place.is_some()
    }

    fn own(&self) -> Option<&'a Line> {
        let line = self.place?.line;
        (line[KEY].load(Acquire) == self.key).then_some(line)
    }

    /// Whether the request has been executed before, at least in part, by an earlier process.
    pub fn is_resumed(&self) -> bool {
        self.own()
            .is_some_and(|line| line[PHASE].load(Acquire) & !BEGUN != self.phase())
    }

    /// The phase before the act.
    fn phase(&self) -> u64 {
        self.place.map_or(0, |place| place.life << 1)
    }

    /// Makes the line this request's.
    fn claim(&self) -> Option<&'a Line> {
        let line = self.place?.line;
        if line[KEY].load(Relaxed) != self.key {
            // Void first: what follows must not be read as another request's.
            put(&line[KEY], 0);
            put(&line[NODE], 0);
            put(&line[HANDLE], 0);
            put(&line[PHASE], self.phase());
            put(&line[KEY], self.key);
        }
        Some(line)
    }

    /// What an earlier execution has left.
    pub fn before(&self) -> Before {
        #[cfg(test)]
        if fate::has(Bug::IntentIgnored) {
            return Before::Nothing;
        }
        match self.own() {
            Some(line) if line[PHASE].load(Acquire) & BEGUN != 0 => {
                Before::Begun(core::array::from_fn(|i| {
                    line.get(FACTS.wrapping_add(i))
                        .map_or(0, |fact| fact.load(Relaxed))
                }))
            }
            _ => Before::Nothing,
        }
    }

    /// The act comes next.
    pub fn begin(&self, facts: [u64; FACT_WORDS]) {
        let Some(line) = self.claim() else { return };
        #[cfg(test)]
        if fate::has(Bug::FactsLate) {
            put(&line[PHASE], self.phase() | BEGUN);
        }
        for (word, fact) in line.iter().skip(FACTS).zip(facts) {
            put(word, fact);
        }
        put(&line[PHASE], self.phase() | BEGUN);
    }

    /// A lookup of this node was counted for the reply; 0 is none.
    pub fn counted(&self, nodeid: u64) {
        if nodeid != 0
            && let Some(line) = self.claim()
        {
            put(&line[NODE], nodeid);
        }
    }

    /// This handle was opened for the reply.
    pub fn opened(&self, fh: u64) {
        if let Some(line) = self.claim() {
            put(&line[HANDLE], fh);
        }
    }

    /// Takes the node whose lookup an earlier execution has counted.
    pub fn take_counted(&self) -> Option<u64> {
        self.take(NODE)
    }

    /// Takes the handle that an earlier execution has opened.
    pub fn take_opened(&self) -> Option<u64> {
        self.take(HANDLE)
    }

    fn take(&self, at: usize) -> Option<u64> {
        let word = self.own()?.get(at)?;
        let found = word.load(Acquire);
        put(word, 0);
        (found != 0).then_some(found)
    }

    /// How many steps of a request that has many have been noted.
    pub fn steps(&self) -> u64 {
        self.own().map_or(0, |line| line[NODE].load(Acquire))
    }

    /// Notes that so many steps are done, or about to be.
    pub fn set_steps(&self, steps: u64) {
        #[cfg(test)]
        if fate::has(Bug::ForgetDoubled) {
            return;
        }
        if let Some(line) = self.claim() {
            put(&line[NODE], steps);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line() -> Line {
        core::array::from_fn(|i| AtomicU64::new(if i == KEY { 0 } else { 77 }))
    }

    /// The line in the hands of process number `life`.
    fn at(line: &Line, life: u64) -> Option<Place<'_>> {
        Some(Place { line, life })
    }

    #[test]
    fn a_line_tells_only_the_request_that_wrote_it_and_only_a_later_process() {
        let line = line();
        let first = Journal::new(at(&line, 1), 1, 10, 9);
        assert!(!first.is_resumed());
        assert_eq!(first.before(), Before::Nothing);
        first.begin([1, 2, 3, 4]);
        first.counted(5);
        for other in [(2, 10, 9), (1, 11, 9), (1, 10, 8)] {
            let other = Journal::new(at(&line, 2), other.0, other.1, other.2);
            assert!(!other.is_resumed());
            assert_eq!(other.take_counted(), None);
        }
        let again = Journal::new(at(&line, 2), 1, 10, 9);
        assert!(again.is_resumed());
        assert_eq!(again.before(), Before::Begun([1, 2, 3, 4]));
        assert_eq!(again.take_counted(), Some(5));
        assert_eq!(again.take_counted(), None);
        let next = Journal::new(at(&line, 2), 1, 11, 9);
        next.opened(6);
        assert!(!again.is_resumed());
        assert_eq!(next.before(), Before::Nothing);
        assert_eq!((next.take_counted(), next.take_opened()), (None, Some(6)));
    }

    #[test]
    fn two_requests_of_one_process_with_the_same_number_are_two() {
        let line = line();
        let first = Journal::new(at(&line, 3), 1, 10, 9);
        first.begin([1, 2, 3, 4]);
        first.counted(5);
        let second = Journal::new(at(&line, 3), 1, 10, 9);
        assert!(!second.is_resumed());
        assert_eq!(second.before(), Before::Nothing);
        assert_eq!((second.take_counted(), second.steps()), (None, 0));
    }

    #[test]
    fn every_prefix_of_the_stores_is_nothing_or_all_of_a_note() {
        // A copy of the line after each store, in the order in which `claim` and `begin` make them.
        let old = [99, 1, 2, BEGUN, 6, 7, 8, 9];
        let key = Journal::new(None, 1, 10, 9).key;
        let stores = [
            (KEY, 0),
            (NODE, 0),
            (HANDLE, 0),
            (PHASE, 4 << 1),
            (KEY, key),
            (FACTS, 21),
            (FACTS + 1, 22),
            (FACTS + 2, 23),
            (FACTS + 3, 24),
            (PHASE, 4 << 1 | BEGUN),
        ];
        let mut words = old;
        for (n, (word, value)) in stores.into_iter().enumerate() {
            words[word] = value;
            let line: Line = words.map(AtomicU64::new);
            let found = Journal::new(at(&line, 5), 1, 10, 9);
            let expected = match n {
                9 => Before::Begun([21, 22, 23, 24]),
                _ => Before::Nothing,
            };
            assert_eq!(found.before(), expected, "after store {n}");
            assert_eq!(found.take_counted(), None);
        }
        let line: Line = old.map(AtomicU64::new);
        Journal::new(at(&line, 4), 1, 10, 9).begin([21, 22, 23, 24]);
        assert_eq!(line.map(|w| w.into_inner()), words);
    }
}
