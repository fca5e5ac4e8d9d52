//! The control plane's side of the handshake.

use core::time::Duration;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    connect as connect_socket, recvmsg, send, socket,
};

use super::mapping::{MapError, Mapping};
use super::{Channel, HELLO_BYTES, Hello, Mismatch, Peer, SOCKET_NAME, Verdict};
use crate::region::{COMMANDS, REPLIES, Region, RegionError};
use crate::ring::{Consumer, Producer};

/// Why there is no channel.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody listens.
    #[error("no data plane listens on {}: start ferry-dataplane, or give its --run-dir", .0.display())]
    NotThere(PathBuf),
    /// The socket, or the data plane behind it, does not admit this user.
    #[error("user id {uid} may not connect to {}: give it to ferry-dataplane as --control-uid", .path.display())]
    Denied {
        /// The socket.
        path: PathBuf,
        /// The user id of this process.
        uid: u32,
    },
    /// There is another control plane.
    #[error("the data plane on {} is busy with another control plane: stop that one first", .0.display())]
    Busy(PathBuf),
    /// The data plane is another build.
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
    /// Whatever listens is not a data plane.
    #[error("what listens on {} does not answer like a data plane", .0.display())]
    NotADataplane(PathBuf),
    /// The shared memory is unusable.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The shared memory has the wrong contents.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// No answer in time.
    #[error("the data plane on {} has not answered for {} ms", .path.display(), .waited.as_millis())]
    Timeout {
        /// The socket.
        path: PathBuf,
        /// How long it was given.
        waited: Duration,
    },
    /// A system call fails.
    #[error("cannot connect to {}: {error}", .path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
}

/// A connection whose answer has not been read; its descriptor becomes readable when the answer is there.
pub struct Connecting {
    socket: OwnedFd,
    path: PathBuf,
}

/// Connects to the data plane of a run directory and introduces this process.
pub fn connect(run_dir: &Path) -> Result<Connecting, ConnectError> {
    let path = run_dir.join(SOCKET_NAME);
    let failed = |errno: Errno| match errno {
        Errno::ENOENT | Errno::ECONNREFUSED => ConnectError::NotThere(path.clone()),
        Errno::EACCES | Errno::EPERM => ConnectError::Denied {
            path: path.clone(),
            uid: nix::unistd::geteuid().as_raw(),
        },
        errno => ConnectError::Socket {
            path: path.clone(),
            error: errno.into(),
        },
    };
    let address = UnixAddr::new(&path).map_err(failed)?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).map_err(failed)?;
    connect_socket(socket.as_raw_fd(), &address).map_err(failed)?;
    match send(
        socket.as_raw_fd(),
        &Hello::ours(Verdict::Welcome).to_bytes(),
        MsgFlags::MSG_NOSIGNAL,
    ) {
        // A data plane that does not admit us may have hung up already; its verdict is there to be read.
        Ok(_) | Err(Errno::EPIPE) => Ok(Connecting { socket, path }),
        Err(errno) => Err(failed(errno)),
    }
}

/// Connects and waits for the answer at most `timeout`.
pub fn connect_within(run_dir: &Path, timeout: Duration) -> Result<Channel, ConnectError> {
    let connecting = connect(run_dir)?;
    let start = Instant::now();
    loop {
        if let Some(channel) = connecting.finish()? {
            return Ok(channel);
        }
        let left = timeout.saturating_sub(start.elapsed());
        if left.is_zero() {
            return Err(ConnectError::Timeout {
                path: connecting.path,
                waited: timeout,
            });
        }
        // Rounded up, so that the last wait does not spin.
        let left = PollTimeout::try_from(left.saturating_add(Duration::from_millis(1)))
            .unwrap_or(PollTimeout::MAX);
        match poll(
            &mut [PollFd::new(connecting.as_fd(), PollFlags::POLLIN)],
            left,
        ) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(connecting.failed(errno)),
        }
    }
}

impl Connecting {
    /// Reads the answer; `None` when it is not there yet.
    pub fn finish(&self) -> Result<Option<Channel>, ConnectError> {
        // A data plane that refuses before it has read our hello resets the connection; its verdict comes after that.
        let answer = match self.receive() {
            Err(Errno::ECONNRESET) => self.receive(),
            answer => answer,
        };
        let (hello, files) = match answer {
            Ok(Some(answer)) => answer,
            Ok(None) | Err(Errno::ECONNRESET) => {
                return Err(ConnectError::NotADataplane(self.path.clone()));
            }
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(None),
            Err(errno) => return Err(self.failed(errno)),
        };
        match hello.verdict {
            v if v == Verdict::Denied as u32 => {
                let uid = nix::unistd::geteuid().as_raw();
                return Err(ConnectError::Denied {
                    path: self.path.clone(),
                    uid,
                });
            }
            v if v == Verdict::Busy as u32 => return Err(ConnectError::Busy(self.path.clone())),
            _ => {}
        }
        if let Some(mismatch) = hello.mismatch() {
            return Err(mismatch.into());
        }
        let mut files = files.into_iter();
        let (Some(memory), counters, None) = (files.next(), files.next(), files.next()) else {
            return Err(ConnectError::NotADataplane(self.path.clone()));
        };
        let region = Region::attach(Arc::new(Mapping::open(&memory)?))?;
        let socket = self
            .socket
            .try_clone()
            .map_err(|error| self.socket_error(error))?;
        let peer = Peer::of(&socket).map_err(|errno| self.failed(errno))?;
        Ok(Some(Channel {
            producer: Producer::new(region.clone(), COMMANDS)?,
            consumer: Consumer::new(region, REPLIES)?,
            socket: Arc::new(socket),
            peer,
            counters,
        }))
    }

    /// One hello with the files that came with it; `None` for anything else.
    fn receive(&self) -> nix::Result<Option<(Hello, Vec<OwnedFd>)>> {
        let mut bytes = [0; HELLO_BYTES + 1];
        let mut space = nix::cmsg_space!([RawFd; 4]);
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(
            self.socket.as_raw_fd(),
            &mut slices,
            Some(&mut space),
            flags,
        )?;
        let mut files = Vec::new();
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(received) = control {
                files.extend(received.into_iter().map(own));
            }
        }
        let len = message.bytes;
        Ok(bytes
            .get(..len)
            .and_then(Hello::from_bytes)
            .map(|hello| (hello, files)))
    }

    fn failed(&self, errno: Errno) -> ConnectError {
        self.socket_error(errno.into())
    }

    fn socket_error(&self, error: io::Error) -> ConnectError {
        ConnectError::Socket {
            path: self.path.clone(),
            error,
        }
    }
}

#[expect(unsafe_code, reason = "takes ownership of received descriptors")]
fn own(received: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for this process, in the message that was received; nothing
    // else knows of it.
    unsafe { OwnedFd::from_raw_fd(received) }
}

impl AsFd for Connecting {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Connecting {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}
