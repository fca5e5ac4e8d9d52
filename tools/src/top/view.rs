//! What is shown, as words in tables; how it gets onto a screen or into a text is the business of others.

use super::sample::CoreRate;
use super::sample::DeviceRate;
use super::sample::QueueRate;
use super::sample::Rate;
use super::sample::Rates;

/// By what devices are ordered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Order {
    /// By name
    #[default]
    Name,
    /// Most requests a second first
    Iops,
    /// Most bytes a second first
    Bytes,
    /// Longest latency (99 %) first
    Latency,
    /// Most errors a second first
    Errors,
}

impl Order {
    /// The one after this.
    pub(super) fn next(self) -> Order {
        match self {
            Order::Name => Order::Iops,
            Order::Iops => Order::Bytes,
            Order::Bytes => Order::Latency,
            Order::Latency => Order::Errors,
            Order::Errors => Order::Name,
        }
    }

    /// Its name.
    pub(super) fn name(self) -> &'static str {
        match self {
            Order::Name => "name",
            Order::Iops => "IOPS",
            Order::Bytes => "MiB/s",
            Order::Latency => "latency",
            Order::Errors => "errors",
        }
    }
}

/// A column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Column {
    pub(super) name: &'static str,
    /// Words stand at the left, numbers at the right.
    pub(super) word: bool,
}

const fn word(name: &'static str) -> Column {
    Column { name, word: true }
}

const fn number(name: &'static str) -> Column {
    Column { name, word: false }
}

const CORES: &[Column] = &[
    number("CORE"),
    number("CPU"),
    number("BUSY%"),
    number("REQ/s"),
    number("SLEEPS/s"),
    number("SLOT-WAITS/s"),
    number("BUFFER-WAITS/s"),
];
const DEVICES: &[Column] = &[
    word("DEVICE"),
    word("STATE"),
    word("MOUNTED"),
    word("FSDEV"),
    number("QUEUES"),
    number("IOPS"),
    number("READ-MiB/s"),
    number("WRITE-MiB/s"),
    number("P50"),
    number("P99"),
    number("P99.9"),
    number("ERR/s"),
    number("REQUESTS"),
    number("ERRORS"),
];
const QUEUES: &[Column] = &[
    word("QUEUE"),
    number("THREAD"),
    number("CORE"),
    number("IOPS"),
    number("READ-MiB/s"),
    number("WRITE-MiB/s"),
    number("P50"),
    number("P99"),
    number("P99.9"),
    number("SLOT-WAITS/s"),
    number("BUFFER-WAITS/s"),
    number("ERR/s"),
    number("REQUESTS"),
    number("ERRORS"),
];
const OPERATIONS: &[Column] = &[
    word("DEVICE"),
    word("OP"),
    number("IOPS"),
    number("MEAN"),
    number("P50"),
    number("P99"),
    number("P99.9"),
    number("ERR/s"),
    number("REQUESTS"),
    number("ERRORS"),
];

/// Rows under columns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) columns: &'static [Column],
    pub(super) rows: Vec<Vec<String>>,
}

impl Table {
    /// How wide each column has to be.
    pub(super) fn widths(&self) -> Vec<usize> {
        let mut widths: Vec<usize> = self
            .columns
            .iter()
            .map(|column| column.name.len())
            .collect();
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        widths
    }
}

/// The tables of one frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tables {
    pub(super) cores: Table,
    pub(super) devices: Table,
    pub(super) queues: Table,
    pub(super) operations: Table,
}

fn rate(value: f64) -> String {
    if value >= 100.0 || value == 0.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.1}")
    }
}

fn mebibytes(bytes: f64) -> String {
    rate(bytes / f64::from(1 << 20))
}

/// A time with three digits or so.
fn duration(ns: Option<u64>) -> String {
    let Some(ns) = ns else {
        return "-".to_owned();
    };
    let (value, unit) = match ns {
        0..1_000 => return format!("{ns}ns"),
        1_000..1_000_000 => (ns as f64 / 1e3, "us"),
        1_000_000..1_000_000_000 => (ns as f64 / 1e6, "ms"),
        _ => (ns as f64 / 1e9, "s"),
    };
    if value < 10.0 {
        format!("{value:.1}{unit}")
    } else {
        format!("{value:.0}{unit}")
    }
}

/// A name with nothing in it that could move the cursor.
fn plain(name: &str) -> String {
    name.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

fn latencies(rate: &Rate) -> [String; 3] {
    match rate.percentiles {
        Some(percentiles) => percentiles.map(|ns| duration(Some(ns))),
        None => [None; 3].map(duration),
    }
}

fn core(at: usize, core: &CoreRate) -> Vec<String> {
    vec![
        at.to_string(),
        core.cpu.to_string(),
        format!("{:.1}", core.busy * 100.0),
        rate(core.requests),
        rate(core.sleeps),
        rate(core.slot_waits),
        rate(core.buffer_waits),
    ]
}

fn device(device: &DeviceRate) -> Vec<String> {
    let now = &device.now;
    let mut cells = vec![
        plain(&now.name),
        plain(&now.state),
        if now.mounted { "yes" } else { "no" }.to_owned(),
        plain(&now.fsdev),
        now.queues.to_string(),
        rate(device.all.requests),
        mebibytes(device.read),
        mebibytes(device.written),
    ];
    cells.extend(latencies(&device.all));
    cells.push(rate(device.all.errors));
    cells.extend([now.all.requests, now.all.errors].map(|count| count.to_string()));
    cells
}

fn queue(queue: &QueueRate) -> Vec<String> {
    let now = &queue.now;
    let mut cells = vec![
        plain(&now.name),
        now.thread.to_string(),
        now.core.to_string(),
        rate(queue.all.requests),
        mebibytes(queue.read),
        mebibytes(queue.written),
    ];
    cells.extend(latencies(&queue.all));
    cells.extend([queue.slot_waits, queue.buffer_waits, queue.all.errors].map(rate));
    cells.extend([now.all.requests, now.all.errors].map(|count| count.to_string()));
    cells
}

fn operations(device: &DeviceRate) -> impl Iterator<Item = Vec<String>> {
    device.ops.iter().map(|(name, meanwhile, total)| {
        let mut cells = vec![
            plain(&device.now.name),
            plain(name),
            rate(meanwhile.requests),
        ];
        cells.push(duration(meanwhile.mean));
        cells.extend(latencies(meanwhile));
        cells.push(rate(meanwhile.errors));
        cells.extend([total.requests, total.errors].map(|count| count.to_string()));
        cells
    })
}

fn sort(devices: &mut [DeviceRate], order: Order) {
    let weight = |device: &DeviceRate| match order {
        Order::Name => 0.0,
        Order::Iops => device.all.requests,
        Order::Bytes => device.read + device.written,
        Order::Latency => device
            .all
            .percentiles
            .map_or(0.0, |[_, most, _]| most as f64),
        Order::Errors => device.all.errors,
    };
    devices.sort_by(|a, b| {
        weight(b)
            .total_cmp(&weight(a))
            .then_with(|| a.now.name.cmp(&b.now.name))
    });
}

/// Puts rates into tables; queues and operations are those of the device in row `only`, or of all.
pub(super) fn tables(mut rates: Rates, order: Order, only: Option<usize>) -> Tables {
    sort(&mut rates.devices, order);
    let shown = |at: usize| only.is_none_or(|only| only == at);
    let listed = rates
        .devices
        .iter()
        .enumerate()
        .filter(|(at, _)| shown(*at));
    Tables {
        queues: Table {
            columns: QUEUES,
            rows: listed
                .clone()
                .flat_map(|(_, device)| device.queues.iter().map(queue))
                .collect(),
        },
        operations: Table {
            columns: OPERATIONS,
            rows: listed.flat_map(|(_, device)| operations(device)).collect(),
        },
        cores: Table {
            columns: CORES,
            rows: rates
                .cores
                .iter()
                .enumerate()
                .map(|(at, of)| core(at, of))
                .collect(),
        },
        devices: Table {
            columns: DEVICES,
            rows: rates.devices.iter().map(device).collect(),
        },
    }
}
