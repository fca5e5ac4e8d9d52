//! What an operator can change of the data plane's own working: pools, the placement of queues, trace points, locks.
//!
//! The messages are part of [`crate::msg`]; the checks here hold on both sides.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use crate::errno::Errno;
use crate::limits;
use crate::msg::Failure;

/// The pools of all cores together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolSpec {
    /// Request slots: requests that can be in flight.
    pub slots: u32,
    /// Data buffers of [`limits::MAX_DATA_BUFFER`] bytes.
    pub buffers: u32,
}

impl PoolSpec {
    /// Checks the numbers against the limits.
    pub fn check(&self) -> Result<(), Failure> {
        at_least("small_pool_count", self.slots, limits::MIN_SLOTS)?;
        at_least("large_pool_count", self.buffers, limits::MIN_BUFFERS)
    }

    /// The part of one core out of so many.
    pub fn per_core(&self, cores: u32) -> PoolSpec {
        let share = |all: u32| all.div_ceil(cores.max(1));
        PoolSpec {
            slots: share(self.slots).max(1),
            buffers: share(self.buffers).max(limits::MIN_BUFFERS_PER_CORE),
        }
    }
}

fn at_least(what: &str, value: u32, least: u32) -> Result<(), Failure> {
    if value < least {
        return Err(Failure::new(
            Errno::EINVAL,
            format!("{what} {value} is less than {least}"),
        ));
    }
    Ok(())
}

/// How running queues are spread over the cores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Scheduler {
    /// A queue stays on the core that had the fewest when it started.
    #[default]
    Static,
    /// Queues move from busy cores to idle ones.
    Dynamic(Balance),
}

/// What the dynamic scheduler goes by. Loads are percentages of a core's time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Balance {
    /// Time between two looks at the loads, in µs.
    pub period_us: u64,
    /// A queue with less load than this is idle, and not worth moving.
    pub load_limit: u8,
    /// A core with this much load gives queues away.
    pub core_limit: u8,
    /// No core is given more than this.
    pub core_busy: u8,
}

impl Default for Balance {
    fn default() -> Balance {
        Balance {
            period_us: 1_000_000,
            load_limit: 20,
            core_limit: 80,
            core_busy: 95,
        }
    }
}

impl Scheduler {
    /// The name on the wire.
    pub fn name(&self) -> &'static str {
        match self {
            Scheduler::Static => "static",
            Scheduler::Dynamic(_) => "dynamic",
        }
    }

    /// Checks the numbers.
    pub fn check(&self) -> Result<(), Failure> {
        let Scheduler::Dynamic(balance) = self else {
            return Ok(());
        };
        let shortest = limits::MIN_SCHEDULER_PERIOD_US;
        let longest = limits::MAX_SCHEDULER_PERIOD_US;
        if !(shortest..=longest).contains(&balance.period_us) {
            let detail = format!(
                "period {} is outside {shortest} to {longest} microseconds",
                balance.period_us
            );
            return Err(Failure::new(Errno::EINVAL, detail));
        }
        for (name, percent) in [
            ("load_limit", balance.load_limit),
            ("core_limit", balance.core_limit),
            ("core_busy", balance.core_busy),
        ] {
            if percent > 100 {
                let detail = format!("{name} {percent} is more than 100 per cent");
                return Err(Failure::new(Errno::EINVAL, detail));
            }
        }
        Ok(())
    }
}

/// What the data plane has been told of these things, and what it works in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tuning {
    /// The pools of all cores together.
    pub pools: PoolSpec,
    /// Bytes of the memory that the pools lie in.
    pub arena_bytes: u64,
    /// Whether that memory consists of hugepages.
    pub hugepages: bool,
    /// How queues are spread.
    pub scheduler: Scheduler,
    /// The file that traces are written to.
    pub trace_file: String,
    /// The trace points that are on, one bit each.
    pub trace_mask: u64,
    /// Whether the cores' CPUs are claimed by lock files.
    pub cpu_locks: bool,
    /// Whether context switches of the cores are counted.
    pub context_switches: bool,
}

/// A PCIe function as its driver sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciDevice {
    /// Its address, `dddd:bb:dd.f`.
    pub address: String,
    /// VUID of the function.
    pub vuid: String,
    /// Name of the device on it.
    pub device: String,
    /// The first bytes of its configuration space.
    pub config: Vec<u8>,
}
