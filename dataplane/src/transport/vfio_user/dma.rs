//! The windows of guest memory that a client has opened with `DMA_MAP`.
//!
//! Owns the list and its rules: no two windows overlap, a window goes as a whole. It must never map or unmap anything
//! itself: `M` is whatever keeps a window's memory mapped, and the list drops it. [`super::conn`] calls it.

use ferry_shared::limits::MAX_MEMORY_REGIONS;
use nix::errno::Errno;

use super::wire::{DmaMap, DmaUnmap, dma_flags};

/// A window.
#[derive(Debug)]
pub(crate) struct Window<M> {
    /// First guest address.
    pub(crate) address: u64,
    /// Bytes, not 0.
    pub(crate) size: u64,
    /// Whether the device may write.
    pub(crate) writable: bool,
    /// Its memory; `None` when the client sent no file, so that accesses to it fail.
    pub(crate) memory: Option<M>,
}

/// All windows, by address.
#[derive(Debug)]
pub(crate) struct Windows<M>(Vec<Window<M>>);

impl<M> Windows<M> {
    pub(crate) fn new() -> Windows<M> {
        Windows(Vec::new())
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Window<M>> {
        self.0.iter()
    }

    /// Checks a `DMA_MAP` against the windows there are; says where the new one belongs.
    fn place(&self, map: &DmaMap) -> Result<usize, Errno> {
        if map.flags & !(dma_flags::READ | dma_flags::WRITE) != 0
            || map.flags & dma_flags::READ == 0
        {
            return Err(Errno::EINVAL);
        }
        let last = map
            .size
            .checked_sub(1)
            .and_then(|n| map.address.checked_add(n));
        let last = last.ok_or(Errno::EINVAL)?;
        let at = self.0.partition_point(|w| w.address < map.address);
        let before = at.checked_sub(1).and_then(|i| self.0.get(i));
        // A window's last address exists, as was checked when it came.
        let hits_before = before.is_some_and(|w| w.address.wrapping_add(w.size - 1) >= map.address);
        let hits_after = self.0.get(at).is_some_and(|w| w.address <= last);
        if hits_before || hits_after {
            return Err(Errno::EEXIST);
        }
        if self.0.len() >= MAX_MEMORY_REGIONS {
            return Err(Errno::ENOSPC);
        }
        Ok(at)
    }

    /// Adds a window; `memory` is asked for only when the window is acceptable.
    pub(crate) fn map(
        &mut self,
        map: &DmaMap,
        memory: impl FnOnce() -> Result<Option<M>, Errno>,
    ) -> Result<(), Errno> {
        let at = self.place(map)?;
        let window = Window {
            address: map.address,
            size: map.size,
            writable: map.flags & dma_flags::WRITE != 0,
            memory: memory()?,
        };
        self.0.insert(at, window);
        Ok(())
    }

    /// Removes the window that a `DMA_UNMAP` names exactly, or all of them.
    pub(crate) fn unmap(&mut self, unmap: &DmaUnmap) -> Result<(), Errno> {
        match unmap.flags {
            dma_flags::UNMAP_ALL if unmap.address == 0 && unmap.size == 0 => {
                self.0.clear();
                Ok(())
            }
            0 => {
                let named = |w: &Window<M>| w.address == unmap.address && w.size == unmap.size;
                let at = self.0.iter().position(named).ok_or(Errno::ENOENT)?;
                self.0.remove(at);
                Ok(())
            }
            // No bitmap of written pages is kept.
            dma_flags::UNMAP_GET_DIRTY_BITMAP => Err(Errno::ENOTSUP),
            _ => Err(Errno::EINVAL),
        }
    }

    /// Removes everything; the client is gone.
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(address: u64, size: u64) -> DmaMap {
        DmaMap {
            argsz: 32,
            flags: 3,
            offset: 0,
            address,
            size,
        }
    }

    fn add(windows: &mut Windows<u32>, address: u64, size: u64) -> Result<(), Errno> {
        windows.map(&window(address, size), || Ok(Some(1)))
    }

    fn remove(
        windows: &mut Windows<u32>,
        flags: u32,
        address: u64,
        size: u64,
    ) -> Result<(), Errno> {
        windows.unmap(&DmaUnmap {
            argsz: 24,
            flags,
            address,
            size,
        })
    }

    #[test]
    fn windows_must_not_overlap() {
        let mut w = Windows::new();
        add(&mut w, 0x2000, 0x1000).unwrap();
        add(&mut w, 0x1000, 0x1000).unwrap();
        add(&mut w, 0x3000, 0x1000).unwrap();
        for (address, size) in [
            (0x2000, 0x1000),
            (0x2fff, 1),
            (0xfff, 2),
            (0, u64::MAX),
            (0x1800, 1),
        ] {
            assert_eq!(
                add(&mut w, address, size),
                Err(Errno::EEXIST),
                "{address:#x} + {size:#x}"
            );
        }
        let order: Vec<u64> = w.iter().map(|w| w.address).collect();
        assert_eq!(order, [0x1000, 0x2000, 0x3000]);
    }

    #[test]
    fn empty_wrapping_and_unreadable_windows_are_refused() {
        let mut w = Windows::new();
        assert_eq!(add(&mut w, 0x1000, 0), Err(Errno::EINVAL));
        assert_eq!(add(&mut w, u64::MAX, 2), Err(Errno::EINVAL));
        assert_eq!(add(&mut w, u64::MAX, 1), Ok(()));
        let unreadable = DmaMap {
            flags: 2,
            ..window(0, 1)
        };
        assert_eq!(w.map(&unreadable, || Ok(None)), Err(Errno::EINVAL));
        assert_eq!(
            w.map(&window(0, 1), || Err(Errno::EBADF)),
            Err(Errno::EBADF)
        );
        assert_eq!(w.iter().count(), 1);
    }

    #[test]
    fn a_window_goes_only_as_a_whole() {
        let mut w = Windows::new();
        add(&mut w, 0x1000, 0x1000).unwrap();
        add(&mut w, 0x2000, 0x1000).unwrap();
        assert_eq!(remove(&mut w, 0, 0x1000, 0x2000), Err(Errno::ENOENT));
        assert_eq!(remove(&mut w, 1, 0x1000, 0x1000), Err(Errno::ENOTSUP));
        assert_eq!(remove(&mut w, 2, 0x1000, 0x1000), Err(Errno::EINVAL));
        remove(&mut w, 0, 0x1000, 0x1000).unwrap();
        assert_eq!(remove(&mut w, 0, 0x1000, 0x1000), Err(Errno::ENOENT));
        remove(&mut w, 2, 0, 0).unwrap();
        assert_eq!(w.iter().count(), 0);
    }

    #[test]
    fn the_number_of_windows_is_bounded() {
        let mut w = Windows::new();
        for n in 0..MAX_MEMORY_REGIONS as u64 {
            add(&mut w, n * 2, 1).unwrap();
        }
        assert_eq!(add(&mut w, u64::MAX, 1), Err(Errno::ENOSPC));
    }
}
