//! What an operator changes of running cores, and what is measured of them for that.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};

use ferry_shared::counters::{CoreCounter, CpuSet};
use ferry_shared::errno::Errno;
use ferry_shared::limits::MAX_SLOTS_PER_CORE;
use ferry_shared::msg::Failure;
use ferry_shared::trace;
use ferry_shared::tuning::{Balance, PoolSpec};

use super::balance::{self, QueueLoad};
use super::crew::Crew;
use super::{CoreOptions, CoreSet, QueueName, core_memory};
use crate::id::{DeviceId, QueueIdx};
use crate::os::arena::{Arena, Pages};
use crate::os::procfs;
use crate::reactor::Backend;

/// What a core had counted at the last look.
#[derive(Clone, Copy, Default)]
struct CoreSample {
    busy: u64,
    idle: u64,
    requests: u64,
}

/// What was counted at the last look at the loads.
#[derive(Default)]
pub(super) struct LoadMeter {
    cores: Vec<CoreSample>,
    /// Requests per core and thread.
    queues: HashMap<(usize, u32), u64>,
}

fn refuse<T>(errno: Errno, detail: String) -> Result<T, Failure> {
    Err(Failure::new(errno, detail))
}

impl<B: Backend> CoreSet<B> {
    /// The CPUs of the cores.
    pub fn cpus(&self) -> &[u32] {
        &self.options.cpus
    }

    /// The pools of all cores together.
    pub fn pools(&self) -> PoolSpec {
        let cores = u32::try_from(self.options.cpus.len()).unwrap_or(u32::MAX);
        PoolSpec {
            slots: self.options.slots.saturating_mul(cores),
            buffers: self.options.buffers.saturating_mul(cores),
        }
    }

    /// Bytes and pages of the memory that the pools lie in.
    pub fn memory(&self) -> (usize, Pages) {
        self.memory
    }

    /// Makes the pools anew, with threads of their own, in at most `limit` bytes. There must be no device.
    pub fn resize(&mut self, pools: PoolSpec, huge: bool, limit: usize) -> Result<(), Failure> {
        let count = self.options.cpus.len();
        let share = pools.per_core(u32::try_from(count).unwrap_or(u32::MAX));
        if share.slots > MAX_SLOTS_PER_CORE {
            let detail = format!(
                "{} request slots on {count} cores are more than {MAX_SLOTS_PER_CORE} on each",
                pools.slots
            );
            return refuse(Errno::EINVAL, detail);
        }
        let bytes = count.saturating_mul(core_memory(share.slots, share.buffers));
        let mib = |bytes: usize| bytes.div_ceil(1 << 20);
        if bytes > limit {
            let detail = format!(
                "{} request slots and {} data buffers take {} MiB, and {} MiB may be taken; ask for fewer",
                pools.slots,
                pools.buffers,
                mib(bytes),
                limit >> 20
            );
            return refuse(Errno::ENOMEM, detail);
        }
        let failed = |what: &str, error: std::io::Error| {
            let detail = format!("cannot {what} for {} MiB of pools: {error}", mib(bytes));
            Failure::new(Errno::ENOMEM, detail)
        };
        let mut arena =
            Arena::new(bytes, huge).map_err(|errno| failed("map memory", errno.into()))?;
        let options = CoreOptions {
            slots: share.slots,
            buffers: share.buffers,
            ..self.options.clone()
        };
        let crew = Crew::start(&options, &mut arena, &self.ground)
            .map_err(|error| failed("start cores", error))?;
        self.memory = (arena.bytes(), arena.pages());
        self.options = options;
        std::mem::replace(&mut self.crew, crew).end();
        Ok(())
    }

    /// The file of the traces.
    pub fn trace_file(&self) -> BorrowedFd<'_> {
        self.trace_file.as_fd()
    }

    /// The trace points that are on.
    pub fn trace_mask(&self) -> u64 {
        trace::mask(self.ground.traces.words())
    }

    /// Turns trace points on and the others off.
    pub fn set_trace_mask(&self, mask: u64) {
        trace::set_mask(self.ground.traces.words(), mask);
    }

    /// The running queue of a thread's number.
    pub fn find_thread(&self, number: u32) -> Option<QueueName> {
        self.placement.find(number)
    }

    /// The core that serves a queue.
    pub fn core_of(&self, queue: QueueName) -> Option<usize> {
        self.placement.core_of(queue)
    }

    /// Restricts a queue to CPUs, and tells whether it has to be started again to go there.
    pub fn restrict(&mut self, queue: QueueName, allowed: CpuSet) -> bool {
        self.placement.restrict(queue, allowed);
        let core = self.placement.core_of(queue);
        core.is_some_and(|core| !self.placement.allows(queue, core))
    }

    /// Forgets what has been measured, so that the next look begins anew.
    pub fn forget_loads(&mut self) {
        self.loads = LoadMeter::default();
    }

    /// Measures the loads since the last look, and says which queues have to be started again to go where they should
    /// be.
    pub fn balance(&mut self, limits: &Balance) -> Vec<QueueName> {
        let Some((cores, queues)) = self.measure() else {
            return Vec::new();
        };
        let moves = balance::plan(cores, queues, limits);
        self.moving.extend(moves.iter().map(|m| (m.queue, m.to)));
        moves.into_iter().map(|m| m.queue).collect()
    }

    /// The loads of cores and queues since the last look, in per cent; nothing at the first.
    fn measure(&mut self) -> Option<(Vec<u32>, Vec<QueueLoad>)> {
        let reader = self.ground.counters.reader();
        let before = std::mem::take(&mut self.loads);
        let count = self.options.cpus.len();
        let (mut cores, mut queues) = (Vec::with_capacity(count), Vec::new());
        for core in 0..count {
            let now = CoreSample {
                busy: reader.core(core, CoreCounter::Busy),
                idle: reader.core(core, CoreCounter::Idle),
                requests: reader.core(core, CoreCounter::Requests),
            };
            self.loads.cores.push(now);
            let then = before.cores.get(core).copied().unwrap_or(now);
            let busy = now.busy.saturating_sub(then.busy);
            let all = busy.saturating_add(now.idle.saturating_sub(then.idle));
            let requests = now.requests.saturating_sub(then.requests);
            let percent = |part: u64, of: u64| {
                let percent = u128::from(part) * 100 / u128::from(of.max(1));
                u32::try_from(percent).unwrap_or(100).min(100)
            };
            let load = percent(busy, all);
            cores.push(load);
            for queue in reader.queues(core) {
                let key = (core, queue.place.thread);
                self.loads.queues.insert(key, queue.requests);
                let then = before.queues.get(&key).copied().unwrap_or(queue.requests);
                let share = percent(queue.requests.saturating_sub(then), requests);
                let name = (DeviceId(queue.place.device), QueueIdx(queue.place.index));
                queues.push(QueueLoad {
                    queue: name,
                    core,
                    percent: load * share / 100,
                    allowed: (0..count)
                        .filter(|&core| self.placement.allows(name, core))
                        .collect(),
                });
            }
        }
        (!before.cores.is_empty()).then_some((cores, queues))
    }

    /// Writes the context switches of the cores' threads where the other counters are.
    pub fn count_context_switches(&self) {
        let reader = self.ground.counters.reader();
        for core in 0..self.options.cpus.len() {
            let thread = reader.core(core, CoreCounter::Thread);
            if let Some((gave_up, taken)) = procfs::context_switches(thread) {
                let counters =
                    ferry_shared::counters::CoreCounters::new(self.ground.counters.words(), core);
                counters.set(CoreCounter::VoluntarySwitches, gave_up);
                counters.set(CoreCounter::InvoluntarySwitches, taken);
            }
        }
    }
}
