//! The client of vfio-user: what a VMM does to give a guest a PCI function that another process emulates.
//!
//! This file carries messages; [`super::virtio_pci`] drives the function behind them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use ferry_dataplane::os::eventfd::EventFd;
use ferry_dataplane::transport::vfio_user::wire::{
    DeviceInfo, DmaMap, DmaUnmap, Header, IoEventFd, IrqSet, MAX_MESSAGE, RegionAccess,
    RegionIoFds, VERSION_MAJOR, VERSION_MINOR, Version, command, device_flags, dma_flags,
    header_flags, irq, irq_set_flags,
};
use ferry_shared::errno::Errno;
use zerocopy::{FromBytes, IntoBytes};

use super::error::{DriverError, Result};
use super::memory::DmaMemory;
use super::socket::Socket;

/// What the client can take, sent with the version. The text ends with a NUL.
const CAPABILITIES: &[u8] =
    b"{\"capabilities\":{\"max_msg_fds\":16,\"max_data_xfer_size\":4096}}\0";
/// In [`IoEventFd::flags`]: only a write of the given value signals the event.
const IOEVENTFD_DATAMATCH: u32 = 1;
/// Event descriptors of one region that are taken: one for each queue of the largest device.
const MAX_IO_FDS: usize = 256;

/// A connection to a vfio-user server.
#[derive(Debug)]
pub(super) struct VfioUser {
    socket: Arc<Socket>,
    next_id: u16,
    buf: Box<[u8]>,
}

/// A reply: what is in the connection's buffer, and the descriptors that came with it.
struct Reply {
    len: usize,
    fds: Vec<OwnedFd>,
}

impl VfioUser {
    /// Agrees on the protocol's version and makes sure that there is a PCI function.
    pub(super) fn open(socket: Socket) -> Result<VfioUser> {
        let mut client = VfioUser {
            socket: Arc::new(socket),
            next_id: 1,
            buf: vec![0; MAX_MESSAGE].into_boxed_slice(),
        };
        let version = Version {
            major: VERSION_MAJOR,
            minor: VERSION_MINOR,
        };
        let payload = [version.as_bytes(), CAPABILITIES];
        let reply = client.call(command::VERSION, &payload, &[])?;
        let theirs: Version = client.prefix(command::VERSION, &reply)?;
        if theirs.major != VERSION_MAJOR {
            return Err(DriverError::Unusable(format!(
                "it speaks vfio-user {}.{}, this driver {VERSION_MAJOR}.{VERSION_MINOR}",
                theirs.major, theirs.minor
            )));
        }
        let ask = DeviceInfo {
            argsz: size_of::<DeviceInfo>() as u32,
            ..DeviceInfo::default()
        };
        let info: DeviceInfo = client.ask(command::DEVICE_GET_INFO, &ask)?;
        if info.flags & device_flags::PCI == 0 {
            return Err(DriverError::Unusable("it is not a PCI device".into()));
        }
        Ok(client)
    }

    pub(super) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Reads from a region.
    pub(super) fn read(&mut self, region: u32, offset: u64, out: &mut [u8]) -> Result<()> {
        let access = RegionAccess {
            offset,
            region,
            count: out.len() as u32,
        };
        let reply = self.call(command::REGION_READ, &[access.as_bytes()], &[])?;
        let start = size_of::<RegionAccess>();
        match self.buf[..reply.len].get(start..) {
            Some(data) if data.len() == out.len() => out.copy_from_slice(data),
            _ => {
                return Err(broken(
                    command::REGION_READ,
                    "another length than asked for",
                ));
            }
        }
        Ok(())
    }

    /// Writes to a region, and waits until that has happened.
    pub(super) fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        let access = RegionAccess {
            offset,
            region,
            count: data.len() as u32,
        };
        self.call(command::REGION_WRITE, &[access.as_bytes(), data], &[])?;
        Ok(())
    }

    /// Lets the device reach the driver's memory.
    pub(super) fn map_memory(&mut self, memory: &DmaMemory) -> Result<()> {
        let map = DmaMap {
            argsz: size_of::<DmaMap>() as u32,
            flags: dma_flags::READ | dma_flags::WRITE,
            offset: 0,
            address: memory.iova_base(),
            size: memory.size() as u64,
        };
        self.call(command::DMA_MAP, &[map.as_bytes()], &[memory.as_fd()])?;
        Ok(())
    }

    /// Takes the driver's memory away from the device.
    pub(super) fn unmap_memory(&mut self, address: u64, size: u64) -> Result<()> {
        let unmap = DmaUnmap {
            argsz: size_of::<DmaUnmap>() as u32,
            flags: 0,
            address,
            size,
        };
        self.call(command::DMA_UNMAP, &[unmap.as_bytes()], &[])?;
        Ok(())
    }

    /// Sends MSI-X vector `vector` to an event counter.
    pub(super) fn set_msix(&mut self, vector: u32, event: &EventFd) -> Result<()> {
        let set = IrqSet {
            argsz: size_of::<IrqSet>() as u32,
            flags: irq_set_flags::DATA_EVENTFD | irq_set_flags::ACTION_TRIGGER,
            index: irq::MSIX,
            start: vector,
            count: 1,
        };
        self.call(
            command::DEVICE_SET_IRQS,
            &[set.as_bytes()],
            &[event.as_fd()],
        )?;
        Ok(())
    }

    /// Takes all MSI-X vectors away.
    pub(super) fn clear_msix(&mut self) -> Result<()> {
        let set = IrqSet {
            argsz: size_of::<IrqSet>() as u32,
            flags: irq_set_flags::DATA_NONE | irq_set_flags::ACTION_TRIGGER,
            index: irq::MSIX,
            start: 0,
            count: 0,
        };
        self.call(command::DEVICE_SET_IRQS, &[set.as_bytes()], &[])?;
        Ok(())
    }

    /// The event counters that can be signalled in place of writing to a region. A server need not have any.
    pub(super) fn io_events(&mut self, region: u32) -> Result<Vec<IoEvent>> {
        let request = command::DEVICE_GET_REGION_IO_FDS;
        let entry = size_of::<IoEventFd>();
        let ask = RegionIoFds {
            argsz: (size_of::<RegionIoFds>() + MAX_IO_FDS * entry) as u32,
            index: region,
            ..RegionIoFds::default()
        };
        let reply = match self.call(request, &[ask.as_bytes()], &[]) {
            Ok(reply) => reply,
            Err(DriverError::Refused { .. }) => return Ok(Vec::new()),
            Err(e) => return Err(e),
        };
        let head: RegionIoFds = self.prefix(request, &reply)?;
        let entries = self.buf[..reply.len]
            .get(size_of::<RegionIoFds>()..)
            .unwrap_or(&[]);
        let mut fds: Vec<Option<OwnedFd>> = reply.fds.into_iter().map(Some).collect();
        let mut events = Vec::new();
        for raw in entries.chunks_exact(entry).take(head.count as usize) {
            let entry =
                IoEventFd::read_from_bytes(raw).map_err(|_| broken(request, "short entry"))?;
            // An entry whose descriptor is missing, or taken by another one, is left out: writing still works.
            let fd = fds
                .get_mut(entry.fd_index as usize)
                .and_then(Option::take)
                .filter(|_| entry.kind == 0);
            if let Some(fd) = fd {
                events.push(IoEvent { entry, fd });
            }
        }
        Ok(events)
    }

    /// A posted write of a queue's number to its notification address; `with_data` as `VIRTIO_F_NOTIFICATION_DATA` asks.
    pub(super) fn doorbell(
        &self,
        region: u32,
        offset: u64,
        queue: u16,
        with_data: bool,
    ) -> Doorbell {
        let count = if with_data { 4 } else { 2 };
        let access = RegionAccess {
            offset,
            region,
            count,
        };
        let header = Header {
            id: 0,
            command: command::REGION_WRITE,
            size: (DOORBELL_HEAD + count as usize) as u32,
            flags: header_flags::COMMAND | header_flags::NO_REPLY,
            error: 0,
        };
        let mut head = [0u8; DOORBELL_HEAD];
        head.copy_from_slice(&[header.as_bytes(), access.as_bytes()].concat());
        Doorbell {
            socket: Arc::clone(&self.socket),
            head,
            queue,
            with_data,
        }
    }

    /// Sends a command whose reply has the same form.
    fn ask<T>(&mut self, number: u16, payload: &T) -> Result<T>
    where
        T: FromBytes + IntoBytes + zerocopy::Immutable + zerocopy::KnownLayout,
    {
        let reply = self.call(number, &[payload.as_bytes()], &[])?;
        self.prefix(number, &reply)
    }

    fn prefix<T: FromBytes>(&self, number: u16, reply: &Reply) -> Result<T> {
        match T::read_from_prefix(&self.buf[..reply.len]) {
            Ok((value, _)) => Ok(value),
            Err(_) => Err(broken(number, "its reply is too short")),
        }
    }

    /// Sends a command and waits for its reply.
    fn call(&mut self, number: u16, payload: &[&[u8]], fds: &[BorrowedFd<'_>]) -> Result<Reply> {
        let id = self.next_id;
        // 0 is for doorbells.
        self.next_id = self.next_id.checked_add(1).unwrap_or(1);
        let length: usize = payload.iter().map(|p| p.len()).sum();
        let header = Header {
            id,
            command: number,
            size: (size_of::<Header>() + length) as u32,
            flags: header_flags::COMMAND,
            error: 0,
        };
        let mut parts = vec![header.as_bytes()];
        parts.extend_from_slice(payload);
        self.socket.send(name(number), &parts, fds)?;
        loop {
            let (header, reply) = self.receive(number)?;
            if header.flags & header_flags::TYPE_MASK == header_flags::COMMAND {
                self.refuse(&header)?;
                continue;
            }
            if header.id != id || header.command != number {
                return Err(broken(number, "a reply to another message"));
            }
            if header.flags & header_flags::ERROR != 0 {
                let errno = i32::try_from(header.error).unwrap_or(0);
                return Err(DriverError::Refused {
                    request: name(number),
                    errno: Errno::from_raw(errno),
                });
            }
            return Ok(reply);
        }
    }

    /// Receives one message; its payload goes to the buffer.
    fn receive(&mut self, number: u16) -> Result<(Header, Reply)> {
        let mut raw = [0u8; size_of::<Header>()];
        let mut fds = Vec::new();
        self.socket.receive(name(number), &mut raw, &mut fds)?;
        let header =
            Header::read_from_bytes(&raw).map_err(|_| broken(number, "its header is too short"))?;
        let len = (header.size as usize)
            .checked_sub(size_of::<Header>())
            .filter(|&len| len <= self.buf.len())
            .ok_or(broken(number, "a message of an impossible length"))?;
        self.socket
            .receive(name(number), &mut self.buf[..len], &mut fds)?;
        Ok((header, Reply { len, fds }))
    }

    /// Answers a command of the server: it has the memory's descriptor and nothing to ask for.
    fn refuse(&self, header: &Header) -> Result<()> {
        if header.flags & header_flags::NO_REPLY != 0 {
            return Ok(());
        }
        let answer = Header {
            id: header.id,
            command: header.command,
            size: size_of::<Header>() as u32,
            flags: header_flags::REPLY | header_flags::ERROR,
            error: Errno::EOPNOTSUPP.raw().cast_unsigned(),
        };
        self.socket
            .send("its own command", &[answer.as_bytes()], &[])
    }
}

/// An event counter that stands for writes to a part of a region.
#[derive(Debug)]
pub(super) struct IoEvent {
    entry: IoEventFd,
    fd: OwnedFd,
}

impl IoEvent {
    /// Whether signalling it does the same as writing `value` at `offset`.
    pub(super) fn stands_for(&self, offset: u64, value: u16) -> bool {
        self.entry.offset == offset
            && (self.entry.flags & IOEVENTFD_DATAMATCH == 0
                || self.entry.datamatch == u64::from(value))
    }

    pub(super) fn into_event(self) -> Result<EventFd> {
        EventFd::from_peer(self.fd).map_err(DriverError::io("use the device's event counter"))
    }
}

const DOORBELL_HEAD: usize = size_of::<Header>() + size_of::<RegionAccess>();

/// A message that kicks a queue. Several threads may send theirs at once: a message this short goes into a Unix stream
/// socket as one piece.
#[derive(Debug)]
pub(super) struct Doorbell {
    socket: Arc<Socket>,
    head: [u8; DOORBELL_HEAD],
    queue: u16,
    with_data: bool,
}

impl Doorbell {
    /// Rings; `position` is where the queue's next request will go.
    pub(super) fn ring(&self, position: u16) -> Result<()> {
        let mut message = [0u8; DOORBELL_HEAD + 4];
        message[..DOORBELL_HEAD].copy_from_slice(&self.head);
        message[DOORBELL_HEAD..][..2].copy_from_slice(&self.queue.to_le_bytes());
        message[DOORBELL_HEAD + 2..].copy_from_slice(&position.to_le_bytes());
        let len = if self.with_data { 4 } else { 2 };
        let message = &message[..DOORBELL_HEAD + len];
        self.socket.send_whole("a doorbell", message)
    }
}

fn broken(number: u16, problem: &'static str) -> DriverError {
    DriverError::Protocol {
        request: name(number),
        problem,
    }
}

/// The command's name in the protocol's text.
fn name(number: u16) -> &'static str {
    match number {
        command::VERSION => "VERSION",
        command::DMA_MAP => "DMA_MAP",
        command::DMA_UNMAP => "DMA_UNMAP",
        command::DEVICE_GET_INFO => "DEVICE_GET_INFO",
        command::DEVICE_GET_REGION_INFO => "DEVICE_GET_REGION_INFO",
        command::DEVICE_GET_REGION_IO_FDS => "DEVICE_GET_REGION_IO_FDS",
        command::DEVICE_SET_IRQS => "DEVICE_SET_IRQS",
        command::REGION_READ => "REGION_READ",
        command::REGION_WRITE => "REGION_WRITE",
        _ => "a vfio-user command",
    }
}
