//! `ferry trace`: prints what the cores have written down at their trace points.
//!
//! It reads the file that `trace_get_info` names, which belongs to the data plane's user. The cores do not notice.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use ferry_shared::trace::{GROUPS, POINTS_PER_GROUP, Record, Traces};
use nix::poll::{PollTimeout, poll};

/// Time between two looks with --follow.
const LOOK: Duration = Duration::from_millis(100);

/// The command line of `ferry trace`.
#[derive(clap::Args, Debug)]
#[command(after_help = HELP)]
pub struct Args {
    /// File of the traces, as trace_get_info names it
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Go on until the data plane ends
    #[arg(short, long)]
    follow: bool,
}

const HELP: &str = "\
Turn points on first: `ferry rpc trace_enable_tpoint_group fuse`, or `all`; `trace_get_tpoint_group_mask` lists them. Each
line has the time in seconds since the data plane's start, the core, the device's number and its queue, the point, and what
it tells. Each core keeps the newest 16384 records.";

/// Prints the records of all cores in the order of their times.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let opened = File::open(&args.file);
    let file = opened.with_context(|| {
        format!(
            "cannot open {}; it belongs to the user of the data plane, and ends with it",
            args.file.display()
        )
    })?;
    let traces =
        Traces::open(&file).with_context(|| format!("{} holds no traces", args.file.display()))?;
    let mut next = vec![0; traces.cores()];
    loop {
        let mut all: Vec<(usize, Record)> = Vec::new();
        for (core, from) in next.iter_mut().enumerate() {
            let (records, after) = traces.records(core, *from);
            *from = after;
            all.extend(records.into_iter().map(|record| (core, record)));
        }
        all.sort_by_key(|(_, record)| record.ns);
        let text: String = all
            .iter()
            .map(|(core, record)| line(*core, record))
            .collect();
        match io::stdout().write_all(text.as_bytes()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            written => written.context("cannot print")?,
        }
        if !args.follow {
            return Ok(());
        }
        if !args.file.exists() {
            bail!("the data plane has ended");
        }
        // Nothing is polled: this only passes the time, and a signal ends it early.
        let _ = poll(
            &mut [],
            PollTimeout::try_from(LOOK).unwrap_or(PollTimeout::ZERO),
        );
    }
}

/// One record as a line.
fn line(core: usize, record: &Record) -> String {
    let number = usize::from(record.point);
    let group = GROUPS.get(number / POINTS_PER_GROUP);
    let point = group.and_then(|group| group.points.get(number % POINTS_PER_GROUP));
    let (name, args) = point.copied().unwrap_or(("UNKNOWN", ["", ""]));
    let seconds = record.ns / 1_000_000_000;
    let rest = record.ns % 1_000_000_000;
    let mut line = format!("{seconds}.{rest:09} core {core}");
    if record.device != 0 {
        // Writing to a string cannot fail.
        let _ = write!(line, " device {} queue {}", record.device, record.queue);
    }
    let _ = write!(line, " {name}");
    for (name, value) in args
        .iter()
        .zip(record.args)
        .filter(|(name, _)| !name.is_empty())
    {
        let _ = match *name {
            // A negative one is an error number.
            "result" => write!(line, " {name} {}", value as u32 as i32),
            _ => write!(line, " {name} {value}"),
        };
    }
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_shared::trace::Point;

    #[test]
    fn a_record_is_printed_with_what_its_point_tells() {
        let record = Record {
            ns: 1_500_000_007,
            point: Point::IoDone as u8,
            device: 3,
            queue: 1,
            args: [12, (-5i32) as u32 as u64],
        };
        let expected = "1.500000007 core 2 device 3 queue 1 FSDEV_IO_DONE unique 12 result -5\n";
        assert_eq!(line(2, &record), expected);
        let sleep = Record {
            point: Point::Sleep as u8,
            ..Record::default()
        };
        assert_eq!(line(0, &sleep), "0.000000000 core 0 REACTOR_SLEEP\n");
    }
}
