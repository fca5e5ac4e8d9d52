//! The back end of vhost-user.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::{self, JoinHandle};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Device, Log, Memory, Rings, stream, u32_at, u64_at};

const PROTOCOL_FEATURES: u64 = 1 << 30;
/// MQ, REPLY_ACK, CONFIG, RESET_DEVICE and STATUS.
const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 9 | 1 << 13 | 1 << 16;
const NAMES: [(u32, &str); 17] = [
    (1, "GET_FEATURES"),
    (2, "SET_FEATURES"),
    (3, "SET_OWNER"),
    (5, "SET_MEM_TABLE"),
    (8, "SET_VRING_NUM"),
    (9, "SET_VRING_ADDR"),
    (10, "SET_VRING_BASE"),
    (11, "GET_VRING_BASE"),
    (12, "SET_VRING_KICK"),
    (13, "SET_VRING_CALL"),
    (15, "GET_PROTOCOL_FEATURES"),
    (16, "SET_PROTOCOL_FEATURES"),
    (17, "GET_QUEUE_NUM"),
    (18, "SET_VRING_ENABLE"),
    (24, "GET_CONFIG"),
    (34, "RESET_DEVICE"),
    (39, "SET_STATUS"),
];

/// Serves one connection in a thread.
pub(crate) fn serve(path: &Path, device: Device, log: Log) -> JoinHandle<()> {
    let listener = UnixListener::bind(path).expect("a socket");
    thread::spawn(move || {
        let (stream, _) = listener.accept().expect("a connection");
        Backend {
            device,
            log,
            stream,
            memory: None,
            bases: (0, 0),
            rings: Rings::new(),
            kicks: BTreeMap::new(),
            calls: BTreeMap::new(),
        }
        .run();
    })
}

struct Backend {
    device: Device,
    log: Log,
    stream: UnixStream,
    memory: Option<Memory>,
    /// Where the memory begins for the guest, and for the front end.
    bases: (u64, u64),
    rings: Rings,
    kicks: BTreeMap<u16, OwnedFd>,
    calls: BTreeMap<u16, OwnedFd>,
}

impl Backend {
    fn run(mut self) {
        loop {
            let mut fds = vec![PollFd::new(self.stream.as_fd(), PollFlags::POLLIN)];
            fds.extend(
                self.kicks
                    .values()
                    .map(|kick| PollFd::new(kick.as_fd(), PollFlags::POLLIN)),
            );
            poll(&mut fds, PollTimeout::NONE).expect("poll");
            let message = fds[0].any().unwrap_or(false);
            drop(fds);
            for kick in self.kicks.values() {
                let mut fd = [PollFd::new(kick.as_fd(), PollFlags::POLLIN)];
                if poll(&mut fd, PollTimeout::ZERO).expect("poll") > 0 {
                    nix::unistd::read(kick, &mut [0; 8]).expect("a kick");
                }
            }
            if let Some(memory) = &self.memory {
                for (index, ring) in &mut self.rings {
                    if ring.serve(memory, self.device.answer) {
                        nix::unistd::write(&self.calls[index], &1u64.to_ne_bytes())
                            .expect("an interrupt");
                    }
                }
            }
            if message && self.message().is_none() {
                return;
            }
        }
    }

    fn message(&mut self) -> Option<()> {
        let mut fds = Vec::new();
        let header = stream::read(&self.stream, 12, &mut fds)?;
        let (request, flags) = (u32_at(&header, 0), u32_at(&header, 4));
        assert_eq!(flags & 3, 1, "the version");
        let payload = match u32_at(&header, 8) as usize {
            0 => Vec::new(),
            len => stream::read(&self.stream, len, &mut fds)?,
        };
        let name = NAMES
            .iter()
            .find(|(number, _)| *number == request)
            .unwrap_or_else(|| panic!("unexpected message {request}"))
            .1;
        if self.device.dies_at == Some(name) {
            return None;
        }
        let reply = self.act(name, &payload, fds);
        let reply = match reply {
            Some(reply) => reply,
            None if flags & 8 != 0 => {
                let refused = self.device.refuses == Some(name);
                u64::from(refused).to_le_bytes().to_vec()
            }
            None => return Some(()),
        };
        let mut message = Vec::new();
        for word in [request, 1 | 4, reply.len() as u32] {
            message.extend(word.to_le_bytes());
        }
        message.extend(reply);
        stream::write(&self.stream, &message, &[]);
        Some(())
    }

    fn act(&mut self, name: &str, payload: &[u8], mut fds: Vec<OwnedFd>) -> Option<Vec<u8>> {
        let number = || u64_at(payload, 0);
        let index = || u32_at(payload, 0) as u16;
        match name {
            "GET_FEATURES" => {
                let features = self.device.features | PROTOCOL_FEATURES;
                return Some(features.to_le_bytes().to_vec());
            }
            "GET_PROTOCOL_FEATURES" => return Some(PROTOCOL.to_le_bytes().to_vec()),
            "GET_QUEUE_NUM" => {
                let queues = u64::from(self.device.request_queues) + 1;
                return Some(queues.to_le_bytes().to_vec());
            }
            "GET_CONFIG" => {
                let (offset, size) = (u32_at(payload, 0), u32_at(payload, 4));
                assert_eq!((offset, size, payload.len()), (0, 40, 52));
                let mut reply = payload[..12].to_vec();
                reply.extend(self.device.config());
                return Some(reply);
            }
            "GET_VRING_BASE" => {
                self.log.note(format!("GET_VRING_BASE {}", index()));
                self.ring(index()).running = false;
                return Some([&payload[..4], &[0; 4]].concat());
            }
            "SET_MEM_TABLE" => {
                assert_eq!((u32_at(payload, 0), payload.len()), (1, 40));
                self.bases = (u64_at(payload, 8), u64_at(payload, 24));
                let size = u64_at(payload, 16);
                let fd = fds.pop().expect("the memory's descriptor");
                self.memory = Some(Memory::new(fd, self.bases.0, size));
                self.log.note(name.to_owned());
            }
            "SET_VRING_NUM" => self.ring(index()).size = u32_at(payload, 4) as u16,
            "SET_VRING_ADDR" => {
                // Addresses of the front end; descriptors have the guest's.
                let (guest, user) = self.bases;
                let address = |at| u64_at(payload, at) - user + guest;
                let ring = self.ring(index());
                ring.desc = address(8);
                ring.used = address(16);
                ring.avail = address(24);
            }
            "SET_VRING_KICK" => {
                let kick = fds.pop().expect("a descriptor");
                self.kicks.insert(number() as u16, kick);
                self.log.note(format!("{name} {}", number()));
            }
            "SET_VRING_CALL" => {
                let call = fds.pop().expect("a descriptor");
                self.calls.insert(number() as u16, call);
            }
            "SET_VRING_ENABLE" => {
                let on = u32_at(payload, 4) == 1;
                self.ring(index()).running = on;
                self.log.note(format!("{name} {} {on}", index()));
            }
            "SET_FEATURES" | "SET_STATUS" => {
                self.log.note(format!("{name} {:#x}", number()));
            }
            _ => self.log.note(name.to_owned()),
        }
        None
    }

    fn ring(&mut self, index: u16) -> &mut super::Ring {
        self.rings.entry(index).or_default()
    }
}
