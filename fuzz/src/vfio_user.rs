//! An emulated PCIe function with a client that says anything.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use ferry_dataplane::keeper::Keeper;
use ferry_dataplane::os::eventfd::EventFd;
use ferry_dataplane::os::mmap::new_memfd;
use ferry_dataplane::os::poller::Poller;
use ferry_dataplane::os::socket::{Received, Stream};
use ferry_dataplane::platform::StaticFunction;
use ferry_dataplane::transport::vfio_user::VfioUser;
use ferry_dataplane::transport::vfio_user::wire::{command, header_flags};
use ferry_shared::msg::{Attach, DeviceSpec, Platform};

use crate::cores::{DEVICE, Obliging};

/// Bytes of the file that the client offers as memory.
const MEMORY: u64 = 1 << 16;

struct World {
    device: VfioUser,
    cores: Obliging,
    poller: Arc<Poller>,
    socket: PathBuf,
}

impl World {
    fn new() -> World {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("ferry-fuzz-vfio-{}-{number}", std::process::id());
        let socket = std::env::temp_dir().join(name);
        let poller = Arc::new(Poller::new().expect("an epoll instance"));
        let spec = DeviceSpec {
            name: "device".into(),
            attach: Attach::Doca {
                manager: "manager".into(),
                vuid: "vuid".into(),
            },
            tag: "tag".into(),
            num_request_queues: 2,
            queue_size: 64,
            fsdev: "fsdev".into(),
            packed_vq: true,
            notification_vq: true,
            driver_platform: Platform::Native,
        };
        let place = StaticFunction {
            vuid: "vuid".into(),
            pci_address: "0000:00:00.2".into(),
            num_msix: 3,
            subsystem_vendor: 0x1af4,
            subsystem: 0x105a,
        };
        let device = VfioUser::open(
            &spec,
            DEVICE,
            &place,
            &socket,
            Arc::clone(&poller),
            &Keeper::default(),
        );
        World {
            device: device.expect("a socket"),
            cores: Obliging::default(),
            poller,
            socket,
        }
    }

    fn connect(&mut self) -> Stream {
        let stream = UnixStream::connect(&self.socket).expect("somebody listens");
        self.run();
        assert!(self.device.connected());
        Stream::new(stream).expect("a socket")
    }

    /// Lets everything happen that can.
    fn run(&mut self) {
        let mut ready = Vec::new();
        loop {
            while let Some(event) = self.cores.0.pop_front() {
                self.device.core_event(event, &mut self.cores);
            }
            self.poller.wait(&mut ready, 0).expect("epoll");
            if ready.is_empty() && self.cores.0.is_empty() {
                return;
            }
            for token in &ready {
                self.device.ready(token.local, &mut self.cores);
            }
        }
    }
}

fn message(number: u8, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::from(0u16.to_ne_bytes());
    bytes.extend_from_slice(&u16::from(number).to_ne_bytes());
    for word in [16 + payload.len() as u32, flags, 0] {
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    bytes.extend_from_slice(payload);
    bytes
}

/// A session. The input is a row of commands. A byte below 128 is a command's number; after it come flags (bit 0: no
/// reply, bits 1 and 2: number of descriptors, bit 7: they are memory), the length of the payload, and the payload. Numbers
/// 64 and 65 make the device pause and go on. From 128 on the lowest three bits name a region that is written; after it
/// come a 16-bit offset, the length of the data, and the data.
pub fn commands(data: &[u8]) {
    let mut world = World::new();
    let mut client = world.connect();
    let memory = new_memfd("ferry-fuzz", MEMORY).expect("a memfd");
    let event = EventFd::new().expect("an eventfd");
    let mut rest = data;
    while let [number, a, b, more @ ..] = rest {
        let (payload, next) = if *number < 128 {
            more.split_at(more.len().min(usize::from(*b)))
        } else {
            let len = more.first().map_or(0, |n| usize::from(*n));
            let more = more.get(1..).unwrap_or_default();
            more.split_at(more.len().min(len))
        };
        rest = next;
        match *number {
            64 => world.device.pause(&mut world.cores),
            65 => world.device.resume(&mut world.cores),
            0..128 => {
                let flags = if a & 1 != 0 {
                    header_flags::NO_REPLY
                } else {
                    0
                };
                let fd = if a & 0x80 != 0 {
                    memory.as_fd()
                } else {
                    event.as_fd()
                };
                let bytes = message(*number, flags, payload);
                let _ = client.send(&bytes, &vec![fd; usize::from(a >> 1 & 3)]);
            }
            _ => {
                let mut access = u64::from(u16::from_le_bytes([*a, *b]))
                    .to_ne_bytes()
                    .to_vec();
                access.extend_from_slice(&u32::from(number & 7).to_ne_bytes());
                access.extend_from_slice(&(payload.len() as u32).to_ne_bytes());
                access.extend_from_slice(payload);
                let bytes = message(command::REGION_WRITE as u8, 0, &access);
                let _ = client.send(&bytes, &[]);
            }
        }
        world.run();
        let (mut buf, mut fds) = ([0; 4096], Vec::new());
        while let Ok(Received::Bytes(_)) = client.receive(&mut buf, &mut fds, 16) {}
        if !world.device.connected() {
            client = world.connect();
        }
    }
    world.device.begin_close(&mut world.cores);
    world.run();
    assert!(world.device.is_quiet(), "a closed device still waits");
}
