//! A core's io_uring: transfers of its slots, and watches on event counters that wake it.
//!
//! Buffers handed to the kernel belong to slots, which stay in place and unused until their completion is reaped; that is
//! what makes submission sound, and it is the reactor's bookkeeping (`Stage::Submitted`).
// UNSAFETY: submits addresses to the kernel.
#![expect(unsafe_code, reason = "io_uring takes raw addresses")]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use io_uring::types::{Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};

use crate::fsdev::IoOp;
use crate::mem::IoVec;

/// Submission queue entries.
const ENTRIES: u32 = 512;
/// Most completions that the kernel makes room for; what exceeds it waits in the kernel.
const MAX_COMPLETIONS: u32 = 65_536;

const KIND_SHIFT: u32 = 62;
const KIND_SLOT: u64 = 0;
const KIND_WATCH: u64 = 1;
const KIND_IGNORE: u64 = 2;

/// What has completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// A slot's operation: bytes, or a negative error number.
    Slot {
        /// The slot.
        slot: u32,
        /// The result.
        result: i32,
    },
    /// A watched counter was signalled; `ended` means that the watch has to be set again.
    Watch {
        /// As given to [`Ring::watch`].
        token: u32,
        /// Whether the kernel has dropped the watch.
        ended: bool,
    },
}

/// The ring of the calling thread.
pub struct Ring {
    ring: IoUring,
    pending: bool,
    in_flight: u32,
}

impl Ring {
    /// Makes a ring for the calling thread, which must be the only one to use it. Completions have room for twice as many
    /// operations as there are slots, and all watches.
    pub fn new(slots: u32, watches: u32) -> io::Result<Ring> {
        let completions = slots.saturating_mul(2).saturating_add(watches);
        let completions = completions.min(MAX_COMPLETIONS).next_power_of_two();
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_coop_taskrun()
            .setup_taskrun_flag()
            .setup_cqsize(completions)
            .build(ENTRIES)?;
        Ok(Ring {
            ring,
            pending: false,
            in_flight: 0,
        })
    }

    /// Whether operations of slots are with the kernel.
    pub fn busy(&self) -> bool {
        self.in_flight > 0
    }

    /// Queues a slot's operation; `false` when there is no room.
    pub fn push(&mut self, slot: u32, op: IoOp, iovecs: &[IoVec]) -> bool {
        // `IoVec` has the layout of `struct iovec`.
        let (base, count) = (
            iovecs.as_ptr().cast::<libc::iovec>(),
            u32::try_from(iovecs.len()).unwrap_or(u32::MAX),
        );
        let entry = match op {
            IoOp::Read { fd, offset, .. } => opcode::Readv::new(Fd(fd), base, count)
                .offset(offset)
                .build(),
            IoOp::Write { fd, offset, .. } => opcode::Writev::new(Fd(fd), base, count)
                .offset(offset)
                .build(),
            IoOp::Fsync { fd, datasync } => {
                let flags = if datasync {
                    FsyncFlags::DATASYNC
                } else {
                    FsyncFlags::empty()
                };
                opcode::Fsync::new(Fd(fd)).flags(flags).build()
            }
            IoOp::Fallocate {
                fd,
                mode,
                offset,
                len,
            } => opcode::Fallocate::new(Fd(fd), len)
                .offset(offset)
                .mode(mode.cast_signed())
                .build(),
        };
        let pushed = self.push_entry(entry.user_data(KIND_SLOT << KIND_SHIFT | u64::from(slot)));
        self.in_flight = self.in_flight.saturating_add(u32::from(pushed));
        pushed
    }

    /// Watches a counter until [`Ring::unwatch`]: each signal gives a [`Completion::Watch`].
    pub fn watch(&mut self, fd: RawFd, token: u32) -> bool {
        let entry = opcode::PollAdd::new(Fd(fd), libc::POLLIN.cast_unsigned().into())
            .multi(true)
            .build();
        self.push_entry(entry.user_data(KIND_WATCH << KIND_SHIFT | u64::from(token)))
    }

    /// Ends a watch.
    pub fn unwatch(&mut self, token: u32) -> bool {
        let entry = opcode::PollRemove::new(KIND_WATCH << KIND_SHIFT | u64::from(token)).build();
        self.push_entry(entry.user_data(KIND_IGNORE << KIND_SHIFT))
    }

    fn push_entry(&mut self, entry: squeue::Entry) -> bool {
        // SAFETY: the addresses in the entry belong to a slot that stays in place until the completion, see the module
        // documentation; watches carry no address.
        if unsafe { self.ring.submission().push(&entry) }.is_ok() {
            self.pending = true;
            return true;
        }
        // Full: hand over what is there, and try once more.
        let _ = self.ring.submit();
        self.pending = false;
        // SAFETY: as above.
        let pushed = unsafe { self.ring.submission().push(&entry) }.is_ok();
        self.pending = pushed;
        pushed
    }

    /// Hands over what is queued, with one system call at most, and looks for completions without waiting.
    pub fn turn(&mut self, mut each: impl FnMut(Completion)) -> io::Result<()> {
        // With deferred task work, completions appear only on entry with GETEVENTS; the flag says when that is worth it.
        let has_work = self.ring.submission().taskrun();
        if self.pending || has_work {
            self.pending = false;
            match self
                .ring
                .submitter()
                .submit_with_args(0, &SubmitArgs::new())
            {
                Ok(_) => {}
                Err(e) if retry(&e) => {}
                Err(e) => return Err(e),
            }
        }
        self.reap(&mut each);
        Ok(())
    }

    /// Sleeps until something completes or the time is over.
    pub fn sleep(
        &mut self,
        limit: Option<Duration>,
        mut each: impl FnMut(Completion),
    ) -> io::Result<()> {
        self.pending = false;
        let mut args = SubmitArgs::new();
        let time;
        if let Some(limit) = limit {
            time = Timespec::from(limit);
            args = args.timespec(&time);
        }
        match self.ring.submitter().submit_with_args(1, &args) {
            Ok(_) => {}
            Err(e) if retry(&e) || e.raw_os_error() == Some(libc::ETIME) => {}
            Err(e) => return Err(e),
        }
        self.reap(&mut each);
        Ok(())
    }

    fn reap(&mut self, each: &mut impl FnMut(Completion)) {
        for entry in self.ring.completion() {
            let data = entry.user_data();
            let low = u32::try_from(data & u64::from(u32::MAX)).unwrap_or(0);
            match data >> KIND_SHIFT {
                KIND_SLOT => {
                    self.in_flight = self.in_flight.saturating_sub(1);
                    each(Completion::Slot {
                        slot: low,
                        result: entry.result(),
                    });
                }
                KIND_WATCH => each(Completion::Watch {
                    token: low,
                    ended: !io_uring::cqueue::more(entry.flags()),
                }),
                _ => {}
            }
        }
    }
}

fn retry(e: &io::Error) -> bool {
    matches!(
        e.raw_os_error(),
        Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)
    )
}

impl AsRawFd for Ring {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}
