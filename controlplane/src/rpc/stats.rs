//! Methods about what the cores count. They read shared memory; the data plane does not notice.

use std::collections::HashMap;

use ferry_shared::counters::BUCKETS;
use ferry_shared::counters::CoreCounter;
use ferry_shared::counters::Counted;
use ferry_shared::counters::CountedQueue;
use ferry_shared::counters::CpuSet;
use ferry_shared::counters::FIRST_BUCKET;
use ferry_shared::counters::OPCODES;
use ferry_shared::counters::OpTotals;
use ferry_shared::counters::Reader;
use serde_json::Map;
use serde_json::Value;
use serde_json::json;

use super::RpcError;
use super::decode::Args;
use crate::app::App;
use crate::model::Model;

const TRUE: Value = Value::Bool(true);
/// Times are counted in nanoseconds.
const TICK_RATE: u64 = 1_000_000_000;

/// The operations of `fsdev_get_iostat` in their order, and the FUSE operation codes that each stands for. BSD locks
/// travel as SETLK, so they are counted there.
pub const OPERATIONS: [(&str, &[usize]); 41] = [
    ("mount", &[26]),
    ("umount", &[38]),
    ("lookup", &[1]),
    ("forget", &[2, 42]),
    ("getattr", &[3, 52]),
    ("setattr", &[4]),
    ("readlink", &[5]),
    ("symlink", &[6]),
    ("mknod", &[8]),
    ("mkdir", &[9]),
    ("unlink", &[10]),
    ("rmdir", &[11]),
    ("rename", &[12, 45]),
    ("link", &[13]),
    ("open", &[14]),
    ("read", &[15]),
    ("write", &[16]),
    ("statfs", &[17]),
    ("release", &[18]),
    ("fsync", &[20]),
    ("setxattr", &[21]),
    ("getxattr", &[22]),
    ("listxattr", &[23]),
    ("removexattr", &[24]),
    ("flush", &[25]),
    ("opendir", &[27]),
    ("readdir", &[28, 44]),
    ("releasedir", &[29]),
    ("fsyncdir", &[30]),
    ("flock", &[]),
    ("create", &[35, 51]),
    ("abort", &[36]),
    ("fallocate", &[43]),
    ("copy_file_range", &[47, 53]),
    ("syncfs", &[50]),
    ("access", &[34]),
    ("lseek", &[46]),
    ("poll", &[40]),
    ("ioctl", &[39]),
    ("getlk", &[31]),
    ("setlk", &[32, 33]),
];

/// What was counted of one device, by one core or several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Totals {
    /// Per FUSE operation code.
    pub ops: Vec<OpTotals>,
    /// Bytes that the guest has read.
    pub read: u64,
    /// Bytes that the guest has written.
    pub written: u64,
}

impl Default for Totals {
    fn default() -> Totals {
        Totals {
            ops: vec![OpTotals::default(); OPCODES],
            read: 0,
            written: 0,
        }
    }
}

fn combine(mine: &mut OpTotals, other: &OpTotals, how: fn(u64, u64) -> u64) {
    mine.requests = how(mine.requests, other.requests);
    mine.errors = how(mine.errors, other.errors);
    mine.ns = how(mine.ns, other.ns);
    for (mine, other) in mine.buckets.iter_mut().zip(other.buckets) {
        *mine = how(*mine, other);
    }
}

impl Totals {
    /// What a core has counted of a device since it was started.
    pub fn of(reader: &Reader<'_>, core: usize, id: u32) -> Totals {
        let (read, written) = reader.bytes(core, id);
        let ops = (0..OPCODES).map(|opcode| reader.op(core, id, opcode));
        Totals {
            ops: ops.collect(),
            read,
            written,
        }
    }

    fn combine(&mut self, other: &Totals, how: fn(u64, u64) -> u64) {
        self.read = how(self.read, other.read);
        self.written = how(self.written, other.written);
        for (mine, other) in self.ops.iter_mut().zip(&other.ops) {
            combine(mine, other, how);
        }
    }

    /// Adds what another core has counted.
    pub fn add(&mut self, other: &Totals) {
        self.combine(other, u64::wrapping_add);
    }

    /// The operation of a name.
    pub fn operation(&self, opcodes: &[usize]) -> OpTotals {
        let mut sum = OpTotals::default();
        for one in opcodes.iter().filter_map(|opcode| self.ops.get(*opcode)) {
            combine(&mut sum, one, u64::wrapping_add);
        }
        sum
    }

    /// All operations together.
    pub fn all(&self) -> OpTotals {
        let mut sum = OpTotals::default();
        for one in &self.ops {
            combine(&mut sum, one, u64::wrapping_add);
        }
        sum
    }
}

/// A latency that so many per mille of the requests did not exceed, in ns; as exact as a factor of two.
pub fn percentile(op: &OpTotals, per_mille: u64) -> u64 {
    let total: u128 = op.buckets.iter().map(|count| u128::from(*count)).sum();
    let wanted = (total * u128::from(per_mille)).div_ceil(1000);
    let mut seen = 0;
    for (bucket, count) in op.buckets.iter().enumerate() {
        seen += u128::from(*count);
        if seen >= wanted && seen > 0 {
            return limit_of(bucket);
        }
    }
    0
}

/// The limit of a bucket in ns.
pub fn limit_of(bucket: usize) -> u64 {
    let exponent = u32::try_from(bucket.min(BUCKETS)).unwrap_or(0) + FIRST_BUCKET;
    1 << exponent
}

/// What had been counted, per device and core, when an operator last had counting begin anew.
#[derive(Debug, Default)]
pub struct Baselines(HashMap<(u32, usize), Totals>);

impl Baselines {
    /// Forgets all.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    fn since(&self, reader: &Reader<'_>, core: usize, id: u32) -> Totals {
        let mut totals = Totals::of(reader, core, id);
        if let Some(before) = self.0.get(&(id, core)) {
            totals.combine(before, u64::wrapping_sub);
        }
        totals
    }
}

/// The ids of the devices that have an fsdev behind them.
fn users(model: &Model, reader: &Reader<'_>, fsdev: &str) -> Vec<u32> {
    let uses = |device: &str| {
        let live = model
            .device(device)
            .ok()
            .and_then(|device| device.live.as_ref());
        live.is_some_and(|live| live.spec.fsdev == fsdev)
    };
    let devices = reader.devices();
    let ids = devices.iter().filter(|device| uses(&device.name));
    ids.map(|device| device.id).collect()
}

fn iostat(totals: &Totals) -> Map<String, Value> {
    let mut counts = Map::new();
    let mut latencies = Map::new();
    for (name, opcodes) in OPERATIONS {
        let op = totals.operation(opcodes);
        counts.insert(name.to_owned(), json!(op.requests));
        if let Some(average) = op.ns.checked_div(op.requests) {
            let latency = json!({"avg_ns": average, "p50_ns": percentile(&op, 500), "p99_ns": percentile(&op, 990),
                "p999_ns": percentile(&op, 999)});
            latencies.insert(name.to_owned(), latency);
        }
    }
    let mut all = Map::new();
    all.insert("num_ios".to_owned(), Value::Object(counts));
    all.insert("bytes_read".to_owned(), json!(totals.read));
    all.insert("bytes_written".to_owned(), json!(totals.written));
    // A request that finds no room waits in its ring, so none is ever refused for that.
    all.insert("num_out_of_io".to_owned(), json!(0));
    all.insert("num_errors".to_owned(), json!(totals.all().errors));
    all.insert("latency".to_owned(), Value::Object(latencies));
    all
}

fn thread_name(core: usize) -> String {
    format!("core_{core}")
}

pub(super) fn fsdev_get_iostat(app: &App, args: &Args) -> Result<Value, RpcError> {
    let counters = app.counters()?;
    let reader = counters.reader();
    let (model, baselines) = (app.model(), app.baselines());
    let per_channel = args.flag("per_channel").unwrap_or(false);
    let wanted = |name: &str| args.text("name").is_none_or(|only| only == name);
    let mut fsdevs = Vec::new();
    for fsdev in model.fsdevs().filter(|fsdev| wanted(&fsdev.spec.name)) {
        let users = users(&model, &reader, &fsdev.spec.name);
        let of_core = |core| {
            let mut totals = Totals::default();
            for id in &users {
                totals.add(&baselines.since(&reader, core, *id));
            }
            totals
        };
        let mut described = Map::new();
        described.insert("name".to_owned(), json!(fsdev.spec.name));
        if per_channel {
            let channel = |core| {
                let mut channel = Map::new();
                channel.insert("name".to_owned(), json!(thread_name(core)));
                channel.extend(iostat(&of_core(core)));
                Value::Object(channel)
            };
            let channels: Vec<Value> = (0..reader.cores()).map(channel).collect();
            described.insert("channels".to_owned(), Value::Array(channels));
        } else {
            let mut totals = Totals::default();
            (0..reader.cores()).for_each(|core| totals.add(&of_core(core)));
            described.extend(iostat(&totals));
        }
        fsdevs.push(Value::Object(described));
    }
    Ok(json!({"fsdevs": fsdevs}))
}

pub(super) fn fsdev_reset_iostat(app: &App, args: &Args) -> Result<Value, RpcError> {
    let counters = app.counters()?;
    let reader = counters.reader();
    let (model, mut baselines) = (app.model(), app.baselines());
    let wanted = |name: &str| args.text("name").is_none_or(|only| only == name);
    for fsdev in model.fsdevs().filter(|fsdev| wanted(&fsdev.spec.name)) {
        for id in users(&model, &reader, &fsdev.spec.name) {
            for core in 0..reader.cores() {
                let now = Totals::of(&reader, core, id);
                baselines.0.insert((id, core), now);
            }
        }
    }
    Ok(TRUE)
}

/// A mask of CPUs as the original writes it.
pub(super) fn mask_of(cpus: &[u32]) -> String {
    format!("{:x}", CpuSet::of(cpus.iter().copied()))
}

fn mask(cpu: u64) -> String {
    mask_of(&[u32::try_from(cpu).unwrap_or(u32::MAX)])
}

/// The CPUs of the cores.
pub(super) fn cpus(app: &App) -> Result<Vec<u32>, RpcError> {
    let counters = app.counters()?;
    let reader = counters.reader();
    let cpu = |core| u32::try_from(reader.core(core, CoreCounter::Cpu)).unwrap_or(u32::MAX);
    Ok((0..reader.cores()).map(cpu).collect())
}

/// The queues that a core serves, each with its name.
fn queues(reader: &Reader<'_>, core: usize) -> Vec<(String, CountedQueue)> {
    let devices = reader.devices();
    let name = |queue: &CountedQueue| {
        let device = devices
            .iter()
            .find(|device| device.id == queue.place.device);
        let device = device.map_or("", |device| device.name.as_str());
        format!("{device}_q{}", queue.place.index)
    };
    let queues = reader.queues(core).into_iter();
    queues.map(|queue| (name(&queue), queue)).collect()
}

/// Describes each core and each of its queues.
fn per_thread(
    app: &App,
    describe_core: impl Fn(&Reader<'_>, usize) -> Value,
    describe_queue: impl Fn(&Reader<'_>, &str, &CountedQueue) -> Value,
) -> Result<Vec<Value>, RpcError> {
    let counters = app.counters()?;
    let reader = counters.reader();
    let cores = 0..reader.cores();
    let mut threads: Vec<Value> = cores
        .clone()
        .map(|core| describe_core(&reader, core))
        .collect();
    for core in cores {
        let queues = queues(&reader, core).into_iter();
        threads.extend(queues.map(|(name, queue)| describe_queue(&reader, &name, &queue)));
    }
    Ok(threads)
}

/// What the kernel has counted of a CPU, in ticks: user, system and interrupts.
fn cpu_times(stat: &str, cpu: u64) -> Option<[u64; 3]> {
    let name = format!("cpu{cpu} ");
    let line = stat.lines().find(|line| line.starts_with(&name))?;
    let numbers = line
        .split_whitespace()
        .skip(1)
        .map(|word| word.parse().ok());
    let numbers: Vec<u64> = numbers.collect::<Option<_>>()?;
    let at = |index: usize| numbers.get(index).copied().unwrap_or(0);
    Some([at(0), at(2), at(5).saturating_add(at(6))])
}

/// The NUMA node of a CPU; 0 where there is only one.
fn numa_node(cpu: u64) -> u32 {
    let listed = std::fs::read_dir(format!("/sys/devices/system/cpu/cpu{cpu}"));
    let names = listed.into_iter().flatten().flatten();
    let mut nodes = names.filter_map(|entry| {
        let name = entry.file_name();
        name.to_str()?.strip_prefix("node")?.parse().ok()
    });
    nodes.next().unwrap_or(0)
}

fn per_core(
    app: &App,
    describe: impl Fn(&Reader<'_>, usize) -> Value,
) -> Result<Vec<Value>, RpcError> {
    let counters = app.counters()?;
    let reader = counters.reader();
    let cores = 0..reader.cores();
    Ok(cores.map(|core| describe(&reader, core)).collect())
}

fn reactor(reader: &Reader<'_>, core: usize, stat: &str) -> Value {
    let get = |counter| reader.core(core, counter);
    let (busy, idle) = (get(CoreCounter::Busy), get(CoreCounter::Idle));
    let cpu = get(CoreCounter::Cpu);
    let mut threads = vec![json!({
        "name": thread_name(core),
        "id": core + 1,
        "cpumask": mask(cpu),
        "elapsed": busy.wrapping_add(idle),
    })];
    threads.extend(queues(reader, core).into_iter().map(|(name, queue)| {
        json!({
            "name": name,
            "id": queue.place.thread,
            "cpumask": format!("{:x}", queue.place.allowed),
            "elapsed": queue.busy.wrapping_add(queue.idle),
        })
    }));
    let [usr, sys, irq] = cpu_times(stat, cpu).unwrap_or_default();
    let mut reactor = json!({
        "lcore": cpu,
        "numa_id": numa_node(cpu),
        "tid": get(CoreCounter::Thread),
        "busy": busy,
        "idle": idle,
        "in_interrupt": get(CoreCounter::Sleeps) > 0,
        "irq": irq,
        "sys": sys,
        "usr": usr,
        "sleeps": get(CoreCounter::Sleeps),
        "requests": get(CoreCounter::Requests),
        "lw_threads": threads,
    });
    let (gave_up, taken) = (
        get(CoreCounter::VoluntarySwitches),
        get(CoreCounter::InvoluntarySwitches),
    );
    // There are none while framework_monitor_context_switch is off and has been so.
    if gave_up > 0 || taken > 0 {
        reactor["context_switches"] = json!({"voluntary": gave_up, "involuntary": taken});
    }
    reactor
}

pub(super) fn framework_get_reactors(app: &App, _: &Args) -> Result<Value, RpcError> {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let reactors = per_core(app, |reader, core| reactor(reader, core, &stat))?;
    let pid = app.model().platform().pid;
    Ok(json!({"tick_rate": TICK_RATE, "pid": pid, "reactors": reactors}))
}

pub(super) fn thread_get_stats(app: &App, _: &Args) -> Result<Value, RpcError> {
    let describe = |name: &str, id: u64, cpumask: String, busy: u64, idle: u64| {
        json!({
            "name": name,
            "id": id,
            "cpumask": cpumask,
            "busy": busy,
            "idle": idle,
            "active_pollers_count": 1,
            "timed_pollers_count": 0,
            "paused_pollers_count": 0,
        })
    };
    let core = |reader: &Reader<'_>, core: usize| {
        let get = |counter| reader.core(core, counter);
        let (busy, idle) = (get(CoreCounter::Busy), get(CoreCounter::Idle));
        let cpumask = mask(get(CoreCounter::Cpu));
        describe(&thread_name(core), core as u64 + 1, cpumask, busy, idle)
    };
    let queue = |_: &Reader<'_>, name: &str, queue: &CountedQueue| {
        let cpumask = format!("{:x}", queue.place.allowed);
        let id = u64::from(queue.place.thread);
        describe(name, id, cpumask, queue.busy, queue.idle)
    };
    let threads = per_thread(app, core, queue)?;
    Ok(json!({"tick_rate": TICK_RATE, "threads": threads}))
}

pub(super) fn thread_get_pollers(app: &App, _: &Args) -> Result<Value, RpcError> {
    let describe = |thread: &str, id: u64, poller: &str, runs: u64, busy: u64| {
        let poller = json!({
            "name": poller,
            "id": 1,
            "state": "waiting",
            "run_count": runs,
            "busy_count": busy,
        });
        json!({
            "name": thread,
            "id": id,
            "active_pollers": [poller],
            "timed_pollers": [],
            "paused_pollers": [],
        })
    };
    let core = |reader: &Reader<'_>, core: usize| {
        let get = |counter| reader.core(core, counter);
        let (turns, busy) = (get(CoreCounter::Turns), get(CoreCounter::BusyTurns));
        describe(
            &thread_name(core),
            core as u64 + 1,
            "reactor_turn",
            turns,
            busy,
        )
    };
    let queue = |_: &Reader<'_>, name: &str, queue: &CountedQueue| {
        let id = u64::from(queue.place.thread);
        describe(name, id, "virtqueue_poll", queue.turns, queue.rounds)
    };
    let threads = per_thread(app, core, queue)?;
    Ok(json!({"tick_rate": TICK_RATE, "threads": threads}))
}

/// A core's channels are the devices that it has served, a queue's the one that it belongs to.
pub(super) fn thread_get_io_channels(app: &App, _: &Args) -> Result<Value, RpcError> {
    let channel = |device: &Counted| json!({"name": device.name, "ref": 1});
    let core = |reader: &Reader<'_>, core: usize| {
        let served = |id| Totals::of(reader, core, id).all().requests > 0;
        let devices = reader.devices();
        let devices = devices.iter().filter(|device| served(device.id));
        let channels: Vec<Value> = devices.map(channel).collect();
        json!({"name": thread_name(core), "io_channels": channels})
    };
    let queue = |reader: &Reader<'_>, name: &str, queue: &CountedQueue| {
        let devices = reader.devices();
        let own = devices
            .iter()
            .filter(|device| device.id == queue.place.device);
        let channels: Vec<Value> = own.map(channel).collect();
        json!({"name": name, "io_channels": channels})
    };
    let threads = per_thread(app, core, queue)?;
    Ok(json!({"tick_rate": TICK_RATE, "threads": threads}))
}

/// Small buffers are the request slots, one a request; large ones the data buffers.
pub(super) fn iobuf_get_stats(app: &App, _: &Args) -> Result<Value, RpcError> {
    let counters = app.counters()?;
    let reader = counters.reader();
    let sum = |counter| -> u64 {
        let cores = 0..reader.cores();
        cores.fold(0, |sum, core| sum.wrapping_add(reader.core(core, counter)))
    };
    Ok(json!([{
        "module": "fsdev",
        "small_pool": {"cache": sum(CoreCounter::Requests), "main": 0, "retry": sum(CoreCounter::SlotWaits),
            "cache_size": sum(CoreCounter::Slots)},
        "large_pool": {"cache": sum(CoreCounter::BufferTakes), "main": 0, "retry": sum(CoreCounter::BufferWaits),
            "cache_size": sum(CoreCounter::Buffers)},
    }]))
}

fn op_json(op: &OpTotals) -> Value {
    json!({"requests": op.requests, "errors": op.errors, "ns": op.ns, "buckets": op.buckets})
}

/// Everything at once and as it was counted, for tools that compute rates.
pub(super) fn get_counters(app: &App, _: &Args) -> Result<Value, RpcError> {
    let cores = per_core(app, |reader, core| {
        let get = |counter| reader.core(core, counter);
        json!({
            "cpu": get(CoreCounter::Cpu),
            "busy_ns": get(CoreCounter::Busy),
            "idle_ns": get(CoreCounter::Idle),
            "sleeps": get(CoreCounter::Sleeps),
            "requests": get(CoreCounter::Requests),
            "slot_waits": get(CoreCounter::SlotWaits),
            "buffer_waits": get(CoreCounter::BufferWaits),
        })
    })?;
    let counters = app.counters()?;
    let reader = counters.reader();
    let model = app.model();
    let mut devices = Vec::new();
    for counted in reader.devices() {
        let mut totals = Totals::default();
        for core in 0..reader.cores() {
            totals.add(&Totals::of(&reader, core, counted.id));
        }
        let mut ops = Map::new();
        for (name, opcodes) in OPERATIONS {
            let op = totals.operation(opcodes);
            if op.requests > 0 {
                ops.insert(name.to_owned(), op_json(&op));
            }
        }
        let device = model.device(&counted.name).ok();
        let live = device.and_then(|device| device.live.as_ref());
        devices.push(json!({
            "id": counted.id,
            "name": counted.name,
            "state": device.map_or("", |device| device.state().name()),
            "fsdev": live.map_or("", |live| live.spec.fsdev.as_str()),
            "mounted": live.is_some_and(|live| live.mounted),
            "queues": device.map_or(0, |device| device.queues()),
            "bytes_read": totals.read,
            "bytes_written": totals.written,
            "all": op_json(&totals.all()),
            "ops": ops,
        }));
    }
    let mut busy_queues = Vec::new();
    for core in 0..reader.cores() {
        let served = queues(&reader, core).into_iter();
        // There may be hundreds that nothing has been asked of.
        for (name, queue) in served.filter(|(_, queue)| queue.requests > 0) {
            busy_queues.push(json!({
                "name": name,
                "thread": queue.place.thread,
                "core": core,
                "device": queue.place.device,
                "bytes_read": queue.read,
                "bytes_written": queue.written,
                "slot_waits": queue.slot_waits,
                "buffer_waits": queue.buffer_waits,
                "all": op_json(&queue.answered),
            }));
        }
    }
    let pid = model.platform().pid;
    Ok(
        json!({"pid": pid, "cores": cores, "devices": devices, "queues": busy_queues, "first_bucket": FIRST_BUCKET}),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_the_limits_of_buckets() {
        let mut op = OpTotals::default();
        assert_eq!(percentile(&op, 990), 0);
        op.buckets[0] = 98;
        op.buckets[3] = 1;
        op.buckets[5] = 1;
        assert_eq!(percentile(&op, 500), 512);
        assert_eq!(percentile(&op, 980), 512);
        assert_eq!(percentile(&op, 990), 4096);
        assert_eq!(percentile(&op, 999), 16384);
    }

    #[test]
    fn every_operation_code_is_counted_under_one_name_at_most() {
        let mut seen = Vec::new();
        for (name, opcodes) in OPERATIONS {
            for opcode in opcodes {
                assert!(!seen.contains(opcode), "{name}: {opcode}");
                assert!(*opcode < OPCODES);
                seen.push(*opcode);
            }
        }
    }

    #[test]
    fn masks_have_one_bit() {
        assert_eq!(mask(0), "1");
        assert_eq!(mask(3), "8");
        assert_eq!(mask(5), "20");
        assert_eq!(mask(64), "10000000000000000");
    }

    #[test]
    fn the_times_of_a_cpu_are_found_by_its_whole_name() {
        let stat =
            "cpu  9 9 9 9 9 9 9 9 9 9\ncpu1 1 2 3 4 5 6 7 0 0 0\ncpu10 8 0 8 0 0 8 8 0 0 0\n";
        assert_eq!(cpu_times(stat, 1), Some([1, 3, 13]));
        assert_eq!(cpu_times(stat, 0), None);
    }
}
