use super::*;
use crate::driver::memory::Pages;

const SIZE: u16 = 8;

/// The device's side of a ring, as simple as it can be.
struct Peer {
    memory: Arc<DmaMemory>,
    areas: RingAreas,
    size: u16,
    avail_idx: u16,
    used_idx: u16,
}

/// A descriptor as the device finds it: its address, length, and whether it may be written.
type Piece = (u64, u32, bool);

impl Peer {
    fn new(ring: &SplitRing) -> Peer {
        Peer {
            memory: Arc::clone(&ring.memory),
            areas: ring.areas(),
            size: ring.size(),
            avail_idx: 0,
            used_idx: 0,
        }
    }

    /// Takes the next available chain: its head and its pieces.
    fn pop(&mut self) -> Option<(u16, Vec<Piece>)> {
        let idx = self.memory.field(self.areas.avail, RING_IDX);
        if idx.load(Ordering::Acquire) == self.avail_idx {
            return None;
        }
        let at = RING_START + 2 * usize::from(self.avail_idx % self.size);
        let head = self
            .memory
            .field(self.areas.avail, at)
            .load(Ordering::Relaxed);
        self.avail_idx = self.avail_idx.wrapping_add(1);
        Some((head, self.walk(head)))
    }

    fn walk(&self, head: u16) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let mut table = self.areas.desc;
        let mut at = head;
        loop {
            let mut desc = Desc::new_zeroed();
            let place = table.part(usize::from(at) * DESC_SIZE, DESC_SIZE);
            self.memory.read(place, desc.as_mut_bytes());
            let flags = DescFlags::from_bits_retain(desc.flags.get());
            if flags.contains(DescFlags::INDIRECT) {
                let offset = desc.addr.get() - self.memory.iova_base();
                table = self
                    .memory
                    .whole()
                    .part(offset as usize, desc.len.get() as usize);
                at = 0;
                continue;
            }
            let write = flags.contains(DescFlags::WRITE);
            pieces.push((desc.addr.get(), desc.len.get(), write));
            if !flags.contains(DescFlags::NEXT) {
                return pieces;
            }
            at = desc.next.get();
        }
    }

    fn complete(&mut self, id: u32, len: u32) {
        let at = RING_START + USED_ELEM_SIZE * usize::from(self.used_idx % self.size);
        let elem = UsedElem {
            id: id.into(),
            len: len.into(),
        };
        let place = self.areas.used.part(at, USED_ELEM_SIZE);
        self.memory.write(place, elem.as_bytes());
        self.used_idx = self.used_idx.wrapping_add(1);
        self.set_used_idx(self.used_idx);
    }

    fn set_used_idx(&self, idx: u16) {
        let field = self.memory.field(self.areas.used, RING_IDX);
        field.store(idx, Ordering::Release);
    }

    /// Asks to be kicked when the available index goes past `idx`.
    fn set_avail_event(&self, idx: u16) {
        let at = RING_START + USED_ELEM_SIZE * usize::from(self.size);
        let field = self.memory.field(self.areas.used, at);
        field.store(idx, Ordering::Relaxed);
    }

    /// Whether the driver wants an interrupt for the completions from `old` to now.
    fn wants_interrupt(&self, old: u16) -> bool {
        let at = RING_START + 2 * usize::from(self.size);
        let event = self.memory.field(self.areas.avail, at);
        need_event(event.load(Ordering::Relaxed), self.used_idx, old)
    }
}

const EVENTS: RingFeatures = RingFeatures {
    event_idx: true,
    indirect: true,
    packed: false,
};
const PLAIN: RingFeatures = RingFeatures {
    event_idx: false,
    indirect: false,
    packed: false,
};

fn ring(features: RingFeatures) -> (SplitRing, Peer, DmaSlice) {
    let memory = Arc::new(DmaMemory::new(1 << 20, Pages::Normal).expect("memory"));
    let ring = SplitRing::new(Arc::clone(&memory), SIZE, features).expect("room");
    let buffer = memory.alloc(4096, 4096).expect("room");
    let peer = Peer::new(&ring);
    (ring, peer, buffer)
}

#[test]
fn the_device_finds_the_pieces_in_order_directly_and_indirectly() {
    for features in [PLAIN, EVENTS] {
        let (mut ring, mut peer, buffer) = ring(features);
        let readable = [buffer.part(0, 40), buffer.part(100, 7)];
        let writable = [buffer.part(512, 16), buffer.part(1024, 3000)];
        ring.submit(&readable, &writable, 99).expect("room");
        assert!(peer.pop().is_none(), "not published yet");
        ring.publish();
        let (head, pieces) = peer.pop().expect("a chain");
        let base = ring.memory.iova(buffer);
        let expected = [
            (base, 40, false),
            (base + 100, 7, false),
            (base + 512, 16, true),
            (base + 1024, 3000, true),
        ];
        assert_eq!(pieces, expected);
        peer.complete(head.into(), 16);
        let done = Completion {
            cookie: 99,
            len: 16,
        };
        assert_eq!(ring.pop(), Ok(Some(done)));
        assert_eq!(ring.pop(), Ok(None));
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
        let (head, _) = peer.pop().expect("a chain");
        peer.complete(head.into(), 0);
        assert!(ring.pop().expect("sound").is_some());
        assert_eq!(ring.submit(&read, &write, 0), Ok(()));
    }
}

#[test]
fn requests_completed_out_of_order_keep_their_cookies_past_the_wrap_of_the_indexes() {
    for features in [PLAIN, EVENTS] {
        let (mut ring, mut peer, buffer) = ring(features);
        let write = [buffer.part(8, 64)];
        for round in 0..40_000u64 {
            for n in 0..3 {
                let read = [buffer.part(n as usize, 8)];
                ring.submit(&read, &write, round * 3 + n).expect("room");
            }
            ring.publish();
            let mut heads: Vec<u16> = std::iter::from_fn(|| peer.pop())
                .map(|(head, _)| head)
                .collect();
            heads.rotate_left(1);
            for (n, &head) in heads.iter().enumerate() {
                peer.complete(head.into(), n as u32);
            }
            for (n, order) in [1, 2, 0].into_iter().enumerate() {
                let done = ring.pop().expect("sound").expect("completed");
                assert_eq!((done.cookie, done.len), (round * 3 + order, n as u32));
            }
            assert_eq!(ring.in_flight(), 0);
        }
    }
}

#[test]
fn a_batch_is_kicked_once_and_only_when_the_device_asked_for_it() {
    let (mut ring, peer, buffer) = ring(EVENTS);
    let read = [buffer.part(0, 8)];
    assert!(!ring.needs_kick(), "nothing was submitted");
    peer.set_avail_event(1);
    ring.submit(&read, &[], 0).expect("room");
    ring.publish();
    assert!(!ring.needs_kick(), "the device waits for the second");
    for _ in 0..3 {
        ring.submit(&read, &[], 0).expect("room");
    }
    ring.publish();
    assert!(ring.needs_kick());
    assert!(!ring.needs_kick(), "it has been told");
}

#[test]
fn without_event_idx_the_flag_of_the_used_ring_decides_about_kicks() {
    let (mut ring, _, buffer) = ring(PLAIN);
    let read = [buffer.part(0, 8)];
    ring.submit(&read, &[], 0).expect("room");
    assert!(ring.needs_kick());
    ring.used(0).store(USED_F_NO_NOTIFY, Ordering::Relaxed);
    ring.submit(&read, &[], 0).expect("room");
    assert!(!ring.needs_kick());
}

#[test]
fn interrupts_come_only_when_asked_for_and_a_completion_before_that_is_not_missed() {
    let (mut ring, mut peer, buffer) = ring(EVENTS);
    let read = [buffer.part(0, 8)];
    for _ in 0..2 {
        ring.submit(&read, &[], 0).expect("room");
    }
    ring.publish();
    let (first, _) = peer.pop().expect("a chain");
    let (second, _) = peer.pop().expect("a chain");
    peer.complete(first.into(), 0);
    assert!(!peer.wants_interrupt(0));
    assert!(ring.enable_interrupts(), "one is done already");
    assert!(ring.pop().expect("sound").is_some());
    assert!(!ring.enable_interrupts());
    peer.complete(second.into(), 0);
    assert!(peer.wants_interrupt(1));
    ring.disable_interrupts();
    assert!(!peer.wants_interrupt(1));
}

#[test]
fn a_device_that_breaks_the_rules_gives_an_error_and_no_panic() {
    let (mut ring, mut peer, buffer) = ring(EVENTS);
    let (read, write) = ([buffer.part(0, 8)], [buffer.part(8, 8)]);
    let submit_one = |ring: &mut SplitRing, peer: &mut Peer| {
        ring.submit(&read, &write, 0).expect("room");
        ring.publish();
        peer.pop().expect("a chain").0
    };

    let head = submit_one(&mut ring, &mut peer);
    peer.complete(u32::MAX, 0);
    assert_eq!(ring.pop(), Err(RingError::NotInFlight(u32::MAX)));
    // The entry that broke the rules stays where it is: the ring does not recover.
    assert!(ring.pop().is_err());

    let (mut ring, mut peer, _) = tests::ring(EVENTS);
    let other = head + 1;
    submit_one(&mut ring, &mut peer);
    peer.complete(other.into(), 0);
    assert_eq!(ring.pop(), Err(RingError::NotInFlight(other.into())));

    let (mut ring, mut peer, _) = tests::ring(EVENTS);
    let head = submit_one(&mut ring, &mut peer);
    peer.complete(head.into(), 9);
    assert_eq!(ring.pop(), Err(RingError::TooLong { len: 9, room: 8 }));

    let (mut ring, mut peer, _) = tests::ring(EVENTS);
    submit_one(&mut ring, &mut peer);
    peer.set_used_idx(2);
    let error = RingError::TooMany {
        completed: 2,
        in_flight: 1,
    };
    assert_eq!(ring.pop(), Err(error));
}
