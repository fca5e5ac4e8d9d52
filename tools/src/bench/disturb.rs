//! A command that runs in every second measurement and is stopped in the others, and what it does to latencies.

use std::fmt::Write;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use hdrhistogram::Histogram;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::drive::Sample;

/// The command, in a process group of its own.
pub(super) struct Disturbance {
    child: Child,
    command: String,
}

impl Disturbance {
    /// Starts the command, stopped.
    pub(super) fn new(command: &str) -> Result<Disturbance> {
        let words = shlex::split(command)
            .with_context(|| format!("--disturb {command:?} has an unclosed quote"))?;
        let (program, args) = words.split_first().context("--disturb names no command")?;
        let child = Command::new(program)
            .args(args)
            .stdin(Stdio::null())
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {program}"))?;
        let disturbance = Disturbance {
            child,
            command: command.to_owned(),
        };
        disturbance.signal(Signal::SIGSTOP)?;
        Ok(disturbance)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        // It is waited for by this value only, so the number is its own.
        let group = Pid::from_raw(self.child.id().cast_signed());
        killpg(group, signal).with_context(|| format!("cannot send {signal} to {}", self.command))
    }

    /// Lets it run for as long as `measure` takes.
    pub(super) fn during<T>(&mut self, measure: impl FnOnce() -> Result<T>) -> Result<T> {
        self.signal(Signal::SIGCONT)?;
        let measured = measure()?;
        if let Some(status) = self.child.try_wait()? {
            bail!("`{}` has ended too early: {status}", self.command);
        }
        self.signal(Signal::SIGSTOP)?;
        Ok(measured)
    }

    /// Ends it; it has to succeed.
    pub(super) fn end(mut self) -> Result<()> {
        self.signal(Signal::SIGTERM)?;
        self.signal(Signal::SIGCONT)?;
        let status = self.child.wait()?;
        ensure!(status.success(), "`{}` has failed: {status}", self.command);
        Ok(())
    }
}

impl Drop for Disturbance {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.signal(Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

/// The latencies of a work on a target, all its measurements together: undisturbed, and disturbed.
pub(super) struct Effect {
    what: String,
    latency: [Histogram<u64>; 2],
}

impl Effect {
    /// Adds a measurement to the one of `effects` that it belongs to.
    pub(super) fn add(
        effects: &mut Vec<Effect>,
        what: &str,
        disturbed: bool,
        sample: &Sample,
    ) -> Result<()> {
        let at = match effects.iter().position(|effect| effect.what == what) {
            Some(at) => at,
            None => {
                let empty = Histogram::new_from(&sample.latency);
                effects.push(Effect {
                    what: what.to_owned(),
                    latency: [empty.clone(), empty],
                });
                effects.len() - 1
            }
        };
        effects[at].latency[usize::from(disturbed)].add(&sample.latency)?;
        Ok(())
    }

    /// For a person: both distributions, and the second in terms of the first one's 99.9th percentile.
    pub(super) fn text(&self) -> String {
        let mut text = format!("{}\n", self.what);
        let us = |ns: u64| ns as f64 / 1e3;
        for (name, latency) in ["undisturbed", "disturbed"].iter().zip(&self.latency) {
            let [p50, p99, p999] = [0.5, 0.99, 0.999].map(|q| us(latency.value_at_quantile(q)));
            let (count, max) = (latency.len(), us(latency.max()));
            let _ = writeln!(
                text,
                "  {name:<12} {count:>9} ops  p50 {p50:.1} p99 {p99:.1} p99.9 {p999:.1} max {max:.1} us"
            );
        }
        let [undisturbed, disturbed] = &self.latency;
        let usual = undisturbed.value_at_quantile(0.999);
        let to_usual = |ns: u64| ns as f64 / usual.max(1) as f64;
        let _ = writeln!(
            text,
            "  to the undisturbed p99.9: disturbed p99.9 {:.2}, disturbed max {:.2}, undisturbed max {:.2}; {} of the \
             disturbed and {} of the undisturbed above 1.5",
            to_usual(disturbed.value_at_quantile(0.999)),
            to_usual(disturbed.max()),
            to_usual(undisturbed.max()),
            above(disturbed, usual),
            above(undisturbed, usual)
        );
        text
    }
}

/// How many took longer than one and a half of that.
fn above(latency: &Histogram<u64>, usual: u64) -> u64 {
    let limit = usual.saturating_mul(3) / 2;
    latency.len() - latency.count_between(0, limit)
}

#[cfg(test)]
mod tests {
    use super::{Disturbance, Effect};
    use crate::bench::drive::Sample;
    use core::time::Duration;
    use hdrhistogram::Histogram;
    use std::time::Instant;

    fn sample(nanos: &[(u64, u64)]) -> Sample {
        let mut latency = Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("bounds");
        for (value, count) in nanos {
            latency.record_n(*value, *count).expect("in bounds");
        }
        Sample {
            ops: latency.len(),
            wall: Duration::from_secs(1),
            cpu: None,
            latency,
        }
    }

    #[test]
    fn all_measurements_count_and_the_disturbed_are_told_by_the_others_tail() {
        let mut effects = Vec::new();
        for _ in 0..2 {
            let quiet = sample(&[(1000, 990), (10_000, 10)]);
            Effect::add(&mut effects, "a", false, &quiet).expect("alike");
            let loud = sample(&[(1000, 998), (14_000, 1), (40_000, 1)]);
            Effect::add(&mut effects, "a", true, &loud).expect("alike");
        }
        Effect::add(&mut effects, "b", false, &sample(&[(1000, 1)])).expect("alike");
        assert_eq!(effects.len(), 2);
        let text = effects[0].text();
        assert!(text.contains("undisturbed       2000 ops"), "{text}");
        assert!(
            text.contains("disturbed max 4.00, undisturbed max 1.00; 2 of the disturbed and 0 of"),
            "{text}"
        );
    }

    #[test]
    fn a_command_that_ends_or_fails_is_told_of() {
        assert!(Disturbance::new("").is_err());
        assert!(Disturbance::new("'").is_err());
        assert!(Disturbance::new("/there/is/none").is_err());
        let ready = std::env::temp_dir().join(format!("ferry-disturb-{}", std::process::id()));
        let obeys = format!(
            "sh -c 'trap \"exit 0\" TERM; : > {}; while :; do :; done'",
            ready.display()
        );
        let mut command = Disturbance::new(&obeys).expect("starts");
        let until_ready = || {
            let began = Instant::now();
            while !ready.exists() {
                assert!(began.elapsed() < Duration::from_secs(60), "it does not run");
                std::thread::yield_now();
            }
            Ok(7)
        };
        assert_eq!(command.during(until_ready).expect("runs"), 7);
        std::fs::remove_file(&ready).expect("was there");
        let fails = Disturbance::new("sh -c 'exit 1'").expect("starts");
        assert!(fails.end().is_err());
        command.end().expect("ends as it is told");
    }
}
