//! Event counters: kicks, interrupts and wake-ups.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd as NixEventFd};

use super::fdstore::{FdStore, Kept};

/// Bit of the gate: signals are held back.
const MASKED: u8 = 1;
/// Bit of the gate: a signal was held back.
const PENDING: u8 = 2;

/// A non-blocking event counter. It can be masked, as interrupts can: a signal then waits for the end of that.
#[derive(Debug)]
pub struct EventFd {
    fd: OwnedFd,
    /// The service manager keeps it.
    kept: OnceLock<Kept>,
    gate: AtomicU8,
}

impl EventFd {
    /// A new counter at 0.
    pub fn new() -> Result<EventFd, Errno> {
        let fd =
            NixEventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(EventFd {
            fd: fd.into(),
            kept: OnceLock::new(),
            gate: AtomicU8::new(0),
        })
    }

    /// A counter that came from a peer. It need not be one: whatever it is, signalling and draining it cannot block, for
    /// it is made non-blocking here, and errors are ignored.
    pub fn from_peer(fd: OwnedFd) -> Result<EventFd, Errno> {
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(EventFd {
            fd,
            kept: OnceLock::new(),
            gate: AtomicU8::new(0),
        })
    }

    /// Has it kept for a later process.
    pub fn keep(&self, store: &Arc<FdStore>) {
        if self.kept.get().is_none()
            && let Some(kept) = store.keep(&self.fd)
        {
            // It was empty a moment ago, and only the management thread has counters kept.
            let _ = self.kept.set(kept);
        }
    }

    /// Takes over a counter that a former process has had kept.
    pub fn adopt(number: u64, store: &Arc<FdStore>) -> Result<EventFd, Errno> {
        let kept = store.adopt(number).ok_or(Errno::EBADF)?;
        let fd = kept.as_fd().try_clone_to_owned();
        let event = EventFd::from_peer(fd.map_err(|_| Errno::EMFILE)?)?;
        let _ = event.kept.set(kept);
        Ok(event)
    }

    /// The number under which it is kept.
    pub fn number(&self) -> Option<u64> {
        self.kept.get().map(Kept::number)
    }

    /// Adds one, now or when the counter is not masked any more.
    pub fn signal(&self) {
        if self.gate.load(Ordering::Relaxed) & MASKED == 0 {
            return self.add();
        }
        if self.gate.fetch_or(PENDING, Ordering::AcqRel) & MASKED == 0 {
            // Unmasked meanwhile, and by someone who has not seen that a signal waits.
            self.gate.fetch_and(!PENDING, Ordering::AcqRel);
            self.add();
        }
    }

    /// A counter that is full is readable anyway, so an error changes nothing for the receiver.
    fn add(&self) {
        let _ = nix::unistd::write(&self.fd, &1u64.to_ne_bytes());
    }

    /// Holds signals back.
    pub fn mask(&self) {
        self.gate.fetch_or(MASKED, Ordering::AcqRel);
    }

    /// Lets signals through again, and the one that has waited.
    pub fn unmask(&self) {
        if self.gate.swap(0, Ordering::AcqRel) & PENDING != 0 {
            self.add();
        }
    }

    /// Whether a signal waits for the end of a mask.
    pub fn is_pending(&self) -> bool {
        self.gate.load(Ordering::Acquire) & PENDING != 0
    }

    /// Takes the count back to 0.
    pub fn drain(&self) {
        let _ = nix::unistd::read(&self.fd, &mut [0u8; 8]);
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}
