//! Event counters: kicks, interrupts and wake-ups.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd as NixEventFd};

/// A non-blocking event counter.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// A new counter at 0.
    pub fn new() -> Result<EventFd, Errno> {
        let fd =
            NixEventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(EventFd(fd.into()))
    }

    /// A counter that came from a peer. It need not be one: whatever it is, signalling and draining it cannot block, for
    /// it is made non-blocking here, and errors are ignored.
    pub fn from_peer(fd: OwnedFd) -> Result<EventFd, Errno> {
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(EventFd(fd))
    }

    /// Adds one. A counter that is full is readable anyway, so an error changes nothing for the receiver.
    pub fn signal(&self) {
        let _ = nix::unistd::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Takes the count back to 0.
    pub fn drain(&self) {
        let _ = nix::unistd::read(&self.0, &mut [0u8; 8]);
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
