//! Transfers that need not wait: done at once, by one system call, between the host's page cache and guest memory.
//!
//! The ring would hand most of them to a thread of the kernel's (tmpfs has no non-blocking mode at all, ext4 none for
//! writes), which costs several times the transfer itself. So a read takes what the page cache has, and a write into a
//! page cache of this machine is made right here unless the last ones had to wait. Everything else goes to the ring.
// UNSAFETY: system calls that take guest memory as iovecs.
#![expect(unsafe_code, reason = "preadv2 and pwritev take raw addresses")]

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use ferry_shared::errno::Errno;
use ferry_shared::msg::Placement;

use super::handle::{self, OpenFile};
use super::sys;
use crate::mem::{IoVec, Segments};

/// Pieces of a transfer that is done at once.
const PIECES: usize = 64;
/// A write that takes longer has waited for a disk.
const STALL: Duration = Duration::from_millis(2);
/// For so long after that writes go to the ring.
const CAUTION_MS: u64 = 1_000;

/// What an export lies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Medium {
    /// The page cache is all there is.
    Memory,
    /// A disk of this machine.
    Disk,
    /// Somebody else's, or one on which the core must not wait.
    Slow,
}

/// Where transfers are done at once.
#[derive(Debug)]
pub(super) struct Hot {
    medium: Medium,
    /// The mount that this is about; others below it are not known.
    mount: u64,
    origin: Instant,
    /// Milliseconds since `origin` until which writes go to the ring.
    cautious_until: AtomicU64,
}

impl Hot {
    /// For an export whose root is `root`, on a file system of this magic number.
    pub(super) fn new(root: i32, kind: i64, remote: bool, metadata: Placement) -> Hot {
        /// tmpfs and ramfs.
        const MEMORY: [i64; 2] = [0x0102_1994, 0x8584_58f6];
        let medium = match metadata {
            Placement::Offload => Medium::Slow,
            _ if remote => Medium::Slow,
            _ if MEMORY.contains(&kind) => Medium::Memory,
            _ => Medium::Disk,
        };
        Hot {
            medium,
            mount: sys::stat_fd(root).map_or(0, |stat| stat.stx_mnt_id),
            origin: Instant::now(),
            cautious_until: AtomicU64::new(0),
        }
    }

    /// The flags of a handle of a file on mount `mnt` that was opened with `guest_flags`.
    pub(super) fn flags(&self, mnt: u64, guest_flags: u32) -> u32 {
        let waits = guest_flags as i32 & (libc::O_SYNC | libc::O_DSYNC) != 0;
        if self.medium != Medium::Slow && mnt == self.mount && !waits {
            handle::CALM
        } else {
            0
        }
    }

    /// Reads at once what can be read at once: all that was asked for, or what there is before the end of the file.
    pub(super) fn read(
        &self,
        file: &OpenFile<'_>,
        offset: u64,
        dst: Segments<'_>,
    ) -> Option<Result<u32, Errno>> {
        let handle = file.handle();
        if handle.has(handle::DIRECT | handle::RING) {
            return None;
        }
        let memory = self.medium == Medium::Memory && handle.has(handle::CALM);
        let flags = if memory { 0 } else { libc::RWF_NOWAIT };
        match transfer(dst, |pieces, done| {
            read(file.fd(), pieces, offset.saturating_add(done), flags)
        })? {
            Ok(count) if count as usize == dst.len() => Some(Ok(count)),
            // The end of the file, or of what the page cache has, or an error that the ring will meet again.
            Ok(count) => {
                let size = sys::stat_fd(file.fd()).ok()?.stx_size;
                (offset.saturating_add(count.into()) >= size).then_some(Ok(count))
            }
            Err(Errno::EOPNOTSUPP) if !memory => {
                handle.set(handle::RING);
                None
            }
            Err(Errno::EAGAIN | Errno::EINTR) => None,
            Err(errno) => Some(Err(errno)),
        }
    }

    /// Writes at once, whatever the last writes took, where nobody else has to be waited for.
    pub(super) fn write_now(
        &self,
        file: &OpenFile<'_>,
        offset: u64,
        src: Segments<'_>,
    ) -> Option<Result<u32, Errno>> {
        let handle = file.handle();
        if !handle.has(handle::CALM) || handle.has(handle::DIRECT) {
            return None;
        }
        transfer(src, |pieces, done| {
            write(file.fd(), pieces, offset.saturating_add(done))
        })
    }

    /// Writes at once where that does not wait.
    pub(super) fn write(
        &self,
        file: &OpenFile<'_>,
        offset: u64,
        src: Segments<'_>,
    ) -> Option<Result<u32, Errno>> {
        let handle = file.handle();
        if !handle.has(handle::CALM) || handle.has(handle::DIRECT) {
            return None;
        }
        let write = |pieces: &[IoVec], done| write(file.fd(), pieces, offset.saturating_add(done));
        if self.medium == Medium::Memory {
            return transfer(src, write);
        }
        let began = self.origin.elapsed();
        if millis(began) < self.cautious_until.load(Relaxed) {
            return None;
        }
        let written = transfer(src, write);
        let now = self.origin.elapsed();
        if now.saturating_sub(began) > STALL {
            let until = millis(now).saturating_add(CAUTION_MS);
            self.cautious_until.store(until, Relaxed);
        }
        written
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Calls until all of `data` is transferred, or nothing more comes; an error counts only if nothing came before it. `None`:
/// there are too many pieces.
fn transfer(
    data: Segments<'_>,
    call: impl Fn(&[IoVec], u64) -> Result<usize, Errno>,
) -> Option<Result<u32, Errno>> {
    let mut pieces = [IoVec::EMPTY; PIECES];
    if data.iter().nth(PIECES).is_some() {
        return None;
    }
    let mut done = 0usize;
    while done < data.len() {
        let count = data.after(done).to_iovecs(&mut pieces);
        let pieces = pieces.get(..count).unwrap_or_default();
        match call(pieces, done as u64) {
            Ok(0) => break,
            Ok(more) => done = done.saturating_add(more),
            Err(_) if done > 0 => break,
            Err(errno) => return Some(Err(errno)),
        }
    }
    Some(Ok(u32::try_from(done).unwrap_or(u32::MAX)))
}

fn count(pieces: &[IoVec]) -> i32 {
    i32::try_from(pieces.len()).unwrap_or(i32::MAX)
}

fn read(fd: i32, pieces: &[IoVec], offset: u64, flags: i32) -> Result<usize, Errno> {
    let base = pieces.as_ptr().cast::<libc::iovec>();
    // SAFETY: `IoVec` is laid out as `struct iovec`; the pieces come from `Segments`, that is from the guest map, with write
    // access, which the kernel checks again.
    let got = unsafe { libc::preadv2(fd, base, count(pieces), offset.cast_signed(), flags) };
    usize::try_from(got).map_err(|_| sys::last_error())
}

fn write(fd: i32, pieces: &[IoVec], offset: u64) -> Result<usize, Errno> {
    let base = pieces.as_ptr().cast::<libc::iovec>();
    // SAFETY: as in `read`, but the kernel only reads the pieces.
    let put = unsafe { libc::pwritev(fd, base, count(pieces), offset.cast_signed()) };
    usize::try_from(put).map_err(|_| sys::last_error())
}
