//! Virtqueues whose rings say anything, and change while they are used.
// UNSAFETY: stands in for guest memory, which the code under test reaches through raw pointers only.
#![expect(unsafe_code, reason = "maps memory of its own as guest memory")]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use ferry_dataplane::mem::{GuestMap, Iova, Mapping, Region, Segments};
use ferry_dataplane::virtio::chain::Chain;
use ferry_dataplane::virtio::inflight::Inflight;
use ferry_dataplane::virtio::queue::{Popped, Queue, QueueConfig, QueueState};
use ferry_shared::limits::MAX_CHAIN;

/// Descriptors of the ring.
const SIZE: u16 = 8;
/// Bytes of each of the three pages of guest memory: rings, data, and data that the device may not write.
const PAGE: usize = 4096;
/// Where the pages are for the guest. The first two are neighbours for it, but not here.
const PAGES: [u64; 3] = [0, PAGE as u64, 0x8000];
/// Where the parts of the ring are; descriptors are at 0.
const AVAIL: u64 = 0x100;
const USED: u64 = 0x180;

/// Memory of whole pages.
#[derive(Debug)]
struct Pages(NonNull<u8>, Layout);

// SAFETY: plain memory, accessed through raw pointers.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Pages {
    fn new(count: usize) -> Arc<Pages> {
        let layout = Layout::from_size_align(count * PAGE, PAGE).expect("a small layout");
        // SAFETY: the layout is not empty.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) }).expect("memory");
        Arc::new(Pages(base, layout))
    }

    fn page(&self, number: usize) -> NonNull<u8> {
        assert!((number + 1) * PAGE <= self.1.size());
        // SAFETY: inside, as just checked.
        unsafe { self.0.add(number * PAGE) }
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.1.size());
        // SAFETY: inside, as just checked.
        unsafe {
            self.0
                .as_ptr()
                .add(at)
                .copy_from(bytes.as_ptr(), bytes.len())
        }
    }

    fn snapshot(&self) -> Vec<u8> {
        // SAFETY: all of it is initialised, and nothing writes to it during the copy.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr(), self.1.size()) }.to_vec()
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.0.as_ptr(), self.1) }
    }
}

#[derive(Debug)]
struct Guard(#[expect(dead_code, reason = "kept alive only")] Arc<Pages>);

impl Mapping for Guard {}

fn map(pages: &Arc<Pages>, layout: &[(u64, usize, bool)]) -> Arc<GuestMap> {
    let regions = layout
        .iter()
        .map(|&(iova, page, writable)| Region {
            iova: Iova(iova),
            len: PAGE as u64,
            host: pages.page(page),
            writable,
        })
        .collect();
    let guard: Box<dyn Mapping> = Box::new(Guard(Arc::clone(pages)));
    // SAFETY: the pages live as long as the guard.
    let map = unsafe { GuestMap::new(regions, vec![guard]) };
    Arc::new(map.expect("regions that do not overlap"))
}

/// The bytes that say what to do.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (&first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(first)
    }

    fn word(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes([self.byte()?, self.byte()?]))
    }
}

/// A queue and its guest.
struct World {
    memory: Arc<Pages>,
    guest: Arc<GuestMap>,
    queue: Queue,
    chain: Chain,
    held: Vec<Popped>,
    /// What the device may write to.
    ours: [Range<usize>; 2],
    errors: u32,
}

/// A split ring: see [`drive`].
pub fn split(data: &[u8]) {
    drive(data, false);
}

/// A packed ring: see [`drive`].
pub fn packed(data: &[u8]) {
    drive(data, true);
}

/// The input is: features (bit 0 event index, bit 1 indirect descriptors, bit 2 an in-flight record), the two positions, the
/// length of the rings' first content, that content, and then steps.
fn drive(data: &[u8], packed: bool) {
    let mut input = Input(data);
    let Some(mut world) = World::new(&mut input, packed) else {
        return;
    };
    while let Some(step) = input.byte() {
        if world.step(step, &mut input).is_none() {
            break;
        }
        assert!(world.queue.in_flight() <= SIZE);
        assert_eq!(usize::from(world.queue.in_flight()), world.held.len());
        assert!(world.errors <= 1, "an error reported twice");
        assert!(world.errors == 0 || !world.queue.has_work());
    }
    for popped in world.held {
        world.queue.abandon(popped.head);
    }
}

impl World {
    fn new(input: &mut Input<'_>, packed: bool) -> Option<World> {
        let features = input.byte()?;
        let state = QueueState {
            avail: input.word()?,
            used: input.word()?,
            parked: Vec::new(),
        };
        let len = usize::from(input.byte()?).min(input.0.len());
        let (image, steps) = input.0.split_at(len);
        input.0 = steps;
        let memory = Pages::new(3);
        memory.write(0, image);
        let [rings, data, fixed] = PAGES;
        let guest = map(
            &memory,
            &[(rings, 0, true), (data, 2, true), (fixed, 1, false)],
        );
        let config = QueueConfig {
            size: SIZE,
            desc: Iova(0),
            avail: Iova(AVAIL),
            used: Iova(USED),
            packed,
            event_idx: features & 1 != 0,
            indirect: features & 2 != 0,
            state,
        };
        let record = map(&Pages::new(1), &[(0, 0, true)]);
        let inflight = (features & 4 != 0)
            .then(|| Inflight::new(&record, 0, SIZE, packed).expect("room for one queue"));
        let queue = Queue::new(config, &guest, inflight).ok()?;
        let used = USED as usize;
        let ours = if packed {
            [0..16 * usize::from(SIZE), used..used + 4]
        } else {
            [0..0, used..used + 6 + 8 * usize::from(SIZE)]
        };
        Some(World {
            memory,
            guest,
            queue,
            chain: Chain::new(),
            held: Vec::new(),
            ours,
            errors: 0,
        })
    }

    fn step(&mut self, step: u8, input: &mut Input<'_>) -> Option<()> {
        let before = self.memory.snapshot();
        match step % 8 {
            0 => {
                // The guest writes.
                let at = usize::from(input.word()?) % (2 * PAGE);
                self.memory.write(at, &[input.byte()?]);
                return Some(());
            }
            1 | 2 => self.pop(),
            3 => {
                if let Some(popped) = self.held.pop() {
                    self.queue.push_used(popped.head, u32::from(step));
                }
            }
            4 => {
                let _ = self.queue.publish();
            }
            5 => {
                let _ = self.queue.enable_kicks();
                self.queue.disable_kicks();
            }
            6 => self.requeue(),
            _ => self.queue.remap(&self.guest).expect("the same memory"),
        }
        for (at, (old, new)) in before.iter().zip(self.memory.snapshot()).enumerate() {
            let ours = self.ours.iter().any(|range| range.contains(&at));
            assert!(ours || *old == new, "the device wrote to {at:#x}");
        }
        Some(())
    }

    fn pop(&mut self) {
        match self.queue.pop(&mut self.chain) {
            Ok(Some(popped)) => {
                self.check_chain();
                self.held.push(popped);
            }
            Ok(None) => {}
            Err(_) => self.errors += 1,
        }
    }

    /// Pops a request and puts it back.
    fn requeue(&mut self) {
        if let Ok(Some(popped)) = self.queue.pop(&mut self.chain) {
            self.queue.requeue(popped.head, &self.chain);
            assert!(self.queue.has_work());
        } else {
            self.errors += u32::from(self.queue.failed() && self.errors == 0);
        }
    }

    /// What a chain shows lies in guest memory, and what may be written in memory that the device may write.
    fn check_chain(&self) {
        assert!(self.chain.ranges().0.len() <= MAX_CHAIN);
        let inside = |segments: Segments<'_>, pages: &[usize]| {
            for (base, len) in segments.iter() {
                let start = base.addr().get() - self.memory.page(0).addr().get();
                let last = start + len - 1;
                assert!(pages.contains(&(start / PAGE)) && pages.contains(&(last / PAGE)));
            }
        };
        inside(self.chain.readable(&self.guest), &[0, 1, 2]);
        inside(self.chain.writable(&self.guest), &[0, 2]);
    }
}
