//! The memfd of the rings and its mapping. The only code that turns shared memory into atomic words.
#![expect(unsafe_code, reason = "maps memory that another process shares")]

use core::ffi::c_void;
use core::num::NonZeroUsize;
use core::ptr::NonNull;
use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::stat::fstat;
use nix::unistd::ftruncate;

use crate::region::{AtomicU32, Memory, REGION_BYTES};

/// With these nobody can change the size, so no access to the mapping can fault, and nobody can lift them.
const SEALS: SealFlag = SealFlag::F_SEAL_SHRINK
    .union(SealFlag::F_SEAL_GROW)
    .union(SealFlag::F_SEAL_SEAL);

/// Why a file cannot hold the rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// A system call fails.
    #[error("{what} fails for the shared memory of the rings: {errno}")]
    Call {
        /// The call.
        what: &'static str,
        /// Its error.
        errno: nix::errno::Errno,
    },
    /// The file has another size.
    #[error("the shared memory of the rings has {0} bytes instead of {REGION_BYTES}")]
    Size(i64),
    /// The file's size can still be changed.
    #[error("the shared memory of the rings is not sealed (seals {0:#x})")]
    Unsealed(i32),
}

fn call(what: &'static str) -> impl Fn(nix::errno::Errno) -> MapError {
    move |errno| MapError::Call { what, errno }
}

/// The mapped rings, unmapped when dropped.
pub(super) struct Mapping {
    base: NonNull<c_void>,
}

// SAFETY: the mapping belongs to no thread; it is only read and written as atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Creates sealed, zeroed memory of the rings' size.
    pub(super) fn create() -> Result<(Mapping, OwnedFd), MapError> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = memfd_create("ferry-rings", flags).map_err(call("memfd_create"))?;
        ftruncate(&file, REGION_BYTES as i64).map_err(call("ftruncate"))?;
        fcntl(&file, FcntlArg::F_ADD_SEALS(SEALS)).map_err(call("fcntl(F_ADD_SEALS)"))?;
        Ok((Mapping::map(&file)?, file))
    }

    /// Maps what a data plane has created, after checking that it cannot shrink.
    pub(super) fn open(file: &OwnedFd) -> Result<Mapping, MapError> {
        let seals = fcntl(file, FcntlArg::F_GET_SEALS).map_err(call("fcntl(F_GET_SEALS)"))?;
        if seals & SEALS.bits() != SEALS.bits() {
            return Err(MapError::Unsealed(seals));
        }
        let size = fstat(file).map_err(call("fstat"))?.st_size;
        if size != REGION_BYTES as i64 {
            return Err(MapError::Size(size));
        }
        Mapping::map(file)
    }

    fn map(file: &OwnedFd) -> Result<Mapping, MapError> {
        const LEN: NonZeroUsize = NonZeroUsize::new(REGION_BYTES).unwrap();
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: the kernel chooses a free address (no MAP_FIXED), so no existing memory is replaced.
        let base = unsafe { mmap(None, LEN, prot, MapFlags::MAP_SHARED, file, 0) }
            .map_err(call("mmap"))?;
        Ok(Mapping { base })
    }
}

impl Memory for Mapping {
    fn words(&self) -> &[AtomicU32] {
        // SAFETY: `base` is a page-aligned mapping of REGION_BYTES, readable and writable, that lives as long as
        // `self`; the file is that long and sealed against shrinking (both checked or made before mapping), so every
        // word is backed. Nobody in this process accesses it but through these atomics.
        unsafe {
            core::slice::from_raw_parts(self.base.as_ptr().cast(), REGION_BYTES / size_of::<u32>())
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `base` and the length are those of the mapping that this value owns; no borrow of its words is
        // left, since they borrow `self`.
        let unmapped = unsafe { munmap(self.base, REGION_BYTES) };
        debug_assert!(unmapped.is_ok(), "munmap of an own mapping: {unmapped:?}");
    }
}
