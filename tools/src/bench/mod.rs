//! `ferry bench`: a load generator for virtio-fs devices, Ferry's and others'.
//!
//! Takes any number of targets and any number of works, and runs every work on one target after the other, over and over, so
//! that what disturbs the machine disturbs all of them: medians of ratios within such a round are comparable where single
//! figures are not. A target is the socket of a device ([`target`], driven by [`drive`]) or the exported directory
//! itself ([`raw`]). Used by `tools/bench-peers`; it measures and judges nothing.

mod client;
mod disturb;
mod drive;
mod raw;
mod report;
mod slot;
mod target;
mod work;

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Error, Result, bail, ensure};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use crate::driver::Protocol;
use disturb::{Disturbance, Effect};
use drive::{Load, Sample};
use raw::{RawTarget, Way};
use report::Record;
use target::{FuseTarget, Layout};
use work::Work;

/// The command line of `ferry bench`.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[arg(
        value_name = "TARGET",
        required = true,
        help = "What to measure, in turn: [NAME=]SOCKET[,pid=PID][,vfio-user|,vhost-user] for a device, NAME=raw:DIR or \
                NAME=ring:DIR for the exported directory itself, by system calls or through io_uring. Names that begin \
                alike up to a slash are one family, of which --table takes the best"
    )]
    targets: Vec<Target>,
    #[arg(
        help = "What to do: KIND[:BLOCK[:DEPTH[:QUEUES]]]; the kinds are randread, read, randwrite, write, getattr, \
                lookup, open, create, readdirplus and mixed",
        short,
        long,
        value_name = "WORK",
        value_delimiter = ',',
        default_value = "randread"
    )]
    work: Vec<Work>,
    /// How long to measure each
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    seconds: f64,
    /// How long to run before that
    #[arg(long, value_name = "SECONDS", default_value_t = 0.1)]
    warm_up: f64,
    /// How often to measure each
    #[arg(long, value_name = "N", default_value_t = 1)]
    repeat: u32,
    /// Files to work on
    #[arg(long, value_name = "N", default_value_t = 16)]
    files: u32,
    /// Bytes of each
    #[arg(long, value_name = "BYTES", default_value = "4m", value_parser = work::bytes)]
    file_size: u64,
    /// Entries of the directory that is scanned
    #[arg(long, value_name = "N", default_value_t = 1000)]
    entries: u32,
    /// Processor of the generator
    #[arg(long, value_name = "CPU")]
    cpu: Option<usize>,
    /// Processor of the servers, where the directory itself is measured
    #[arg(long, value_name = "CPU")]
    server_cpu: Option<usize>,
    /// Operations to begin each second on a device, instead of as many as it takes
    #[arg(long, value_name = "N")]
    rate: Option<f64>,
    /// Measure everything in turn without and with this command, split as a shell does, which is stopped in between, and
    /// print in the end what it does to latencies. It is sent SIGTERM then, and has to succeed
    #[arg(long, value_name = "COMMAND")]
    disturb: Option<String>,
    /// Print one JSON object per measurement
    #[arg(long)]
    json: bool,
    /// Print a Markdown table in the end: the first family of targets against each other one, ratios of operations per CPU
    /// second of the server, and of throughput in parentheses
    #[arg(long)]
    table: bool,
}

/// One target as it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Target {
    name: String,
    what: What,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum What {
    Device {
        socket: PathBuf,
        protocol: Option<Protocol>,
        pid: Option<i32>,
    },
    Directory(PathBuf, Way),
}

impl FromStr for Target {
    type Err = Error;

    fn from_str(text: &str) -> Result<Target> {
        let (name, place) = text
            .split_once('=')
            .filter(|(n, _)| !n.contains([',', ':']))
            .unwrap_or((text, text));
        if let Some(dir) = place.strip_prefix("raw:") {
            return Ok(Target::directory(name, dir, Way::Calls));
        }
        if let Some(dir) = place.strip_prefix("ring:") {
            return Ok(Target::directory(name, dir, Way::Ring));
        }
        let mut words = place.split(',');
        let socket = PathBuf::from(words.next().unwrap_or_default());
        let (mut protocol, mut pid) = (None, None);
        for word in words {
            match word.split_once('=') {
                None if word == "vfio-user" => protocol = Some(Protocol::VfioUser),
                None if word == "vhost-user" => protocol = Some(Protocol::VhostUser),
                Some(("pid", number)) => {
                    pid = Some(
                        number
                            .parse()
                            .with_context(|| format!("the pid in `{text}`"))?,
                    );
                }
                _ => bail!("`{word}` in `{text}` is not pid=PID, vfio-user or vhost-user"),
            }
        }
        Ok(Target {
            name: name.to_owned(),
            what: What::Device {
                socket,
                protocol,
                pid,
            },
        })
    }
}

impl Target {
    fn directory(name: &str, dir: &str, way: Way) -> Target {
        Target {
            name: name.to_owned(),
            what: What::Directory(Path::new(dir).to_owned(), way),
        }
    }
}

/// A target that is ready.
enum Open {
    Device(Box<FuseTarget>),
    Directory(RawTarget),
}

/// Keeps the calling thread on a processor.
fn pin(cpu: Option<usize>) -> Result<()> {
    let Some(cpu) = cpu else { return Ok(()) };
    let mut set = CpuSet::new();
    set.set(cpu)
        .and_then(|()| sched_setaffinity(Pid::from_raw(0), &set))
        .with_context(|| format!("cannot run on processor {cpu}"))
}

fn seconds(value: f64, what: &str) -> Result<Duration> {
    Duration::try_from_secs_f64(value).with_context(|| format!("--{what} {value}"))
}

/// Measures everything and prints it.
pub fn run(args: &Args) -> Result<()> {
    let warm = seconds(args.warm_up, "warm-up")?;
    let time = seconds(args.seconds, "seconds")?;
    ensure!(!time.is_zero(), "--seconds must be above 0");
    let layout = Layout {
        files: args.files,
        file_size: args.file_size,
        entries: args.entries,
    };
    ensure!(
        args.rate.is_none_or(|rate| rate > 0.0),
        "--rate must be above 0"
    );
    let disturb = args.disturb.as_deref();
    let mut disturbance = disturb.map(Disturbance::new).transpose()?;
    let mut effects: Vec<Effect> = Vec::new();
    pin(args.cpu)?;
    let mut targets = Vec::new();
    for target in &args.targets {
        let open = open(target, &layout, args).with_context(|| target.name.clone())?;
        targets.push((target.name.as_str(), open));
    }
    let mut records = Vec::new();
    let parts: &[bool] = if disturb.is_some() {
        &[false, true]
    } else {
        &[false]
    };
    for work in &args.work {
        for repetition in 0..args.repeat {
            for (name, target) in &mut targets {
                for &disturbed in parts {
                    let mut measure = || measure(target, *work, [warm, time], args.rate);
                    let sample = match disturbance.as_mut().filter(|_| disturbed) {
                        None => measure(),
                        Some(disturbance) => disturbance.during(measure),
                    };
                    let sample = sample.with_context(|| format!("{name}: {work}"))?;
                    let Some(sample) = sample else { continue };
                    let record = Record::new(name, work, repetition, disturbed, &sample);
                    record.print(args.json)?;
                    Effect::add(&mut effects, &format!("{name} {work}"), disturbed, &sample)?;
                    records.push(record);
                }
            }
        }
    }
    if let Some(disturbance) = disturbance {
        disturbance.end()?;
        effects
            .iter()
            .for_each(|effect| print!("{}", effect.text()));
    }
    for (name, target) in targets {
        if let Open::Device(device) = target {
            device
                .close()
                .with_context(|| format!("{name}: cannot end the session"))?;
        }
    }
    if args.table {
        print!("{}", report::table(&records));
    }
    Ok(())
}

/// Runs a work on a target; `None` where it cannot be done there.
fn measure(
    target: &mut Open,
    work: Work,
    [warm, time]: [Duration; 2],
    rate: Option<f64>,
) -> Result<Option<Sample>> {
    match target {
        Open::Device(device) => Load::new(device, work).and_then(|load| load.run(warm, time, rate)),
        Open::Directory(raw) if !raw.can(&work) => return Ok(None),
        Open::Directory(raw) => raw.run(work, warm, time),
    }
    .map(Some)
}

fn open(target: &Target, layout: &Layout, args: &Args) -> Result<Open> {
    Ok(match &target.what {
        What::Device {
            socket,
            protocol,
            pid,
        } => {
            let device = FuseTarget::open(socket, *protocol, *pid, layout, &args.work)?;
            Open::Device(Box::new(device))
        }
        What::Directory(path, way) => {
            Open::Directory(RawTarget::new(path, *layout, *way, args.server_cpu))
        }
    })
}
