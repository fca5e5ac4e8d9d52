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
fn a_position_is_told_once_the_ring_has_stopped_and_nothing_is_read_before() {
    let mut rig = rig("base");
    rig.bring_up();
    let state = VringState { index: 1, num: 0 };
    rig.send(Request::GetVringBase, state.as_bytes(), &[]);
    rig.send(Request::GetFeatures, &[], &[]);
    assert_eq!(rig.cores.take(), [Asked::Stop(1)]);
    assert!(rig.reply().is_none());
    rig.event(stopped(0, 9, 9));
    assert!(rig.reply().is_none(), "another ring");
    rig.event(stopped(1, 7, 7));
    let (request, payload) = rig.reply().unwrap();
    assert_eq!(request, Request::GetVringBase);
    let state = VringState { index: 1, num: 7 };
    assert_eq!(payload, state.as_bytes());
    assert_eq!(rig.reply().unwrap().0, Request::GetFeatures);
    // It takes a new kick to start again, at the position that the front end then gives.
    rig.vring(Request::SetVringBase, 1, 3);
    rig.vring(Request::SetVringEnable, 1, 1);
    rig.cores.take();
    rig.kick(1);
    assert_eq!(rig.cores.take(), [Asked::Start(1)]);
    assert_eq!(rig.cores.started.last().unwrap().config.state.avail, 3);
}

#[test]
fn a_ring_that_never_ran_tells_the_position_that_it_was_given() {
    let mut rig = rig("never");
    rig.negotiate_features(FEATURES);
    rig.vring(Request::SetVringBase, 2, 44);
    let reply = rig.get(
        Request::GetVringBase,
        VringState { index: 2, num: 0 }.as_bytes(),
    );
    assert_eq!(reply, VringState { index: 2, num: 44 }.as_bytes());
}

#[test]
fn a_split_ring_resumes_at_the_used_index_in_its_memory() {
    let mut rig = rig("used");
    rig.negotiate_features(FEATURES);
    rig.set_memory();
    rig.set_up_ring(0);
    rig.vring(Request::SetVringBase, 0, 12);
    let at = GUEST + 0x2000 + 2;
    nix::sys::uio::pwrite(&rig.memory, &11u16.to_le_bytes(), at as i64).unwrap();
    rig.vring(Request::SetVringEnable, 0, 1);
    rig.kick(0);
    let state = &rig.cores.started[0].config.state;
    assert_eq!((state.avail, state.used), (12, 11));
}

#[test]
fn a_packed_ring_has_both_positions_and_wrap_counters() {
    let mut packed = spec();
    packed.packed_vq = true;
    let mut rig = rig_of("packed", &packed);
    rig.negotiate_features(FEATURES | 1 << 34);
    rig.set_memory();
    rig.set_up_ring(0);
    rig.vring(Request::SetVringBase, 0, 0x8005_0003);
    rig.vring(Request::SetVringEnable, 0, 1);
    rig.kick(0);
    let config = &rig.cores.started[0].config;
    assert!(config.packed);
    assert_eq!((config.state.avail, config.state.used), (3, 0x8005));
    rig.send(
        Request::GetVringBase,
        VringState { index: 0, num: 0 }.as_bytes(),
        &[],
    );
    rig.event(stopped(0, 0x8009, 0x0008));
    let (_, payload) = rig.reply().unwrap();
    let state = VringState {
        index: 0,
        num: 0x0008_8009,
    };
    assert_eq!(payload, state.as_bytes());
}

#[test]
fn a_packed_ring_at_0_is_fresh_unless_its_first_descriptor_has_been_used() {
    let mut packed = spec();
    packed.packed_vq = true;
    let mut rig = rig_of("packed0", &packed);
    rig.negotiate_features(FEATURES | 1 << 34);
    rig.set_memory();
    // Untouched, made available in a fresh ring, used in the first round.
    for (index, flags, start) in [(0, 0u16, 0x8000), (1, 0x80, 0x8000), (2, 0x8080, 0)] {
        let at = GUEST + u64::from(index) * 0x1_0000 + 14;
        nix::sys::uio::pwrite(&rig.memory, &flags.to_le_bytes(), at as i64).unwrap();
        rig.set_up_ring(index);
        rig.vring(Request::SetVringEnable, index, 1);
        rig.kick(index);
        let state = &rig.cores.started.last().unwrap().config.state;
        assert_eq!((state.avail, state.used), (start, start), "{flags:#x}");
    }
}

#[test]
fn disabling_a_ring_is_acknowledged_once_it_has_stopped_and_enabling_goes_on_there() {
    let mut rig = rig("disable");
    rig.bring_up();
    let off = VringState { index: 0, num: 0 };
    let flags = VERSION | FLAG_NEED_REPLY;
    rig.send_flags(Request::SetVringEnable, flags, off.as_bytes(), &[]);
    assert_eq!(rig.cores.take(), [Asked::Stop(0)]);
    assert!(rig.reply().is_none());
    nix::sys::uio::pwrite(&rig.memory, &5u16.to_le_bytes(), (GUEST + 0x2002) as i64).unwrap();
    rig.event(stopped(0, 5, 5));
    assert_eq!(rig.reply().unwrap().0, Request::SetVringEnable);
    rig.vring(Request::SetVringEnable, 0, 1);
    assert_eq!(rig.cores.take(), [Asked::Start(0)]);
    assert_eq!(rig.cores.started.last().unwrap().config.state.avail, 5);
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
fn messages_that_cannot_be_right_close_their_connection_only() {
    let good = EventFd::new().unwrap();
    let fd = good.as_fd();
    let vring = |index, num| VringState { index, num }.as_bytes().to_vec();
    let cases: Vec<(Request, Vec<u8>, usize)> = vec![
        (Request::SetFeatures, vec![0; 7], 0),
        (Request::SetFeatures, vec![0; 9], 0),
        (Request::SetFeatures, u64::MAX.as_bytes().to_vec(), 0),
        (
            Request::SetProtocolFeatures,
            u64::MAX.as_bytes().to_vec(),
            0,
        ),
        (Request::SetMemTable, vec![], 0),
        (Request::SetMemTable, vec![9, 0, 0, 0, 0, 0, 0, 0], 0),
        (Request::SetMemTable, vec![1, 0, 0, 0, 0, 0, 0, 0], 1),
        (Request::SetMemTable, vec![0xff; 8], 0),
        (
            Request::SetMemTable,
            [&[1, 0, 0, 0, 0, 0, 0, 0][..], &[0; 32]].concat(),
            1,
        ),
        (Request::SetVringNum, vring(3, 64), 0),
        (Request::SetVringNum, vring(u32::MAX, 64), 0),
        (Request::SetVringNum, vring(0, 65), 0),
        (Request::SetVringNum, vring(0, 0), 0),
        (Request::SetVringNum, vring(0, 2048), 0),
        (Request::SetVringBase, vring(0, 0x1_0000), 0),
        (Request::GetVringBase, vring(255, 0), 0),
        (Request::SetVringEnable, vec![], 0),
        (Request::SetVringKick, 0u64.as_bytes().to_vec(), 0),
        (Request::SetVringKick, 0u64.as_bytes().to_vec(), 2),
        (Request::SetVringKick, 0x100u64.as_bytes().to_vec(), 1),
        (Request::SetVringCall, 9u64.as_bytes().to_vec(), 1),
        (Request::SetVringAddr, vec![0; 39], 0),
        (Request::SetLogBase, vec![0; 16], 1),
        (Request::SetStatus, 256u64.as_bytes().to_vec(), 0),
        (Request::GetInflightFd, vec![0xff; 20], 0),
        (Request::SetInflightFd, vec![0xff; 24], 1),
        (Request::IotlbMsg, vec![0; 8], 0),
    ];
    let mut rig = rig("wrong");
    for (request, payload, fds) in cases {
        rig.negotiate_features(FEATURES);
        rig.send(request, &payload, &vec![fd; fds]);
        assert!(!rig.device.connected(), "{request:?} {payload:x?}");
        rig.reconnect();
    }
}

#[test]
fn a_front_end_that_asks_hears_of_a_refusal_and_stays() {
    let mut rig = rig("refuse");
    rig.negotiate_features(FEATURES);
    assert_eq!(
        rig.ack(Request::SetFeatures, (1u64 << 40).as_bytes(), &[]),
        1
    );
    // A ring is to start without having been set up.
    rig.vring(Request::SetVringEnable, 0, 1);
    let kick = EventFd::new().unwrap();
    assert_eq!(
        rig.ack(Request::SetVringKick, 0u64.as_bytes(), &[kick.as_fd()]),
        1
    );
    // Its addresses are in no region.
    rig.set_memory();
    rig.set_up_ring(0);
    let mut addr = rig.addr(0);
    addr.used = 0x100;
    assert_eq!(rig.ack(Request::SetVringAddr, addr.as_bytes(), &[]), 0);
    assert_eq!(
        rig.ack(Request::SetVringKick, 0u64.as_bytes(), &[kick.as_fd()]),
        1
    );
    assert_eq!(rig.cores.take(), []);
    assert!(rig.device.connected());
}

#[test]
fn an_event_is_an_eventfd_or_a_pipe_but_no_file() {
    let mut rig = rig("event");
    rig.negotiate_features(FEATURES);
    let (pipe, _end) = nix::unistd::pipe().unwrap();
    let device = OwnedFd::from(std::fs::File::open("/dev/zero").unwrap());
    let memory = rig.memory.try_clone().unwrap();
    for (fd, refused) in [(pipe, 0), (device, 1), (memory, 1)] {
        for request in [
            Request::SetVringKick,
            Request::SetVringCall,
            Request::SetVringErr,
        ] {
            assert_eq!(rig.ack(request, 0u64.as_bytes(), &[fd.as_fd()]), refused);
        }
    }
}

#[test]
fn messages_need_their_protocol_feature() {
    let mut rig = rig("gate");
    rig.send(Request::GetQueueNum, &[], &[]);
    rig.assert_closed();
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
fn a_failed_ring_is_told_by_its_error_event_and_the_status() {
    let mut rig = rig("failed");
    rig.bring_up();
    let err = EventFd::new().unwrap();
    assert_eq!(
        rig.ack(Request::SetVringErr, 1u64.as_bytes(), &[err.as_fd()]),
        0
    );
    rig.event(CoreEvent::QueueFailed {
        device: DEVICE,
        index: QueueIdx(1),
    });
    assert_eq!(nix::unistd::read(&err, &mut [0; 8]), Ok(8));
    assert_eq!(rig.get_u64(Request::GetStatus), 64);
}

#[test]
fn the_status_goes_up_step_by_step_and_back_by_a_full_reset_of_running_rings() {
    let mut rig = rig("status");
    rig.bring_up();
    for status in [1, 3, 11, 15] {
        rig.set(Request::SetStatus, status);
        assert_eq!(rig.get_u64(Request::GetStatus), status);
    }
    let flags = VERSION | FLAG_NEED_REPLY;
    rig.send_flags(Request::SetStatus, flags, 0u64.as_bytes(), &[]);
    assert_eq!(rig.cores.take(), [Asked::Reset(0), Asked::Reset(1)]);
    assert!(rig.reply().is_none());
    rig.event(stopped(0, 1, 1));
    rig.event(stopped(1, 1, 1));
    assert_eq!(rig.cores.take(), [Asked::EndSession]);
    assert_eq!(rig.reply().unwrap().0, Request::SetStatus);
    assert_eq!(rig.get_u64(Request::GetStatus), 0);
    assert_eq!(rig.device.queues.map().regions().len(), 1, "memory stays");
    // The driver can start over.
    rig.set_up_ring(0);
    rig.kick(0);
    rig.vring(Request::SetVringEnable, 0, 1);
    assert_eq!(rig.cores.take(), [Asked::Start(0)]);
}

#[test]
fn a_status_reset_with_all_rings_stopped_keeps_the_session() {
    let mut rig = rig("pause-vm");
    rig.bring_up();
    rig.set(Request::SetStatus, 15);
    for index in 0..2 {
        let state = VringState { index, num: 0 };
        rig.send(Request::GetVringBase, state.as_bytes(), &[]);
        rig.event(stopped(index as u16, 4, 4));
        rig.reply().unwrap();
    }
    rig.cores.take();
    rig.set(Request::SetStatus, 0);
    assert_eq!(rig.cores.take(), [], "the virtual machine is only paused");
}

#[test]
fn a_device_reset_stops_everything_and_ends_the_session() {
    let mut rig = rig("reset");
    rig.bring_up();
    let flags = VERSION | FLAG_NEED_REPLY;
    rig.send_flags(Request::ResetDevice, flags, &[], &[]);
    rig.event(stopped(1, 1, 1));
    rig.event(stopped(0, 1, 1));
    assert_eq!(
        rig.cores.take(),
        [Asked::Reset(0), Asked::Reset(1), Asked::EndSession]
    );
    assert_eq!(rig.reply().unwrap().1, 0u64.as_bytes());
}

#[test]
fn the_in_flight_record_is_made_and_taken_and_goes_to_the_queues() {
    let mut rig = rig("inflight");
    rig.negotiate_features(FEATURES);
    let wanted = Inflight {
        num_queues: 3,
        queue_size: 256,
        ..Inflight::default()
    };
    rig.send(Request::GetInflightFd, wanted.as_bytes(), &[]);
    let (_, payload, fds) = rig.reply_with_fds().unwrap();
    let given = Inflight::read_from_bytes(&payload).unwrap();
    assert_eq!(given.mmap_size, 3 * queue_record_len(256) as u64);
    assert_eq!((given.num_queues, given.queue_size), (3, 256));
    rig.send(Request::GetInflightFd, &wanted.as_bytes()[..20], &[]);
    assert_eq!(rig.reply_with_fds().unwrap().1.len(), 20);

    let mut short = given;
    short.mmap_size -= 1;
    let fd = fds[0].as_fd();
    assert_eq!(rig.ack(Request::SetInflightFd, short.as_bytes(), &[fd]), 1);
    let mut long = given;
    long.mmap_size += 4096;
    assert_eq!(rig.ack(Request::SetInflightFd, long.as_bytes(), &[fd]), 1);
    assert_eq!(rig.ack(Request::SetInflightFd, given.as_bytes(), &[fd]), 0);
    rig.set_memory();
    rig.set_up_ring(1);
    rig.kick(1);
    rig.vring(Request::SetVringEnable, 1, 1);
    let start = &rig.cores.started[0];
    assert!(start.inflight.is_some());
    let call = start.call.as_ref().unwrap();
    assert_eq!(
        nix::unistd::read(&**call, &mut [0; 8]),
        Ok(8),
        "interrupted once"
    );
}

#[test]
fn a_paused_device_keeps_its_front_end_and_goes_on_where_it_was() {
    let mut rig = rig("pause");
    rig.bring_up();
    rig.device.pause(&mut rig.cores);
    rig.event(stopped(0, 2, 2));
    assert!(!rig.device.is_paused());
    rig.event(stopped(1, 3, 3));
    assert!(rig.device.is_paused() && rig.device.connected());
    rig.cores.take();
    assert_eq!(rig.get_u64(Request::GetQueueNum), 3);
    let reply = rig.get(
        Request::GetVringBase,
        VringState { index: 0, num: 0 }.as_bytes(),
    );
    assert_eq!(reply, VringState { index: 0, num: 2 }.as_bytes());
    rig.device.resume(&mut rig.cores);
    assert_eq!(rig.cores.take(), [Asked::Start(1)]);
    assert_eq!(rig.cores.started.last().unwrap().config.state.avail, 3);
}

#[test]
fn a_closed_device_hangs_up_waits_for_its_queues_and_removes_its_socket() {
    let mut rig = rig("close");
    rig.bring_up();
    rig.device.begin_close(&mut rig.cores);
    rig.assert_closed();
    assert!(!rig.device.is_quiet());
    rig.event(stopped(0, 0, 0));
    rig.event(stopped(1, 0, 0));
    assert!(rig.device.is_quiet());
    assert!(!rig.device.connected());
    let other = rig_of("close2", &spec());
    let socket = rig.socket.clone();
    assert!(socket.exists());
    rig.device = VhostUser::open(
        &spec(),
        DEVICE,
        &other.socket.with_extension("third"),
        Arc::clone(&rig.poller),
        &Keeper::default(),
    )
    .unwrap();
    assert!(!socket.exists());
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
