//! The front end of vhost-user: what a VMM does to give a device its memory and virtqueues.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use ferry_dataplane::os::eventfd::EventFd;
use ferry_dataplane::transport::vhost_user::wire::{
    ConfigHeader, F_PROTOCOL_FEATURES, FLAG_NEED_REPLY, FLAG_REPLY, Header, MAX_PAYLOAD, MemRegion,
    MemTable, ProtocolFeatures, Request, VERSION, VERSION_MASK, VringAddr, VringState,
};
use ferry_dataplane::virtio::spec::{Features, FsConfig, Status};
use ferry_shared::errno::Errno;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::config::DeviceConfig;
use super::error::{DriverError, Result};
use super::memory::DmaMemory;
use super::queue::Kick;
use super::ring::Ring;
use super::socket::Socket;

/// Bytes of configuration that every device has: the tag and the number of request queues.
const CONFIG_BASE: usize = std::mem::offset_of!(FsConfig, notify_buf_size);
/// Where a packed ring begins: at descriptor 0 for both sides, with both wrap counters set.
const PACKED_BASE: u32 = 1 << 15 | 1 << 31;
/// A descriptor table this long is what Linux's driver uses, too.
const QUEUE_SIZE_MAX: u16 = 1024;

/// A connection to a vhost-user device.
#[derive(Debug)]
pub(super) struct VhostUser {
    socket: Socket,
    offered: u64,
    protocol: ProtocolFeatures,
    config: DeviceConfig,
    max_queues: u32,
    started: u16,
}

impl VhostUser {
    /// Asks whether the peer speaks vhost-user at all, and for its features. Until it answers nothing is changed.
    pub(super) fn ask(socket: &Socket) -> Result<u64> {
        let request = Request::GetFeatures;
        send(socket, request, 0, &[], &[])?;
        receive_u64(socket, request)
    }

    /// Goes on after [`VhostUser::ask`].
    pub(super) fn open(socket: Socket, offered: u64) -> Result<VhostUser> {
        let mut device = VhostUser {
            socket,
            offered,
            protocol: ProtocolFeatures::empty(),
            config: DeviceConfig::default(),
            max_queues: 2,
            started: 0,
        };
        if offered & F_PROTOCOL_FEATURES == 0 {
            return Err(DriverError::Unusable(
                "this vhost-user device has no protocol features, so its tag cannot be read".into(),
            ));
        }
        device.set(Request::SetOwner, &[], &[])?;
        let known = ProtocolFeatures::MQ
            | ProtocolFeatures::REPLY_ACK
            | ProtocolFeatures::CONFIG
            | ProtocolFeatures::RESET_DEVICE
            | ProtocolFeatures::STATUS;
        let has = device.get_u64(Request::GetProtocolFeatures)?;
        let agreed = ProtocolFeatures::from_bits_retain(has) & known;
        device.set(
            Request::SetProtocolFeatures,
            &[agreed.bits().as_bytes()],
            &[],
        )?;
        device.protocol = agreed;
        if !agreed.contains(ProtocolFeatures::CONFIG) {
            return Err(DriverError::Unusable(
                "this vhost-user device does not offer CONFIG, so its tag cannot be read".into(),
            ));
        }
        if agreed.contains(ProtocolFeatures::MQ) {
            let queues = device.get_u64(Request::GetQueueNum)?;
            device.max_queues = u32::try_from(queues).unwrap_or(u32::MAX);
        }
        device.config = device.read_config()?;
        Ok(device)
    }

    pub(super) fn offered(&self) -> Features {
        Features::from_bits_retain(self.offered & !F_PROTOCOL_FEATURES)
    }

    pub(super) fn config(&self) -> &DeviceConfig {
        &self.config
    }

    pub(super) fn max_queues(&self) -> u32 {
        self.max_queues
    }

    pub(super) fn max_queue_size(&self) -> u16 {
        QUEUE_SIZE_MAX
    }

    pub(super) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Agrees on `features` and gives the device the memory.
    pub(super) fn begin(&mut self, features: Features, memory: &DmaMemory) -> Result<()> {
        self.set_status(Status::ACKNOWLEDGE | Status::DRIVER)?;
        let bits = features.bits() | F_PROTOCOL_FEATURES;
        self.set(Request::SetFeatures, &[bits.as_bytes()], &[])?;
        self.set_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK)?;
        let table = MemTable {
            num_regions: 1,
            padding: 0,
        };
        let region = MemRegion {
            guest_addr: memory.iova_base(),
            size: memory.size() as u64,
            user_addr: memory.host_address(),
            mmap_offset: 0,
        };
        let parts = [table.as_bytes(), region.as_bytes()];
        self.set(Request::SetMemTable, &parts, &[memory.as_fd()])
    }

    /// Starts queue `index`, and says how to kick it.
    pub(super) fn start_queue(
        &mut self,
        index: u16,
        ring: &Ring,
        memory: &DmaMemory,
        call: &EventFd,
    ) -> Result<Kick> {
        let kick = EventFd::new().map_err(DriverError::io("make an event counter"))?;
        let index32 = u32::from(index);
        let areas = ring.areas();
        let address = VringAddr {
            index: index32,
            flags: 0,
            desc: memory.host_address_of(areas.desc),
            used: memory.host_address_of(areas.used),
            avail: memory.host_address_of(areas.avail),
            log: 0,
        };
        let number = u64::from(index);
        self.set_vring(Request::SetVringNum, index32, u32::from(ring.size()))?;
        let base = if ring.is_packed() { PACKED_BASE } else { 0 };
        self.set_vring(Request::SetVringBase, index32, base)?;
        self.set(Request::SetVringAddr, &[address.as_bytes()], &[])?;
        self.set(Request::SetVringCall, &[number.as_bytes()], &[call.as_fd()])?;
        self.set(Request::SetVringKick, &[number.as_bytes()], &[kick.as_fd()])?;
        self.started = self.started.max(index + 1);
        Ok(Kick::Event(kick))
    }

    /// Lets a queue run that was set up while the others ran.
    pub(super) fn enable_queue(&self, index: u16) -> Result<()> {
        self.set_vring(Request::SetVringEnable, index.into(), 1)
    }

    /// Stops queue `index`; its position goes with its setup.
    pub(super) fn reset_queue(&self, index: u16) -> Result<()> {
        self.set_vring(Request::SetVringEnable, index.into(), 0)?;
        self.stop_queue(index)
    }

    fn stop_queue(&self, index: u16) -> Result<()> {
        let state = VringState {
            index: u32::from(index),
            num: 0,
        };
        let request = Request::GetVringBase;
        send(&self.socket, request, 0, &[state.as_bytes()], &[])?;
        let mut answer = VringState::new_zeroed();
        receive_exact(&self.socket, request, answer.as_mut_bytes())
    }

    /// All queues are set up: lets the device begin.
    pub(super) fn run(&mut self) -> Result<()> {
        for index in 0..self.started {
            self.set_vring(Request::SetVringEnable, u32::from(index), 1)?;
        }
        let all = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK | Status::DRIVER_OK;
        self.set_status(all)
    }

    /// Stops all queues and forgets the device's state.
    pub(super) fn reset(&mut self) -> Result<()> {
        for index in 0..std::mem::take(&mut self.started) {
            self.reset_queue(index)?;
        }
        if self.protocol.contains(ProtocolFeatures::RESET_DEVICE) {
            self.set(Request::ResetDevice, &[], &[])?;
        }
        self.set_status(Status::empty())
    }

    fn read_config(&self) -> Result<DeviceConfig> {
        let notification = self.offered().contains(Features::FS_NOTIFICATION);
        let size = if notification {
            size_of::<FsConfig>()
        } else {
            CONFIG_BASE
        };
        let request = Request::GetConfig;
        let header = ConfigHeader {
            offset: 0,
            size: size as u32,
            flags: 0,
        };
        let mut config = FsConfig::new_zeroed();
        let space = &mut config.as_mut_bytes()[..size];
        send(&self.socket, request, 0, &[header.as_bytes(), space], &[])?;
        let mut payload = [0u8; MAX_PAYLOAD];
        let payload = receive(&self.socket, request, &mut payload)?;
        // A device that refuses answers with a header only.
        match payload.get(size_of::<ConfigHeader>()..) {
            Some(bytes) if bytes.len() == size => space.copy_from_slice(bytes),
            _ => {
                return Err(DriverError::Unusable(
                    "it refuses to tell its configuration".into(),
                ));
            }
        }
        DeviceConfig::new(&config)
    }

    fn set_status(&self, status: Status) -> Result<()> {
        if !self.protocol.contains(ProtocolFeatures::STATUS) {
            return Ok(());
        }
        let status = u64::from(status.bits());
        self.set(Request::SetStatus, &[status.as_bytes()], &[])
    }

    fn set_vring(&self, request: Request, index: u32, num: u32) -> Result<()> {
        let state = VringState { index, num };
        self.set(request, &[state.as_bytes()], &[])
    }

    /// Sends a message that has no reply of its own, and waits for its acknowledgement if that was agreed on.
    fn set(&self, request: Request, payload: &[&[u8]], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let acknowledged = self.protocol.contains(ProtocolFeatures::REPLY_ACK);
        let flags = if acknowledged { FLAG_NEED_REPLY } else { 0 };
        send(&self.socket, request, flags, payload, fds)?;
        if acknowledged && receive_u64(&self.socket, request)? != 0 {
            return Err(DriverError::Refused {
                request: name(request),
                errno: Errno::EINVAL,
            });
        }
        Ok(())
    }

    fn get_u64(&self, request: Request) -> Result<u64> {
        send(&self.socket, request, 0, &[], &[])?;
        receive_u64(&self.socket, request)
    }
}

fn send(
    socket: &Socket,
    request: Request,
    flags: u32,
    payload: &[&[u8]],
    fds: &[BorrowedFd<'_>],
) -> Result<()> {
    let header = Header {
        request: request as u32,
        flags: VERSION | flags,
        size: payload.iter().map(|p| p.len() as u32).sum(),
    };
    let mut parts = vec![header.as_bytes()];
    parts.extend_from_slice(payload);
    socket.send(name(request), &parts, fds)
}

/// Receives the reply to `request` into `buf`.
fn receive<'a>(socket: &Socket, request: Request, buf: &'a mut [u8]) -> Result<&'a mut [u8]> {
    let broken = |problem| DriverError::Protocol {
        request: name(request),
        problem,
    };
    let mut header = [0u8; size_of::<Header>()];
    let mut fds: Vec<OwnedFd> = Vec::new();
    socket.receive(name(request), &mut header, &mut fds)?;
    let header = Header::read_from_bytes(&header).map_err(|_| broken("short header"))?;
    if header.flags & (VERSION_MASK | FLAG_REPLY) != VERSION | FLAG_REPLY {
        return Err(broken("not a reply of version 1"));
    }
    if header.request != request as u32 {
        return Err(broken("a reply to another message"));
    }
    let payload = usize::try_from(header.size)
        .ok()
        .and_then(|size| buf.get_mut(..size))
        .ok_or(broken("its reply is too long"))?;
    socket.receive(name(request), payload, &mut fds)?;
    Ok(payload)
}

fn receive_exact(socket: &Socket, request: Request, out: &mut [u8]) -> Result<()> {
    let wanted = out.len();
    if receive(socket, request, out)?.len() == wanted {
        return Ok(());
    }
    Err(DriverError::Protocol {
        request: name(request),
        problem: "its reply is too short",
    })
}

fn receive_u64(socket: &Socket, request: Request) -> Result<u64> {
    let mut value = [0u8; 8];
    receive_exact(socket, request, &mut value)?;
    Ok(u64::from_ne_bytes(value))
}

/// The message's name in the protocol's text.
fn name(request: Request) -> &'static str {
    match request {
        Request::GetFeatures => "GET_FEATURES",
        Request::SetFeatures => "SET_FEATURES",
        Request::SetOwner => "SET_OWNER",
        Request::SetMemTable => "SET_MEM_TABLE",
        Request::SetVringNum => "SET_VRING_NUM",
        Request::SetVringAddr => "SET_VRING_ADDR",
        Request::SetVringBase => "SET_VRING_BASE",
        Request::GetVringBase => "GET_VRING_BASE",
        Request::SetVringKick => "SET_VRING_KICK",
        Request::SetVringCall => "SET_VRING_CALL",
        Request::SetVringEnable => "SET_VRING_ENABLE",
        Request::GetProtocolFeatures => "GET_PROTOCOL_FEATURES",
        Request::SetProtocolFeatures => "SET_PROTOCOL_FEATURES",
        Request::GetQueueNum => "GET_QUEUE_NUM",
        Request::GetConfig => "GET_CONFIG",
        Request::SetStatus => "SET_STATUS",
        Request::ResetDevice => "RESET_DEVICE",
        _ => "a vhost-user message",
    }
}
