//! What an operator changes of the service's own working: where queues are served, pools, traces, claims on CPUs.

use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ferry_shared::counters::{CpuSet, MASK_CPUS};
use ferry_shared::errno::Errno;
use ferry_shared::msg::{Attach, Failure, PciDevice, PoolSpec, Reply, Scheduler, Tuning};

use super::{Service, refuse};
use crate::cores::QueueName;
use crate::os::arena::Pages;
use crate::os::cpulock::{CpuLocks, LOCK_DIR};
use crate::os::procfs;

/// How often context switches are counted.
const COUNT_PERIOD: Duration = Duration::from_secs(1);
/// Functions of one page; each has its configuration space.
const PCI_PAGE: usize = 32;

/// A queue on its way from a core, and whom to tell.
pub(super) struct Leaving {
    seq: u64,
    queue: QueueName,
    core: usize,
}

/// What was asked for, and when there is something to do for it.
pub(super) struct Tuned {
    scheduler: Scheduler,
    balance_at: Option<Instant>,
    count_at: Option<Instant>,
    pub(super) leaving: Vec<Leaving>,
    locks: Option<CpuLocks>,
    lock_dir: PathBuf,
    /// Most bytes that pools may take, if the operator has said so.
    memory_limit: Option<usize>,
    /// Whether hugepages are tried.
    huge: bool,
}

impl Default for Tuned {
    fn default() -> Tuned {
        Tuned {
            scheduler: Scheduler::default(),
            balance_at: None,
            count_at: None,
            leaving: Vec::new(),
            locks: None,
            lock_dir: LOCK_DIR.into(),
            memory_limit: None,
            huge: false,
        }
    }
}

impl Service {
    /// Bounds the memory of pools that are made anew, which otherwise may take half of what is free.
    pub fn limit_memory(&mut self, bytes: Option<usize>, huge: bool) {
        self.tuned.memory_limit = bytes;
        self.tuned.huge = huge;
    }

    pub(super) fn tuning(&self) -> Reply {
        let (bytes, pages) = self.cores.memory();
        let file = self.cores.trace_file().as_raw_fd();
        Reply::Tuning(Tuning {
            pools: self.cores.pools(),
            arena_bytes: bytes as u64,
            hugepages: pages == Pages::Huge,
            scheduler: self.tuned.scheduler,
            trace_file: format!("/proc/{}/fd/{file}", std::process::id()),
            trace_mask: self.cores.trace_mask(),
            cpu_locks: self.tuned.locks.is_some(),
            context_switches: self.tuned.count_at.is_some(),
        })
    }

    pub(super) fn set_pools(&mut self, pools: PoolSpec) -> Result<Reply, Failure> {
        pools.check()?;
        if let Some(device) = self.devices.first() {
            let detail = format!(
                "the pools are in use by device {}; stop and destroy all devices first",
                device.spec.name
            );
            return refuse(Errno::EBUSY, detail);
        }
        let free = || procfs::available_memory().map_or(usize::MAX, |bytes| bytes / 2);
        let limit = self.tuned.memory_limit.unwrap_or_else(free);
        self.cores.resize(pools, self.tuned.huge, limit)?;
        let PoolSpec { slots, buffers } = self.cores.pools();
        tracing::info!(slots, buffers, "made the pools anew");
        Ok(Reply::Done)
    }

    pub(super) fn set_scheduler(&mut self, scheduler: Scheduler) -> Result<Reply, Failure> {
        scheduler.check()?;
        self.cores.forget_loads();
        self.tuned.scheduler = scheduler;
        self.tuned.balance_at = match scheduler {
            Scheduler::Static => None,
            // The first look is what the second is compared with.
            Scheduler::Dynamic(_) => Some(Instant::now()),
        };
        tracing::info!(scheduler = scheduler.name(), "spreading queues");
        Ok(Reply::Done)
    }

    /// Restricts a queue to CPUs. It leaves its core as soon as what is in flight has been answered.
    pub(super) fn place_thread(
        &mut self,
        seq: u64,
        thread: u32,
        cpus: &[u32],
    ) -> Result<Option<Reply>, Failure> {
        let Some(queue) = self.cores.find_thread(thread) else {
            return refuse(Errno::ESRCH, format!("no running queue is thread {thread}"));
        };
        let known = |cpu: &u32| self.cores.cpus().contains(cpu);
        if !cpus.iter().any(known) || cpus.iter().any(|&cpu| cpu as usize >= MASK_CPUS) {
            let detail = format!(
                "none of CPUs {cpus:?} is a core's; the cores are on {:?}",
                self.cores.cpus()
            );
            return refuse(Errno::EINVAL, detail);
        }
        // One at a time, so that who asks again and again while a request is slow is not remembered every time.
        if self.tuned.leaving.iter().any(|other| other.queue == queue) {
            return refuse(
                Errno::EALREADY,
                format!("thread {thread} is on its way to another core"),
            );
        }
        let core = self.cores.core_of(queue);
        if !self.cores.restrict(queue, CpuSet::of(cpus.iter().copied())) {
            return Ok(Some(Reply::Done));
        }
        self.start_again(queue);
        let core = core.unwrap_or(usize::MAX);
        self.tuned.leaving.push(Leaving { seq, queue, core });
        Ok(None)
    }

    /// Stops a queue where it stands and starts it on the core where it should be.
    fn start_again(&mut self, (id, index): QueueName) {
        if let Some(device) = self.devices.iter_mut().find(|device| device.id == id) {
            device.transport.start_again(index, &mut self.cores);
        }
    }

    /// Answers for queues that have left their cores.
    pub(super) fn settle_moves(&mut self) {
        let leaving = std::mem::take(&mut self.tuned.leaving);
        for move_ in leaving {
            if self.cores.core_of(move_.queue) == Some(move_.core) {
                self.tuned.leaving.push(move_);
            } else {
                self.answers.push((move_.seq, Ok(Reply::Done)));
            }
        }
    }

    /// Has the lock files of CPUs in another directory.
    pub fn keep_cpu_locks_in(&mut self, dir: PathBuf) {
        self.tuned.lock_dir = dir;
    }

    /// Claims the cores' CPUs by lock files, or gives them up.
    pub fn lock_cpus(&mut self, lock: bool) -> Result<Reply, Failure> {
        if !lock {
            self.tuned.locks = None;
        } else if self.tuned.locks.is_none() {
            self.tuned.locks = Some(CpuLocks::claim(&self.tuned.lock_dir, self.cores.cpus())?);
        }
        Ok(Reply::Done)
    }

    pub(super) fn monitor_switches(&mut self, count: bool) -> Reply {
        self.tuned.count_at = count.then(Instant::now);
        Reply::Done
    }

    pub(super) fn pci_devices(&self, from: u32) -> Reply {
        let started = self.devices.iter().filter_map(|device| {
            let Attach::Doca { manager, vuid } = &device.spec.attach else {
                return None;
            };
            let config = device.transport.pci_config()?;
            let function = self.platform.find(manager, vuid).ok()?;
            Some(PciDevice {
                address: function.pci_address.clone(),
                vuid: vuid.clone(),
                device: device.spec.name.clone(),
                config: config.to_vec(),
            })
        });
        let mut devices: Vec<PciDevice> = started.skip(from as usize).take(PCI_PAGE + 1).collect();
        let more = devices.len() > PCI_PAGE;
        devices.truncate(PCI_PAGE);
        let next = more.then_some(from.saturating_add(PCI_PAGE as u32));
        Reply::PciDevices { devices, next }
    }

    /// How long there is nothing to do but what the sockets and the cores bring; `None`: for ever.
    pub fn quiet_for(&self) -> Option<Duration> {
        let next = self
            .tuned
            .balance_at
            .into_iter()
            .chain(self.tuned.count_at)
            .min()?;
        Some(next.saturating_duration_since(Instant::now()))
    }

    /// Does what is due.
    pub fn tick(&mut self) {
        let now = Instant::now();
        let due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if due(self.tuned.count_at) {
            self.cores.count_context_switches();
            self.tuned.count_at = Some(now + COUNT_PERIOD);
        }
        if let (Scheduler::Dynamic(balance), true) =
            (self.tuned.scheduler, due(self.tuned.balance_at))
        {
            for queue in self.cores.balance(&balance) {
                tracing::debug!(
                    device = queue.0.0,
                    queue = queue.1.0,
                    "moves to another core"
                );
                self.start_again(queue);
            }
            self.tuned.balance_at = Some(now + Duration::from_micros(balance.period_us));
        }
    }
}
