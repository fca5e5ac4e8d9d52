//! Load on one device: as many operations in flight as asked for, each followed by the next one.
//!
//! One thread, which polls and never waits. Nothing is allocated per operation, the clock is read once per round, and the
//! device is told of a round's requests at once.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ferry_dataplane::fuse::abi::*;
use hdrhistogram::Histogram;
use nix::time::{ClockId, ClockNanosleepFlags, clock_nanosleep};
use zerocopy::{FromBytes, IntoBytes};

use super::client::{Created, read_in, release_in, write_in};
use super::slot::{Answer, Request, Slot};
use super::target::FuseTarget;
use super::work::{Kind, Work};

/// The longest that one operation may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// FORGETs that may wait for room on the queue.
const MOST_FORGETS: usize = 4096;

/// What came of a run.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    pub(super) ops: u64,
    pub(super) wall: Duration,
    /// Of the server, all its threads.
    pub(super) cpu: Option<Duration>,
    /// Nanoseconds of each operation.
    pub(super) latency: Histogram<u64>,
}

/// Where an operation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Idle,
    /// One request is all of it.
    Only,
    Open,
    /// The RELEASE that ends open and release.
    Close,
    Create,
    /// The RELEASE between CREATE and UNLINK.
    Created,
    Unlink,
    List,
}

/// One operation in flight.
struct Lane {
    slot: Slot,
    step: Step,
    began: u64,
    nodeid: u64,
    fh: u64,
    offset: u64,
    file: usize,
    /// What CREATE calls its file.
    name: Vec<u8>,
}

/// A pseudo-random number generator (xorshift64); every run draws the same numbers.
pub(super) struct Random(u64);

impl Default for Random {
    fn default() -> Random {
        Random(0x9e37_79b9_7f4a_7c15)
    }
}

impl Random {
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((u128::from(self.0) * u128::from(limit)) >> 64) as u64
    }
}

/// A run.
pub(super) struct Load<'a> {
    target: &'a mut FuseTarget,
    work: Work,
    lanes: Vec<Vec<Lane>>,
    random: Random,
    /// For sequential work, by queue: block number over all files.
    cursors: Vec<u64>,
    forgets: Vec<u64>,
    free_forget_slots: Vec<u32>,
    /// Inodes that listings have named, and how often.
    listed: HashMap<u64, u64>,
    listing: Vec<u8>,
}

impl<'a> Load<'a> {
    pub(super) fn new(target: &'a mut FuseTarget, work: Work) -> Result<Load<'a>> {
        let block = u64::from(work.block);
        ensure!(
            !work.kind.moves_data() || target.file_size >= block,
            "the files are shorter than a block of {block} bytes"
        );
        if work.kind == Kind::Create && target.list_dir.is_none() {
            bail!("nothing can be created there");
        }
        let mut lanes = Vec::new();
        let (queues, depth) = target.shape(&work);
        for queue in 0..queues {
            let mut of_queue = Vec::new();
            for number in 0..depth {
                let slot = target.slots[queue][number];
                let (nodeid, fh) = match work.kind {
                    Kind::Readdirplus => target.open_list()?,
                    _ => (0, 0),
                };
                of_queue.push(Lane {
                    slot,
                    step: Step::Idle,
                    began: 0,
                    nodeid,
                    fh,
                    offset: 0,
                    file: 0,
                    name: format!("new-{queue}-{number}\0").into_bytes(),
                });
            }
            lanes.push(of_queue);
        }
        Ok(Load {
            random: Random::default(),
            cursors: vec![0; lanes.len()],
            free_forget_slots: (0..target.forget_slots.len() as u32).collect(),
            forgets: Vec::with_capacity(MOST_FORGETS),
            listed: HashMap::new(),
            listing: vec![0; work.block as usize],
            target,
            work,
            lanes,
        })
    }

    /// Keeps the device busy for `warm` and then for `run`, of which it gives account, and waits for what is in flight. With a
    /// rate so many operations are begun a second, as far as there are lanes for them.
    pub(super) fn run(
        mut self,
        warm: Duration,
        run: Duration,
        rate: Option<f64>,
    ) -> Result<Sample> {
        let origin = Instant::now();
        let mut sample = Sample {
            ops: 0,
            wall: Duration::ZERO,
            cpu: None,
            latency: Histogram::new_with_bounds(1, 60_000_000_000, 3)?,
        };
        let mut window = Window::new(origin, warm, run, self.target.cpu);
        let mut last_progress = 0;
        let mut pace = rate.map(|rate| Pace::new(rate, &self.lanes));
        if pace.is_none() {
            self.begin_all(window.now())?;
        }
        loop {
            let now = window.now();
            let counts = window.counts(now)?;
            let mut in_flight = false;
            if let Some(pace) = pace.as_mut().filter(|_| !window.over) {
                self.begin_due(pace, now)?;
            }
            for queue in 0..self.lanes.len() {
                let mut popped = false;
                while let Some(done) = self.target.requests[queue].pop()? {
                    popped = true;
                    let lane = done.cookie as usize;
                    if !self.step(queue, lane, done.len)? {
                        continue;
                    }
                    if counts {
                        let began = self.lanes[queue][lane].began;
                        sample.ops += 1;
                        sample
                            .latency
                            .saturating_record(now.saturating_sub(began).max(1));
                    }
                    match &mut pace {
                        Some(pace) => pace.idle.push((queue, lane)),
                        None if window.over => {}
                        None => self.begin(queue, lane, now)?,
                    }
                }
                if popped {
                    last_progress = now;
                    self.target.requests[queue].kick()?;
                }
                in_flight |= self.target.requests[queue].in_flight() > 0;
            }
            self.send_forgets()?;
            if window.over && !in_flight {
                break;
            }
            if now.saturating_sub(last_progress) > PATIENCE.as_nanos() as u64 {
                bail!("nothing has been completed for {} s", PATIENCE.as_secs());
            }
            if let Some(pace) = pace.as_ref().filter(|_| !in_flight) {
                pace.wait(window.now());
            }
        }
        (sample.wall, sample.cpu) = (window.wall, window.cpu);
        self.clean_up()?;
        Ok(sample)
    }

    /// Begins as many operations as there are lanes.
    fn begin_all(&mut self, now: u64) -> Result<()> {
        for queue in 0..self.lanes.len() {
            for lane in 0..self.lanes[queue].len() {
                self.begin(queue, lane, now)?;
            }
            self.target.requests[queue].kick()?;
        }
        Ok(())
    }

    /// Begins the operation whose time has come, if a lane is free. What could not begin in time is left out.
    fn begin_due(&mut self, pace: &mut Pace, now: u64) -> Result<()> {
        if now < pace.next {
            return Ok(());
        }
        // Half the distance to one and a half, so that no timer keeps step with it.
        let distance = pace.distance / 2 + self.random.below(pace.distance);
        pace.next = (pace.next + distance).max(now);
        let Some((queue, lane)) = pace.idle.pop() else {
            return Ok(());
        };
        self.begin(queue, lane, now)?;
        self.target.requests[queue].kick()?;
        Ok(())
    }

    /// Begins an operation.
    fn begin(&mut self, queue: usize, lane: usize, now: u64) -> Result<()> {
        let kind = match self.work.kind {
            Kind::Mixed => match self.random.below(100) {
                0..49 => Kind::RandRead,
                49..70 => Kind::RandWrite,
                70..85 => Kind::Getattr,
                _ => Kind::Lookup,
            },
            kind => kind,
        };
        let block = u64::from(self.work.block);
        let blocks = (self.target.file_size / block).max(1);
        let files = self.target.files.len() as u64;
        let (file, offset) = match kind {
            Kind::SeqRead | Kind::SeqWrite => {
                let at = self.cursors[queue];
                self.cursors[queue] = at.wrapping_add(1);
                // The files of a queue begin at its own number.
                let file = (at / blocks + queue as u64) % files;
                (file, at % blocks * block)
            }
            Kind::RandRead | Kind::RandWrite => {
                (self.random.below(files), self.random.below(blocks) * block)
            }
            _ => (self.random.below(files), 0),
        };
        let lane_state = &mut self.lanes[queue][lane];
        lane_state.began = now;
        (lane_state.file, lane_state.offset) = (file as usize, offset);
        match kind {
            Kind::RandRead | Kind::SeqRead => self.transfer(queue, lane, FUSE_READ),
            Kind::RandWrite | Kind::SeqWrite => self.transfer(queue, lane, FUSE_WRITE),
            Kind::Getattr => {
                let nodeid = self.target.files[file as usize].nodeid;
                let arg = fuse_getattr_in::default();
                let request = Request::new(FUSE_GETATTR, nodeid, arg.as_bytes());
                self.send(queue, lane, Step::Only, request.answered::<fuse_attr_out>())
            }
            Kind::Lookup => self.lookup(queue, lane),
            Kind::Open => {
                let nodeid = self.target.files[file as usize].nodeid;
                let arg = fuse_open_in {
                    flags: libc::O_RDONLY as u32,
                    open_flags: 0,
                };
                let request = Request::new(FUSE_OPEN, nodeid, arg.as_bytes());
                self.send(queue, lane, Step::Open, request.answered::<fuse_open_out>())
            }
            Kind::Create => self.create(queue, lane),
            Kind::Readdirplus => self.list(queue, lane),
            Kind::Mixed => Ok(()),
        }
    }

    fn send(&mut self, queue: usize, lane: usize, step: Step, request: Request<'_>) -> Result<()> {
        let state = &mut self.lanes[queue][lane];
        state.step = step;
        let memory = &self.target.memory;
        let requests = &mut self.target.requests[queue];
        state
            .slot
            .send(memory, requests, &request, queue as u64 + 1)?;
        Ok(())
    }

    fn transfer(&mut self, queue: usize, lane: usize, opcode: u32) -> Result<()> {
        let state = &self.lanes[queue][lane];
        let file = &self.target.files[state.file];
        let (nodeid, fh, block) = (file.nodeid, file.fh, self.work.block);
        if opcode == FUSE_READ {
            let arg = read_in(fh, state.offset, block);
            let mut request = Request::new(opcode, nodeid, arg.as_bytes());
            request.answer = Answer::Data(block);
            return self.send(queue, lane, Step::Only, request);
        }
        let arg = write_in(fh, state.offset, block);
        let mut request = Request::new(opcode, nodeid, arg.as_bytes()).answered::<fuse_write_out>();
        request.data = block;
        self.send(queue, lane, Step::Only, request)
    }

    fn lookup(&mut self, queue: usize, lane: usize) -> Result<()> {
        let dir = self.target.dir;
        let state = &mut self.lanes[queue][lane];
        let file = &mut self.target.files[state.file];
        file.lookups += 1;
        state.step = Step::Only;
        let request = Request::new(FUSE_LOOKUP, dir, file.name.as_bytes_with_nul());
        let request = request.answered::<fuse_entry_out>();
        let requests = &mut self.target.requests[queue];
        state
            .slot
            .send(&self.target.memory, requests, &request, queue as u64 + 1)?;
        Ok(())
    }

    fn create(&mut self, queue: usize, lane: usize) -> Result<()> {
        let arg = fuse_create_in {
            flags: (libc::O_RDWR | libc::O_CREAT | libc::O_EXCL) as u32,
            mode: libc::S_IFREG | 0o644,
            umask: 0o022,
            open_flags: 0,
        };
        let mut args = [0; 64];
        let name = &self.lanes[queue][lane].name;
        let len = size_of_val(&arg) + name.len();
        args[..size_of_val(&arg)].copy_from_slice(arg.as_bytes());
        args[size_of_val(&arg)..len].copy_from_slice(name);
        let request = Request::new(FUSE_CREATE, self.target.dir, &args[..len]);
        self.send(queue, lane, Step::Create, request.answered::<Created>())
    }

    fn list(&mut self, queue: usize, lane: usize) -> Result<()> {
        let state = &self.lanes[queue][lane];
        let arg = read_in(state.fh, state.offset, self.work.block);
        let mut request = Request::new(FUSE_READDIRPLUS, state.nodeid, arg.as_bytes());
        request.answer = Answer::Data(self.work.block);
        self.send(queue, lane, Step::List, request)
    }

    /// Goes on with an operation of which a request has been answered; whether it is finished.
    fn step(&mut self, queue: usize, lane: usize, len: u32) -> Result<bool> {
        let state = &mut self.lanes[queue][lane];
        let memory = &self.target.memory;
        let header = state.slot.header(memory);
        ensure!(header.len == len, "the device's reply has the wrong length");
        if header.error != 0 {
            let cause = std::io::Error::from_raw_os_error(-header.error);
            return Err(cause).with_context(|| format!("{} has failed", self.work));
        }
        match state.step {
            Step::Idle => bail!("the device completes what it was not asked"),
            Step::Only | Step::Close => Ok(true),
            Step::Open => {
                let out: fuse_open_out = state.slot.payload(memory);
                let nodeid = self.target.files[state.file].nodeid;
                self.release(queue, lane, nodeid, out.fh, Step::Close)
            }
            Step::Create => {
                let out: Created = state.slot.payload(memory);
                state.nodeid = out.entry.nodeid;
                self.release(queue, lane, out.entry.nodeid, out.open.fh, Step::Created)
            }
            Step::Created => {
                let name = std::mem::take(&mut state.name);
                let request = Request::new(FUSE_UNLINK, self.target.dir, &name).answered::<()>();
                let sent = self.send(queue, lane, Step::Unlink, request);
                self.lanes[queue][lane].name = name;
                sent.map(|()| false)
            }
            Step::Unlink => {
                self.forgets.push(state.nodeid);
                Ok(true)
            }
            Step::List => match self.read_listing(queue, lane, len)? {
                0 => Ok(true),
                _ => self.list(queue, lane).map(|()| false),
            },
        }
    }

    fn release(
        &mut self,
        queue: usize,
        lane: usize,
        nodeid: u64,
        fh: u64,
        step: Step,
    ) -> Result<bool> {
        let arg = release_in(fh);
        let request = Request::new(FUSE_RELEASE, nodeid, arg.as_bytes()).answered::<()>();
        self.send(queue, lane, step, request).map(|()| false)
    }

    /// Takes note of what a listing names; returns how many entries there were.
    fn read_listing(&mut self, queue: usize, lane: usize, len: u32) -> Result<usize> {
        const FIXED: usize = size_of::<fuse_direntplus>();
        let state = &mut self.lanes[queue][lane];
        let len = (len as usize).saturating_sub(size_of::<fuse_out_header>());
        let bytes = self
            .listing
            .get_mut(..len)
            .context("a reply that is too long")?;
        state.slot.read_data(&self.target.memory, bytes);
        let mut rest = &bytes[..];
        let mut entries = 0;
        while let Ok((entry, _)) = fuse_direntplus::read_from_prefix(rest) {
            let whole = (FIXED + entry.dirent.namelen as usize).next_multiple_of(8);
            rest = rest.get(whole..).context("an entry that is cut")?;
            state.offset = entry.dirent.off;
            if entry.entry_out.nodeid != 0 {
                *self.listed.entry(entry.entry_out.nodeid).or_default() += 1;
            }
            entries += 1;
        }
        Ok(entries)
    }

    fn send_forgets(&mut self) -> Result<()> {
        if self.forgets.is_empty() && self.free_forget_slots.len() == self.target.forget_slots.len()
        {
            return Ok(());
        }
        while let Some(done) = self.target.hiprio.pop()? {
            self.free_forget_slots.push(done.cookie as u32);
        }
        let mut sent = false;
        while let (Some(&nodeid), Some(&slot)) =
            (self.forgets.last(), self.free_forget_slots.last())
        {
            self.free_forget_slots.pop();
            let arg = fuse_forget_in { nlookup: 1 };
            let request = Request::new(FUSE_FORGET, nodeid, arg.as_bytes());
            let slot = self.target.forget_slots[slot as usize];
            slot.send(&self.target.memory, &mut self.target.hiprio, &request, 0)?;
            self.forgets.pop();
            sent = true;
        }
        if sent {
            self.target.hiprio.kick()?;
        }
        Ok(())
    }

    /// Leaves the session as it was.
    fn clean_up(mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !self.forgets.is_empty() || self.target.hiprio.in_flight() > 0 {
            self.send_forgets()?;
            ensure!(Instant::now() < deadline, "FORGETs are not completed");
        }
        for (nodeid, count) in std::mem::take(&mut self.listed) {
            self.target.client().forget(nodeid, count)?;
        }
        if self.work.kind == Kind::Readdirplus {
            for lane in self.lanes.iter().flatten() {
                self.target.close_list(lane.fh)?;
            }
        }
        Ok(())
    }
}

/// When operations begin, where not each of them follows another one at once.
struct Pace {
    /// Nanoseconds between two of them, on the average.
    distance: u64,
    /// When the next one is due.
    next: u64,
    /// Queue and number of each free lane.
    idle: Vec<(usize, usize)>,
}

impl Pace {
    fn new(rate: f64, lanes: &[Vec<Lane>]) -> Pace {
        let all = lanes.iter().enumerate();
        Pace {
            distance: ((1e9 / rate) as u64).max(1),
            next: 0,
            idle: all
                .flat_map(|(queue, of_queue)| (0..of_queue.len()).map(move |lane| (queue, lane)))
                .collect(),
        }
    }

    /// Waits until the next operation is due; too short a wait only means another one.
    fn wait(&self, now: u64) {
        let left = Duration::from_nanos(self.next.saturating_sub(now));
        let flags = ClockNanosleepFlags::empty();
        let _ = clock_nanosleep(ClockId::CLOCK_MONOTONIC, flags, &left.into());
    }
}

/// The time that counts.
struct Window {
    origin: Instant,
    begin: u64,
    end: u64,
    clock: Option<ClockId>,
    started: Option<(u64, Option<Duration>)>,
    over: bool,
    wall: Duration,
    cpu: Option<Duration>,
}

impl Window {
    fn new(origin: Instant, warm: Duration, run: Duration, clock: Option<ClockId>) -> Window {
        let nanos = |d: Duration| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX);
        Window {
            origin,
            begin: nanos(warm),
            end: nanos(warm + run),
            clock,
            started: None,
            over: false,
            wall: Duration::ZERO,
            cpu: None,
        }
    }

    fn now(&self) -> u64 {
        self.origin.elapsed().as_nanos() as u64
    }

    fn server_cpu(&self) -> Result<Option<Duration>> {
        let Some(clock) = self.clock else {
            return Ok(None);
        };
        let now = clock.now().context("the server's process is gone")?;
        Ok(Some(now.into()))
    }

    /// Whether what is completed at `now` counts.
    fn counts(&mut self, now: u64) -> Result<bool> {
        if self.over || now < self.begin {
            return Ok(false);
        }
        let cpu = match self.started {
            None => {
                self.started = Some((now, self.server_cpu()?));
                return Ok(true);
            }
            Some(_) if now < self.end => return Ok(true),
            Some((began, cpu)) => {
                self.wall = Duration::from_nanos(now - began);
                cpu
            }
        };
        self.over = true;
        self.cpu = cpu
            .zip(self.server_cpu()?)
            .map(|(from, to)| to.saturating_sub(from));
        Ok(false)
    }
}
