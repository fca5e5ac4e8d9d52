//! `ferry top`: what the service does, live on a terminal or as text.
//!
//! It asks the control plane for the counters (`ferry_get_counters`), which the cores write into shared memory, and shows
//! what has changed between two answers. So it needs nothing but the RPC socket, and whoever may call that one method may
//! use it. Either process may be restarted meanwhile: it says so, and goes on when there are counters again.

mod feed;
mod sample;
mod screen;
mod text;
mod view;

use core::time::Duration;
use std::io;
use std::io::IsTerminal;
use std::io::Write;
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::time::Instant;
use std::time::SystemTime;

use anyhow::bail;

use feed::Feed;
use feed::Learnt;
use sample::Rates;
use sample::Sample;
use view::Order;

const SHORTEST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(3600);

/// The command line of `ferry top`.
#[derive(clap::Args, Debug)]
#[command(after_help = KEYS)]
pub struct Args {
    /// RPC socket of the control plane
    #[arg(
        short = 's',
        long = "server-addr",
        value_name = "SOCKET",
        default_value = "/var/tmp/spdk.sock"
    )]
    socket: PathBuf,
    /// Seconds from one look to the next, 0.1 to 3600
    #[arg(short = 'i', long, value_name = "SECONDS", default_value = "1", value_parser = parse_interval)]
    interval: Duration,
    /// Seconds to wait for an answer before the control plane is said to be silent
    #[arg(short = 't', long, value_name = "SECONDS", default_value = "5", value_parser = parse_interval)]
    timeout: Duration,
    /// How devices are ordered
    #[arg(long, value_enum, value_name = "BY", default_value = "name")]
    sort: Order,
    /// Print frames as text instead of using the terminal
    #[arg(short = 'b', long)]
    batch: bool,
    /// Frames to print with --batch [default: no end]
    #[arg(short = 'n', long, value_name = "N", requires = "batch")]
    frames: Option<u64>,
    /// Print one frame as text, of what happens within one interval, and fail when there is none
    #[arg(long, conflicts_with = "frames")]
    once: bool,
}

const KEYS: &str = "\
Keys:
  q, Esc, Ctrl-C  end
  space           hold the view, or let it go on
  + -             look half or twice as often
  s               order devices by name, IOPS, MiB/s, latency or errors
  up, down        select a device
  o               operations and queues of the selected device, or of all
  u               show the queues, or not
  c               show the cores, or not
  Ctrl-L          draw everything anew

Latencies are exact to a factor of two. SLOT-WAITS and BUFFER-WAITS are back-pressure: a queue waited for a request slot,
a request for a data buffer. It needs permission to call ferry_get_counters only (--allow GROUP:ferry_get_counters).";

fn parse_interval(text: &str) -> Result<Duration, String> {
    text.parse()
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .filter(|interval| (SHORTEST..=LONGEST).contains(interval))
        .ok_or_else(|| format!("{text:?} is not a number of seconds from 0.1 to 3600"))
}

fn longest(interval: Duration) -> Duration {
    interval.min(LONGEST)
}

fn shortest(interval: Duration) -> Duration {
    interval.max(SHORTEST)
}

/// Shows what the service does.
pub fn run(args: &Args) -> anyhow::Result<()> {
    if args.once || args.batch {
        return print_frames(args);
    }
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        bail!(
            "standard input or output is no terminal; --batch prints text, --once a single frame"
        );
    }
    screen::run(args)
}

/// The last two samples, and why there is no newer one.
struct Latest {
    socket: PathBuf,
    before: Option<Sample>,
    now: Option<Sample>,
    silent: Option<(Instant, String)>,
}

impl Latest {
    fn new(args: &Args) -> Latest {
        Latest {
            socket: args.socket.clone(),
            before: None,
            now: None,
            silent: None,
        }
    }

    fn learn(&mut self, learnt: Learnt) {
        match learnt {
            Ok(sample) => {
                self.before = self.now.replace(sample);
                self.silent = None;
            }
            Err(why) => {
                let since = self
                    .silent
                    .take()
                    .map_or_else(Instant::now, |(since, _)| since);
                self.silent = Some((since, why));
            }
        }
    }

    fn is_silent(&self) -> bool {
        self.silent.is_some()
    }

    /// Nothing while there are no two samples, or no service.
    fn rates(&self) -> Rates {
        match (&self.before, &self.now) {
            (Some(before), Some(now)) if self.silent.is_none() => sample::rates(before, now),
            _ => Rates {
                cores: Vec::new(),
                devices: Vec::new(),
            },
        }
    }

    fn status(&self) -> String {
        let begin = format!("ferry top  {}  {}", clock(), self.socket.display());
        match (&self.silent, &self.now) {
            (Some((since, why)), _) => {
                format!(
                    "{begin}  no counters for {} s: {why}",
                    since.elapsed().as_secs()
                )
            }
            (None, None) => format!("{begin}  connecting"),
            (None, Some(now)) => {
                let counters = &now.counters;
                let mounted = counters.devices.iter().filter(|device| device.mounted);
                format!(
                    "{begin}  data plane {}  cores {}  devices {}, mounted {}",
                    counters.pid,
                    counters.cores.len(),
                    counters.devices.len(),
                    mounted.count()
                )
            }
        }
    }
}

/// The time of the day, UTC.
fn clock() -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let seconds = now.map_or(0, |since| since.as_secs()) % 86_400;
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    format!("{hours:02}:{minutes:02}:{:02}Z", seconds % 60)
}

fn print_frames(args: &Args) -> anyhow::Result<()> {
    let (learns, learnt) = channel();
    let _feed = Feed::start(&args.socket, args.interval, args.timeout, move |one| {
        learns.send(one).is_ok()
    })?;
    let mut latest = Latest::new(args);
    let frames = if args.once { Some(1) } else { args.frames };
    let mut printed = 0;
    for one in learnt {
        if args.once
            && let Err(why) = &one
        {
            bail!("{why}");
        }
        latest.learn(one);
        if latest.before.is_none() && !latest.is_silent() {
            // One sample says nothing about what happens.
            continue;
        }
        let tables = view::tables(latest.rates(), args.sort, None);
        let frame = text::frame(&latest.status(), &tables);
        let separator = if printed > 0 { "\n" } else { "" };
        let mut out = io::stdout().lock();
        match write!(out, "{separator}{frame}").and_then(|()| out.flush()) {
            // Whoever read has had enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            written => written?,
        }
        printed += 1;
        if frames.is_some_and(|frames| printed >= frames) {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
