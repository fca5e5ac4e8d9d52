//! Shared mappings of files that peers hand over: guest memory and the in-flight record.
//!
//! The length is checked against the file before it is mapped, so that an honest mistake is an error and not a signal. A
//! peer could still shorten the file afterwards: where the file can be sealed against that (memfds that allow it), it is
//! sealed, and where not, `sigbus` takes care of the lost pages.
// UNSAFETY: mmap and munmap; the addresses never become Rust references.
#![expect(unsafe_code, reason = "maps files and hands their addresses on")]

use core::ffi::c_void;
use core::num::NonZeroUsize;
use core::ptr::NonNull;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};
use nix::sys::stat::{SFlag, fstat};

use super::sigbus::Registered;
use crate::mem::{GuestMap, Iova, MapError, Mapping, Region};

/// Why a file is not mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapFileError {
    /// Not a regular file, memfd or hugetlbfs file.
    #[error("the descriptor is not a file that can be memory")]
    NotAFile,
    /// The range goes past the end of the file.
    #[error("offset {offset:#x} + {len:#x} lies outside the file of {size:#x} bytes")]
    TooShort {
        /// Where the range begins.
        offset: u64,
        /// Its length.
        len: u64,
        /// Length of the file.
        size: u64,
    },
    /// The system refused.
    #[error("the system refused to map it: {0}")]
    System(#[from] Errno),
}

/// A mapped range of a file.
#[derive(Debug)]
pub struct SharedMap {
    base: NonNull<c_void>,
    mapped: usize,
    /// Where the range that was asked for begins in the mapping.
    skip: usize,
    len: u64,
    /// Until the memory is unmapped; `None` for the moment in between.
    registered: Option<Registered>,
}

// SAFETY: an address range that this value owns until it is dropped.
unsafe impl Send for SharedMap {}
// SAFETY: as above; nothing here reads or writes the memory.
unsafe impl Sync for SharedMap {}

impl SharedMap {
    /// Maps `len` bytes of the file from `offset` on. `offset` need not be aligned to anything.
    pub fn new(
        fd: impl AsFd,
        offset: u64,
        len: u64,
        writable: bool,
    ) -> Result<SharedMap, MapFileError> {
        let stat = fstat(&fd)?;
        if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG {
            return Err(MapFileError::NotAFile);
        }
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let short = MapFileError::TooShort { offset, len, size };
        let end = offset.checked_add(len).ok_or(short)?;
        if len == 0 || end > size {
            return Err(short);
        }
        // Refused for files that cannot be sealed, which is as good as it gets.
        let _ = fcntl(&fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK));

        // hugetlbfs wants multiples of its page size, which it reports as the block size.
        let unit = match u64::try_from(stat.st_blksize) {
            Ok(block) if block > 4096 && block.is_power_of_two() => block,
            _ => 4096,
        };
        let from = offset & !(unit - 1);
        let mapped = (end - from).checked_next_multiple_of(unit).ok_or(short)?;
        let (Ok(mapped), Ok(start)) = (usize::try_from(mapped), i64::try_from(from)) else {
            return Err(short);
        };
        let length = NonZeroUsize::new(mapped).ok_or(short)?;
        let mut protection = ProtFlags::PROT_READ;
        protection.set(ProtFlags::PROT_WRITE, writable);
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
        let base = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, &fd, start) }?;
        let mut map = SharedMap {
            base,
            mapped,
            skip: (offset - from) as usize,
            len,
            registered: None,
        };
        let start = base.addr().get();
        map.registered = Some(Registered::new(start, mapped, unit as usize)?);
        // SAFETY: the range was mapped right above. A core dump of this process must not hold the guest's memory.
        let _ = unsafe { madvise(base, mapped, MmapAdvise::MADV_DONTDUMP) };
        Ok(map)
    }

    /// Where the range begins.
    pub fn base(&self) -> NonNull<u8> {
        // SAFETY: `skip` < `mapped`, the length of the mapping.
        unsafe { self.base.cast::<u8>().add(self.skip) }
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes; never, for such a map is not made.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Drop for SharedMap {
    fn drop(&mut self) {
        // Before the addresses can belong to something else.
        self.registered = None;
        // SAFETY: the mapping is this value's own, and whoever uses its addresses keeps it.
        let _ = unsafe { munmap(self.base, self.mapped) };
    }
}

/// Keeps a [`SharedMap`] that several guest maps use one after the other.
#[derive(Debug)]
struct Shared(#[expect(dead_code, reason = "kept alive only")] Arc<SharedMap>);

impl Mapping for Shared {}

/// A region of guest memory and the file range behind it.
#[derive(Clone, Debug)]
pub struct MappedRegion {
    /// First guest address.
    pub iova: Iova,
    /// All of it belongs to the region.
    pub map: Arc<SharedMap>,
    /// Whether it was mapped writable and the device may write to it.
    pub writable: bool,
}

/// Makes guest memory of mapped files.
pub fn guest_map(regions: &[MappedRegion]) -> Result<GuestMap, MapError> {
    let list = regions
        .iter()
        .map(|r| Region {
            iova: r.iova,
            len: r.map.len(),
            host: r.map.base(),
            writable: r.writable,
        })
        .collect();
    let guards = regions
        .iter()
        .map(|r| Box::new(Shared(Arc::clone(&r.map))) as Box<dyn Mapping>)
        .collect();
    // SAFETY: each region is exactly the range that its `SharedMap` keeps mapped, and the guards keep those.
    unsafe { GuestMap::new(list, guards) }
}

/// New shared memory of `len` zero bytes, to be handed to a peer.
pub fn new_memfd(name: &str, len: u64) -> Result<OwnedFd, Errno> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let fd = memfd_create(name, flags)?;
    nix::unistd::ftruncate(&fd, i64::try_from(len).map_err(|_| Errno::EFBIG)?)?;
    fcntl(&fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK))?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::eventfd::EventFd;

    fn writable(fd: &OwnedFd, offset: u64, len: u64) -> Result<SharedMap, MapFileError> {
        SharedMap::new(fd, offset, len, true)
    }

    #[test]
    fn guest_memory_is_the_file() {
        let fd = new_memfd("test", 3 * 4096).unwrap();
        nix::sys::uio::pwrite(&fd, b"hello", 4096 + 100).unwrap();
        let region = MappedRegion {
            iova: Iova(0x8000),
            map: Arc::new(writable(&fd, 4096 + 100, 4096).unwrap()),
            writable: true,
        };
        let map = guest_map(&[region]).unwrap();
        let mut out = [0; 5];
        map.read(Iova(0x8000), &mut out).unwrap();
        assert_eq!(&out, b"hello");
        assert!(map.read(Iova(0x8000 + 4096), &mut out).is_err());
    }

    #[test]
    fn a_range_outside_the_file_or_no_file_at_all_is_refused() {
        let fd = new_memfd("test", 4096).unwrap();
        assert!(writable(&fd, 0, 4096).is_ok());
        for (offset, len) in [
            (0, 4097),
            (4096, 1),
            (1, 4096),
            (u64::MAX, 2),
            (0, 0),
            (0, u64::MAX),
        ] {
            assert!(
                matches!(
                    writable(&fd, offset, len),
                    Err(MapFileError::TooShort { .. })
                ),
                "{offset} {len}"
            );
        }
        let event = EventFd::new().unwrap();
        assert_eq!(
            SharedMap::new(&event, 0, 8, true).err(),
            Some(MapFileError::NotAFile)
        );
    }

    #[test]
    fn a_mapped_memfd_cannot_be_shortened_any_more() {
        let fd = memfd_create("test", MFdFlags::MFD_ALLOW_SEALING).unwrap();
        nix::unistd::ftruncate(&fd, 8192).unwrap();
        let _map = writable(&fd, 0, 8192).unwrap();
        assert_eq!(nix::unistd::ftruncate(&fd, 0), Err(Errno::EPERM));
    }

    #[test]
    fn memory_that_a_peer_takes_away_reads_as_zeros() {
        let fd = memfd_create("test", MFdFlags::empty()).unwrap();
        nix::unistd::ftruncate(&fd, 2 * 4096).unwrap();
        nix::sys::uio::pwrite(&fd, &[7; 2 * 4096], 0).unwrap();
        let region = MappedRegion {
            iova: Iova(0),
            map: Arc::new(writable(&fd, 0, 2 * 4096).unwrap()),
            writable: true,
        };
        let map = guest_map(&[region]).unwrap();
        nix::unistd::ftruncate(&fd, 4096).unwrap();
        let mut out = [1; 8192];
        map.read(Iova(0), &mut out).unwrap();
        assert_eq!(out[..4096], [7; 4096]);
        assert_eq!(out[4096..], [0; 4096]);
        let (lost, _) = map.translate_some(Iova(4096), 1, true).unwrap();
        crate::mem::copy_out(&[9], lost);
        map.read(Iova(4096), &mut out[..1]).unwrap();
        assert_eq!(out[0], 9);
    }
}
