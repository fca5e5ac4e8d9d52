//! The front end's memory table.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;

use super::error::PeerError;
use super::wire::MemRegion;
use crate::keeper::Keeper;
use crate::mem::{GuestMap, Iova};
use crate::os::fdstore::Kept;
use crate::os::mmap::{MappedRegion, SharedMap, guest_map};

/// The regions of guest memory, with the addresses that the front end knows them by.
#[derive(Debug, Default)]
pub(super) struct MemoryTable {
    regions: Vec<Mapped>,
}

/// A region, its mapping, and its file as it is kept.
#[derive(Clone, Debug)]
struct Mapped {
    region: MemRegion,
    map: Arc<SharedMap>,
    file: Option<Kept>,
}

impl MemoryTable {
    /// A table of these regions.
    pub(super) fn new(
        regions: impl Iterator<Item = (MemRegion, OwnedFd)>,
        keeper: &Keeper,
    ) -> Result<MemoryTable, PeerError> {
        let mut table = MemoryTable::default();
        for (region, fd) in regions {
            table.map(region, &fd, keeper.keep(&fd))?;
        }
        Ok(table)
    }

    fn map(
        &mut self,
        region: MemRegion,
        fd: impl AsFd,
        file: Option<Kept>,
    ) -> Result<(), PeerError> {
        let map = SharedMap::new(fd, region.mmap_offset, region.size, true)?;
        self.regions.push(Mapped {
            region,
            map: Arc::new(map),
            file,
        });
        Ok(())
    }

    /// What a later process needs.
    pub(super) fn saved(&self) -> Vec<(MemRegion, u64)> {
        let number = |m: &Mapped| Some((m.region, m.file.as_ref()?.number()));
        self.regions.iter().filter_map(number).collect()
    }

    /// The table of a former process.
    pub(super) fn restore(
        saved: &[(MemRegion, u64)],
        keeper: &Keeper,
    ) -> Result<MemoryTable, PeerError> {
        let mut table = MemoryTable::default();
        for &(region, number) in saved {
            let file = keeper.fds().adopt(number);
            let file = file.ok_or(PeerError::Fd(Errno::EBADF))?;
            table.map(region, file.clone(), Some(file))?;
        }
        Ok(table)
    }

    /// The table with one region more.
    pub(super) fn with(
        &self,
        region: MemRegion,
        fd: &OwnedFd,
        keeper: &Keeper,
    ) -> Result<MemoryTable, PeerError> {
        let mut table = MemoryTable {
            regions: self.regions.clone(),
        };
        table.map(region, fd, keeper.keep(fd))?;
        Ok(table)
    }

    /// The table without one region; where it lies in its file does not matter.
    pub(super) fn without(&self, region: &MemRegion) -> Result<MemoryTable, PeerError> {
        let same = |r: &MemRegion| {
            (r.guest_addr, r.size, r.user_addr)
                == (region.guest_addr, region.size, region.user_addr)
        };
        let mut regions = self.regions.clone();
        let at = regions.iter().position(|m| same(&m.region));
        regions.remove(at.ok_or(PeerError::NoRegion(region.guest_addr))?);
        Ok(MemoryTable { regions })
    }

    /// The memory as the cores use it.
    pub(super) fn guest_map(&self) -> Result<Arc<GuestMap>, PeerError> {
        let regions: Vec<MappedRegion> = self
            .regions
            .iter()
            .map(|m| MappedRegion {
                iova: Iova(m.region.guest_addr),
                map: Arc::clone(&m.map),
                writable: true,
            })
            .collect();
        Ok(Arc::new(guest_map(&regions)?))
    }

    /// The guest address of an address of the front end's.
    pub(super) fn guest_address(&self, user: u64) -> Result<Iova, PeerError> {
        self.regions
            .iter()
            .find_map(|Mapped { region, .. }| {
                let offset = user.checked_sub(region.user_addr)?;
                let inside = offset < region.size;
                inside.then(|| region.guest_addr.checked_add(offset))?
            })
            .map(Iova)
            .ok_or(PeerError::UserAddress(user))
    }
}
