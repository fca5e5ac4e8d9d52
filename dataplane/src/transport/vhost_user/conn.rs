//! One connection: what a front end's messages mean for the device.
//!
//! A pure state machine: [`Conn::handle`] takes a message and says what to answer, at once or after the cores have reported
//! something. It does no socket I/O. Everything that it keeps goes with the connection.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, IntoBytes};

use ferry_shared::limits::MAX_MEMORY_REGIONS;

use super::error::PeerError;
use super::frame::Message;
use super::memory::MemoryTable;
use super::record::Record;
use super::ring::{Base, Ring, RingV1, event, self_kick};
use super::wire::{
    ConfigHeader, F_PROTOCOL_FEATURES, Inflight, MAX_CONFIG, MAX_TABLE_REGIONS, MemRegion,
    MemRegionMsg, MemTable, ProtocolFeatures, Request, VRING_INDEX_MASK, VRING_NOFD, VringAddr,
    VringState,
};
use crate::engine::{Cores, QueueIdx};
use crate::keeper::Keeper;
use crate::os::eventfd::EventFd;
use crate::transport::requests::Requests;
use crate::transport::running::{Notice, QueueSetup, RunningQueues};
use crate::virtio::device::{DeviceModel, StatusEffect};

/// The parts of the device that a message can act on.
pub(super) struct Device<'a> {
    pub(super) model: &'a mut DeviceModel,
    pub(super) queues: &'a mut RunningQueues,
    pub(super) cores: &'a mut dyn Cores,
    pub(super) keeper: &'a Keeper,
    /// The record of requests in flight, for rings of which the front end keeps none.
    pub(super) requests: Option<&'a Requests>,
}

/// A session as it is kept.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ConnV1 {
    features: u64,
    protocol: u64,
    rings: Vec<RingV1>,
    memory: Vec<(MemRegion, u64)>,
    record: Option<(Inflight, u64)>,
}

/// What to answer.
#[derive(Debug)]
pub(super) enum Answer {
    /// An acknowledgement, if the front end asked for one.
    Ack,
    /// A reply that the message always has.
    Reply(Vec<u8>, Option<OwnedFd>),
    /// Not yet.
    Later(Wait),
}

impl Answer {
    fn number(value: u64) -> Answer {
        Answer::Reply(value.as_bytes().to_vec(), None)
    }
}

/// What an answer waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// A ring is to stop, and the reply tells where.
    Position(QueueIdx),
    /// A ring is to stop.
    Stop(QueueIdx),
    /// Guest memory is to be replaced.
    Memory,
    /// The device is to be reset.
    Reset,
}

/// A front end's session.
#[derive(Debug)]
pub(super) struct Conn {
    features: u64,
    protocol: ProtocolFeatures,
    rings: Vec<Ring>,
    memory: MemoryTable,
    record: Option<Record>,
}

/// Protocol features of this back end.
const OFFERED: ProtocolFeatures = ProtocolFeatures::MQ
    .union(ProtocolFeatures::REPLY_ACK)
    .union(ProtocolFeatures::CONFIG)
    .union(ProtocolFeatures::INFLIGHT_SHMFD)
    .union(ProtocolFeatures::RESET_DEVICE)
    .union(ProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(ProtocolFeatures::STATUS);

impl Conn {
    pub(super) fn new(queues: u16) -> Conn {
        Conn {
            features: 0,
            protocol: ProtocolFeatures::empty(),
            rings: (0..queues).map(|_| Ring::default()).collect(),
            memory: MemoryTable::default(),
            record: None,
        }
    }

    /// What a later process needs.
    pub(super) fn saved(&self) -> ConnV1 {
        let Conn {
            features,
            protocol,
            rings,
            memory,
            record,
        } = self;
        ConnV1 {
            features: *features,
            protocol: protocol.bits(),
            rings: rings.iter().map(Ring::saved).collect(),
            memory: memory.saved(),
            record: record.as_ref().and_then(Record::saved),
        }
    }

    /// The session that a front end had with a former process.
    pub(super) fn restore(saved: ConnV1, queues: u16, keeper: &Keeper) -> Result<Conn, PeerError> {
        let count = saved.rings.len();
        if count != usize::from(queues) {
            return Err(PeerError::NoRing(count as u64));
        }
        let rings = saved.rings.into_iter();
        Ok(Conn {
            features: saved.features,
            protocol: ProtocolFeatures::from_bits_retain(saved.protocol).intersection(OFFERED),
            rings: rings
                .map(|ring| Ring::restore(ring, keeper))
                .collect::<Result<_, _>>()?,
            memory: MemoryTable::restore(&saved.memory, keeper)?,
            record: match saved.record {
                Some(record) => Some(Record::restore(record, keeper)?),
                None => None,
            },
        })
    }

    /// Starts what ran when a former process died.
    pub(super) fn resume(&mut self, device: &mut Device<'_>) -> Result<(), PeerError> {
        let map = self.memory.guest_map()?;
        // Nothing runs yet, so that this is done at once.
        device.queues.set_memory(map, device.cores);
        for index in (0..self.rings.len() as u16).map(QueueIdx) {
            if self.rings.get(usize::from(index.0)).is_some_and(|r| r.ran) {
                let setup = self.setup(index, Start::Resumed, device)?;
                device.queues.start(index, setup, device.cores);
            }
        }
        Ok(())
    }

    /// Whether the front end may ask for acknowledgements.
    pub(super) fn acks(&self) -> bool {
        self.protocol.contains(ProtocolFeatures::REPLY_ACK)
    }

    /// Obeys one message.
    pub(super) fn handle(
        &mut self,
        mut message: Message,
        device: &mut Device<'_>,
    ) -> Result<Answer, PeerError> {
        let m = &mut message;
        self.check_negotiated(m.request)?;
        match m.request {
            Request::GetFeatures => {
                let offered = device.model.offered().bits();
                Ok(Answer::number(offered | F_PROTOCOL_FEATURES))
            }
            Request::SetFeatures => self.set_features(m.read()?, device),
            Request::GetProtocolFeatures => Ok(Answer::number(OFFERED.bits())),
            Request::SetProtocolFeatures => self.set_protocol_features(m.read()?),
            Request::SetOwner => Ok(Answer::Ack),
            Request::GetQueueNum => Ok(Answer::number(device.model.num_queues().into())),
            Request::GetMaxMemSlots => Ok(Answer::number(MAX_MEMORY_REGIONS as u64)),
            Request::SetMemTable => self.set_mem_table(m, device),
            Request::AddMemReg => {
                let MemRegionMsg { region, .. } = m.read()?;
                let fd = m.one_fd()?;
                let table = self.memory.with(region, &fd, device.keeper)?;
                self.replace_memory(table, device)
            }
            Request::RemMemReg => {
                // A descriptor may come along; it is closed.
                let MemRegionMsg { region, .. } = m.read()?;
                let table = self.memory.without(&region)?;
                self.replace_memory(table, device)
            }
            Request::SetVringNum
            | Request::SetVringAddr
            | Request::SetVringBase
            | Request::GetVringBase
            | Request::SetVringKick
            | Request::SetVringCall
            | Request::SetVringErr
            | Request::SetVringEnable => self.ring_message(m, device),
            Request::GetConfig => get_config(m, device.model),
            // Every field is read-only for the driver, and a guest's stray write is no fault of the front end.
            Request::SetConfig => {
                let (_, _) = config_area(m)?;
                Ok(Answer::Ack)
            }
            Request::GetInflightFd => {
                let (payload, fd) = Record::create(m, device.model)?;
                Ok(Answer::Reply(payload, fd))
            }
            Request::SetInflightFd => {
                self.record = Some(Record::adopt(m, device.keeper)?);
                Ok(Answer::Ack)
            }
            Request::SetStatus => self.set_status(m.read()?, device),
            Request::GetStatus => Ok(Answer::number(device.model.status().bits().into())),
            Request::ResetDevice | Request::ResetOwner => Ok(self.reset(device)),
            Request::SetLogBase
            | Request::SetLogFd
            | Request::SendRarp
            | Request::NetSetMtu
            | Request::SetBackendReqFd
            | Request::IotlbMsg
            | Request::SetVringEndian
            | Request::CreateCryptoSession
            | Request::CloseCryptoSession
            | Request::PostcopyAdvise
            | Request::PostcopyListen
            | Request::PostcopyEnd
            | Request::GpuSetSocket
            | Request::VringKick => Err(PeerError::Unsupported(m.request)),
        }
    }

    /// Messages that exist only with a protocol feature.
    fn check_negotiated(&self, request: Request) -> Result<(), PeerError> {
        let needs = match request {
            Request::GetConfig | Request::SetConfig => ProtocolFeatures::CONFIG,
            Request::GetInflightFd | Request::SetInflightFd => ProtocolFeatures::INFLIGHT_SHMFD,
            Request::SetStatus | Request::GetStatus => ProtocolFeatures::STATUS,
            Request::ResetDevice => ProtocolFeatures::RESET_DEVICE,
            Request::AddMemReg | Request::RemMemReg | Request::GetMaxMemSlots => {
                ProtocolFeatures::CONFIGURE_MEM_SLOTS
            }
            Request::GetQueueNum => ProtocolFeatures::MQ,
            _ => ProtocolFeatures::empty(),
        };
        if self.protocol.contains(needs) {
            Ok(())
        } else {
            Err(PeerError::Unsupported(request))
        }
    }

    fn set_features(&mut self, bits: u64, device: &mut Device<'_>) -> Result<Answer, PeerError> {
        let offered = device.model.offered().bits() | F_PROTOCOL_FEATURES;
        if bits & !offered != 0 {
            return Err(PeerError::Features(bits & !offered));
        }
        self.features = bits;
        device.model.write_features(bits & !F_PROTOCOL_FEATURES);
        Ok(Answer::Ack)
    }

    fn set_protocol_features(&mut self, bits: u64) -> Result<Answer, PeerError> {
        let wanted = ProtocolFeatures::from_bits_retain(bits);
        let alien = wanted.difference(OFFERED);
        if !alien.is_empty() {
            return Err(PeerError::Features(alien.bits()));
        }
        self.protocol = wanted;
        Ok(Answer::Ack)
    }

    fn set_mem_table(
        &mut self,
        m: &mut Message,
        device: &mut Device<'_>,
    ) -> Result<Answer, PeerError> {
        let size = PeerError::Size {
            request: m.request,
            size: m.payload.len(),
        };
        let (MemTable { num_regions, .. }, mut rest) = m.read_prefix()?;
        let count = num_regions as usize;
        if count > MAX_TABLE_REGIONS {
            return Err(size);
        }
        // Some front ends send room for more regions than there are.
        let mut regions = Vec::new();
        for _ in 0..count {
            let (region, more) = MemRegion::read_from_prefix(rest).map_err(|_| size)?;
            regions.push(region);
            rest = more;
        }
        let fds = std::mem::take(&mut m.fds);
        if fds.len() != count {
            return Err(PeerError::Fds {
                request: m.request,
                count: fds.len(),
            });
        }
        let table = MemoryTable::new(regions.into_iter().zip(fds), device.keeper)?;
        self.replace_memory(table, device)
    }

    fn replace_memory(
        &mut self,
        table: MemoryTable,
        device: &mut Device<'_>,
    ) -> Result<Answer, PeerError> {
        let map = table.guest_map()?;
        self.memory = table;
        let done = device.queues.set_memory(map, device.cores);
        Ok(if done {
            Answer::Ack
        } else {
            Answer::Later(Wait::Memory)
        })
    }

    fn ring(&mut self, index: u64) -> Result<(QueueIdx, &mut Ring), PeerError> {
        let none = PeerError::NoRing(index);
        let idx = u16::try_from(index).map_err(|_| none)?;
        let ring = self.rings.get_mut(usize::from(idx)).ok_or(none)?;
        Ok((QueueIdx(idx), ring))
    }

    fn ring_message(
        &mut self,
        m: &mut Message,
        device: &mut Device<'_>,
    ) -> Result<Answer, PeerError> {
        let packed = device.model.packed();
        match m.request {
            Request::SetVringNum => {
                let VringState { index, num } = m.read()?;
                let (idx, ring) = self.ring(index.into())?;
                ring.size = Some(device.model.check_size(idx, num)?);
            }
            Request::SetVringAddr => {
                let addr: VringAddr = m.read()?;
                let (_, ring) = self.ring(addr.index.into())?;
                ring.addr = Some(addr);
            }
            Request::SetVringBase => {
                let VringState { index, num } = m.read()?;
                self.ring(index.into())?.1.set_base(num, packed)?;
            }
            Request::GetVringBase => {
                let VringState { index, .. } = m.read()?;
                let (idx, _) = self.ring(index.into())?;
                if !device.queues.stop(idx, device.cores) {
                    return Ok(Answer::Later(Wait::Position(idx)));
                }
                return Ok(self.position(idx, device));
            }
            Request::SetVringEnable => {
                let VringState { index, num } = m.read()?;
                let (idx, ring) = self.ring(index.into())?;
                ring.enabled = num != 0;
                return self.enable_changed(idx, device);
            }
            Request::SetVringKick => {
                let (index, fd) = ring_event(m, device.keeper)?;
                let (idx, ring) = self.ring(index)?;
                ring.kick = Some(match fd {
                    Some(kick) => kick,
                    None => self_kick()?,
                });
                self.start_ring(idx, device)?;
            }
            Request::SetVringCall => {
                let (index, fd) = ring_event(m, device.keeper)?;
                let (idx, ring) = self.ring(index)?;
                ring.call.clone_from(&fd);
                device.queues.set_call(idx, fd, device.cores);
            }
            _ => {
                let (index, fd) = ring_event(m, device.keeper)?;
                self.ring(index)?.1.err = fd;
            }
        }
        Ok(Answer::Ack)
    }

    fn enable_changed(
        &mut self,
        idx: QueueIdx,
        device: &mut Device<'_>,
    ) -> Result<Answer, PeerError> {
        if self.runnable(idx) {
            if !device.queues.wanted(idx) {
                self.start_ring(idx, device)?;
            }
            return Ok(Answer::Ack);
        }
        if !device.queues.stop(idx, device.cores) {
            return Ok(Answer::Later(Wait::Stop(idx)));
        }
        self.note_stop(idx, device.queues);
        Ok(Answer::Ack)
    }

    /// A ring runs once it has a kick and is enabled; without protocol features rings are enabled from the beginning.
    fn runnable(&self, idx: QueueIdx) -> bool {
        let always = self.features & F_PROTOCOL_FEATURES == 0;
        self.rings
            .get(usize::from(idx.0))
            .is_some_and(|r| r.kick.is_some() && (r.enabled || always))
    }

    /// Starts a ring, if it is time.
    fn start_ring(&mut self, idx: QueueIdx, device: &mut Device<'_>) -> Result<(), PeerError> {
        if !self.runnable(idx) {
            return Ok(());
        }
        let setup = self.setup(idx, Start::Asked, device)?;
        if let (Some(_), Some(call)) = (&setup.inflight, &setup.call) {
            // A predecessor may have died after it had shown used entries and before it interrupted for them.
            call.signal();
        }
        if let Some(ring) = self.rings.get_mut(usize::from(idx.0)) {
            ring.ran = true;
        }
        device.queues.start(idx, setup, device.cores);
        Ok(())
    }

    fn setup(
        &self,
        idx: QueueIdx,
        start: Start,
        device: &mut Device<'_>,
    ) -> Result<QueueSetup, PeerError> {
        let none = PeerError::NoRing(idx.0.into());
        let ring = self.rings.get(usize::from(idx.0)).ok_or(none)?;
        let kind = device.model.queue_kind(idx).ok_or(none)?;
        let (Some(addr), Some(size), Some(kick)) = (ring.addr, ring.size, &ring.kick) else {
            return Err(PeerError::NoAddress(idx.0));
        };
        let packed = device.model.packed();
        let queue = device.model.queue_mut(idx)?;
        queue.size = size;
        queue.desc = self.memory.guest_address(addr.desc)?;
        queue.avail = self.memory.guest_address(addr.avail)?;
        queue.used = self.memory.guest_address(addr.used)?;
        let places = (queue.desc, queue.used);
        let mut state = ring.start_state(packed, device.queues.map(), places)?;
        let mut inflight = match &self.record {
            Some(record) => record.queue(idx, packed)?,
            None => device.requests.and_then(|r| r.queue(idx, packed)),
        };
        match (&mut inflight, start) {
            (Some(record), Start::Resumed) => state = record.resume(size, state.used),
            (Some(record), Start::Asked) if self.record.is_none() && !ring.goes_on(&state) => {
                record.clear();
            }
            _ => {}
        }
        Ok(QueueSetup {
            kind,
            config: device.model.queue_config(idx, state).ok_or(none)?,
            kick: Arc::clone(kick),
            call: ring.call.clone(),
            inflight,
        })
    }

    /// Remembers where a ring has stopped.
    fn note_stop(&mut self, idx: QueueIdx, queues: &RunningQueues) {
        if let Some(ring) = self.rings.get_mut(usize::from(idx.0))
            && ring.ran
        {
            ring.ran = false;
            ring.base = Base::Kept(queues.state(idx));
        }
    }

    /// The reply to `GET_VRING_BASE`, now that the ring has stopped. It takes a new kick to start it again.
    fn position(&mut self, idx: QueueIdx, device: &Device<'_>) -> Answer {
        self.note_stop(idx, device.queues);
        let mut num = 0;
        if let Some(ring) = self.rings.get_mut(usize::from(idx.0)) {
            ring.kick = None;
            num = ring.position(device.model.packed());
        }
        let state = VringState {
            index: idx.0.into(),
            num,
        };
        Answer::Reply(state.as_bytes().to_vec(), None)
    }

    fn set_status(&mut self, bits: u64, device: &mut Device<'_>) -> Result<Answer, PeerError> {
        let status = u8::try_from(bits).map_err(|_| PeerError::Status(bits))?;
        match device.model.write_status(status) {
            // A front end whose rings all stand has only paused the guest, or will send INIT again: the session goes on.
            StatusEffect::Reset if !self.rings.iter().any(|r| r.ran) => {
                self.forget_driver(device);
                Ok(Answer::Ack)
            }
            StatusEffect::Reset => Ok(self.reset(device)),
            StatusEffect::None | StatusEffect::DriverOk => Ok(Answer::Ack),
        }
    }

    fn forget_driver(&mut self, device: &mut Device<'_>) {
        device.model.reset();
        let features = self.features & !F_PROTOCOL_FEATURES;
        device.model.write_features(features);
    }

    /// A full reset: nothing is left of the rings, but memory and features stay.
    fn reset(&mut self, device: &mut Device<'_>) -> Answer {
        if !device.queues.reset(device.cores) {
            return Answer::Later(Wait::Reset);
        }
        self.reset_done(device)
    }

    fn reset_done(&mut self, device: &mut Device<'_>) -> Answer {
        self.rings.iter_mut().for_each(Ring::reset);
        self.forget_driver(device);
        if let Ok(map) = self.memory.guest_map() {
            device.queues.set_memory(map, device.cores);
        }
        Answer::Ack
    }

    /// The answer that has been waited for, if `notice` is what it waited for.
    pub(super) fn arrived(
        &mut self,
        wait: Wait,
        notice: Notice,
        device: &mut Device<'_>,
    ) -> Option<Answer> {
        match (wait, notice) {
            (Wait::Position(want), Notice::Stopped(idx)) if want == idx => {
                Some(self.position(idx, device))
            }
            (Wait::Stop(want), Notice::Stopped(idx)) if want == idx => {
                self.note_stop(idx, device.queues);
                Some(Answer::Ack)
            }
            (Wait::Memory, Notice::MemoryReplaced) => Some(Answer::Ack),
            (Wait::Reset, Notice::ResetDone) => Some(self.reset_done(device)),
            _ => None,
        }
    }

    /// A ring has failed: the front end hears of it if it gave an event for that.
    pub(super) fn ring_failed(&self, idx: QueueIdx) {
        if let Some(Ring { err: Some(err), .. }) = self.rings.get(usize::from(idx.0)) {
            err.signal();
        }
    }
}

/// Why a ring is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Start {
    /// The front end wants it.
    Asked,
    /// It ran when a former process died.
    Resumed,
}

/// The ring number of a kick, call or error message, and the event that comes with it.
fn ring_event(m: &mut Message, keeper: &Keeper) -> Result<(u64, Option<Arc<EventFd>>), PeerError> {
    let value: u64 = m.read()?;
    let index = value & VRING_INDEX_MASK;
    if value & VRING_NOFD == 0 {
        let fd = m.one_fd()?;
        let event = event(fd)?;
        event.keep(keeper.fds());
        return Ok((index, Some(Arc::new(event))));
    }
    match m.fds.len() {
        0 => Ok((index, None)),
        count => Err(PeerError::Fds {
            request: m.request,
            count,
        }),
    }
}

/// Offset and length of a configuration message; as many bytes must follow.
fn config_area(m: &Message) -> Result<(ConfigHeader, usize), PeerError> {
    let (header, bytes): (ConfigHeader, _) = m.read_prefix()?;
    let ConfigHeader { offset, size, .. } = header;
    let len = size as usize;
    if len > MAX_CONFIG || offset as usize > MAX_CONFIG {
        return Err(PeerError::Config { offset, size });
    }
    if bytes.len() != len {
        return Err(PeerError::Size {
            request: m.request,
            size: m.payload.len(),
        });
    }
    Ok((header, len))
}

fn get_config(m: &Message, model: &DeviceModel) -> Result<Answer, PeerError> {
    let (header, len) = config_area(m)?;
    let mut area = vec![0; len];
    model.read_config(header.offset.into(), &mut area);
    Ok(Answer::Reply([header.as_bytes(), &area].concat(), None))
}
