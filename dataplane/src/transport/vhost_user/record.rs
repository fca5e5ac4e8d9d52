//! The in-flight record that a front end keeps for its back ends: its memory, and which part belongs to which ring.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use zerocopy::IntoBytes;

use ferry_shared::limits::MAX_RING_SIZE;

use super::error::PeerError;
use super::frame::Message;
use super::wire::{INFLIGHT_MIN, Inflight};
use crate::engine::QueueIdx;
use crate::keeper::Keeper;
use crate::mem::{GuestMap, Iova};
use crate::os::fdstore::Kept;
use crate::os::mmap::{MappedRegion, SharedMap, guest_map, new_memfd};
use crate::virtio::device::DeviceModel;
use crate::virtio::inflight::{self, queue_record_len};

/// A record in use.
#[derive(Debug)]
pub(super) struct Record {
    /// Mapped at address 0.
    map: Arc<GuestMap>,
    given: Inflight,
    file: Option<Kept>,
}

impl Record {
    /// Makes the memory for a record; the reply to `GET_INFLIGHT_FD`.
    pub(super) fn create(
        m: &Message,
        model: &DeviceModel,
    ) -> Result<(Vec<u8>, Option<OwnedFd>), PeerError> {
        let wanted = payload(m)?;
        let (queues, queue_size) = (wanted.num_queues, wanted.queue_size);
        let size = length(queues, queue_size, model.packed());
        if queues > model.num_queues() || u32::from(queue_size) > MAX_RING_SIZE {
            return Err(bad(size, &wanted));
        }
        let fd = match size {
            0 => None,
            _ => Some(new_memfd("ferry-inflight", size).map_err(PeerError::Fd)?),
        };
        let reply = Inflight {
            mmap_size: size,
            mmap_offset: 0,
            num_queues: queues,
            queue_size,
            padding: 0,
        };
        // The reply is as long as the request.
        let bytes = reply.as_bytes();
        let bytes = bytes.get(..m.payload.len()).unwrap_or(bytes);
        Ok((bytes.to_vec(), fd))
    }

    /// Takes the record that comes with `SET_INFLIGHT_FD`.
    pub(super) fn adopt(m: &mut Message, keeper: &Keeper) -> Result<Record, PeerError> {
        let given = payload(m)?;
        let fd = m.one_fd()?;
        Record::map(given, &fd, keeper.keep(&fd))
    }

    /// What a later process needs.
    pub(super) fn saved(&self) -> Option<(Inflight, u64)> {
        Some((self.given, self.file.as_ref()?.number()))
    }

    /// The record that a former process used.
    pub(super) fn restore(
        (given, number): (Inflight, u64),
        keeper: &Keeper,
    ) -> Result<Record, PeerError> {
        let file = keeper.fds().adopt(number);
        let file = file.ok_or(PeerError::Fd(Errno::EBADF))?;
        Record::map(given, file.clone(), Some(file))
    }

    fn map(given: Inflight, fd: impl AsFd, kept: Option<Kept>) -> Result<Record, PeerError> {
        // Packed rings need more; whether theirs is enough shows when one starts.
        let short = given.mmap_size < length(given.num_queues, given.queue_size, false);
        if short || u32::from(given.queue_size) > MAX_RING_SIZE {
            return Err(bad(given.mmap_size, &given));
        }
        let file = SharedMap::new(fd, given.mmap_offset, given.mmap_size, true)?;
        let region = MappedRegion {
            iova: Iova(0),
            map: Arc::new(file),
            writable: true,
        };
        Ok(Record {
            map: Arc::new(guest_map(&[region])?),
            given,
            file: kept,
        })
    }

    /// The part of one ring, if it has one.
    pub(super) fn queue(
        &self,
        idx: QueueIdx,
        packed: bool,
    ) -> Result<Option<inflight::Inflight>, PeerError> {
        if idx.0 >= self.given.num_queues {
            return Ok(None);
        }
        let queue = inflight::Inflight::new(&self.map, idx.0, self.given.queue_size, packed)?;
        Ok(Some(queue))
    }
}

fn length(queues: u16, queue_size: u16, packed: bool) -> u64 {
    queue_record_len(queue_size, packed) as u64 * u64::from(queues)
}

fn bad(size: u64, given: &Inflight) -> PeerError {
    PeerError::Inflight {
        size,
        queues: given.num_queues,
        queue_size: given.queue_size,
    }
}

/// The payload, with or without the padding at its end.
fn payload(m: &Message) -> Result<Inflight, PeerError> {
    let mut bytes = [0; size_of::<Inflight>()];
    let size = m.payload.len();
    match bytes.get_mut(..size) {
        Some(to) if size >= INFLIGHT_MIN => {
            to.copy_from_slice(&m.payload);
            Ok(zerocopy::transmute!(bytes))
        }
        _ => Err(PeerError::Size {
            request: m.request,
            size,
        }),
    }
}
