//! A connected stream socket to a device: whole messages with file descriptors out, whole messages in.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, RecvMsg, UnixAddr, recvmsg, sendmsg, sockopt,
};

use super::error::{DriverError, Result};

/// File descriptors that a device may send with one message.
const MAX_FDS: usize = 64;

/// The socket.
#[derive(Debug)]
pub(super) struct Socket {
    stream: UnixStream,
}

impl Socket {
    pub(super) fn connect(path: &Path, patience: Duration) -> Result<Socket> {
        let stream = UnixStream::connect(path).map_err(|cause| {
            let hint = match cause.kind() {
                ErrorKind::NotFound => {
                    "there is no such socket: is the service running, and the device created and started?"
                }
                ErrorKind::ConnectionRefused => {
                    "nobody listens there: start the service, or remove the socket it has left behind"
                }
                ErrorKind::PermissionDenied => "run this as root, or as the socket's owner",
                _ => "name the socket of a vfio-user or vhost-user device",
            };
            DriverError::Connect { cause, hint }
        })?;
        let socket = Socket { stream };
        socket.set_patience(patience)?;
        Ok(socket)
    }

    /// How long [`Socket::receive`] waits, and a send when the device does not take messages.
    pub(super) fn set_patience(&self, patience: Duration) -> Result<()> {
        self.stream
            .set_read_timeout(Some(patience))
            .and_then(|()| self.stream.set_write_timeout(Some(patience)))
            .map_err(DriverError::io("set the socket's time limits"))
    }

    /// Sends one message, made of `parts`, with descriptors.
    pub(super) fn send(
        &self,
        request: &'static str,
        parts: &[&[u8]],
        fds: &[BorrowedFd<'_>],
    ) -> Result<()> {
        let total: usize = parts.iter().map(|p| p.len()).sum();
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let control = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[] } else { &control[..] };
        let message: Vec<u8> = parts.concat();
        let mut sent = 0;
        while sent < total {
            let rest = [IoSlice::new(&message[sent..])];
            // The descriptors travel with the first byte.
            let control = if sent == 0 { control } else { &[] };
            let n = sendmsg::<UnixAddr>(
                self.stream.as_raw_fd(),
                &rest,
                control,
                MsgFlags::MSG_NOSIGNAL,
                None,
            );
            match n {
                Ok(n) => sent += n,
                Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(failure(request, e.into())),
            }
        }
        Ok(())
    }

    /// Sends a short message without descriptors and without allocating.
    pub(super) fn send_whole(&self, request: &'static str, message: &[u8]) -> Result<()> {
        loop {
            let flags = MsgFlags::MSG_NOSIGNAL;
            match nix::sys::socket::send(self.stream.as_raw_fd(), message, flags) {
                Ok(n) if n == message.len() => return Ok(()),
                Ok(_) => return Err(DriverError::Closed(request)),
                Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(failure(request, e.into())),
            }
        }
    }

    /// Receives exactly `buf.len()` bytes. Descriptors that come with them are added to `fds`.
    pub(super) fn receive(
        &self,
        request: &'static str,
        buf: &mut [u8],
        fds: &mut Vec<OwnedFd>,
    ) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            match self.receive_some(&mut buf[done..], fds) {
                Ok(0) => return Err(DriverError::Closed(request)),
                Ok(n) => done += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(failure(request, e)),
            }
        }
        Ok(())
    }

    /// The process that has made the listening socket.
    pub(super) fn peer_pid(&self) -> Option<i32> {
        let peer = nix::sys::socket::getsockopt(&self.stream, sockopt::PeerCredentials);
        peer.ok().map(|peer| peer.pid())
    }

    /// Whether the peer has closed the connection. Bytes that nobody asked for are thrown away.
    pub(super) fn is_closed(&self) -> bool {
        let mut byte = [0u8; 256];
        loop {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match nix::sys::socket::recv(self.stream.as_raw_fd(), &mut byte, flags) {
                Ok(0) => return true,
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(nix::errno::Errno::EAGAIN) => return false,
                Err(_) => return true,
            }
        }
    }

    fn receive_some(&self, buf: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
        let mut space = nix::cmsg_space!([RawFd; MAX_FDS]);
        let mut parts = [IoSliceMut::new(buf)];
        let message: RecvMsg<'_, '_, UnixAddr> = recvmsg(
            self.stream.as_raw_fd(),
            &mut parts,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )?;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(received) = control {
                fds.extend(received.into_iter().map(own));
            }
        }
        Ok(message.bytes)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Takes a descriptor that has just been received.
#[expect(
    unsafe_code,
    reason = "the system call hands out descriptors as numbers"
)]
fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: recvmsg has just made this descriptor for us; nobody else knows its number.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn failure(request: &'static str, e: io::Error) -> DriverError {
    match e.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => DriverError::Silent(request),
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => DriverError::Closed(request),
        _ => DriverError::Io {
            doing: "talk to the device",
            cause: e,
        },
    }
}
