//! The memory of the counters: made by the data plane, mapped by both sides.

use core::sync::atomic::AtomicU64;
use std::os::fd::OwnedFd;

use super::{Reader, bytes, format};
pub use crate::sealed::MapError;
use crate::sealed::Sealed;

/// Mapped counters, unmapped when dropped.
#[derive(Debug)]
pub struct Counters(Sealed);

impl Counters {
    /// Makes the counters of so many cores, all zero, and the file by which others can read them.
    pub fn create(cores: usize) -> Result<(Counters, OwnedFd), MapError> {
        let (memory, file) = Sealed::create("ferry-counters", bytes(cores))?;
        format(memory.words(), cores);
        Ok((Counters(memory), file))
    }

    /// Maps what a data plane has made, to read, after checking that it cannot shrink.
    pub fn open(file: &OwnedFd) -> Result<Counters, MapError> {
        let counters = Counters(Sealed::open(file)?);
        match Reader::new(counters.words()) {
            Some(_) => Ok(counters),
            None => Err(MapError::Form),
        }
    }

    /// The words. Those of [`Counters::open`] must not be stored to, which only functions of the data plane do.
    pub fn words(&self) -> &[AtomicU64] {
        self.0.words()
    }

    /// To read them.
    pub fn reader(&self) -> Reader<'_> {
        Reader(self.words())
    }
}
