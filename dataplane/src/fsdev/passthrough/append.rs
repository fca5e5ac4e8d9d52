//! Writes through a file that was opened for appending, which go to its end whatever their offset, because others append to
//! the file too. Two kinds must not.
//!
//! A page that a guest writes back from a mapping belongs where the mapping has it.
//!
//! A long direct write comes in pieces, all at once and in any order. A piece that comes before its predecessors goes to its
//! own offset and leaves a gap, which they fill. What was opened for appending is therefore written one piece at a time and
//! at once; where that could wait for long (`Hot`), the pieces go to the ring in the order in which they come.

use ferry_shared::errno::Errno;
use spin::Mutex;

use super::handle::OpenFile;
use super::hot::Hot;
use super::sys;
use crate::fuse::abi::{FUSE_WRITE_CACHE, fuse_write_in};
use crate::mem::Segments;

/// Files whose gaps are known at once.
const FILES: usize = 64;
/// An unaligned write has a first piece that is shorter by less than this.
const PAGE: u64 = 4_096;

/// What is still to come before a piece that came early.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Gap {
    fh: u64,
    start: u64,
    end: u64,
    missing: u64,
}

impl Gap {
    /// Whether a piece at `offset` belongs there, in a file that ends at `size` now, where a whole piece has `piece` bytes.
    fn takes(&mut self, fh: u64, offset: u64, len: u64, size: u64, piece: u64) -> bool {
        let open = self.fh == fh && self.missing > 0;
        if open && self.start <= offset && offset.saturating_add(len) <= self.end {
            self.missing = self.missing.saturating_sub(len);
            return true;
        }
        // The predecessors of a piece are whole. Anything else is a guest that does not know that the file was truncated.
        let ahead = offset.saturating_sub(size);
        let rest = ahead.saturating_add(PAGE).saturating_sub(1);
        let early = ahead > 0 && rest.checked_rem(piece).is_some_and(|rest| rest < PAGE);
        if early {
            let (start, missing) = if open {
                (self.start, self.missing)
            } else {
                (size, 0)
            };
            *self = Gap {
                fh,
                start,
                end: offset,
                missing: missing.saturating_add(ahead),
            };
        }
        early
    }
}

/// The gaps of a device's files.
#[derive(Debug)]
pub(super) struct Appends {
    gaps: [Mutex<Gap>; FILES],
    piece: u64,
}

impl Appends {
    /// For writes of at most `piece` bytes.
    pub(super) fn new(piece: u32) -> Appends {
        Appends {
            gaps: core::array::from_fn(|_| Mutex::default()),
            piece: u64::from(piece),
        }
    }

    /// Writes to a file that was opened for appending; `None` where that could wait for long.
    pub(super) fn write(
        &self,
        hot: &Hot,
        file: &OpenFile<'_>,
        arg: &fuse_write_in,
        data: Segments<'_>,
    ) -> Option<Result<u32, Errno>> {
        let index = (arg.fh as usize).checked_rem(FILES)?;
        let mut gap = self.gaps.get(index)?.lock();
        let placed = if arg.write_flags & FUSE_WRITE_CACHE != 0 {
            true
        } else {
            let size = match sys::stat_fd(file.fd()) {
                Ok(stat) => stat.stx_size,
                Err(errno) => return Some(Err(errno)),
            };
            gap.takes(arg.fh, arg.offset, data.len() as u64, size, self.piece)
        };
        if !placed {
            return hot.write_now(file, arg.offset, data);
        }
        // Nobody else uses this descriptor meanwhile: whatever writes through it holds the lock.
        if let Err(errno) = sys::set_append(file.fd(), false) {
            return Some(Err(errno));
        }
        let written = hot.write_now(file, arg.offset, data);
        match sys::set_append(file.fd(), true) {
            Ok(()) => written,
            Err(errno) => Some(Err(errno)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where pieces of `PIECE` bytes end up that come in this order, in a file of 100 bytes.
    fn places(order: &[u64]) -> Vec<u64> {
        const PIECE: u64 = 8 * PAGE;
        let mut gap = Gap::default();
        let mut size = 100;
        let place = |number: &u64| {
            let offset = 100 + number * PIECE;
            let at = if gap.takes(7, offset, PIECE, size, PIECE) {
                offset
            } else {
                size
            };
            size = size.max(at + PIECE);
            (at - 100) / PIECE
        };
        order.iter().map(place).collect()
    }

    #[test]
    fn pieces_go_where_they_belong_in_any_order() {
        for order in [
            [0, 1, 2, 3],
            [3, 2, 1, 0],
            [1, 0, 3, 2],
            [2, 0, 3, 1],
            [1, 3, 0, 2],
        ] {
            assert_eq!(places(&order), order);
        }
    }

    #[test]
    fn a_write_of_a_guest_with_an_old_size_goes_to_the_end() {
        let mut gap = Gap::default();
        for (offset, size) in [(0, 5_000), (5_000, 5_000), (90_000, 10)] {
            assert!(!gap.takes(7, offset, 100, size, 131_072), "{offset}");
        }
        assert_eq!(gap, Gap::default());
    }

    #[test]
    fn a_gap_belongs_to_one_file_and_is_filled_once() {
        let mut gap = Gap::default();
        assert!(gap.takes(7, 131_072, 131_072, 0, 131_072));
        assert!(!gap.takes(71, 0, 131_072, 262_144, 131_072));
        assert!(gap.takes(7, 0, 131_072, 262_144, 131_072));
        assert!(!gap.takes(7, 0, 131_072, 262_144, 131_072));
    }
}
