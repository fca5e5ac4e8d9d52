//! What a client's commands do.
//!
//! Owns the function and the guest memory of one client. It must never touch a socket: [`super::conn`] brings commands, takes
//! answers, and asks which postponed answers are due. Every length is checked against the bytes that came; a command that is
//! well-formed but wrong gets an error number.

mod saved;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use tracing::warn;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::dma::{Window, Windows};
use super::frame::Message;
use super::pci::PciFunction;
use super::wire::{
    DeviceInfo, DmaMap, DmaUnmap, IoEventFd, IrqInfo, IrqSet, MAX_DATA_XFER, MultiCount,
    MultiWrite, RegionAccess, RegionInfo, RegionIoFds, command, device_flags, dma_flags, irq,
    region, region_flags,
};
use crate::engine::Cores;
use crate::id::CoreEvent;
use crate::keeper::Keeper;
use crate::mem::{GuestMap, Iova};
use crate::os::fdstore::Kept;
use crate::os::mmap::{MapFileError, MappedRegion, SharedMap, guest_map};

/// Payload and descriptors of a reply.
pub(crate) type Reply = (Vec<u8>, Vec<OwnedFd>);

/// What happens to a command.
#[derive(Debug)]
pub(crate) enum Answer {
    /// It is answered at once.
    Now(Result<Reply, Errno>),
    /// It is answered with this payload when the cores have done their part.
    Later(Vec<u8>, Until),
}

/// What an answer waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Until {
    /// The cores use the guest memory of this change, or of a later one.
    Memory(u64),
    /// The reset is complete.
    Reset,
}

/// How far the cores have followed the changes of guest memory. One change is with the cores at a time; those that come
/// meanwhile go together in the next one.
#[derive(Debug, Default)]
struct Memory {
    /// The last change.
    wanted: u64,
    /// The change that the cores are taking over.
    under_way: Option<u64>,
    /// The last change that the cores have taken over.
    done: u64,
}

pub(crate) use saved::ServedV1;

/// The memory behind a window.
#[derive(Debug)]
struct Backing {
    map: Arc<SharedMap>,
    /// The file as it is kept.
    file: Option<Kept>,
    offset: u64,
}

impl Backing {
    fn new(map: &DmaMap, file: impl AsFd, kept: Option<Kept>) -> Result<Backing, Errno> {
        let writable = map.flags & dma_flags::WRITE != 0;
        let mapped = SharedMap::new(file, map.offset, map.size, writable);
        let mapped = mapped.map_err(|e| match e {
            MapFileError::NotAFile => Errno::EBADF,
            MapFileError::TooShort { .. } => Errno::EINVAL,
            MapFileError::System(errno) => errno,
        })?;
        Ok(Backing {
            map: Arc::new(mapped),
            file: kept,
            offset: map.offset,
        })
    }
}

/// A function and the guest memory that its client has opened.
#[derive(Debug)]
pub(crate) struct Served {
    name: String,
    pub(crate) function: PciFunction,
    windows: Windows<Backing>,
    keeper: Keeper,
    memory: Memory,
    /// The operator knows that this client has memory that cannot be reached.
    noted_unmappable: bool,
}

/// Takes a structure off the front of a payload.
fn take<T: FromBytes + KnownLayout + Immutable>(payload: &[u8]) -> Result<(T, &[u8]), Errno> {
    T::read_from_prefix(payload).map_err(|_| Errno::EINVAL)
}

/// Checks that the client has room for a reply of this structure.
fn check_room<T>(argsz: u32) -> Result<(), Errno> {
    if (argsz as usize) < size_of::<T>() {
        return Err(Errno::EINVAL);
    }
    Ok(())
}

fn plain(reply: &(impl IntoBytes + Immutable)) -> Result<Reply, Errno> {
    Ok((reply.as_bytes().to_vec(), Vec::new()))
}

impl Served {
    pub(crate) fn new(name: &str, function: PciFunction, keeper: &Keeper) -> Served {
        Served {
            name: name.to_owned(),
            function,
            windows: Windows::new(),
            keeper: keeper.clone(),
            memory: Memory::default(),
            noted_unmappable: false,
        }
    }

    /// Carries out a command. `max_fds` is how many descriptors the client takes in a reply.
    pub(crate) fn serve(
        &mut self,
        message: &mut Message,
        max_fds: usize,
        cores: &mut dyn Cores,
    ) -> Answer {
        let fds = std::mem::take(&mut message.fds);
        let payload = &message.payload[..];
        let answer = match message.header.command {
            command::DMA_MAP => self.map(payload, fds, cores),
            command::DMA_UNMAP => self.unmap(payload, cores),
            command::DEVICE_RESET => {
                self.function.reset_function(cores);
                Ok(Answer::Later(Vec::new(), Until::Reset))
            }
            command::DEVICE_GET_INFO => device_info(payload).map(now),
            command::DEVICE_GET_REGION_INFO => self.region_info(payload).map(now),
            command::DEVICE_GET_REGION_IO_FDS => self.region_io_fds(payload, max_fds).map(now),
            command::DEVICE_GET_IRQ_INFO => self.irq_info(payload).map(now),
            command::DEVICE_SET_IRQS => self.set_irqs(payload, fds, cores).map(now),
            command::REGION_READ => self.region_read(payload).map(now),
            command::REGION_WRITE => self.region_write(payload, cores).map(now),
            command::REGION_WRITE_MULTI => self.region_write_multi(payload, cores).map(now),
            command::VERSION => Err(Errno::EINVAL),
            // Migration is not offered; the server's own commands cannot come from a client.
            _ => Err(Errno::ENOTSUP),
        };
        answer.unwrap_or_else(|errno| Answer::Now(Err(errno)))
    }

    // Guest memory.

    fn map(
        &mut self,
        payload: &[u8],
        fds: Vec<OwnedFd>,
        cores: &mut dyn Cores,
    ) -> Result<Answer, Errno> {
        let (map, _) = take::<DmaMap>(payload)?;
        if fds.len() > 1 {
            return Err(Errno::EINVAL);
        }
        let keeper = &self.keeper;
        self.windows.map(&map, || {
            let Some(fd) = fds.first() else {
                return Ok(None);
            };
            Backing::new(&map, fd, keeper.keep(fd)).map(Some)
        })?;
        if fds.is_empty() {
            self.note_unmappable(&map);
            // Nothing has changed for the cores: such a window is as unreachable as no window.
            return Ok(now((Vec::new(), Vec::new())));
        }
        let change = self.change_memory(cores);
        Ok(Answer::Later(Vec::new(), Until::Memory(change)))
    }

    /// Tells the operator, once for each client, that the guest's memory is out of reach. Small windows without a file are
    /// common: a VMM's firmware tables, which no driver uses for requests.
    fn note_unmappable(&mut self, map: &DmaMap) {
        const LARGE: u64 = 1 << 20;
        if map.size >= LARGE && !self.noted_unmappable {
            self.noted_unmappable = true;
            warn!(
                device = %self.name,
                address = map.address,
                size = map.size,
                "the VMM keeps guest memory to itself, and requests that use it will fail; give the guest shared memory \
                 (QEMU: memory-backend-memfd with share=on)"
            );
        }
    }

    fn unmap(&mut self, payload: &[u8], cores: &mut dyn Cores) -> Result<Answer, Errno> {
        let (unmap, _) = take::<DmaUnmap>(payload)?;
        self.windows.unmap(&unmap)?;
        let change = self.change_memory(cores);
        let reply = unmap.as_bytes().to_vec();
        Ok(Answer::Later(reply, Until::Memory(change)))
    }

    /// The windows have changed; gives the number of the change.
    fn change_memory(&mut self, cores: &mut dyn Cores) -> u64 {
        self.memory.wanted += 1;
        if self.memory.under_way.is_none() {
            self.push_memory(cores);
        }
        self.memory.wanted
    }

    fn guest_map(&self) -> Arc<GuestMap> {
        let regions: Vec<_> = self
            .windows
            .iter()
            .filter_map(|w| {
                let backing = w.memory.as_ref()?;
                Some(MappedRegion {
                    iova: Iova(w.address),
                    map: Arc::clone(&backing.map),
                    writable: w.writable,
                })
            })
            .collect();
        // The windows do not overlap, do not wrap and are few enough, which is all that could be wrong.
        Arc::new(guest_map(&regions).unwrap_or_default())
    }

    fn push_memory(&mut self, cores: &mut dyn Cores) {
        let map = self.guest_map();
        if self.function.set_memory(map, cores) {
            self.memory.done = self.memory.wanted;
        } else {
            self.memory.under_way = Some(self.memory.wanted);
        }
    }

    /// Takes what the cores report.
    pub(crate) fn event(&mut self, event: CoreEvent, cores: &mut dyn Cores) {
        let replaced = matches!(event, CoreEvent::MemoryReplaced { .. });
        self.function.event(event, cores);
        if replaced && let Some(done) = self.memory.under_way.take() {
            self.memory.done = done;
            if done < self.memory.wanted {
                self.push_memory(cores);
            }
        }
    }

    /// Whether an answer is due.
    pub(crate) fn is_due(&self, until: Until) -> bool {
        match until {
            Until::Memory(change) => self.memory.done >= change,
            Until::Reset => !self.function.resetting(),
        }
    }

    /// The client is gone: resets the function and forgets everything that the client has handed over.
    pub(crate) fn hang_up(&mut self, cores: &mut dyn Cores) {
        self.function.forget_irqs(cores);
        self.function.reset_function(cores);
        self.windows.clear();
        self.noted_unmappable = false;
        self.change_memory(cores);
    }

    /// Whether nothing is left of a client that has gone.
    pub(crate) fn is_settled(&self) -> bool {
        self.memory.under_way.is_none() && !self.function.resetting()
    }

    /// Whether no core works for the function.
    pub(crate) fn is_quiet(&self) -> bool {
        self.is_settled() && self.function.is_quiet()
    }

    // Description.

    fn region_info(&self, payload: &[u8]) -> Result<Reply, Errno> {
        let (asked, _) = take::<RegionInfo>(payload)?;
        check_room::<RegionInfo>(asked.argsz)?;
        if asked.index >= region::COUNT {
            return Err(Errno::EINVAL);
        }
        let size = self.function.region_size(asked.index);
        let access = region_flags::READ | region_flags::WRITE;
        plain(&RegionInfo {
            argsz: size_of::<RegionInfo>() as u32,
            flags: if size > 0 { access } else { 0 },
            index: asked.index,
            cap_offset: 0,
            size,
            offset: 0,
        })
    }

    /// The counters that a client may signal itself instead of writing to notification addresses; only as many as it takes in
    /// one message. They are what makes notifications cheap: a mapped notification area would wake no core that sleeps, and
    /// one that polls wants no notifications.
    fn region_io_fds(&self, payload: &[u8], max_fds: usize) -> Result<Reply, Errno> {
        let (asked, _) = take::<RegionIoFds>(payload)?;
        check_room::<RegionIoFds>(asked.argsz)?;
        if asked.index >= region::COUNT || asked.flags != 0 {
            return Err(Errno::EINVAL);
        }
        let mut entries = Vec::new();
        let mut fds = Vec::new();
        if asked.index == region::BAR0 {
            self.function.keep_kicks();
            for ((offset, kick), fd_index) in self.function.kicks().take(max_fds).zip(0..) {
                fds.push(
                    kick.as_fd()
                        .try_clone_to_owned()
                        .map_err(|_| Errno::EMFILE)?,
                );
                entries.push(IoEventFd {
                    offset,
                    // Drivers write the 16-bit number of the queue.
                    size: 2,
                    fd_index,
                    ..IoEventFd::default()
                });
            }
        }
        let needed = size_of::<RegionIoFds>() + size_of_val(&entries[..]);
        let info = RegionIoFds {
            argsz: needed as u32,
            flags: 0,
            index: asked.index,
            count: entries.len() as u32,
        };
        if (asked.argsz as usize) < needed {
            // The client learns how much room it takes, and asks again.
            return plain(&info);
        }
        Ok(([info.as_bytes(), entries.as_bytes()].concat(), fds))
    }

    fn irq_info(&self, payload: &[u8]) -> Result<Reply, Errno> {
        let (asked, _) = take::<IrqInfo>(payload)?;
        check_room::<IrqInfo>(asked.argsz)?;
        let (flags, count) = self.function.irq_info(asked.index).ok_or(Errno::EINVAL)?;
        plain(&IrqInfo {
            argsz: size_of::<IrqInfo>() as u32,
            flags,
            index: asked.index,
            count,
        })
    }

    fn set_irqs(
        &mut self,
        payload: &[u8],
        fds: Vec<OwnedFd>,
        cores: &mut dyn Cores,
    ) -> Result<Reply, Errno> {
        let (set, data) = take::<IrqSet>(payload)?;
        self.function.set_irqs(&set, data, fds, cores)?;
        Ok(Reply::default())
    }

    // Regions.

    fn check_access(&self, region: u32, offset: u64, count: u32) -> Result<(), Errno> {
        let end = offset.checked_add(count.into()).ok_or(Errno::EINVAL)?;
        if count > MAX_DATA_XFER || end > self.function.region_size(region) {
            return Err(Errno::EINVAL);
        }
        Ok(())
    }

    fn region_read(&mut self, payload: &[u8]) -> Result<Reply, Errno> {
        let (access, _) = take::<RegionAccess>(payload)?;
        self.check_access(access.region, access.offset, access.count)?;
        let mut reply = access.as_bytes().to_vec();
        let data_at = reply.len();
        reply.resize(data_at.saturating_add(access.count as usize), 0);
        if let Some(data) = reply.get_mut(data_at..) {
            self.function.read(access.region, access.offset, data);
        }
        Ok((reply, Vec::new()))
    }

    fn region_write(&mut self, payload: &[u8], cores: &mut dyn Cores) -> Result<Reply, Errno> {
        let (access, data) = take::<RegionAccess>(payload)?;
        self.check_access(access.region, access.offset, access.count)?;
        let data = data.get(..access.count as usize).ok_or(Errno::EINVAL)?;
        self.function
            .write(access.region, access.offset, data, cores);
        plain(&access)
    }

    fn region_write_multi(
        &mut self,
        payload: &[u8],
        cores: &mut dyn Cores,
    ) -> Result<Reply, Errno> {
        let (MultiCount { count }, mut rest) = take::<MultiCount>(payload)?;
        let mut done = 0;
        while done < count {
            let (write, after) = take::<MultiWrite>(rest)?;
            rest = after;
            self.check_access(write.region, write.offset, write.count)?;
            let data = write.data.get(..write.count as usize);
            let data = data.ok_or(Errno::EINVAL)?;
            self.function.write(write.region, write.offset, data, cores);
            done += 1;
        }
        plain(&MultiCount { count: done })
    }
}

fn now(reply: Reply) -> Answer {
    Answer::Now(Ok(reply))
}

fn device_info(payload: &[u8]) -> Result<Reply, Errno> {
    let (asked, _) = take::<DeviceInfo>(payload)?;
    check_room::<DeviceInfo>(asked.argsz)?;
    plain(&DeviceInfo {
        argsz: size_of::<DeviceInfo>() as u32,
        flags: device_flags::RESET | device_flags::PCI,
        num_regions: region::COUNT,
        num_irqs: irq::COUNT,
    })
}
