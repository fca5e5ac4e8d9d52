//! Waiting for many file descriptors at once; the management thread's only place to sleep.

use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::engine::DeviceId;

/// Names a file descriptor that is waited for: the device that it belongs to, and a number of the device's own choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token {
    /// The device, or [`Token::SERVICE`].
    pub device: DeviceId,
    /// The device's own number.
    pub local: u32,
}

impl Token {
    /// In place of a device: a file descriptor of the service itself.
    pub const SERVICE: DeviceId = DeviceId(u32::MAX);

    fn to_raw(self) -> u64 {
        u64::from(self.device.0) << 32 | u64::from(self.local)
    }

    fn from_raw(raw: u64) -> Token {
        Token {
            device: DeviceId((raw >> 32) as u32),
            local: raw as u32,
        }
    }
}

/// A set of file descriptors to wait for, level-triggered.
#[derive(Debug)]
pub struct Poller(Epoll);

impl Poller {
    /// An empty set.
    pub fn new() -> Result<Poller, Errno> {
        Ok(Poller(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?))
    }

    /// Waits for `fd` to become readable, or to be hung up. The caller removes it before closing it.
    pub fn add(&self, fd: impl AsFd, token: Token) -> Result<(), Errno> {
        self.0
            .add(fd, EpollEvent::new(EpollFlags::EPOLLIN, token.to_raw()))
    }

    /// Changes what is waited for: input, room for output, or both. A hang-up is always reported.
    pub fn modify(
        &self,
        fd: impl AsFd,
        token: Token,
        input: bool,
        output: bool,
    ) -> Result<(), Errno> {
        let mut flags = EpollFlags::empty();
        flags.set(EpollFlags::EPOLLIN, input);
        flags.set(EpollFlags::EPOLLOUT, output);
        self.0
            .modify(fd, &mut EpollEvent::new(flags, token.to_raw()))
    }

    /// Waits from now on for input that comes on top of what is there; what has come already is reported once more. For a
    /// reader that leaves in the socket what it cannot use yet.
    pub fn more(&self, fd: impl AsFd, token: Token, output: bool) -> Result<(), Errno> {
        let mut flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        flags.set(EpollFlags::EPOLLOUT, output);
        self.0
            .modify(fd, &mut EpollEvent::new(flags, token.to_raw()))
    }

    /// Forgets a file descriptor.
    pub fn remove(&self, fd: impl AsFd) -> Result<(), Errno> {
        self.0.delete(fd)
    }

    /// Waits until something is ready and fills `ready` with up to 64 tokens; `timeout_ms` of -1 waits for ever. A signal
    /// ends the wait with nothing ready.
    pub fn wait(&self, ready: &mut Vec<Token>, timeout_ms: i32) -> Result<(), Errno> {
        ready.clear();
        let mut events = [EpollEvent::empty(); 64];
        let timeout = EpollTimeout::try_from(timeout_ms).unwrap_or(EpollTimeout::NONE);
        let n = match self.0.wait(&mut events, timeout) {
            Ok(n) => n,
            Err(Errno::EINTR) => 0,
            Err(e) => return Err(e),
        };
        ready.extend(events.iter().take(n).map(|e| Token::from_raw(e.data())));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::eventfd::EventFd;

    #[test]
    fn a_token_comes_back_when_its_descriptor_is_readable_and_not_after_removal() {
        let poller = Poller::new().unwrap();
        let event = EventFd::new().unwrap();
        let token = Token {
            device: DeviceId(7),
            local: u32::MAX,
        };
        let mut ready = Vec::new();
        poller.add(&event, token).unwrap();
        poller.wait(&mut ready, 0).unwrap();
        assert_eq!(ready, []);
        event.signal();
        poller.wait(&mut ready, -1).unwrap();
        assert_eq!(ready, [token]);
        poller.remove(&event).unwrap();
        poller.wait(&mut ready, 0).unwrap();
        assert_eq!(ready, []);
    }
}
