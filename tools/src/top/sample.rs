//! What the service has counted at one moment, and what it has counted between two.

use std::time::Instant;

use ferry_controlplane::rpc::stats::percentile;
use ferry_shared::counters::OpTotals;
use serde::Deserialize;
use serde_json::Value;

/// The counters at one moment, as `ferry_get_counters` gives them.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    /// When they were asked for.
    pub(super) taken: Instant,
    /// What came.
    pub(super) counters: Counters,
}

/// The result of `ferry_get_counters`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct Counters {
    /// Process id of the data plane.
    pub(super) pid: u32,
    /// Per core.
    pub(super) cores: Vec<Core>,
    /// Per device.
    pub(super) devices: Vec<Device>,
    /// Per queue that has been used where it is now.
    pub(super) queues: Vec<Queue>,
}

/// A core.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct Core {
    pub(super) cpu: u64,
    pub(super) busy_ns: u64,
    pub(super) sleeps: u64,
    pub(super) requests: u64,
    pub(super) slot_waits: u64,
    pub(super) buffer_waits: u64,
}

/// A device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct Device {
    pub(super) id: u32,
    pub(super) name: String,
    pub(super) state: String,
    pub(super) fsdev: String,
    pub(super) mounted: bool,
    pub(super) queues: u32,
    pub(super) bytes_read: u64,
    pub(super) bytes_written: u64,
    pub(super) all: Op,
    pub(super) ops: serde_json::Map<String, Value>,
}

/// A queue of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct Queue {
    pub(super) name: String,
    /// Its number among the threads, which `thread_set_cpumask` takes.
    pub(super) thread: u32,
    /// The core that serves it.
    pub(super) core: u32,
    /// The id of its device.
    pub(super) device: u32,
    pub(super) bytes_read: u64,
    pub(super) bytes_written: u64,
    pub(super) slot_waits: u64,
    pub(super) buffer_waits: u64,
    pub(super) all: Op,
}

/// An operation of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct Op {
    pub(super) requests: u64,
    pub(super) errors: u64,
    pub(super) ns: u64,
    pub(super) buckets: Vec<u64>,
}

impl Device {
    fn operations(&self) -> impl Iterator<Item = (&str, Op)> {
        let op = |of: &Value| Op::deserialize(of).unwrap_or_default();
        self.ops
            .iter()
            .map(move |(name, of)| (name.as_str(), op(of)))
    }
}

/// How often a second, and how long.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Rate {
    /// Requests a second.
    pub(super) requests: f64,
    /// Errors a second.
    pub(super) errors: f64,
    /// Mean latency in ns, when there were requests.
    pub(super) mean: Option<u64>,
    /// Latencies in ns that 50 %, 99 % and 99.9 % did not exceed, when there were requests.
    pub(super) percentiles: Option<[u64; 3]>,
}

/// What a core did meanwhile.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct CoreRate {
    pub(super) cpu: u64,
    /// Part of the time with work. A core that sleeps counts its time when it wakes, so time without work says nothing.
    pub(super) busy: f64,
    pub(super) requests: f64,
    pub(super) sleeps: f64,
    pub(super) slot_waits: f64,
    pub(super) buffer_waits: f64,
}

/// What a device did meanwhile, and altogether.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct DeviceRate {
    /// The device at the end.
    pub(super) now: Device,
    /// Bytes a second.
    pub(super) read: f64,
    /// Bytes a second.
    pub(super) written: f64,
    pub(super) all: Rate,
    /// Per operation that has ever been asked for: its name, what it did meanwhile, and what it has done altogether.
    pub(super) ops: Vec<(String, Rate, Op)>,
    pub(super) queues: Vec<QueueRate>,
}

/// What a queue did meanwhile, and since the core has had it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct QueueRate {
    /// The queue at the end.
    pub(super) now: Queue,
    /// Bytes a second.
    pub(super) read: f64,
    /// Bytes a second.
    pub(super) written: f64,
    pub(super) slot_waits: f64,
    pub(super) buffer_waits: f64,
    pub(super) all: Rate,
}

/// What everything did between two samples.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Rates {
    pub(super) cores: Vec<CoreRate>,
    pub(super) devices: Vec<DeviceRate>,
}

/// A counter that has become smaller has begun anew.
fn grown(now: u64, before: u64) -> u64 {
    now.checked_sub(before).unwrap_or(now)
}

struct Between {
    seconds: f64,
}

impl Between {
    fn rate(&self, now: u64, before: u64) -> f64 {
        grown(now, before) as f64 / self.seconds
    }

    fn op(&self, now: &Op, before: &Op) -> Rate {
        let mut meanwhile = OpTotals {
            requests: grown(now.requests, before.requests),
            ns: grown(now.ns, before.ns),
            ..OpTotals::default()
        };
        for (at, (bucket, now)) in meanwhile.buckets.iter_mut().zip(&now.buckets).enumerate() {
            *bucket = grown(*now, before.buckets.get(at).copied().unwrap_or(0));
        }
        let some = meanwhile.buckets.iter().any(|count| *count > 0);
        Rate {
            requests: self.rate(now.requests, before.requests),
            errors: self.rate(now.errors, before.errors),
            mean: meanwhile.ns.checked_div(meanwhile.requests),
            percentiles: some.then(|| [500, 990, 999].map(|part| percentile(&meanwhile, part))),
        }
    }

    fn core(&self, now: &Core, before: &Core) -> CoreRate {
        let busy = grown(now.busy_ns, before.busy_ns);
        CoreRate {
            cpu: now.cpu,
            busy: (busy as f64 / 1e9 / self.seconds).min(1.0),
            requests: self.rate(now.requests, before.requests),
            sleeps: self.rate(now.sleeps, before.sleeps),
            slot_waits: self.rate(now.slot_waits, before.slot_waits),
            buffer_waits: self.rate(now.buffer_waits, before.buffer_waits),
        }
    }

    fn queue(&self, now: Queue, before: &Queue) -> QueueRate {
        QueueRate {
            read: self.rate(now.bytes_read, before.bytes_read),
            written: self.rate(now.bytes_written, before.bytes_written),
            slot_waits: self.rate(now.slot_waits, before.slot_waits),
            buffer_waits: self.rate(now.buffer_waits, before.buffer_waits),
            all: self.op(&now.all, &before.all),
            now,
        }
    }

    fn device(&self, now: Device, before: &Device, queues: Vec<QueueRate>) -> DeviceRate {
        let ops = now.operations().map(|(name, op)| {
            let earlier = before.ops.get(name).map(Op::deserialize);
            let earlier = earlier.and_then(Result::ok).unwrap_or_default();
            (name.to_owned(), self.op(&op, &earlier), op)
        });
        DeviceRate {
            read: self.rate(now.bytes_read, before.bytes_read),
            written: self.rate(now.bytes_written, before.bytes_written),
            all: self.op(&now.all, &before.all),
            ops: ops.collect(),
            queues,
            now,
        }
    }
}

/// What happened from one sample to the next. What another data plane, or another device, had counted before does not
/// matter.
pub(super) fn rates(before: &Sample, now: &Sample) -> Rates {
    let seconds = now.taken.saturating_duration_since(before.taken);
    let between = Between {
        seconds: seconds.as_secs_f64().max(f64::EPSILON),
    };
    let nothing = Counters::default();
    let before = if before.counters.pid == now.counters.pid {
        &before.counters
    } else {
        &nothing
    };
    let cores = now.counters.cores.iter().enumerate().map(|(at, core)| {
        let unknown = Core::default();
        between.core(core, before.cores.get(at).unwrap_or(&unknown))
    });
    let devices = now.counters.devices.iter().map(|device| {
        let unknown = Device::default();
        let same = |earlier: &&Device| earlier.id == device.id && earlier.name == device.name;
        let earlier = before.devices.iter().find(same).unwrap_or(&unknown);
        let own = now.counters.queues.iter();
        let queues = own.filter(|queue| queue.device == device.id).map(|queue| {
            // One that has been moved counts anew.
            let same =
                |earlier: &&Queue| (earlier.thread, earlier.core) == (queue.thread, queue.core);
            let unknown = Queue::default();
            let earlier = before.queues.iter().find(same).unwrap_or(&unknown);
            between.queue(queue.clone(), earlier)
        });
        between.device(device.clone(), earlier, queues.collect())
    });
    Rates {
        cores: cores.collect(),
        devices: devices.collect(),
    }
}
