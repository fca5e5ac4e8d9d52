//! Where each queue of a device stands, for the process after this one: an in-flight record like vhost-user's, in memory
//! of our own.
//!
//! A front end that keeps such a record itself gives one; for all others, and for vfio-user, this is it. Split and packed
//! rings have different records. A driver chooses one format for all its queues, and only a reset lets it choose again, which
//! is when a record begins anew.

use std::sync::Arc;

use ferry_shared::limits::MAX_RING_SIZE;
use serde::{Deserialize, Serialize};

use crate::engine::QueueIdx;
use crate::keeper::Keeper;
use crate::mem::{GuestMap, Iova};
use crate::os::fdstore::Kept;
use crate::os::mmap::{MappedRegion, SharedMap, guest_map, new_memfd};
use crate::virtio::inflight::{Inflight, queue_record_len};

/// A record as it is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RequestsV1 {
    file: u64,
}

/// The record of all queues of a device.
#[derive(Debug)]
pub(crate) struct Requests {
    map: Arc<GuestMap>,
    kept: Kept,
}

impl Requests {
    /// A new record for so many queues; `None` if nothing is kept.
    pub(crate) fn new(queues: u16, keeper: &Keeper) -> Option<Requests> {
        if !keeper.is_on() {
            return None;
        }
        let file = new_memfd("ferry-requests", length(queues))
            .inspect_err(|error| tracing::error!(%error, "no memory to note requests in: a crash now loses them"))
            .ok()?;
        Requests::map(keeper.keep(file)?, queues)
    }

    /// The record of a former process.
    pub(crate) fn restore(saved: RequestsV1, queues: u16, keeper: &Keeper) -> Option<Requests> {
        Requests::map(keeper.fds().adopt(saved.file)?, queues)
    }

    fn map(kept: Kept, queues: u16) -> Option<Requests> {
        let file = SharedMap::new(&kept, 0, length(queues), true).ok()?;
        let region = MappedRegion {
            iova: Iova(0),
            map: Arc::new(file),
            writable: true,
        };
        Some(Requests {
            map: Arc::new(guest_map(&[region]).ok()?),
            kept,
        })
    }

    /// What a later process needs.
    pub(crate) fn saved(&self) -> RequestsV1 {
        RequestsV1 {
            file: self.kept.number(),
        }
    }

    /// The part of one queue, in the format of its ring.
    pub(crate) fn queue(&self, index: QueueIdx, packed: bool) -> Option<Inflight> {
        Inflight::new(&self.map, index.0, MAX_RING_SIZE as u16, packed).ok()
    }
}

/// Room for the records of so many queues, of either format.
fn length(queues: u16) -> u64 {
    let each = [false, true].map(|packed| queue_record_len(MAX_RING_SIZE as u16, packed) as u64);
    each.into_iter().max().unwrap_or(0) * u64::from(queues)
}
