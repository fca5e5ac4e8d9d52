//! What a run says: one record per measurement, and ratios between targets.

use std::fmt::Write;

use anyhow::Result;
use serde::Serialize;

use super::drive::Sample;
use super::work::Work;

/// One measurement.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Record {
    pub(super) target: String,
    pub(super) work: String,
    pub(super) repetition: u32,
    pub(super) disturbed: bool,
    pub(super) ops: u64,
    pub(super) seconds: f64,
    pub(super) ops_per_second: f64,
    pub(super) mib_per_second: Option<f64>,
    /// Of the server's processors, all threads and the kernel's work for them.
    pub(super) server_cpu_seconds: Option<f64>,
    pub(super) ops_per_server_cpu_second: Option<f64>,
    pub(super) latency_us: Latency,
}

/// Microseconds.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Latency {
    pub(super) p50: f64,
    pub(super) p90: f64,
    pub(super) p99: f64,
    pub(super) p999: f64,
    pub(super) max: f64,
}

impl Record {
    pub(super) fn new(
        target: &str,
        work: &Work,
        repetition: u32,
        disturbed: bool,
        sample: &Sample,
    ) -> Record {
        let seconds = sample.wall.as_secs_f64();
        let rate = sample.ops as f64 / seconds;
        let cpu = sample.cpu.map(|cpu| cpu.as_secs_f64());
        let at = |quantile| sample.latency.value_at_quantile(quantile) as f64 / 1e3;
        Record {
            target: target.to_owned(),
            work: work.to_string(),
            repetition,
            disturbed,
            ops: sample.ops,
            seconds,
            ops_per_second: rate,
            mib_per_second: work
                .kind
                .moves_data()
                .then(|| rate * f64::from(work.block) / f64::from(1 << 20)),
            server_cpu_seconds: cpu,
            ops_per_server_cpu_second: cpu
                .filter(|&cpu| cpu > 0.0)
                .map(|cpu| sample.ops as f64 / cpu),
            latency_us: Latency {
                p50: at(0.5),
                p90: at(0.9),
                p99: at(0.99),
                p999: at(0.999),
                max: sample.latency.max() as f64 / 1e3,
            },
        }
    }

    /// Prints it, as an object of JSON or for a person.
    pub(super) fn print(&self, json: bool) -> Result<()> {
        match json {
            true => println!("{}", serde_json::to_string(self)?),
            false => println!("{}", self.line()),
        }
        Ok(())
    }

    /// One line for a person.
    fn line(&self) -> String {
        let mut line = format!(
            "{:<22} {:<20} {:>9.1}k ops/s",
            self.target,
            self.work,
            self.ops_per_second / 1e3
        );
        if let Some(rate) = self.mib_per_second {
            let _ = write!(line, " {rate:>8.0} MiB/s");
        } else {
            line.push_str("                ");
        }
        match self.ops_per_server_cpu_second {
            Some(rate) => {
                let _ = write!(line, " {:>9.1}k/server CPU s", rate / 1e3);
            }
            None => line.push_str("                        "),
        }
        let Latency { p50, p99, p999, .. } = self.latency_us;
        let _ = write!(line, "  p50 {p50:.1} p99 {p99:.1} p99.9 {p999:.1} us");
        if self.disturbed {
            line.push_str("  disturbed");
        }
        line
    }
}

/// The median; `None` of nothing.
pub(super) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let upper = *values.get(middle)?;
    if values.len().is_multiple_of(2) {
        Some((values.get(middle - 1)? + upper) / 2.0)
    } else {
        Some(upper)
    }
}

/// A family of targets of which the best one counts: what comes before `/` in their names.
fn family(target: &str) -> &str {
    target.split('/').next().unwrap_or(target)
}

/// How much better `ours` is than the best of `theirs` in one work: the median of the ratios within each repetition.
/// Above 1 is better for every `of`, which gives a rate.
fn ratio(
    records: &[Record],
    work: &str,
    ours: &str,
    theirs: &str,
    of: fn(&Record) -> Option<f64>,
) -> Option<f64> {
    let mut targets: Vec<&str> = records.iter().map(|r| r.target.as_str()).collect();
    targets.sort_unstable();
    targets.dedup();
    let find = |target: &str, repetition: u32| {
        let mut found = records.iter();
        found
            .find(|r| {
                r.target == target && r.work == work && r.repetition == repetition && !r.disturbed
            })
            .and_then(of)
    };
    let last = records.iter().map(|r| r.repetition).max()?;
    let against = |target: &str| {
        let ratios = (0..=last).filter_map(|n| Some(find(ours, n)? / find(target, n)?));
        median(ratios.collect())
    };
    let peers = targets.iter().filter(|t| family(t) == theirs);
    // The best peer is the one that leaves us the smallest ratio.
    peers.filter_map(|t| against(t)).reduce(f64::min)
}

/// The table of ratios: the first family against each other one.
pub(super) fn table(records: &[Record]) -> String {
    let mut targets: Vec<&str> = Vec::new();
    let mut works: Vec<&str> = Vec::new();
    for record in records {
        if !targets.contains(&record.target.as_str()) {
            targets.push(&record.target);
        }
        if !works.contains(&record.work.as_str()) {
            works.push(&record.work);
        }
    }
    let Some(first) = targets.first().map(|t| family(t)) else {
        return String::new();
    };
    let ours: Vec<&str> = targets
        .iter()
        .copied()
        .filter(|t| family(t) == first)
        .collect();
    let mut others: Vec<&str> = Vec::new();
    for target in &targets {
        if family(target) != first && !others.contains(&family(target)) {
            others.push(family(target));
        }
    }
    let pairs: Vec<(&str, &str)> = others
        .iter()
        .flat_map(|&other| ours.iter().map(move |&us| (us, other)))
        .collect();
    let mut out = String::from("| work |");
    for (us, other) in &pairs {
        let _ = write!(out, " {us} : {other} |");
    }
    out.push_str("\n| --- |");
    out.push_str(&" --- |".repeat(pairs.len()));
    out.push('\n');
    for work in works {
        let _ = write!(out, "| `{work}` |");
        for (us, other) in &pairs {
            let cpu = ratio(records, work, us, other, |r| r.ops_per_server_cpu_second);
            let rate = ratio(records, work, us, other, |r| Some(r.ops_per_second));
            match (cpu, rate) {
                (Some(cpu), Some(rate)) => {
                    let _ = write!(out, " {cpu:.2} ({rate:.2}) |");
                }
                _ => out.push_str(" - |"),
            }
        }
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::{Latency, Record, median, table};

    fn record(target: &str, repetition: u32, rate: f64) -> Record {
        Record {
            target: target.to_owned(),
            work: "getattr:4k:32:1".to_owned(),
            repetition,
            disturbed: false,
            ops: 1,
            seconds: 1.0,
            ops_per_second: rate,
            mib_per_second: None,
            server_cpu_seconds: Some(0.5),
            ops_per_server_cpu_second: Some(2.0 * rate),
            latency_us: Latency {
                p50: 0.0,
                p90: 0.0,
                p99: 0.0,
                p999: 0.0,
                max: 0.0,
            },
        }
    }

    #[test]
    fn ratios_are_medians_within_repetitions_against_the_best_of_a_family() {
        let mut records = Vec::new();
        // A machine that becomes twice as fast changes no ratio.
        for (n, speed) in [(0, 1.0), (1, 2.0), (2, 1.0)] {
            records.push(record("ferry", n, 300.0 * speed));
            records.push(record("peer/slow", n, 100.0 * speed));
            records.push(record("peer/fast", n, 150.0 * speed));
        }
        let table = table(&records);
        let row = table.lines().last().expect("a row");
        assert_eq!(row, "| `getattr:4k:32:1` | 2.00 (2.00) |");
    }

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(Vec::new()), None);
    }
}
