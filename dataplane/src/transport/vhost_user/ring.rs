//! What the front end has said about one ring.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::stat::{SFlag, fstat};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use serde::{Deserialize, Serialize};

use super::error::PeerError;
use super::wire::VringAddr;
use crate::keeper::Keeper;
use crate::mem::{GuestMap, Iova};
use crate::os::eventfd::EventFd;
use crate::virtio::queue::QueueState;
use crate::virtio::spec::{DESC_SIZE, DescFlags, PackedDesc};

/// How often a ring is looked at whose driver gives no kicks.
const POLL_INTERVAL: Duration = Duration::from_millis(1);

/// Where a ring begins.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Base {
    /// Nothing was said.
    #[default]
    Fresh,
    /// Where the front end wants it.
    Given(u32),
    /// Where it stopped.
    Kept(QueueState),
}

/// One ring.
#[derive(Debug, Default)]
pub(super) struct Ring {
    pub(super) size: Option<u16>,
    pub(super) addr: Option<VringAddr>,
    pub(super) base: Base,
    pub(super) kick: Option<Arc<EventFd>>,
    pub(super) call: Option<Arc<EventFd>>,
    pub(super) err: Option<Arc<EventFd>>,
    pub(super) enabled: bool,
    /// It has been started, and where it stopped has not been noted yet.
    pub(super) ran: bool,
}

/// A ring as it is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RingV1 {
    size: Option<u16>,
    addr: Option<VringAddr>,
    base: Base,
    kick: KickV1,
    call: Option<u64>,
    err: Option<u64>,
    enabled: bool,
    ran: bool,
}

/// What kicks a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum KickV1 {
    Nothing,
    /// It is looked at again and again.
    Itself,
    Event(u64),
}

/// A position as the protocol writes it.
pub(super) fn encode(state: &QueueState, packed: bool) -> u32 {
    let used = if packed { state.used } else { 0 };
    u32::from(state.avail) | u32::from(used) << 16
}

impl Ring {
    /// What a later process needs.
    pub(super) fn saved(&self) -> RingV1 {
        let Ring {
            size,
            addr,
            base,
            kick,
            call,
            err,
            enabled,
            ran,
        } = self;
        let number = |event: &Option<Arc<EventFd>>| event.as_ref().and_then(|e| e.number());
        RingV1 {
            size: *size,
            addr: *addr,
            base: base.clone(),
            kick: match (kick, number(kick)) {
                (None, _) => KickV1::Nothing,
                (Some(_), None) => KickV1::Itself,
                (Some(_), Some(number)) => KickV1::Event(number),
            },
            call: number(call),
            err: number(err),
            enabled: *enabled,
            ran: *ran,
        }
    }

    /// The ring of a former process.
    pub(super) fn restore(saved: RingV1, keeper: &Keeper) -> Result<Ring, PeerError> {
        let adopt = |number: u64| {
            let event = EventFd::adopt(number, keeper.fds());
            event.map(Arc::new).map_err(PeerError::Fd)
        };
        Ok(Ring {
            size: saved.size,
            addr: saved.addr,
            base: saved.base,
            kick: match saved.kick {
                KickV1::Nothing => None,
                KickV1::Itself => Some(self_kick()?),
                KickV1::Event(number) => Some(adopt(number)?),
            },
            call: saved.call.map(adopt).transpose()?,
            err: saved.err.map(adopt).transpose()?,
            enabled: saved.enabled,
            ran: saved.ran,
        })
    }

    /// Whether the ring goes on where it stopped, so that what is recorded as in flight is in flight.
    pub(super) fn goes_on(&self, state: &QueueState) -> bool {
        self.ran || matches!(&self.base, Base::Kept(kept) if kept.used == state.used)
    }

    /// The ring as it is when the device has been reset. Where its interrupts go is the front end's business, not the driver's.
    pub(super) fn reset(&mut self) {
        let Ring {
            size,
            addr,
            base,
            kick,
            call: _,
            err: _,
            enabled,
            ran,
        } = self;
        *size = None;
        *addr = None;
        *base = Base::Fresh;
        *kick = None;
        *enabled = false;
        *ran = false;
    }

    /// Takes the position that the front end gives. The one at which the ring stopped brings back the requests that were
    /// put back then.
    pub(super) fn set_base(&mut self, num: u32, packed: bool) -> Result<(), PeerError> {
        if !packed && num > u32::from(u16::MAX) {
            return Err(PeerError::Base(num));
        }
        match &self.base {
            Base::Kept(state) if encode(state, packed) == num => {}
            _ => self.base = Base::Given(num),
        }
        Ok(())
    }

    /// The position, as the protocol writes it.
    pub(super) fn position(&self, packed: bool) -> u32 {
        match &self.base {
            Base::Fresh => encode(&QueueState::fresh(packed), packed),
            Base::Given(num) => *num,
            Base::Kept(state) => encode(state, packed),
        }
    }

    /// Where the queue begins. The protocol does not say where a split used ring stands; the ring itself does.
    pub(super) fn start_state(
        &self,
        packed: bool,
        map: &GuestMap,
        (desc, used): (Iova, Iova),
    ) -> Result<QueueState, PeerError> {
        let mut state = match &self.base {
            Base::Fresh => QueueState::fresh(packed),
            Base::Given(0) if packed && is_fresh(map, desc)? => QueueState::fresh(packed),
            Base::Given(num) => QueueState {
                avail: *num as u16,
                used: (*num >> 16) as u16,
                parked: Vec::new(),
            },
            Base::Kept(state) => state.clone(),
        };
        if !packed {
            let mut idx = [0; 2];
            map.read(Iova(used.0.wrapping_add(2)), &mut idx)?;
            let idx = u16::from_le_bytes(idx);
            if idx != state.used {
                // Not the ring that those requests came from.
                state.parked.clear();
                state.used = idx;
            }
        }
        Ok(state)
    }
}

/// Whether a packed ring that is said to begin at 0 has never been round. The wrap counters of a fresh ring are 1, yet some
/// front ends say 0 whatever the format, which is also where a ring stands after an odd number of rounds. Its first descriptor
/// tells: after such a round it has been used, and the driver has not taken the mark away; in a fresh ring it has none.
fn is_fresh(map: &GuestMap, desc: Iova) -> Result<bool, PeerError> {
    let mut first: [u8; DESC_SIZE] = [0; _];
    map.read(desc, &mut first)?;
    let first: PackedDesc = zerocopy::transmute!(first);
    let flags = DescFlags::from_bits_retain(first.flags.get());
    Ok(!flags.contains(DescFlags::USED))
}

/// In place of a kick when the driver gives none: it fires by itself.
pub(super) fn self_kick() -> Result<Arc<EventFd>, PeerError> {
    let timer = TimerFd::new(
        ClockId::CLOCK_MONOTONIC,
        TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK,
    )
    .map_err(PeerError::Fd)?;
    let every = Expiration::Interval(TimeSpec::from_duration(POLL_INTERVAL));
    timer
        .set(every, TimerSetTimeFlags::empty())
        .map_err(PeerError::Fd)?;
    event(timer.into()).map(Arc::new)
}

/// An event of the front end: an eventfd, or the pipe or socket that some use in its place. A file or a device would be
/// readable all the time and keep its core busy.
pub(super) fn event(fd: OwnedFd) -> Result<EventFd, PeerError> {
    let mode = SFlag::from_bits_truncate(fstat(&fd).map_err(PeerError::Fd)?.st_mode);
    let kind = mode & SFlag::S_IFMT;
    if !kind.is_empty() && kind != SFlag::S_IFIFO && kind != SFlag::S_IFSOCK {
        return Err(PeerError::Fd(Errno::EINVAL));
    }
    EventFd::from_peer(fd).map_err(PeerError::Fd)
}
