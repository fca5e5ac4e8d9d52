//! The memory that the driver shares with a device: one memfd, mapped here and, by its descriptor, in the device.
//!
//! The only code of the driver that touches shared bytes. The device may change them at any time, so they are never seen
//! through a Rust reference: bytes are copied in and out, system calls get raw addresses, ring indexes are atomics.
// UNSAFETY: reads and writes an mmap of its own, each access checked against its length.
#![expect(
    unsafe_code,
    reason = "copies to and from memory that another process shares"
)]

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicUsize, Ordering};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};

/// The device sees the memory from this address on: not at 0, so that an address of 0 is never valid.
const IOVA_BASE: u64 = 1 << 32;
/// Huge pages are of this size; the memory's length is a multiple of it.
const HUGE_PAGE: usize = 2 << 20;
const NAME: &CStr = c"ferry-driver";

/// Which pages the memory consists of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pages {
    /// Normal pages, taken when they are first touched; the kernel may join them.
    #[default]
    Normal,
    /// Huge pages from the system's pool, all of them taken at once.
    Huge,
}

/// A part of a [`DmaMemory`], for as long as that exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaSlice {
    offset: usize,
    len: usize,
}

impl DmaSlice {
    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `len` bytes from `at` on, or fewer where this slice ends before that.
    pub fn part(&self, at: usize, len: usize) -> DmaSlice {
        let at = at.min(self.len);
        DmaSlice {
            offset: self.offset + at,
            len: len.min(self.len - at),
        }
    }

    /// Everything from `at` on.
    pub fn after(&self, at: usize) -> DmaSlice {
        self.part(at, self.len)
    }
}

/// Memory shared with one device.
#[derive(Debug)]
pub struct DmaMemory {
    fd: OwnedFd,
    base: NonNull<u8>,
    len: usize,
    allocated: AtomicUsize,
}

// SAFETY: an address and a length; all accesses are copies, system calls or atomics, which are sound from any thread.
unsafe impl Send for DmaMemory {}
// SAFETY: as above; the only field that changes is an atomic.
unsafe impl Sync for DmaMemory {}

impl DmaMemory {
    /// Makes at least `len` bytes of zeroes.
    pub fn new(len: usize, pages: Pages) -> io::Result<DmaMemory> {
        let len = len.max(1).next_multiple_of(HUGE_PAGE);
        let mut flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        if pages == Pages::Huge {
            flags |= MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
        }
        let fd = memfd_create(NAME, flags)?;
        nix::unistd::ftruncate(&fd, i64::try_from(len).map_err(io::Error::other)?)?;
        // A device that maps the file may rely on it not becoming shorter.
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(seals))?;
        let size = std::num::NonZeroUsize::new(len).ok_or(io::ErrorKind::InvalidInput)?;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let base = unsafe { mmap(None, size, prot, MapFlags::MAP_SHARED, &fd, 0)? };
        if pages == Pages::Normal {
            // Only advice: without it everything works with small pages.
            // SAFETY: the range is the mapping just made; this advice does not change its content.
            let _ = unsafe { madvise(base, len, MmapAdvise::MADV_HUGEPAGE) };
        }
        Ok(DmaMemory {
            fd,
            base: base.cast(),
            len,
            allocated: AtomicUsize::new(0),
        })
    }

    /// Hands out `len` bytes at a multiple of `align` (a power of two); `None` when the rest is too short. Nothing is
    /// ever given back: all users allocate before they start.
    pub fn alloc(&self, len: usize, align: usize) -> Option<DmaSlice> {
        let mut at = self.allocated.load(Ordering::Relaxed);
        loop {
            let offset = at.checked_next_multiple_of(align)?;
            let end = offset.checked_add(len).filter(|&end| end <= self.len)?;
            match self.allocated.compare_exchange_weak(
                at,
                end,
                Ordering::Relaxed,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Some(DmaSlice { offset, len }),
                Err(now) => at = now,
            }
        }
    }

    /// All of it, allocated or not.
    #[cfg(test)]
    pub(super) fn whole(&self) -> DmaSlice {
        DmaSlice {
            offset: 0,
            len: self.len,
        }
    }

    /// Length of the whole memory in bytes.
    pub fn size(&self) -> usize {
        self.len
    }

    /// The address of the memory's first byte in this process, as vhost-user wants to know it.
    pub fn host_address(&self) -> u64 {
        self.base.addr().get() as u64
    }

    /// The address of the memory's first byte for the device.
    pub fn iova_base(&self) -> u64 {
        IOVA_BASE
    }

    /// The address of a slice for the device.
    pub fn iova(&self, slice: DmaSlice) -> u64 {
        IOVA_BASE + slice.offset as u64
    }

    /// The address of a slice in this process.
    pub fn host_address_of(&self, slice: DmaSlice) -> u64 {
        self.host_address() + slice.offset as u64
    }

    /// Copies bytes to a slice, as many as both hold.
    pub fn write(&self, dst: DmaSlice, src: &[u8]) {
        let n = dst.len.min(src.len());
        let at = self.pointer(dst);
        // SAFETY: `pointer` checked that the slice lies in the mapping; `src` is Rust memory and so lies elsewhere.
        unsafe { std::ptr::copy_nonoverlapping(src.as_ptr(), at.as_ptr(), n) }
    }

    /// Copies bytes from a slice, as many as both hold.
    pub fn read(&self, src: DmaSlice, dst: &mut [u8]) {
        let n = src.len.min(dst.len());
        let at = self.pointer(src);
        // SAFETY: as in `write`.
        unsafe { std::ptr::copy_nonoverlapping(at.as_ptr(), dst.as_mut_ptr(), n) }
    }

    /// Copies from one slice to another, as many bytes as both hold; they must not overlap.
    pub fn copy(&self, src: DmaSlice, dst: DmaSlice) {
        let n = src.len.min(dst.len);
        let (from, to) = (self.pointer(src), self.pointer(dst));
        // SAFETY: `pointer` checked both; `copy` allows overlap.
        unsafe { std::ptr::copy(from.as_ptr(), to.as_ptr(), n) }
    }

    /// `read(2)` straight into a slice.
    pub fn read_from(&self, fd: BorrowedFd<'_>, dst: DmaSlice) -> nix::Result<usize> {
        let at = self.pointer(dst);
        // SAFETY: `pointer` checked that `dst.len` bytes are ours to write.
        let n = unsafe { libc::read(fd.as_raw_fd(), at.as_ptr().cast(), dst.len) };
        nix::errno::Errno::result(n).map(isize::cast_unsigned)
    }

    /// `write(2)` straight from a slice.
    pub fn write_to(&self, fd: BorrowedFd<'_>, src: DmaSlice) -> nix::Result<usize> {
        let at = self.pointer(src);
        // SAFETY: `pointer` checked that `src.len` bytes are ours to read.
        let n = unsafe { libc::write(fd.as_raw_fd(), at.as_ptr().cast(), src.len) };
        nix::errno::Errno::result(n).map(isize::cast_unsigned)
    }

    /// The 16-bit ring field at `at` in a slice.
    pub(super) fn field(&self, slice: DmaSlice, at: usize) -> &AtomicU16 {
        let field = slice.part(at, 2);
        assert!(
            field.len == 2 && field.offset.is_multiple_of(2),
            "ring fields lie in their ring and are aligned"
        );
        let at = self.pointer(field);
        // SAFETY: in the mapping (`pointer`), aligned (checked above, the mapping itself is page aligned), and shared only
        // with another process, whose accesses atomics model.
        unsafe { AtomicU16::from_ptr(at.as_ptr().cast()) }
    }

    /// A slice that is one 32-bit ring field.
    pub(super) fn field32(&self, slice: DmaSlice) -> &AtomicU32 {
        assert!(
            slice.len == 4 && slice.offset.is_multiple_of(4),
            "the field is aligned and of its own length"
        );
        let at = self.pointer(slice);
        // SAFETY: as in `field`.
        unsafe { AtomicU32::from_ptr(at.as_ptr().cast()) }
    }

    /// Where a slice is here. A slice that came from another memory may not fit this one, which is a bug of the caller.
    fn pointer(&self, slice: DmaSlice) -> NonNull<u8> {
        assert!(
            slice
                .offset
                .checked_add(slice.len)
                .is_some_and(|end| end <= self.len),
            "the slice belongs to another memory"
        );
        // SAFETY: `offset` <= `len` was checked, so the result is in the mapping or one past its end.
        unsafe { self.base.add(slice.offset) }
    }
}

impl AsFd for DmaMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for DmaMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this length, and nothing borrows from it any more.
        let _ = unsafe { munmap(self.base.cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::{DmaMemory, Pages};

    #[test]
    fn allocations_are_aligned_distinct_and_end_with_the_memory() {
        let memory = DmaMemory::new(1, Pages::Normal).expect("a memfd");
        let a = memory.alloc(3, 1).expect("room");
        let b = memory.alloc(4096, 4096).expect("room");
        assert_eq!(memory.iova(b) % 4096, 0);
        assert!(memory.iova(a) + 3 <= memory.iova(b));
        assert!(memory.alloc(memory.size(), 1).is_none());
        let rest = memory.size() - 8192;
        assert!(memory.alloc(rest, 1).is_some());
        assert!(memory.alloc(1, 1).is_none());
    }

    #[test]
    fn bytes_come_back_and_parts_are_cut_to_their_slice() {
        let memory = DmaMemory::new(1, Pages::Normal).expect("a memfd");
        let a = memory.alloc(8, 8).expect("room");
        memory.write(a, b"abcdefgh and more");
        assert_eq!(a.part(6, 9).len(), 2);
        assert!(a.part(9, 1).is_empty());
        let mut got = [0u8; 4];
        memory.read(a.part(6, 9), &mut got);
        assert_eq!(&got, b"gh\0\0");
    }
}
