//! A device behind a socket, as the fuzz targets of the transports drive it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use ferry_dataplane::os::eventfd::EventFd;
use ferry_dataplane::os::mmap::new_memfd;
use ferry_dataplane::os::poller::Poller;
use ferry_dataplane::os::socket::{Received, Stream};
use ferry_dataplane::transport::Transport;
use ferry_shared::msg::{Attach, DeviceSpec, Failure, Platform};

use crate::cores::Obliging;

/// Bytes of the file that the peer offers as memory.
const MEMORY: u64 = 1 << 16;

/// A device, a peer that is connected to it, and what the peer can hand over.
pub(crate) struct World {
    pub(crate) device: Transport,
    pub(crate) cores: Obliging,
    poller: Arc<Poller>,
    socket: PathBuf,
    peer: Stream,
    memory: OwnedFd,
    event: EventFd,
}

/// A specification that every transport takes.
pub(crate) fn spec(attach: Attach) -> DeviceSpec {
    DeviceSpec {
        name: "device".into(),
        attach,
        tag: "tag".into(),
        num_request_queues: 2,
        queue_size: 64,
        fsdev: "fsdev".into(),
        packed_vq: true,
        notification_vq: true,
        driver_platform: Platform::Native,
    }
}

impl World {
    /// Opens a device with `open` and connects to it.
    pub(crate) fn new(
        open: impl FnOnce(&PathBuf, Arc<Poller>) -> Result<Transport, Failure>,
    ) -> World {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("ferry-fuzz-{}-{number}", std::process::id());
        let socket = std::env::temp_dir().join(name);
        let poller = Arc::new(Poller::new().expect("an epoll instance"));
        let device = open(&socket, Arc::clone(&poller)).expect("a socket");
        let mut world = World {
            device,
            cores: Obliging::default(),
            poller,
            peer: connect(&socket),
            socket,
            memory: new_memfd("ferry-fuzz", MEMORY).expect("a memfd"),
            event: EventFd::new().expect("an eventfd"),
        };
        world.run();
        assert!(world.device.connected());
        world
    }

    /// Sends a message with `count` descriptors, of the memory or of an event.
    pub(crate) fn send(&self, bytes: &[u8], count: u8, memory: bool) {
        let fd: BorrowedFd = if memory {
            self.memory.as_fd()
        } else {
            self.event.as_fd()
        };
        // A peer that was cut off is connected anew before its next message.
        let _ = self.peer.send(bytes, &vec![fd; usize::from(count)]);
    }

    /// Lets everything happen that can, drops the answers, and connects anew if the device has hung up.
    pub(crate) fn settle(&mut self) {
        self.run();
        let (mut buf, mut fds) = ([0; 4096], Vec::new());
        while let Ok(Received::Bytes(_)) = self.peer.receive(&mut buf, &mut fds, 16) {}
        if !self.device.connected() {
            self.peer = connect(&self.socket);
            self.run();
            assert!(self.device.connected());
        }
    }

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

    /// Closes the device, which must then wait for nothing.
    pub(crate) fn close(mut self) {
        self.device.begin_close(&mut self.cores);
        self.run();
        assert!(self.device.is_quiet(), "a closed device still waits");
    }
}

fn connect(socket: &PathBuf) -> Stream {
    let stream = UnixStream::connect(socket).expect("somebody listens");
    Stream::new(stream).expect("a socket")
}
