//! Crash-atomic small records: what the management thread knows, each under a key.
//!
//! A cell has two copies. A change is written to the older one, which is marked void first and valid last, so that a crash
//! at any store leaves the state before or the state after. Which copy counts is told by a sequence number; a checksum tells
//! a copy that a crash cannot have left, and the whole memory is refused then.
//!
//! Called by the management thread only. What the values mean is their writers' business.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering, compiler_fence};

/// Cells in all: three for each device and each fsdev that a service can have, and as many again.
pub const CELLS: usize = 4096;
/// Longest key in bytes.
pub const MAX_KEY: usize = 128;
/// Longest value in bytes: the largest message of the control rings fits, and so does a table of memory regions.
pub const MAX_VALUE: usize = COPY_WORDS * WORD - HEAD * WORD - MAX_KEY;

const WORD: usize = size_of::<u64>();
/// Words of one copy.
const COPY_WORDS: usize = 8 * 1024;
const CELL_WORDS: usize = 2 * COPY_WORDS;
/// Words of the memory that all cells take. The first holds how many cells were ever used.
pub const WORDS: usize = FIRST + CELLS * CELL_WORDS;
const FIRST: usize = 512;
const USED: usize = 0;

/// Words at the beginning of a copy.
const SEQUENCE: usize = 0;
const CHECKSUM: usize = 1;
const LENGTHS: usize = 2;
const HEAD: usize = 3;
/// In `LENGTHS`: the cell is free.
const REMOVED: u64 = 1 << 63;

/// Memory in words. Stores happen in the order in which they are made.
pub trait Words {
    /// Reads a word; 0 outside.
    fn load(&self, at: usize) -> u64;
    /// Writes a word; nothing outside.
    fn store(&self, at: usize, value: u64);
}

impl<T: std::ops::Deref<Target = [AtomicU64]>> Words for T {
    fn load(&self, at: usize) -> u64 {
        self.get(at).map_or(0, |word| word.load(Ordering::Acquire))
    }

    fn store(&self, at: usize, value: u64) {
        if let Some(word) = self.get(at) {
            word.store(value, Ordering::Release);
            // The reader comes after this process: order among the stores is all that counts.
            compiler_fence(Ordering::SeqCst);
        }
    }
}

/// Why a value cannot be kept, or the cells cannot be taken over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CellError {
    /// The key is empty or too long.
    #[error("the key {key:?} is empty or longer than {MAX_KEY} bytes")]
    Key {
        /// The key.
        key: String,
    },
    /// The value is too long.
    #[error("the record {key:?} of {len} bytes is longer than {MAX_VALUE}")]
    TooLong {
        /// The key.
        key: String,
        /// Bytes of the value.
        len: usize,
    },
    /// Every cell is in use.
    #[error("all {CELLS} recovery cells are in use")]
    Full,
    /// The number of used cells is impossible.
    #[error("{used} recovery cells are said to be in use, of {CELLS}")]
    Used {
        /// The number found.
        used: u64,
    },
    /// A copy that is marked valid does not hold together.
    #[error("copy {copy} of recovery cell {cell} is damaged: {what}")]
    Damaged {
        /// The cell.
        cell: usize,
        /// Which of its copies.
        copy: usize,
        /// What is wrong.
        what: &'static str,
    },
    /// Two cells have the same key.
    #[error("recovery cells {first} and {second} both hold {key:?}")]
    Twice {
        /// The key.
        key: String,
        /// A cell.
        first: usize,
        /// Another.
        second: usize,
    },
}

/// A copy as it was read.
struct Copy {
    sequence: u64,
    /// `None`: the cell is free.
    entry: Option<(String, Vec<u8>)>,
}

/// Where the value of a key is.
#[derive(Clone, Copy, Debug)]
struct Place {
    cell: usize,
    /// The copy that counts.
    copy: usize,
    sequence: u64,
}

/// All cells.
#[derive(Debug)]
pub struct Cells<M> {
    memory: M,
    index: BTreeMap<String, Place>,
    /// Cells that were used and are free, with the copy that says so.
    free: Vec<Place>,
    used: usize,
}

impl<M: Words> Cells<M> {
    /// Takes over what the memory holds; zeroes hold nothing.
    pub fn adopt(memory: M) -> Result<Cells<M>, CellError> {
        let found = memory.load(USED);
        let used = usize::try_from(found)
            .ok()
            .filter(|&used| used <= CELLS)
            .ok_or(CellError::Used { used: found })?;
        let mut cells = Cells {
            memory,
            index: BTreeMap::new(),
            free: Vec::new(),
            used,
        };
        for cell in 0..used {
            cells.adopt_cell(cell)?;
        }
        Ok(cells)
    }

    fn adopt_cell(&mut self, cell: usize) -> Result<(), CellError> {
        let first = self.read(cell, 0)?;
        let second = self.read(cell, 1)?;
        let newest = match (first, second) {
            (None, None) => None,
            (Some(only), None) => Some((0, only)),
            (None, Some(only)) => Some((1, only)),
            (Some(a), Some(b)) if a.sequence == b.sequence => {
                return Err(CellError::Damaged {
                    cell,
                    copy: 1,
                    what: "it has the sequence number of the other copy",
                });
            }
            (Some(a), Some(b)) if a.sequence > b.sequence => Some((0, a)),
            (Some(_), Some(b)) => Some((1, b)),
        };
        let Some((copy, newest)) = newest else {
            self.free.push(Place {
                cell,
                copy: 1,
                sequence: 0,
            });
            return Ok(());
        };
        let place = Place {
            cell,
            copy,
            sequence: newest.sequence,
        };
        match newest.entry {
            None => self.free.push(place),
            Some((key, _)) => {
                if let Some(other) = self.index.get(&key) {
                    return Err(CellError::Twice {
                        key,
                        first: other.cell,
                        second: cell,
                    });
                }
                self.index.insert(key, place);
            }
        }
        Ok(())
    }

    /// The value under a key.
    pub fn get(&self, key: &str) -> Option<Vec<u8>> {
        let place = self.index.get(key)?;
        let copy = self.read(place.cell, place.copy).ok()??;
        copy.entry.map(|(_, value)| value)
    }

    /// All keys, in order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.index.keys().map(String::as_str)
    }

    /// All keys and values, in order of the keys.
    pub fn iter(&self) -> impl Iterator<Item = (&str, Vec<u8>)> {
        self.keys().filter_map(|key| Some((key, self.get(key)?)))
    }

    /// Keeps a value under a key, in place of what was there.
    pub fn put(&mut self, key: &str, value: &[u8]) -> Result<(), CellError> {
        if key.is_empty() || key.len() > MAX_KEY {
            return Err(CellError::Key { key: key.into() });
        }
        if value.len() > MAX_VALUE {
            let (key, len) = (key.into(), value.len());
            return Err(CellError::TooLong { key, len });
        }
        let place = match self.index.get(key) {
            Some(&place) => place,
            None => self.take_free()?,
        };
        let written = self.write(place, Some((key, value)));
        self.index.insert(key.into(), written);
        Ok(())
    }

    /// Forgets a key; `false` when there is no such key.
    pub fn remove(&mut self, key: &str) -> bool {
        let Some(place) = self.index.remove(key) else {
            return false;
        };
        let written = self.write(place, None);
        self.free.push(written);
        true
    }

    fn take_free(&mut self) -> Result<Place, CellError> {
        if let Some(place) = self.free.pop() {
            return Ok(place);
        }
        if self.used >= CELLS {
            return Err(CellError::Full);
        }
        let cell = self.used;
        self.used += 1;
        self.memory.store(USED, self.used as u64);
        Ok(Place {
            cell,
            copy: 1,
            sequence: 0,
        })
    }

    fn base(cell: usize, copy: usize) -> usize {
        FIRST + cell * CELL_WORDS + copy * COPY_WORDS
    }

    /// Writes the copy that does not count, and makes it count.
    fn write(&self, place: Place, entry: Option<(&str, &[u8])>) -> Place {
        let copy = 1 - place.copy;
        let sequence = place.sequence + 1;
        let at = Self::base(place.cell, copy);
        let (key, value) = entry.unwrap_or_default();
        let removed = if entry.is_none() { REMOVED } else { 0 };
        let lengths = removed | (key.len() as u64) << 32 | value.len() as u64;
        self.memory.store(at + SEQUENCE, 0);
        self.memory.store(at + LENGTHS, lengths);
        let words = words_of(key.as_bytes()).chain(words_of(value));
        for (i, word) in words.enumerate() {
            self.memory.store(at + HEAD + i, word);
        }
        let sum = checksum(sequence, lengths, key.as_bytes(), value);
        self.memory.store(at + CHECKSUM, sum);
        self.memory.store(at + SEQUENCE, sequence);
        Place {
            cell: place.cell,
            copy,
            sequence,
        }
    }

    /// Reads a copy; `None` when it is void.
    fn read(&self, cell: usize, copy: usize) -> Result<Option<Copy>, CellError> {
        let damaged = |what| CellError::Damaged { cell, copy, what };
        let at = Self::base(cell, copy);
        let sequence = self.memory.load(at + SEQUENCE);
        if sequence == 0 {
            return Ok(None);
        }
        let lengths = self.memory.load(at + LENGTHS);
        let key_len = (lengths & !REMOVED) as usize >> 32;
        let value_len = lengths as u32 as usize;
        if key_len > MAX_KEY || value_len > MAX_VALUE {
            return Err(damaged("its length is impossible"));
        }
        let key = self.bytes(at + HEAD, key_len);
        let value = self.bytes(at + HEAD + key_len.div_ceil(WORD), value_len);
        if self.memory.load(at + CHECKSUM) != checksum(sequence, lengths, &key, &value) {
            return Err(damaged("the checksum does not match"));
        }
        if lengths & REMOVED != 0 {
            return Ok(Some(Copy {
                sequence,
                entry: None,
            }));
        }
        let key = String::from_utf8(key).map_err(|_| damaged("its key is not text"))?;
        if key.is_empty() {
            return Err(damaged("its key is empty"));
        }
        Ok(Some(Copy {
            sequence,
            entry: Some((key, value)),
        }))
    }

    fn bytes(&self, at: usize, len: usize) -> Vec<u8> {
        let words = (at..at + len.div_ceil(WORD)).map(|at| self.memory.load(at));
        let mut bytes: Vec<u8> = words.flat_map(u64::to_ne_bytes).collect();
        bytes.truncate(len);
        bytes
    }
}

/// Bytes as words, the last one filled up with zeroes.
fn words_of(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.chunks(WORD).map(|chunk| {
        let mut word = [0; WORD];
        for (to, from) in word.iter_mut().zip(chunk) {
            *to = *from;
        }
        u64::from_ne_bytes(word)
    })
}

fn checksum(sequence: u64, lengths: u64, key: &[u8], value: &[u8]) -> u64 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&sequence.to_ne_bytes());
    hasher.update(&lengths.to_ne_bytes());
    hasher.update(key);
    hasher.update(value);
    u64::from(hasher.finalize())
}

#[cfg(test)]
mod tests;
