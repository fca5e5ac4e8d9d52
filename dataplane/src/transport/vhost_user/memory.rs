//! The front end's memory table.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::error::PeerError;
use super::wire::MemRegion;
use crate::mem::{GuestMap, Iova};
use crate::os::mmap::{MappedRegion, SharedMap, guest_map};

/// The regions of guest memory, with the addresses that the front end knows them by.
#[derive(Debug, Default)]
pub(super) struct MemoryTable {
    regions: Vec<(MemRegion, Arc<SharedMap>)>,
}

impl MemoryTable {
    /// A table of these regions.
    pub(super) fn new(
        regions: impl Iterator<Item = (MemRegion, OwnedFd)>,
    ) -> Result<MemoryTable, PeerError> {
        let mut table = MemoryTable::default();
        for (region, fd) in regions {
            table.map(region, &fd)?;
        }
        Ok(table)
    }

    fn map(&mut self, region: MemRegion, fd: &OwnedFd) -> Result<(), PeerError> {
        let map = SharedMap::new(fd, region.mmap_offset, region.size, true)?;
        self.regions.push((region, Arc::new(map)));
        Ok(())
    }

    /// The table with one region more.
    pub(super) fn with(&self, region: MemRegion, fd: &OwnedFd) -> Result<MemoryTable, PeerError> {
        let mut table = MemoryTable {
            regions: self.regions.clone(),
        };
        table.map(region, fd)?;
        Ok(table)
    }

    /// The table without one region; where it lies in its file does not matter.
    pub(super) fn without(&self, region: &MemRegion) -> Result<MemoryTable, PeerError> {
        let same = |r: &MemRegion| {
            (r.guest_addr, r.size, r.user_addr)
                == (region.guest_addr, region.size, region.user_addr)
        };
        let mut regions = self.regions.clone();
        let at = regions.iter().position(|(r, _)| same(r));
        regions.remove(at.ok_or(PeerError::NoRegion(region.guest_addr))?);
        Ok(MemoryTable { regions })
    }

    /// The memory as the cores use it.
    pub(super) fn guest_map(&self) -> Result<Arc<GuestMap>, PeerError> {
        let regions: Vec<MappedRegion> = self
            .regions
            .iter()
            .map(|(region, map)| MappedRegion {
                iova: Iova(region.guest_addr),
                map: Arc::clone(map),
                writable: true,
            })
            .collect();
        Ok(Arc::new(guest_map(&regions)?))
    }

    /// The guest address of an address of the front end's.
    pub(super) fn guest_address(&self, user: u64) -> Result<Iova, PeerError> {
        self.regions
            .iter()
            .find_map(|(region, _)| {
                let offset = user.checked_sub(region.user_addr)?;
                let inside = offset < region.size;
                inside.then(|| region.guest_addr.checked_add(offset))?
            })
            .map(Iova)
            .ok_or(PeerError::UserAddress(user))
    }
}
