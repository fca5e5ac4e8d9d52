//! The server of vfio-user with a virtio PCI function behind it.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::{self, JoinHandle};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use super::{Device, Log, Memory, Rings, stream, u16_at, u32_at, u64_at};

const CONFIG_REGION: u32 = 7;
const BAR: u32 = 4;
/// The BAR: common configuration at 0, notification at 0x1000 with 8 bytes for each queue, device configuration at 0x2000.
const NOTIFY: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const QUEUE_SIZE: u16 = 64;

/// Serves one connection in a thread.
pub(crate) fn serve(path: &Path, device: Device, log: Log) -> JoinHandle<()> {
    let listener = UnixListener::bind(path).expect("a socket");
    thread::spawn(move || {
        let (stream, _) = listener.accept().expect("a connection");
        serve_stream(stream, device, log);
    })
}

/// As [`serve`], for a connection that comes after others which did not say anything sensible.
pub(crate) fn serve_after_nonsense(path: &Path, device: Device, log: Log) -> JoinHandle<()> {
    let listener = UnixListener::bind(path).expect("a socket");
    thread::spawn(move || {
        let (first, _) = listener.accept().expect("a connection");
        let mut fds = Vec::new();
        // Shorter than a header, and then nothing more.
        assert!(stream::read(&first, 16, &mut fds).is_none());
        let (stream, _) = listener.accept().expect("another connection");
        serve_stream(stream, device, log);
    })
}

fn serve_stream(stream: UnixStream, device: Device, log: Log) {
    let queues = device.request_queues as usize + 1;
    let event = || EventFd::new().expect("an event counter");
    Server {
        kicks: (0..queues).map(|_| event()).collect(),
        calls: (0..queues).map(|_| None).collect(),
        space: config_space(queues),
        common: [0; 0x40],
        device,
        log,
        stream,
        memory: None,
        rings: Rings::new(),
    }
    .run();
}

fn config_space(vectors: usize) -> [u8; 256] {
    let mut space = [0; 256];
    space[..4].copy_from_slice(&[0xf4, 0x1a, 0x5a, 0x10]);
    space[0x34] = 0x40;
    let bar = BAR as u8;
    let caps: [(usize, &[u8]); 4] = [
        (0x40, &[0x11, 0x50, (vectors - 1) as u8, 0]),
        (0x50, &[9, 0x60, 16, 1, bar, 0, 0, 0, 0, 0, 0, 0, 0x40]),
        (
            0x60,
            &[9, 0x80, 20, 2, bar, 0, 0, 0, 0, 0x10, 0, 0, 0, 8, 0, 0, 8],
        ),
        (0x80, &[9, 0, 16, 4, bar, 0, 0, 0, 0, 0x20, 0, 0, 40]),
    ];
    for (at, bytes) in caps {
        space[at..at + bytes.len()].copy_from_slice(bytes);
    }
    space
}

struct Server {
    device: Device,
    log: Log,
    stream: UnixStream,
    space: [u8; 256],
    common: [u8; 0x40],
    memory: Option<Memory>,
    rings: Rings,
    kicks: Vec<EventFd>,
    calls: Vec<Option<OwnedFd>>,
}

impl Server {
    fn run(mut self) {
        loop {
            let mut fds = vec![PollFd::new(self.stream.as_fd(), PollFlags::POLLIN)];
            fds.extend(
                self.kicks
                    .iter()
                    .map(|kick| PollFd::new(kick.as_fd(), PollFlags::POLLIN)),
            );
            poll(&mut fds, PollTimeout::NONE).expect("poll");
            let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
            drop(fds);
            for (index, kick) in self.kicks.iter().enumerate() {
                if ready[index + 1] {
                    kick.read().expect("a kick");
                    self.log.note(format!("event kick {index}"));
                }
            }
            if ready[0] && self.message().is_none() {
                return;
            }
            let Some(memory) = &self.memory else {
                continue;
            };
            for (&index, ring) in &mut self.rings {
                if ring.serve(memory, self.device.answer) {
                    let call = self.calls[usize::from(index)].as_ref().expect("a vector");
                    nix::unistd::write(call, &1u64.to_ne_bytes()).expect("an interrupt");
                }
            }
        }
    }

    fn message(&mut self) -> Option<()> {
        let mut fds = Vec::new();
        let header = stream::read(&self.stream, 16, &mut fds)?;
        let (command, flags) = (u16_at(&header, 2), u32_at(&header, 8));
        let payload = match u32_at(&header, 4) as usize - 16 {
            0 => Vec::new(),
            len => stream::read(&self.stream, len, &mut fds)?,
        };
        let name = match command {
            1 => "VERSION",
            2 => "DMA_MAP",
            4 => "DEVICE_GET_INFO",
            6 => "DEVICE_GET_REGION_IO_FDS",
            8 => "DEVICE_SET_IRQS",
            9 => "REGION_READ",
            10 => "REGION_WRITE",
            other => panic!("unexpected command {other}"),
        };
        if self.device.dies_at == Some(name) {
            return None;
        }
        let no_io_events = name == "DEVICE_GET_REGION_IO_FDS" && !self.device.io_events;
        let refused = self.device.refuses == Some(name) || no_io_events;
        let mut out_fds: Vec<RawFd> = Vec::new();
        let reply = if refused {
            Vec::new()
        } else {
            self.act(name, &payload, fds, &mut out_fds)
        };
        if flags & 0x10 != 0 {
            return Some(());
        }
        let mut message = header[..4].to_vec();
        message.extend((16 + reply.len() as u32).to_le_bytes());
        let (flags, errno) = if refused { (0x21u32, 22u32) } else { (1, 0) };
        message.extend(flags.to_le_bytes());
        message.extend(errno.to_le_bytes());
        message.extend(reply);
        stream::write(&self.stream, &message, &out_fds);
        Some(())
    }

    fn act(
        &mut self,
        name: &str,
        payload: &[u8],
        mut fds: Vec<OwnedFd>,
        out_fds: &mut Vec<RawFd>,
    ) -> Vec<u8> {
        match name {
            "VERSION" => {
                assert_eq!(&payload[..4], [0, 0, 1, 0], "version 0.1");
                assert_eq!(payload.last(), Some(&0), "the capabilities end with a NUL");
                payload[..4].to_vec()
            }
            "DEVICE_GET_INFO" => [16u32, 2, 9, 5].map(u32::to_le_bytes).concat(),
            "DMA_MAP" => {
                self.log.note(name.to_owned());
                let fd = fds.pop().expect("the memory's descriptor");
                assert_eq!(u64_at(payload, 8), 0, "offset into the file");
                let (address, size) = (u64_at(payload, 16), u64_at(payload, 24));
                self.memory = Some(Memory::new(fd, address, size));
                Vec::new()
            }
            "DEVICE_SET_IRQS" => {
                let (index, start, count) =
                    (u32_at(payload, 8), u32_at(payload, 12), u32_at(payload, 16));
                assert_eq!(index, 2, "MSI-X");
                self.log.note(format!("{name} {start} {count}"));
                if let Some(fd) = fds.pop() {
                    self.calls[start as usize] = Some(fd);
                }
                Vec::new()
            }
            "DEVICE_GET_REGION_IO_FDS" => {
                assert_eq!(u32_at(payload, 8), BAR);
                let count = self.kicks.len();
                let mut reply = [16 + 40 * count as u32, 0, BAR, count as u32]
                    .map(u32::to_le_bytes)
                    .concat();
                for (index, kick) in self.kicks.iter().enumerate() {
                    reply.extend((NOTIFY + 8 * index as u64).to_le_bytes());
                    reply.extend(2u64.to_le_bytes());
                    reply.extend([index as u32, 0, 0, 0].map(u32::to_le_bytes).concat());
                    reply.extend([0; 8]);
                    out_fds.push(kick.as_raw_fd());
                }
                reply
            }
            _ => self.access(name == "REGION_WRITE", payload),
        }
    }

    fn access(&mut self, write: bool, payload: &[u8]) -> Vec<u8> {
        let (offset, region) = (u64_at(payload, 0), u32_at(payload, 8));
        let count = u32_at(payload, 12) as usize;
        let at = offset as usize;
        let mut reply = payload[..16].to_vec();
        if write {
            let data = &payload[16..];
            assert_eq!(data.len(), count);
            match (region, offset) {
                (CONFIG_REGION, _) => self.space[at..at + count].copy_from_slice(data),
                (BAR, NOTIFY..DEVICE) => self.log.note(format!("message kick {}", u16_at(data, 0))),
                (BAR, ..NOTIFY) => self.write_common(at, data),
                other => panic!("write to {other:?}"),
            }
            return reply;
        }
        match (region, offset) {
            (CONFIG_REGION, _) => reply.extend(&self.space[at..at + count]),
            (BAR, ..NOTIFY) => reply.extend(self.read_common(at, count)),
            (BAR, DEVICE) => reply.extend(&self.device.config()[..count]),
            other => panic!("read of {other:?}"),
        }
        reply
    }

    fn read_common(&mut self, at: usize, count: usize) -> Vec<u8> {
        let queues = self.kicks.len() as u16;
        match at {
            0x04 => {
                let select = u32_at(&self.common, 0);
                let half = (self.device.features >> (32 * select)) as u32;
                half.to_le_bytes().to_vec()
            }
            0x12 => queues.to_le_bytes().to_vec(),
            0x18 => {
                let size = self.selected().size;
                let size = if size == 0 { QUEUE_SIZE } else { size };
                size.to_le_bytes().to_vec()
            }
            // Each queue's notification offset is its number.
            0x1e => self.common[0x16..0x18].to_vec(),
            _ => self.common[at..at + count].to_vec(),
        }
    }

    fn write_common(&mut self, at: usize, data: &[u8]) {
        self.common[at..at + data.len()].copy_from_slice(data);
        let low = |address: &mut u64| {
            *address = (*address & !0xffff_ffff) | u64::from(u32_at(data, 0));
        };
        let high = |address: &mut u64| {
            *address = (*address & 0xffff_ffff) | u64::from(u32_at(data, 0)) << 32;
        };
        match at {
            0x0c => {
                let select = u32_at(&self.common, 8);
                self.log
                    .note(format!("features {select} {:#x}", u32_at(data, 0)));
            }
            0x14 => {
                self.log.note(format!("status {:#x}", data[0]));
                if data[0] == 0 {
                    self.rings.clear();
                }
            }
            0x18 => self.selected().size = u16_at(data, 0),
            0x1c => {
                let select = u16_at(&self.common, 0x16);
                self.log.note(format!("enable {select}"));
                self.selected().running = true;
            }
            0x20 => low(&mut self.selected().desc),
            0x24 => high(&mut self.selected().desc),
            0x28 => low(&mut self.selected().avail),
            0x2c => high(&mut self.selected().avail),
            0x30 => low(&mut self.selected().used),
            0x34 => high(&mut self.selected().used),
            _ => {}
        }
    }

    fn selected(&mut self) -> &mut super::Ring {
        let select = u16_at(&self.common, 0x16);
        self.rings.entry(select).or_default()
    }
}
