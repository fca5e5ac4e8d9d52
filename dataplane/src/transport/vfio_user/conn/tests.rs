use super::super::config::{COMMON_OFFSET, DEVICE_OFFSET, ISR_OFFSET, NOTIFY_OFFSET};
use super::super::wire::*;
use super::*;
use crate::id::QueueIdx;
use crate::os::eventfd::EventFd;
use crate::os::mmap::new_memfd;
use crate::os::socket::Received;
use crate::platform::Platform;
use crate::transport::fake::{Asked, DEVICE, FakeCores, stopped};
use ferry_shared::msg::{Attach, Platform as Guest};
use proptest::prelude::*;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

mod bring_up;
mod hostile;
mod lifecycle;

/// A function, its client, and cores that only write down what they are asked.
struct Rig {
    device: VfioUser,
    poller: Arc<Poller>,
    cores: FakeCores,
    client: Stream,
    dir: PathBuf,
    next_id: u16,
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn spec() -> DeviceSpec {
    DeviceSpec {
        name: "vfsdev0".into(),
        attach: Attach::Doca {
            manager: "mlx5_0".into(),
            vuid: "MT2251XZ02WZVFSS0D0F2".into(),
        },
        tag: "docatag".into(),
        num_request_queues: 2,
        queue_size: 64,
        fsdev: "aio0".into(),
        packed_vq: false,
        notification_vq: false,
        driver_platform: Guest::Native,
    }
}

/// The queues of [`spec`]: high priority, two of requests.
const QUEUES: u16 = 3;

/// A reply: payload and descriptors, or an error number.
type Got = Result<(Vec<u8>, Vec<OwnedFd>), u32>;

impl Rig {
    /// A function with `vectors` MSI-X vectors, and a client that has said hello.
    fn new(vectors: u16) -> Rig {
        let mut rig = Rig::silent(vectors);
        rig.hello();
        rig
    }

    /// The same before the hello.
    fn silent(vectors: u16) -> Rig {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("ferry-vfu-{}-{n}", std::process::id()));
        std::fs::create_dir_all(dir.join("pci")).unwrap();
        let platform = Platform::delivered(None).unwrap();
        let mut place = platform
            .find("mlx5_0", "MT2251XZ02WZVFSS0D0F2")
            .unwrap()
            .clone();
        place.num_msix = vectors;
        let poller = Arc::new(Poller::new().unwrap());
        let device = VfioUser::open(
            &spec(),
            DEVICE,
            &place,
            &place.socket(&dir),
            true,
            Arc::clone(&poller),
            &Keeper::default(),
        )
        .unwrap();
        let client = connect(&device);
        let mut rig = Rig {
            device,
            poller,
            cores: FakeCores::default(),
            client,
            dir,
            next_id: 0,
        };
        rig.pump();
        rig
    }

    /// Lets the device do what it can.
    fn pump(&mut self) {
        let mut ready = Vec::new();
        loop {
            self.poller.wait(&mut ready, 0).unwrap();
            if ready.is_empty() {
                return;
            }
            for token in &ready {
                self.device.ready(token.local, &mut self.cores);
            }
        }
    }

    /// Hands the device what a core reports.
    fn report(&mut self, event: CoreEvent) {
        self.device.core_event(event, &mut self.cores);
        self.pump();
    }

    fn send(&mut self, command: u16, payload: &[u8], fds: &[BorrowedFd<'_>], flags: u32) {
        self.next_id += 1;
        let header = Header {
            id: self.next_id,
            command,
            size: 16 + payload.len() as u32,
            flags,
            error: 0,
        };
        let message = [header.as_bytes(), payload].concat();
        self.client.send(&message, fds).unwrap();
        self.pump();
    }

    /// The next reply that has arrived, with the number of the command.
    fn reply(&mut self) -> Option<(u16, Got)> {
        let mut bytes = [0; 16];
        let mut fds = Vec::new();
        match self.client.receive(&mut bytes, &mut fds, 64).unwrap() {
            Received::Bytes(16) => {}
            _ => return None,
        }
        let header = Header::read_from_bytes(&bytes).unwrap();
        assert_eq!(header.flags & header_flags::TYPE_MASK, header_flags::REPLY);
        let mut payload = vec![0; header.size as usize - 16];
        if !payload.is_empty() {
            let n = self.client.receive(&mut payload, &mut fds, 64).unwrap();
            assert_eq!(n, Received::Bytes(payload.len()));
        }
        let failed = header.flags & header_flags::ERROR != 0;
        let got = if failed {
            Err(header.error)
        } else {
            Ok((payload, fds))
        };
        Some((header.id, got))
    }

    fn call_with(&mut self, command: u16, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Got {
        self.send(command, payload, fds, 0);
        let (id, got) = self.reply().expect("an answer at once");
        assert_eq!(id, self.next_id);
        got
    }

    fn call<T: FromBytes + KnownLayout + Immutable>(
        &mut self,
        command: u16,
        payload: &(impl IntoBytes + Immutable),
    ) -> Result<T, u32> {
        let (payload, _) = self.call_with(command, payload.as_bytes(), &[])?;
        Ok(T::read_from_prefix(&payload).unwrap().0)
    }

    fn hello(&mut self) {
        let json = b"{\"capabilities\":{\"max_msg_fds\":8}}\0";
        let version = Version { major: 0, minor: 0 };
        let hello = [version.as_bytes(), json].concat();
        let (reply, _) = self.call_with(command::VERSION, &hello, &[]).unwrap();
        assert_eq!(reply[..4], [0; 4]);
    }

    fn closed(&mut self) -> bool {
        let got = self.client.receive(&mut [0; 16], &mut Vec::new(), 0);
        got == Ok(Received::Closed)
    }

    fn read<const N: usize>(&mut self, region: u32, offset: u64) -> [u8; N] {
        let access = RegionAccess {
            offset,
            region,
            count: N as u32,
        };
        let (reply, _) = self
            .call_with(command::REGION_READ, access.as_bytes(), &[])
            .unwrap();
        assert_eq!(reply[..16], *access.as_bytes());
        reply[16..].try_into().unwrap()
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) {
        let access = RegionAccess {
            offset,
            region,
            count: data.len() as u32,
        };
        let payload = [access.as_bytes(), data].concat();
        self.call_with(command::REGION_WRITE, &payload, &[])
            .unwrap();
    }

    fn common<const N: usize>(&mut self, field: u64) -> [u8; N] {
        self.read(region::BAR0, u64::from(COMMON_OFFSET) + field)
    }

    fn set_common(&mut self, field: u64, data: &[u8]) {
        self.write(region::BAR0, u64::from(COMMON_OFFSET) + field, data);
    }

    fn status(&mut self) -> u8 {
        self.common::<1>(STATUS)[0]
    }

    /// Opens a window of guest memory with a file behind it.
    fn open_window(&mut self, address: u64, size: u64) -> OwnedFd {
        let memory = new_memfd("guest", size).unwrap();
        let map = dma_map(address, size);
        self.send(command::DMA_MAP, map.as_bytes(), &[memory.as_fd()], 0);
        memory
    }

    /// Sends event counters for a range of interrupts.
    fn set_events(&mut self, index: u32, start: u32, events: &[EventFd]) {
        let set = IrqSet {
            argsz: 20,
            flags: irq_set_flags::DATA_EVENTFD | irq_set_flags::ACTION_TRIGGER,
            index,
            start,
            count: events.len() as u32,
        };
        let fds: Vec<_> = events.iter().map(AsFd::as_fd).collect();
        self.call_with(command::DEVICE_SET_IRQS, set.as_bytes(), &fds)
            .unwrap();
    }

    /// What a driver does up to `DRIVER_OK`, with all queues.
    fn bring_up(&mut self, features: u64) {
        self.write(region::CONFIG, 4, &[0x06]);
        for status in [1, 3] {
            self.set_common(STATUS, &[status]);
        }
        for (half, word) in [features as u32, (features >> 32) as u32]
            .into_iter()
            .enumerate()
        {
            self.set_common(0x08, &(half as u32).to_le_bytes());
            self.set_common(0x0c, &word.to_le_bytes());
        }
        self.set_common(STATUS, &[11]);
        assert_eq!(self.status(), 11);
        for queue in 0..QUEUES {
            self.set_common(QUEUE_SELECT, &queue.to_le_bytes());
            self.set_common(QUEUE_VECTOR, &queue.to_le_bytes());
            let base = 0x10000 + 0x4000 * u64::from(queue);
            for (field, offset) in [(0x20, 0), (0x28, 0x1000), (0x30, 0x2000)] {
                self.set_common(field, &((base + offset) as u32).to_le_bytes());
                self.set_common(field + 4, &[0; 4]);
            }
            self.set_common(QUEUE_ENABLE, &[1, 0]);
        }
        self.set_common(STATUS, &[15]);
    }

    /// A running device with guest memory and three vectors.
    fn running() -> (Rig, [EventFd; 3]) {
        let mut rig = Rig::new(3);
        rig.open_window(0, 0x100000);
        assert!(rig.reply().unwrap().1.is_ok());
        let events = [(); 3].map(|()| EventFd::new().unwrap());
        rig.set_events(irq::MSIX, 0, &events);
        rig.bring_up(VERSION_1);
        assert_eq!(
            rig.cores.take(),
            [Asked::Start(0), Asked::Start(1), Asked::Start(2)]
        );
        (rig, events)
    }

    fn all_stopped(&mut self) {
        for queue in 0..QUEUES {
            self.report(stopped(queue, 5, 5));
        }
    }
}

fn connect(device: &VfioUser) -> Stream {
    let path = device.listener.as_ref().unwrap().path();
    Stream::new(UnixStream::connect(path).unwrap()).unwrap()
}

fn dma_map(address: u64, size: u64) -> DmaMap {
    DmaMap {
        argsz: 32,
        flags: dma_flags::READ | dma_flags::WRITE,
        offset: 0,
        address,
        size,
    }
}

fn dma_unmap(address: u64, size: u64) -> DmaUnmap {
    DmaUnmap {
        argsz: 24,
        flags: 0,
        address,
        size,
    }
}

fn fired(event: &impl AsFd) -> bool {
    nix::unistd::read(event.as_fd(), &mut [0; 8]).is_ok()
}

/// Fields of the common configuration structure.
const STATUS: u64 = 0x14;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_RESET: u64 = 0x3a;

const VERSION_1: u64 = 1 << 32;
const RING_RESET: u64 = 1 << 40;
