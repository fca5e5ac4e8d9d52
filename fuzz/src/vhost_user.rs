//! A vhost-user device with a front end that says anything.

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
use ferry_dataplane::transport::vhost_user::VhostUser;
use ferry_dataplane::transport::vhost_user::wire::Request;
use ferry_shared::msg::{Attach, DeviceSpec, Platform};

use crate::cores::{DEVICE, Obliging};

/// Bytes of the file that the front end offers as memory.
const MEMORY: u64 = 1 << 16;

struct World {
    device: VhostUser,
    cores: Obliging,
    poller: Arc<Poller>,
    socket: PathBuf,
}

impl World {
    fn new() -> World {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("ferry-fuzz-{}-{number}", std::process::id());
        let socket = std::env::temp_dir().join(name);
        let poller = Arc::new(Poller::new().expect("an epoll instance"));
        let spec = DeviceSpec {
            name: "device".into(),
            attach: Attach::VhostUser,
            tag: "tag".into(),
            num_request_queues: 2,
            queue_size: 64,
            fsdev: "fsdev".into(),
            packed_vq: true,
            notification_vq: true,
            driver_platform: Platform::Native,
        };
        let device = VhostUser::open(
            &spec,
            DEVICE,
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

/// A session. The input is a row of messages: number, flags, number of descriptors and whether they are memory (bit 7),
/// length of the payload, payload. A number above the known ones makes the device pause or go on.
pub fn messages(data: &[u8]) {
    let mut world = World::new();
    let mut front = world.connect();
    let memory = new_memfd("ferry-fuzz", MEMORY).expect("a memfd");
    let event = EventFd::new().expect("an eventfd");
    let mut rest = data;
    while let [number, flags, fds, len, more @ ..] = rest {
        let (payload, next) = more.split_at(more.len().min(usize::from(*len)));
        rest = next;
        match Request::from_raw(u32::from(*number)) {
            None if number % 4 == 3 => world.device.pause(&mut world.cores),
            None if number % 4 == 2 => world.device.resume(&mut world.cores),
            _ => {
                let header = [u32::from(*number), u32::from(*flags), payload.len() as u32];
                let mut bytes: Vec<u8> = header.iter().flat_map(|n| n.to_ne_bytes()).collect();
                bytes.extend_from_slice(payload);
                let fd = if fds & 0x80 != 0 {
                    memory.as_fd()
                } else {
                    event.as_fd()
                };
                let _ = front.send(&bytes, &vec![fd; usize::from(fds & 3)]);
            }
        }
        world.run();
        let (mut buf, mut fds) = ([0; 4096], Vec::new());
        while let Ok(Received::Bytes(_)) = front.receive(&mut buf, &mut fds, 8) {}
        if !world.device.connected() {
            front = world.connect();
        }
    }
    world.device.begin_close(&mut world.cores);
    world.run();
    assert!(world.device.is_quiet(), "a closed device still waits");
}
