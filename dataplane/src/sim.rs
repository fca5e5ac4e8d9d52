//! Deterministic simulation of the request path: cores, queues, session and dispatch in one thread, with a model guest, a
//! model file system with faults, and a scheduler that a seed drives.
//!
//! A seed chooses the shape of a run (ring format and size, cores, slots, buffers, tasks, faults) and every step in it:
//! which task asks, which core turns or sleeps, which transfer completes and how, when queues are paused and moved to other
//! cores, when the guest looks. The guest looks only when it was interrupted, and a sleeping core wakes only by a kick or a
//! completion, so a lost notification shows as a run that gets stuck. The same seed gives the same run.
//!
//! A run with crashes also has the process die before any store to memory that outlives it, or between two steps; what is left
//! is guest memory, the recovery memory and the file system, and another process goes on with that ([`crash`]). The tasks
//! notice nothing. Processes with known bugs ([`fate`]) show that this would find them.
//!
//! `FERRY_SIM_SEEDS=FIRST..END cargo test -p ferry-dataplane --release simulation` runs others than the committed ones.

mod crash;
mod device;
pub(crate) mod fate;
mod files;
mod guest;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ferry_shared::counters::QueuePlace;
use zerocopy::{FromBytes, IntoBytes};

use self::crash::Kept;
use self::device::Core;
use self::fate::Bug;
use self::files::{Faults, Files};
use self::guest::{Task, Wish};
use crate::fuse::abi::*;
use crate::id::{CoreEvent, DeviceId, QueueIdx, QueueKind};
use crate::reactor::{DeviceShared, StartQueue};
use crate::virtio::queue::{Queue, QueueConfig};
use crate::virtio::testmem::{Buf, Driver, Ram};

const DEVICE: DeviceId = DeviceId(1);
/// Requests of one run, not counting those that wind up.
const REQUESTS: u32 = 300;
/// Steps after which a run that should have ended is stuck.
const STUCK: u32 = 100_000;
const MEMORY: usize = 32 << 20;
/// Seeds among which one must find a bug.
const SEEDS_FOR_A_BUG: u64 = 1000;

/// A small generator of numbers (SplitMix64), so that a seed means the same for ever.
#[derive(Clone, Debug)]
struct Rng(u64);

impl Rng {
    fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, or 0.
    fn below(&mut self, n: u64) -> u64 {
        self.draw().checked_rem(n).unwrap_or(0)
    }

    /// True one time in `n`; never for 0.
    fn one_in(&mut self, n: u64) -> bool {
        n != 0 && self.below(n) == 0
    }
}

/// A request in the hands of the device.
struct Asked {
    task: Option<usize>,
    unique: u64,
    reply: Vec<Buf>,
}

struct GuestQueue {
    driver: Driver,
    asked: BTreeMap<u16, Asked>,
    /// The core that serves it, or where it stands.
    at: Result<usize, QueueConfig>,
    stopping: bool,
}

/// The least and the most of something that a seed chooses.
fn between(rng: &mut Rng, least: u64, most: u64) -> u64 {
    least + rng.below(most - least + 1)
}

struct Sim {
    rng: Rng,
    files: Arc<Files>,
    shared: Arc<DeviceShared<Files>>,
    cores: Vec<Core>,
    queues: Vec<GuestQueue>,
    tasks: Vec<Task>,
    last_unique: u64,
    /// INTERRUPTs that came before the driver had a number for them are not sent twice.
    interrupted: BTreeSet<u64>,
    started: u32,
    /// What outlives a process, in a run with crashes.
    kept: Option<Kept>,
}

impl Sim {
    fn new(seed: u64, crashes: bool) -> Sim {
        let mut rng = Rng(seed);
        let rarely = |rng: &mut Rng| [0, 0, 3, 10, 40][rng.below(5) as usize];
        let faults = Faults {
            refuse: [0, 8, 30][rng.below(3) as usize],
            short: rarely(&mut rng),
            // A write that was carried out once and then fails is not what a device without crashes does.
            eio: if crashes { 0 } else { rarely(&mut rng) },
            again: rarely(&mut rng),
        };
        let offloadable = [
            FUSE_STATFS,
            FUSE_GETXATTR,
            FUSE_LOOKUP,
            FUSE_CREATE,
            FUSE_READDIRPLUS,
            FUSE_UNLINK,
        ];
        let offload = offloadable.into_iter().filter(|_| rng.one_in(3)).collect();
        let files = Arc::new(Files::new(rng.draw(), faults, offload));
        let kept = crashes.then(Kept::new);
        let shared = crash::shared(kept.as_ref(), &files, 1);
        let cores = (0..between(&mut rng, 1, 3))
            .map(|_| Core::new(&mut rng))
            .collect();
        let (packed, event_idx) = (rng.one_in(2), rng.one_in(2));
        let queues = (0..between(&mut rng, 1, 4))
            .map(|_| {
                let size = 8 << rng.below(4);
                let driver = Driver::new(Ram::new(&[(0x10_0000, MEMORY)]), size, packed, event_idx);
                GuestQueue {
                    at: Err(driver.config.clone()),
                    driver,
                    asked: BTreeMap::new(),
                    stopping: false,
                }
            })
            .collect();
        let tasks = (0..between(&mut rng, 1, 12) as usize)
            .map(Task::new)
            .collect();
        let mut sim = Sim {
            rng,
            files,
            shared,
            cores,
            queues,
            tasks,
            last_unique: 0,
            interrupted: BTreeSet::new(),
            started: 0,
            kept,
        };
        sim.mount();
        sim
    }

    fn mount(&mut self) {
        for at in 0..self.queues.len() {
            self.start(at);
        }
        let init = fuse_init_in {
            major: 7,
            minor: 45,
            flags: u32::MAX,
            ..Default::default()
        };
        let wish = Wish {
            opcode: FUSE_INIT,
            nodeid: 0,
            arg: init.as_bytes().to_vec(),
            room: 80,
        };
        self.last_unique += 1;
        self.send(0, wish, self.last_unique, None);
        let mut steps = 0;
        while !self.queues[0].asked.is_empty() {
            self.step_of_the_device(&mut steps);
        }
        assert!(self.shared.session.mounted());
    }

    /// Lets a core serve a queue that nobody serves.
    fn start(&mut self, at: usize) {
        let to = self.rng.below(self.cores.len() as u64) as usize;
        let queue = &mut self.queues[at];
        let Err(config) = &queue.at else { return };
        let map = queue.driver.ram.map();
        let packed = queue.driver.config.packed;
        let record = self.kept.as_ref().map(|kept| kept.record(at, packed));
        let start = StartQueue {
            device: DEVICE,
            index: QueueIdx(at as u16),
            kind: QueueKind::Request,
            queue: Queue::new(config.clone(), &map, record).expect("a good ring"),
            call: Some(at),
            shared: Arc::clone(&self.shared),
            place: QueuePlace::default(),
        };
        let core = &mut self.cores[to];
        core.wake();
        core.reactor.start(start, &mut core.world);
        queue.at = Ok(to);
    }

    /// Makes a request available on a queue, its bytes spread over descriptors in any way; kicks if the device wants that.
    fn send(&mut self, at: usize, wish: Wish, unique: u64, task: Option<usize>) {
        let header = fuse_in_header {
            len: (size_of::<fuse_in_header>() + wish.arg.len()) as u32,
            opcode: wish.opcode,
            unique,
            nodeid: wish.nodeid,
            ..Default::default()
        };
        let bytes = [header.as_bytes(), &wish.arg].concat();
        let queue = &mut self.queues[at];
        let driver = &mut queue.driver;
        let mut bufs = Vec::new();
        for piece in pieces(&mut self.rng, bytes.len()) {
            let addr = driver.ram.alloc(piece.len());
            driver.ram.write(addr, &bytes[piece.clone()]);
            let len = piece.len() as u32;
            let write = false;
            bufs.push(Buf { addr, len, write });
        }
        let reply: Vec<Buf> = pieces(&mut self.rng, wish.room as usize)
            .into_iter()
            .map(|piece| Buf {
                addr: driver.ram.alloc(piece.len()),
                len: piece.len() as u32,
                write: true,
            })
            .collect();
        bufs.extend(&reply);
        let before = driver.room();
        // What waits for a lock must leave room for those that hold it.
        let roomy = before > bufs.len() + 4 && wish.opcode != FUSE_SETLKW;
        let direct = match self.rng.below(3) {
            0 if roomy => bufs.len(),
            1 if roomy => 1,
            _ => 0,
        };
        let head = driver.add(&bufs, direct);
        let added = (before - driver.room()) as u16;
        let asked = Asked {
            task,
            unique,
            reply,
        };
        assert!(queue.asked.insert(head, asked).is_none());
        let back = if driver.config.packed { added } else { 1 };
        if driver.must_kick(back)
            && let Ok(core) = queue.at
        {
            self.or_die(|sim| sim.cores[core].wake());
        }
    }

    /// The guest looks at a queue's used ring.
    fn look(&mut self, at: usize) {
        loop {
            let queue = &mut self.queues[at];
            while let Some((head, written)) = queue.driver.take_used() {
                let asked = queue.asked.remove(&head).expect("a head that was offered");
                let mut bytes = Vec::new();
                for buf in &asked.reply {
                    let len = (buf.len as usize).min(written as usize - bytes.len());
                    bytes.extend(queue.driver.ram.read(buf.addr, len));
                }
                assert_eq!(bytes.len(), written as usize, "more than there is room for");
                answered(&mut self.tasks, &self.files, &asked, &bytes);
            }
            // Asks for the next interrupt, and looks once more: the device may have been between the two.
            queue.driver.want_event(0);
            if !queue.driver.config.event_idx {
                queue.driver.set_interrupts(true);
            }
            if !queue.driver.has_used() {
                return;
            }
        }
    }

    /// A task asks for something, if it can.
    fn ask(&mut self, winding_up: bool) {
        let at = self.rng.below(self.queues.len() as u64) as usize;
        let task = self.rng.below(self.tasks.len() as u64) as usize;
        let room = self.queues[at].driver.room();
        if room == 0 || !self.tasks[task].is_idle() {
            return;
        }
        let may_wait = room > usize::from(self.queues[at].driver.config.size) / 2;
        self.last_unique += 2;
        let unique = self.last_unique;
        let task_ref = &mut self.tasks[task];
        let wish = if winding_up {
            match task_ref.wind_up(unique) {
                Some(wish) => wish,
                None => return,
            }
        } else {
            self.started += 1;
            task_ref.next(&mut self.rng, unique, may_wait)
        };
        task_ref.may_be_interrupted = false;
        self.send(at, wish, unique, Some(task));
    }

    /// Interrupts a task that waits for the lock.
    fn interrupt(&mut self) {
        let at = self.rng.below(self.queues.len() as u64) as usize;
        let waiting = self
            .tasks
            .iter_mut()
            .find_map(|t| t.wants_lock().map(|u| (t, u)));
        let Some((task, unique)) = waiting else {
            return;
        };
        if self.queues[at].driver.room() == 0 || !self.interrupted.insert(unique) {
            return;
        }
        task.may_be_interrupted = true;
        let wish = Wish {
            opcode: FUSE_INTERRUPT,
            nodeid: 0,
            arg: fuse_interrupt_in { unique }.as_bytes().to_vec(),
            room: 0,
        };
        self.send(at, wish, unique | 1, None);
    }

    /// Pauses a queue, or lets a paused one run on, perhaps on another core.
    fn pause_or_resume(&mut self) {
        let at = self.rng.below(self.queues.len() as u64) as usize;
        let queue = &mut self.queues[at];
        match queue.at {
            Err(_) => self.start(at),
            Ok(core) if !queue.stopping => {
                queue.stopping = true;
                let core = &mut self.cores[core];
                core.wake();
                let index = QueueIdx(at as u16);
                core.reactor.stop(DEVICE, index, false, &mut core.world);
            }
            Ok(_) => {}
        }
    }

    /// Gives the device another view of the same memory.
    fn replace_memory(&mut self) {
        let at = self.rng.below(self.queues.len() as u64) as usize;
        let queue = &self.queues[at];
        if let (Ok(core), 1) = (&queue.at, self.queues.len()) {
            let map = queue.driver.ram.map();
            let core = &mut self.cores[*core];
            core.wake();
            core.reactor.set_memory(DEVICE, map, &mut core.world);
        }
    }

    /// Something happens on the device's side.
    fn step_of_the_device(&mut self, steps: &mut u32) {
        *steps += 1;
        assert!(*steps < STUCK, "stuck: {}", self.describe());
        let at = self.rng.below(self.cores.len() as u64) as usize;
        let files = Arc::clone(&self.files);
        self.or_die(|sim| {
            sim.cores[at].step(&mut sim.rng, &files);
            sim.hear(at);
        });
        let queue = self.rng.below(self.queues.len() as u64) as usize;
        let mut interrupted = false;
        for core in &mut self.cores {
            interrupted |= core.world.interrupted.remove(&queue);
        }
        if interrupted {
            self.look(queue);
        }
    }

    /// Takes what a core has to say.
    fn hear(&mut self, at: usize) {
        for event in core::mem::take(&mut self.cores[at].world.events) {
            match event {
                CoreEvent::QueueStopped { index, state, .. } => {
                    let queue = &mut self.queues[usize::from(index.0)];
                    queue.stopping = false;
                    queue.at = Err(QueueConfig {
                        state,
                        ..queue.driver.config.clone()
                    });
                }
                CoreEvent::QueueFailed { index, .. } => panic!("queue {index:?} failed"),
                CoreEvent::MemoryReplaced { .. } | CoreEvent::Mounted { .. } => {}
            }
        }
        for interrupted in core::mem::take(&mut self.cores[at].world.spread) {
            for other in (0..self.cores.len()).filter(|other| *other != at) {
                let core = &mut self.cores[other];
                core.wake();
                core.reactor.interrupt_request(interrupted, &mut core.world);
            }
        }
    }

    fn describe(&self) -> String {
        let queues = self
            .queues
            .iter()
            .map(|q| (q.at.as_ref().ok(), q.asked.len()));
        let cores = self.cores.iter().map(|c| {
            let (ring, jobs) = (c.world.ring.len(), c.world.jobs.len());
            format!(
                "asleep {}, ring {ring}, jobs {jobs}, {:?}",
                c.asleep, c.world.interrupted
            )
        });
        format!(
            "queues (core, unanswered): {:?}; cores: {:?}; tasks: {:?}",
            queues.collect::<Vec<_>>(),
            cores.collect::<Vec<_>>(),
            self.tasks,
        )
    }

    fn run(&mut self) {
        let mut steps = 0;
        while self.started < REQUESTS {
            if self.kept.is_some() && self.rng.one_in(200) {
                self.choose_an_end();
            }
            match self.rng.below(40) {
                0..12 => self.ask(false),
                12 => self.interrupt(),
                13 if self.rng.one_in(4) => self.or_die(Sim::pause_or_resume),
                14 if self.rng.one_in(8) => self.or_die(Sim::replace_memory),
                // Locks that are held keep everybody else waiting.
                15 => {
                    let gives_back = self.rng.one_in(4);
                    self.ask(gives_back);
                }
                _ => self.step_of_the_device(&mut steps),
            }
        }
        self.wind_up();
    }

    /// Answers what is left, has everything given back, and looks at what must hold then.
    fn wind_up(&mut self) {
        let mut steps = 0;
        while !self.is_over() {
            self.or_die(|sim| {
                for at in 0..sim.queues.len() {
                    sim.start(at);
                }
            });
            self.ask(true);
            self.step_of_the_device(&mut steps);
        }
        self.files.assert_unused();
        for core in &self.cores {
            assert!(core.world.ring.is_empty() && core.world.jobs.is_empty());
        }
    }

    fn is_over(&self) -> bool {
        self.tasks.iter().all(|t| t.is_idle() && t.has_nothing())
            && self.queues.iter().all(|q| q.asked.is_empty())
    }
}

/// Hands an answer to the task that waits for it.
fn answered(tasks: &mut [Task], files: &Files, asked: &Asked, bytes: &[u8]) {
    let Some(task) = asked.task.map(|t| &mut tasks[t]) else {
        return;
    };
    if asked.reply.is_empty() {
        assert!(bytes.is_empty(), "an answer to what has none");
        return task.answered(0, &[], None);
    }
    let (header, body) = fuse_out_header::read_from_prefix(bytes).expect("a header");
    assert_eq!(header.len as usize, bytes.len());
    assert_eq!(header.unique, asked.unique);
    task.answered(header.error, body, files.refusal(asked.unique));
}

/// Cuts `len` bytes into a few ranges.
fn pieces(rng: &mut Rng, len: usize) -> Vec<core::ops::Range<usize>> {
    let mut cuts = BTreeSet::from([0, len]);
    for _ in 0..rng.below(4) {
        cuts.insert(rng.below(len as u64) as usize);
    }
    let cuts: Vec<usize> = cuts.into_iter().collect();
    cuts.windows(2).map(|w| w[0]..w[1]).collect()
}

/// The seeds to run.
fn seeds() -> core::ops::Range<u64> {
    let Ok(text) = std::env::var("FERRY_SIM_SEEDS") else {
        return 0..1000;
    };
    let (first, end) = text.split_once("..").expect("FERRY_SIM_SEEDS=FIRST..END");
    first.parse().expect("a number")..end.parse().expect("a number")
}

/// Runs a seed with a bug, or without one.
fn run(seed: u64, crashes: bool, bug: Option<Bug>) -> std::thread::Result<()> {
    fate::give(bug);
    let run = std::panic::catch_unwind(|| Sim::new(seed, crashes).run());
    fate::arm(0);
    fate::give(None);
    run
}

#[test]
fn every_seed_of_the_simulation_keeps_the_rules() {
    for seed in seeds() {
        let run = run(seed, false, None);
        assert!(run.is_ok(), "FERRY_SIM_SEEDS={seed}..{}", seed + 1);
    }
}

#[test]
fn every_seed_of_the_simulation_with_crashes_keeps_the_rules() {
    for seed in seeds() {
        let run = run(seed, true, None);
        assert!(run.is_ok(), "FERRY_SIM_SEEDS={seed}..{}", seed + 1);
    }
}

#[test]
fn the_simulation_with_crashes_finds_every_bug_in_few_seeds() {
    for bug in [
        Bug::FactsLate,
        Bug::ClearedEarly,
        Bug::EntrySkipped,
        Bug::ForgetDoubled,
        Bug::IntentIgnored,
    ] {
        let found = (0..SEEDS_FOR_A_BUG).find(|seed| run(*seed, true, Some(bug)).is_err());
        println!("{bug:?}: seed {found:?}");
        assert!(found.is_some(), "nobody has noticed {bug:?}");
    }
}
