use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use ferry_shared::msg::{Attach, Platform};
use proptest::prelude::*;
use zerocopy::FromBytes;

use super::wire::{
    ConfigHeader, F_PROTOCOL_FEATURES, FLAG_NEED_REPLY, Inflight, MemRegion, MemRegionMsg,
    MemTable, ProtocolFeatures, VringAddr, VringState,
};
use super::*;
use crate::engine::{QueueIdx, QueueKind};
use crate::mem::Iova;
use crate::os::eventfd::EventFd;
use crate::os::mmap::new_memfd;
use crate::os::socket::{Received, Stream};
use crate::transport::fake::{Asked, DEVICE, FakeCores, stopped};
use crate::virtio::inflight::queue_record_len;

/// What every front end of virtio-fs negotiates.
mod hostile;
mod rings;
mod status;

const FEATURES: u64 = 1 << 32 | 1 << 29 | 1 << 28 | F_PROTOCOL_FEATURES;
/// Guest memory does not begin at 0, as in a User-Mode Linux guest.
const GUEST: u64 = 0xc4_f000;
const LEN: u64 = 1 << 20;

/// A device, and a front end's end of its socket.
struct Rig {
    device: VhostUser,
    cores: FakeCores,
    poller: Arc<Poller>,
    socket: PathBuf,
    front: Stream,
    memory: OwnedFd,
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.socket);
    }
}

fn spec() -> DeviceSpec {
    DeviceSpec {
        name: "dev".to_string(),
        attach: Attach::VhostUser,
        tag: "myfs".to_string(),
        num_request_queues: 2,
        queue_size: 64,
        fsdev: "fs".to_string(),
        packed_vq: false,
        notification_vq: false,
        driver_platform: Platform::Native,
    }
}

fn rig_of(name: &str, spec: &DeviceSpec) -> Rig {
    let socket = std::env::temp_dir().join(format!("ferry-vu-{}-{name}", std::process::id()));
    let poller = Arc::new(Poller::new().unwrap());
    let device = VhostUser::open(
        spec,
        DEVICE,
        &socket,
        Arc::clone(&poller),
        &Keeper::default(),
    )
    .unwrap();
    let front = Stream::new(UnixStream::connect(&socket).unwrap()).unwrap();
    let mut rig = Rig {
        device,
        cores: FakeCores::default(),
        poller,
        socket,
        front,
        memory: new_memfd("guest", GUEST + LEN).unwrap(),
    };
    rig.run();
    assert!(rig.device.connected());
    rig
}

fn rig(name: &str) -> Rig {
    rig_of(name, &spec())
}

impl Rig {
    /// Delivers readiness until there is none.
    fn run(&mut self) {
        let mut ready = Vec::new();
        loop {
            self.poller.wait(&mut ready, 0).unwrap();
            if ready.is_empty() {
                return;
            }
            for token in &ready {
                assert_eq!(token.device, DEVICE);
                self.device.ready(token.local, &mut self.cores);
            }
        }
    }

    fn event(&mut self, event: CoreEvent) {
        self.device.core_event(event, &mut self.cores);
        self.run();
    }

    fn send_flags(&mut self, request: Request, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        let header = Header {
            request: request as u32,
            flags,
            size: payload.len() as u32,
        };
        let bytes = [header.as_bytes(), payload].concat();
        self.front.send(&bytes, fds).unwrap();
        self.run();
    }

    fn send(&mut self, request: Request, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        self.send_flags(request, VERSION, payload, fds);
    }

    fn reply_with_fds(&mut self) -> Option<(Request, Vec<u8>, Vec<OwnedFd>)> {
        let mut fds = Vec::new();
        let mut bytes = [0; 12];
        match self.front.receive(&mut bytes, &mut fds, 8).unwrap() {
            Received::Bytes(12) => {}
            Received::Nothing => return None,
            other => panic!("{other:?}"),
        }
        let header = Header::read_from_bytes(&bytes).unwrap();
        assert_eq!(header.flags, VERSION | FLAG_REPLY);
        let mut payload = vec![0; header.size as usize];
        let got = self.front.receive(&mut payload, &mut fds, 8);
        assert_eq!(got, Ok(Received::Bytes(payload.len())));
        Some((Request::from_raw(header.request).unwrap(), payload, fds))
    }

    fn reply(&mut self) -> Option<(Request, Vec<u8>)> {
        let (request, payload, fds) = self.reply_with_fds()?;
        assert!(fds.is_empty());
        Some((request, payload))
    }

    /// Sends a message that has a reply.
    fn get(&mut self, request: Request, payload: &[u8]) -> Vec<u8> {
        self.send(request, payload, &[]);
        let (from, payload) = self.reply().expect("a reply");
        assert_eq!(from, request);
        payload
    }

    fn get_u64(&mut self, request: Request) -> u64 {
        u64::read_from_bytes(&self.get(request, &[])).unwrap()
    }

    /// Sends a message and returns the acknowledgement.
    fn ack(&mut self, request: Request, payload: &[u8], fds: &[BorrowedFd<'_>]) -> u64 {
        self.send_flags(request, VERSION | FLAG_NEED_REPLY, payload, fds);
        let (from, payload) = self.reply().expect("an acknowledgement");
        assert_eq!(from, request);
        u64::read_from_bytes(&payload).unwrap()
    }

    fn set(&mut self, request: Request, value: u64) {
        assert_eq!(self.ack(request, value.as_bytes(), &[]), 0, "{request:?}");
    }

    fn negotiate_features(&mut self, features: u64) {
        self.send(Request::SetOwner, &[], &[]);
        assert_eq!(self.get_u64(Request::GetFeatures) & features, features);
        let protocol = self.get_u64(Request::GetProtocolFeatures);
        self.send(Request::SetProtocolFeatures, protocol.as_bytes(), &[]);
        self.set(Request::SetFeatures, features);
    }

    fn region(&self) -> MemRegion {
        MemRegion {
            guest_addr: GUEST,
            size: LEN,
            user_addr: 0x7000_0000,
            mmap_offset: GUEST,
        }
    }

    fn mem_table(&self, extra: usize) -> Vec<u8> {
        let table = MemTable {
            num_regions: 1,
            padding: 0,
        };
        [table.as_bytes(), self.region().as_bytes(), &vec![0; extra]].concat()
    }

    fn set_memory(&mut self) {
        let payload = self.mem_table(0);
        let memory = self.memory.try_clone().unwrap();
        assert_eq!(
            self.ack(Request::SetMemTable, &payload, &[memory.as_fd()]),
            0
        );
    }

    fn vring(&mut self, request: Request, index: u32, num: u32) {
        let state = VringState { index, num };
        assert_eq!(self.ack(request, state.as_bytes(), &[]), 0, "{request:?}");
    }

    fn addr(&self, index: u32) -> VringAddr {
        let base = 0x7000_0000 + u64::from(index) * 0x1_0000;
        VringAddr {
            index,
            flags: 0,
            desc: base,
            used: base + 0x2000,
            avail: base + 0x1000,
            log: u64::MAX,
        }
    }

    fn set_up_ring(&mut self, index: u32) {
        let call = EventFd::new().unwrap();
        let fd = call.as_fd();
        let value = u64::from(index);
        assert_eq!(self.ack(Request::SetVringCall, value.as_bytes(), &[fd]), 0);
        self.vring(Request::SetVringNum, index, 256);
        self.vring(Request::SetVringBase, index, 0);
        let addr = self.addr(index);
        assert_eq!(self.ack(Request::SetVringAddr, addr.as_bytes(), &[]), 0);
    }

    fn kick(&mut self, index: u32) -> EventFd {
        let kick = EventFd::new().unwrap();
        let value = u64::from(index);
        assert_eq!(
            self.ack(Request::SetVringKick, value.as_bytes(), &[kick.as_fd()]),
            0
        );
        kick
    }

    /// A front end with rings 0 and 1 running.
    fn bring_up(&mut self) {
        self.negotiate_features(FEATURES);
        self.set_memory();
        for index in 0..2 {
            self.set_up_ring(index);
            self.kick(index);
            self.vring(Request::SetVringEnable, index, 1);
        }
        assert_eq!(self.cores.take(), [Asked::Start(0), Asked::Start(1)]);
    }

    fn assert_closed(&mut self) {
        assert!(!self.device.connected());
        let mut fds = Vec::new();
        let mut buf = [0; 64];
        assert_eq!(
            self.front.receive(&mut buf, &mut fds, 8),
            Ok(Received::Closed)
        );
    }

    fn reconnect(&mut self) {
        self.front = Stream::new(UnixStream::connect(&self.socket).unwrap()).unwrap();
        self.run();
        assert!(self.device.connected());
    }
}

#[test]
fn a_ring_starts_when_it_has_a_kick_and_is_enabled_with_guest_addresses() {
    let mut rig = rig("start");
    rig.negotiate_features(FEATURES);
    rig.set_memory();
    rig.set_up_ring(1);
    rig.vring(Request::SetVringEnable, 1, 1);
    assert_eq!(rig.cores.take(), []);
    let kick = rig.kick(1);
    assert_eq!(rig.cores.take(), [Asked::Start(1)]);
    let start = rig.cores.started.pop().unwrap();
    assert_eq!(start.kind, QueueKind::Request);
    assert_eq!(start.config.size, 256);
    assert_eq!(start.config.desc, Iova(GUEST + 0x1_0000));
    assert_eq!(start.config.avail, Iova(GUEST + 0x1_1000));
    assert_eq!(start.config.used, Iova(GUEST + 0x1_2000));
    assert!(start.config.event_idx && start.config.indirect && !start.config.packed);
    assert!(start.call.is_some());
    start.kick.drain();
    kick.signal();
    assert_eq!(nix::unistd::read(&*start.kick, &mut [0; 8]), Ok(8));
    assert_eq!(start.map.regions().len(), 1);
}

#[test]
fn without_protocol_features_rings_are_enabled_from_the_beginning() {
    let mut rig = rig("plain");
    let features = FEATURES & !F_PROTOCOL_FEATURES;
    rig.send(Request::SetFeatures, features.as_bytes(), &[]);
    let (table, memory) = (rig.mem_table(0), rig.memory.try_clone().unwrap());
    rig.send(Request::SetMemTable, &table, &[memory.as_fd()]);
    let num = VringState { index: 0, num: 64 };
    rig.send(Request::SetVringNum, num.as_bytes(), &[]);
    let addr = rig.addr(0);
    rig.send(Request::SetVringAddr, addr.as_bytes(), &[]);
    let kick = EventFd::new().unwrap();
    rig.send(Request::SetVringKick, 0u64.as_bytes(), &[kick.as_fd()]);
    assert_eq!(rig.cores.take(), [Asked::Start(0)]);
    assert!(rig.reply().is_none(), "nothing is acknowledged");
}

#[test]
fn a_memory_table_may_have_room_for_more_regions_than_it_has() {
    let mut rig = rig("uml");
    rig.negotiate_features(FEATURES);
    let payload = rig.mem_table(32);
    assert_eq!(payload.len(), 72);
    let memory = rig.memory.try_clone().unwrap();
    assert_eq!(
        rig.ack(Request::SetMemTable, &payload, &[memory.as_fd()]),
        0
    );
}

#[test]
fn the_configuration_space_is_read_in_any_pieces() {
    let mut rig = rig("config");
    rig.negotiate_features(FEATURES);
    for (offset, size) in [(0u32, 1u32), (0, 36), (0, 40), (36, 4), (40, 4), (0, 256)] {
        let header = ConfigHeader {
            offset,
            size,
            flags: 0,
        };
        let request = [header.as_bytes(), &vec![0; size as usize]].concat();
        let reply = rig.get(Request::GetConfig, &request);
        assert_eq!(&reply[..12], header.as_bytes());
        assert_eq!(reply.len(), 12 + size as usize);
        let mut whole = [0; 512];
        whole[..4].copy_from_slice(b"myfs");
        whole[36] = 2;
        assert_eq!(reply[12..], whole[offset as usize..][..size as usize]);
        assert_eq!(rig.ack(Request::SetConfig, &request, &[]), 0);
    }
    let header = ConfigHeader {
        offset: 0,
        size: 8,
        flags: 0,
    };
    rig.send(Request::GetConfig, header.as_bytes(), &[]);
    rig.assert_closed();
}

#[test]
fn the_numbers_of_queues_and_slots_are_those_of_the_device() {
    let mut rig = rig("numbers");
    rig.negotiate_features(FEATURES);
    assert_eq!(rig.get_u64(Request::GetQueueNum), 3);
    assert_eq!(rig.get_u64(Request::GetMaxMemSlots), 512);
}

#[test]
fn memory_that_changes_under_running_rings_is_acknowledged_when_the_old_is_out_of_use() {
    let mut rig = rig("memory");
    rig.bring_up();
    let (payload, memory) = (rig.mem_table(0), rig.memory.try_clone().unwrap());
    let flags = VERSION | FLAG_NEED_REPLY;
    rig.send_flags(Request::SetMemTable, flags, &payload, &[memory.as_fd()]);
    assert_eq!(rig.cores.take(), [Asked::SetMemory]);
    assert!(rig.reply().is_none());
    rig.event(CoreEvent::MemoryReplaced { device: DEVICE });
    assert_eq!(rig.reply().unwrap().1, 0u64.as_bytes());
}

#[test]
fn memory_slots_are_added_and_removed() {
    let mut rig = rig("slots");
    rig.negotiate_features(FEATURES);
    let memory = rig.memory.try_clone().unwrap();
    let mut message = MemRegionMsg {
        padding: 0,
        region: rig.region(),
    };
    assert_eq!(
        rig.ack(Request::AddMemReg, message.as_bytes(), &[memory.as_fd()]),
        0
    );
    assert_eq!(rig.device.queues.map().regions().len(), 1);
    assert_eq!(
        rig.ack(Request::AddMemReg, message.as_bytes(), &[memory.as_fd()]),
        1,
        "it overlaps"
    );
    message.region.size += 1;
    assert_eq!(rig.ack(Request::RemMemReg, message.as_bytes(), &[]), 1);
    message.region.size -= 1;
    message.region.mmap_offset = 0;
    assert_eq!(
        rig.ack(Request::RemMemReg, message.as_bytes(), &[memory.as_fd()]),
        0
    );
    assert_eq!(rig.device.queues.map().regions().len(), 0);
}

#[test]
fn a_front_end_that_leaves_takes_everything_with_it_and_the_next_one_is_served() {
    let mut rig = rig("leave");
    rig.bring_up();
    let (front, _) = UnixStream::pair().unwrap();
    rig.front = Stream::new(front).unwrap();
    rig.run();
    assert!(!rig.device.connected());
    assert!(!rig.device.is_quiet());
    assert_eq!(rig.cores.take(), [Asked::Reset(0), Asked::Reset(1)]);
    let next = Stream::new(UnixStream::connect(&rig.socket).unwrap()).unwrap();
    rig.run();
    assert!(!rig.device.connected(), "the queues are still stopping");
    rig.event(stopped(0, 1, 1));
    rig.event(stopped(1, 1, 1));
    assert_eq!(rig.cores.take(), [Asked::EndSession]);
    assert!(rig.device.connected());
    rig.front = next;
    rig.bring_up();
}

#[test]
fn a_second_front_end_waits_until_the_first_has_left() {
    let mut rig = rig("second");
    let second = Stream::new(UnixStream::connect(&rig.socket).unwrap()).unwrap();
    rig.negotiate_features(FEATURES);
    let header = Header {
        request: Request::GetFeatures as u32,
        flags: VERSION,
        size: 0,
    };
    second.send(header.as_bytes(), &[]).unwrap();
    rig.run();
    let first = std::mem::replace(&mut rig.front, second);
    assert!(rig.reply().is_none());
    drop(first);
    rig.run();
    assert_eq!(rig.reply().unwrap().0, Request::GetFeatures);
}

#[test]
fn a_driver_without_kicks_is_looked_at_by_a_timer() {
    let mut rig = rig("poll");
    rig.negotiate_features(FEATURES);
    rig.set_memory();
    rig.set_up_ring(0);
    rig.vring(Request::SetVringEnable, 0, 1);
    rig.set(Request::SetVringKick, wire::VRING_NOFD);
    assert_eq!(rig.cores.take(), [Asked::Start(0)]);
    let poller = Poller::new().unwrap();
    let token = Token {
        device: DEVICE,
        local: 5,
    };
    poller.add(&*rig.cores.started[0].kick, token).unwrap();
    let mut ready = Vec::new();
    for _ in 0..2 {
        poller.wait(&mut ready, -1).unwrap();
        assert_eq!(ready, [token]);
        rig.cores.started[0].kick.drain();
    }
}

#[test]
fn interrupts_can_be_taken_away_and_given_while_a_ring_runs() {
    let mut rig = rig("call");
    rig.bring_up();
    rig.set(Request::SetVringCall, wire::VRING_NOFD | 1);
    let call = EventFd::new().unwrap();
    assert_eq!(
        rig.ack(Request::SetVringCall, 1u64.as_bytes(), &[call.as_fd()]),
        0
    );
    assert_eq!(
        rig.cores.take(),
        [Asked::SetCall(1, false), Asked::SetCall(1, true)]
    );
}

#[test]
fn offered_protocol_features_are_those_that_are_handled() {
    let mut rig = rig("offered");
    let bits = rig.get_u64(Request::GetProtocolFeatures);
    let offered = ProtocolFeatures::from_bits_retain(bits);
    for absent in [
        ProtocolFeatures::LOG_SHMFD,
        ProtocolFeatures::PAGEFAULT,
        ProtocolFeatures::INBAND_NOTIFICATIONS,
        ProtocolFeatures::XEN_MMAP,
    ] {
        assert!(!offered.intersects(absent), "{absent:?}");
    }
}

/// One message of a hostile front end: small numbers are likelier to mean something.
fn hostile() -> impl Strategy<Value = (u32, u32, Vec<u8>, usize)> {
    let word = prop_oneof![
        4 => 0u64..4,
        2 => Just(GUEST),
        2 => Just(LEN),
        2 => Just(0x7000_0000u64),
        1 => Just(u64::MAX),
        1 => any::<u64>(),
    ];
    let words = proptest::collection::vec(word, 0..12)
        .prop_map(|words| words.iter().flat_map(|w| w.to_ne_bytes()).collect());
    let size = prop_oneof![Just(8usize), Just(40), Just(24), 0usize..100];
    (
        0u32..43,
        prop_oneof![9 => Just(9u32), 1 => 0u32..16],
        (words, size),
        0usize..3,
    )
        .prop_map(
            |(request, flags, (mut payload, size), fds): (_, _, (Vec<u8>, _), _)| {
                payload.resize(size, 0);
                (request, flags, payload, fds)
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_hostile_front_end_costs_its_own_connection_at_most(
        messages in proptest::collection::vec(hostile(), 1..60)
    ) {
        let mut rig = rig("hostile");
        rig.negotiate_features(FEATURES);
        let memory = rig.memory.try_clone().unwrap();
        let event = EventFd::new().unwrap();
        let is_memory = |request| (5..7).contains(&request) || (32..39).contains(&request);
        for (request, flags, payload, fds) in messages {
            let fd = if is_memory(request) { memory.as_fd() } else { event.as_fd() };
            let header = Header { request, flags, size: payload.len() as u32 };
            let bytes = [header.as_bytes(), &payload].concat();
            let sent = rig.front.send(&bytes, &vec![fd; fds]);
            rig.run();
            // The cores answer what they were asked.
            for asked in rig.cores.take() {
                match asked {
                    Asked::Stop(index) | Asked::Reset(index) => rig.event(stopped(index, 1, 1)),
                    Asked::SetMemory => rig.event(CoreEvent::MemoryReplaced { device: DEVICE }),
                    Asked::Start(_) | Asked::SetCall(..) | Asked::EndSession => {}
                }
            }
            if sent.is_err() || !rig.device.connected() {
                prop_assert!(rig.device.is_quiet());
                rig.reconnect();
                rig.negotiate_features(FEATURES);
            }
            let mut fds = Vec::new();
            while let Ok(Received::Bytes(_)) = rig.front.receive(&mut [0; 4096], &mut fds, 99) {}
        }
        rig.device.begin_close(&mut rig.cores);
        for asked in rig.cores.take() {
            if let Asked::Reset(index) = asked {
                rig.event(stopped(index, 1, 1));
            }
        }
        prop_assert!(rig.device.is_quiet());
    }
}
