//! Requests to a started device, and whether every answer is the right one, comes once, and is told of as was asked.

use anyhow::{Context, Result, bail, ensure};
use ferry_dataplane::fuse::abi::{
    FUSE_FORGET, FUSE_GETATTR, FUSE_INIT, FUSE_KERNEL_VERSION, FUSE_ROOT_ID, fuse_attr_out,
    fuse_forget_in, fuse_getattr_in, fuse_in_header, fuse_init_in, fuse_init_out, fuse_out_header,
};
use ferry_tools::driver::{
    Device, DmaMemory, DmaSlice, Features, Pages, Queue, Queues, Setup, SubmitError,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::sync::Arc;
use std::time::{Duration, Instant};
use zerocopy::{FromBytes, IntoBytes};

const PATIENCE: Duration = Duration::from_secs(20);
/// Bytes of a request's and of an answer's place.
const ROOM: usize = 256;
/// As many requests as are ever under way on one queue.
const SLOTS: usize = 1024;

/// What a driver chooses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Choice {
    pub(crate) features: Features,
    pub(crate) queues: u16,
    pub(crate) size: u16,
    /// MSI-X vectors to share; `None` where there are none to share.
    pub(crate) vectors: Option<u16>,
}

/// A device that runs.
pub(crate) struct Started {
    pub(crate) device: Device,
    pub(crate) queues: Queues,
    memory: Arc<DmaMemory>,
    slots: Vec<(DmaSlice, DmaSlice)>,
    unique: u64,
}

impl Started {
    /// Starts the device as chosen, and begins a FUSE session.
    pub(crate) fn new(mut device: Device, choice: Choice) -> Result<Started> {
        let setup = Setup {
            request_queues: choice.queues,
            queue_size: choice.size,
            features: choice.features,
            vectors: choice.vectors,
        };
        // Room for the rings of queues that are started again.
        let rings = device.memory_needed(&setup) + (8 << 20);
        let memory = Arc::new(DmaMemory::new(
            rings + 2 * SLOTS * ROOM + (1 << 16),
            Pages::Normal,
        )?);
        let slot = || Some((memory.alloc(ROOM, 8)?, memory.alloc(ROOM, 8)?));
        let slots = (0..SLOTS).map(|_| slot()).collect::<Option<Vec<_>>>();
        let queues = device.start(&setup, &memory)?;
        let mut started = Started {
            device,
            queues,
            memory,
            slots: slots.context("no room for requests")?,
            unique: 1,
        };
        started.init()?;
        Ok(started)
    }

    fn init(&mut self) -> Result<()> {
        let arg = fuse_init_in {
            major: FUSE_KERNEL_VERSION,
            minor: 38,
            ..fuse_init_in::default()
        };
        let unique = self.next();
        let slot = self.slots[0];
        let len = self.write(slot.0, FUSE_INIT, unique, 0, arg.as_bytes());
        let queue = &mut self.queues.requests[0];
        queue.submit(&[slot.0.part(0, len)], &[slot.1], 0)?;
        queue.kick()?;
        let (_, len) = wait(queue)?;
        let header: fuse_out_header = get(&self.memory, slot.1);
        ensure!(
            header.error == 0 && header.unique == unique && header.len == len,
            "INIT is answered with {header:?}, {len} bytes"
        );
        ensure!(len as usize == size_of::<fuse_out_header>() + size_of::<fuse_init_out>());
        Ok(())
    }

    fn next(&mut self) -> u64 {
        self.unique += 2;
        self.unique
    }

    fn write(&self, to: DmaSlice, opcode: u32, unique: u64, nodeid: u64, arg: &[u8]) -> usize {
        let len = size_of::<fuse_in_header>() + arg.len();
        let header = fuse_in_header {
            len: len as u32,
            opcode,
            unique,
            nodeid,
            ..fuse_in_header::default()
        };
        self.memory.write(to, &[header.as_bytes(), arg].concat());
        len
    }

    /// Submits one GETATTR of the root on request queue `at`, its bytes cut as `shape` says (section 2.6.4.1: the framing of
    /// messages means nothing). The cookie is its unique number.
    pub(crate) fn submit(&mut self, at: usize, slot: usize, shape: usize) -> Result<bool> {
        let unique = self.next();
        let (input, output) = self.slots[slot % SLOTS];
        let arg = fuse_getattr_in::default();
        let len = self.write(input, FUSE_GETATTR, unique, FUSE_ROOT_ID, arg.as_bytes());
        self.memory.write(output, &[0; 16]);
        let (readable, writable) = (cut(input.part(0, len), shape), cut(output, shape / 3));
        let submitted = self.queues.requests[at].submit(&readable, &writable, unique);
        match submitted {
            Ok(()) => Ok(true),
            Err(SubmitError::Full) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Checks the answer to the request that was submitted in `slot` with this number.
    fn check(&self, slot: usize, unique: u64, len: u32) -> Result<()> {
        let (_, output) = self.slots[slot % SLOTS];
        let header: fuse_out_header = get(&self.memory, output);
        let expected = size_of::<fuse_out_header>() + size_of::<fuse_attr_out>();
        ensure!(
            header.unique == unique && header.error == 0 && header.len as usize == expected,
            "request {unique} is answered with {header:?}"
        );
        ensure!(
            len as usize == expected,
            "{len} bytes used, not {expected} (section 2.7.8.2)"
        );
        let attr: fuse_attr_out = get(&self.memory, output.after(size_of::<fuse_out_header>()));
        ensure!(
            attr.attr.ino == FUSE_ROOT_ID || attr.attr.nlink > 0,
            "{attr:?}"
        );
        Ok(())
    }

    /// Sends `total` requests through queue `at`, as many at a time as the ring holds.
    pub(crate) fn work(&mut self, at: usize, total: usize) -> Result<()> {
        let mut under_way: Vec<(u64, usize)> = Vec::new();
        let mut free: Vec<usize> = (0..SLOTS).collect();
        let (mut sent, mut done) = (0, 0);
        let mut turn = 0;
        while done < total {
            while sent < total
                && let Some(&slot) = free.last()
            {
                if !self.submit(at, slot, sent)? {
                    break;
                }
                free.pop();
                under_way.push((self.unique, slot));
                sent += 1;
                // Some are kicked alone, some in batches.
                if sent % 5 == 0 {
                    self.queues.requests[at].kick()?;
                }
            }
            let queue = &mut self.queues.requests[at];
            queue.kick()?;
            // Every other time by an interrupt, otherwise by looking.
            turn += 1;
            let (unique, len) = if turn % 2 == 0 {
                wait(queue)?
            } else {
                look(queue)?
            };
            let place = under_way.iter().position(|(u, _)| *u == unique);
            let place = place.with_context(|| format!("request {unique} is not under way"))?;
            let (_, slot) = under_way.swap_remove(place);
            self.check(slot, unique, len)?;
            free.push(slot);
            done += 1;
        }
        let queue = &mut self.queues.requests[at];
        ensure!(queue.in_flight() == 0 && queue.pop()?.is_none());
        Ok(())
    }

    /// One request on every queue at the same time.
    pub(crate) fn work_on_all(&mut self) -> Result<()> {
        let count = self.queues.requests.len();
        let mut uniques = Vec::new();
        for at in 0..count {
            ensure!(self.submit(at, at, at)?, "an empty ring is full");
            uniques.push(self.unique);
        }
        for queue in &mut self.queues.requests {
            queue.kick()?;
        }
        for (at, unique) in uniques.into_iter().enumerate() {
            let (got, len) = wait(&mut self.queues.requests[at])?;
            ensure!(got == unique, "queue {at} answers {got}, not {unique}");
            self.check(at, unique, len)?;
        }
        Ok(())
    }

    /// FORGET goes through the high-priority queue and has no answer: the buffer comes back unwritten.
    pub(crate) fn forget(&mut self) -> Result<()> {
        let unique = self.next();
        let (input, _) = self.slots[0];
        let arg = fuse_forget_in { nlookup: 0 };
        let len = self.write(input, FUSE_FORGET, unique, FUSE_ROOT_ID, arg.as_bytes());
        let queue = &mut self.queues.hiprio;
        queue.submit(&[input.part(0, len)], &[], unique)?;
        queue.kick()?;
        let (got, len) = wait(queue)?;
        ensure!(
            (got, len) == (unique, 0),
            "FORGET comes back with {len} bytes"
        );
        Ok(())
    }

    /// With interrupts off none comes (sections 2.7.7 and 2.8.10).
    pub(crate) fn quiet(&mut self, at: usize) -> Result<()> {
        for queue in &mut self.queues.requests {
            queue.disable_interrupts();
        }
        self.queues.hiprio.disable_interrupts();
        // After the first answer nothing of before is under way.
        for turn in 0..4 {
            ensure!(self.submit(at, turn, turn)?, "an empty ring is full");
            let (unique, queue) = (self.unique, &mut self.queues.requests[at]);
            queue.kick()?;
            let (got, len) = look(queue)?;
            ensure!(got == unique, "{got} is answered, not {unique}");
            if turn == 0 {
                queue.drain_interrupts();
            }
            self.check(turn, unique, len)?;
        }
        let queue = &mut self.queues.requests[at];
        let mut fds = [PollFd::new(queue.call_fd(), PollFlags::POLLIN)];
        let ready = poll(&mut fds, PollTimeout::ZERO)?;
        ensure!(ready == 0, "queue {at} interrupts though that is off");
        Ok(())
    }

    /// Fills queue `at` and does not wait for the answers.
    pub(crate) fn leave_in_flight(&mut self, at: usize) -> Result<()> {
        let mut slot = 0;
        while slot < SLOTS && self.submit(at, slot, slot)? {
            slot += 1;
        }
        self.queues.requests[at].kick()?;
        Ok(())
    }

    /// Resets queue `at` with its requests in flight, and uses it again.
    pub(crate) fn restart(&mut self, at: usize) -> Result<()> {
        self.leave_in_flight(at)?;
        let queue = self.queues.requests.remove(at);
        let queue = self.device.restart_queue(queue)?;
        self.queues.requests.insert(at, queue);
        let size = usize::from(self.queues.requests[at].depth(1));
        self.work(at, 2 * size + 1)
    }
}

/// A slice in several pieces; how many, and how long, depends on `shape`.
fn cut(whole: DmaSlice, shape: usize) -> Vec<DmaSlice> {
    let lens: &[usize] = match shape % 4 {
        0 => &[],
        1 => &[16],
        2 => &[1, 7],
        _ => &[40],
    };
    let mut pieces = Vec::new();
    let mut rest = whole;
    for &len in lens.iter().filter(|len| **len < whole.len()) {
        pieces.push(rest.part(0, len));
        rest = rest.after(len);
    }
    pieces.push(rest);
    pieces
}

fn get<T: FromBytes + IntoBytes>(memory: &DmaMemory, at: DmaSlice) -> T {
    let mut value = T::new_zeroed();
    memory.read(at, value.as_mut_bytes());
    value
}

/// The next answer, found by looking.
fn look(queue: &mut Queue) -> Result<(u64, u32)> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(done) = queue.pop()? {
            return Ok((done.cookie, done.len));
        }
        if Instant::now() > deadline {
            bail!("queue {} does not answer", queue.index());
        }
        std::thread::yield_now();
    }
}

/// The next answer; where there is none yet, an interrupt must tell of it.
fn wait(queue: &mut Queue) -> Result<(u64, u32)> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(done) = queue.pop()? {
            queue.disable_interrupts();
            return Ok((done.cookie, done.len));
        }
        if queue.enable_interrupts() {
            continue;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let left = u16::try_from(left.as_millis()).unwrap_or(u16::MAX);
        let mut fds = [PollFd::new(queue.call_fd(), PollFlags::POLLIN)];
        let ready = poll(&mut fds, PollTimeout::from(left))?;
        ensure!(ready == 1, "queue {} does not interrupt", queue.index());
        queue.drain_interrupts();
    }
}
