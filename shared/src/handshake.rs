//! How the two processes meet: a `SOCK_SEQPACKET` socket in the run directory, and the channel that comes of it.
//!
//! The control plane connects and says its protocol version and layout hash; the data plane checks who it is and
//! answers with its own, a verdict and, if the verdict is good, the memory of the rings and that of the counters. From then on the socket carries
//! only doorbells, packets of one byte, and the news that the peer is gone. Doorbells are packets and not eventfds
//! because blocking is a property of a file description, which both ends of an eventfd share: a hostile control plane
//! could make the data plane's management thread block. `MSG_DONTWAIT` belongs to the call alone.
//!
//! The data plane calls [`server`], the control plane [`client`]. Nothing here blocks, except
//! [`client::connect_within`].

pub mod client;
mod mapping;
pub mod server;

pub use mapping::MapError;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, getsockopt, recv, send, sockopt};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::region::{LAYOUT_HASH, PROTOCOL_VERSION};
use crate::ring::{Consumer, Corrupt, Doorbell, Producer, PushError, RecvError};

/// Name of the socket in the run directory.
pub const SOCKET_NAME: &str = "dataplane.sock";
/// Doorbells that a correct peer can never have outstanding: it sends one per sleep of this side.
const FLOOD: usize = 256;
const HELLO_BYTES: usize = 24;
const MAGIC: [u8; 8] = *b"FerryCtl";

/// The verdict of the data plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Verdict {
    /// The rings come with this message.
    Welcome = 0,
    /// There is a control plane already.
    Busy = 1,
    /// The versions or the layouts differ.
    Mismatch = 2,
    /// The user id is not allowed.
    Denied = 3,
}

/// The one message that each side sends before the rings are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Hello {
    version: u32,
    verdict: u32,
    layout: u64,
}

impl Hello {
    fn ours(verdict: Verdict) -> Hello {
        Hello {
            version: PROTOCOL_VERSION,
            verdict: verdict as u32,
            layout: LAYOUT_HASH,
        }
    }

    fn to_bytes(self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        let parts: [&[u8]; 4] = [
            &MAGIC,
            &self.version.to_le_bytes(),
            &self.verdict.to_le_bytes(),
            &self.layout.to_le_bytes(),
        ];
        bytes
            .iter_mut()
            .zip(parts.into_iter().flatten())
            .for_each(|(to, from)| *to = *from);
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Option<Hello> {
        let rest = bytes.strip_prefix(&MAGIC)?;
        let (version, rest) = rest.split_first_chunk()?;
        let (verdict, rest) = rest.split_first_chunk()?;
        let layout = rest.try_into().ok()?;
        Some(Hello {
            version: u32::from_le_bytes(*version),
            verdict: u32::from_le_bytes(*verdict),
            layout: u64::from_le_bytes(layout),
        })
    }

    fn mismatch(self) -> Option<Mismatch> {
        (self.version != PROTOCOL_VERSION || self.layout != LAYOUT_HASH).then_some(Mismatch {
            version: self.version,
            layout: self.layout,
        })
    }
}

/// The peer is another build.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "ferry-dataplane and ferry-controlplane are different builds: this one speaks protocol {PROTOCOL_VERSION} with \
     layout {LAYOUT_HASH:016x}, the other one protocol {version} with layout {layout:016x}; install both from one build"
)]
pub struct Mismatch {
    /// The peer's protocol version.
    pub version: u32,
    /// The peer's layout hash.
    pub layout: u64,
}

/// Who is at the other end, as the kernel says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Process id.
    pub pid: i32,
    /// Effective user id.
    pub uid: u32,
}

impl Peer {
    fn of(socket: &OwnedFd) -> nix::Result<Peer> {
        let credentials = getsockopt(socket, sockopt::PeerCredentials)?;
        Ok(Peer {
            pid: credentials.pid(),
            uid: credentials.uid(),
        })
    }
}

/// Why a channel is of no further use.
#[derive(Debug, thiserror::Error)]
pub enum Lost {
    /// The peer has closed its end or died.
    #[error("the peer is gone")]
    Gone,
    /// The peer sends what a correct one does not send.
    #[error("the peer sends {0}")]
    Broken(&'static str),
    /// The socket fails.
    #[error("the socket to the peer fails: {0}")]
    Socket(#[from] io::Error),
}

/// The two rings and the doorbell between the processes, as one of them uses them.
///
/// Wait for the descriptor to become readable only after [`Channel::prepare_sleep`] has said so, and call
/// [`Channel::wake`] afterwards.
pub struct Channel {
    producer: Producer,
    consumer: Consumer,
    socket: Arc<OwnedFd>,
    peer: Peer,
    counters: Option<OwnedFd>,
}

impl Channel {
    /// The file of the data plane's counters, once, if it has sent one.
    pub fn take_counters(&mut self) -> Option<OwnedFd> {
        self.counters.take()
    }

    /// Who is at the other end.
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// Sends one message. After [`PushError::Full`] the descriptor becomes readable as soon as there is more room.
    pub fn send<T: Serialize>(&mut self, message: &T) -> Result<(), PushError> {
        let doorbell = self.producer.send(message)?;
        self.answer(doorbell);
        Ok(())
    }

    /// Makes sure that a message of `len` bytes can be sent; after [`PushError::Full`] as for [`Channel::send`].
    pub fn reserve(&mut self, len: usize) -> Result<(), PushError> {
        self.producer.reserve(len)
    }

    /// The longest message that can be sent now, in bytes; `None` when not even an empty one.
    pub fn room(&mut self) -> Result<Option<usize>, Corrupt> {
        self.producer.room()
    }

    /// Receives one message, if there is one.
    pub fn recv<T: DeserializeOwned>(&mut self) -> Result<Option<T>, RecvError> {
        let Some((message, doorbell)) = self.consumer.recv()? else {
            return Ok(None);
        };
        self.answer(doorbell);
        Ok(Some(message))
    }

    /// Asks the peer for a doorbell. True: nothing is there, wait. False: there is something to receive.
    pub fn prepare_sleep(&mut self) -> Result<bool, Corrupt> {
        self.consumer.prepare_sleep()
    }

    /// Takes all doorbells, so that the descriptor is no longer readable, and asks for none until the next sleep.
    pub fn wake(&mut self) -> Result<(), Lost> {
        self.consumer.awake();
        let mut packet = [0; 2];
        for _ in 0..FLOOD {
            match recv(self.socket.as_raw_fd(), &mut packet, MsgFlags::MSG_DONTWAIT) {
                Ok(0) => return Err(Lost::Gone),
                Ok(1) => {}
                Ok(_) => return Err(Lost::Broken("a packet that is not a doorbell")),
                Err(Errno::EAGAIN) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(Errno::ECONNRESET | Errno::EPIPE) => return Err(Lost::Gone),
                Err(errno) => return Err(Lost::Socket(errno.into())),
            }
        }
        Err(Lost::Broken("doorbells without end"))
    }

    fn answer(&self, doorbell: Doorbell) {
        if doorbell == Doorbell::Needed {
            // A full socket holds doorbells enough, and a peer that is gone shows when the socket is read.
            let _ = send(
                self.socket.as_raw_fd(),
                &[0],
                MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
            );
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

#[cfg(test)]
mod tests;
