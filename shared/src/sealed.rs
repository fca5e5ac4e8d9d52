//! Memory that one process writes and others read: a file in memory whose size is fixed for good.
#![expect(unsafe_code, reason = "maps memory that another process shares")]

use core::ffi::c_void;
use core::num::NonZeroUsize;
use core::ptr::NonNull;
use core::sync::atomic::AtomicU64;
use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::stat::fstat;
use nix::unistd::ftruncate;

/// Nobody can change the size, and nobody can map the memory for writing any more: what the writer has mapped stays.
const SEALS: SealFlag = SealFlag::F_SEAL_SHRINK
    .union(SealFlag::F_SEAL_GROW)
    .union(SealFlag::from_bits_retain(libc::F_SEAL_FUTURE_WRITE));

/// Why such memory cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// A system call fails.
    #[error("{what} fails for shared memory: {errno}")]
    Call {
        /// The call.
        what: &'static str,
        /// Its error.
        errno: nix::errno::Errno,
    },
    /// The file's size can still be changed.
    #[error("the shared memory is not sealed (seals {0:#x})")]
    Unsealed(i32),
    /// It holds something else.
    #[error("the shared memory has another form")]
    Form,
}

fn call(what: &'static str) -> impl Fn(nix::errno::Errno) -> MapError {
    move |errno| MapError::Call { what, errno }
}

/// Mapped words, unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Sealed {
    base: NonNull<c_void>,
    len: usize,
}

// SAFETY: the mapping belongs to no thread; it is only read and written as atomics.
unsafe impl Send for Sealed {}
// SAFETY: as above.
unsafe impl Sync for Sealed {}

impl Sealed {
    /// Makes so many bytes, all zero, and the file by which others can read them.
    pub(crate) fn create(name: &str, len: usize) -> Result<(Sealed, OwnedFd), MapError> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = memfd_create(name, flags).map_err(call("memfd_create"))?;
        let size = i64::try_from(len).map_err(|_| MapError::Form)?;
        ftruncate(&file, size).map_err(call("ftruncate"))?;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let sealed = Sealed::map(&file, len, prot)?;
        fcntl(&file, FcntlArg::F_ADD_SEALS(SEALS)).map_err(call("fcntl(F_ADD_SEALS)"))?;
        Ok((sealed, file))
    }

    /// Maps what another process has made, to read, after checking that it cannot shrink.
    pub(crate) fn open(file: &impl AsFd) -> Result<Sealed, MapError> {
        let seals = fcntl(file, FcntlArg::F_GET_SEALS).map_err(call("fcntl(F_GET_SEALS)"))?;
        if seals & SealFlag::F_SEAL_SHRINK.bits() == 0 {
            return Err(MapError::Unsealed(seals));
        }
        let size = fstat(file).map_err(call("fstat"))?.st_size;
        let len = usize::try_from(size).map_err(|_| MapError::Form)?;
        Sealed::map(file, len, ProtFlags::PROT_READ)
    }

    fn map(file: impl AsFd, len: usize, prot: ProtFlags) -> Result<Sealed, MapError> {
        let length = NonZeroUsize::new(len).ok_or(MapError::Form)?;
        // SAFETY: the kernel chooses a free address (no MAP_FIXED), so no existing memory is replaced.
        let base = unsafe { mmap(None, length, prot, MapFlags::MAP_SHARED, file, 0) }
            .map_err(call("mmap"))?;
        Ok(Sealed { base, len })
    }

    /// The words. Those of [`Sealed::open`] must not be stored to, which only functions of the writer do.
    pub(crate) fn words(&self) -> &[AtomicU64] {
        // SAFETY: `base` is a page-aligned mapping of `len` bytes that lives as long as `self`; the file is that long and
        // sealed against shrinking (checked before, or done right after, mapping by its only holder), so every word is
        // backed. Nobody in this process accesses it but through these atomics.
        unsafe { core::slice::from_raw_parts(self.base.as_ptr().cast(), self.len / 8) }
    }
}

impl Drop for Sealed {
    fn drop(&mut self) {
        // SAFETY: `base` and the length are those of the mapping that this value owns; no borrow of its words is
        // left, since they borrow `self`.
        let unmapped = unsafe { munmap(self.base, self.len) };
        debug_assert!(unmapped.is_ok(), "munmap of an own mapping: {unmapped:?}");
    }
}
