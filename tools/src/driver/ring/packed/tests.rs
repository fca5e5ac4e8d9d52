use super::*;
use crate::driver::memory::Pages;

const SIZE: u16 = 8;

/// The device's side of a ring, as simple as it can be.
struct Peer {
    memory: Arc<DmaMemory>,
    areas: RingAreas,
    avail: Cursor,
    used: Cursor,
}

/// A piece as the device finds it: its address, length, and whether it may be written.
type Piece = (u64, u32, bool);

/// A chain as the device finds it: its id, the descriptors that it takes, and its pieces.
type Chain = (u16, u16, Vec<Piece>);

impl Peer {
    fn new(ring: &PackedRing) -> Peer {
        Peer {
            memory: Arc::clone(&ring.memory),
            areas: ring.areas(),
            avail: Cursor::START,
            used: Cursor::START,
        }
    }

    fn desc(&self, table: DmaSlice, at: u16) -> PackedDesc {
        let mut desc = PackedDesc::new_zeroed();
        let place = table.part(usize::from(at) * DESC_SIZE, DESC_SIZE);
        self.memory.read(place, desc.as_mut_bytes());
        desc
    }

    fn pop(&mut self) -> Option<Chain> {
        let mut pieces = Vec::new();
        for taken in 1.. {
            let desc = self.desc(self.areas.desc, self.avail.at);
            let flags = DescFlags::from_bits_retain(desc.flags.get());
            let avail = flags.contains(DescFlags::AVAIL);
            if avail != self.avail.wrap || flags.contains(DescFlags::USED) == self.avail.wrap {
                assert_eq!(taken, 1, "a chain is available as a whole");
                return None;
            }
            self.avail = self.avail.advance(1, SIZE);
            if flags.contains(DescFlags::INDIRECT) {
                let offset = desc.addr.get() - self.memory.iova_base();
                let len = desc.len.get();
                let table = self.memory.whole().part(offset as usize, len as usize);
                for at in 0..(len as usize / DESC_SIZE) as u16 {
                    pieces.push(piece(&self.desc(table, at)));
                }
            } else {
                pieces.push(piece(&desc));
            }
            if !flags.contains(DescFlags::NEXT) {
                return Some((desc.id.get(), taken, pieces));
            }
        }
        None
    }

    fn complete(&mut self, id: u16, descriptors: u16, len: u32) {
        let mut flags = DescFlags::empty();
        flags.set(DescFlags::AVAIL, self.used.wrap);
        flags.set(DescFlags::USED, self.used.wrap);
        let desc = PackedDesc {
            addr: 0.into(),
            len: len.into(),
            id: id.into(),
            flags: flags.bits().into(),
        };
        let place = usize::from(self.used.at) * DESC_SIZE;
        let place = self.areas.desc.part(place, DESC_SIZE);
        self.memory.write(place, desc.as_bytes());
        self.used = self.used.advance(descriptors, SIZE);
    }

    fn ask(&self, position: u16, flags: u16) {
        let value = u32::from(position) | u32::from(flags) << 16;
        self.memory
            .field32(self.areas.used)
            .store(value, Ordering::Relaxed);
    }

    /// The driver's wish: its position and its flags.
    fn wish(&self) -> (u16, u16) {
        let value = self
            .memory
            .field32(self.areas.avail)
            .load(Ordering::Relaxed);
        (value as u16, (value >> 16) as u16)
    }
}

fn piece(desc: &PackedDesc) -> Piece {
    let write = desc.flags.get() & DescFlags::WRITE.bits() != 0;
    (desc.addr.get(), desc.len.get(), write)
}

const EVENTS: RingFeatures = RingFeatures {
    event_idx: true,
    indirect: true,
    packed: true,
};
const PLAIN: RingFeatures = RingFeatures {
    event_idx: false,
    indirect: false,
    packed: true,
};

fn ring(features: RingFeatures) -> (PackedRing, Peer, DmaSlice) {
    let memory = Arc::new(DmaMemory::new(1 << 20, Pages::Normal).expect("memory"));
    let ring = PackedRing::new(Arc::clone(&memory), SIZE, features).expect("room");
    let buffer = memory.alloc(4096, 4096).expect("room");
    let peer = Peer::new(&ring);
    (ring, peer, buffer)
}

#[test]
fn a_batch_becomes_visible_at_once_and_in_order() {
    for features in [PLAIN, EVENTS] {
        let (mut ring, mut peer, buffer) = ring(features);
        let base = ring.memory.iova(buffer);
        // Several rounds, so that descriptors of earlier rounds are overwritten.
        for round in 0..20u64 {
            for n in 0..2 {
                let read = [buffer.part(0, 40 + n)];
                let write = [buffer.part(64, 16)];
                ring.submit(&read, &write, round).expect("room");
                assert!(peer.pop().is_none(), "not published yet");
            }
            ring.publish();
            for n in 0..2 {
                let (id, taken, pieces) = peer.pop().expect("a chain");
                let expected = [(base, 40 + n, false), (base + 64, 16, true)];
                assert_eq!(pieces, expected);
                peer.complete(id, taken, n);
            }
            assert!(peer.pop().is_none());
            for len in 0..2 {
                let done = Completion { cookie: round, len };
                assert_eq!(ring.pop(), Ok(Some(done)));
            }
            assert_eq!(ring.pop(), Ok(None));
        }
    }
}

#[test]
fn requests_completed_out_of_order_keep_their_cookies_round_after_round() {
    for features in [PLAIN, EVENTS] {
        let (mut ring, mut peer, buffer) = ring(features);
        let write = [buffer.part(8, 64)];
        for round in 0..1000u64 {
            let pieces = |n: u64| [buffer.part(n as usize, 8)];
            for n in 0..3 {
                // One of them has a single piece.
                let write = if n == 1 { &[][..] } else { &write[..] };
                ring.submit(&pieces(n), write, round * 3 + n).expect("room");
                ring.publish();
            }
            let mut chains: Vec<Chain> = std::iter::from_fn(|| peer.pop()).collect();
            chains.rotate_left(1);
            for (id, taken, _) in chains {
                peer.complete(id, taken, 0);
            }
            for n in [1, 2, 0] {
                let done = ring.pop().expect("sound").expect("completed");
                assert_eq!(done.cookie, round * 3 + n);
            }
            assert_eq!(ring.in_flight(), 0);
        }
    }
}

#[test]
fn a_full_ring_refuses_and_takes_more_when_something_is_done() {
    for (features, depth) in [(PLAIN, SIZE / 2), (EVENTS, SIZE)] {
        let (mut ring, mut peer, buffer) = ring(features);
        assert_eq!(ring.depth(2), depth);
        let (read, write) = ([buffer.part(0, 8)], [buffer.part(8, 8)]);
        for cookie in 0..u64::from(depth) {
            ring.submit(&read, &write, cookie).expect("room");
        }
        assert_eq!(ring.submit(&read, &write, 0), Err(SubmitError::Full));
        ring.publish();
        let (id, taken, _) = peer.pop().expect("a chain");
        peer.complete(id, taken, 0);
        assert!(ring.pop().expect("sound").is_some());
        assert_eq!(ring.submit(&read, &write, 0), Ok(()));
    }
}

#[test]
fn the_devices_wish_decides_about_kicks_also_across_the_end_of_the_ring() {
    let (mut ring, mut peer, buffer) = ring(EVENTS);
    let read = [buffer.part(0, 8)];
    let mut submit = |ring: &mut PackedRing, n: u16| {
        for _ in 0..n {
            ring.submit(&read, &[], 0).expect("room");
        }
        ring.publish();
        let kick = ring.needs_kick();
        while let Some((id, taken, _)) = peer.pop() {
            peer.complete(id, taken, 0);
            ring.pop().expect("sound").expect("completed");
        }
        kick
    };
    let asks = Peer::new(&ring);
    assert!(!submit(&mut ring, 0), "nothing was submitted");
    asks.ask(0, EVENT_FLAGS_ENABLE);
    assert!(submit(&mut ring, 1));
    asks.ask(0, EVENT_FLAGS_DISABLE);
    assert!(!submit(&mut ring, 1));
    // The ring stands at 2 in its first round.
    asks.ask(3 | WRAP, EVENT_FLAGS_DESC);
    assert!(!submit(&mut ring, 1), "it waits for descriptor 3");
    assert!(submit(&mut ring, 1));
    // At 4: five more go to 1 of the second round.
    asks.ask(0, EVENT_FLAGS_DESC);
    assert!(!submit(&mut ring, 4), "it waits for the second round");
    assert!(submit(&mut ring, 1));
    asks.ask(7, EVENT_FLAGS_DESC);
    assert!(submit(&mut ring, 8), "descriptor 7 is among them");
}

#[test]
fn interrupts_come_only_when_asked_for_and_a_completion_before_that_is_not_missed() {
    for (features, asked) in [
        (EVENTS, (1 | WRAP, EVENT_FLAGS_DESC)),
        (PLAIN, (0, EVENT_FLAGS_ENABLE)),
    ] {
        let (mut ring, mut peer, buffer) = ring(features);
        assert_eq!(peer.wish(), (0, EVENT_FLAGS_DISABLE));
        let read = [buffer.part(0, 8)];
        ring.submit(&read, &[], 0).expect("room");
        ring.publish();
        let (id, taken, _) = peer.pop().expect("a chain");
        peer.complete(id, taken, 0);
        assert!(ring.enable_interrupts(), "it is done already");
        assert!(ring.pop().expect("sound").is_some());
        assert!(!ring.enable_interrupts());
        assert_eq!(peer.wish(), asked);
        ring.disable_interrupts();
        assert_eq!(peer.wish(), (0, EVENT_FLAGS_DISABLE));
    }
}

#[test]
fn a_device_that_breaks_the_rules_gives_an_error_and_no_panic() {
    for (id, len, error) in [
        (9, 0, RingError::NotInFlight(9)),
        (1, 0, RingError::NotInFlight(1)),
        (0, 9, RingError::TooLong { len: 9, room: 8 }),
    ] {
        let (mut ring, mut peer, buffer) = ring(EVENTS);
        let (read, write) = ([buffer.part(0, 8)], [buffer.part(8, 8)]);
        ring.submit(&read, &write, 0).expect("room");
        ring.publish();
        let (given, taken, _) = peer.pop().expect("a chain");
        assert_eq!(given, 0);
        peer.complete(id, taken, len);
        assert_eq!(ring.pop(), Err(error));
    }
    // Nothing is in flight at all.
    let (mut ring, mut peer, _) = ring(EVENTS);
    peer.complete(0, 1, 0);
    assert_eq!(ring.pop(), Err(RingError::NotInFlight(0)));
}
