//! What a front end can do wrong.

use nix::errno::Errno;

use super::wire::Request;
use crate::mem::{Fault, MapError};
use crate::os::mmap::MapFileError;
use crate::virtio::device::SettingError;

/// Why a message is not obeyed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum PeerError {
    #[error("the socket failed: {0}")]
    Socket(Errno),
    #[error("header flags {0:#x}: not a request of protocol version 1")]
    Flags(u32),
    #[error("a payload of {0} bytes, at most {max}", max = super::wire::MAX_PAYLOAD)]
    TooLong(u32),
    #[error("unknown message number {0}")]
    Unknown(u32),
    #[error("{request:?} with a payload of {size} bytes")]
    Size { request: Request, size: usize },
    #[error("{request:?} with {count} file descriptors")]
    Fds { request: Request, count: usize },
    #[error("{0:?}, which has not been negotiated or is not supported")]
    Unsupported(Request),
    #[error("feature bits {0:#x}, which are not offered")]
    Features(u64),
    #[error("device status {0:#x}, which is no status")]
    Status(u64),
    #[error("there is no ring {0}")]
    NoRing(u64),
    #[error(transparent)]
    Setting(#[from] SettingError),
    #[error("position {0:#x} is impossible for a ring")]
    Base(u32),
    #[error("ring {0} is to start and has no addresses")]
    NoAddress(u16),
    #[error("address {0:#x} is in no region of the memory table")]
    UserAddress(u64),
    #[error("a memory region cannot be used: {0}")]
    MapFile(#[from] MapFileError),
    #[error("the memory table cannot be used: {0}")]
    Map(#[from] MapError),
    #[error("there is no such memory region at {0:#x}")]
    NoRegion(u64),
    #[error("a ring is not in guest memory: {0}")]
    Fault(#[from] Fault),
    #[error("an in-flight record of {size} bytes for {queues} queues of {queue_size}")]
    Inflight {
        size: u64,
        queues: u16,
        queue_size: u16,
    },
    #[error("a file descriptor of no use: {0}")]
    Fd(Errno),
    #[error("a configuration area of {size} bytes at {offset}")]
    Config { offset: u32, size: u32 },
}

impl PeerError {
    /// Whether both sides still agree on where messages begin and what has been said, so that a refusal is enough if the
    /// front end waits for one.
    pub(super) fn can_be_refused(self) -> bool {
        match self {
            PeerError::Socket(_)
            | PeerError::Flags(_)
            | PeerError::TooLong(_)
            | PeerError::Unknown(_)
            | PeerError::Size { .. }
            | PeerError::Fds { .. } => false,
            PeerError::Unsupported(_)
            | PeerError::Features(_)
            | PeerError::Status(_)
            | PeerError::NoRing(_)
            | PeerError::Setting(_)
            | PeerError::Base(_)
            | PeerError::NoAddress(_)
            | PeerError::UserAddress(_)
            | PeerError::MapFile(_)
            | PeerError::Map(_)
            | PeerError::NoRegion(_)
            | PeerError::Fault(_)
            | PeerError::Inflight { .. }
            | PeerError::Fd(_)
            | PeerError::Config { .. } => true,
        }
    }
}
